//! The least patch of every kind: each adds its parameter to what the site gives.

use std::sync::Arc;

use engraft_nn::{
    Adapter, Base, BlockPatch, Builder, HeadPatch, Init, KeyValuePatch, KeyValues, Kind, Model, Pass, Patch,
    PromptPatch, Result, Site, SiteId, Sublayer, SublayerPatch, VectorPatch, WeightPatch,
};
use engraft_tensor::{Param, Tensor};

/// A parameter that is added, or, at keys and values and at the prompt, gives rows.
#[derive(Clone)]
pub struct Probe {
    pub param: Param,
    /// Key and value heads and their width.
    pub heads: usize,
    pub dim: usize,
    /// A gate for keys and values, one number a query head.
    pub gate: Option<Tensor>,
}

impl WeightPatch for Probe {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.param.get())?)
    }
}

impl VectorPatch for Probe {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        Ok(v.add(&self.param.get())?)
    }
}

impl SublayerPatch for Probe {
    fn output(&self, s: &Sublayer<'_>, _: &Site, cx: &Pass) -> Result<Tensor> {
        cx.put("residual", s.residual.clone());
        cx.put("output", s.output.clone());
        Ok(s.output.add(&self.param.get())?)
    }
}

impl BlockPatch for Probe {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        _: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let out = run(h, cx)?;
        cx.put("block", out.clone());
        Ok(out.add(&self.param.get())?)
    }
}

impl KeyValuePatch for Probe {
    fn count(&self) -> usize {
        self.param.value().dim(0)
    }
    fn rows(&self, _: &Tensor, _: &Pass) -> Result<KeyValues> {
        let (rows, width) = (self.param.get(), self.heads * self.dim);
        let part = |start| rows.narrow(1, start, width)?.reshape([rows.dim(0), self.heads, self.dim]);
        Ok(KeyValues { keys: part(0)?, values: part(width)? })
    }
    fn gate(&self) -> Option<Tensor> {
        self.gate.clone()
    }
}

impl PromptPatch for Probe {
    fn count(&self) -> usize {
        self.param.value().dim(0)
    }
    fn rows(&self, _: &Tensor, _: &Pass) -> Result<Tensor> {
        Ok(self.param.get())
    }
}

impl HeadPatch for Probe {
    fn logits(
        &self,
        x: &Tensor,
        run: &dyn Fn(&Tensor) -> Result<Tensor>,
        _: &Site,
        _: &Pass,
    ) -> Result<Tensor> {
        Ok(run(x)?.add(&self.param.get())?)
    }
}

/// An adapter with one parameter at the sites that `choose` takes (at several: the same parameter), drawn from `seed`;
/// `rows` of keys and values or prompt.
pub fn probe(
    model: &dyn Model,
    seed: u64,
    rows: usize,
    gated: bool,
    choose: impl Fn(&Site) -> bool,
) -> Arc<Adapter> {
    let sites: Vec<SiteId> = model.sites().iter().filter(|s| choose(s)).map(|s| s.id).collect();
    assert!(!sites.is_empty(), "no site chosen in {}", model.info().architecture);
    let shape: Vec<usize> = match model.sites().get(sites[0]).kind {
        Kind::Linear { out, inn, .. } | Kind::Convolution { out, inn, .. } => vec![out, inn],
        Kind::Embedding { rows, width } => vec![rows, width],
        Kind::Vector { len } => vec![len],
        Kind::Sublayer { width } | Kind::Block { width } => vec![width],
        Kind::KeyValue { heads, dim } => vec![rows, 2 * heads * dim],
        Kind::Prompt { width } => vec![rows, width],
        Kind::Head { out, .. } => vec![out],
    };
    let mut b = Builder::new(model.sites(), model.info(), seed);
    let param = b.param("probe", &shape, Init::Normal(0.3)).unwrap();
    for id in sites {
        let gate = gated.then(|| Init::Normal(1.0).tensor(&[model.info().heads], seed, "gate").unwrap());
        let (heads, dim) = (model.info().kv_heads, model.info().head_dim);
        let p = Box::new(Probe { param: param.clone(), heads, dim, gate });
        let patch = match model.sites().get(id).kind {
            Kind::Linear { .. } | Kind::Convolution { .. } | Kind::Embedding { .. } => Patch::Weight(p),
            Kind::Vector { .. } => Patch::Vector(p),
            Kind::Sublayer { .. } => Patch::Sublayer(p),
            Kind::Block { .. } => Patch::Block(p),
            Kind::KeyValue { .. } => Patch::KeyValue(p),
            Kind::Prompt { .. } => Patch::Prompt(p),
            Kind::Head { .. } => Patch::Head(p),
        };
        b.patch(id, patch).unwrap();
    }
    Arc::new(b.finish())
}

/// The only parameter of a [`probe`].
pub fn param(adapter: &Adapter) -> &Param {
    &adapter.params()[0].param
}

pub type Choice = fn(&Site) -> bool;

/// Every kind of site, by name: which sites, and whether keys and values are gated.
pub const KINDS: &[(&str, Choice, bool)] = &[
    ("weight", |s| s.role.name() == "up" && s.layer == Some(0), false),
    ("head weight", |s| s.role.name() == "head" && s.is_weight(), false),
    ("embedding", |s| s.role.name() == "embed", false),
    ("norm", |s| s.role.name() == "norm" && s.layer == Some(1) && s.path.ends_with("weight"), false),
    ("bias", |s| s.role.name() == "bias" && s.layer == Some(1) && last_of_mlp(&s.path), false),
    ("attention", |s| s.role.name() == "attention" && s.layer == Some(0) && sublayer(s), false),
    ("mlp", |s| s.role.name() == "mlp" && s.layer == Some(1) && sublayer(s), false),
    ("block", |s| s.role.name() == "block" && s.layer == Some(0), false),
    ("keys and values", |s| matches!(s.kind, Kind::KeyValue { .. }), false),
    ("gated keys and values", |s| matches!(s.kind, Kind::KeyValue { .. }), true),
    ("prompt", |s| matches!(s.kind, Kind::Prompt { .. }), false),
    ("head", |s| matches!(s.kind, Kind::Head { .. }), false),
    ("picture patches", |s| matches!(s.kind, Kind::Convolution { .. }), false),
    ("learned positions", |s| s.role.name() == "embed.position" && !s.is_weight(), false),
    ("layer scale", |s| s.role.name() == "scale" && s.layer == Some(1), false),
];

fn last_of_mlp(path: &str) -> bool {
    path.contains("down") || path.contains("fc2")
}

fn sublayer(s: &Site) -> bool {
    matches!(s.kind, Kind::Sublayer { .. })
}
