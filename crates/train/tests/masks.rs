//! Runs from a recipe whose method first chooses what it trains: places, losses and the adapter at the end are those of an
//! independent program (tools/golden/masks.py).

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Log, golden, opened};
use engraft_recipe::Recipe;
use engraft_store::{Limits, read_adapter};
use engraft_train::{Event, Observer, RunOptions, method_specs, train};
use serde_json::Value;

/// A recipe's value: texts, numbers, flags and lists of texts are written as in JSON.
fn table(expected: &Value) -> String {
    let line = |(key, value): (&String, &Value)| format!("{key} = {value}\n");
    expected["method"].as_object().unwrap().iter().map(line).collect()
}

fn recipe(dir: &Path, expected: &Value) -> String {
    let quoted = |path: std::path::PathBuf| format!("{:?}", path.canonicalize().unwrap().to_string_lossy());
    let n = |key: &str| expected[key].as_f64().unwrap();
    format!(
        "model = {}\n[method]\n{}[data]\nformat = \"tensors\"\npath = {}\nshuffle = false\n[train]\nsteps = {}\n\
         batch_size = {}\ngradient_accumulation = {}\nlearning_rate = {:e}\nweight_decay = {:?}\nschedule = {}\n\
         warmup_ratio = {:?}\nmax_grad_norm = {:?}\nseed = {}\ndtype = \"f32\"\n",
        quoted(golden().join("models").join(expected["model"].as_str().unwrap())),
        table(expected),
        quoted(dir.join("batches.safetensors")),
        n("steps"),
        n("batch_size"),
        n("gradient_accumulation"),
        n("learning_rate"),
        n("weight_decay"),
        expected["schedule"],
        n("warmup_ratio"),
        n("max_grad_norm"),
        expected.get("seed").and_then(Value::as_u64).unwrap_or(0),
    )
}

fn far(a: &[f64], b: &[f64], tolerance: f64) -> bool {
    a.len() != b.len() || a.iter().zip(b).any(|(a, b)| (a - b).abs() > tolerance * b.abs() + 1e-12)
}

/// What differs from the program's run.
fn check(dir: &Path) -> Vec<String> {
    let expected: Value = serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
    let text = recipe(dir, &expected);
    let parsed = Recipe::parse(&text, "recipe.toml", &[], &method_specs()).map_err(Into::into);
    let session = match parsed.and_then(|recipe| opened(&recipe)) {
        Ok(session) => session,
        Err(e) => return vec![format!("session: {e}")],
    };
    let run = tempfile::tempdir().unwrap();
    let options = RunOptions { out: run.path().join("run"), ..RunOptions::default() };
    let mut log = Log::default();
    if let Err(e) = train(&session, &options, &mut log) {
        return vec![format!("train: {e}")];
    }
    let losses: Vec<f64> =
        expected["losses"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    let mut wrong = Vec::new();
    if far(&log.losses(), &losses, 1e-4) {
        wrong.push(format!("losses {:?}, expected {losses:?}", log.losses()));
    }
    let limits = Limits::default();
    let (found, last) = (
        read_adapter(&options.out.join("adapter"), &limits).unwrap(),
        read_adapter(&dir.join("adapter"), &limits).unwrap(),
    );
    if found.weights.names().ne(last.weights.names()) {
        wrong.push("other tensors".into());
    }
    for (name, tensor) in last.weights.iter() {
        let Some(ours) = found.weights.get(name) else { continue };
        if let Ok(places) = tensor.to_i64() {
            let own = ours.to_i64().unwrap();
            let others = own.iter().filter(|place| !places.contains(place)).count();
            if own != places {
                wrong.push(format!("{name}: {others} of {} places are others", places.len()));
            }
            continue;
        }
        let (a, b) = (ours.numbers().unwrap(), tensor.numbers().unwrap());
        let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let error = a.iter().zip(&b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        if a.len() != b.len() || error > 5e-3 * largest {
            wrong.push(format!("{name}: off by {error:e} of {largest:e}"));
        }
    }
    wrong
}

#[test]
fn what_is_chosen_and_trained_is_what_an_independent_program_finds() {
    let root = golden().join("masks");
    let mut names: Vec<String> =
        std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(names.len() >= 7);
    let only = std::env::var("ENGRAFT_ONLY").unwrap_or_default();
    let wrong: Vec<String> = names
        .iter()
        .filter(|name| only.split(',').any(|word| name.contains(word)))
        .flat_map(|name| check(&root.join(name)).into_iter().map(move |line| format!("{name}: {line}")))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The bytes of the adapter, and of parameters and moments after the last step.
fn bytes(run: &Path) -> [Vec<u8>; 3] {
    let saved = run.join("checkpoints/step-00000008");
    let files = [
        run.join("adapter/adapter_model.safetensors"),
        saved.join("params.safetensors"),
        saved.join("optim.safetensors"),
    ];
    files.map(|path| std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

/// Stops after a step.
struct StopAfter(u64, Arc<AtomicBool>);

impl Observer for StopAfter {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::Step(s) if s.step == self.0) {
            self.1.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_run_resumed_in_either_stage_ends_in_the_same_bits() {
    for name in ["llama__lt_sft", "bert__diff_pruning", "llama__lisa", "bert__fish"] {
        let dir = golden().join("masks").join(name);
        let expected: Value =
            serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
        let open = || {
            let text = recipe(&dir, &expected);
            opened(&Recipe::parse(&text, "recipe.toml", &[], &method_specs()).unwrap()).unwrap()
        };
        let go = |out: &Path, resume: bool, last: u64| {
            let stop = Arc::new(AtomicBool::new(false));
            let out = out.to_owned();
            let options =
                RunOptions { out, resume, exact: true, stop: stop.clone(), ..RunOptions::default() };
            train(&open(), &options, &mut StopAfter(last, stop)).unwrap();
        };
        let runs = tempfile::tempdir().unwrap();
        let whole = runs.path().join("whole");
        go(&whole, false, 0);
        for step in [1, 4, 6] {
            let out = runs.path().join(format!("{step}"));
            go(&out, false, step);
            go(&out, true, 0);
            assert!(bytes(&out) == bytes(&whole), "{name}, stopped after step {step}");
        }
    }
}
