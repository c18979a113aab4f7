//! One adapter at one sublayer: its tensors and its forward.

use engraft_nn::{Builder, Error, Init, Kind, Mode, Pass, Result, Site, SiteId, Sublayer, SublayerPatch};
use engraft_tensor::cpu::random::Key;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value};

use super::phm::{Shared, Sum};
use super::settings::{Bottleneck, Residual, Scaling};
use crate::shared::bits::MASK;
use crate::shared::branch::Norm;
use crate::shared::branches::{Branch, Branches, Form, Reads};
use crate::shared::gate::Gate;
use crate::shared::sequences::owners;

/// The stream of random numbers that AdapterDrop draws from.
const DROPS: u64 = 0x6164_6170_7465_7264;

/// x·Wᵀ + b in one of its forms.
enum Projection {
    Matrix { weight: Param, bias: Param },
    Phm(Sum),
}

impl Projection {
    fn matrix(b: &mut Builder<'_>, stem: &str, (out, inn): (usize, usize), start: Init) -> Result<Self> {
        let weight = b.param(&format!("{stem}.weight"), &[out, inn], start)?;
        Ok(Projection::Matrix { weight, bias: b.param(&format!("{stem}.bias"), &[out], Init::Zeros)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Projection::Matrix { weight, bias } => Ok(x.matmul_t(&weight.get())?.plus(&bias.get())?),
            Projection::Phm(sum) => sum.forward(x),
        }
    }
}

/// The adapter of one sublayer.
pub(crate) struct AtSublayer {
    config: Bottleneck,
    before: Option<Norm>,
    down: Projection,
    up: Projection,
    scale: Option<Param>,
    after: Option<Norm>,
    gate: Option<Gate>,
    /// Number of the layer and of all layers, where the adapters of the first ones are left out by chance.
    drop: Option<(usize, usize)>,
}

impl AtSublayer {
    pub(super) fn build(c: &Bottleneck, b: &mut Builder<'_>, site: &Site, shared: &Shared) -> Result<Self> {
        let Kind::Sublayer { width } = site.kind else {
            return Err(Error::Site { path: site.path.clone(), message: "expected a sublayer".into() });
        };
        let number = b.sites().number(site);
        let size = c.size_at(number, width);
        let stem = format!("{}.adapters.{}", site.path, c.name);
        let norm = |b: &mut Builder<'_>, wanted: bool, name: &str| -> Result<Option<Norm>> {
            wanted.then(|| Norm::build(b, &format!("{stem}.{name}"), width)).transpose()
        };
        let before = norm(b, c.ln_before, "adapter_norm_before")?;
        let after = norm(b, c.ln_after, "adapter_norm_after")?;
        // The layers up to the activation are counted together, a norm first.
        let down = format!("{stem}.adapter_down.{}", usize::from(c.ln_before));
        let up = format!("{stem}.adapter_up");
        let scale = match c.scaling {
            Scaling::Fixed(_) => None,
            Scaling::Learned => Some(b.param(&format!("{stem}.scaling"), &[1], Init::Ones)?),
            Scaling::Channel => Some(b.param(&format!("{stem}.scaling"), &[width], Init::Ones)?),
        };
        let (down, up) = match &c.phm {
            None => {
                let [start_down, start_up] = c.start.matrices(width);
                (
                    Projection::matrix(b, &down, (size, width), start_down)?,
                    Projection::matrix(b, &up, (width, size), start_up)?,
                )
            }
            Some(phm) => (
                Projection::Phm(phm.build(b, site, &down, (width, size), &shared.down, shared)?),
                Projection::Phm(phm.build(b, site, &up, (size, width), &shared.up, shared)?),
            ),
        };
        let gate = c.gating.then(|| Gate::new(b, &format!("{stem}.gate"), (1, width))).transpose()?;
        let drop = number.filter(|_| c.robust_drop).map(|number| (number, b.sites().blocks()));
        Ok(AtSublayer { config: c.clone(), before, down, up, scale, after, gate, drop })
    }

    /// Whether this batch goes without the adapter.
    fn is_dropped(&self, cx: &Pass) -> bool {
        match (self.drop, cx.mode()) {
            (Some((number, layers)), Mode::Train { seed, step, micro }) => {
                number < dropped(seed, step, micro, layers)
            }
            _ => false,
        }
    }

    /// s·(σ(N(x)·W_dᵀ + b_d)·W_uᵀ + b_u), x [tokens, width], before dropout and gate.
    fn branch(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let c = &self.config;
        let normed = self.before.as_ref().map(|norm| norm.apply(x)).transpose()?;
        let middle = c.activation.apply(self.down.forward(normed.as_ref().unwrap_or(x))?)?;
        let mut up = self.up.forward(&middle)?;
        if c.depth > 0.0 && !c.parallel {
            let kept =
                cx.dropout(&Tensor::full(1.0, [cx.layout().sequences().len(), 1]), c.depth, site.id, 2)?;
            up = up.mul(&kept.gather(&owners(cx)?)?)?;
        }
        Ok(match (&self.scale, c.scaling) {
            (Some(scale), _) => up.mul(&scale.get())?,
            (None, Scaling::Fixed(s)) if s != 1.0 => up.scale(s as f32)?,
            _ => up,
        })
    }

    /// What it adds, before a norm of its own.
    fn bottleneck(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let up = cx.dropout(&self.branch(x, site, cx)?, self.config.dropout, site.id, 1)?;
        match &self.gate {
            None => Ok(up),
            Some(gate) => Ok(up.mul(&gate.of_rows(x, cx)?)?),
        }
    }

    fn own_norm(&self, x: Tensor) -> Result<Tensor> {
        match &self.after {
            Some(norm) => norm.apply(&x),
            None => Ok(x),
        }
    }

    fn parallel(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        let added = self.own_norm(self.bottleneck(s.residual, site, cx)?)?;
        Ok(s.output.add(&added)?)
    }

    /// What it reads, and its residual.
    fn read(&self, s: &Sublayer<'_>) -> Result<(Tensor, Tensor)> {
        let c = &self.config;
        if c.parallel {
            return Ok((s.residual.clone(), s.output.clone()));
        }
        let sum = s.output.add(s.residual)?;
        let input = match (c.original_ln_before, s.norm) {
            (true, Some(norm)) => norm(&sum)?,
            (true, None) => sum.clone(),
            (false, _) => s.output.clone(),
        };
        let residual = match c.residual {
            Residual::Output => s.output.clone(),
            Residual::Sum => sum,
            Residual::Input => input.clone(),
        };
        Ok((input, residual))
    }

    /// What a sublayer gives when `next`, output and residual of a serial adapter, is to go on.
    fn going_on(&self, next: Tensor, s: &Sublayer<'_>) -> Result<Tensor> {
        match (self.config.original_ln_after, s.norm) {
            // Without the model's own residual: what the model adds to the stream is taken off first.
            (false, None) => Ok(next.sub(s.residual)?),
            _ => Ok(next),
        }
    }

    fn serial(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        let (input, residual) = self.read(s)?;
        let added = self.bottleneck(&input, site, cx)?;
        if self.config.residual_before_own_norm {
            return self.own_norm(added.add(&residual)?);
        }
        Ok(self.own_norm(added)?.add(&residual)?)
    }
}

impl Branch for AtSublayer {
    fn read(&self, s: &Sublayer<'_>) -> Result<(Tensor, Tensor)> {
        self.read(s)
    }

    fn branch(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        self.branch(x, site, cx)
    }

    fn going_on(&self, next: Tensor, s: &Sublayer<'_>) -> Result<Tensor> {
        self.going_on(next, s)
    }

    fn replaces_norm(&self) -> bool {
        !self.config.original_ln_after
    }
}

impl Branches for Bottleneck {
    fn form(&self) -> Form {
        let reads = match (self.parallel, self.original_ln_before) {
            (true, _) => Reads::Stream,
            (false, true) => Reads::Normed,
            (false, false) => Reads::Output,
        };
        let rest = match self.residual {
            _ if self.parallel => Reads::Output,
            Residual::Output => Reads::Output,
            Residual::Sum => Reads::Sum,
            Residual::Input => reads,
        };
        let places = [self.after_attention, self.after_cross_attention, self.after_mlp];
        Form { places, reads, rest, goes_on: self.original_ln_after }
    }

    fn hindrances(&self) -> Vec<&'static str> {
        let all = [
            (
                self.gating,
                "has a gate (`gating`), which weighs what it adds by the whole text, where a fusion weighs it for every token",
            ),
            (self.ln_after, "has a norm on its output (`ln_after`), which would not be that of a sum"),
            (
                self.invertible.is_some(),
                "has an invertible part (`invertible`), which lies at the embeddings and mixes with nothing",
            ),
        ];
        all.into_iter().filter_map(|(is_so, what)| is_so.then_some(what)).collect()
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn tensor(&self, key: &str, name: &str) -> Option<String> {
        // `adapters` keeps the norm before a bottleneck in two places; what a mask took out is zero.
        let is_copy = self.ln_before && key.contains(".adapter_down.0.") || key.ends_with(MASK);
        let own = |part: &str| [format!("{part}.{}.", self.name), format!("{part}.{name}.")];
        let parts = [own(".adapters"), own("shared_parameters")];
        let [before, now] = parts.iter().find(|[before, _]| key.contains(before.as_str()))?;
        (!is_copy).then(|| key.replace(before.as_str(), now))
    }

    fn config(&self) -> Map<String, Value> {
        self.to_config().as_object().cloned().unwrap_or_default()
    }

    fn build(&self, b: &mut Builder<'_>, name: &str) -> Result<Vec<(SiteId, Box<dyn Branch>)>> {
        // It is not trained, so that none of its layers is left out by chance.
        let own = Bottleneck { name: name.into(), robust_drop: false, ..self.clone() };
        let shared = own.shared(b)?;
        let mut parts: Vec<(SiteId, Box<dyn Branch>)> = Vec::new();
        for site in b.sites().of_kind(|k| matches!(k, Kind::Sublayer { .. })) {
            if own.wants(site, b.sites().number(site)) {
                parts.push((site.id, Box::new(AtSublayer::build(&own, b, site, &shared)?)));
            }
        }
        Ok(parts)
    }
}

impl SublayerPatch for AtSublayer {
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        if self.is_dropped(cx) {
            return match s.norm.filter(|_| !self.config.original_ln_after) {
                Some(norm) => norm(&s.output.add(s.residual)?),
                None => Ok(s.output.clone()),
            };
        }
        let next = if self.config.parallel { self.parallel(s, site, cx)? } else { self.serial(s, site, cx)? };
        self.going_on(next, s)
    }

    fn replaces_norm(&self) -> bool {
        !self.config.original_ln_after
    }
}

/// How many of the first of `layers` go without adapters in a micro-batch: evenly from 0 to all but one.
pub(super) fn dropped(seed: u64, step: u64, micro: u64, layers: usize) -> usize {
    let drawn = Key { seed, stream: DROPS }.uniform(step << 20 ^ micro);
    ((drawn * layers as f32) as usize).min(layers.saturating_sub(1))
}
