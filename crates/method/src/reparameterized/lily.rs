//! Lily: low-rank changes whose factors layers share, the right ones mixed by a router.
//!
//! y = x·Wᵀ + s·h·Σₑ p̄ₑ·Bₑ with h = x·Aᵀ and p̄ the mean of softmax(h·Rᵀ) over all rows of the pass. Layers of one kind (the same
//! target and shape) share all experts Bₑ, and `stride_A` neighbours share an A; each layer has a router R of its own. A and R
//! start as Kaiming-uniform noise, B as zero, so nothing changes.
//!
//! Zhong et al. 2024, arXiv:2407.09946, as in `peft`: the mean makes what a row gets depend on the rows beside it, in generation
//! on the tokens of one step. `peft` counts padding too; here there is none, so the two agree on rows of one length.
//!
//! `lily_A.weight` [rank, in], `lily_B.weight` [experts·rank, out], `lily_router.weight` [experts, rank]; a file has what is shared
//! once a layer.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use engraft_nn::{
    Adapter, Base, Builder, Init, Matcher, Pass, Patch, Resolution, Result, Role, Site, Sites, Targets,
    WeightPatch,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, number};
use crate::shared::fields::{flag, float, int};
use crate::shared::matrices;
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct Lily {
    rank: usize,
    stride: usize,
    experts: usize,
    scaling: f64,
    init_weights: bool,
    seen: Mutex<Seen>,
}

/// What the method learned while it was attached.
#[derive(Default)]
struct Seen {
    /// How its targets are written.
    targets: Option<Matcher>,
    /// The further layers whose tensor a name stands for, as names of the file.
    sharing: HashMap<String, Vec<String>>,
}

static INFO: Info = Info {
    name: "lily",
    title: "Lily",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2407.09946",
    summary: "low-rank changes with factors shared by layers, the right ones mixed by a router, whose mean in `peft` counts padding and here has none",
    mergeable: false,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "LILY",
    fields: &[
        int("rank", (1, 1024), Some("32"), "Inner size r of the products."),
        int("stride_A", (1, 1 << 16), Some("1"), "Neighbouring layers that share an A."),
        int("num_B", (2, 1024), Some("2"), "Experts B that all layers of one kind share."),
        float("scaling", (0.0, 1e9), "1", "Factor s on the change."),
        flag("init_weights", "true", "Start B as zero; otherwise B is drawn too."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, "rank"))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| read(r, "r"))
}

/// Recipes and files differ in one name.
fn read(r: &mut Reader<'_>, rank: &'static str) -> Lily {
    let lily = Lily {
        rank: r.count(rank, 32, 1 << 16),
        stride: r.count("stride_A", 1, 1 << 16),
        experts: r.count("num_B", 2, 1 << 10),
        scaling: r.float("scaling", 1.0),
        init_weights: r.flag("init_weights", true),
        seen: Mutex::default(),
    };
    if lily.experts < 2 {
        r.problem("`num_B` is 1, and a router needs at least 2 to choose between");
    }
    lily
}

fn example() -> Box<dyn Method> {
    Box::new(Lily {
        rank: 3,
        stride: 2,
        experts: 3,
        scaling: 1.5,
        init_weights: true,
        seen: Mutex::default(),
    })
}

impl Method for Lily {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    /// Layers of one kind are told apart by the targets that name them.
    fn resolve(&self, targets: &Targets, sites: &Sites) -> Result<Resolution> {
        self.seen().targets = Some(targets.matcher.clone());
        Ok(targets.resolve(sites)?)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        // (kind, shape) → the layers so far, the last A, the B.
        let mut kinds: Vec<(String, [usize; 2], Kind)> = Vec::new();
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            let (named, shape) = (self.kind_of(site), [out, inn]);
            let at = match kinds.iter().position(|(name, size, _)| *name == named && *size == shape) {
                Some(at) => at,
                None => {
                    kinds.push((named, shape, Kind::default()));
                    kinds.len() - 1
                }
            };
            let kind = &mut kinds[at].2;
            let (e, r) = (self.experts, self.rank);
            if kind.layers.is_multiple_of(self.stride) {
                kind.a = Some(self.shared(b, site, "A", &[r, inn], Init::kaiming(inn))?);
            } else {
                self.share(&kind.a, site, "A");
            }
            if kind.b.is_none() {
                let start = if self.init_weights { Init::Zeros } else { Init::kaiming(out) };
                kind.b = Some(self.shared(b, site, "B", &[e * r, out], start)?);
            } else {
                self.share(&kind.b, site, "B");
            }
            kind.layers += 1;
            let (Some((_, a)), Some((_, experts))) = (&kind.a, &kind.b) else { continue };
            let (a, experts, scaling) = (a.clone(), experts.clone(), self.scaling as f32);
            let router = b.param(&format!("{}.lily_router.weight", site.path), &[e, r], Init::kaiming(r))?;
            b.patch(site.id, Patch::Weight(Box::new(Mixed { a, experts, router, scaling })))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "init_weights": self.init_weights, "layers_pattern": null, "layers_to_transform": null, "num_B": self.experts,
            "r": self.rank, "scaling": number(self.scaling), "stride_A": self.stride,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_copies(&self, name: &str, _adapter: &Adapter) -> Vec<String> {
        self.seen().sharing.get(name).cloned().unwrap_or_default()
    }
}

/// What the layers of one kind share so far, by name.
#[derive(Default)]
struct Kind {
    layers: usize,
    a: Option<(String, Param)>,
    b: Option<(String, Param)>,
}

impl Lily {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The target that names a layer; `peft` has one kind for all that a pattern matches.
    fn kind_of(&self, site: &Site) -> String {
        match &self.seen().targets {
            Some(Matcher::Regex(pattern)) => pattern.clone(),
            Some(Matcher::Names(names)) => {
                let hit = |name: &&String| site.path.ends_with(name.as_str());
                names.iter().filter(hit).max_by_key(|name| name.len()).cloned().unwrap_or_default()
            }
            _ => site.module().to_string(),
        }
    }

    fn shared(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        factor: &str,
        shape: &[usize],
        start: Init,
    ) -> Result<(String, Param)> {
        let name = format!("{}.lily_{factor}.weight", site.path);
        self.seen().sharing.insert(name.clone(), Vec::new());
        let param = b.param(&name, shape, start)?;
        Ok((name, param))
    }

    /// Notes that the layer at `site` has a factor of another one.
    fn share(&self, first: &Option<(String, Param)>, site: &Site, factor: &str) {
        if let Some((name, _)) = first {
            let copy = self.file_name(&format!("{}.lily_{factor}.weight", site.path));
            self.seen().sharing.entry(name.clone()).or_default().push(copy);
        }
    }
}

struct Mixed {
    a: Param,
    experts: Param,
    router: Param,
    scaling: f32,
}

impl WeightPatch for Mixed {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let (experts, router) = (self.experts.get(), self.router.get());
        let (count, rank, out) = (router.dim(0), router.dim(1), experts.dim(1));
        let h = x.matmul_t(&self.a.get())?;
        let shares =
            h.matmul_t(&router)?.softmax()?.sum_to(&[1, count])?.scale(1.0 / x.rows().max(1) as f32)?;
        let mixed = shares.matmul(&experts.reshape([count, rank * out])?)?.reshape([rank, out])?;
        Ok(base.forward(x)?.plus(&h.matmul(&mixed)?.scale(self.scaling)?)?)
    }

    fn mergeable(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    fn values(a: &crate::Attached, name: &str) -> Tensor {
        a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value()
    }

    #[test]
    fn layers_share_factors_and_route_by_the_mean() {
        let methods = [chosen("lily", json!({ "rank": 2, "stride_A": 2, "num_B": 3, "scaling": 0.5 }))];
        let a = attached(&methods, &[]);
        // One A and one B a kind, a router a layer.
        assert_eq!(a.adapter.trained_count(), 2 * 6 + 6 * 6 + 2 * 6 + 6 * 4 + 4 * 6);
        let apart = attached(&[chosen("lily", json!({ "rank": 2 }))], &[]);
        assert_eq!(apart.adapter.trained_count(), 2 * 2 * 6 + 4 * 6 + 2 * 2 * 6 + 4 * 4 + 4 * 4);
        let x = sample(&[5, 6], 3);
        close(
            &both_ways(&a, "layers.1.attn.q", &x).0,
            &x.matmul_t(&frozen("layers.1.attn.q")).unwrap(),
            1e-6,
        );
        stir(&a, 0.5);
        let h = x.matmul_t(&values(&a, "layers.0.attn.q.lily_A.weight")).unwrap();
        let logits = h.matmul_t(&values(&a, "layers.1.attn.q.lily_router.weight")).unwrap();
        let shares = logits.softmax().unwrap().to_vec().unwrap();
        let experts = values(&a, "layers.0.attn.q.lily_B.weight");
        let mut expected = x.matmul_t(&frozen("layers.1.attn.q")).unwrap();
        for expert in 0..3 {
            let share = shares.iter().skip(expert).step_by(3).sum::<f32>() / 5.0;
            let part = h.matmul(&experts.rows_between(2 * expert, 2 * expert + 2).unwrap()).unwrap();
            expected = expected.add(&part.scale(0.5 * share).unwrap()).unwrap();
        }
        close(&both_ways(&a, "layers.1.attn.q", &x).0, &expected, 1e-5);
    }

    #[test]
    fn a_file_has_what_is_shared_once_a_layer() {
        let methods = [chosen("lily", json!({ "rank": 2, "stride_A": 2 }))];
        let a = attached(&methods, &[]);
        stir(&a, 0.5);
        let (sites, info) = toy();
        let (config, mut tensors) =
            crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(tensors.len(), 4 * 3);
        let at = tensors.iter().position(|(key, _)| key.ends_with("layers.1.attn.q.lily_A.weight")).unwrap();
        tensors[at].1 = tensors[at].1.scale(2.0).unwrap();
        let error = crate::load_adapter(&config, tensors, &sites, &info).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("layers.1.attn.q.lily_A.weight: expected the values of"), "{error}");
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "rank": 3, "stride_A": 2, "num_B": 3, "scaling": 0.5, "init_weights": false }),
        ] {
            survives_saving(&[chosen("lily", settings)], &["head"]);
        }
        let pattern = Matcher::Regex(r".*attn\.(q|v)".into());
        survives_saving(&[(chosen("lily", json!({ "rank": 2 })).0, Some(pattern.into()))], &[]);
        let one = json!({ "num_B": 1 });
        assert!(from_settings(one.as_object().unwrap()).is_err());
    }
}
