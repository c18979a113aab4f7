//! BOFT: inputs turned by a product of block-diagonal orthogonal matrices with shuffles between them, so that few numbers
//! make a dense rotation; outputs stretched.
//!
//! W′ = diag(s)·W·Rᵀ, y = s ⊙ ((x·R)·Wᵀ), R = B_m…B₂·B₁. Factor Bᵢ turns blocks of b inputs by (I − Q)(I + Q)⁻¹ with
//! Q = ½(P − Pᵀ); from the second one on a block holds halves of blocks that lie 2ⁱ⁻¹ apart, as in a butterfly. P starts as zero
//! and s as ones, so W′ = W. With one factor and s left out it is OFT. Rows are turned, never W.
//! `dropout` replaces blocks by the identity while training, on average a share p of those of one factor.
//!
//! Liu et al. 2023, arXiv:2311.06243.
//!
//! `boft_R` [factors, blocks, b, b], `boft_s` [out, 1]; [1, out] of a convolution, whose inputs are its windows.

use engraft_nn::{Base, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::kept::Kept;
use crate::shared::orthogonal::{self, Side};
use crate::shared::{divisors, matrices};
use crate::{Described, Entry, Info, Loaded, Method, Named, peft};

const SIZE_MAX: usize = 1 << 16;
/// What stands for the biases of the targets.
const OWN: &str = "boft_only";

struct Boft {
    /// Size of the blocks and their number; one of them is 0 and follows from the other.
    size: usize,
    count: usize,
    factors: usize,
    /// Those there are: where `peft` finds no compiler for its kernel, it makes one, whatever the configuration says.
    made: usize,
    dropout: f32,
    bias: Biases,
    init_weights: bool,
}

static INFO: Info = Info {
    name: "boft",
    title: "BOFT",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2311.06243",
    summary: "W′ = diag(s)·W·Rᵀ, R a butterfly of block-diagonal orthogonal factors",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "BOFT",
    fields: &[
        int(
            "block_size",
            (2, SIZE_MAX as i64),
            None,
            "Size b of the blocks, 4 unless `blocks` is given; must divide the inputs.",
        ),
        int("blocks", (1, SIZE_MAX as i64), None, "Number of blocks, instead of their size."),
        int(
            "butterfly_factors",
            (1, 16),
            Some("1"),
            "Number m of factors; with more than one, sizes and numbers of blocks must be even.",
        ),
        float(
            "dropout",
            (0.0, 0.999),
            "0",
            "Share of the blocks of a factor that is left out while training.",
        ),
        choice("bias", &["none", "all", OWN], "\"none\"", "Which biases of the model are trained too."),
        flag("init_weights", "true", "Start as the base; otherwise P and s are drawn."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let (size, count) = (r.whole("block_size", 0, SIZE_MAX), r.whole("blocks", 0, SIZE_MAX));
    let size = if size == 0 && count == 0 { 4 } else { size };
    let boft = read(&mut r, (size, count), ["butterfly_factors", "dropout"]);
    if size > 0 && count > 0 {
        r.problem("`block_size` and `blocks`: one follows from the other, so give one of them");
    }
    r.finish()?;
    Ok(Box::new(boft))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let (size, count) = (r.whole("boft_block_size", 4, SIZE_MAX), r.whole("boft_block_num", 0, SIZE_MAX));
    if (size == 0) == (count == 0) {
        r.problem(format!(
            "`boft_block_size` and `boft_block_num`: expected one of them to be 0, found {size} and {count}"
        ));
    }
    let boft = read(&mut r, (size, count), ["boft_n_butterfly_factor", "boft_dropout"]);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(boft), targets, train_also }))
}

/// Recipes and files differ in some names.
fn read(r: &mut Reader<'_>, (size, count): (usize, usize), [factors, dropout]: [&'static str; 2]) -> Boft {
    let factors = r.count(factors, 1, 16);
    Boft {
        size,
        count,
        factors,
        made: factors,
        dropout: r.dropout(dropout),
        bias: Biases::read(r, OWN),
        init_weights: r.flag("init_weights", true),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Boft {
        size: 2,
        count: 0,
        factors: 1,
        made: 1,
        dropout: 0.0,
        bias: Biases::None,
        init_weights: true,
    })
}

impl Method for Boft {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let (inn, scales) = match site.kind {
                Kind::Convolution { out, inn, .. } => (inn, [1, out]),
                _ => {
                    let (out, inn) = matrices::linear(site, INFO.title)?;
                    (inn, [out, 1])
                }
            };
            let (blocks, size) =
                self.cut(inn).map_err(|message| Error::Site { path: site.path.clone(), message })?;
            let name = |end: &str| format!("{}.boft_{end}", site.path);
            let (r, s) = match self.init_weights {
                true => (Init::Zeros, Init::Ones),
                false => {
                    let drawn = Init::Normal(0.1).tensor(&scales, b.seed(), &name("s"))?;
                    (Init::Normal(0.1), Init::Values(drawn.unary(Unary::Shift(1.0))?))
                }
            };
            let patch = Butterfly {
                r: b.param(&name("R"), &[self.made, blocks, size, size], r)?,
                s: b.param(&name("s"), &scales, s)?,
                dropout: self.dropout,
                kept: Kept::new(),
            };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn read_shapes(&mut self, tensors: &Named) {
        let rotations = tensors.iter().filter(|(key, t)| key.ends_with(".boft_R") && t.shape().len() == 4);
        if rotations.clone().count() > 0 && rotations.into_iter().all(|(_, t)| t.dim(0) == 1) {
            self.made = 1;
        }
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OWN), "boft_block_num": self.count, "boft_block_size": self.size,
            "boft_dropout": as_written(self.dropout), "boft_n_butterfly_factor": self.factors, "fan_in_fan_out": false,
            "init_weights": self.init_weights, "layers_pattern": null, "layers_to_transform": null,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Boft {
    /// Number and size of the blocks of `inn` inputs, or why they cannot be cut so.
    fn cut(&self, inn: usize) -> std::result::Result<(usize, usize), String> {
        let given = self.size.max(self.count);
        if given == 0 || !inn.is_multiple_of(given) {
            let what = if self.size > 0 { "block_size" } else { "blocks" };
            return Err(format!(
                "`{what}` is {given}, which does not divide its {inn} inputs; choose a number that does, such as {}",
                divisors::near(given, &[inn])
            ));
        }
        let (blocks, size) = if self.size > 0 { (inn / given, given) } else { (given, inn / given) };
        let groups = 1usize << (self.made - 1);
        if self.made > 1 && (!size.is_multiple_of(2) || !blocks.is_multiple_of(groups)) {
            return Err(format!(
                "{} butterfly factors need blocks of an even size, their number a multiple of {groups}; {inn} inputs are {blocks} \
                 blocks of {size}, so choose fewer factors or other blocks",
                self.made
            ));
        }
        Ok((blocks, size))
    }
}

struct Butterfly {
    r: Param,
    s: Param,
    dropout: f32,
    kept: Kept<Vec<Tensor>>,
}

impl Butterfly {
    /// The blocks of every factor, turned matrices [blocks, b, b], the first factor first.
    fn factors(&self) -> Result<Vec<Tensor>> {
        self.kept.of(&[&self.r], || self.rotations())
    }

    fn rotations(&self) -> Result<Vec<Tensor>> {
        let r = self.r.get();
        let [factors, blocks, size] = [r.dim(0), r.dim(1), r.dim(2)];
        let r = r.reshape([factors * blocks, size, size])?;
        let turned = orthogonal::cayley(&r.sub(&r.permute(&[0, 2, 1])?)?.scale(0.5)?)?;
        (0..factors).map(|i| Ok(turned.rows_between(i * blocks, (i + 1) * blocks)?)).collect()
    }
}

/// Rows x [rows, in] times factor `number` (from 0): its blocks hold the halves of blocks that lie 2^`number` apart.
fn turn(x: &Tensor, blocks: &Tensor, number: usize, side: Side) -> Result<Tensor> {
    if number == 0 {
        return orthogonal::turn_blocks(x, blocks, side);
    }
    let (rows, count, size) = (x.rows(), blocks.dim(0), blocks.width());
    let apart = 1 << number;
    // Place in the group: (which half of the group, block, place in half a block); a block's two halves come together.
    let shuffled = [rows, count / apart, 2, apart, size / 2];
    let pieces = x.reshape(shuffled)?.permute(&[1, 3, 0, 2, 4])?;
    let pieces = pieces.reshape([count, rows, size])?;
    let turned = match side {
        Side::Plain => pieces.matmul(blocks)?,
        Side::Transposed => pieces.matmul_t(blocks)?,
    };
    let turned = turned.reshape([count / apart, apart, rows, 2, size / 2])?;
    Ok(turned.permute(&[2, 0, 3, 1, 4])?.reshape(x.shape())?)
}

impl WeightPatch for Butterfly {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let mut w = base.dense()?;
        for (number, blocks) in self.factors()?.iter().enumerate() {
            w = turn(&w, blocks, number, Side::Transposed)?;
        }
        let s = self.s.get();
        Ok(w.mul(&s.reshape([s.len(), 1])?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let (factors, mut x) = (self.factors()?, x.clone());
        let share = self.dropout / factors.len() as f32;
        for (number, blocks) in factors.iter().enumerate().rev() {
            let blocks = orthogonal::drop_blocks(blocks, share, site, cx, number as u8)?;
            x = turn(&x, &blocks, number, Side::Plain)?;
        }
        let s = self.s.get();
        Ok(base.forward(&x)?.mul(&s.reshape([s.len()])?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{check_gradients, close, sample};

    #[test]
    fn outputs_keep_their_angles_and_are_stretched() {
        for (settings, count) in [
            (json!({ "block_size": 2, "blocks": 0 }), 3 * 4),
            (json!({ "block_size": 0, "blocks": 2 }), 2 * 9),
            (json!({ "block_size": 6, "blocks": 0 }), 36),
        ] {
            let a = attached(&[chosen("boft", settings)], &[]);
            assert_eq!(names(&a)[..2], ["layers.0.attn.q.boft_R", "layers.0.attn.q.boft_s"]);
            assert_eq!(a.adapter.trained_count(), 2 * (2 * count + 6 + 4));
            let x = sample(&[5, 6], 3);
            let w = frozen("layers.0.attn.q");
            close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&w).unwrap(), 1e-6);
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
            close(&fast, &defined, 1e-5);
            let (sites, _) = toy();
            let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
            let q = &merged.iter().find(|m| m.site.path == "layers.0.attn.q").unwrap().value;
            let s =
                a.adapter.params().iter().find(|p| p.name == "layers.0.attn.q.boft_s").unwrap().param.value();
            let turned = q.div(&s).unwrap();
            close(&turned.matmul_t(&turned).unwrap(), &w.matmul_t(&w).unwrap(), 1e-4);
        }
    }

    #[test]
    fn factors_join_into_one_dense_rotation() {
        // Eight inputs, blocks of two, three factors: log₂ 8 of them reach every pair.
        let (inn, size, blocks) = (8, 2, 4);
        let free = sample(&[3 * blocks, size, size], 5);
        let turned = orthogonal::cayley(&free.sub(&free.permute(&[0, 2, 1]).unwrap()).unwrap()).unwrap();
        let one = orthogonal::identity(inn).unwrap().reshape([inn, inn]).unwrap();
        let mut r = one.clone();
        for number in (0..3).rev() {
            let factor = turned.rows_between(number * blocks, (number + 1) * blocks).unwrap();
            let there = turn(&r, &factor, number, Side::Plain).unwrap();
            close(&turn(&there, &factor, number, Side::Transposed).unwrap(), &r, 1e-5);
            r = there;
        }
        close(&r.matmul_t(&r).unwrap(), &one, 1e-5);
        assert!(r.to_vec().unwrap().iter().all(|v| v.abs() > 1e-4), "{:?}", r.to_vec());
        let factor = turned.rows_between(blocks, 2 * blocks).unwrap();
        check_gradients(&[sample(&[3, inn], 6), factor], |v| {
            turn(&v[0], &v[1], 1, Side::Plain).map_err(|e| engraft_tensor::Error::Backward(e.to_string()))
        })
        .unwrap();
    }

    #[test]
    fn a_file_with_one_factor_has_one_whatever_it_says() {
        let methods = [chosen("boft", json!({ "block_size": 3 }))];
        let a = attached(&methods, &[]);
        stir(&a, 0.3);
        let (sites, info) = toy();
        let (one, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        let two = with(one, json!({ "boft_n_butterfly_factor": 2 }));
        let loaded = crate::load_adapter(&two, tensors, &sites, &info).unwrap();
        let merged = |adapter| engraft_nn::merged_tensors(&sites, adapter).unwrap()[0].value.clone();
        close(&merged(&loaded.adapter), &merged(&a.adapter), 0.0);
        let (again, _) =
            crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(again["boft_n_butterfly_factor"], 2, "as it was");
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({ "block_size": 2 }),
            json!({ "blocks": 3, "dropout": 0.1, "bias": "all", "init_weights": false }),
            json!({ "block_size": 3, "bias": "boft_only" }),
        ] {
            survives_saving(&[chosen("boft", settings)], &["head"]);
        }
        let (sites, info) = toy();
        for (settings, word) in [
            (json!({}), "`block_size` is 4"),
            (json!({ "blocks": 4 }), "`blocks` is 4"),
            (json!({ "block_size": 2, "butterfly_factors": 2 }), "2 butterfly factors"),
            (json!({ "block_size": 3, "butterfly_factors": 2 }), "2 butterfly factors"),
        ] {
            let error =
                crate::attach(&[chosen("boft", settings)], &[], &sites, &info, 0).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        let good = config(&[chosen("boft", json!({ "block_size": 2 }))], &[]);
        assert!(from_file(&with(good, json!({ "boft_block_num": 3 }))).is_err());
    }
}
