//! SMoP, sparse mixture of prompts: several short prompts, of which each sequence gets the one that a router chooses.
//!
//! z the mean of the sequence's embedded tokens, p = softmax(z·Rᵀ); the rows of the most probable prompt e, times p_e, come
//! before the tokens, so that the router has a gradient. In training its logits s are s + σ·ε·s, ε ~ N(0, 1) and the last s
//! a constant, without which few prompts are ever chosen. One prompt is prompt tuning.
//!
//! Choi et al. 2023, EMNLP (2023.emnlp-main.884); noise and start as in the authors' code.
//!
//! prompt_embeddings [prompts, tokens, width], N(0, 1); router.weight [prompts, width] orthogonal. ε is normal number
//! `sequence·prompts + i` of the stream "smop.STEP.MICRO" of the seed.

use engraft_nn::{Builder, Init, Mode, Pass, Patch, PromptPatch, Result};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::{TOKENS_MAX, prompt_site};
use crate::read::{Reader, number};
use crate::shared::fields::{float, int};
use crate::shared::sequences::means;
use crate::{Described, Entry, Info, Loaded, Method, peft};

#[derive(Clone, Debug)]
struct Smop {
    prompts: usize,
    tokens: usize,
    noise: f64,
}

static INFO: Info = Info {
    name: "smop",
    title: "SMoP",
    class: "prompt",
    sites: "prompt",
    paper: "EMNLP 2023 (2023.emnlp-main.884)",
    summary: "short prompts, of which a router gives each sequence one",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_SMOP",
    fields: &[
        int("prompts", (1, 1024), Some("4"), "Prompts to choose from."),
        int("tokens", (1, TOKENS_MAX as i64), Some("5"), "Rows of each prompt."),
        float("noise", (0.0, 1e3), "1", "Deviation of the noise on the router's logits, relative to them."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Smop {
    Smop {
        prompts: r.count("prompts", 4, 1024),
        tokens: r.count("tokens", 5, TOKENS_MAX),
        noise: r.float("noise", 1.0),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

/// Without noise, whose size is no part of the gradient.
fn example() -> Box<dyn Method> {
    Box::new(Smop { prompts: 3, tokens: 2, noise: 0.0 })
}

impl Method for Smop {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("prompts·(tokens + 1)·d")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (site, width) = prompt_site(b.sites(), INFO.title)?;
        let shape = [self.prompts, self.tokens, width];
        let routed = Routed {
            prompts: b.param("prompt_embeddings", &shape, Init::Normal(1.0))?,
            router: b.param("router.weight", &[self.prompts, width], self.orthogonal(width, b.seed())?)?,
            method: self.clone(),
        };
        b.patch(site.id, Patch::Prompt(Box::new(routed)))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "noise": number(self.noise), "prompts": self.prompts, "tokens": self.tokens });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Smop {
    /// Rows at right angles to each other or, where there are more prompts than columns, such columns.
    fn orthogonal(&self, width: usize, seed: u64) -> Result<Init> {
        let (long, short) = (self.prompts.max(width), self.prompts.min(width));
        let basis = Init::Normal(1.0).tensor(&[long, short], seed, "smop.router")?.orthonormal()?;
        Ok(Init::Values(if self.prompts == long { basis } else { basis.t()? }))
    }
}

struct Routed {
    prompts: Param,
    router: Param,
    method: Smop,
}

impl Routed {
    /// The router's logits of z [sequences, width].
    fn logits(&self, z: &Tensor, cx: &Pass) -> Result<Tensor> {
        let logits = z.matmul_t(&self.router.get())?;
        match cx.mode() {
            Mode::Train { seed, step, micro } if self.method.noise > 0.0 => {
                let key = Init::key(seed, &format!("smop.{step}.{micro}"));
                let noise = (0..logits.len() as u64).map(|i| key.normal(i) * self.method.noise as f32);
                let noise = Tensor::from_vec(noise.collect(), logits.shape())?;
                Ok(logits.add(&logits.detach().mul(&noise)?)?)
            }
            _ => Ok(logits),
        }
    }
}

impl PromptPatch for Routed {
    fn count(&self) -> usize {
        self.method.tokens
    }

    fn rows(&self, embedded: &Tensor, cx: &Pass) -> Result<Tensor> {
        let (shares, chosen) = self.logits(&means(embedded, cx)?, cx)?.softmax()?.top_k(1)?;
        let sequences = shares.dim(0);
        let rows = self.prompts.get().gather(&chosen.reshape([sequences])?)?;
        let rows = rows.mul(&shares.reshape([sequences, 1, 1])?)?;
        Ok(rows.reshape([sequences * self.method.tokens, embedded.width()])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    fn rows(a: &crate::Attached, x: &Tensor, mode: Mode) -> Tensor {
        let (sites, _) = toy();
        let [Patch::Prompt(p)] = a.adapter.at(site_id(&sites, "tok.prompt")) else { panic!() };
        let cx = Pass::new(Layout::counted(&[2, x.dim(0) - 2]).unwrap(), None).training(mode);
        p.rows(x, &cx).unwrap()
    }

    #[test]
    fn each_sequence_gets_the_most_probable_prompt_by_its_share() {
        let a = attached(&[chosen("smop", json!({ "prompts": 3, "tokens": 2 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 3 * 2 * 6 + 3 * 6);
        let r = value_of(&a, "router.weight");
        let identity = Tensor::from_vec((0..9).map(|i| f32::from(i % 4 == 0)).collect(), [3, 3]).unwrap();
        close(&r.matmul_t(&r).unwrap(), &identity, 1e-5);
        let x = sample(&[5, 6], 1);
        let found = rows(&a, &x, Mode::Eval).to_vec().unwrap();
        let prompts = value_of(&a, "prompt_embeddings").to_vec().unwrap();
        for (i, own) in [0..2, 2..5].into_iter().enumerate() {
            let mean = x.rows_between(own.start, own.end).unwrap().sum_dim(0).unwrap();
            let p = mean.scale(1.0 / own.len() as f32).unwrap().matmul_t(&r).unwrap().softmax().unwrap();
            let p = p.to_vec().unwrap();
            let best = (0..3).max_by(|&a, &b| p[a].total_cmp(&p[b])).unwrap();
            for (found, expected) in found[12 * i..12 * (i + 1)].iter().zip(&prompts[12 * best..]) {
                assert!((found - p[best] * expected).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn one_prompt_is_prompt_tuning_and_noise_is_of_training() {
        let x = sample(&[5, 6], 1);
        let one = attached(&[chosen("smop", json!({ "prompts": 1, "tokens": 2 }))], &[]);
        let own = value_of(&one, "prompt_embeddings").reshape([2, 6]).unwrap();
        let twice = engraft_tensor::ops::cat(&[&own, &own], 0).unwrap();
        close(&rows(&one, &x, Mode::Eval), &twice, 1e-6);
        let a = attached(&[chosen("smop", json!({ "tokens": 2 }))], &[]);
        let train = |step| rows(&a, &x, Mode::Train { seed: 3, step, micro: 0 }).to_vec().unwrap();
        assert_eq!(train(1), train(1));
        assert_ne!(train(1), train(2));
        assert_ne!(train(1), rows(&a, &x, Mode::Eval).to_vec().unwrap());
        let y = rows(&a, &x, Mode::Train { seed: 3, step: 1, micro: 0 });
        let gradients = y.sum().unwrap().backward().unwrap();
        let of_router = gradients.get(&param(&a.adapter, "router.weight")).unwrap().to_vec().unwrap();
        assert!(of_router.iter().any(|g| *g != 0.0), "the router learns by the share");
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("smop", json!({ "noise": 0.5 }))], &["head"]);
        let good = config(&[chosen("smop", json!({}))], &[]);
        for bad in [json!({ "prompts": 0 }), json!({ "tokens": "five" }), json!({ "balance": 0.1 })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
