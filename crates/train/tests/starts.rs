//! Starts that come from the data: what a method sees of the base, and what LoRA makes of it, beside `peft` or a transcription.

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{Log, golden, session};
use engraft_method::{Calibration, Described, Info, Method, observe};
use engraft_nn::{Adapter, Builder, Kind, Role};
use engraft_store::{Limits, Weights, read_adapter};
use engraft_tensor::Tensor;
use engraft_tensor::testing::close;
use engraft_train::{RunOptions, Session, train};
use serde_json::{Map, Value};

/// A recipe on the batches of a folder, whose one step moves nothing.
fn recipe(model: &str, batches: &Path, batch_size: u64, method: &str, train: &str) -> String {
    let q = |path: &Path| format!("{:?}", path.canonicalize().unwrap().to_string_lossy());
    format!(
        "model = {}\n[method]\n{method}\n[data]\nformat = \"tensors\"\npath = {}\nshuffle = false\n[train]\nsteps = 1\n\
         batch_size = {batch_size}\nlearning_rate = 1e-30\nweight_decay = 0.0\ndtype = \"f32\"\n{train}\n",
        q(&golden().join("models").join(model)),
        q(&batches.join("batches.safetensors")),
    )
}

/// The loss of the first step, after which the adapter stands where it began.
fn first_loss(session: &Session) -> f64 {
    let run = tempfile::tempdir().unwrap();
    let options = RunOptions { out: run.path().join("run"), ..RunOptions::default() };
    let mut log = Log::default();
    train(session, &options, &mut log).unwrap();
    log.losses()[0]
}

fn tensor(weights: &Weights, name: &str) -> Option<Tensor> {
    let raw = weights.get(name)?;
    Some(Tensor::from_vec(raw.to_f32().unwrap(), raw.shape.clone()).unwrap())
}

/// For each row 1, or −1 where it points away from that of `wanted`: singular vectors have no sign of their own.
fn signs(rows: &Tensor, wanted: &Tensor) -> Tensor {
    let count = rows.dim(0);
    let along = rows.mul(wanted).unwrap().sum_to(&[count, 1]).unwrap().to_vec().unwrap();
    Tensor::from_vec(along.into_iter().map(f32::signum).collect(), [count, 1]).unwrap()
}

fn lines(settings: &Value) -> String {
    settings.as_object().unwrap().iter().map(|(key, value)| format!("{key} = {value}\n")).collect()
}

#[test]
fn starts_from_data_equal_those_made_elsewhere() {
    let root = golden().join("starts");
    let mut names: Vec<String> =
        std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() >= 6);
    for name in names {
        let dir = root.join(&name);
        let start: Value = serde_json::from_slice(&std::fs::read(dir.join("start.json")).unwrap()).unwrap();
        let (model, size) = (start["model"].as_str().unwrap(), start["batch_size"].as_u64().unwrap());
        let method = format!("name = \"lora\"\n{}", lines(&start["settings"]));
        let own = session(&recipe(model, &dir, size, &method, "")).unwrap();
        let loss = first_loss(&own);
        let targets = &start["settings"]["targets"];
        let rank = start["settings"]["rank"].as_u64().unwrap_or(8);
        let plain = format!("name = \"lora\"\nrank = {rank}\ntargets = {targets}");
        let plain = session(&recipe(model, &dir, size, &plain, "")).unwrap();
        let base = first_loss(&plain);
        assert_eq!(own.trained_count(), plain.trained_count(), "{name}: numbers that are trained");
        assert!(
            (loss - base).abs() < 1e-4 * base,
            "{name}: the start changes the loss from {base} to {loss}"
        );
        let expected = Weights::open_file(&dir.join("expected.safetensors"), &Limits::default()).unwrap();
        let mut seen = 0;
        for p in own.adapter.params().iter().filter(|p| p.name.ends_with(".lora_A.weight")) {
            let path = p.name.strip_suffix(".lora_A.weight").unwrap();
            let of = |end: &str| {
                let name = format!("{path}.{end}");
                own.adapter.params().iter().find(|p| p.name == name).unwrap().param.value()
            };
            let a = p.param.value();
            let rank = start["ranks"][path].as_u64().unwrap_or(a.dim(0) as u64) as usize;
            let rest = a.rows_between(rank, a.dim(0)).unwrap().to_vec().unwrap();
            assert!(rest.iter().all(|v| *v == 0.0), "{name}: {path} has more than {rank} ranks");
            let Some(wanted) = tensor(&expected, &p.name) else { continue };
            let a = a.rows_between(0, rank).unwrap();
            let turn = signs(&a, &wanted);
            println!("{name}: {path}, rank {rank}");
            close(&a.mul(&turn).unwrap(), &wanted, 2e-3);
            if let Some(wanted) = tensor(&expected, &format!("{path}.lora_B.weight")) {
                // Those of LoRA-GA's A and B are of different pairs.
                let (b, wanted) = (of("lora_B.weight").t().unwrap(), wanted.t().unwrap());
                let turn = if name.ends_with("lora_ga") { signs(&b, &wanted) } else { turn };
                close(&b.mul(&turn).unwrap(), &wanted, 2e-3);
                close(&of("lora_B.start"), &of("lora_B.weight"), 0.0);
            }
            seen += 1;
        }
        assert!(seen > 0, "{name}: nothing was compared");
    }
}

/// An adapter that trained from a start that was taken off the base is written as `peft` converts it.
#[test]
fn starts_that_are_taken_off_are_written_as_peft_converts_them() {
    let cases = golden().join("cases");
    for (name, init) in [
        ("llama__lora_pissa", "pissa"),
        ("llama__lora_pissa_patterns", "pissa"),
        ("gpt2__lora_pissa", "pissa"),
        ("llama__lora_olora", "olora"),
        ("qwen3__lora_pissa", "pissa"),
    ] {
        let read = |case: &str| read_adapter(&cases.join(case).join("adapter"), &Limits::default()).unwrap();
        let (trained, plain) = (read(name), read(&format!("{name}_converted")));
        let c = &trained.config;
        let method = format!(
            "name = \"lora\"\nrank = {}\nalpha = {}\nrslora = {}\ninit = {init:?}\ntargets = {}\n\
             rank_pattern = {}\nalpha_pattern = {}",
            c["r"],
            c["lora_alpha"],
            c["use_rslora"],
            c["target_modules"],
            table(&c["rank_pattern"]),
            table(&c["alpha_pattern"])
        );
        let model = c["base_model_name_or_path"].as_str().unwrap().strip_prefix("models/").unwrap();
        let any =
            golden().join("trajectories").join(if model == "gpt2" { "gpt2__lora" } else { "llama__lora" });
        let own = session(&recipe(model, &any, 2, &method, "")).unwrap();
        for p in own.adapter.trainable() {
            let value = tensor(&trained.weights, &format!("base_model.model.{}", p.name)).unwrap();
            p.param.set(value).unwrap();
        }
        let base = c["base_model_name_or_path"].as_str().unwrap();
        let (sites, info) = (own.model.sites(), own.model.info());
        let (config, tensors) =
            engraft_method::save_adapter(&own.adapter, &own.methods, &[], base, sites, info).unwrap();
        for key in ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_rslora"] {
            let (found, wanted) = (&config[key], &plain.config[key]);
            let near = |(a, b): (f64, f64)| (a - b).abs() <= 1e-12 * b.abs();
            let same = found == wanted || found.as_f64().zip(wanted.as_f64()).is_some_and(near);
            assert!(same, "{name}: `{key}` is {found}, not {wanted}");
        }
        let find = |name: &str| tensors.iter().find(|(key, _)| key == name).unwrap().1.clone();
        let all: Vec<String> = plain.weights.iter().map(|(key, _)| key.to_owned()).collect();
        assert_eq!(all.len(), tensors.len());
        for key in all.iter().filter(|key| key.ends_with("lora_A.weight")) {
            let other = key.replace("lora_A", "lora_B");
            let [a, b] = [key, &other].map(|key| tensor(&plain.weights, key).unwrap());
            let product = find(&other).matmul(&find(key)).unwrap();
            assert_eq!(find(key).shape(), a.shape());
            close(&product, &b.matmul(&a).unwrap(), 1e-4);
            // The trained half is the same number for number; of the other, singular vectors have no sign of their own.
            let half = a.dim(0) / 2;
            close(&find(key).rows_between(0, half).unwrap(), &a.rows_between(0, half).unwrap(), 0.0);
        }
    }
}

/// A JSON table of numbers as one of TOML.
fn table(value: &Value) -> String {
    let fields = value
        .as_object()
        .unwrap()
        .iter()
        .map(|(key, value)| format!("{} = {value}", Value::from(key.as_str())));
    format!("{{ {} }}", fields.collect::<Vec<_>>().join(", "))
}

/// Looks at gradients before training: dyᵀ·x beside the gradient of the weight itself.
struct Looker(Arc<Mutex<usize>>);

static INFO: Info = Info {
    name: "looker",
    title: "Looker",
    class: "selective",
    sites: "none",
    paper: "none",
    summary: "looks at gradients",
    mergeable: false,
    identity_at_init: true,
    default_roles: None,
    peft_type: "LOOKER",
    fields: &[],
};

impl Method for Looker {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, _: &mut Builder<'_>) -> engraft_nn::Result<()> {
        Ok(())
    }

    fn config(&self, _: &Described<'_>) -> Map<String, Value> {
        Map::new()
    }

    fn prepare(&self, _: &Arc<Adapter>, base: &dyn Calibration) -> engraft_nn::Result<()> {
        let linear = base.sites().of_kind(|k| matches!(k, Kind::Linear { .. } | Kind::Convolution { .. }));
        let ids: Vec<_> = linear.map(|site| site.id).collect();
        let mut b = Builder::new(base.sites(), base.info(), 0);
        let params = ids.iter().map(|&id| b.replace_as(id, &format!("{}", id.0)));
        let params = params.collect::<engraft_nn::Result<Vec<_>>>()?;
        let whole = Arc::new(b.finish());
        for number in 0..2 {
            let dense = base.backward(number, &whole)?;
            let seen: Arc<Mutex<Vec<(engraft_nn::SiteId, Tensor, Tensor)>>> = Arc::default();
            let slot = seen.clone();
            let look = move |s: &engraft_method::Seen<'_>| {
                let gradient = s.dy.unwrap().t_matmul(s.x)?;
                slot.lock().unwrap().push((s.site.id, gradient, s.x.clone()));
                Ok(())
            };
            let own = observe(base, &ids, number, true, &(Arc::new(look) as _))?;
            assert!(params.iter().all(|p| own.get(p).is_none()), "a probe has no parameters of its own");
            let seen = seen.lock().unwrap();
            for (id, param) in ids.iter().zip(&params) {
                let mut found = seen.iter().filter(|(at, ..)| at == id);
                match (dense.get(param), found.next(), found.next()) {
                    (Some(wanted), Some((_, gradient, _)), None) => {
                        close(gradient, &wanted.reshape(gradient.shape())?, 1e-4);
                        *self.0.lock().unwrap() += 1;
                    }
                    (None, None, None) => {}
                    (wanted, ..) => {
                        panic!("{}: gradient {}", base.sites().get(*id).path, wanted.is_some())
                    }
                }
            }
            // Inputs alone are the same without backward.
            let inputs: Arc<Mutex<Vec<(engraft_nn::SiteId, Tensor)>>> = Arc::default();
            let slot = inputs.clone();
            let look = move |s: &engraft_method::Seen<'_>| {
                assert!(s.dy.is_none() && s.x.dim(0) == s.layout.tokens());
                slot.lock().unwrap().push((s.site.id, s.x.clone()));
                Ok(())
            };
            observe(base, &ids, number, false, &(Arc::new(look) as _))?;
            for (id, _, x) in seen.iter() {
                let inputs = inputs.lock().unwrap();
                match inputs.iter().find(|(at, _)| at == id) {
                    Some((_, found)) => close(found, x, 0.0),
                    // A forward alone ends before the head.
                    None => assert_eq!(base.sites().get(*id).role, Role::Head),
                }
            }
        }
        Ok(())
    }
}

#[test]
fn gradients_that_are_seen_are_those_of_the_weights() {
    for (trajectory, model) in
        [("llama__lora", "llama"), ("bert__lora", "bert"), ("vit__lora", "vit"), ("t5__lora", "t5")]
    {
        for checkpointing in [false, true] {
            let dir = golden().join("trajectories").join(trajectory);
            let more = format!("gradient_checkpointing = {checkpointing}");
            let text = recipe(model, &dir, 2, "name = \"lora\"", &more);
            let text = if model == "vit" {
                text.replace("name = \"lora\"", "name = \"lora\"\ntrain_also = [\"classifier\"]")
            } else {
                text
            };
            let mut own = session(&text).unwrap();
            let count = Arc::new(Mutex::new(0));
            own.methods.push((Box::new(Looker(count.clone())), None));
            let run = tempfile::tempdir().unwrap();
            let options = RunOptions { out: run.path().join("run"), ..RunOptions::default() };
            // Two methods in one session have no file together; the look is over before that.
            let _ = train(&own, &options, &mut Log::default());
            assert!(*count.lock().unwrap() > 8, "{trajectory}: {count:?}");
        }
    }
}

#[test]
fn a_score_under_the_whole_adapter_gives_its_methods_their_first_look() {
    // The generated prompt is made of what the base alone says.
    let method = "name = \"sparse_adapter\"\nscore = \"snip\"\n[[method]]\nname = \"idpg\"\ntokens = 2";
    let batches = golden().join("trajectories/llama__lora_plus_dora");
    let text = recipe("llama", &batches, 2, method, "").replacen("[method]", "[[method]]", 1);
    assert!(first_loss(&session(&text).unwrap()).is_finite());
}
