//! BEFT: a vector added to what the projections of values give, and nothing else.
//!
//! b′ = b + c, or y = x·Wᵀ + c where the layer has no bias; c starts as zero. Only values are adapted by default: the biases
//! of queries and keys do less for few data.
//!
//! BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes, 2025, arXiv:2509.15974.
//!
//! `beft_bias` [1, out].

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, VectorPatch, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::flag;
use crate::shared::matrices;
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct Beft {
    init_weights: bool,
}

static INFO: Info = Info {
    name: "beft",
    title: "BEFT",
    class: "additive",
    sites: "weight",
    paper: "arXiv:2509.15974",
    summary: "a bias added to the projections of values",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::V]),
    peft_type: "BEFT",
    fields: &[flag("init_weights", "true", "Start as zero; otherwise the vectors are drawn.")],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let beft = Beft { init_weights: r.flag("init_weights", true) };
    r.finish()?;
    Ok(Box::new(beft))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let beft = Beft { init_weights: r.flag("init_weights", true) };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(beft), targets, train_also }))
}

fn example() -> Box<dyn Method> {
    Box::new(Beft { init_weights: true })
}

impl Method for Beft {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (out, _) = matrices::linear(site, INFO.title)?;
            let start = if self.init_weights { Init::Zeros } else { Init::Normal(1.0) };
            let shift = Shift(b.param(&format!("{}.beft_bias", site.path), &[1, out], start)?);
            match b.sites().bias_of(&site.path) {
                Some(bias) => b.patch(bias.id, Patch::Vector(Box::new(shift)))?,
                None => b.patch(site.id, Patch::Weight(Box::new(shift)))?,
            }
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "init_weights": self.init_weights });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// A vector added to a bias, or to an output that has none.
struct Shift(Param);

impl Shift {
    fn added(&self) -> Result<Tensor> {
        let c = self.0.get();
        Ok(c.reshape([c.len()])?)
    }
}

impl VectorPatch for Shift {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        Ok(v.add(&self.added()?)?)
    }
}

impl WeightPatch for Shift {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        Ok(base.forward(x)?.plus(&self.added()?)?)
    }

    fn mergeable(&self) -> bool {
        false
    }

    fn lacks_bias(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Targets;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn what_is_added_goes_into_the_bias_where_there_is_one() {
        let a = attached(&[chosen("beft", json!({}))], &[]);
        assert_eq!(names(&a), ["layers.0.attn.v.beft_bias", "layers.1.attn.v.beft_bias"]);
        assert_eq!(a.adapter.trained_count(), 2 * 4);
        stir(&a, 0.5);
        let c = a.adapter.params()[0].param.value();
        let x = sample(&[5, 6], 3);
        let expected = x.matmul_t(&frozen("layers.0.attn.v")).unwrap().add(&c).unwrap();
        close(&both_ways(&a, "layers.0.attn.v", &x).0, &expected, 1e-6);
        let refused = engraft_nn::merged_tensors(&toy().0, &a.adapter).err().unwrap().to_string();
        assert!(
            refused.contains("attn.v: a constant is added to its output, and the layer has no bias"),
            "{refused}"
        );

        let queries = [(chosen("beft", json!({})).0, Some(Targets::names(["attn.q"])))];
        let a = attached(&queries, &[]);
        close(&vector(&a, "layers.1.attn.q.bias"), &frozen("layers.1.attn.q.bias"), 0.0);
        stir(&a, 0.5);
        let c = a.adapter.params()[1].param.value().reshape([6]).unwrap();
        close(&vector(&a, "layers.1.attn.q.bias"), &frozen("layers.1.attn.q.bias").add(&c).unwrap(), 0.0);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("beft", json!({}))], &["head"]);
        survives_saving(&[chosen("beft", json!({ "init_weights": false }))], &[]);
        let (sites, info) = toy();
        let table = [(chosen("beft", json!({})).0, Some(Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err());
    }
}
