//! Training equals `peft`'s: the same start and batches give the same losses, gradient norms and final adapter.

mod common;

use std::path::Path;

use common::{Log, golden, oracle, recipe, recipe_of, session};
use engraft_store::{Limits, read_adapter};
use engraft_tensor::Tensor;
use engraft_train::{Event, RunOptions, Session, train};
use serde_json::{Value, json};

fn number(expected: &Value, key: &str, default: f64) -> f64 {
    expected.get(key).and_then(Value::as_f64).unwrap_or(default)
}

fn close(what: &str, found: &[f64], expected: &Value, tolerance: f64) -> Vec<String> {
    let expected: Vec<f64> = expected.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    if found.len() != expected.len() {
        return vec![format!("{what}: {} values, expected {}", found.len(), expected.len())];
    }
    let far = |((i, a), b): ((usize, &f64), &f64)| {
        ((a - b).abs() > tolerance * b.abs() + 1e-12)
            .then(|| format!("{what} of step {}: {a} for {b}", i + 1))
    };
    found.iter().enumerate().zip(&expected).filter_map(far).collect()
}

/// The session of a new method with `settings`, its parameters set by their names to those that the trajectory starts from:
/// for what a recipe says and a file does not.
fn with_settings(dir: &Path, model: &Path, expected: &Value, train: &str) -> engraft_train::Result<Session> {
    let settings = expected["settings"].as_object().unwrap();
    // Saved adapters are named from the trajectory's directory.
    let here = |value: &Value| match value.as_array().map(|list| &list[..]) {
        Some([Value::String(path)]) if path.starts_with("../") => {
            json!([dir.join(path).canonicalize().unwrap()])
        }
        _ => value.clone(),
    };
    let lines = settings.iter().map(|(key, value)| format!("{key} = {}\n", here(value)));
    let method = format!("name = {}\n{}", expected["method"], lines.collect::<String>());
    let session = session(&recipe_of(&method, dir, model, train, ""))?;
    let start = read_adapter(&dir.join("init_adapter"), &Limits::default())?;
    // What is trained in place of what the file holds is given too.
    let mut given = 0;
    for p in session.adapter.params() {
        match start.weights.get(&format!("base_model.model.{}", p.name)) {
            Some(raw) => {
                p.param.set(Tensor::from_vec(raw.to_f32().unwrap(), raw.shape.clone()).unwrap()).unwrap();
                given += 1;
            }
            None => assert!(!p.saved, "{} is not given", p.name),
        }
    }
    assert_eq!(given, start.weights.len());
    Ok(session)
}

/// Trains as the trajectory did; gives what differs.
fn check(root: &Path, name: &str) -> Vec<String> {
    let dir = root.join("trajectories").join(name);
    let expected: Value = serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
    let n = |key: &str, default: f64| number(&expected, key, default);
    let schedule = expected.get("schedule").and_then(Value::as_str).unwrap_or("constant");
    let text = format!(
        "steps = {}\nbatch_size = {}\ngradient_accumulation = {}\nlearning_rate = {:e}\nweight_decay = {:?}\n\
         schedule = {schedule:?}\nwarmup_ratio = {:?}\nmax_grad_norm = {:?}\ndtype = \"f32\"\n",
        n("steps", 8.0),
        n("batch_size", 1.0),
        n("gradient_accumulation", 1.0),
        n("learning_rate", 1e-3),
        n("weight_decay", 0.0),
        n("warmup_ratio", 0.0),
        n("max_grad_norm", 0.0)
    );
    let model = root.join("models").join(expected["model"].as_str().unwrap());
    let opened = match expected.get("settings").is_some_and(Value::is_object) {
        true => with_settings(&dir, &model, &expected, &text),
        false => session(&recipe(&dir, &model, &text, "")),
    };
    let session = match opened {
        Ok(session) => session,
        Err(e) => return vec![format!("session: {e}")],
    };
    let run = tempfile::tempdir().unwrap();
    let options = RunOptions { out: run.path().join("run"), ..RunOptions::default() };
    let mut log = Log::default();
    if let Err(e) = train(&session, &options, &mut log) {
        return vec![format!("train: {e}")];
    }
    let steps = |f: &dyn Fn(&engraft_train::StepEvent) -> f64| -> Vec<f64> {
        let step = |e: &Event| if let Event::Step(step) = e { Some(f(step)) } else { None };
        log.0.iter().filter_map(step).collect()
    };
    let mut wrong =
        close("loss", &log.losses(), &expected["losses"], number(&expected, "loss_rel_tolerance", 1e-4));
    if expected.get("learning_rates").is_some() {
        wrong.extend(close("rate", &steps(&|s| s.learning_rate), &expected["learning_rates"], 1e-9));
    }
    if expected.get("grad_norms").is_some() {
        wrong.extend(close("norm", &steps(&|s| s.grad_norm), &expected["grad_norms"], 1e-3));
    }
    wrong.extend(adapters(&dir, &options.out.join("adapter"), &expected));
    wrong
}

/// Tensors of the final adapter: to 1e-3 of the largest value, and to 5e-3 of how far training moved them.
fn adapters(dir: &Path, found: &Path, expected: &Value) -> Vec<String> {
    let read = |path: &Path| read_adapter(path, &Limits::default());
    let files = [read(found), read(&dir.join("final_adapter")), read(&dir.join("init_adapter"))];
    let [Ok(found), Ok(last), Ok(first)] = files else { return vec!["an adapter cannot be read".into()] };
    let rounding =
        expected.get("rounding_only_tensors").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut wrong = Vec::new();
    for (name, tensor) in last.weights.iter() {
        let Some(ours) = found.weights.get(name) else {
            wrong.push(format!("{name} is absent"));
            continue;
        };
        // Whole numbers (places, counters) are not trained.
        if let Ok(b) = tensor.to_i64() {
            if ours.to_i64().ok() != Some(b) {
                wrong.push(format!("{name} is other"));
            }
            continue;
        }
        let (a, b) = (ours.numbers().unwrap(), tensor.numbers().unwrap());
        let start = first.weights.get(name).map_or(b.clone(), |t| t.numbers().unwrap());
        let far = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
        let (error, size, moved) = (far(&a, &b), far(&b, &vec![0.0; b.len()]), far(&b, &start));
        let by_movement = moved > 0.0 && error > 5e-3 * moved + 1e-6 * size;
        let exempt = rounding.iter().any(|n| n.as_str().is_some_and(|n| name.ends_with(n)));
        if !exempt && (error > 1e-3 * size || by_movement) {
            wrong.push(format!("{name}: off by {error:e}, size {size:e}, moved {moved:e}"));
        }
    }
    wrong
}

fn all(root: &Path) {
    let mut names: Vec<String> = std::fs::read_dir(root.join("trajectories"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(!names.is_empty());
    let mut failed = Vec::new();
    let only = std::env::var("ENGRAFT_ONLY").unwrap_or_default();
    for name in names.iter().filter(|name| only.split(',').any(|word| name.contains(word))) {
        let wrong = check(root, name);
        println!("{name}: {}", if wrong.is_empty() { "equal".into() } else { wrong.join("\n  ") });
        failed.extend((!wrong.is_empty()).then_some(name));
    }
    assert!(failed.is_empty(), "differ: {failed:?}");
}

#[test]
fn trajectories_equal_peft_s() {
    all(&golden());
}

#[test]
fn trajectories_beside_the_repository_are_equal_too() {
    if let Some(root) = oracle() {
        all(&root);
    }
}
