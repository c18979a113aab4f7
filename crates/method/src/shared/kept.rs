//! What is computed from parameters alone, kept between passes while these stay as they are: a text that is written token by
//! token would otherwise pay for it at every token.

use std::sync::{Mutex, PoisonError};

use engraft_nn::Result;
use engraft_tensor::{Param, Tensor, read_once};

/// A value that is kept, if there is one.
pub(crate) struct Kept<T>(Mutex<Option<Made<T>>>);

struct Made<T> {
    /// The parameters that it was computed from, and how often each had changed.
    of: Vec<(Param, u64)>,
    value: T,
}

impl<T: Clone> Kept<T> {
    pub fn new() -> Self {
        Kept(Mutex::new(None))
    }

    /// What `make` computes from `params`; made again where one of them has changed, and where a gradient is to reach them.
    pub fn of(&self, params: &[&Param], make: impl FnOnce() -> Result<T>) -> Result<T> {
        if params.iter().any(|param| param.get().needs_grad()) {
            return make();
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Made { of, value }) = kept.as_ref()
            && of.len() == params.len()
            && of
                .iter()
                .zip(params)
                .all(|((of, version), param)| of.same(param) && *version == param.version())
        {
            return Ok(value.clone());
        }
        let of = params.iter().map(|&param| (param.clone(), param.version())).collect();
        let value = make()?;
        *kept = Some(Made { of, value: value.clone() });
        Ok(value)
    }

    /// What `make` reads out of a tensor that steps do not change, as the places of a mask are: since that happens once, it may
    /// happen in the middle of a step.
    pub fn read(&self, param: &Param, make: impl FnOnce(&Tensor) -> Result<T>) -> Result<T> {
        self.of(&[param], || read_once(|| make(&param.value())))
    }
}

#[cfg(test)]
mod tests {
    use engraft_tensor::testing::sample;
    use engraft_tensor::{Param, forbid_host_reads, no_grad};

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

    #[test]
    fn read_in_the_middle_of_a_step_and_again_from_another_parameter() {
        let (two, three) = (Param::frozen(Tensor::scalar(2.0)), Param::frozen(Tensor::scalar(3.0)));
        let kept = Kept::new();
        let twice = |param: &Param| kept.read(param, |t| Ok(t.item()? * 2.0)).unwrap();
        let _step = forbid_host_reads();
        assert_eq!([twice(&two), twice(&three), twice(&two)], [4.0, 6.0, 4.0]);
    }
}
