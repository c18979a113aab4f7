//! MoV: a mixture of (IA)³ vectors that every token weighs for itself.
//!
//! y′ = y ⊙ Σₑ pₑ·lₑ, p = softmax(R·y) over E experts; y are keys and values, each head of them for itself with one R for all
//! heads, and the inner activations of the MLP. The vectors start as ones and R normal with deviation 0.02, so that a new
//! adapter changes nothing. The vectors are mixed before they scale: the cost is that of one.
//!
//! Zadouri et al. 2023, arXiv:2309.05444, section 3; routing by heads is that of the authors' code.
//!
//! Of each module: mov_l [experts, n], n the width of what is scaled; mov_router.weight (R) [experts, width of a head], or
//! [experts, n] in the MLP.

use engraft_nn::{
    Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, Sites, Targets, Value as Frozen,
    WeightPatch,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::int;
use crate::{Described, Entry, Info, Loaded, Method, peft};

const EXPERTS_MAX: usize = 1024;

struct Mov {
    experts: usize,
}

static INFO: Info = Info {
    name: "mov",
    title: "MoV",
    class: "additive",
    sites: "weight",
    paper: "arXiv:2309.05444",
    summary: "keys, values and MLP activations times a mixture of learned vectors, weighed by every token",
    mergeable: false,
    identity_at_init: true,
    default_roles: Some(&[Role::K, Role::V, Role::CrossK, Role::CrossV, Role::Down]),
    peft_type: "ENGRAFT_MOV",
    fields: &[int("experts", (1, EXPERTS_MAX as i64), Some("30"), "Number E of vectors at each place.")],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn read(r: &mut Reader<'_>) -> Mov {
    Mov { experts: r.count("experts", 30, EXPERTS_MAX) }
}

fn example() -> Box<dyn Method> {
    Box::new(Mov { experts: 3 })
}

impl Method for Mov {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("2·experts·L·(kv + head_dim + f)")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let Kind::Linear { out, inn, .. } = site.kind else {
                let message =
                    "MoV scales what linear layers compute; leave this module out of the targets".into();
                return Err(Error::Site { path: site.path.clone(), message });
            };
            let (width, part) = match site.role {
                Role::K | Role::V | Role::CrossK | Role::CrossV => (out, b.info().head_dim),
                Role::Down => (inn, inn),
                _ => {
                    let message = "MoV scales keys, values and the inputs of an MLP's last matrix; choose among the roles \
                                   k, v, cross.k, cross.v and down"
                        .into();
                    return Err(Error::Site { path: site.path.clone(), message });
                }
            };
            let bias = match b.sites().bias_of(&site.path).map(|bias| &bias.value) {
                Some(Frozen::Vector(bias)) if site.role != Role::Down => Some(bias.clone()),
                _ => None,
            };
            let path = &site.path;
            let vectors = b.param(&format!("{path}.mov_l"), &[self.experts, width], Init::Ones)?;
            let router =
                b.param(&format!("{path}.mov_router.weight"), &[self.experts, part], Init::Normal(0.02))?;
            b.patch(site.id, Patch::Weight(Box::new(Mixed { vectors, router, bias })))?;
        }
        Ok(())
    }

    /// Where queries, keys and values are one matrix, the MLP alone.
    fn default_targets(&self, sites: &Sites) -> Option<Targets> {
        let roles = INFO.default_roles?;
        let has = |role: &Role| sites.iter().any(|s| s.role == *role);
        Some(Targets::roles(&roles.iter().copied().filter(has).collect::<Vec<_>>()))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "experts": self.experts, "layers_pattern": null, "layers_to_transform": null });
        own.as_object().cloned().unwrap_or_default()
    }
}

struct Mixed {
    vectors: Param,
    router: Param,
    /// The layer's bias, which is part of what is read and scaled.
    bias: Option<Tensor>,
}

impl Mixed {
    /// y ⊙ Σₑ pₑ·lₑ, y [tokens, width], in parts as wide as the router reads.
    fn scaled(&self, y: &Tensor) -> Result<Tensor> {
        let (vectors, router) = (self.vectors.get(), self.router.get());
        let (tokens, width, experts, part) = (y.rows(), y.width(), vectors.dim(0), router.width());
        if part == width {
            return Ok(y.mul(&y.matmul_t(&router)?.softmax()?.matmul(&vectors)?)?);
        }
        let heads = width / part;
        let shares = y.reshape([tokens * heads, part])?.matmul_t(&router)?.softmax()?;
        let shares = shares.reshape([tokens, heads, experts])?.permute(&[1, 0, 2])?;
        let of_heads = vectors.reshape([experts, heads, part])?.permute(&[1, 0, 2])?;
        let mixed = shares.matmul(&of_heads)?.permute(&[1, 0, 2])?.reshape([tokens, width])?;
        Ok(y.mul(&mixed)?)
    }
}

impl WeightPatch for Mixed {
    fn weight(&self, _base: &dyn Base) -> Result<Tensor> {
        let text = "a mixture of vectors depends on its input and cannot be folded into a weight; use it unmerged, or train ia3";
        Err(Error::Unsupported(text.into()))
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, _cx: &Pass) -> Result<Tensor> {
        if site.role == Role::Down {
            return base.forward(&self.scaled(x)?);
        }
        let y = base.forward(x)?;
        match &self.bias {
            None => self.scaled(&y),
            // The layer adds its bias to what is given here.
            Some(bias) => Ok(self.scaled(&y.add(bias)?)?.sub(bias)?),
        }
    }

    fn mergeable(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patched};
    use engraft_tensor::testing::{close, sample};

    fn output(a: &crate::Attached, path: &str, x: &Tensor) -> Tensor {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, path));
        let Frozen::Weight(weight) = &site.value else { panic!() };
        let cx = Pass::new(Layout::counted(&[x.dim(0)]).unwrap(), None);
        Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(x).unwrap()
    }

    #[test]
    fn every_head_weighs_its_vectors() {
        let a = attached(&[chosen("mov", json!({ "experts": 3 }))], &[]);
        // E·n + E·d of keys and values (4 wide, heads of 2), 2·E·f of the MLP (8 wide), in two layers.
        assert_eq!(a.adapter.trained_count(), 2 * (2 * 3 * (4 + 2) + 2 * 3 * 8));
        let (k, x) = ("layers.1.attn.k", sample(&[5, 6], 3));
        let plain = x.matmul_t(&frozen(k)).unwrap();
        close(&output(&a, k, &x), &plain, 1e-5);
        stir(&a, 0.5);
        let bias = frozen("layers.1.attn.k.bias");
        let y = plain.add(&bias).unwrap();
        let (l, r) = (value_of(&a, &format!("{k}.mov_l")), value_of(&a, &format!("{k}.mov_router.weight")));
        for head in 0..2 {
            let own = y.narrow(1, 2 * head, 2).unwrap();
            let shares = own.matmul_t(&r).unwrap().softmax().unwrap();
            let wanted = own.mul(&shares.matmul(&l.narrow(1, 2 * head, 2).unwrap()).unwrap()).unwrap();
            let found = output(&a, k, &x).add(&bias).unwrap().narrow(1, 2 * head, 2).unwrap();
            close(&found, &wanted, 1e-5);
        }
    }

    #[test]
    fn equal_experts_are_ia3() {
        let a = attached(&[chosen("mov", json!({ "experts": 4 }))], &[]);
        let ia3 = attached(&[chosen("ia3", json!({}))], &[]);
        stir(&a, 0.5);
        let down = "layers.0.mlp.down";
        let l = sample(&[1, 8], 5);
        let rows = Tensor::full(1.0, [4, 1]).mul(&l).unwrap();
        param(&a.adapter, &format!("{down}.mov_l")).set(rows).unwrap();
        param(&ia3.adapter, &format!("{down}.ia3_l")).set(l).unwrap();
        let x = sample(&[5, 8], 3);
        close(&output(&a, down, &x), &output(&ia3, down, &x), 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("mov", json!({ "experts": 2 }))], &["head"]);
        let (sites, info) = toy();
        let queries = [(chosen("mov", json!({})).0, Some(Targets::names(["attn.q"])))];
        let error = crate::attach(&queries, &[], &sites, &info, 0).err().unwrap().to_string();
        assert!(error.contains("choose among the roles"), "{error}");
        let a = attached(&[chosen("mov", json!({}))], &[]);
        assert!(engraft_nn::merged_tensors(&sites, &a.adapter).is_err());
        let written = config(&[chosen("mov", json!({}))], &[]);
        assert!(from_file(&with(written, json!({ "experts": 0 }))).is_err());
    }
}
