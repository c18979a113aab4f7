//! AdaptFormer: a bottleneck beside the MLP alone, scaled down.
//!
//! y = u + MLP(N(u)) + s·A(u), A(u) = W_u·drop(relu(W_d·u + b_d)) + b_u, u the stream before the MLP's norm. W_d starts
//! Kaiming-uniform, everything else as zero, so that a new adapter changes nothing.
//!
//! Chen et al. 2022, arXiv:2205.13535, equations 2 to 4; dropout, scale and the optional norm are those of the authors' code.
//!
//! Of each MLP's site: adaptformer.down.weight [size, width], adaptformer.up.weight [width, size], their biases; with a norm,
//! adaptformer.norm.weight and .bias `[width]`.

use engraft_nn::{Builder, Error, Kind, Pass, Patch, Result, Role, Site, SiteId, Sublayer, SublayerPatch};
use engraft_tensor::Tensor;
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::activations::Activation;
use crate::shared::branch::{Branch as Matrices, Norm, SIZE_MAX, zero_up};
use crate::shared::branches::{Branch, Branches, Form, Reads};
use crate::shared::fields::{choice, float, int};
use crate::{Described, Entry, Info, Loaded, Method, foreign, peft};

#[derive(Clone)]
struct AdaptFormer {
    size: usize,
    scale: f64,
    dropout: f32,
    norm: Place,
}

/// Where a norm of its own sits.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    None,
    /// On what the branch reads.
    In,
    /// On what it gives.
    Out,
}

const PLACES: &[(&str, Place)] = &[("none", Place::None), ("in", Place::In), ("out", Place::Out)];

static INFO: Info = Info {
    name: "adaptformer",
    title: "AdaptFormer",
    class: "additive",
    sites: "sublayer",
    paper: "arXiv:2205.13535",
    summary: "a bottleneck beside the MLP: y = u + MLP(u) + s·W_u·relu(W_d·u)",
    mergeable: false,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_ADAPTFORMER",
    fields: &[
        int("size", (1, SIZE_MAX as i64), Some("64"), "Width of the bottleneck."),
        float("scale", (0.0, 1e6), "0.1", "Factor s on the branch."),
        float("dropout", (0.0, 0.999), "0.1", "Dropout in the middle of the branch while training."),
        choice(
            "norm",
            &["none", "in", "out"],
            "\"none\"",
            "A trained layer norm on what the branch reads or gives.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn read(r: &mut Reader<'_>) -> AdaptFormer {
    AdaptFormer {
        size: r.count("size", 64, SIZE_MAX),
        scale: r.float("scale", 0.1),
        dropout: r.dropout("dropout"),
        norm: r.one_of("norm", PLACES),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(AdaptFormer { size: 3, scale: 0.5, dropout: 0.0, norm: Place::In })
}

impl Method for AdaptFormer {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("L·(2·d·size + size + d)")
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for (site, part) in self.parts(b)? {
            b.patch(site, Patch::Sublayer(Box::new(part)))?;
        }
        Ok(())
    }

    fn branches(&self) -> Option<Box<dyn Branches>> {
        Some(Box::new(self.clone()))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        self.keys()
    }
}

impl AdaptFormer {
    fn keys(&self) -> Map<String, Value> {
        let norm = PLACES.iter().find(|p| p.1 == self.norm).map_or("none", |p| p.0);
        let own = json!({
            "dropout": as_written(self.dropout), "norm": norm, "scale": number(self.scale), "size": self.size,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn parts(&self, b: &mut Builder<'_>) -> Result<Vec<(SiteId, Beside)>> {
        let mut parts = Vec::new();
        for site in b.sites().iter().filter(|s| s.role == Role::Mlp) {
            let Kind::Sublayer { width } = site.kind else { continue };
            let stem = format!("{}.adaptformer", site.path);
            let norm = match self.norm {
                Place::None => None,
                _ => Some(Norm::build(b, &format!("{stem}.norm"), width)?),
            };
            let matrices = Matrices::build(b, &stem, (width, self.size), zero_up(width))?;
            parts.push((site.id, Beside { matrices, norm, config: self.clone() }));
        }
        if parts.is_empty() {
            return Err(Error::Unsupported("AdaptFormer needs a model with MLP sublayers".into()));
        }
        Ok(parts)
    }
}

impl Branches for AdaptFormer {
    fn form(&self) -> Form {
        Form::beside_mlp(Reads::Stream)
    }

    fn tensor(&self, key: &str, _name: &str) -> Option<String> {
        key.strip_prefix(foreign::PREFIX).filter(|name| name.contains(".adaptformer.")).map(str::to_owned)
    }

    fn config(&self) -> Map<String, Value> {
        let mut keys = self.keys();
        keys.insert("peft_type".into(), INFO.peft_type.into());
        keys
    }

    fn build(&self, b: &mut Builder<'_>, _name: &str) -> Result<Vec<(SiteId, Box<dyn Branch>)>> {
        let boxed = |(site, part)| (site, Box::new(part) as Box<dyn Branch>);
        Ok(self.parts(b)?.into_iter().map(boxed).collect())
    }
}

struct Beside {
    matrices: Matrices,
    norm: Option<Norm>,
    config: AdaptFormer,
}

impl Beside {
    fn normed(&self, x: Tensor, at: Place) -> Result<Tensor> {
        match &self.norm {
            Some(norm) if self.config.norm == at => norm.apply(&x),
            _ => Ok(x),
        }
    }
}

impl Branch for Beside {
    fn read(&self, s: &Sublayer<'_>) -> Result<(Tensor, Tensor)> {
        Ok((s.residual.clone(), s.output.clone()))
    }

    fn branch(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let read = self.normed(x.clone(), Place::In)?;
        let middle = self.matrices.middle(&read, Activation::RELU)?;
        let middle = cx.dropout(&middle, self.config.dropout, site.id, 1)?;
        self.normed(self.matrices.up(&middle)?.scale(self.config.scale as f32)?, Place::Out)
    }
}

impl SublayerPatch for Beside {
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        Ok(s.output.add(&self.branch(s.residual, site, cx)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::close;

    const SITE: &str = "layers.1.output_adapters";

    #[test]
    fn the_raw_stream_is_read_beside_the_mlp() {
        let a = attached(&[chosen("adaptformer", json!({ "size": 3, "scale": 0.5 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (2 * 6 * 3 + 3 + 6));
        let (_, g, y) = at_sublayer(&a, SITE, true).unwrap();
        close(&y, &g, 0.0);
        stir(&a, 0.5);
        let get = |end: &str| value_of(&a, &format!("{SITE}.adaptformer.{end}"));
        let (u, g, y) = at_sublayer(&a, SITE, true).unwrap();
        let middle = u.matmul_t(&get("down.weight")).unwrap().add(&get("down.bias")).unwrap();
        let middle = middle.unary(engraft_tensor::ops::Unary::Relu).unwrap();
        let up = middle.matmul_t(&get("up.weight")).unwrap().add(&get("up.bias")).unwrap();
        close(&y, &g.add(&up.scale(0.5).unwrap()).unwrap(), 1e-5);
    }

    #[test]
    fn configurations() {
        for norm in ["none", "in", "out"] {
            survives_saving(&[chosen("adaptformer", json!({ "norm": norm, "size": 2 }))], &["head"]);
        }
        let written = config(&[chosen("adaptformer", json!({}))], &[]);
        assert_eq!((written["size"].clone(), written["scale"].clone()), (json!(64), json!(0.1)));
        assert!(from_file(&with(written, json!({ "norm": "both" }))).is_err());
    }
}
