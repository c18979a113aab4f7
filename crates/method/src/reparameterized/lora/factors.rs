//! A, B and what they add to a matrix, a table, or a head that shares the table's tensor.

use engraft_nn::{Base, Pass, Result, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};

#[derive(Clone)]
pub(super) struct Factors {
    pub a: Param,
    pub b: Param,
    pub scale: f32,
    pub dropout: f32,
}

impl Factors {
    /// s·B·A.
    pub fn product(&self) -> Result<Tensor> {
        Ok(matrix(&self.b)?.matmul(&matrix(&self.a)?)?.scale(self.scale)?)
    }

    /// y + s·(x·Aᵀ)·Bᵀ.
    pub fn added_to(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        Ok(y.add_low_rank(x, &matrix(&self.a)?, &matrix(&self.b)?, self.scale)?)
    }
}

/// A factor as a matrix: what follows the first size becomes one.
fn matrix(factor: &Param) -> Result<Tensor> {
    let factor = factor.get();
    match *factor.shape() {
        [_, _] => Ok(factor),
        [rows, ..] => Ok(factor.reshape([rows, factor.len() / rows.max(1)])?),
        [] => Ok(factor.reshape([1, 1])?),
    }
}

impl WeightPatch for Factors {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.product()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        self.added_to(base.forward(x)?, &dropped)
    }
}

/// The factors at a table, and at a head that shares its tensor.
pub(super) struct Table(pub Factors);

impl WeightPatch for Table {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.0.product()?.t()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.0.dropout, site.id, 0)?;
        let branch = dropped.matmul(&self.0.b.get())?.scale(self.0.scale)?.matmul(&self.0.a.get())?;
        Ok(base.forward(x)?.add(&branch)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let chosen = self.0.a.get().t()?.gather(ids)?; // [tokens, rank]
        Ok(base.lookup(ids)?.add(&chosen.scale(self.0.scale)?.matmul_t(&self.0.b.get())?)?)
    }
}
