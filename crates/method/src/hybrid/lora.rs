//! AdapterHub's LoRA and (IA)³ at queries, keys, values and the matrices of the MLP, LoRA times a gate of the sequence or not.
//!
//! y = x·Wᵀ + G·(x·Aᵀ)·Bᵀ, or α/r in the place of G; (IA)³: y = α·l ⊙ (x·Wᵀ + b), l called B. Where queries, keys and values are
//! one matrix, A and B of those that are changed lie one after another, and each has a gate.

use engraft_nn::{
    Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, Sites, VectorPatch, WeightPatch,
};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::adapter_hub::hub_name;
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
    /// At attention, at the MLP's first matrix (that which is not its gate), at its last.
    pub at: [bool; 3],
    /// (IA)³.
    pub scales: bool,
    /// How it started, for the file.
    pub start: String,
}

const MATRICES: &[(&str, [Role; 2])] =
    &[("q", [Role::Q, Role::CrossQ]), ("k", [Role::K, Role::CrossK]), ("v", [Role::V, Role::CrossV])];
const PLACES: [&str; 3] = ["selfattn_lora", "intermediate_lora", "output_lora"];

impl Lora {
    pub fn new(rank: usize, gated: bool) -> Lora {
        Lora {
            rank,
            // AdapterHub's α of a gated LoRA, which the gate stands in for.
            alpha: 2.0,
            gated,
            dropout: 0.0,
            matrices: vec!["q".into(), "v".into()],
            leave_out: vec![],
            at: [true, false, false],
            scales: false,
            start: "lora".into(),
        }
    }

    pub fn read(map: &Map<String, Value>) -> Result<Lora> {
        let mut r = Reader::file(map);
        r.ignore(&["architecture", "init_weights_seed", "dtype"]);
        r.must_be_off(&["use_dora", "vera_b", "vera_d"]);
        let usual = [true, false, false];
        let lora = Lora {
            rank: r.count("r", 8, RANK_MAX),
            alpha: r.float("alpha", 8.0),
            gated: r.flag("use_gating", false),
            dropout: r.dropout("dropout"),
            matrices: r.texts("attn_matrices").unwrap_or_else(|| vec!["q".into(), "v".into()]),
            leave_out: r.counts("leave_out").unwrap_or_default(),
            at: [0, 1, 2].map(|i| r.flag(PLACES[i], usual[i])),
            scales: r.one_of("composition_mode", &[("add", false), ("scale", true)]),
            start: r.text("init_weights").unwrap_or_else(|| "lora".into()),
        };
        if lora.at == [false; 3] {
            r.problem(
                "`selfattn_lora`, `intermediate_lora` and `output_lora` are false: then nothing is changed",
            );
        }
        for name in lora.matrices.iter().filter(|name| !MATRICES.iter().any(|(known, _)| known == name)) {
            r.problem(format!("`attn_matrices`: expected q, k and v, found {name}"));
        }
        if lora.scales && (lora.rank, lora.gated, lora.dropout) != (1, false, 0.0) {
            r.problem("`composition_mode` = scale goes with `r` = 1, without `use_gating` and `dropout`");
        }
        r.finish()?;
        Ok(lora)
    }

    pub fn config(&self) -> Value {
        json!({
            "alpha": number(self.alpha), "architecture": "lora", "attn_matrices": self.matrices,
            "composition_mode": if self.scales { "scale" } else { "add" }, "dropout": as_written(self.dropout), "dtype": null,
            "init_weights": self.start, "init_weights_seed": null, "intermediate_lora": self.at[1], "leave_out": self.leave_out,
            "output_lora": self.at[2], "r": self.rank, "selfattn_lora": self.at[0], "use_dora": false, "use_gating": self.gated,
            "vera_b": null, "vera_d": null,
        })
    }

    /// The number in [`PLACES`] of where a matrix lies, and none of others. The library calls the matrices of an MLP
    /// back to front in some models ([`Sites::mlp_reversed`]).
    fn place(role: Role, sites: &Sites) -> Option<usize> {
        let reversed = sites.mlp_reversed();
        match role {
            Role::Up => Some(if reversed { 2 } else { 1 }),
            Role::Down => Some(if reversed { 1 } else { 2 }),
            Role::Qkv => Some(0),
            _ => MATRICES.iter().any(|(_, roles)| roles.contains(&role)).then_some(0),
        }
    }

    /// Whether AdapterHub has something at such a matrix.
    pub fn has_place(&self, site: &Site, sites: &Sites) -> bool {
        matches!(site.kind, Kind::Linear { .. }) && Lora::place(site.role, sites).is_some()
    }

    /// Is to change matrices like `site` too.
    pub fn add_place(&mut self, site: &Site, sites: &Sites) {
        let Some(place) = Lora::place(site.role, sites) else { return };
        self.at[place] = true;
        let is_it = |roles: &[Role; 2]| site.role == Role::Qkv || roles.contains(&site.role);
        let has = |own: &Lora, name: &str| own.matrices.iter().any(|m| m == name);
        let all = MATRICES.iter().filter(|(name, roles)| is_it(roles) || has(self, name));
        self.matrices = all.map(|(name, _)| (*name).to_owned()).collect();
    }

    /// Whether a matrix is changed.
    fn wants(&self, role: Role, sites: &Sites) -> bool {
        let named = |(name, roles): &(&str, [Role; 2])| {
            roles.contains(&role) && self.matrices.iter().any(|m| m == name)
        };
        let place = Lora::place(role, sites).filter(|place| self.at[*place]);
        match (place, role) {
            (None, _) => false,
            (Some(0), Role::Qkv) => !self.matrices.is_empty(),
            (Some(0), _) => MATRICES.iter().any(named),
            (Some(_), _) => true,
        }
    }

    /// The matrices that it changes.
    pub fn places<'s>(&self, sites: &'s Sites) -> Vec<&'s Site> {
        let wanted = sites.iter().filter(|s| s.is_weight() && self.wants(s.role, sites));
        let left_out = |site: &Site| sites.number(site).is_some_and(|layer| self.leave_out.contains(&layer));
        wanted.filter(|site| !left_out(site)).collect()
    }

    /// Which thirds of a matrix of queries, keys and values are changed; none of one that is not in three.
    fn thirds(&self, site: &Site, sites: &Sites) -> Vec<usize> {
        match site.role {
            Role::Qkv => (0..3).filter(|&i| self.wants(MATRICES[i].1[0], sites)).collect(),
            _ => vec![],
        }
    }

    /// In how many parts a matrix is changed, and (out, in) of them together.
    pub fn parts(&self, site: &Site, sites: &Sites) -> Result<(usize, [usize; 2])> {
        let (out, inn) = linear(site, "LoRA in AdapterHub's form")?;
        Ok(match self.thirds(site, sites).len() {
            0 => (1, [out, inn]),
            count => (count, [count * (out / 3), inn]),
        })
    }

    /// Attaches it as `name`.
    pub fn attach(&self, b: &mut Builder<'_>, name: &str) -> Result<()> {
        let sites = b.sites();
        let places = self.places(sites);
        if places.is_empty() {
            return Err(Error::Unsupported(
                "LoRA in AdapterHub's form needs a model with queries and values".into(),
            ));
        }
        for site in places {
            let (count, [out, inn]) = self.parts(site, sites)?;
            let parts = self.thirds(site, sites);
            let stem = format!("{}.loras.{name}", hub_name(sites, site));
            if self.scales {
                let l = b.param(&format!("{stem}.lora_B"), &[out, 1], Init::Ones)?;
                let scale = Scale { l, alpha: self.alpha as f32, parts };
                let bias = format!("{}.bias", site.path);
                if let Some(bias) = sites.iter().find(|s| s.path == bias) {
                    b.patch(bias.id, Patch::Vector(Box::new(scale.clone())))?;
                }
                b.patch(site.id, Patch::Weight(Box::new(scale)))?;
                continue;
            }
            let gate = match self.gated {
                true => Some(Gate::new(b, &format!("{stem}.gate"), (count, inn))?),
                false => None,
            };
            let start = Init::kaiming(inn);
            let pair = Pair {
                a: b.param(&format!("{stem}.lora_A"), &[count * self.rank, inn], start)?,
                b: b.param(&format!("{stem}.lora_B"), &[out, self.rank], Init::Zeros)?,
                lora: self.clone(),
                parts,
                gate,
            };
            b.patch(site.id, Patch::Weight(Box::new(pair)))?;
        }
        Ok(())
    }
}

/// l of one matrix, as (IA)³ has it.
#[derive(Clone)]
struct Scale {
    l: Param,
    alpha: f32,
    /// As [`Pair::parts`].
    parts: Vec<usize>,
}

impl Scale {
    /// α·l for all outputs [out, 1], ones where nothing is scaled.
    fn whole(&self) -> Result<Tensor> {
        let l = self.l.get();
        let whole = match self.parts.len() {
            0 | 3 => l,
            count => {
                let each = l.dim(0) / count;
                let ones = Tensor::full(1.0, [each, 1]);
                let third = |part: usize| match self.parts.iter().position(|&p| p == part) {
                    Some(i) => l.rows_between(i * each, (i + 1) * each),
                    None => Ok(ones.clone()),
                };
                cat(&[&third(0)?, &third(1)?, &third(2)?], 0)?
            }
        };
        Ok(if self.alpha == 1.0 { whole } else { whole.scale(self.alpha)? })
    }
}

impl WeightPatch for Scale {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.mul(&self.whole()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let (y, l) = (base.forward(x)?, self.whole()?);
        Ok(y.mul(&l.reshape([1, l.dim(0)])?)?)
    }
}

impl VectorPatch for Scale {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        let l = self.whole()?;
        Ok(v.mul(&l.reshape([l.dim(0)])?)?)
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
        if self.gate.is_some() {
            let text =
                "a gated LoRA depends on its input and cannot be folded into a weight; use it unmerged";
            return Err(Error::Unsupported(text.into()));
        }
        let (w, rank) = (base.dense()?, self.lora.rank);
        let (a, b, scale) = (self.a.get(), self.b.get(), (self.lora.alpha / rank as f64) as f32);
        let each = b.dim(0) / self.parts.len().max(1);
        let product = |i: usize| {
            let a = a.rows_between(i * rank, (i + 1) * rank)?;
            b.rows_between(i * each, (i + 1) * each)?.matmul(&a)?.scale(scale)
        };
        if self.parts.is_empty() {
            return Ok(w.add(&product(0)?)?);
        }
        let nothing = Tensor::zeros([each, w.width()]);
        let third = |part: usize| match self.parts.iter().position(|&p| p == part) {
            Some(i) => product(i),
            None => Ok(nothing.clone()),
        };
        Ok(w.add(&cat(&[&third(0)?, &third(1)?, &third(2)?], 0)?)?)
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
        self.gate.is_none()
    }
}
