//! Fine-tuning methods, one file each, blind to models.
//!
//! A method is a configuration that fills an adapter with patches at the sites it was given, and hooks into training.
//! To add one: write its file, add `mod` and one line to [`METHODS`], commit one fixture made elsewhere.

mod entry;

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Output, Pass, Result};
use engraft_tensor::{Gradients, Tensor};

pub use entry::{Entry, Field, FieldKind, Info, Loaded, PeftContext, find, from_file};

/// Every method, in the order of the documentation.
pub static METHODS: &[&Entry] = &[];

/// A configured method.
pub trait Method: Send + Sync {
    /// What it is.
    fn info(&self) -> &'static Info;

    /// Attaches patches at `b.targets()` (or, for methods that have sites of their own kind, at those).
    fn attach(&self, b: &mut Builder<'_>) -> Result<()>;

    /// Factor on the learning rate of a parameter group.
    fn learning_rate_factor(&self, _group: &str) -> f32 {
        1.0
    }

    /// A scalar added to the loss.
    fn penalty(&self, _adapter: &Adapter, _step: Step) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Before a forward with the adapter: may run the model without it (`first`) and leave tensors on the pass
    /// (routers such as X-LoRA).
    fn before_forward(&self, _adapter: &Arc<Adapter>, _first: &dyn Fn() -> Result<Output>, _cx: &Pass) -> Result<()> {
        Ok(())
    }

    /// Between backward and the update: may change gradients (masks, importance).
    fn after_backward(&self, _adapter: &Adapter, _gradients: &mut Gradients, _step: Step) -> Result<()> {
        Ok(())
    }

    /// After the update: may change parameters (proximal steps, pruning of ranks).
    fn after_step(&self, _adapter: &Adapter, _step: Step) -> Result<()> {
        Ok(())
    }

    /// After training, before the adapter is saved.
    fn finish(&self, _adapter: &Adapter) -> Result<()> {
        Ok(())
    }

    /// The adapter's configuration as `peft` writes it, without the keys of [`PeftContext`]; `None` where `peft` has no
    /// such method, and the file then carries Engraft's own type.
    fn peft_config(&self) -> Option<serde_json::Map<String, serde_json::Value>>;

    /// Name in the adapter file of the parameter `name`.
    fn file_name(&self, name: &str) -> String {
        format!("base_model.model.{name}")
    }
}

/// Where training is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Number of the optimizer step, from 1.
    pub number: u64,
    /// Number of steps of the run.
    pub total: u64,
    /// Seed of the run.
    pub seed: u64,
}
