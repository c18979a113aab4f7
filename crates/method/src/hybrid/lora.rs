//! AdapterHub's LoRA at queries, keys and values, times a gate of the sequence or not.
//!
//! y = x·Wᵀ + G·(x·Aᵀ)·Bᵀ, or α/r in the place of G. Where queries, keys and values are one matrix, A and B of those that are
//! changed lie one after another, and each has a gate.

use engraft_nn::{Base, Builder, Error, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::gate::Gate;
use crate::shared::low_rank::{RANK_MAX, linear};

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Lora {
    pub rank: usize,
    pub alpha: f64,
    pub gated: bool,
    pub dropout: f32,
    /// Which of q, k and v.
    pub matrices: Vec<String>,
    pub leave_out: Vec<usize>,
}

const MATRICES: &[(&str, Role)] = &[("q", Role::Q), ("k", Role::K), ("v", Role::V)];

impl Lora {
    pub fn new(rank: usize, gated: bool) -> Lora {
        let matrices = vec!["q".into(), "v".into()];
        // AdapterHub's α of a gated LoRA, which the gate stands in for.
        Lora { rank, alpha: 2.0, gated, dropout: 0.0, matrices, leave_out: vec![] }
    }

    pub fn read(map: &Map<String, Value>) -> Result<Lora> {
        let mut r = Reader::file(map);
        r.ignore(&["architecture", "init_weights", "init_weights_seed", "dtype"]);
        r.must_be_off(&["intermediate_lora", "output_lora", "use_dora", "vera_b", "vera_d"]);
        r.one_of("composition_mode", &[("add", ())]);
        if !r.flag("selfattn_lora", true) {
            r.problem("`selfattn_lora` is false: then nothing is changed");
        }
        let lora = Lora {
            rank: r.count("r", 8, RANK_MAX),
            alpha: r.float("alpha", 8.0),
            gated: r.flag("use_gating", false),
            dropout: r.dropout("dropout"),
            matrices: r.texts("attn_matrices").unwrap_or_else(|| vec!["q".into(), "v".into()]),
            leave_out: r.counts("leave_out").unwrap_or_default(),
        };
        for name in lora.matrices.iter().filter(|name| !MATRICES.iter().any(|(known, _)| known == name)) {
            r.problem(format!("`attn_matrices`: expected q, k and v, found {name}"));
        }
        r.finish()?;
        Ok(lora)
    }

    pub fn config(&self) -> Value {
        json!({
            "alpha": number(self.alpha), "architecture": "lora", "attn_matrices": self.matrices, "composition_mode": "add",
            "dropout": as_written(self.dropout), "dtype": null, "init_weights": "lora", "init_weights_seed": null,
            "intermediate_lora": false, "leave_out": self.leave_out, "output_lora": false, "r": self.rank,
            "selfattn_lora": true, "use_dora": false, "use_gating": self.gated, "vera_b": null, "vera_d": null,
        })
    }

    /// Attaches it as `name`.
    pub fn attach(&self, b: &mut Builder<'_>, name: &str) -> Result<()> {
        let wanted = |role: Role| self.matrices.iter().any(|m| MATRICES.contains(&(m.as_str(), role)));
        let mut found = false;
        for site in b.sites().iter().filter(|s| s.is_weight()) {
            let here = site.layer.is_none_or(|layer| !self.leave_out.contains(&layer));
            if !here || site.role != Role::Qkv && !wanted(site.role) {
                continue;
            }
            found = true;
            let (out, inn) = linear(site, "UniPELT")?;
            let parts: Vec<usize> = match site.role {
                Role::Qkv => (0..3).filter(|&i| wanted(MATRICES[i].1)).collect(),
                _ => vec![],
            };
            let (count, each) = if parts.is_empty() { (1, out) } else { (parts.len(), out / 3) };
            let stem = format!("{}.loras.{name}", site.path);
            let gate = match self.gated {
                true => Some(Gate::new(b, &format!("{stem}.gate"), (count, inn))?),
                false => None,
            };
            let start = Init::kaiming(inn);
            let pair = Pair {
                a: b.param(&format!("{stem}.lora_A"), &[count * self.rank, inn], start)?,
                b: b.param(&format!("{stem}.lora_B"), &[count * each, self.rank], Init::Zeros)?,
                lora: self.clone(),
                parts,
                gate,
            };
            b.patch(site.id, Patch::Weight(Box::new(pair)))?;
        }
        if found {
            return Ok(());
        }
        Err(Error::Unsupported("LoRA of UniPELT needs a model with queries and values".into()))
    }
}

/// A and B of one matrix.
struct Pair {
    a: Param,
    b: Param,
    lora: Lora,
    /// Which thirds of a matrix of queries, keys and values are changed; none of one that is not in three.
    parts: Vec<usize>,
    gate: Option<Gate>,
}

impl Pair {
    /// The change of part `i` of x [tokens, in], `factor` [tokens, 1] or one number.
    fn of_part(&self, x: &Tensor, i: usize, factor: &Tensor) -> Result<Tensor> {
        let (rank, count) = (self.lora.rank, self.parts.len().max(1));
        let (a, b) = (self.a.get(), self.b.get());
        let each = b.dim(0) / count;
        let inner = x.matmul_t(&a.rows_between(i * rank, (i + 1) * rank)?)?.mul(factor)?;
        Ok(inner.matmul_t(&b.rows_between(i * each, (i + 1) * each)?)?)
    }
}

impl WeightPatch for Pair {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        if self.gate.is_some() || !self.parts.is_empty() {
            let text =
                "a gated LoRA depends on its input and cannot be folded into a weight; use it unmerged";
            return Err(Error::Unsupported(text.into()));
        }
        let scale = (self.lora.alpha / self.lora.rank as f64) as f32;
        Ok(base.dense()?.add(&self.b.get().matmul(&self.a.get())?.scale(scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?;
        let gates = self.gate.as_ref().map(|gate| gate.of_rows(x, cx)).transpose()?;
        let x = cx.dropout(x, self.lora.dropout, site.id, 0)?;
        let factor = |i: usize| match &gates {
            Some(gates) => gates.narrow(1, i, 1),
            None => Ok(Tensor::full((self.lora.alpha / self.lora.rank as f64) as f32, [1, 1])),
        };
        if self.parts.is_empty() {
            return Ok(y.plus(&self.of_part(&x, 0, &factor(0)?)?)?);
        }
        let nothing = Tensor::zeros([x.dim(0), y.width() / 3]);
        let third = |part: usize| match self.parts.iter().position(|&p| p == part) {
            Some(i) => self.of_part(&x, i, &factor(i)?),
            None => Ok(nothing.clone()),
        };
        Ok(y.plus(&cat(&[&third(0)?, &third(1)?, &third(2)?], 1)?)?)
    }

    fn mergeable(&self) -> bool {
        self.gate.is_none() && self.parts.is_empty()
    }
}
