//! What follows from a tensor of an adapter, made when it is first needed and again when the tensor is another: that of a file
//! in place of the one an adapter was attached with. It may be read for that in the middle of a step, since it happens once.

use std::sync::{Arc, Mutex, PoisonError};

use engraft_nn::Result;
use engraft_tensor::{Tensor, read_once};

/// See the module.
pub(crate) struct Derived<T>(Mutex<Option<(Tensor, Arc<T>)>>);

impl<T> Default for Derived<T> {
    fn default() -> Self {
        Derived(Mutex::new(None))
    }
}

impl<T> Derived<T> {
    /// What `make` makes of `source`, or made of it before.
    pub fn of(&self, source: &Tensor, make: impl FnOnce(&Tensor) -> Result<T>) -> Result<Arc<T>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, made)) = kept.as_ref().filter(|(of, _)| of.shares(source)) {
            return Ok(made.clone());
        }
        let made = Arc::new(read_once(|| make(source))?);
        *kept = Some((source.detach(), made.clone()));
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::Param;

    #[test]
    fn made_once_for_a_tensor() {
        let (param, derived) = (Param::frozen(Tensor::scalar(2.0)), Derived::default());
        let twice = || derived.of(&param.value(), |t| Ok(t.item()? * 2.0)).unwrap();
        assert!(Arc::ptr_eq(&twice(), &twice()));
        param.set(Tensor::scalar(3.0)).unwrap();
        let _step = engraft_tensor::forbid_host_reads();
        assert_eq!(*twice(), 6.0);
    }
}
