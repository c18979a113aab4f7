//! A sum of scalars whose gradients are taken as the terms are made.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Edge, MODE, Mode, Node, Sink, accumulate, next_number};
use crate::error::{Error, shape_error};
use crate::tensor::Tensor;

/// Terms of a loss, each differentiated as soon as it is made: what its gradients need is freed with it, and is not computed
/// again in backward as by [`crate::checkpoint`]. So the logits of a large vocabulary are made once, a part at a time.
///
/// A term is in the unit of the loss that backward starts from (divided by the step's labels already): losses that a term
/// carries along, and gradients that it shows to observers, are not scaled later.
pub struct Terms {
    total: Tensor,
    /// What reached the tape as it was before a term: gradients of its inputs and of parameters.
    gradients: HashMap<u64, (Arc<Node>, Tensor)>,
}

impl Default for Terms {
    fn default() -> Self {
        Terms { total: Tensor::scalar(0.0), gradients: HashMap::new() }
    }
}

impl Terms {
    /// Adds the scalar that `f` computes.
    pub fn add<E: From<Error>>(&mut self, f: impl FnOnce() -> Result<Tensor, E>) -> Result<(), E> {
        let first = next_number();
        let term = f()?;
        Ok(self.add_made(term, first)?)
    }

    /// Adds `term`, whose nodes have numbers from `first` on.
    fn add_made(&mut self, term: Tensor, first: u64) -> Result<(), Error> {
        if term.len() != 1 {
            return shape_error("Terms::add", "a scalar", format!("{:?}", term.shape()));
        }
        self.total = self.total.add(&term.detach())?;
        if MODE.get() != Mode::Record {
            return Ok(());
        }
        let mut sink = Sink::default();
        sink.add(&term.edge(), Tensor::full(1.0, term.shape()))?;
        drop(term);
        for (node, dy) in sink.run(first)? {
            let sum = match self.gradients.remove(&node.id) {
                Some((_, sum)) => accumulate(sum, dy)?,
                None => dy,
            };
            self.gradients.insert(node.id, (node, sum));
        }
        Ok(())
    }

    /// The sum, a scalar; backward hands on the gradients that were taken, times its own.
    pub fn total(self) -> Tensor {
        if self.gradients.is_empty() {
            return self.total;
        }
        let gradients = self.gradients;
        let backward = move |dy: Tensor, sink: &mut Sink| {
            gradients
                .into_values()
                .try_for_each(|(node, gradient)| sink.add(&Edge(Some(node)), gradient.mul(&dy)?))
        };
        self.total.with_node(Some(Node::new("terms", Some(Box::new(backward)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Unary;
    use crate::testing::sample;
    use crate::{Param, checkpoint, no_grad};

    /// What two terms share: a parameter each uses, an input on the tape, and a value made before them.
    fn loss(params: &[Param; 3], at_once: bool) -> Tensor {
        let [p, q, r] = params;
        let x = sample(&[5, 3], 1).matmul_t(&p.get()).unwrap();
        let before = r.get().unary(Unary::Exp).unwrap();
        let term =
            |rows: usize| x.narrow(0, rows, 2)?.matmul_t(&q.get())?.mul(&before)?.unary(Unary::Tanh)?.sum();
        if !at_once {
            return term(0).unwrap().add(&term(3).unwrap()).unwrap();
        }
        let mut terms = Terms::default();
        for first in [0, 3] {
            terms.add(|| term(first)).unwrap();
        }
        terms.total()
    }

    #[test]
    fn gradients_are_those_of_the_plain_sum() {
        let params = [sample(&[3, 3], 2), sample(&[4, 3], 3), sample(&[4], 4)].map(Param::new);
        let gradients = |at_once: bool, checkpointed: bool| {
            let inner = params.clone();
            let sum = move |_: &[Tensor]| loss(&inner, at_once).scale(0.5);
            let sum = if checkpointed { checkpoint(&[], sum) } else { sum(&[]) }.unwrap();
            let found = sum.backward().unwrap();
            let list =
                params.iter().flat_map(|p| found.get(p).unwrap().to_vec().unwrap()).collect::<Vec<_>>();
            (sum.item().unwrap(), list)
        };
        let (value, expected) = gradients(false, false);
        for checkpointed in [false, true] {
            let (sum, found) = gradients(true, checkpointed);
            assert!((sum - value).abs() < 1e-6, "{sum} {value}");
            for (a, b) in found.iter().zip(&expected) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
            }
        }
        assert!(no_grad(|| loss(&params, true)).edge().0.is_none());
    }

    #[test]
    fn a_term_is_a_scalar_and_none_is_zero() {
        assert!(Terms::default().add(|| Ok::<_, Error>(sample(&[2], 1))).is_err());
        assert_eq!(Terms::default().total().item().unwrap(), 0.0);
    }
}
