//! Res-Tuning's bypass: a stream of its own beside the frozen blocks, made of their outputs by small residual tuners.
//!
//! b₀ = sg(x₀); b_l = λ_l·T_lat(sg(x_l)) + (1 − λ_l)·T_ver(b_{l−1}), λ_l = σ(a_l), T(x) = x + W_u·GELU(W_d·x + c_d) + c_u, x_l the output of
//! block l. b_L stands in place of the last block's output; what the model has behind its blocks reads it. With `mix = "sum"`
//! b_l = T_lat(sg(x_l)) + T_ver(b_{l−1}), as the authors' code has it. W start Glorot-uniform, c as N(0, 10⁻⁶), a at 0.
//!
//! Jiang et al. 2023, arXiv:2310.19859, section 3.3. Of an encoder–decoder model the bypass goes along the decoder.
//!
//! All names begin with `bypass.`; of block l: l.gate `[1]` (not with "sum"), and of T = `lateral`, `vertical`: l.T.down.weight [r, d],
//! .bias `[r]`, l.T.up.weight [d, r], .bias `[d]`.

use engraft_nn::{Builder, Init, Pass, Result};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::beside::{self, Side, mixed};
use crate::shared::branch::glorot;
use crate::shared::dense::Dense;
use crate::shared::fields::{choice, int};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const MAX: usize = 1 << 16;

#[derive(Clone, Debug)]
struct ResTuning {
    bottleneck: usize,
    /// Whether λ weighs the two tuners.
    gated: bool,
}

static INFO: Info = Info {
    name: "res_tuning",
    title: "Res-Tuning bypass",
    class: "additive",
    sites: "block",
    paper: "arXiv:2310.19859",
    summary: "b ← λ·T(block output) + (1 − λ)·T(b) beside the blocks, T(x) = x + adapter(x); backward does not enter the base",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_RES_TUNING",
    fields: &[
        int("bottleneck", (1, MAX as i64), Some("32"), "Inner width of a tuner."),
        choice(
            "mix",
            &["gate", "sum"],
            "\"gate\"",
            "Weigh a block's output and the bypass by a trained share, or add them up.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> ResTuning {
    ResTuning {
        bottleneck: r.count("bottleneck", 32, MAX),
        gated: r.one_of("mix", &[("gate", true), ("sum", false)]),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    Box::new(ResTuning { bottleneck: 3, gated: true })
}

impl Method for ResTuning {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("L·(2·(2·d·bottleneck + bottleneck + d) + 1)")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (blocks, width) = beside::blocks(b)?;
        let step = |l: usize, b: &mut Builder<'_>| -> Result<Step> {
            let name = |part: &str| format!("bypass.{l}.{part}");
            Ok(Step {
                gate: self.gated.then(|| b.param(&name("gate"), &[1], Init::Zeros)).transpose()?,
                lateral: Tuner::new(b, &name("lateral"), (width, self.bottleneck))?,
                vertical: Tuner::new(b, &name("vertical"), (width, self.bottleneck))?,
            })
        };
        let steps = (0..blocks.len()).map(|l| step(l, b)).collect::<Result<_>>()?;
        beside::attach(b, Bypass(steps), &blocks, |_| true)
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "bottleneck": self.bottleneck, "mix": if self.gated { "gate" } else { "sum" } });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// T.
struct Tuner {
    down: Dense,
    up: Dense,
}

impl Tuner {
    fn new(b: &mut Builder<'_>, name: &str, (width, inner): (usize, usize)) -> Result<Tuner> {
        let [down, up] = glorot(width, inner).map(|start| [start, Init::Normal(1e-6)]);
        Ok(Tuner {
            down: Dense::starting(b, &format!("{name}.down"), (width, inner), down)?,
            up: Dense::starting(b, &format!("{name}.up"), (inner, width), up)?,
        })
    }

    fn of(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.up.of(&self.down.of(x)?.unary(Unary::Gelu)?)?.plus(x)?)
    }
}

struct Step {
    gate: Option<Param>,
    lateral: Tuner,
    vertical: Tuner,
}

/// The stream, a step for each block.
struct Bypass(Vec<Step>);

impl Side for Bypass {
    fn start(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }

    fn step(&self, state: Tensor, number: usize, out: &Tensor, _cx: &Pass) -> Result<Tensor> {
        let Some(step) = self.0.get(number) else { return Ok(state) };
        let (lateral, vertical) = (step.lateral.of(out)?, step.vertical.of(&state)?);
        match &step.gate {
            Some(gate) => mixed(&lateral, &vertical, &gate.get().unary(Unary::Sigmoid)?),
            None => Ok(lateral.plus(&vertical)?),
        }
    }

    fn end(&self, state: Tensor, _out: &Tensor) -> Result<Tensor> {
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patch};
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn without_tuners_the_stream_is_a_mean_of_outputs() {
        let (d, r) = (6, 2);
        for (mix, gates, expected) in [("gate", 2, 0.25 + 0.5 + 2.0), ("sum", 0, 1.0 + 2.0 + 4.0)] {
            let a = attached(&[chosen("res_tuning", json!({ "bottleneck": 2, "mix": mix }))], &[]);
            assert_eq!(a.adapter.trained_count(), gates + 2 * 2 * (2 * d * r + d + r));
            for p in a.adapter.trainable() {
                p.param.set(Tensor::zeros(p.param.value().shape())).unwrap();
            }
            let (sites, _) = toy();
            let cx = Pass::new(Layout::counted(&[3, 2]).unwrap(), None);
            let (x, mut h) = (sample(&[5, 6], 1), sample(&[5, 6], 1));
            for path in ["layers.0", "layers.1"] {
                let site = sites.get(site_id(&sites, path));
                let [Patch::Block(patch)] = a.adapter.at(site.id) else { panic!() };
                h = patch.around(&h, &|x: &Tensor, _: &Pass| Ok(x.scale(2.0)?), site, &cx).unwrap();
            }
            // x, 2x and 4x, weighed ¼, ¼ and ½, or added up.
            close(&h, &x.scale(expected).unwrap(), 1e-6);
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("res_tuning", json!({ "bottleneck": 3 }))], &["head"]);
        survives_saving(&[chosen("res_tuning", json!({ "bottleneck": 1, "mix": "sum" }))], &[]);
        let settings = |text: Value| (ENTRY.from_settings)(text.as_object().unwrap());
        assert!(settings(json!({ "bottleneck": 0 })).is_err());
        assert!(from_file(&json!({ "peft_type": "ENGRAFT_RES_TUNING", "mix": "mean" })).is_err());
    }
}
