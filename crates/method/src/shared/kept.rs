//! What is computed from parameters alone, kept between passes while these stay as they are: a text that is written token by
//! token would otherwise pay for it at every token.

use std::sync::{Mutex, PoisonError};

use engraft_nn::Result;
use engraft_tensor::Param;

/// A value, and the versions of the parameters that it was computed from.
pub(crate) struct Kept<T>(Mutex<Option<(Vec<u64>, T)>>);

impl<T: Clone> Kept<T> {
    pub fn new() -> Self {
        Kept(Mutex::new(None))
    }

    /// What `make` computes from `params`; made again where one of them has changed, and where a gradient is to reach them.
    pub fn of(&self, params: &[&Param], make: impl FnOnce() -> Result<T>) -> Result<T> {
        if params.iter().any(|param| param.get().needs_grad()) {
            return make();
        }
        let versions: Vec<u64> = params.iter().map(|param| param.version()).collect();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, value)) = kept.as_ref()
            && *of == versions
        {
            return Ok(value.clone());
        }
        let value = make()?;
        *kept = Some((versions, value.clone()));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use engraft_tensor::testing::sample;
    use engraft_tensor::{Param, no_grad};

    use super::*;

    #[test]
    fn made_once_until_a_parameter_changes_and_always_for_a_gradient() {
        let (param, kept) = (Param::new(sample(&[2], 1)), Kept::new());
        let mut made = 0;
        let mut doubled = || {
            kept.of(&[&param], || {
                made += 1;
                Ok(param.get().scale(2.0)?)
            })
            .unwrap()
        };
        let first = no_grad(&mut doubled);
        assert_eq!(no_grad(&mut doubled).to_vec().unwrap(), first.to_vec().unwrap());
        assert!(doubled().needs_grad());
        param.set(sample(&[2], 2)).unwrap();
        assert_ne!(no_grad(&mut doubled).to_vec().unwrap(), first.to_vec().unwrap());
        assert_eq!(made, 3, "once, for the gradient, and after the change");
    }
}
