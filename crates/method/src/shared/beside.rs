//! Networks beside the frozen blocks: they read what the blocks give, and what they make takes the place of the last one's
//! output.
//!
//! The blocks run without a tape: nothing of them is kept for backward, and no gradient passes through them.

use std::sync::Arc;

use engraft_nn::{BlockPatch, Builder, Error, Kind, Pass, Patch, Result, Site, Stack};
use engraft_tensor::{Tensor, no_grad};

/// A side network; rows are those of the pass.
pub(crate) trait Side: Send + Sync {
    /// The state before the first block, whose input is x [tokens, width].
    fn start(&self, x: &Tensor) -> Result<Tensor>;
    /// The state after the block `number`, whose output is `out` [tokens, width].
    fn step(&self, state: Tensor, number: usize, out: &Tensor, cx: &Pass) -> Result<Tensor>;
    /// What takes the place of the last block's output.
    fn end(&self, state: Tensor, out: &Tensor) -> Result<Tensor>;
}

/// The blocks that a side network goes along: of an encoder and a decoder the decoder's, which have read the source.
pub(crate) fn blocks<'a>(b: &Builder<'a>) -> Result<(Vec<&'a Site>, usize)> {
    let all: Vec<&Site> = b.sites().of_kind(|k| matches!(k, Kind::Block { .. })).collect();
    let decodes = all.iter().any(|s| s.stack == Stack::Decoder);
    let own: Vec<&Site> = all.into_iter().filter(|s| !decodes || s.stack == Stack::Decoder).collect();
    match own.first().map(|s| &s.kind) {
        Some(&Kind::Block { width }) => Ok((own, width)),
        _ => Err(Error::Unsupported("a side network needs a model with blocks; adapt its matrices".into())),
    }
}

/// Puts a side network beside `blocks`; of those between the first and the last it reads the ones that `reads` names.
pub(crate) fn attach<S: Side + 'static>(
    b: &mut Builder<'_>,
    side: S,
    blocks: &[&Site],
    reads: impl Fn(usize) -> bool,
) -> Result<()> {
    let enters = |patch: &Patch| matches!(patch, Patch::Block(block) if block.rows_before() > 0);
    if blocks.iter().any(|site| b.patches(site.id).iter().any(enters)) {
        let message = "a side network follows the same rows through all blocks, and an earlier method of the recipe puts rows between \
                       blocks; use one of the two: behind a side network nothing in the blocks learns";
        return Err(Error::Unsupported(message.into()));
    }
    let (side, key, last) = (Arc::new(side), format!("{}beside", b.prefix()), blocks.len().saturating_sub(1));
    for (number, site) in blocks.iter().enumerate() {
        if number != 0 && number != last && !reads(number) {
            continue;
        }
        let (side, key) = (side.clone(), key.clone());
        let patch = Beside { side, key, number, is_first: number == 0, is_last: number == last };
        b.patch(site.id, Patch::Block(Box::new(patch)))?;
    }
    Ok(())
}

/// A side network at one block.
struct Beside<S> {
    side: Arc<S>,
    key: String,
    number: usize,
    is_first: bool,
    is_last: bool,
}

impl<S: Side> BlockPatch for Beside<S> {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let h = h.detach();
        let out = no_grad(|| run(&h, cx))?;
        let before = if self.is_first { Some(self.side.start(&h)?) } else { cx.find(&self.key) };
        let Some(before) = before else {
            let message = "a side network begins at the first block and cannot be left out of it";
            return Err(Error::Site { path: site.path.clone(), message: message.into() });
        };
        let state = self.side.step(before, self.number, &out, cx)?;
        if self.is_last {
            return self.side.end(state, &out);
        }
        cx.put(self.key.clone(), state);
        Ok(out)
    }
}

/// μ·a + (1 − μ)·b, μ `[1]`.
pub(crate) fn mixed(a: &Tensor, b: &Tensor, share: &Tensor) -> Result<Tensor> {
    Ok(a.sub(b)?.mul(share)?.plus(b)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_nn::{Init, Layout};
    use engraft_tensor::Param;
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    use crate::testing::{chosen, toy};

    /// s₀ = p ⊙ x, s ← s + out; the output is s.
    struct Sum(Param);

    impl Side for Sum {
        fn start(&self, x: &Tensor) -> Result<Tensor> {
            Ok(x.mul(&self.0.get())?)
        }
        fn step(&self, state: Tensor, _: usize, out: &Tensor, _: &Pass) -> Result<Tensor> {
            Ok(state.plus(out)?)
        }
        fn end(&self, state: Tensor, _: &Tensor) -> Result<Tensor> {
            Ok(state)
        }
    }

    #[test]
    fn nothing_of_the_blocks_is_recorded() {
        let (sites, info) = toy();
        let mut b = Builder::new(&sites, &info, 1);
        let own = b.param("p", &[6], Init::Normal(1.0)).unwrap();
        let (found, width) = blocks(&b).unwrap();
        assert_eq!((found.len(), width), (2, 6));
        attach(&mut b, Sum(own.clone()), &found, |_| true).unwrap();
        let adapter = b.finish();
        let cx = Pass::new(Layout::counted(&[4]).unwrap(), None);
        // A block with a tensor that could be trained.
        let inner = Param::new(sample(&[6, 6], 2));
        let run = |x: &Tensor, _: &Pass| {
            let out = x.matmul_t(&inner.get())?;
            assert!(!out.needs_grad());
            Ok(out)
        };
        let (x, mut h) = (sample(&[4, 6], 3), sample(&[4, 6], 3));
        let mut outs = vec![];
        for site in &found {
            let [Patch::Block(patch)] = adapter.at(site.id) else { panic!() };
            outs.push(h.matmul_t(&inner.value()).unwrap());
            h = patch.around(&h, &run, site, &cx).unwrap();
        }
        close(&h, &x.mul(&own.value()).unwrap().add(&outs[0]).unwrap().add(&outs[1]).unwrap(), 1e-6);
        let gradients = h.sum().unwrap().backward().unwrap();
        assert!(gradients.get(&inner).is_none());
        close(gradients.get(&own).unwrap(), &x.sum_dim(0).unwrap().reshape([6]).unwrap(), 1e-6);
        // Rows that enter between blocks are not in the state.
        let two = [chosen("lpt", json!({ "tokens": 2 })), chosen("lst", json!({ "reduction": 2 }))];
        let error = crate::attach(&two, &[], &sites, &info, 1).err().unwrap().to_string();
        assert!(error.contains("same rows through all blocks"), "{error}");
        // Without the first block there is no state.
        let [Patch::Block(last)] = adapter.at(found[1].id) else { panic!() };
        let alone = Pass::new(Layout::counted(&[4]).unwrap(), None);
        let error = last.around(&x, &run, found[1], &alone).err().unwrap().to_string();
        assert!(error.contains("begins at the first block"), "{error}");
    }
}
