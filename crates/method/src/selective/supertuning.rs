//! Super-Tuning: the entries of a weight with the largest or smallest magnitude are trained, by what is added to them;
//! Supra adds a LoRA to that.
//!
//! W′ = W + S (+ α/r·B·A), S zero but at the ⌊(1 − sparsity)·size⌋ chosen entries, whose values start as zero; A starts as
//! Kaiming-uniform noise and B as zero, so W′ = W. The forward never forms W′: y = x·Wᵀ + x·Sᵀ (+ α/r·(drop(x)·Aᵀ)·Bᵀ), the
//! product with S over its entries alone.
//!
//! arXiv:2607.09287.
//!
//! `supertuning_values` [n] and `supertuning_indices` [n] (row · in + column, by magnitude, I32); with a rank
//! `supertuning_lora_A.weight` [r, in] and `supertuning_lora_B.weight` [out, r].

use std::sync::Arc;

use engraft_nn::{Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Pattern;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{flag, float, int};
use crate::shared::kept::Kept;
use crate::shared::{matrices, sizes, topk};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;

struct SuperTuning {
    sparsity: f64,
    /// The largest magnitudes rather than the smallest.
    top: bool,
    /// Rank and α of Supra.
    low_rank: Option<(usize, f64)>,
    dropout: f32,
    zeros: bool,
    save_places: bool,
}

static INFO: Info = Info {
    name: "supertuning",
    title: "Super-Tuning",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2607.09287",
    summary: "trains the entries with the largest magnitude; with a rank, a LoRA beside them (Supra)",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "SUPERTUNING",
    fields: &[
        float("sparsity", (0.0, 0.999_999_999), "0.99", "Share of the entries that stay as they are."),
        flag("select_top", "true", "Train the largest entries rather than the smallest."),
        int("rank", (1, RANK_MAX as i64), None, "Rank of a LoRA beside them (Supra); none if left out."),
        Field {
            name: "alpha",
            kind: FieldKind::Float { min: -1e9, max: 1e9 },
            default: None,
            doc: "Its α, twice the rank if left out.",
        },
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of its A while training."),
        flag("init_weights", "true", "Start as the base; otherwise values and B are drawn."),
        flag(
            "save_precomputed_indices",
            "true",
            "Put the chosen places into the adapter's file; without them they are found again in the base.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "alpha", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| read(r, ["r", "lora_alpha", "lora_dropout"]))
}

/// Recipes and files differ in some names.
fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3]) -> SuperTuning {
    let sparsity = r.float("sparsity", 0.99);
    if !(0.0..1.0).contains(&sparsity) {
        r.problem(format!("`sparsity`: expected a number from 0 to below 1, found {sparsity}"));
    }
    let (has_rank, has_alpha) = (r.value(rank).is_some(), r.value(alpha).is_some());
    let of = r.count(rank, 1, RANK_MAX);
    let alpha_of = r.float(alpha, 2.0 * of as f64);
    if has_alpha && !has_rank {
        r.problem(format!("`{alpha}` is there without `{rank}`, whose LoRA it would scale"));
    }
    SuperTuning {
        sparsity,
        top: r.flag("select_top", true),
        low_rank: has_rank.then_some((of, alpha_of)),
        dropout: r.dropout(dropout),
        zeros: r.flag("init_weights", true),
        save_places: r.flag("save_precomputed_indices", true),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(SuperTuning {
        sparsity: 0.9,
        top: true,
        low_rank: Some((2, 3.0)),
        dropout: 0.0,
        zeros: true,
        save_places: true,
    })
}

impl Method for SuperTuning {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.low_rank.map_or(0, |(rank, _)| rank))
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let Kind::Linear { out, inn, .. } = site.kind else {
                let message = "Super-Tuning changes linear layers; leave embeddings and convolutions out of the targets";
                return Err(Error::Site { path: site.path.clone(), message: message.into() });
            };
            let support = self.support(b, site, (out, inn))?;
            b.patch(site.id, Patch::Weight(Box::new(support)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "init_weights": self.zeros, "lora_alpha": self.low_rank.map(|(_, alpha)| number(alpha)),
            "lora_dropout": as_written(self.dropout), "r": self.low_rank.map(|(rank, _)| rank),
            "save_precomputed_indices": self.save_places, "select_top": self.top, "sparsity": number(self.sparsity),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl SuperTuning {
    fn support(&self, b: &mut Builder<'_>, site: &Site, (out, inn): (usize, usize)) -> Result<Support> {
        let count = ((out * inn) as f64 * (1.0 - self.sparsity)) as usize;
        if count == 0 || out * inn > i32::MAX as usize {
            let message = format!(
                "`sparsity` {} leaves none of its {} entries to train; lower it",
                self.sparsity,
                out * inn
            );
            return Err(Error::Site { path: site.path.clone(), message });
        }
        let name = |end: &str| format!("{}.supertuning_{end}", site.path);
        let start = if self.zeros { Init::Zeros } else { Init::Normal(1.0) };
        let values = b.param(&name("values"), &[count], start)?;
        let places = Init::Values(Tensor::from_i32(self.places(site, count)?, [count])?);
        let places = match self.save_places {
            true => b.fixed(&name("indices"), &[count], places)?,
            false => b.state(&name("indices"), &[count], places)?,
        };
        let low_rank = match self.low_rank {
            None => None,
            Some((rank, alpha)) => {
                let up = if self.zeros { Init::Zeros } else { Init::kaiming(rank) };
                let down = b.param(&name("lora_A.weight"), &[rank, inn], Init::kaiming(inn))?;
                Some((down, b.param(&name("lora_B.weight"), &[out, rank], up)?, (alpha / rank as f64) as f32))
            }
        };
        Ok(Support {
            values,
            places,
            shape: (out, inn),
            low_rank,
            dropout: self.dropout,
            ordered: Kept::new(),
        })
    }

    /// The flat places of the `count` largest or smallest magnitudes, in the order in which PyTorch finds them: a file may leave
    /// them out.
    fn places(&self, site: &Site, count: usize) -> Result<Vec<i32>> {
        let weight = matrices::frozen(site)?.to_vec()?;
        let places = topk::top(weight.iter().map(|w| w.abs()), count, self.top);
        Ok(places.into_iter().map(|place| place as i32).collect())
    }
}

/// S as a sparse matrix, and the order of the values in which their places ascend.
type Ordered = (Arc<Pattern>, Tensor);

/// W + S, and a LoRA.
struct Support {
    values: Param,
    places: Param,
    shape: (usize, usize),
    /// A, B and their scale.
    low_rank: Option<(Param, Param, f32)>,
    dropout: f32,
    ordered: Kept<Ordered>,
}

impl Support {
    /// The values in ascending places, and these.
    fn sparse(&self) -> Result<(Tensor, Arc<Pattern>)> {
        let (pattern, order) = self.ordered.read(&self.places, |places| ordered(places, self.shape))?;
        let values = self.values.get();
        let count = values.len();
        Ok((values.reshape([count, 1])?.gather(&order)?.reshape([count])?, pattern))
    }
}

fn ordered(places: &Tensor, shape: (usize, usize)) -> Result<Ordered> {
    let flat = places.to_i64()?;
    let size = (shape.0 * shape.1) as i64;
    let mut order: Vec<i64> = (0..flat.len() as i64).collect();
    order.sort_unstable_by_key(|&i| flat[i as usize]);
    let ascending: Vec<i64> = order.iter().map(|&i| flat[i as usize]).collect();
    if ascending.iter().any(|p| !(0..size).contains(p)) || ascending.windows(2).any(|pair| pair[0] == pair[1])
    {
        let message = "`supertuning_indices`: a place lies outside the weight, or is there twice";
        return Err(Error::Unsupported(message.into()));
    }
    let pattern = Pattern::new(ascending.into_iter().map(|p| p as u64), shape, 0)?;
    Ok((Arc::new(pattern), Tensor::from_i64(order, [flat.len()])?))
}

impl WeightPatch for Support {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (values, pattern) = self.sparse()?;
        let w = base.dense()?.scatter_sparse(&values, &pattern)?;
        match &self.low_rank {
            Some((a, b, scale)) => Ok(w.add(&b.get().matmul(&a.get())?.scale(*scale)?)?),
            None => Ok(w),
        }
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let (values, pattern) = self.sparse()?;
        let y = base.forward(x)?.add_sparse(x, &values, &pattern)?;
        match &self.low_rank {
            Some((a, b, scale)) => {
                let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
                Ok(y.add_low_rank(&dropped, &a.get(), &b.get(), *scale)?)
            }
            None => Ok(y),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn the_largest_entries_are_trained_and_the_others_stay() {
        let w = frozen("layers.0.attn.v").to_vec().unwrap();
        let mut by_size: Vec<i64> = (0..24).collect();
        by_size.sort_by(|&a, &b| w[b as usize].abs().total_cmp(&w[a as usize].abs()));
        for (top, expected) in [(true, by_size.clone()), (false, by_size.iter().rev().copied().collect())] {
            let a = attached(&[chosen("supertuning", json!({ "sparsity": 0.7, "select_top": top }))], &[]);
            // ⌊0.3·36⌋ and ⌊0.3·24⌋ in each of two layers.
            assert_eq!(a.adapter.trained_count(), 2 * (10 + 7));
            let places = value_of(&a, "layers.0.attn.v.supertuning_indices").to_i64().unwrap();
            assert_eq!(places, expected[..7]);
            stir(&a, 0.5);
            let changed = merged(&a, "layers.0.attn.v").to_vec().unwrap();
            let moved: Vec<i64> = (0..24).filter(|&i| changed[i as usize] != w[i as usize]).collect();
            assert!(!moved.is_empty() && moved.iter().all(|i| expected[..7].contains(i)), "{moved:?}");
        }
    }

    #[test]
    fn supra_adds_a_low_rank_product() {
        let settings = json!({ "sparsity": 0.5, "rank": 2, "alpha": 3.0 });
        let a = attached(&[chosen("supertuning", settings)], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (18 + 2 * 12 + 12 + 2 * 10));
        let x = sample(&[5, 6], 3);
        close(
            &both_ways(&a, "layers.0.attn.q", &x).0,
            &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
            1e-6,
        );
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
        close(&fast, &defined, 1e-5);
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({ "sparsity": 0.5 }),
            json!({ "sparsity": 0.5, "rank": 2, "dropout": 0.1, "init_weights": false }),
            json!({ "sparsity": 0.8, "select_top": false, "save_precomputed_indices": false }),
        ] {
            survives_saving(&[chosen("supertuning", settings)], &["head"]);
        }
        let written = config(&[chosen("supertuning", json!({ "sparsity": 0.5, "rank": 3 }))], &[]);
        assert_eq!((&written["r"], written["lora_alpha"].as_f64()), (&json!(3), Some(6.0)));
        for bad in [json!({ "sparsity": 1.0 }), json!({ "r": null }), json!({ "r": 0 })] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
        let (sites, info) = toy();
        let none = [chosen("supertuning", json!({}))];
        let error = crate::attach(&none, &[], &sites, &info, 0).err().unwrap().to_string();
        assert!(error.contains("leaves none"), "{error}");
    }
}
