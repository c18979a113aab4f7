//! What a method is told of a run, and of the optimizer.

use engraft_nn::Task;
use engraft_tensor::{Gradients, Param, Tensor};

/// The optimizer's memory of earlier gradients.
pub trait Forget {
    /// Makes it begin anew for `param`.
    fn forget(&mut self, param: &Param);

    /// The update just made; `None` where there was none.
    fn last(&self) -> Option<Update<'_>> {
        None
    }
}

/// An update that the optimizer made.
pub struct Update<'a> {
    /// The gradients of the step, before clipping.
    pub gradients: &'a Gradients,
    /// The factor of clipping, one element.
    pub scale: &'a Tensor,
    /// The step's learning rate, before the factor of a group.
    pub learning_rate: f64,
}

/// The rows of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All training rows.
    All,
    /// Those that are not held out.
    Lower,
    /// Those that are.
    Upper,
}

/// What a run will be.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// Its steps.
    pub steps: u64,
    /// What the model is for.
    pub task: Task,
    /// Tasks of the data's rows, where they name them.
    pub tasks: Option<usize>,
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
