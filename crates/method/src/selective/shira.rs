//! SHiRA: a sparse change of high rank.
//!
//! W′ = W + S; S has r·(in + out) values at fixed places, as many as LoRA of rank r, zeros at the start. Masks: drawn at
//! random; the diagonal with every f-th row and column; the entries with the largest |W|, |g| or |W·g|, g the gradient summed
//! over some batches before training.
//!
//! Bhardwaj et al. 2024, arXiv:2406.13175; random masks are drawn as `peft` draws them (`torch.randperm`), one after another
//! from the same seed in every matrix. `peft` has only these; it reads the others as they lie in the file. It refuses matrices
//! that a file stores as [in, out] (GPT-2's), which are masked here as [out, in].
//!
//! `shira_weight` `[k]`, `shira_indices` `I32` [2, k]: rows and columns.

use std::collections::BTreeSet;

use engraft_nn::{Adapter, Builder, Error, Kind, Result, Role};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{choice, int};
use crate::shared::scores::{Data, Score, choose};
use crate::shared::sparse::{Budget, Group, Mask, Places, shape};
use crate::shared::torch_random::{DEFAULT_SEED, Generator, Seed};
use crate::{Calibration, Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;

struct Shira {
    rank: usize,
    mask: Choice,
    random_seed: Option<Seed>,
    batches: usize,
    /// `init_weights` of a file, which says how the values started.
    zeros: bool,
}

/// How the places are chosen.
#[derive(Clone, Debug, PartialEq)]
enum Choice {
    Random,
    Structured,
    Scored(Score),
    /// By somebody's own function; the places are in the file.
    Custom(String),
}

const CHOICES: &[(&str, Choice)] = &[
    ("random", Choice::Random),
    ("struct", Choice::Structured),
    ("magnitude", Choice::Scored(Score::Largest)),
    ("gradient", Choice::Scored(Score::Gradient)),
    ("snip", Choice::Scored(Score::Saliency)),
];

static INFO: Info = Info {
    name: "shira",
    title: "SHiRA",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2406.13175",
    summary: "W′ = W + S with r·(in + out) values at fixed places",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "SHIRA",
    fields: &[
        int(
            "rank",
            (1, RANK_MAX as i64),
            Some("32"),
            "The rank of a LoRA that has as many values; it does not bound the rank of S.",
        ),
        choice(
            "mask",
            &["random", "struct", "magnitude", "gradient", "snip"],
            "\"random\"",
            "At random; diagonal, rows and columns; or the entries with the largest |W|, |g|, |W·g|.",
        ),
        int(
            "random_seed",
            (0, i64::MAX),
            None,
            "Seed of a random mask; PyTorch's default where it is left out.",
        ),
        int("batches", (1, 1 << 20), Some("16"), "Micro-batches that g is summed over."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn seed(r: &mut Reader<'_>) -> Option<Seed> {
    let given = r.value("random_seed").is_some();
    given.then(|| r.torch_seed("random_seed", 0))
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| {
        let names: Vec<(&str, usize)> = CHOICES.iter().enumerate().map(|(i, c)| (c.0, i)).collect();
        Shira {
            rank: r.count("rank", 32, RANK_MAX),
            mask: CHOICES[r.one_of("mask", &names)].1.clone(),
            random_seed: seed(r),
            batches: r.count("batches", 16, 1 << 20),
            zeros: true,
        }
    })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| {
        r.ignore(&["fan_in_fan_out"]);
        let name = r.text("mask_type").unwrap_or_else(|| "random".into());
        let known = CHOICES.iter().find(|c| c.0 == name).map(|c| c.1.clone());
        Shira {
            rank: r.count("r", 32, RANK_MAX),
            mask: known.unwrap_or(Choice::Custom(name)),
            random_seed: seed(r),
            batches: 16,
            zeros: r.flag("init_weights", true),
        }
    })
}

fn example() -> Box<dyn Method> {
    Box::new(Shira { rank: 2, mask: Choice::Random, random_seed: Some(Seed::of(3)), batches: 1, zeros: true })
}

impl Shira {
    fn mask(&self) -> Mask {
        Mask {
            values: "shira_weight",
            places: "shira_indices",
            budget: Budget::Rank(self.rank),
            form: Places::Pairs,
        }
    }

    fn random(&self, group: &Group<'_>) -> Result<Vec<u64>> {
        let (out, inn) = shape(group.sites[0].0)?;
        let mut places =
            Generator::new(self.random_seed.unwrap_or(DEFAULT_SEED)).permutation(out * inn, group.count);
        places.sort_unstable();
        Ok(places.into_iter().map(|place| place as u64).collect())
    }
}

/// The diagonal, then every f-th row and column in turn, until there are as many as the group has.
fn structured(group: &Group<'_>) -> Result<Vec<u64>> {
    let (out, inn) = shape(group.sites[0].0)?;
    let lines = group.count.div_ceil(out + inn);
    let diagonal = (0..out.min(inn)).map(|i| (i, i));
    let evenly = |line: usize, of: usize| line * of / lines.max(1);
    let crosses = (0..lines).flat_map(|line| {
        let (row, column) = (evenly(line, out), evenly(line, inn));
        (0..inn).map(move |c| (row, c)).chain((0..out).map(move |r| (r, column)))
    });
    // Where rows and columns cross, and where they meet the diagonal, places are left for what lies between them.
    let rest = (0..out).flat_map(|r| (0..inn).map(move |c| (r, c)));
    let mut places = BTreeSet::new();
    for (row, column) in diagonal.chain(crosses).chain(rest) {
        if places.len() == group.count {
            break;
        }
        places.insert((row * inn + column) as u64);
    }
    Ok(places.into_iter().collect())
}

impl Method for Shira {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        if let Some(site) = b.targets().iter().find(|site| !matches!(site.kind, Kind::Linear { .. })) {
            let message = "SHiRA changes linear layers; leave embeddings and convolutions out of the targets";
            return Err(Error::Site { path: site.path.clone(), message: message.into() });
        }
        match self.mask {
            Choice::Random => self.mask().attach_at(b, |group| self.random(group)),
            Choice::Structured => self.mask().attach_at(b, structured),
            Choice::Scored(_) | Choice::Custom(_) => self.mask().attach(b),
        }
    }

    fn prepare(&self, adapter: &std::sync::Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        match self.mask {
            Choice::Scored(score) => {
                choose(&self.mask(), adapter, base, score, Data::Batches(self.batches as u64))
            }
            _ => Ok(()),
        }
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let named = CHOICES.iter().find(|c| c.1 == self.mask).map(|c| c.0);
        let name = match &self.mask {
            Choice::Custom(name) => name.as_str(),
            _ => named.unwrap_or("random"),
        };
        let own = json!({ "fan_in_fan_out": false, "init_weights": self.zeros, "mask_type": name, "r": self.rank, "random_seed": self.random_seed.map(Seed::written) });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn has_as_many_values_as_lora_and_starts_as_the_base() {
        let a = attached(&[chosen("shira", json!({ "rank": 1 }))], &[]);
        assert_eq!(names(&a)[..2], ["layers.0.attn.q.shira_weight", "layers.0.attn.q.shira_indices"]);
        assert_eq!(a.adapter.trained_count(), 2 * (6 + 6 + 6 + 4));
        let x = sample(&[5, 6], 3);
        let plain = x.matmul_t(&frozen("layers.0.attn.q")).unwrap();
        close(&both_ways(&a, "layers.0.attn.q", &x).0, &plain, 1e-6);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
        close(&fast, &defined, 1e-6);
    }

    #[test]
    fn masks_are_those_that_were_asked_for() {
        let places = |settings: Value| {
            let a = attached(&[chosen("shira", settings)], &[]);
            param(&a.adapter, "layers.0.attn.v.shira_indices").value().to_i64().unwrap()
        };
        let seeded = |seed: u64| places(json!({ "rank": 1, "random_seed": seed }));
        assert_eq!(seeded(1), seeded(1));
        assert_ne!(seeded(1), seeded(2));
        let structured = places(json!({ "rank": 1, "mask": "struct" }));
        let (rows, columns) = structured.split_at(10);
        let has = |r: i64, c: i64| rows.iter().zip(columns).any(|(&a, &b)| (a, b) == (r, c));
        assert!((0..4).all(|i| has(i, i)) && (0..6).all(|i| has(0, i)), "{structured:?}");
        for (mask, score) in
            [("magnitude", Score::Largest), ("gradient", Score::Gradient), ("snip", Score::Saliency)]
        {
            let path = "layers.0.attn.v";
            let method = chosen("shira", json!({ "rank": 1, "mask": mask, "batches": 2 })).0;
            let (base, adapter) = prepared(method.as_ref(), &[path]);
            let (x, w) =
                (|n: u64| base.seen(base.sites().get(base.targets()[0]), n), frozen(path).to_vec().unwrap());
            let g = |n: u64| x(n).1.t_matmul(&x(n).0).unwrap();
            let g = g(0).add(&g(1)).unwrap().to_vec().unwrap();
            let of = |i: usize| match score {
                Score::Largest => w[i].abs(),
                Score::Gradient => g[i].abs(),
                _ => (w[i] * g[i]).abs(),
            };
            let mut order: Vec<usize> = (0..24).collect();
            order.sort_by(|&a, &b| of(b).total_cmp(&of(a)));
            order.truncate(10);
            order.sort_unstable();
            let expected: Vec<i64> =
                order.iter().map(|p| (p / 6) as i64).chain(order.iter().map(|p| (p % 6) as i64)).collect();
            assert_eq!(
                param(&adapter, &format!("{path}.shira_indices")).value().to_i64().unwrap(),
                expected,
                "{mask}"
            );
        }
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({ "rank": 1 }),
            json!({ "rank": 1, "mask": "snip" }),
            json!({ "rank": 2, "random_seed": 4 }),
        ] {
            survives_saving(&[chosen("shira", settings)], &["head"]);
        }
        let (sites, info) = toy();
        let written = config(&[chosen("shira", json!({ "rank": 1 }))], &[]);
        assert!(written.get("exclude_modules").is_none(), "peft's has none");
        let custom = with(written.clone(), json!({ "mask_type": "mine" }));
        assert!(from_file(&custom).unwrap().is_some());
        for bad in [json!({ "r": 0 }), json!({ "random_seed": "x" }), json!({ "mask_type": 3 })] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
        let large = [chosen("shira", json!({ "rank": 4 }))];
        assert!(crate::attach(&large, &[], &sites, &info, 0).is_err(), "more values than the matrix has");
        let table = [(chosen("shira", json!({ "rank": 1 })).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err());
    }

    #[test]
    fn two_matrices_of_one_shape_have_the_same_mask_as_in_peft() {
        let a = attached(&[chosen("shira", json!({ "rank": 2 }))], &[]);
        let of = |layer: usize| {
            param(&a.adapter, &format!("layers.{layer}.attn.q.shira_indices")).value().to_i64().unwrap()
        };
        assert_eq!(of(0), of(1));
    }
}
