//! VB-LoRA: low-rank factors whose pieces are mixed from one bank of vectors that all layers share.
//!
//! W′ = W + B·A. Every piece of v numbers of a row of A or a column of B is Σ of the k bank vectors with the largest logits, by
//! the softmax of these. The bank starts uniform and small and the logits as normal noise, so that a new adapter changes the
//! model, slightly.
//!
//! Li, Han and Ji 2024, arXiv:2405.15179. As `peft` has it; with `save_only_topk_weights` the file holds, in place of the
//! logits, the places of the k largest and all but the last of their weights: enough to compute with, not to train on.
//!
//! vblora_logits_A [r, in/v, h], vblora_logits_B [out/v, r, h] a target, or vblora_logits_A_topk_indices [r, in/v, k] and
//! vblora_logits_A_topk_weights [r, in/v, k − 1], and so for B; vblora_vector_bank [h, v].

use engraft_nn::{Base, Builder, Error, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::sizes;
use crate::shared::{divisors, places};
use crate::{Described, Entry, Info, Loaded, Method, Named, Stored, peft};

const RANK_MAX: usize = 1 << 16;
const BANK_MAX: usize = 1 << 24;
const OF_TARGETS: &str = "vblora_only";
const BANK: &str = "vblora_vector_bank";

struct VbLora {
    rank: usize,
    vectors: usize,
    length: usize,
    top: usize,
    dropout: f32,
    bound: f64,
    deviation: f64,
    /// Whether the file is to hold the largest logits alone.
    only_top: bool,
    /// Whether it was read from such a file.
    read_top: bool,
    bias: Biases,
}

static INFO: Info = Info {
    name: "vblora",
    title: "VB-LoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2405.15179",
    summary: "W′ = W + B·A, whose pieces are mixed from one bank of vectors",
    mergeable: true,
    identity_at_init: false,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "VBLORA",
    fields: &[
        int("rank", (1, RANK_MAX as i64), Some("4"), "Inner size r of the product."),
        int("num_vectors", (1, BANK_MAX as i64), Some("256"), "Number h of vectors in the bank."),
        int(
            "vector_length",
            (1, BANK_MAX as i64),
            Some("256"),
            "Length v of the vectors, a divisor of the targets' inputs and outputs.",
        ),
        int("topk", (1, BANK_MAX as i64), Some("2"), "Number k of vectors that are mixed to a piece."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        float("init_vector_bank_bound", (0.0, 1e3), "0.02", "The bank starts uniform up to this."),
        float(
            "init_logits_std",
            (0.0, 1e3),
            "0.1",
            "Deviation of the normal noise that the logits start as.",
        ),
        flag(
            "save_only_topk_weights",
            "false",
            "Save the k largest logits of a piece alone: a small file that cannot be trained on.",
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
    peft::own_settings(&INFO, settings, |r| read(r, "rank", "dropout"))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let method = read(&mut r, "r", "vblora_dropout");
    r.finish()?;
    let method = VbLora { read_top: method.only_top, ..method };
    Ok(Some(Loaded { method: Box::new(method), targets, train_also }))
}

fn read(r: &mut Reader<'_>, rank: &'static str, dropout: &'static str) -> VbLora {
    let method = VbLora {
        rank: r.count(rank, 4, RANK_MAX),
        vectors: r.count("num_vectors", 256, BANK_MAX),
        length: r.count("vector_length", 256, BANK_MAX),
        top: r.count("topk", 2, BANK_MAX),
        dropout: r.dropout(dropout),
        bound: r.float("init_vector_bank_bound", 0.02),
        deviation: r.float("init_logits_std", 0.1),
        only_top: r.flag("save_only_topk_weights", false),
        read_top: false,
        bias: Biases::read(r, OF_TARGETS),
    };
    if method.top > method.vectors {
        r.problem(format!("`topk` is {}: the bank has `num_vectors` = {}", method.top, method.vectors));
    }
    method
}

fn example() -> Box<dyn Method> {
    Box::new(VbLora {
        rank: 2,
        vectors: 5,
        length: 2,
        top: 2,
        dropout: 0.0,
        bound: 0.5,
        deviation: 4.0,
        only_top: false,
        read_top: false,
        bias: Biases::None,
    })
}

impl Method for VbLora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.rank)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        let bank = b.param(BANK, &[self.vectors, self.length], Init::Uniform(self.bound as f32))?;
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            let v = self.length;
            if !out.is_multiple_of(v) || !inn.is_multiple_of(v) {
                let message = format!(
                    "[{out}, {inn}] cannot be cut into pieces of {v}; choose a `vector_length` that divides both, such as {}",
                    divisors::near(v, &[out, inn])
                );
                return places::unfit(site, message);
            }
            let down = self.pieces(b, &format!("{}.vblora_logits_A", site.path), [self.rank, inn / v])?;
            let up = self.pieces(b, &format!("{}.vblora_logits_B", site.path), [out / v, self.rank])?;
            let patch = Mixed { bank: bank.clone(), down, up, top: self.top, dropout: self.dropout };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn trains_on(&self) -> Result<()> {
        if !self.read_top {
            return Ok(());
        }
        let message = "this VB-LoRA was saved with `save_only_topk_weights`, which leaves nothing to train on; train from a file that holds the logits";
        Err(Error::Unsupported(message.into()))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "fan_in_fan_out": false, "init_logits_std": number(self.deviation),
            "init_vector_bank_bound": number(self.bound), "layers_pattern": null, "layers_to_transform": null,
            "num_vectors": self.vectors, "r": self.rank, "save_only_topk_weights": self.only_top, "topk": self.top,
            "vblora_dropout": as_written(self.dropout), "vector_length": self.length,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        if name == BANK { format!("base_model.{name}") } else { format!("base_model.model.{name}") }
    }

    /// Places in the bank have the smallest type that holds them.
    fn stored_as(&self, key: &str) -> Stored {
        match self.vectors {
            _ if !key.ends_with("_topk_indices") => Stored::F32,
            0..0x100 => Stored::U8,
            0x100..0x8000 => Stored::I16,
            _ => Stored::I32,
        }
    }

    fn file_tensors(&self, tensors: Named, _state: &Named) -> Result<Named> {
        if !self.only_top || self.read_top {
            return Ok(tensors);
        }
        let mut written = Named::new();
        for (name, value) in tensors {
            if !name.ends_with(".vblora_logits_A") && !name.ends_with(".vblora_logits_B") {
                written.push((name, value));
                continue;
            }
            let (largest, places) = value.top_k(self.top)?;
            let weights = largest.softmax()?;
            let all_but_last = weights.narrow(weights.shape().len() - 1, 0, self.top - 1)?;
            written.push((format!("{name}_topk_indices"), places.to_f32()));
            written.push((format!("{name}_topk_weights"), all_but_last));
        }
        Ok(written)
    }
}

impl VbLora {
    /// What says how the pieces called `name` are mixed.
    fn pieces(&self, b: &mut Builder<'_>, name: &str, [first, second]: [usize; 2]) -> Result<Pieces> {
        if !self.read_top {
            let shape = [first, second, self.vectors];
            return Ok(Pieces::Logits(b.param(name, &shape, Init::Normal(self.deviation as f32))?));
        }
        let shape = |last: usize| [first, second, last];
        Ok(Pieces::Largest {
            places: b.fixed(&format!("{name}_topk_indices"), &shape(self.top), Init::Zeros)?,
            weights: b.fixed(&format!("{name}_topk_weights"), &shape(self.top - 1), Init::Zeros)?,
        })
    }
}

/// How pieces are mixed.
enum Pieces {
    Logits(Param),
    Largest { places: Param, weights: Param },
}

impl Pieces {
    /// The pieces [.., .., v].
    fn mixed(&self, bank: &Tensor, top: usize) -> Result<Tensor> {
        let (weights, places, shape) = match self {
            Pieces::Logits(logits) => {
                let (largest, places) = logits.get().top_k(top)?;
                (largest.softmax()?, places, logits.value().shape().to_vec())
            }
            Pieces::Largest { places, weights } => {
                let places = places.value();
                let shape = places.shape().to_vec();
                let weights = weights.value();
                // The weights sum to one.
                let rest = weights.sum_dim(2)?.scale(-1.0)?.unary(Unary::Shift(1.0))?;
                (cat(&[&weights, &rest], 2)?, places.as_i64(), shape)
            }
        };
        let count = shape[0] * shape[1];
        let vectors = bank.gather(&places.reshape([count * top])?)?.reshape([count, top, bank.dim(1)])?;
        let mixed = vectors.mul(&weights.reshape([count, top, 1])?)?.sum_dim(1)?;
        Ok(mixed.reshape([shape[0], shape[1], bank.dim(1)])?)
    }
}

/// B·A of mixed pieces.
struct Mixed {
    bank: Param,
    down: Pieces,
    up: Pieces,
    top: usize,
    dropout: f32,
}

impl Mixed {
    /// A [r, in] and B [out, r].
    fn factors(&self) -> Result<[Tensor; 2]> {
        let bank = self.bank.get();
        let down = self.down.mixed(&bank, self.top)?; // [r, in/v, v]
        let up = self.up.mixed(&bank, self.top)?; // [out/v, r, v]
        let (rank, out) = (down.dim(0), up.dim(0) * up.dim(2));
        let inn = down.dim(1) * down.dim(2);
        Ok([down.reshape([rank, inn])?, up.permute(&[0, 2, 1])?.reshape([out, rank])?])
    }
}

impl WeightPatch for Mixed {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let [down, up] = self.factors()?;
        Ok(base.dense()?.add(&up.matmul(&down)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let [down, up] = self.factors()?;
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        Ok(base.forward(x)?.add_low_rank(&dropped, &down, &up, 1.0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attached;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    const SMALL: &str =
        r#"{ "rank": 3, "num_vectors": 5, "vector_length": 2, "init_vector_bank_bound": 0.8 }"#;

    fn small(changes: Value) -> Value {
        with(serde_json::from_str(SMALL).unwrap(), changes)
    }

    #[test]
    fn pieces_are_mixed_of_the_largest_logits() {
        let a = attached(&[chosen("vblora", small(json!({})))], &[]);
        assert_eq!(a.adapter.trained_count(), 5 * 2 + 2 * (3 * (6 + 6) + 3 * (6 + 4)) / 2 * 5);
        stir(&a, 0.6);
        let q = "layers.0.attn.q";
        let x = sample(&[4, 6], 3);
        let (fast, defined) = both_ways(&a, q, &x);
        close(&fast, &defined, 1e-5);
        let bank = value_of(&a, BANK).to_vec().unwrap();
        // A [3, 6] by hand.
        let logits = value_of(&a, &format!("{q}.vblora_logits_A")).to_vec().unwrap();
        let mut down = Vec::new();
        for piece in logits.chunks(5) {
            let mut order: Vec<usize> = (0..5).collect();
            order.sort_by(|&i, &j| piece[j].total_cmp(&piece[i]));
            let [first, second] = [piece[order[0]].exp(), piece[order[1]].exp()];
            let share = first / (first + second);
            down.extend(
                (0..2).map(|at| share * bank[order[0] * 2 + at] + (1.0 - share) * bank[order[1] * 2 + at]),
            );
        }
        let by_hand = Tensor::from_vec(down, [3, 6]).unwrap();
        let pieces = Pieces::Logits(Param::new(value_of(&a, &format!("{q}.vblora_logits_A"))));
        let found = pieces.mixed(&value_of(&a, BANK), 2).unwrap().reshape([3, 6]).unwrap();
        close(&found, &by_hand, 1e-5);
    }

    #[test]
    fn gradients_reach_the_chosen_vectors_alone() {
        let a = attached(&[chosen("vblora", small(json!({ "topk": 1, "num_vectors": 40 })))], &[]);
        let named = |name: &str| a.adapter.params().iter().find(|p| p.name == name).unwrap().param.clone();
        let q = "layers.0.attn.q";
        let y = both_ways(&a, q, &sample(&[4, 6], 3)).0;
        let g = y.backward_from(sample(&[4, 6], 4)).unwrap();
        let mut chosen = std::collections::BTreeSet::new();
        for factor in ["A", "B"] {
            let logits = named(&format!("{q}.vblora_logits_{factor}")).value().to_vec().unwrap();
            chosen.extend(logits.chunks(40).map(|p| (0..40).max_by(|&i, &j| p[i].total_cmp(&p[j])).unwrap()));
        }
        let bank = g.get(&named(BANK)).unwrap().to_vec().unwrap();
        let moved = (0..40).filter(|&i| bank[2 * i..2 * i + 2].iter().any(|v| *v != 0.0));
        assert_eq!(moved.collect::<Vec<_>>(), chosen.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn the_largest_logits_are_enough_to_compute_with() {
        let methods = [chosen("vblora", small(json!({ "save_only_topk_weights": true, "topk": 3 })))];
        let a = attached(&methods, &[]);
        stir(&a, 0.5);
        let (sites, info) = toy();
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert!(tensors.iter().all(|(name, _)| name.contains("_topk_") || name.ends_with(BANK)));
        let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
        assert!(loaded.methods[0].0.trains_on().is_err());
        let again = crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(again.0, config);
        let read = Attached {
            adapter: loaded.adapter,
            dead_targets: vec![],
            dead_modules: vec![],
            without_targets: vec![],
        };
        let x = sample(&[4, 6], 3);
        for path in ["layers.0.attn.q", "layers.1.attn.v"] {
            close(&both_ways(&read, path, &x).0, &both_ways(&a, path, &x).0, 1e-5);
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("vblora", small(json!({ "bias": "all", "dropout": 0.1 })))], &["head"]);
        let written = config(&[chosen("vblora", small(json!({})))], &[]);
        for bad in [json!({ "topk": 6 }), json!({ "bias": "some" }), json!({ "vector_length": 0 })] {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
        let (sites, info) = toy();
        let long = [chosen("vblora", small(json!({ "vector_length": 4 })))];
        assert!(crate::attach(&long, &[], &sites, &info, 0).is_err());
    }
}
