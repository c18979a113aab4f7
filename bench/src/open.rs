//! Opens a recipe as `engraft train` does, for measuring.

use std::path::Path;

use anyhow::Result;
use engraft_data::TemplateOptions;
use engraft_model::Packed;
use engraft_recipe::Recipe;
use engraft_store::hub::Hub;
use engraft_train::{Session, SessionOptions};

/// The session of a recipe; those that are given the same `packed` hold one base.
pub fn open(recipe: &Path, packed: &Packed) -> Result<Session> {
    let text = std::fs::read_to_string(recipe)?;
    let parsed = Recipe::parse(&text, &recipe.to_string_lossy(), &[], &engraft_train::method_specs())?;
    // Everything is a path here: nothing is looked up.
    let mut hub = Hub::new("hub".into());
    hub.offline = true;
    let mut options = SessionOptions {
        hub: &hub,
        progress: &mut |_| {},
        working_dir: std::env::current_dir()?,
        packed: packed.clone(),
        limits: Default::default(),
        templates: TemplateOptions::default(),
        choices: Default::default(),
    };
    Ok(Session::open(&parsed, &mut options)?)
}
