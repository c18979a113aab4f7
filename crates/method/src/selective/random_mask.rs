//! Random masking: values at random places, trained alone.
//!
//! W′ = W + S; S has ⌊density·|W|⌋ values, zeros at the start, at places drawn from a seed and the matrix's path. The sparser
//! the mask, the larger the learning rate must be: about 1e-2 at a density of 1e-4.
//!
//! Xu and Zhang 2024, arXiv:2405.02596.
//!
//! `sparse_values` `[k]` of each target. The places are not saved: file and recipe hold the seed.

use engraft_nn::{Builder, Init, Patch, Result, Role};
use engraft_tensor::Param;
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{float, int};
use crate::shared::sparse::{Budget, Delta, Mask, drawn, shape};
use crate::{Described, Entry, Info, Method, peft};

struct RandomMask {
    density: f64,
    seed: u64,
}

static INFO: Info = Info {
    name: "random_mask",
    title: "Random masking",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2405.02596",
    summary: "W′ = W + S with values at random places",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_RANDOM_MASK",
    fields: &[
        float("density", (0.0, 1.0), "0.001", "Share of each matrix that is trained."),
        int("mask_seed", (0, i64::MAX), Some("0"), "What the places are drawn from, with the matrix's path."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, RandomMask::read),
    from_file: |config| peft::own_file(&INFO, config, RandomMask::read),
    example: || Box::new(RandomMask { density: 0.05, seed: 1 }),
};

impl RandomMask {
    fn read(r: &mut Reader<'_>) -> Self {
        let density = r.share("density", 0.001);
        let seed = r.value("mask_seed").and_then(Value::as_u64);
        RandomMask { density, seed: seed.unwrap_or(0) }
    }
}

impl Method for RandomMask {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let mask = Mask::own(Budget::Each(self.density));
        for group in mask.groups(&b.targets())? {
            let (site, first) = group.sites[0];
            let (out, inn) = shape(site)?;
            let key = Init::key(self.seed, &site.path);
            let places = mask.tensor(&group, &drawn(group.count, (out * inn) as u64, key))?;
            let name = format!("{}.sparse_values", site.path);
            let values = b.param(&name, &[group.count], engraft_nn::Init::Zeros)?;
            let delta = Delta::new(values, Param::frozen(places), (out, inn), first);
            b.patch(site.id, Patch::Weight(Box::new(delta)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "density": self.density, "mask_seed": self.seed });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn the_mask_follows_from_seed_and_path() {
        let changed = |seed: u64, path: &str| {
            let a = attached(&[chosen("random_mask", json!({ "density": 0.2, "mask_seed": seed }))], &[]);
            stir(&a, 0.5);
            let (sites, _) = toy();
            let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
            let value = &merged.iter().find(|m| m.site.path == path).unwrap().value;
            let moved = value.sub(&frozen(path)).unwrap().to_vec().unwrap();
            moved.iter().map(|v| *v != 0.0).collect::<Vec<_>>()
        };
        let q = changed(1, "layers.0.attn.q");
        assert_eq!(q.iter().filter(|v| **v).count(), 7, "⌊0.2·36⌋");
        assert_eq!(q, changed(1, "layers.0.attn.q"));
        assert_ne!(q, changed(2, "layers.0.attn.q"));
        assert_ne!(q, changed(1, "layers.1.attn.q"));
        let a = attached(&[chosen("random_mask", json!({ "density": 0.2 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (7 + 4));
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, "layers.0.attn.v", &sample(&[5, 6], 1));
        close(&fast, &defined, 1e-6);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("random_mask", json!({ "density": 0.1, "mask_seed": 3 }))], &["head"]);
        let written = config(&[chosen("random_mask", json!({}))], &[]);
        for bad in [json!({ "density": 0.0 }), json!({ "density": 1.5 }), json!({ "density": "x" })] {
            assert!((ENTRY.from_file)(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
