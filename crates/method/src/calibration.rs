//! What a method may see of the base and the data before training: inputs of weights and gradients of their outputs.
//!
//! A probe is an adapter like any other, whose patches change nothing and look at what passes.

use std::sync::Arc;

use engraft_nn::{
    Adapter, Base, Builder, Error, Layout, ModelInfo, Pass, Patch, Result, Site, SiteId, Sites, WeightPatch,
};
use engraft_tensor::{Gradients, Tensor};

/// The base and the training data, in the hands of [`crate::Method::prepare`].
pub trait Calibration {
    /// Sites of the model, in the names that the adapter uses.
    fn sites(&self) -> &Arc<Sites>;
    /// Sizes of the model.
    fn info(&self) -> &ModelInfo;
    /// Seed of the run.
    fn seed(&self) -> u64;
    /// The sites that the method was given, in model order.
    fn targets(&self) -> &[SiteId] {
        &[]
    }
    /// What precedes the names of the method's tensors in the adapter.
    fn prefix(&self) -> &str {
        ""
    }
    /// Micro-batches in a pass over the data.
    fn micro_batches(&self) -> u64 {
        1
    }
    /// Says that the method is about to look at `batches` micro-batches, for those who watch.
    fn expect(&self, _batches: u64) {}
    /// Number of labels that the loss of micro-batch `number` is averaged over.
    fn labels(&self, _number: u64) -> Result<usize> {
        Ok(1)
    }
    /// The features [sequences, width] of micro-batch `number` under `probe`, recorded, and the class of each sequence.
    ///
    /// # Errors
    /// Tasks that have no class for a sequence.
    fn features(&self, _number: u64, _probe: &Arc<Adapter>) -> Result<(Tensor, Vec<i64>)> {
        Err(Error::Unsupported(
            "a loss of features needs a class for every sequence, which this task has not; choose the task's own loss".into(),
        ))
    }
    /// Runs micro-batch `number` of training (from 0) through the base with `probe`, nothing recorded.
    fn forward(&self, number: u64, probe: &Arc<Adapter>) -> Result<()>;
    /// The same, then backward from the loss averaged over the batch's labels; gives the gradients of the probe's own
    /// parameters.
    fn backward(&self, number: u64, probe: &Arc<Adapter>) -> Result<Gradients>;
}

/// What passes a weight.
pub struct Seen<'a> {
    /// The weight's site.
    pub site: &'a Site,
    /// Its input [tokens, in].
    pub x: &'a Tensor,
    /// The gradient of its output [tokens, out]; `None` in a forward.
    pub dy: Option<&'a Tensor>,
    /// The rows' sequences.
    pub layout: &'a Layout,
}

/// Called with what passes each weight, one after another.
pub type Observe = Arc<dyn Fn(&Seen<'_>) -> Result<()> + Send + Sync>;

/// Shows `each` what passes the weights at `sites` in micro-batch `number`: inputs alone or, with `gradients`, each input
/// with the gradient of its output as backward reaches it. What `each` makes of one weight is its own to keep or drop, so
/// that never more than one weight's gradient exists at once.
pub fn observe(
    base: &dyn Calibration,
    sites: &[SiteId],
    number: u64,
    gradients: bool,
    each: &Observe,
) -> Result<Gradients> {
    let mut b = Builder::new(base.sites(), base.info(), 0);
    for &id in sites {
        b.patch(id, Patch::Weight(Box::new(Probe { each: each.clone(), gradients })))?;
    }
    let probe = Arc::new(b.finish());
    match gradients {
        true => base.backward(number, &probe),
        false => base.forward(number, &probe).map(|()| Gradients::default()),
    }
}

struct Probe {
    each: Observe,
    gradients: bool,
}

impl WeightPatch for Probe {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?;
        if !self.gradients {
            (self.each)(&Seen { site, x: &x.detach(), dy: None, layout: cx.layout() })?;
            return Ok(y);
        }
        let (each, site, x, layout) = (self.each.clone(), site.clone(), x.detach(), cx.layout().clone());
        Ok(y.observe(move |dy| {
            let seen = Seen { site: &site, x: &x, dy: Some(dy), layout: &layout };
            each(&seen).map_err(|e| match e {
                engraft_nn::Error::Tensor(e) => e,
                other => engraft_tensor::Error::Backward(other.to_string()),
            })
        }))
    }
}
