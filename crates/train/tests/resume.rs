//! A run that stops and goes on ends in the same bits; one that would not says so.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Log, golden, recipe, recipe_of, session};
use engraft_train::{Event, Observer, Outcome, RunOptions, Session, Status, train};

const TRAIN: &str = "steps = 20\nbatch_size = 3\ngradient_accumulation = 2\nlearning_rate = 2e-3\nweight_decay = 0.01\n\
                     schedule = \"cosine\"\nwarmup_ratio = 0.1\nmax_grad_norm = 1.0\n";

/// A run with evaluation, shuffling and a method with dropout where the fixture has one.
fn open(train: &str) -> Session {
    let dir = golden().join("trajectories/llama__lora");
    let text = recipe(&dir, &golden().join("models/llama"), train, "eval_fraction = 0.25");
    session(&text.replace("shuffle = false", "shuffle = true")).unwrap()
}

/// Stops after a step.
struct StopAfter {
    step: u64,
    stop: Arc<AtomicBool>,
}

impl Observer for StopAfter {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::Step(s) if s.step == self.step) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}

fn go(session: &Session, out: &Path, resume: bool, stop_after: u64) -> engraft_train::Result<Outcome> {
    let stop = Arc::new(AtomicBool::new(false));
    let options =
        RunOptions { out: out.into(), resume, exact: true, stop: stop.clone(), ..RunOptions::default() };
    train(session, &options, &mut StopAfter { step: stop_after, stop })
}

/// Bytes of the final adapter, parameters and moments.
fn result(out: &Path, step: u64) -> [Vec<u8>; 3] {
    let saved = out.join(format!("checkpoints/step-{step:08}"));
    let files = [
        out.join("adapter/adapter_model.safetensors"),
        saved.join("params.safetensors"),
        saved.join("optim.safetensors"),
    ];
    files.map(|path| std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

#[test]
fn a_run_resumed_after_any_step_ends_in_the_same_bits() {
    let train = format!("{TRAIN}eval_every = 4\ncheckpoint_every = 6\n");
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let outcome = go(&open(&train), &whole, false, 0).unwrap();
    assert_eq!((outcome.status, outcome.step), (Status::Done, 20));
    assert!(outcome.before.is_some() && outcome.after.is_some() && outcome.plot.is_some());
    let expected = result(&whole, 20);
    for step in 1..20 {
        let out = dir.path().join(format!("stopped-{step}"));
        let first = go(&open(&train), &out, false, step).unwrap();
        assert_eq!((first.status, first.step), (Status::Interrupted, step));
        let second = go(&open(&train), &out, true, 0).unwrap();
        assert_eq!((second.status, second.step), (Status::Done, 20));
        assert!(result(&out, 20) == expected, "stopped after step {step}");
        assert_eq!(second.best, outcome.best);
    }
}

#[test]
fn what_methods_remember_between_steps_goes_on_too() {
    for name in ["adalora", "sora", "dylora", "periodiclora", "autolora", "poly", "adamix"] {
        let dir = golden().join(format!("trajectories/llama__{name}"));
        let train = "steps = 8\nbatch_size = 2\nlearning_rate = 2e-3\n";
        let open = || session(&recipe(&dir, &golden().join("models/llama"), train, "")).unwrap();
        let to = tempfile::tempdir().unwrap();
        let whole = to.path().join("whole");
        go(&open(), &whole, false, 0).unwrap();
        for step in 1..8 {
            let out = to.path().join(format!("stopped-{step}"));
            assert_eq!(go(&open(), &out, false, step).unwrap().step, step);
            assert_eq!(go(&open(), &out, true, 0).unwrap().step, 8);
            assert!(result(&out, 8) == result(&whole, 8), "{name} stopped after step {step}");
        }
    }
}

#[test]
fn a_projector_of_a_saved_prompt_goes_on_and_leaves_a_prompt() {
    let (dir, source) =
        (golden().join("trajectories/llama__prompt"), golden().join("cases/bert__prompt/adapter"));
    let source = source.canonicalize().unwrap();
    let method = format!("name = \"prompt\"\ntokens = 5\nprojector = 6\nfrom_prompts = [{source:?}]");
    let train = "steps = 6\nbatch_size = 2\nlearning_rate = 2e-3\n";
    let open = || session(&recipe_of(&method, &dir, &golden().join("models/llama"), train, "")).unwrap();
    let to = tempfile::tempdir().unwrap();
    let whole = to.path().join("whole");
    go(&open(), &whole, false, 0).unwrap();
    for step in 1..6 {
        let out = to.path().join(format!("stopped-{step}"));
        assert_eq!(go(&open(), &out, false, step).unwrap().step, step);
        assert_eq!(go(&open(), &out, true, 0).unwrap().step, 6);
        assert!(result(&out, 6) == result(&whole, 6), "stopped after step {step}");
    }
    // What is left is a prompt, and training goes on from it as such.
    let from = format!("from = {:?}", whole.join("adapter"));
    let again = session(&recipe_of(&from, &dir, &golden().join("models/llama"), train, "")).unwrap();
    let names: Vec<&str> = again.adapter.params().iter().map(|p| p.name.as_str()).collect();
    assert_eq!(names, ["prompt_embeddings"]);
}

#[test]
fn a_level_that_waits_for_its_turn_raises_no_alarm() {
    for (name, model) in [("llama__autolora", "llama"), ("bert__bilora", "bert")] {
        let dir = golden().join(format!("trajectories/{name}"));
        let text =
            recipe(&dir, &golden().join(format!("models/{model}")), "steps = 12\nbatch_size = 2\n", "");
        let out = tempfile::tempdir().unwrap();
        let options = RunOptions { out: out.path().join("run"), ..RunOptions::default() };
        let mut log = Log::default();
        train(&session(&text).unwrap(), &options, &mut log).unwrap();
        assert!(log.warnings().is_empty(), "{name}: {:?}", log.warnings());
    }
}

#[test]
fn early_stopping_writes_the_best_adapter_and_survives_a_stop() {
    let train = TRAIN.replace("2e-3", "0.5") + "eval_every = 2\nearly_stopping_patience = 2\n";
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let outcome = go(&open(&train), &whole, false, 0).unwrap();
    assert_eq!(outcome.status, Status::EarlyStop, "a rate of 0.5 makes the loss worse");
    let (best, value) = outcome.best.unwrap();
    assert!(best + 4 == outcome.step && outcome.after.unwrap().loss == value);
    let out = dir.path().join("stopped");
    go(&open(&train), &out, false, 1).unwrap();
    let second = go(&open(&train), &out, true, 0).unwrap();
    assert_eq!((second.status, second.step, second.best), (Status::EarlyStop, outcome.step, outcome.best));
    let adapter = |out: &Path| std::fs::read(out.join("adapter/adapter_model.safetensors")).unwrap();
    assert!(adapter(&whole) == adapter(&out));
}

#[test]
fn another_recipe_directory_or_machine_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    go(&open(TRAIN), &out, false, 3).unwrap();
    let message = |e: engraft_train::Result<Outcome>| e.unwrap_err().to_string();
    let taken = message(go(&open(TRAIN), &out, false, 0));
    assert!(taken.contains("--resume"), "{taken}");
    let changed = message(go(&open(&TRAIN.replace("steps = 20", "steps = 21")), &out, true, 0));
    assert!(changed.contains("was  steps = 20") && changed.contains("is   steps = 21"), "{changed}");
    let none = message(go(&open(TRAIN), &dir.path().join("none"), true, 0));
    assert!(none.contains("holds no run to resume"), "{none}");

    let mut other = open(TRAIN);
    other.fingerprint.kernels = "other".into();
    let refused = message(go(&other, &out, true, 0));
    assert!(refused.contains("kernels was"), "{refused}");
    let mut log = Log::default();
    let options = RunOptions { out: out.clone(), resume: true, ..RunOptions::default() };
    train(&other, &options, &mut log).unwrap();
    assert!(log.0.iter().any(|e| matches!(e, Event::Resume { step: 3, exact: false })));
    assert_eq!(log.warnings().len(), 1);
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let train_text = format!("{TRAIN}checkpoint_every = 2\n");
    let (whole, out) = (dir.path().join("whole"), dir.path().join("run"));
    go(&open(&train_text), &whole, false, 0).unwrap();
    go(&open(&train_text), &out, false, 7).unwrap();
    let newest = out.join("checkpoints/step-00000007/optim.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    let mut log = Log::default();
    let options = RunOptions { out: out.clone(), resume: true, ..RunOptions::default() };
    train(&open(&train_text), &options, &mut log).unwrap();
    assert!(log.0.iter().any(|e| matches!(e, Event::Resume { step: 6, .. })));
    assert!(log.warnings()[0].contains("passed over"), "{:?}", log.warnings());
    assert!(result(&out, 20) == result(&whole, 20));
}
