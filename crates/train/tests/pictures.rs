//! Recipes on picture folders and the small models of the fixtures: what is refused before any work, and why.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::golden;
use engraft_data::{ImageSource, PictureModel, Processor, read_images};
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
        let at = |name: &str| -> PathBuf { self.path().join(name) };
        let text = format!(
            "model = {:?}\n[method]\nname = \"lora\"\nroles = [\"q\"]\n[data]\nformat = \"images\"\npath = {:?}\n{data}\n[train]\nsteps = 1\n",
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
