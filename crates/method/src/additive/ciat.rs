//! CIAT: counter-interference adapters, beside every sublayer and behind the embeddings.
//!
//! Every sublayer S (self-attention, cross-attention, MLP): y = x + S(N x) + A(N x), the frozen norm N shared by both; what the
//! first block of each stack reads: e′ = e + A(N′ e), N′ a trained layer norm. A(x) = W_u·drop(relu(W_d·x + b_d)) + b_u with
//! r = width/reduction. Matrices start Glorot-uniform, as the authors' framework has it, so that a new adapter does change
//! something; with `zero_init`, W_u starts as zero.
//!
//! Zhu et al. 2021, arXiv:2104.08154 (Findings of EMNLP), equations 3 to 6.
//!
//! Of each sublayer's site and of each first block: ciat.down.weight [r, width], ciat.up.weight [width, r], their biases; of the
//! first blocks ciat.norm.weight and .bias `[width]`.

use engraft_nn::{
    BlockPatch, Builder, Error, Kind, Pass, Patch, Result, Site, Stack, Sublayer, SublayerPatch,
};
use engraft_tensor::Tensor;
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::activations::Activation;
use crate::shared::branch::{Branch, Norm, glorot, zero_up};
use crate::shared::fields::{flag, float};
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct Ciat {
    reduction: f64,
    dropout: f32,
    zero_init: bool,
}

static INFO: Info = Info {
    name: "ciat",
    title: "CIAT",
    class: "additive",
    sites: "sublayer, block",
    paper: "arXiv:2104.08154",
    summary: "bottlenecks beside every sublayer, reading through the model's norm, and one behind the embeddings",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_CIAT",
    fields: &[
        float("reduction", (0.01, 1e6), "2", "Width of the model over width of the bottlenecks."),
        float("dropout", (0.0, 0.999), "0.3", "Dropout in the middle of the bottlenecks while training."),
        flag("zero_init", "false", "Start with W_u = 0, so that nothing changes at first."),
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

fn read(r: &mut Reader<'_>) -> Ciat {
    let reduction = r.reduction("reduction", 2.0);
    Ciat { reduction, dropout: r.dropout("dropout"), zero_init: r.flag("zero_init", false) }
}

fn example() -> Box<dyn Method> {
    Box::new(Ciat { reduction: 4.0, dropout: 0.0, zero_init: false })
}

impl Ciat {
    fn branch(&self, b: &mut Builder<'_>, site: &Site, width: usize) -> Result<Branch> {
        let size = ((width as f64 / self.reduction).floor() as usize).max(1);
        let starts = if self.zero_init { zero_up(width) } else { glorot(width, size) };
        Branch::build(b, &format!("{}.ciat", site.path), (width, size), starts)
    }
}

impl Method for Ciat {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("(2·L + 1)·(2·d·r + r + d) + 2·d, r = ⌊d/reduction⌋")
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let mut stacks: Vec<Stack> = Vec::new();
        for site in b.sites().iter() {
            match site.kind {
                Kind::Block { width } if !stacks.contains(&site.stack) => {
                    stacks.push(site.stack);
                    let norm = Norm::build(b, &format!("{}.ciat.norm", site.path), width)?;
                    let part = Part {
                        branch: self.branch(b, site, width)?,
                        norm: Some(norm),
                        dropout: self.dropout,
                    };
                    b.patch(site.id, Patch::Block(Box::new(part)))?;
                }
                Kind::Sublayer { width } => {
                    let part =
                        Part { branch: self.branch(b, site, width)?, norm: None, dropout: self.dropout };
                    b.patch(site.id, Patch::Sublayer(Box::new(part)))?;
                }
                _ => {}
            }
        }
        let found = b.sites().iter().any(|s| matches!(s.kind, Kind::Sublayer { .. }));
        if found { Ok(()) } else { Err(Error::Unsupported("CIAT needs a model with sublayers".into())) }
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "dropout": as_written(self.dropout), "reduction": number(self.reduction), "zero_init": self.zero_init,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// One bottleneck, behind the embeddings with a norm of its own.
struct Part {
    branch: Branch,
    norm: Option<Norm>,
    dropout: f32,
}

impl Part {
    fn added(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let middle = self.branch.middle(x, Activation::RELU)?;
        self.branch.up(&cx.dropout(&middle, self.dropout, site.id, 1)?)
    }
}

impl SublayerPatch for Part {
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        Ok(s.output.add(&self.added(s.input, site, cx)?)?)
    }
}

impl BlockPatch for Part {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let normed = self.norm.as_ref().map(|norm| norm.apply(h)).transpose()?;
        run(&h.add(&self.added(normed.as_ref().unwrap_or(h), site, cx)?)?, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::close;

    const SITE: &str = "layers.0.attention_adapters";

    #[test]
    fn the_sublayers_input_is_read() {
        let a = attached(&[chosen("ciat", json!({ "reduction": 3 }))], &[]);
        // Two layers of two sublayers of width 6 and r 2, and the first block's input with a norm.
        assert_eq!(a.adapter.trained_count(), 5 * (2 * 6 * 2 + 2 + 6) + 2 * 6);
        stir(&a, 0.5);
        let get = |end: &str| value_of(&a, &format!("{SITE}.ciat.{end}"));
        let (u, g, y) = at_sublayer(&a, SITE, false).unwrap();
        let middle = u.matmul_t(&get("down.weight")).unwrap().add(&get("down.bias")).unwrap();
        let middle = middle.unary(engraft_tensor::ops::Unary::Relu).unwrap();
        let up = middle.matmul_t(&get("up.weight")).unwrap().add(&get("up.bias")).unwrap();
        close(&y, &g.add(&up).unwrap(), 1e-5);
        let zero = attached(&[chosen("ciat", json!({ "zero_init": true }))], &[]);
        let (_, g, y) = at_sublayer(&zero, SITE, false).unwrap();
        close(&y, &g, 0.0);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("ciat", json!({ "zero_init": true, "dropout": 0.1 }))], &["head"]);
        let written = config(&[chosen("ciat", json!({}))], &[]);
        assert_eq!(written["dropout"], json!(0.3));
        assert!(from_file(&with(written, json!({ "reduction": 0 }))).is_err());
    }
}
