//! RandLoRA: random matrices that all layers share, combined by trained scales to a change of full rank.
//!
//! ΔW = s·Σ over N = ⌈min(out, in)/r⌉ random products of rank r, s = α/r. All share A [r, 1, min]; A is scaled by λ along r and
//! by γ along min, which are trained; B [max, N, r] is fixed. The side of A is the smaller one of out and in. λ starts as zero
//! and γ as a constant, so W′ = W. The forward multiplies by the two flat factors one after the other.
//!
//! Albert et al. 2025, arXiv:2502.00987. As `peft` has it, its order of factors included: λ and γ make A flat as [r·N, min],
//! and B is flat as [max, N·r]. A and B are Kaiming-uniform draws of PyTorch's generator in bf16 divided by their deviation,
//! or ternary with `sparse` and `very_sparse`; without `save_projection` the file holds their seed alone.
//!
//! randlora_lambda (λ) [r, N], randlora_gamma (γ) [N, min] a target; randlora_A [r, 1, least] and randlora_B [most, N, r],
//! also under the name of every target.

use engraft_nn::{Adapter, Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::places;
use crate::shared::projection::largest;
use crate::shared::sizes;
use crate::shared::torch_random::{Generator, Seed};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
const OF_TARGETS: &str = "randlora_only";
const SHARED: [&str; 2] = ["randlora_A", "randlora_B"];

struct RandLora {
    rank: usize,
    alpha: f64,
    dropout: f32,
    seed: Seed,
    save_projection: bool,
    bases: Bases,
    /// `sparse` of a file beside `very_sparse`, which goes before it.
    sparse_too: bool,
    /// Whether λ starts random: the adapter then changes the model from the start.
    random: bool,
    bias: Biases,
}

/// What A and B hold.
#[derive(Clone, Copy, PartialEq)]
enum Bases {
    Uniform,
    Sparse,
    VerySparse,
}

static INFO: Info = Info {
    name: "randlora",
    title: "RandLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2502.00987",
    summary: "W′ = W + s·Σ Bⱼ·Λⱼ·A·Γⱼ, with shared random A and B and trained scales: full rank",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "RANDLORA",
    fields: &[
        int(
            "rank",
            (1, RANK_MAX as i64),
            Some("32"),
            "Rank r of one random product; smaller ones train more numbers.",
        ),
        float("alpha", (0.0, 1e9), "640", "The change is scaled by alpha/rank."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of the change while training."),
        int(
            "projection_prng_key",
            (0, u32::MAX as i64),
            Some("0"),
            "Seed of A and B, as PyTorch draws from it.",
        ),
        flag(
            "save_projection",
            "true",
            "Put A and B into the adapter's file; without them it holds their seed alone.",
        ),
        choice(
            "bases",
            &["uniform", "sparse", "very_sparse"],
            "\"uniform\"",
            "What A and B hold: uniform noise, or -1, 0 and 1 with a third or 1/√min of them not zero.",
        ),
        choice(
            "bias",
            &["none", "all", OF_TARGETS],
            "\"none\"",
            "Which biases of the model are trained too.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let kinds = [("uniform", Bases::Uniform), ("sparse", Bases::Sparse), ("very_sparse", Bases::VerySparse)];
    let bases = r.one_of("bases", &kinds);
    let method = RandLora { bases, ..read(&mut r, ["rank", "alpha", "dropout"]) };
    r.finish()?;
    Ok(Box::new(method))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let (very, sparse) = (r.flag("very_sparse", false), r.flag("sparse", false));
    let bases = match (very, sparse) {
        (true, _) => Bases::VerySparse,
        (false, true) => Bases::Sparse,
        (false, false) => Bases::Uniform,
    };
    let random = !r.flag("init_weights", true);
    let method = RandLora {
        bases,
        sparse_too: very && sparse,
        random,
        ..read(&mut r, ["r", "randlora_alpha", "randlora_dropout"])
    };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn read(r: &mut Reader<'_>, [rank, alpha, dropout]: [&'static str; 3]) -> RandLora {
    RandLora {
        rank: r.count(rank, 32, RANK_MAX),
        alpha: r.float(alpha, 640.0),
        dropout: r.dropout(dropout),
        seed: r.torch_seed("projection_prng_key", 0),
        save_projection: r.flag("save_projection", true),
        bases: Bases::Uniform,
        sparse_too: false,
        random: false,
        bias: Biases::read(r, OF_TARGETS),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(RandLora {
        rank: 6,
        alpha: 12.0,
        dropout: 0.0,
        seed: Seed::of(1),
        save_projection: true,
        bases: Bases::Uniform,
        sparse_too: false,
        random: false,
        bias: Biases::None,
    })
}

impl Method for RandLora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            places::linear(site, INFO.title)?;
        }
        let drawn = self.projections(largest(b.targets()))?;
        let mut shared = Vec::new();
        for (name, values) in SHARED.into_iter().zip(drawn) {
            let shape = values.shape().to_vec();
            shared.push(match self.save_projection {
                true => b.fixed(name, &shape, Init::Values(values))?,
                false => Param::frozen(values),
            });
        }
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            let (least, most) = (out.min(inn), out.max(inn));
            let count = least.div_ceil(self.rank);
            let (init_lambda, gamma) = match self.random {
                false => (Init::Zeros, 1.0 / count.max(least) as f32),
                true => (Init::Normal(1.0), 1.0 / most as f32),
            };
            let gamma = Init::Values(Tensor::full(gamma, [count, least]));
            let patch = Combined {
                lambda: b.param(
                    &format!("{}.randlora_lambda", site.path),
                    &[self.rank, count],
                    init_lambda,
                )?,
                gamma: b.param(&format!("{}.randlora_gamma", site.path), &[count, least], gamma)?,
                down: shared[0].clone(),
                up: shared[1].clone(),
                sizes: (out, inn),
                scale: (self.alpha / self.rank as f64) as f32,
                dropout: self.dropout,
            };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "fan_in_fan_out": false, "init_weights": !self.random,
            "layers_pattern": null, "layers_to_transform": null, "projection_prng_key": self.seed.written(), "r": self.rank,
            "randlora_alpha": number(self.alpha), "randlora_dropout": as_written(self.dropout),
            "save_projection": self.save_projection, "sparse": self.sparse_too || self.bases == Bases::Sparse,
            "very_sparse": self.bases == Bases::VerySparse,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        let whole = SHARED.contains(&name);
        if whole { format!("base_model.{name}") } else { format!("base_model.model.{name}") }
    }

    /// `peft` writes the shared matrices once more for every target.
    fn file_copies(&self, name: &str, adapter: &Adapter) -> Vec<String> {
        let alone = adapter.params().iter().any(|p| p.name == name);
        if !SHARED.contains(&name) || !alone {
            return Vec::new();
        }
        let targets = adapter.params().iter().filter_map(|p| p.name.strip_suffix(".randlora_lambda"));
        targets.map(|path| format!("base_model.model.{path}.{name}")).collect()
    }
}

impl RandLora {
    /// A and B for targets of up to (out, in).
    fn projections(&self, (out, inn): (usize, usize)) -> Result<[Tensor; 2]> {
        let (least, most, rank) = (out.min(inn), out.max(inn), self.rank);
        let count = least.div_ceil(rank);
        let mut generator = Generator::new(self.seed);
        let (a, b) = match self.bases {
            Bases::Uniform => {
                let mut half = |fan_in: usize, count: usize| -> Vec<f32> {
                    let bound = 1.0 / (fan_in as f64).sqrt();
                    let most = bf16(bound as f32);
                    // PyTorch's ranges are open above: what is rounded to the upper bound becomes the lower one.
                    let rounded = generator.within(bound, count).into_iter().map(bf16);
                    rounded.map(|v| if v == most { -most } else { v }).collect()
                };
                let a = half(least, rank * least);
                let each: Vec<Vec<f32>> = (0..count).map(|_| half(rank, most * rank)).collect();
                let row =
                    |o: usize| each.iter().flat_map(move |base| &base[o * rank..(o + 1) * rank]).copied();
                let b: Vec<f32> = (0..most).flat_map(row).collect();
                let divided = |values: Vec<f32>| -> Vec<f32> {
                    let by = bf16(deviation(&values));
                    values.into_iter().map(|v| bf16(v / by)).collect()
                };
                (divided(a), divided(b))
            }
            bases => {
                let sparsity = if bases == Bases::Sparse { 3.0 } else { (least as f64).sqrt() };
                let share = 1.0 / (2.0 * sparsity);
                let mut ternary = |count: usize| -> Vec<f32> {
                    let sign = |u: f32| match u {
                        u if u < share as f32 => -1.0,
                        u if u > (1.0 - share) as f32 => 1.0,
                        _ => 0.0,
                    };
                    let values: Vec<f32> = (0..count).map(|_| sign(generator.uniform(0.0, 1.0))).collect();
                    let by = deviation(&values);
                    values.into_iter().map(|v| v / by).collect()
                };
                (ternary(rank * least), ternary(most * count * rank))
            }
        };
        Ok([Tensor::from_vec(a, [rank, 1, least])?, Tensor::from_vec(b, [most, count, rank])?])
    }
}

/// The deviation of a sample.
fn deviation(values: &[f32]) -> f32 {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let squares: f64 = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
    (squares / (n - 1.0)).sqrt() as f32
}

/// The nearest number of bf16, of two as near the even one.
fn bf16(v: f32) -> f32 {
    let bits = v.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// s·(random products under λ and γ).
struct Combined {
    lambda: Param,
    gamma: Param,
    down: Param,
    up: Param,
    sizes: (usize, usize),
    scale: f32,
    dropout: f32,
}

impl Combined {
    /// Two factors [N·r, in] and [out, N·r], whose product is ΔW/s.
    fn factors(&self) -> Result<[Tensor; 2]> {
        let (out, inn) = self.sizes;
        let (least, most) = (out.min(inn), out.max(inn));
        let (lambda, gamma) = (self.lambda.get(), self.gamma.get());
        let (rank, count) = (lambda.dim(0), lambda.dim(1));
        let down = self.down.get().narrow(2, 0, least)?;
        let scaled = down.mul(&lambda.reshape([rank, count, 1])?)?.mul(&gamma.reshape([1, count, least])?)?;
        let scaled = scaled.reshape([rank * count, least])?;
        let up = self.up.get().narrow(0, 0, most)?.narrow(1, 0, count)?.reshape([most, count * rank])?;
        Ok(if least == inn { [scaled, up] } else { [up.t()?, scaled.t()?] })
    }
}

impl WeightPatch for Combined {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let [down, up] = self.factors()?;
        Ok(base.dense()?.add(&up.matmul(&down)?.scale(self.scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let [down, up] = self.factors()?;
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        Ok(base.forward(x)?.add_low_rank(&dropped, &down, &up, self.scale)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn trains_scales_of_shared_products_and_reaches_every_rank() {
        let a = attached(&[chosen("randlora", json!({ "rank": 4, "alpha": 8 }))], &[]);
        let find = |name: &str| a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value();
        // q is 6 by 6 in two products, v is 4 by 6 in one.
        assert_eq!(a.adapter.trained_count(), 2 * ((4 * 2 + 2 * 6) + (4 + 4)));
        assert_eq!(
            (find("randlora_A").shape(), find("randlora_B").shape()),
            (&[4, 1, 6][..], &[6, 2, 4][..])
        );
        let x = sample(&[5, 6], 3);
        for path in ["layers.0.attn.q", "layers.0.attn.v"] {
            close(&both_ways(&a, path, &x).0, &x.matmul_t(&frozen(path)).unwrap(), 1e-6);
        }
        stir(&a, 0.3);
        for (path, out) in [("layers.0.attn.q", 6), ("layers.0.attn.v", 4)] {
            let (fast, defined) = both_ways(&a, path, &x);
            close(&fast, &defined, 1e-5);
            let change = merged(&a, path).sub(&frozen(path)).unwrap().to_vec().unwrap();
            assert!(rank_of(change, out, 6) == out, "{path} is not of full rank");
        }
    }

    /// Rank of a small matrix, by elimination.
    fn rank_of(mut m: Vec<f32>, rows: usize, columns: usize) -> usize {
        let mut rank = 0;
        for c in 0..columns {
            let size = |r: usize| m[r * columns + c].abs();
            let Some(best) = (rank..rows).max_by(|&a, &b| size(a).total_cmp(&size(b))) else { break };
            if size(best) < 1e-4 {
                continue;
            }
            (0..columns).for_each(|k| m.swap(rank * columns + k, best * columns + k));
            for r in rank + 1..rows {
                let factor = m[r * columns + c] / m[rank * columns + c];
                (0..columns).for_each(|k| m[r * columns + k] -= factor * m[rank * columns + k]);
            }
            rank += 1;
        }
        rank
    }

    #[test]
    fn sparse_bases_hold_three_numbers() {
        for (bases, share) in [("sparse", 1.0 / 3.0), ("very_sparse", 1.0 / 8.0)] {
            let kind = if bases == "sparse" { Bases::Sparse } else { Bases::VerySparse };
            let empty = Map::new();
            let mut r = Reader::settings(&empty, INFO.fields);
            let drawn = RandLora { bases: kind, ..read(&mut r, ["rank", "alpha", "dropout"]) };
            let [_, b] = drawn.projections((64, 64)).unwrap();
            let values = b.to_vec().unwrap();
            let some = values.iter().filter(|v| **v != 0.0).count() as f64 / values.len() as f64;
            assert!((some - share).abs() < 0.03, "{some}");
            assert!((deviation(&values) - 1.0).abs() < 1e-5);
        }
        assert_eq!([bf16(1.001), bf16(-0.35), bf16(1.0 + 1.0 / 256.0)], [1.0, -0.349_609_38, 1.0]);
    }

    #[test]
    fn configurations() {
        survives_saving(
            &[chosen("randlora", json!({ "rank": 4, "bias": "all", "dropout": 0.1 }))],
            &["head"],
        );
        survives_saving(
            &[chosen("randlora", json!({ "rank": 3, "save_projection": false, "bases": "sparse" }))],
            &[],
        );
        let written = config(&[chosen("randlora", json!({ "rank": 4 }))], &[]);
        assert_eq!(written["randlora_alpha"], json!(640));
        assert!(from_file(&with(written.clone(), json!({ "r": 0 }))).is_err());
        assert!(from_file(&with(written, json!({ "bias": "some" }))).is_err());
    }
}
