//! MiSS (once Bone): one small block, repeated along the inputs of the weight.
//!
//! W′[o, i] = W[o, i] + D[i mod r, o], so y = x·Wᵀ + S(x)·D with S the sum of the x whose numbers are equal modulo r.
//! *mini*: D has few columns, repeated along the outputs too. *bat*: W is cut into r×r blocks and each becomes
//! W + W·Dₒ + Dₒ, with one Dₒ for each row of blocks; this depends on W and is formed. D starts as zero, so W′ = W.
//!
//! Kang and Yin 2024, arXiv:2409.15371. As `peft` has it.
//!
//! miss_block (D) [r, out], *mini* [r, mini_r], *bat* [out/r, r, r].

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, float, int};
use crate::shared::{divisors, places};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
const OF_TARGETS: &str = "MiSS_only";

struct Miss {
    rank: usize,
    mini_r: usize,
    dropout: f32,
    form: Form,
    bias: Biases,
}

/// Which of the three forms; `init_weights` in `peft`.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Plain,
    /// The plain one with random D: the adapter changes the model from the start.
    Random,
    Bat,
    Mini,
}

static INFO: Info = Info {
    name: "miss",
    title: "MiSS",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2409.15371",
    summary: "W′[o, i] = W[o, i] + D[i mod r, o]: one block shared along the inputs",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "MISS",
    fields: &[
        int("rank", (1, RANK_MAX as i64), Some("64"), "Rows r of the block."),
        choice(
            "form",
            &["plain", "bat", "mini"],
            "\"plain\"",
            "One block, blocks that multiply the weight too, or a block repeated along the outputs as well.",
        ),
        int("mini_r", (1, RANK_MAX as i64), Some("1"), "Columns of the block in the form mini."),
        float(
            "dropout",
            (0.0, 0.999),
            "0",
            "Dropout on the input of the block while training; the form bat has none.",
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
    let form = r.one_of("form", &[("plain", Form::Plain), ("bat", Form::Bat), ("mini", Form::Mini)]);
    let miss = Miss { form, ..read(&mut r, ("rank", "dropout")) };
    r.finish()?;
    Ok(Box::new(miss))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let form = match r.value("init_weights").cloned() {
        None | Some(Value::Bool(true)) => Form::Plain,
        Some(Value::Bool(false)) => Form::Random,
        Some(Value::String(s)) if s == "bat" => Form::Bat,
        Some(Value::String(s)) if s == "mini" => Form::Mini,
        Some(other) => {
            r.problem(format!("`init_weights`: expected true, false, \"bat\" or \"mini\", found {other}"));
            Form::Plain
        }
    };
    let miss = Miss { form, ..read(&mut r, ("r", "miss_dropout")) };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(miss), targets, train_also }))
}

fn read(r: &mut Reader<'_>, (rank, dropout): (&'static str, &'static str)) -> Miss {
    Miss {
        rank: r.count(rank, 64, RANK_MAX),
        mini_r: r.count("mini_r", 1, RANK_MAX),
        dropout: r.dropout(dropout),
        form: Form::Plain,
        bias: Biases::read(r, OF_TARGETS),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Miss { rank: 5, mini_r: 1, dropout: 0.0, form: Form::Plain, bias: Biases::None })
}

impl Method for Miss {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            let r = self.rank;
            if r > inn {
                return places::unfit(site, format!("has {inn} inputs; lower `rank` from {r}"));
            }
            if self.form == Form::Bat && !(out.is_multiple_of(r) && inn.is_multiple_of(r)) {
                let message = format!(
                    "[{out}, {inn}] cannot be cut into blocks of {r}; choose a `rank` that divides both, such as {}",
                    divisors::near(r, &[out, inn])
                );
                return places::unfit(site, message);
            }
            if self.form == Form::Mini && !out.is_multiple_of(self.mini_r) {
                let message = format!(
                    "{out} outputs cannot be shared by {}; choose a `mini_r` that divides them",
                    self.mini_r
                );
                return places::unfit(site, message);
            }
            let (shape, init) = match self.form {
                Form::Plain => (vec![r, out], Init::Zeros),
                Form::Random => (vec![r, out], Init::kaiming(out)),
                Form::Mini => (vec![r, self.mini_r], Init::Zeros),
                Form::Bat => (vec![out / r, r, r], Init::Zeros),
            };
            let block = b.param(&format!("{}.miss_block", site.path), &shape, init)?;
            let patch: Box<dyn WeightPatch> = match self.form {
                Form::Bat => Box::new(Bat(block)),
                _ => Box::new(Repeated { block, out, inn, dropout: self.dropout }),
            };
            b.patch(site.id, Patch::Weight(patch))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let form = match self.form {
            Form::Plain => json!(true),
            Form::Random => json!(false),
            Form::Bat => json!("bat"),
            Form::Mini => json!("mini"),
        };
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "init_weights": form, "layers_pattern": null,
            "layers_to_transform": null, "mini_r": self.mini_r, "miss_dropout": as_written(self.dropout),
            "r": self.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// D, repeated along the inputs, and along the outputs where it has fewer columns.
struct Repeated {
    block: Param,
    out: usize,
    inn: usize,
    dropout: f32,
}

impl Repeated {
    /// D [r, out].
    fn block(&self) -> Result<Tensor> {
        let block = self.block.get();
        let (r, columns) = (block.dim(0), block.dim(1));
        if columns == self.out {
            return Ok(block);
        }
        let repeats = Tensor::full(1.0, [1, self.out / columns, 1]);
        Ok(block.reshape([r, 1, columns])?.mul(&repeats)?.reshape([r, self.out])?)
    }
}

impl WeightPatch for Repeated {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let block = self.block()?;
        let index = (0..self.inn).map(|i| (i % block.dim(0)) as i64).collect();
        Ok(base.dense()?.add(&block.gather(&Tensor::from_i64(index, [self.inn])?)?.t()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?;
        let (rows, r) = (x.rows(), self.block.value().dim(0));
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        let missing = self.inn.next_multiple_of(r) - self.inn;
        let whole = match missing {
            0 => dropped,
            missing => cat(&[&dropped, &Tensor::zeros([rows, missing])], 1)?,
        };
        let sums = whole.reshape([rows, whole.width() / r, r])?.sum_dim(1)?.reshape([rows, r])?;
        Ok(y.plus(&sums.matmul(&self.block()?)?)?)
    }
}

/// Blocks [out/r, r, r]: each r×r block of W in a row of blocks becomes W + W·D + D.
struct Bat(Param);

impl WeightPatch for Bat {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (weight, blocks) = (base.dense()?, self.0.get());
        let (out, inn, r) = (weight.dim(0), weight.dim(1), blocks.dim(1));
        // All blocks of a row under each other: [out/r, in/r · r, r].
        let cut = weight.reshape([out / r, r, inn / r, r])?.permute(&[0, 2, 1, 3])?;
        let product = cut.reshape([out / r, inn, r])?.matmul(&blocks)?.reshape([out / r, inn / r, r, r])?;
        let change = product.add(&blocks.reshape([out / r, 1, r, r])?)?;
        Ok(weight.add(&change.permute(&[0, 2, 1, 3])?.reshape([out, inn])?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    /// W and W′ of a module, and D, after training has moved it.
    fn changed(settings: Value, path: &str) -> [Vec<f32>; 3] {
        let a = attached(&[chosen("miss", settings)], &[]);
        let width = frozen(path).dim(1);
        let x = sample(&[5, width], 3);
        close(&both_ways(&a, path, &x).0, &x.matmul_t(&frozen(path)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, path, &x);
        close(&fast, &defined, 1e-5);
        let block = value_of(&a, &format!("{path}.miss_block"));
        [frozen(path), merged(&a, path), block].map(|t| t.to_vec().unwrap())
    }

    #[test]
    fn the_change_repeats_along_the_inputs() {
        // Ranks that divide the 6 inputs and ranks that do not.
        for r in [2, 4, 6] {
            let a = attached(&[chosen("miss", json!({ "rank": r }))], &[]);
            assert_eq!(a.adapter.trained_count(), 2 * r * (6 + 4));
            let [before, after, block] = changed(json!({ "rank": r }), "layers.0.attn.q");
            for (at, (b, a)) in before.iter().zip(&after).enumerate() {
                assert!((a - b - block[at % 6 % r * 6 + at / 6]).abs() < 1e-6);
            }
        }
        let settings = json!({ "rank": 4, "form": "mini", "mini_r": 2 });
        let [before, after, block] = changed(settings, "layers.0.attn.v");
        for (at, (b, a)) in before.iter().zip(&after).enumerate() {
            assert!((a - b - block[at % 6 % 4 * 2 + at / 6 % 2]).abs() < 1e-6);
        }
    }

    #[test]
    fn bat_multiplies_blocks_of_the_weight() {
        let [before, after, blocks] = changed(json!({ "rank": 2, "form": "bat" }), "layers.0.attn.v");
        for o in 0..4 {
            for i in 0..6 {
                let d = |row: usize| blocks[(o / 2) * 4 + row * 2 + i % 2];
                let w = |column: usize| before[o * 6 + i / 2 * 2 + column];
                let expected = w(i % 2) + w(0) * d(0) + w(1) * d(1) + d(o % 2);
                assert!((after[o * 6 + i] - expected).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn configurations() {
        survives_saving(
            &[chosen("miss", json!({ "rank": 4, "dropout": 0.1, "bias": "MiSS_only" }))],
            &["head"],
        );
        survives_saving(&[chosen("miss", json!({ "rank": 2, "form": "bat" }))], &[]);
        survives_saving(&[chosen("miss", json!({ "rank": 3, "form": "mini", "mini_r": 2 }))], &[]);
        let written = config(&[chosen("miss", json!({ "rank": 2 }))], &[]);
        assert_eq!(written["init_weights"], json!(true));
        for bad in [json!({ "init_weights": "bone" }), json!({ "r": 0 }), json!({ "bias": "some" })] {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
        let (sites, info) = toy();
        for bad in [
            json!({ "rank": 7 }),
            json!({ "rank": 4, "form": "bat" }),
            json!({ "rank": 2, "form": "mini", "mini_r": 5 }),
        ] {
            assert!(crate::attach(&[chosen("miss", bad)], &[], &sites, &info, 0).is_err());
        }
    }
}
