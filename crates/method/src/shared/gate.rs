//! Gates that depend on the sequence: G = mean over its tokens of σ(x·wᵀ + c), a number in (0, 1) for each of `count` rows w.
//!
//! The mean is over given tokens alone, and under a cache that of the first pass stays while the text goes on.

use engraft_nn::{Builder, Init, Pass, Result};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};

use super::sequences::{means, owners};

/// w [count, width] and c `[count]`.
#[derive(Clone)]
pub(crate) struct Gate {
    weight: Param,
    bias: Param,
    /// What the numbers are kept as while text goes on.
    key: String,
}

impl Gate {
    /// STEM.weight N(0, 0.02), STEM.bias zero: gates near a half.
    pub fn new(b: &mut Builder<'_>, stem: &str, (count, width): (usize, usize)) -> Result<Gate> {
        let key = format!("{}{stem}", b.prefix());
        let weight = b.param(&format!("{stem}.weight"), &[count, width], Init::Normal(0.02))?;
        Ok(Gate { weight, bias: b.param(&format!("{stem}.bias"), &[count], Init::Zeros)?, key })
    }

    /// x [tokens, width] → [sequences, count].
    pub fn of(&self, x: &Tensor, cx: &Pass) -> Result<Tensor> {
        cx.once(&self.key, || {
            let each = x.matmul_t(&self.weight.get())?.plus(&self.bias.get())?;
            means(&each.unary(Unary::Sigmoid)?, cx)
        })
    }

    /// The gates of each row's sequence: x [tokens, width] → [tokens, count].
    pub fn of_rows(&self, x: &Tensor, cx: &Pass) -> Result<Tensor> {
        Ok(self.of(x, cx)?.gather(&owners(cx)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::toy;
    use engraft_nn::{KvCache, Layout};
    use engraft_tensor::testing::{close, sample};
    use std::sync::{Arc, Mutex};

    #[test]
    fn gates_are_those_of_the_sequence_and_stay_while_it_goes_on() {
        let (sites, info) = toy();
        let mut b = Builder::new(&sites, &info, 3);
        let gate = Gate::new(&mut b, "gate", (2, 6)).unwrap();
        gate.weight.set(sample(&[2, 6], 1)).unwrap();
        gate.bias.set(sample(&[2], 2)).unwrap();
        let x = sample(&[5, 6], 3);
        let cx = Pass::new(Layout::counted(&[2, 3]).unwrap(), None);
        let gates = gate.of(&x, &cx).unwrap();
        assert!(gates.to_vec().unwrap().iter().all(|g| (0.0..1.0).contains(g)));
        let alone = Pass::new(Layout::counted(&[3]).unwrap(), None);
        let second = gate.of(&x.rows_between(2, 5).unwrap(), &alone).unwrap();
        close(&gates.rows_between(1, 2).unwrap(), &second, 1e-6);
        let rows = gate.of_rows(&x, &cx).unwrap();
        assert_eq!(rows.shape(), [5, 2]);
        close(&rows.rows_between(4, 5).unwrap(), &second, 1e-6);
        let cache = Arc::new(Mutex::new(KvCache::new(1, 2, 8)));
        let begun = gate.of(&x, &cx.clone().cached(cache.clone())).unwrap();
        let on = Pass::new(Layout::new(&[1, 1], vec![2, 3]).unwrap(), None).cached(cache);
        close(&gate.of(&sample(&[2, 6], 9), &on).unwrap(), &begun, 0.0);
    }
}
