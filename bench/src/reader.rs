//! A model with an adapter or none, as it is used: reading, and writing with a cache.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use engraft_method::look_first;
use engraft_nn::{Adapter, Inputs, KvCache, Layout, Pass};
use engraft_tensor::{Tensor, no_grad, on_pool};
use engraft_train::Session;

pub struct Reader {
    pub session: Session,
    pub adapter: Option<Arc<Adapter>>,
}

impl Reader {
    /// The base alone.
    pub fn base(session: Session) -> Reader {
        Reader { session, adapter: None }
    }

    /// The base with the session's adapter.
    pub fn adapted(session: Session) -> Reader {
        Reader { adapter: Some(session.adapter.clone()), session }
    }

    /// An empty cache for `sequences` texts of `length` tokens.
    pub fn cache(&self, sequences: usize, length: usize) -> Arc<Mutex<KvCache>> {
        let rows = self.adapter.as_ref().map_or(0, |adapter| adapter.cache_rows());
        Arc::new(Mutex::new(KvCache::new(self.session.model.info().layers, sequences, length + rows)))
    }

    /// Tokens of equally long texts that say nothing, each `[first, first + length)` of its own.
    pub fn texts(&self, sequences: usize, first: usize, length: usize) -> Result<Inputs> {
        let words = self.session.model.info().vocabulary - 5;
        let count = sequences * length;
        let ids: Vec<i64> = (0..count).map(|i| (5 + 37 * (first + i) % words) as i64).collect();
        let positions = (0..sequences).flat_map(|_| first as i32..(first + length) as i32).collect();
        let layout = Layout::new(&vec![length; sequences], positions)?;
        Ok(Inputs::tokens(Tensor::from_i64(ids, [count])?, None, layout))
    }

    /// The model's whole output.
    pub fn read(&self, inputs: &Inputs) -> Result<Vec<f32>> {
        let y = on_pool(|| no_grad(|| self.session.model.forward(inputs, &self.pass(inputs, None)?)))?;
        Ok(y.to_vec()?)
    }

    /// The logits after the last token of each text, which `cache` remembers.
    pub fn feed(&self, inputs: &Inputs, cache: &Arc<Mutex<KvCache>>) -> Result<Vec<f32>> {
        let logits = on_pool(|| {
            no_grad(|| {
                let out = self.session.model.features(inputs, &self.pass(inputs, Some(cache))?)?;
                let lasts: Vec<i64> =
                    out.pass.layout().sequences().iter().map(|s| s.end as i64 - 1).collect();
                let rows = out.features.gather(&Tensor::from_i64(lasts.clone(), [lasts.len()])?)?;
                self.session.model.logits(&rows, &out.pass.select(&lasts)?)
            })
        })?;
        Ok(logits.to_vec()?)
    }

    fn pass(&self, inputs: &Inputs, cache: Option<&Arc<Mutex<KvCache>>>) -> engraft_nn::Result<Pass> {
        let pass = Pass::new(inputs.layout.clone(), self.adapter.clone());
        let pass = match cache {
            Some(cache) => pass.cached(cache.clone()),
            None => pass,
        };
        if let Some(adapter) = &self.adapter {
            look_first(&self.session.methods, adapter, self.session.model.as_ref(), inputs, &pass)?;
        }
        Ok(pass)
    }
}
