//! What the tests of runs share: recipes on the small models of the fixtures.
#![allow(dead_code)] // each test uses its part

use std::path::{Path, PathBuf};

use engraft_data::TemplateOptions;
use engraft_recipe::Recipe;
use engraft_store::Limits;
use engraft_store::hub::Hub;
use engraft_train::{Event, Observer, Session, SessionOptions, method_specs};

/// The fixtures of this repository.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

/// Fixtures beside the repository, where they are.
pub fn oracle() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/oracle");
    if !path.is_dir() {
        println!("skipped: {} is not there", path.display());
    }
    path.is_dir().then_some(path)
}

/// The session of a recipe's text.
pub fn session(text: &str) -> engraft_train::Result<Session> {
    opened(&Recipe::parse(text, "recipe.toml", &[], &method_specs())?)
}

/// The session of a recipe.
pub fn opened(recipe: &Recipe) -> engraft_train::Result<Session> {
    let hub = Hub { offline: true, ..Hub::new(PathBuf::from("/nonexistent")) };
    let mut options = SessionOptions {
        hub: &hub,
        progress: &mut |_| {},
        working_dir: PathBuf::from("/"),
        packed: Default::default(),
        limits: Limits::default(),
        templates: TemplateOptions::default(),
        choices: Default::default(),
    };
    Session::open(recipe, &mut options)
}

/// A recipe that trains the start of a trajectory, with more lines for `[train]` and `[data]`.
pub fn recipe(trajectory: &Path, model: &Path, train: &str, data: &str) -> String {
    let start = trajectory.join("init_adapter").canonicalize().unwrap();
    recipe_of(&format!("from = {:?}", start.to_string_lossy()), trajectory, model, train, data)
}

/// A recipe that trains `method` on the batches of a trajectory.
pub fn recipe_of(method: &str, trajectory: &Path, model: &Path, train: &str, data: &str) -> String {
    let q = |path: PathBuf| format!("{:?}", path.canonicalize().unwrap().to_string_lossy());
    format!(
        "model = {}\n[method]\n{method}\n[data]\nformat = \"tensors\"\npath = {}\nshuffle = false\n{data}\n[train]\n{train}\n",
        q(model.to_owned()),
        q(trajectory.join("batches.safetensors")),
    )
}

/// Keeps all events.
#[derive(Default)]
pub struct Log(pub Vec<Event>);

impl Observer for Log {
    fn event(&mut self, event: &Event) {
        self.0.push(event.clone());
    }
}

impl Log {
    /// Losses of the steps, in order.
    pub fn losses(&self) -> Vec<f64> {
        let loss = |e: &Event| match e {
            Event::Step(step) => Some(step.loss),
            _ => None,
        };
        self.0.iter().filter_map(loss).collect()
    }

    /// All warnings.
    pub fn warnings(&self) -> Vec<String> {
        let warning = |e: &Event| match e {
            Event::Warning { message, .. } => Some(message.clone()),
            _ => None,
        };
        self.0.iter().filter_map(warning).collect()
    }
}
