//! Recipes on picture folders and the small models of the fixtures: what is refused before any work, and why.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::golden;
use engraft_data::{ImageSource, Labels, PictureModel, Processor, read_images};
use engraft_nn::Targets;
use engraft_recipe::Recipe;
use engraft_store::{Limits, Weights};
use engraft_train::{Session, method_specs};
use serde_json::{Value, json};

/// A directory with a model and a folder of 16 × 16 pictures.
struct Home(tempfile::TempDir);

impl Home {
    /// A copy of the fixture `model`, its configuration changed by `config`, with a processor.
    fn new(model: &str, config: &Value, processor: &Value) -> Home {
        let home = tempfile::tempdir().unwrap();
        let (from, to) = (golden().join("models").join(model), home.path().join("model"));
        fs::create_dir(&to).unwrap();
        fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
        let mut settings: Value =
            serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
        for (key, value) in config.as_object().unwrap() {
            settings[key] = value.clone();
        }
        fs::write(to.join("config.json"), settings.to_string()).unwrap();
        fs::write(to.join("preprocessor_config.json"), processor.to_string()).unwrap();
        Home(home)
    }

    fn classes(self, names: &[&str]) -> Home {
        for name in names {
            let folder = self.path().join("data").join(name);
            fs::create_dir_all(&folder).unwrap();
            fs::copy(golden().join("images/pictures/same.png"), folder.join("1.png")).unwrap();
        }
        self
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn open(&self, data: &str) -> engraft_train::Result<Session> {
        self.open_roles("q", data)
    }

    fn open_roles(&self, roles: &str, data: &str) -> engraft_train::Result<Session> {
        let at = |name: &str| -> PathBuf { self.path().join(name) };
        let text = format!(
            "model = {:?}\n[method]\nname = \"lora\"\nroles = [{roles:?}]\n[data]\nformat = \"images\"\npath = {:?}\n{data}\n[train]\nsteps = 1\n",
            at("model"),
            at("data"),
        );
        let recipe = Recipe::parse(&text, "recipe.toml", &[], &method_specs())?;
        common::opened(&recipe)
    }

    fn refused(&self, data: &str, parts: &[&str]) {
        let error = match self.open(data) {
            Ok(_) => panic!("{parts:?} is not said"),
            Err(error) => error.to_string(),
        };
        for part in parts {
            assert!(error.contains(part), "{part} is not in {error}");
        }
    }
}

fn square(edge: usize) -> Value {
    json!({"image_processor_type": "ViTImageProcessor", "size": {"height": edge, "width": edge}})
}

#[test]
fn pictures_of_a_size_that_the_model_does_not_read_are_refused() {
    let none = json!({});
    let home = |model: &str, processor: Value| Home::new(model, &none, &processor).classes(&["a", "b"]);
    home("vit", square(12)).open("").unwrap();
    home("vit", square(224)).refused(
        "",
        &["224 × 224 pixels", "vit reads 12 × 12 only", "set size of", r#"{"height": 12, "width": 12}"#],
    );
    home("deit", json!({"image_processor_type": "DeiTImageProcessor", "size": 20, "crop_size": 16}))
        .refused("", &["16 × 16 pixels", "deit reads 12 × 12 only", "set crop_size of"]);
    home("vit", json!({"image_processor_type": "ViTImageProcessor", "do_resize": false}))
        .refused("", &["16 × 16 pixels", "set do_resize to true and size of"]);
    let crop = |edge: usize| json!({"image_processor_type": "BitImageProcessor", "do_resize": false, "crop_size": edge});
    home("dinov2", crop(16)).open("").unwrap();
    home("dinov2", crop(2)).refused("", &["2 × 2 pixels", "at least (`patch_size` in config.json)"]);
    home("dinov2", crop(16_384))
        .refused("", &["becomes 16384 × 16384 pixels", "may be given 16777216", "set crop_size in"]);
}

#[test]
fn names_that_the_head_does_not_know_are_told_or_refused() {
    let own = json!({"id2label": {"0": "cat", "1": "dog", "2": "bird", "3": "fish", "4": "horse"}});
    let home = |names: &[&str]| Home::new("vit", &own, &square(12)).classes(names);
    let class = |session: &Session| match session.train.examples[0].labels {
        Labels::Class(class) => class,
        _ => panic!("no class"),
    };
    let session = home(&["dog", "horse"]).open("").unwrap();
    assert_eq!((class(&session), session.labels.as_ref().map(Vec::len)), (1, Some(5)));
    assert!(session.new_tensors.is_empty() && !session.notes.iter().any(|note| note.contains("head")));
    home(&["dog", "hrse"]).refused("", &["`hrse` (did you mean `horse`?)", "data.labels", "recipe.toml:7:8"]);
    let session = home(&["a", "b", "birds", "d", "e"]).open("").unwrap();
    let note = session.notes.iter().find(|note| note.contains("is kept")).unwrap();
    for part in
        ["`a`, `b`, `birds` (did you mean `bird`?)", "`cat`, `dog`, `bird`", r#"train_also = ["classifier"]"#]
    {
        assert!(note.contains(part), "{part} is not in {note}");
    }
    let reordered = "labels = [\"dog\", \"cat\", \"bird\", \"fish\", \"horse\"]";
    let session = home(&["dog", "horse"]).open(reordered).unwrap();
    assert!(session.notes.iter().any(|note| note.contains("in another order")), "{:?}", session.notes);
    let session = home(&["a", "b"]).open("").unwrap();
    assert!(!session.new_tensors.is_empty() && !session.notes.iter().any(|note| note.contains("is kept")));
    let session = home(&["a"]).open("").unwrap();
    assert!(session.notes.iter().any(|note| note.contains("the same label")), "{:?}", session.notes);
    let session = home(&["dog"]).open("").unwrap();
    assert!(session.notes.iter().any(|note| note.contains("the same label")), "{:?}", session.notes);
}

#[test]
fn a_head_is_trained_whole_and_no_target() {
    let home = Home::new("vit", &json!({}), &square(12)).classes(&["a", "b"]);
    let error = home.open_roles("head", "").map(|_| ()).unwrap_err().to_string();
    assert!(
        error.contains("`train_also = [\"classifier\"]`") && !error.contains("matches nothing"),
        "{error}"
    );
}

#[test]
fn heads_that_are_not_trained_on_one_class_a_picture_are_refused() {
    for kind in ["regression", "multi_label_classification"] {
        for model in ["vit", "deit_teacher"] {
            let home = Home::new(model, &json!({"problem_type": kind}), &square(12)).classes(&["a", "b"]);
            home.refused("", &[kind, "not trained yet", "single_label_classification"]);
        }
    }
}

#[test]
fn picture_files_are_as_pillow_reads_them() {
    let expected = Weights::open_file(&golden().join("images/rgb.safetensors"), &Limits::default()).unwrap();
    let settings = json!({"do_resize": false, "do_rescale": false, "do_normalize": false});
    let home = tempfile::tempdir().unwrap();
    // 16 grey bits are refused: Pillow cuts them off.
    let names: Vec<&str> = expected.names().filter(|name| *name != "grey16.png").collect();
    for name in &names {
        let folder = home.path().join("data");
        fs::create_dir_all(&folder).unwrap();
        fs::copy(golden().join("images/pictures").join(name), folder.join(name)).unwrap();
    }
    let model = PictureModel { model_type: "vit", channels: 3 };
    let processor = Processor::from_json("settings", &settings, model).unwrap();
    let images = read_images(ImageSource::Folder(home.path()), processor, None).unwrap().images.unwrap();
    assert!(images.len() == names.len() && names.len() > 15);
    for index in 0..images.len() {
        let called = images.name(index);
        let tensor = expected.get(called.rsplit('/').next().unwrap()).unwrap();
        let (height, width) = images.size(index);
        assert_eq!(tensor.shape, [height, width, 3], "{called}");
        let (levels, pixels) = (tensor.bytes(), images.pixels(index).unwrap());
        let points = height * width;
        let same =
            (0..points).all(|at| (0..3).all(|c| pixels[c * points + at] == f32::from(levels[at * 3 + c])));
        assert!(same, "{called}");
    }
}

#[test]
fn targets_by_older_names_are_saved_by_the_present_ones() {
    let home = Home::new("vit", &json!({}), &square(12)).classes(&["a", "b"]);
    let open = |settings: &str| {
        let at = |name: &str| home.path().join(name);
        let text = format!(
            "model = {:?}\n[method]\nname = \"lora\"\ntargets = [\"query\", \"intermediate.dense\"]\n{settings}\n[data]\nformat = \"images\"\npath = {:?}\n[train]\nsteps = 1\n",
            at("model"),
            at("data"),
        );
        common::opened(&Recipe::parse(&text, "recipe.toml", &[], &method_specs()).unwrap()).unwrap()
    };
    let session = open("rank = 2");
    let expected = "vit.layers.0.attention.q_proj.lora_A.weight";
    assert!(session.adapter.params().iter().any(|p| p.name == expected));
    let saved = session.methods[0].1.clone().unwrap();
    assert_eq!(saved, Targets { train_also: saved.train_also.clone(), ..Targets::names(["fc1", "q_proj"]) });
    assert!(
        session.notes.iter().any(|note| note.contains("file has the present ones")),
        "{:?}",
        session.notes
    );
    // A pattern goes by the names that it was written for.
    let session = open("rank_pattern = { \"intermediate.dense\" = 3 }");
    let expected = "vit.encoder.layer.0.intermediate.dense.lora_A.weight";
    let param = session.adapter.params().iter().find(|p| p.name == expected).unwrap();
    assert_eq!(param.param.value().dim(0), 3);
    assert!(session.notes.iter().any(|note| note.contains("under older versions")), "{:?}", session.notes);
}
