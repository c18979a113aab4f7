//! AdaMSS's changes at one target: of its weight, and of its bias as the last column.

use std::sync::Arc;

use engraft_nn::{Base, Pass, Result, Site, VectorPatch, WeightPatch};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};

/// The Bᵢ·Aᵢ·V of one target.
pub(super) struct Subspaces {
    pub v: Param,
    pub a: Vec<Param>,
    pub b: Vec<Param>,
    /// Where each output is among the clusters one after another.
    pub place: Tensor,
    pub inn: usize,
}

impl Subspaces {
    /// A [R, r], R the ranks together.
    fn down(&self) -> Result<Tensor> {
        let parts: Vec<Tensor> = self.a.iter().map(Param::get).collect();
        Ok(cat(&parts.iter().collect::<Vec<_>>(), 0)?)
    }

    /// The Bᵢ in the rows of their outputs and the columns of their ranks: [out, R].
    fn up(&self) -> Result<Tensor> {
        let all: usize = self.b.iter().map(|b| b.value().width()).sum();
        let (mut rows, mut before) = (Vec::new(), 0);
        for b in &self.b {
            let b = b.get();
            let (n, rank) = (b.dim(0), b.width());
            let sides = [before, all - before - rank].map(|width| Tensor::zeros([n, width]));
            let [left, right] = &sides;
            let parts: Vec<&Tensor> = [left, &b, right].into_iter().filter(|t| !t.is_empty()).collect();
            rows.push(cat(&parts, 1)?);
            before += rank;
        }
        Ok(cat(&rows.iter().collect::<Vec<_>>(), 0)?.gather(&self.place)?)
    }

    /// V as the inputs see it [r, in], or its column of the bias [r, 1].
    fn columns(&self, of_bias: bool) -> Result<Tensor> {
        let v = self.v.get();
        Ok(match of_bias {
            true => v.narrow(1, self.inn, 1)?,
            false if v.width() == self.inn => v,
            false => v.narrow(1, 0, self.inn)?,
        })
    }
}

pub(super) struct OnWeight(pub Arc<Subspaces>);

impl WeightPatch for OnWeight {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let down = self.0.down()?.matmul(&self.0.columns(false)?)?;
        Ok(base.dense()?.add(&self.0.up()?.matmul(&down)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let down = self.0.down()?.matmul(&self.0.columns(false)?)?;
        Ok(base.forward(x)?.add_low_rank(x, &down, &self.0.up()?, 1.0)?)
    }
}

pub(super) struct OnBias(pub Arc<Subspaces>);

impl VectorPatch for OnBias {
    fn vector(&self, base: &Tensor) -> Result<Tensor> {
        let down = self.0.down()?.matmul(&self.0.columns(true)?)?;
        Ok(base.add(&self.0.up()?.matmul(&down)?.reshape([base.len()])?)?)
    }
}
