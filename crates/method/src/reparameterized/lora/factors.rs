//! A, B, what stands between them, and what they add to a matrix, a table, or a head that shares the table's tensor.
//!
//! MoSLoRA (Wu et al. 2024, arXiv:2406.11909): W′ = W + s·B·M·A with a trained mixer M [rank, rank]. It trains as (M·A)
//! in the place of A and is saved so, as a plain LoRA.
//!
//! Starts that are not zero are taken off the weight: W′ = W + s·(B·A − B₀·A₀), where A₀ and B₀ stay as they are. That is
//! a plain LoRA of twice the rank, [A; A₀] and [B, −B₀], and is saved as one.
//!
//! LoRA Dropout (Lin et al. 2024, arXiv:2404.09610): whole columns of A and rows of B are left out, those that meet inputs
//! and outputs, never ranks. The paper averages the loss over N masks of each batch; here the sequences of a batch are
//! dealt to N masks in turn, which has the same mean at the cost of one forward. What is kept is scaled up by 1/(1 − p).

use engraft_nn::{Base, Mode, Pass, Result, Site, WeightPatch};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};

use super::form::At;
use super::variants::spread;

/// What is left out while training.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Dropout {
    /// Share of single numbers of A's input.
    pub elements: f32,
    /// Share of columns of A and of rows of B.
    pub structured: f32,
    /// Number of masks of these in a batch.
    pub masks: usize,
}

/// What stands between B and A.
#[derive(Clone)]
pub(super) enum Inner {
    Nothing,
    /// M [rank, rank].
    Mixer(Param),
    /// The diagonal of such an M `[rank]`.
    Diagonal(Param),
}

/// A, B and their scale.
#[derive(Clone)]
pub(super) struct Factors {
    pub a: Param,
    pub b: Param,
    pub inner: Inner,
    /// Blocks on the diagonals of A and of B that their tensors hold; one is a whole matrix.
    pub blocks: [usize; 2],
    /// A₀ and B₀, whose product is taken off the weight.
    pub taken: Option<(Param, Param)>,
    pub form: At,
    pub scale: f32,
    pub dropout: Dropout,
}

impl Factors {
    /// The tensors that training may change.
    pub fn params(&self) -> Vec<&Param> {
        let inner = match &self.inner {
            Inner::Nothing => None,
            Inner::Mixer(m) | Inner::Diagonal(m) => Some(m),
        };
        [&self.a, &self.b].into_iter().chain(inner).collect()
    }

    /// A, or M·A: what B is multiplied by.
    pub fn a(&self) -> Result<Tensor> {
        let a = spread(matrix(&self.a)?, self.blocks[0])?;
        match &self.inner {
            Inner::Nothing => Ok(a),
            Inner::Mixer(m) => Ok(m.get().matmul(&a)?),
            Inner::Diagonal(d) => Ok(a.mul(&d.get().reshape([a.dim(0), 1])?)?),
        }
    }

    /// B.
    fn b(&self) -> Result<Tensor> {
        spread(matrix(&self.b)?, self.blocks[1])
    }

    /// The two factors of W′ − W = s·B·A, a start that is taken off joined to them.
    pub fn pair(&self) -> Result<(Tensor, Tensor)> {
        let (a, b) = (self.a()?, self.b()?);
        let Some((a0, b0)) = &self.taken else { return Ok((a, b)) };
        Ok((cat(&[&a, &matrix(a0)?], 0)?, cat(&[&b, &matrix(b0)?.scale(-1.0)?], 1)?))
    }

    /// W′ − W.
    pub fn product(&self) -> Result<Tensor> {
        let (a, b) = self.pair()?;
        Ok(b.matmul(&a)?.scale(self.scale)?)
    }

    /// x·Wᵀ − s·(x·A₀ᵀ)·B₀ᵀ: what stays as it is.
    pub fn frozen(&self, x: &Tensor, base: &dyn Base) -> Result<Tensor> {
        let y = base.forward(x)?;
        match &self.taken {
            Some((a, b)) => Ok(y.add_low_rank(x, &matrix(a)?, &matrix(b)?, -self.scale)?),
            None => Ok(y),
        }
    }

    /// y + s·(x·Aᵀ)·Bᵀ.
    pub fn added_to(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        Ok(y.add_low_rank(x, &self.a()?, &self.b()?, self.scale)?)
    }

    /// y + s·((x ⊙ m)·Aᵀ)·Bᵀ ⊙ n, masks m of columns of A and n of rows of B, for each sequence one of a few pairs.
    fn masked(&self, y: Tensor, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let sequences = cx.layout().sequences().iter().enumerate();
        let which: Vec<i64> = sequences
            .flat_map(|(i, rows)| rows.clone().map(move |_| (i % self.dropout.masks) as i64))
            .collect();
        let which = Tensor::from_i64(which, [x.rows()])?;
        let mask = |width: usize, salt: u8| -> Result<Tensor> {
            let ones = Tensor::full(1.0, [self.dropout.masks, width]);
            Ok(cx.dropout(&ones, self.dropout.structured, site.id, salt)?.gather(&which)?)
        };
        let inner = x.mul(&mask(x.width(), 1)?)?.matmul_t(&self.a()?)?.scale(self.scale)?;
        Ok(y.add(&inner.matmul_t(&self.b()?)?.mul(&mask(y.width(), 2)?)?)?)
    }
}

/// A factor as a matrix: what follows the first size becomes one.
pub(super) fn matrix(factor: &Param) -> Result<Tensor> {
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
        let dropped = cx.dropout(x, self.dropout.elements, site.id, 0)?;
        let y = self.frozen(x, base)?;
        match (&self.form, cx.mode()) {
            (At::Velora(direction), Mode::Train { .. }) => {
                direction.added_to(y, &dropped, [&self.a()?, &self.b()?], self.scale, cx)
            }
            (At::MonteClora(sampler), Mode::Train { seed, step, micro }) => {
                let [a, loss] = sampler.draw(&self.a()?, site, (seed, step, micro))?;
                let y = y.add_low_rank(&dropped, &a, &self.b()?, self.scale)?;
                Ok(y.carrying(&loss.scale(cx.share())?)?)
            }
            (At::Alora(invoked), _) => self.added_to(y, &invoked.only(&dropped, site, cx)?),
            (_, Mode::Train { .. }) if self.dropout.structured > 0.0 => self.masked(y, &dropped, site, cx),
            _ => self.added_to(y, &dropped),
        }
    }

    /// Of a table that is named by itself, A [rank, width] and B [rows, rank]: rows of W + s·B·A.
    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let (a, b) = self.pair()?;
        Ok(base.lookup(ids)?.add(&b.gather(ids)?.scale(self.scale)?.matmul(&a)?)?)
    }

    fn mergeable(&self) -> bool {
        !matches!(self.form, At::Alora(_))
    }
}

/// The factors at a table, at a head that shares its tensor, and at a matrix that is named by itself and stored transposed:
/// W′ = W + s·(B·A)ᵀ.
pub(super) struct Table(pub Factors);

impl Table {
    /// The rows `ids` of what is added to the table [tokens, width].
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let chosen = self.0.a.get().t()?.gather(ids)?; // [tokens, rank]
        Ok(chosen.scale(self.0.scale)?.matmul_t(&self.0.b.get())?)
    }
}

impl WeightPatch for Table {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.0.product()?.t()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.0.dropout.elements, site.id, 0)?;
        let (a, b) = self.0.pair()?;
        let branch = dropped.matmul(&b)?.scale(self.0.scale)?.matmul(&a)?;
        Ok(base.forward(x)?.add(&branch)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.lookup(ids)?.add(&self.rows(ids)?)?)
    }
}
