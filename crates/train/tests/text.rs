//! Recipes on text: the small model and the help-desk set of this repository.

mod common;

use std::path::{Path, PathBuf};

use common::Log;
use engraft_data::TemplateOptions;
use engraft_recipe::{MethodSpec, Recipe};
use engraft_store::Limits;
use engraft_store::hub::Hub;
use engraft_train::{Error, Event, RunOptions, Session, SessionOptions, run_data, train};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn open(method: &str, data: &str, train: &str) -> engraft_train::Result<Session> {
    opened(&format!(
        "model = \"models/all-minilm-l6-v2\"\n\n[method]\nname = \"lora\"\n{method}\n\n[data]\nformat = \"csv\"\n\
         path = \"data/helpdesk/train.csv\"\n{data}\n\n[train]\n{train}\n"
    ))
}

/// The session of a recipe in the repository's root.
fn opened(recipe: &str) -> engraft_train::Result<Session> {
    let root = root().canonicalize().unwrap();
    let specs = [MethodSpec { name: "lora", summary: "", fields: vec![], elsewhere: vec![] }];
    let name = root.join("recipe.toml");
    let recipe = Recipe::parse(recipe, &name.to_string_lossy(), &[], &specs)?;
    let hub = Hub { offline: true, ..Hub::new(PathBuf::from("/nonexistent")) };
    let mut options = SessionOptions {
        hub: &hub,
        progress: &mut |_| {},
        working_dir: root,
        packed: Default::default(),
        limits: Limits::default(),
        templates: TemplateOptions::default(),
        choices: Default::default(),
    };
    Session::open(&recipe, &mut options)
}

#[test]
fn a_new_head_learns_the_classes_of_the_data() {
    let eval = "eval_path = \"data/helpdesk/test.csv\"";
    let session = open(
        "targets = \"all-linear\"",
        eval,
        "steps = 8\nlearning_rate = 3e-3\nschedule = \"constant\"\neval_every = 0",
    )
    .unwrap();
    let labels = session.labels.as_ref().unwrap();
    assert_eq!(session.model.info().outputs, labels.len());
    assert!(labels.is_sorted() && labels.len() >= 12 && !session.new_tensors.is_empty());
    assert_eq!(session.train_also, ["classifier"]);
    let dir = tempfile::tempdir().unwrap();
    let options = RunOptions { out: dir.path().join("run"), ..RunOptions::default() };
    let mut log = Log::default();
    let outcome = train(&session, &options, &mut log).unwrap();
    let (before, after) = (outcome.before.unwrap(), outcome.after.unwrap());
    assert!(after.loss < before.loss - 0.1, "{} {}", before.loss, after.loss);
    assert!(matches!(&log.0[0], Event::Data(d) if d.eval_examples > 50 && d.padding_share < 0.5));
    let report = run_data(&options.out).unwrap();
    assert_eq!(report.rows.as_ref().map(Vec::len), Some(5));
    assert!(report.rows.unwrap().iter().all(|r| labels.contains(&r.expected) && !r.input.is_empty()));
    assert_eq!(report.changes.unwrap().iter().filter(|c| c.role == "q" && c.ratio > 0.0).count(), 6);
    assert!(std::fs::read_to_string(outcome.plot.unwrap()).unwrap().starts_with("<svg"));
}

#[test]
fn all_mistakes_come_together_each_at_its_place() {
    let error =
        open("targets = [\"q_proj\", \"value\"]", "eval_path = \"data/helpdesk/tset.csv\"", "steps = 1");
    let problems = match error {
        Err(Error::Recipe(problems)) => problems,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("mistakes were expected"),
    };
    let text = problems.to_string();
    assert_eq!(problems.list.len(), 2, "{text}");
    assert!(
        text.contains("`q_proj` of `method.targets` matches nothing in models/all-minilm-l6-v2"),
        "{text}"
    );
    assert!(text.contains("write `targets = [\"query\", \"value\"]`, or `roles = [\"q\", \"v\"]`"), "{text}");
    assert!(text.contains("tset.csv") && text.contains("nothing was loaded or written"), "{text}");
}

#[test]
fn several_tasks_train_together() {
    let text = "model = \"models/all-minilm-l6-v2\"\n[method]\nname = \"lora\"\ntargets = \"all-linear\"\n[data]\nformat = \"csv\"\ntemperature = 5\n\
        [[data.tasks]]\nname = \"desk\"\npath = \"data/helpdesk/train.csv\"\neval_path = \"data/helpdesk/test.csv\"\n\
        [[data.tasks]]\nname = \"again\"\npath = \"data/helpdesk/test.csv\"\neval_fraction = 0.2\n\
        [train]\nsteps = 3\nseed = 4\n";
    let session = opened(text).unwrap();
    let of = |task| session.train.examples.iter().filter(|e| e.task == Some(task)).count();
    assert!(of(0) > of(1) && of(1) > 20);
    let mut feed = session.feed().unwrap();
    let mut tasks: Vec<usize> = Vec::new();
    for step in 1..=feed.steps_per_epoch() {
        feed.step(step).unwrap().iter().for_each(|batch| tasks.extend(batch.inputs.layout.tasks()));
    }
    let share = |task| tasks.iter().filter(|&&t| t == task).count() as f64 / tasks.len() as f64;
    let sizes = [of(0) as f64, of(1) as f64].map(|n| n.powf(0.2));
    assert!((share(0) - sizes[0] / (sizes[0] + sizes[1])).abs() < 0.01, "{}", share(0));
    let dir = tempfile::tempdir().unwrap();
    let options = RunOptions { out: dir.path().join("run"), ..RunOptions::default() };
    let after = train(&session, &options, &mut Log::default()).unwrap().after.unwrap();
    // Each task has scores of its own; over all labels, and as a mean over tasks, they are what they say.
    let eval = &session.eval.as_ref().unwrap().examples;
    let rows = |task| eval.iter().filter(|e| e.task == Some(task)).count() as f64;
    let metric = |name: &str| after.metric(name).unwrap_or_else(|| panic!("no {name}"));
    for name in ["accuracy", "loss"] {
        let own = ["desk", "again"].map(|task| metric(&format!("{task}.{name}")));
        let all = (own[0] * rows(0) + own[1] * rows(1)) / (rows(0) + rows(1));
        assert!((all - metric(name)).abs() < 1e-6, "{name}: {all}");
        assert!(((own[0] + own[1]) / 2.0 - metric(&format!("mean_{name}"))).abs() < 1e-9);
    }
}
