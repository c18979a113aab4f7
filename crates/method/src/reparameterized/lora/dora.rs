//! DoRA: W′ = m ⊙ (W + s·B·A)/‖W + s·B·A‖, norms of rows, constants to the gradient; m starts as the rows' norms of W.
//!
//! Liu et al. 2024, arXiv:2402.09353. m is `[out]`, of a convolution [1, out, 1, 1]; of a table, whose columns have norms
//! instead, `[width]`. Over a frozen weight the norms come without W + s·B·A: of row o,
//! ‖w‖² + 2s·⟨w, (B·A)ₒ⟩ + s²·‖(B·A)ₒ‖², where W·Aᵀ is the layer's own product with A as its input.

use engraft_nn::{Base, Builder, Error, Init, Mode, Pass, Patch, Result, Site, Value, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, no_grad};

use super::factors::{Factors, Table};
use super::{Lora, Shapes};
use crate::shared::kept::Kept;

impl Lora {
    pub(super) fn attach_magnitude(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        factors: Factors,
        shapes: &Shapes<'_>,
    ) -> Result<()> {
        let norms = no_grad(|| row_norms(&site_weight(site)?.add(&factors.product()?)?))?;
        let shape = match shapes.ones {
            [] => vec![norms.len()],
            ones => [&[1, norms.len()], ones].concat(),
        };
        let name = format!("{}.lora_magnitude_vector", site.path);
        let magnitude = b.param_in_group(&name, &shape, Init::Values(norms), self.group(false))?;
        b.patch(site.id, Patch::Weight(Box::new(Dora { factors, magnitude, norms: Kept::new() })))
    }

    pub(super) fn attach_table_magnitude(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        factors: Factors,
    ) -> Result<()> {
        let table = Table(factors);
        let norms = no_grad(|| column_norms(&site_weight(site)?.add(&table.0.product()?.t()?)?))?;
        let name = format!("{}.lora_magnitude_vector", site.path);
        let magnitude = b.param_in_group(&name, &[norms.len()], Init::Values(norms), self.group(false))?;
        b.patch(site.id, Patch::Weight(Box::new(DoraTable { table, magnitude })))
    }
}

/// Magnitude and direction of a matrix.
struct Dora {
    factors: Factors,
    magnitude: Param,
    /// Those over a frozen weight.
    norms: Kept<Tensor>,
}

impl Dora {
    /// m/‖W + s·B·A‖ `[out]`; the norm is a constant to the gradient.
    fn gain(&self, base: &dyn Base) -> Result<Tensor> {
        let norms = no_grad(|| self.norms(base))?;
        Ok(self.magnitude.get().reshape([norms.len()])?.div(&norms)?)
    }

    /// ‖W + s·B·A‖ `[out]`.
    fn norms(&self, base: &dyn Base) -> Result<Tensor> {
        let Some(squares) = base.row_squares()? else {
            return row_norms(&base.dense()?.add(&self.factors.product()?)?);
        };
        self.norms.of(&self.factors.params(), || self.norms_over(base, &squares))
    }

    /// The same over a frozen weight, ‖w‖² of whose rows are `squares` `[out]`.
    fn norms_over(&self, base: &dyn Base, squares: &Tensor) -> Result<Tensor> {
        let (a, b) = self.factors.pair()?;
        let (scale, out) = (self.factors.scale, b.dim(0));
        let sums = |t: Tensor| -> Result<Tensor> { Ok(t.sum_to(&[out, 1])?.reshape([out])?) };
        let met = sums(base.forward(&a)?.t()?.mul(&b)?)?.scale(2.0 * scale)?;
        let own = sums(b.matmul(&a.matmul_t(&a)?)?.mul(&b)?)?.scale(scale * scale)?;
        // A row that is nearly zero may come out below it.
        Ok(squares.add(&met)?.add(&own)?.unary(Unary::Abs)?.unary(Unary::Sqrt)?)
    }
}

impl WeightPatch for Dora {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let changed = base.dense()?.add(&self.factors.product()?)?;
        let norms = no_grad(|| row_norms(&changed.detach()))?;
        let gain = self.magnitude.get().reshape([norms.len()])?.div(&norms)?;
        Ok(changed.mul(&gain.reshape([gain.len(), 1])?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let gain = self.gain(base)?;
        let dropout = self.factors.dropout.elements;
        let straight = self.factors.frozen(x, base)?;
        if dropout == 0.0 || cx.mode() == Mode::Eval {
            return Ok(self.factors.added_to(straight, x)?.mul(&gain)?);
        }
        // Dropout acts on what is added to the frozen output: (g − 1)·drop(x)·Wᵀ + g·s·(drop(x)·Aᵀ)·Bᵀ.
        let dropped = cx.dropout(x, dropout, site.id, 0)?;
        let frozen = self.factors.frozen(&dropped, base)?;
        let moved = self.factors.added_to(frozen.clone(), &dropped)?.mul(&gain)?.sub(&frozen)?;
        Ok(straight.add(&moved)?)
    }
}

/// Magnitudes of a table's columns.
struct DoraTable {
    table: Table,
    magnitude: Param,
}

impl DoraTable {
    /// m/‖E + s·(B·A)ᵀ‖ `[width]`.
    fn gain(&self, changed: &Tensor) -> Result<Tensor> {
        Ok(self.magnitude.get().div(&no_grad(|| column_norms(&changed.detach()))?)?)
    }
}

impl WeightPatch for DoraTable {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let changed = self.table.weight(base)?;
        Ok(changed.mul(&self.gain(&changed)?)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let gain = self.gain(&no_grad(|| self.table.weight(base))?)?;
        Ok(base.lookup(ids)?.add(&self.table.rows(ids)?)?.mul(&gain)?)
    }
}

/// W as it is before any patch.
pub(super) fn site_weight(site: &Site) -> Result<Tensor> {
    match &site.value {
        Value::Weight(w) => w.dense(),
        _ => Err(Error::Site { path: site.path.clone(), message: "expected a weight, found none".into() }),
    }
}

/// ‖row‖ of every row of w [out, in]: `[out]`.
pub(super) fn row_norms(w: &Tensor) -> Result<Tensor> {
    let out = w.dim(0);
    Ok(w.unary(Unary::Square)?.sum_to(&[out, 1])?.unary(Unary::Sqrt)?.reshape([out])?)
}

/// ‖column‖ of every column of w [rows, width]: `[width]`.
fn column_norms(w: &Tensor) -> Result<Tensor> {
    let width = w.dim(1);
    Ok(w.unary(Unary::Square)?.sum_to(&[1, width])?.unary(Unary::Sqrt)?.reshape([width])?)
}
