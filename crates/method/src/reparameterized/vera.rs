//! VeRA: two random matrices that all layers share, and two trained vectors a layer.
//!
//! W′ = W + diag(b)·B·diag(d)·A. A and B are drawn once, as large as the largest target needs, and each target reads the
//! upper left of them; d starts as a small constant, b as zero, so W′ = W. The forward is
//! y = x·Wᵀ + b⊙((d⊙(drop(x)·Aᵀ))·Bᵀ), in which only b and d receive gradients.
//!
//! Kopiczko et al. 2024, arXiv:2310.11454. As `peft` has it: A and B are Kaiming-uniform draws of PyTorch's generator, and
//! with `save_projection = false` the file holds nothing of them but their seed.
//!
//! vera_lambda_b (b) `[out]`, vera_lambda_d (d) `[r]` a target; vera_A [r, largest in], vera_B [largest out, r].

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::places;
use crate::shared::projection::{corner, kaiming_pair};
use crate::shared::torch_random::Seed;
use crate::{Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
const RECIPE_RANK_MAX: usize = 1 << 14;
const OF_TARGETS: &str = "vera_only";

struct Vera {
    shape: Shape,
    save_projection: bool,
    bias: Biases,
}

/// What VeRA and DVoRA share.
pub(crate) struct Shape {
    pub rank: usize,
    pub seed: Seed,
    pub d_initial: f64,
    pub dropout: f32,
    /// Whether b and d start as `peft` leaves them where it does not set them: ones and noise.
    pub random: bool,
}

static INFO: Info = Info {
    name: "vera",
    title: "VeRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2310.11454",
    summary: "W′ = W + diag(b)·B·diag(d)·A, with random A and B that all layers share",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "VERA",
    fields: &[
        int(
            "rank",
            (1, RECIPE_RANK_MAX as i64),
            Some("256"),
            "Rows r of the shared A; a module trains r + out numbers.",
        ),
        float("d_initial", (-1e3, 1e3), "0.1", "What d starts as."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
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
    peft::own_settings(&INFO, settings, |r| read(r, ("rank", "dropout"), RECIPE_RANK_MAX))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let mut vera = read(&mut r, ("r", "vera_dropout"), RANK_MAX);
    vera.shape.random = !r.flag("init_weights", true);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(vera), targets, train_also }))
}

fn read(r: &mut Reader<'_>, (rank, dropout): (&'static str, &'static str), most: usize) -> Vera {
    let shape = Shape {
        rank: r.count(rank, 256, most),
        seed: r.torch_seed("projection_prng_key", 0),
        d_initial: r.float("d_initial", 0.1),
        dropout: r.dropout(dropout),
        random: false,
    };
    let save_projection = r.flag("save_projection", true);
    Vera { shape, save_projection, bias: Biases::read(r, OF_TARGETS) }
}

fn example() -> Box<dyn Method> {
    let shape = Shape { rank: 4, seed: Seed::of(1), d_initial: 0.4, dropout: 0.0, random: false };
    Box::new(Vera { shape, save_projection: false, bias: Biases::None })
}

impl Method for Vera {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        let shared = self.shape.projections(b, INFO.title, self.save_projection)?;
        for site in b.targets() {
            let direction = self.shape.direction(b, site, &shared)?;
            b.patch(site.id, Patch::Weight(Box::new(direction)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "d_initial": number(self.shape.d_initial), "fan_in_fan_out": false,
            "init_weights": !self.shape.random, "layers_pattern": null, "layers_to_transform": null,
            "projection_prng_key": self.shape.seed.written(), "r": self.shape.rank, "save_projection": self.save_projection,
            "vera_dropout": as_written(self.shape.dropout),
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        file_name(name)
    }
}

/// The shared matrices belong to the model as a whole.
pub(crate) fn file_name(name: &str) -> String {
    let whole = ["vera_A", "vera_B"].contains(&name);
    if whole { format!("base_model.{name}") } else { format!("base_model.model.{name}") }
}

impl Shape {
    /// A and B for the builder's targets.
    pub fn projections(&self, b: &mut Builder<'_>, title: &str, save: bool) -> Result<[Param; 2]> {
        let sizes = [self.rank, self.rank];
        kaiming_pair(b, title, ["vera_A", "vera_B"], sizes, self.seed, save)
    }

    /// The vectors of one target.
    pub fn direction(&self, b: &mut Builder<'_>, site: &Site, shared: &[Param; 2]) -> Result<Direction> {
        let (out, inn) = places::linear(site, "VeRA")?;
        let constant = Tensor::full(self.d_initial as f32, [self.rank]);
        let (init_b, init_d) = match self.random {
            false => (Init::Zeros, Init::Values(constant)),
            true => (Init::Ones, Init::Normal(1.0)),
        };
        let outputs = b.param(&format!("{}.vera_lambda_b", site.path), &[out], init_b)?;
        let inner = b.param(&format!("{}.vera_lambda_d", site.path), &[self.rank], init_d)?;
        let [down, up] = shared.clone();
        Ok(Direction { down, up, inner, outputs, inn, dropout: self.dropout })
    }
}

/// diag(b)·B·diag(d)·A.
pub(crate) struct Direction {
    down: Param,
    up: Param,
    inner: Param,
    outputs: Param,
    inn: usize,
    pub dropout: f32,
}

impl Direction {
    /// A [r, in] and B [out, r] of this target.
    fn corners(&self) -> Result<[Tensor; 2]> {
        let (rank, out) = (self.inner.value().len(), self.outputs.value().len());
        Ok([corner(&self.down, rank, self.inn)?, corner(&self.up, out, rank)?])
    }

    /// ΔW.
    pub fn product(&self) -> Result<Tensor> {
        let [down, up] = self.corners()?;
        let (inner, outputs) = (self.inner.get(), self.outputs.get());
        let down = down.mul(&inner.reshape([inner.len(), 1])?)?;
        Ok(up.mul(&outputs.reshape([outputs.len(), 1])?)?.matmul(&down)?)
    }

    /// y + x·ΔWᵀ.
    pub fn added_to(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        let [down, up] = self.corners()?;
        let inner = x.matmul_t(&down)?.mul(&self.inner.get())?;
        Ok(y.plus(&inner.matmul_t(&up)?.mul(&self.outputs.get())?)?)
    }
}

impl WeightPatch for Direction {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.product()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        self.added_to(base.forward(x)?, &dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn targets_share_the_corners_of_two_matrices() {
        let settings = json!({ "rank": 3, "projection_prng_key": 7, "bias": "vera_only" });
        let a = attached(&[chosen("vera", settings)], &[]);
        let find = |name: &str| a.adapter.params().iter().find(|p| p.name == name).unwrap().param.clone();
        assert_eq!(a.adapter.trained_count(), 2 * ((3 + 6) + (3 + 4)) + 2 * 6);
        assert_eq!(
            (find("vera_A").value().shape(), find("vera_B").value().shape()),
            (&[3, 6][..], &[6, 3][..])
        );
        let x = sample(&[5, 6], 3);
        let v = "layers.1.attn.v";
        close(&both_ways(&a, v, &x).0, &x.matmul_t(&frozen(v)).unwrap(), 1e-6);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, v, &x);
        close(&fast, &defined, 1e-5);
        let up = find("vera_B").value().rows_between(0, 4).unwrap();
        let (b, d) =
            (find(&format!("{v}.vera_lambda_b")).value(), find(&format!("{v}.vera_lambda_d")).value());
        let inner = x.matmul_t(&find("vera_A").value()).unwrap().mul(&d).unwrap();
        let moved = inner.matmul_t(&up).unwrap().mul(&b).unwrap();
        close(&defined, &x.matmul_t(&frozen(v)).unwrap().add(&moved).unwrap(), 1e-5);
    }

    #[test]
    fn the_same_seed_gives_the_same_matrices_in_the_file_or_not() {
        let values = |settings: Value| {
            let a = attached(&[chosen("vera", settings)], &[]);
            stir(&a, 0.5);
            both_ways(&a, "layers.0.attn.q", &sample(&[2, 6], 1)).0.to_vec().unwrap()
        };
        let saved = values(json!({ "rank": 3 }));
        assert_eq!(saved, values(json!({ "rank": 3, "save_projection": false })));
        assert_ne!(saved, values(json!({ "rank": 3, "projection_prng_key": 1 })));
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("vera", json!({ "rank": 3, "dropout": 0.1, "bias": "all" }))], &["head"]);
        survives_saving(&[chosen("vera", json!({ "rank": 3, "save_projection": false }))], &[]);
        let written = config(&[chosen("vera", json!({}))], &[]);
        assert_eq!(written["d_initial"], json!(0.1));
        assert!(written.get("exclude_modules").is_none(), "peft's has no such key");
        for bad in [json!({ "bias": "some" }), json!({ "projection_prng_key": 1e30 }), json!({ "r": 0 })] {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
        let (sites, info) = toy();
        let table = [(chosen("vera", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
        assert!(crate::attach(&table, &[], &sites, &info, 0).is_err(), "a table has no such form");
    }
}
