//! DVoRA: the magnitudes of DoRA with the direction of VeRA.
//!
//! V = W + diag(b)·B·diag(d)·A, W′ = m ⊙ V/‖V‖, norms of rows, not differentiated; m starts as the rows' norms of W, b as
//! zero, so W′ = W. A and B are random and shared by all targets. A target trains 2·out + r numbers.
//!
//! Liu et al. 2024 (DoRA, section 5.2), arXiv:2402.09353; Kopiczko et al. 2024 (VeRA), arXiv:2310.11454.
//!
//! vera_lambda_b (b) `[out]`, vera_lambda_d (d) `[r]`, lora_magnitude_vector (m) `[out]`; A and B are VeRA's, of which the
//! file holds the seed.

use engraft_nn::{Base, Builder, Init, Mode, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, no_grad};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::reparameterized::vera::{Direction, Shape};
use crate::shared::fields::{float, int};
use crate::shared::places;
use crate::shared::torch_random::Seed;
use crate::{Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 14;

struct Dvora(Shape);

static INFO: Info = Info {
    name: "dvora",
    title: "DVoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2402.09353",
    summary: "W′ = m ⊙ V/‖V‖ with V = W + diag(b)·B·diag(d)·A, A and B random and shared",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_DVORA",
    fields: &[
        int(
            "rank",
            (1, RANK_MAX as i64),
            Some("1024"),
            "Rows r of the shared A; a module trains r + 2·out numbers.",
        ),
        float("d_initial", (-1e3, 1e3), "0.1", "What d starts as."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        int("projection_prng_key", (0, u32::MAX as i64), Some("0"), "Seed of A and B."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let shape = read(&mut r, "rank");
    r.finish()?;
    Ok(Box::new(Dvora(shape)))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let shape = read(&mut r, "r");
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(Dvora(shape)), targets, train_also }))
}

fn read(r: &mut Reader<'_>, rank: &'static str) -> Shape {
    Shape {
        rank: r.count(rank, 1024, RANK_MAX),
        seed: r.torch_seed("projection_prng_key", 0),
        d_initial: r.float("d_initial", 0.1),
        dropout: r.dropout("dropout"),
        random: false,
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Dvora(Shape { rank: 4, seed: Seed::of(1), d_initial: 0.4, dropout: 0.0, random: false }))
}

impl Method for Dvora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let shared = self.0.projections(b, INFO.title, false)?;
        for site in b.targets() {
            let direction = self.0.direction(b, site, &shared)?;
            let norms = row_norms(&places::frozen(site)?)?;
            let name = format!("{}.lora_magnitude_vector", site.path);
            let magnitude = b.param(&name, &[norms.len()], Init::Values(norms))?;
            b.patch(site.id, Patch::Weight(Box::new(Magnitude { direction, magnitude })))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "d_initial": number(self.0.d_initial), "dropout": as_written(self.0.dropout), "layers_pattern": null,
            "layers_to_transform": null, "projection_prng_key": self.0.seed.written(), "r": self.0.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// ‖row‖ of every row of w [out, in]: `[out]`.
fn row_norms(w: &Tensor) -> Result<Tensor> {
    let out = w.dim(0);
    Ok(w.unary(Unary::Square)?.sum_to(&[out, 1])?.unary(Unary::Sqrt)?.reshape([out])?)
}

/// m ⊙ V/‖V‖.
struct Magnitude {
    direction: Direction,
    magnitude: Param,
}

impl Magnitude {
    /// m/‖V‖ `[out]`; the norm is a constant to the gradient.
    fn gain(&self, changed: &Tensor) -> Result<Tensor> {
        Ok(self.magnitude.get().div(&no_grad(|| row_norms(&changed.detach()))?)?)
    }
}

impl WeightPatch for Magnitude {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let changed = base.dense()?.add(&self.direction.product()?)?;
        let gain = self.gain(&changed)?;
        Ok(changed.mul(&gain.reshape([gain.len(), 1])?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let changed = no_grad(|| -> Result<Tensor> { Ok(base.dense()?.add(&self.direction.product()?)?) })?;
        let gain = self.gain(&changed)?;
        let straight = base.forward(x)?;
        if self.direction.dropout == 0.0 || cx.mode() == Mode::Eval {
            return Ok(self.direction.added_to(straight, x)?.mul(&gain)?);
        }
        // As in DoRA, dropout acts on what is added to the frozen output: (g − 1)·drop(x)·Wᵀ + g·drop(x)·ΔWᵀ.
        let dropped = cx.dropout(x, self.direction.dropout, site.id, 0)?;
        let frozen = base.forward(&dropped)?;
        let moved = self.direction.added_to(frozen.clone(), &dropped)?.mul(&gain)?.sub(&frozen)?;
        Ok(straight.add(&moved)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn rows_have_the_trained_magnitudes() {
        let a = attached(&[chosen("dvora", json!({ "rank": 3 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * ((3 + 2 * 6) + (3 + 2 * 4)));
        let x = sample(&[5, 6], 3);
        let q = "layers.0.attn.q";
        close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-5);
        stir(&a, 0.3);
        let (fast, defined) = both_ways(&a, q, &x);
        close(&fast, &defined, 1e-5);
        let magnitude = value_of(&a, &format!("{q}.lora_magnitude_vector")).unary(Unary::Abs).unwrap();
        close(&row_norms(&merged(&a, q)).unwrap(), &magnitude, 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("dvora", json!({ "rank": 3, "dropout": 0.1 }))], &["head"]);
        let written = config(&[chosen("dvora", json!({}))], &[]);
        assert_eq!((&written["peft_type"], &written["r"]), (&json!("ENGRAFT_DVORA"), &json!(1024)));
        assert!(from_file(&with(written, json!({ "r": 0 }))).is_err());
    }
}
