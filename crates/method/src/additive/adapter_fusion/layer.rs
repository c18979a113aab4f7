//! The adapters of one sublayer under the attention over them.

use engraft_nn::{Builder, Error, Init, Kind, Pass, Result, Site, Sublayer, SublayerPatch};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};

use super::{Fusion, LAYER};
use crate::shared::branches::Branch;

/// What V starts as beside the diagonal.
const BESIDE: f32 = 1e-6;

/// I, 10⁻⁶ beside its diagonal.
fn almost_identity(width: usize) -> Result<Tensor> {
    let one = (0..width * width).map(|i| if i % (width + 1) == 0 { 1.0 } else { BESIDE }).collect();
    Ok(Tensor::from_vec(one, [width, width])?)
}

/// An adapter at a sublayer.
pub(super) struct Member {
    pub branch: Box<dyn Branch>,
    /// Whether it reads what the last one here reads, which the query is made of.
    pub reads_with_last: bool,
}

/// The adapters of one sublayer and the attention over them.
pub(super) struct Fused {
    members: Vec<Member>,
    query: Option<[Param; 2]>,
    key: Option<[Param; 2]>,
    value: Option<Param>,
    dropout: f32,
}

impl Fused {
    /// Over `members`. Where there are none, its tensors are only kept: AdapterHub's files have them.
    pub fn build(fusion: &Fusion, b: &mut Builder<'_>, site: &Site, members: Vec<Member>) -> Result<Fused> {
        let Kind::Sublayer { width } = site.kind else {
            return Err(Error::Site { path: site.path.clone(), message: "expected a sublayer".into() });
        };
        let stem = format!("{}{LAYER}{}", site.path, fusion.names());
        let is_used = !members.is_empty();
        let mut make = |name: &str, shape: &[usize], start: Init| match is_used {
            true => b.param(&format!("{stem}.{name}"), shape, start),
            false => b.fixed(&format!("{stem}.{name}"), shape, start),
        };
        let mut map = |wanted: bool, name: &str| -> Result<Option<[Param; 2]>> {
            if !wanted {
                return Ok(None);
            }
            let weight = make(&format!("{name}.weight"), &[width, width], Init::Normal(0.02))?;
            Ok(Some([weight, make(&format!("{name}.bias"), &[width], Init::Zeros)?]))
        };
        let (query, key) = (map(fusion.has_query, "query")?, map(fusion.has_key, "key")?);
        let value = match fusion.has_value {
            true => Some(make("value.weight", &[width, width], Init::Values(almost_identity(width)?))?),
            false => None,
        };
        Ok(Fused { members, query, key, value, dropout: fusion.dropout })
    }

    fn last(&self, site: &Site) -> Result<&dyn Branch> {
        let nothing = || Error::Site { path: site.path.clone(), message: "no adapters to fuse".into() };
        self.members.last().map(|member| member.branch.as_ref()).ok_or_else(nothing)
    }

    /// Σ_m α_m·V·z_m of outputs z_m, x what the query is made of; all [tokens, width].
    fn mixed(&self, x: &Tensor, outputs: &[Tensor], site: &Site, cx: &Pass) -> Result<Tensor> {
        let query = match &self.query {
            Some([weight, bias]) => x.matmul_t(&weight.get())?.plus(&bias.get())?,
            None => x.clone(),
        };
        let towards = match &self.key {
            Some([weight, _]) => query.matmul(&weight.get())?,
            None => query.clone(),
        };
        let scores = outputs.iter().map(|z| Ok(towards.mul(z)?.sum_dim(1)?)).collect::<Result<Vec<_>>>()?;
        let mut scores = cat(&scores.iter().collect::<Vec<_>>(), 1)?;
        if let Some([_, bias]) = &self.key {
            scores = scores.add(&query.mul(&bias.get())?.sum_dim(1)?)?;
        }
        let shares = cx.dropout(&scores, self.dropout, site.id, 3)?.softmax()?;
        let mut mixed: Option<Tensor> = None;
        for (m, z) in outputs.iter().enumerate() {
            let part = z.mul(&shares.narrow(1, m, 1)?)?;
            mixed = Some(match mixed {
                Some(sum) => sum.plus(&part)?,
                None => part,
            });
        }
        match (mixed, &self.value) {
            (Some(mixed), Some(value)) => Ok(mixed.matmul_t(&value.get())?),
            (Some(mixed), None) => Ok(mixed),
            (None, _) => Err(Error::Site { path: site.path.clone(), message: "no adapters to fuse".into() }),
        }
    }
}

impl SublayerPatch for Fused {
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        // They are alike in where they go on, and the last says what the query is made of, as in AdapterHub's library.
        let last = self.last(site)?;
        let (query, residual) = last.read(s)?;
        let output = |member: &Member| match member.reads_with_last {
            true => member.branch.branch(&query, site, cx),
            false => member.branch.branch(&member.branch.read(s)?.0, site, cx),
        };
        let outputs = self.members.iter().map(output).collect::<Result<Vec<_>>>()?;
        let fused = self.mixed(&query, &outputs, site, cx)?;
        last.going_on(fused.plus(&residual)?, s)
    }

    fn replaces_norm(&self) -> bool {
        self.members.last().is_some_and(|member| member.branch.replaces_norm())
    }
}
