//! Alarms of a step: host reads, losses that are no numbers, gradients of zero.

mod common;

use common::{Log, golden, recipe, session};
use engraft_method::{Described, Info, Method, Step};
use engraft_nn::{Adapter, Builder};
use engraft_tensor::{Gradients, Tensor};
use engraft_train::{Error, RunOptions, Session, check, estimate, smaller, train, trial};
use serde_json::{Map, Value};

fn llama(train: &str) -> Session {
    let dir = golden().join("trajectories/llama__lora");
    session(&recipe(&dir, &golden().join("models/llama"), train, "")).unwrap()
}

fn run(session: &Session) -> (engraft_train::Result<()>, Log) {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::default();
    let options = RunOptions { out: dir.path().join("run"), ..RunOptions::default() };
    (train(session, &options, &mut log).map(drop), log)
}

/// A method that only meddles.
struct Meddler {
    reads: bool,
    zeroes: bool,
}

static INFO: Info = Info {
    name: "meddler",
    title: "Meddler",
    class: "additive",
    sites: "none",
    paper: "none",
    summary: "breaks a step",
    mergeable: false,
    identity_at_init: true,
    default_roles: None,
    peft_type: "MEDDLER",
    fields: &[],
};

impl Method for Meddler {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, _: &mut Builder<'_>) -> engraft_nn::Result<()> {
        Ok(())
    }

    fn penalty(&self, adapter: &Adapter, _: Step) -> engraft_nn::Result<Option<Tensor>> {
        if self.reads {
            adapter.params()[0].param.value().to_vec()?;
        }
        Ok(None)
    }

    fn after_backward(
        &self,
        adapter: &Adapter,
        gradients: &mut Gradients,
        _: Step,
    ) -> engraft_nn::Result<()> {
        if self.zeroes {
            let param = &adapter.params()[0].param;
            gradients.set(param, Tensor::zeros(param.value().shape().to_vec()));
        }
        Ok(())
    }

    fn config(&self, _: &Described<'_>) -> Map<String, Value> {
        Map::new()
    }
}

#[test]
fn a_step_that_reads_on_the_host_fails() {
    for reads in [false, true] {
        let mut session = llama("steps = 1");
        session.methods.push((Box::new(Meddler { reads, zeroes: false }), None));
        let result = run(&session).0;
        let message = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
        assert_eq!(message.contains("read on the host inside a step"), reads, "{message}");
    }
}

#[test]
fn a_tensor_that_gets_zeros_for_ten_steps_raises_the_alarm() {
    let mut session = llama("steps = 10");
    session.methods.push((Box::new(Meddler { reads: false, zeroes: true }), None));
    let (_, log) = run(&session);
    let name = &session.adapter.params()[0].name;
    let warnings = log.warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("zero for 10 steps") && warnings[0].contains(name), "{warnings:?}");
    assert!(run(&llama("steps = 10")).1.warnings().is_empty());
}

#[test]
fn a_loss_that_is_no_number_updates_nothing() {
    let session = llama("steps = 3\nbatch_size = 2");
    let (bad, other) = (&session.adapter.params()[0], &session.adapter.params()[1]);
    bad.param.set(Tensor::full(f32::NAN, bad.param.value().shape().to_vec())).unwrap();
    let before = other.param.value().to_vec().unwrap();
    let error = run(&session).0.unwrap_err();
    let Error::NotFinite(e) = &error else { panic!("{error}") };
    assert_eq!((e.step, e.what, e.rows.len()), (1, "loss", 2));
    assert!(!e.tensors.is_empty() && e.kept.is_some());
    let said =
        format!("the first loss is NaN, before anything was trained: {} of the adapter holds", bad.name);
    assert!(error.to_string().starts_with(&said), "{error}");
    assert_eq!(other.param.value().to_vec().unwrap(), before);
}

#[test]
fn a_base_that_is_not_finite_is_named_rather_than_the_learning_rate() {
    let dir = tempfile::tempdir().unwrap();
    let model = golden().join("models/llama");
    std::fs::copy(model.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut weights = std::fs::read(model.join("model.safetensors")).unwrap();
    // The last number of the last tensor.
    let end = weights.len();
    weights[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(dir.path().join("model.safetensors"), weights).unwrap();
    let start = golden().join("trajectories/llama__lora");
    let error = run(&session(&recipe(&start, dir.path(), "steps = 3", "")).unwrap()).0.unwrap_err();
    let Error::NotFinite(e) = &error else { panic!("{error}") };
    assert!(
        e.untrained && e.cause.as_ref().is_some_and(|name| name.starts_with("model.norm.weight in ")),
        "{error}"
    );
    assert!(error.to_string().contains("before anything was trained"), "{error}");
}

#[test]
fn a_check_runs_everything_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::default();
    let outcome = check(llama("steps = 500\nbatch_size = 2"), dir.path(), &mut log).unwrap();
    assert_eq!((outcome.step, log.losses().len()), (2, 2));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn estimates_count_what_is_there() {
    let session = llama("steps = 8\nbatch_size = 2");
    let found = estimate(&session);
    assert_eq!(found.trained, session.adapter.trained_count());
    assert!(found.base_parameters > found.trained && found.total_bytes() > found.base_bytes);
    let trial = trial(&session, 2).unwrap();
    assert!(trial.step_seconds > 0.0 && trial.run_seconds >= trial.step_seconds);
}

#[test]
fn what_does_not_fit_is_told_what_would() {
    let session = llama("steps = 8\nbatch_size = 8\ngradient_accumulation = 3");
    let sizes = estimate(&session);
    let all = smaller(&session, &sizes, 0);
    let settings = [
        "train.gradient_checkpointing=true",
        "train.batch_size=1",
        "train.gradient_accumulation=24",
        "base.quantize=nf4",
    ];
    assert_eq!(all.last().unwrap().settings, settings);
    assert!(all.windows(2).all(|two| two[0].total_bytes > two[1].total_bytes), "{all:?}");
    assert!(all[0].total_bytes < sizes.total_bytes());
    // The first list that fits is the last.
    assert_eq!(smaller(&session, &sizes, all[0].total_bytes), all[..1]);
    let half = smaller(&session, &sizes, (all[0].total_bytes + all[1].total_bytes) / 2);
    assert_eq!(half.len(), 2);
    assert!(half[1].settings[1] != "train.batch_size=1", "rows are not cut further than needed: {half:?}");
}
