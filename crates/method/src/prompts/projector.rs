//! A prompt made of one of another model by a trained projection (TPT across models).
//!
//! P = reshape(W₂·LeakyReLU(W₁·vec(S) + b₁) + b₂), S [tokens, width of the source] the saved rows, which stay as they are. The two
//! layers are trained by the task alone; once trained only P is needed, an ordinary prompt. LeakyReLU keeps 0.01 of what is
//! negative.
//!
//! Su et al. 2022, arXiv:2111.06719, section 5 (task tuning); sizes and layers are the released code's
//! (thunlp/Prompt-Transferability). W₁ [inside, tokens·width of the source] and W₂ [tokens·width, inside] with their biases are
//! uniform in ±1/√in; while in training `prompt_projector.{encoder, decoder}` and S as `prompt_projector.source`.

use engraft_nn::{Builder, Error, Init, Result};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, ops::cat};

use super::transfer::Transfer;
use crate::shared::fields::int;
use crate::shared::network::{Lookup, Network, Part, layer, named};
use crate::{Field, Named};

pub(super) const PROJECTOR: Field = int(
    "projector",
    (1, 1 << 16),
    None,
    "With from_prompts of models of another width: width inside two layers that are trained to make the rows (the paper takes 768).",
);

const SOURCE: &str = "prompt_projector.source";
const ENCODER: &str = "prompt_projector.encoder";
const DECODER: &str = "prompt_projector.decoder";
/// What LeakyReLU keeps below zero.
const LEAK: f32 = 0.01;

pub(super) struct Projector {
    network: Network,
    source: Param,
    /// Rows and width of P.
    shape: [usize; 2],
}

impl Projector {
    /// A new one, `inside` wide, for `tokens` rows of `width`, of which the file holds `count` in all.
    pub fn new(
        b: &mut Builder<'_>,
        transfer: &Transfer,
        inside: usize,
        [tokens, count, width]: [usize; 3],
    ) -> Result<Projector> {
        let rows = transfer.source(count)?;
        let sizes = rows.shape().to_vec();
        let parts = [
            Part::layer(ENCODER, (tokens * sizes[1], inside)),
            Part::layer(DECODER, (inside, tokens * width)),
        ];
        let network = Network::new(b, parts.into_iter().flatten().collect())?;
        let source = b.state(SOURCE, &sizes, Init::Values(rows))?;
        Ok(Projector { network, source, shape: [tokens, width] })
    }

    /// P.
    pub fn rows(&self) -> Result<Tensor> {
        projected(&|name| self.network.get(name), &self.source.get(), self.shape[0])
    }
}

/// P of `tokens` rows, by the tensors of a projector.
fn projected(get: &Lookup<'_>, source: &Tensor, tokens: usize) -> Result<Tensor> {
    let flat = source.rows_between(0, tokens)?.reshape([1, tokens * source.dim(1)])?;
    let inside = layer(get, ENCODER, &flat)?;
    // x ≥ 0: x; else 0.01·x.
    let leaky = inside.scale(LEAK)?.add(&inside.unary(Unary::Relu)?.scale(1.0 - LEAK)?)?;
    let rows = layer(get, DECODER, &leaky)?;
    let width = rows.dim(1) / tokens;
    Ok(rows.reshape([tokens, width])?)
}

/// What the file holds in place of a projector for `tokens` rows: P, as often as the model has halves that rows are kept for.
pub(super) fn saved(state: &Named, tokens: usize) -> Result<Tensor> {
    let get = named(state);
    let source = get(SOURCE)?;
    let rows = projected(&get, &source, tokens)?;
    let halves = source.dim(0).checked_div(tokens).filter(|halves| *halves > 0);
    let halves = halves.ok_or_else(|| Error::Unsupported("the source prompt has too few rows".into()))?;
    Ok(cat(&vec![&rows; halves], 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Pass, Patch};
    use engraft_tensor::testing::close;
    use serde_json::{Value, json};

    fn settings(rows: Value) -> Value {
        json!({ "tokens": 2, "projector": 5, "from_prompts": [{ "path": "other", "rows": rows }] })
    }

    fn rows(adapter: &engraft_nn::Adapter) -> Tensor {
        let (sites, _) = toy();
        let [Patch::Prompt(p)] = adapter.at(site_id(&sites, "tok.prompt")) else { panic!("no prompt") };
        let cx = Pass::new(engraft_nn::Layout::counted(&[1]).unwrap(), None);
        p.rows(&Tensor::zeros([1, 6]), &cx).unwrap()
    }

    #[test]
    fn rows_of_another_width_are_projected_and_only_the_result_is_saved() {
        let methods = [chosen("prompt", settings(json!([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]])))];
        let a = attached(&methods, &[]);
        let (l, narrow, d, inside) = (2, 3, 6, 5);
        assert_eq!(a.adapter.trained_count(), (l * narrow + 1) * inside + (inside + 1) * l * d);
        // By hand.
        let value = |name: &str| value_of(&a, &format!("prompt_projector.{name}")).to_vec().unwrap();
        let (w1, b1, w2, b2) =
            (value("encoder.weight"), value("encoder.bias"), value("decoder.weight"), value("decoder.bias"));
        let linear = |x: &[f32], w: &[f32], b: &[f32]| -> Vec<f32> {
            w.chunks(x.len())
                .zip(b)
                .map(|(row, b)| row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>() + b)
                .collect()
        };
        let inside: Vec<f32> = linear(&[1.0, -2.0, 0.5, 3.0, 0.25, -1.0], &w1, &b1);
        assert!(inside.iter().any(|x| *x < 0.0) && inside.iter().any(|x| *x > 0.0));
        let leaky: Vec<f32> = inside.iter().map(|x| if *x < 0.0 { 0.01 * x } else { *x }).collect();
        let expected = Tensor::from_vec(linear(&leaky, &w2, &b2), [l, d]).unwrap();
        close(&rows(&a.adapter), &expected, 1e-6);

        let (sites, info) = toy();
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(
            (&config["peft_type"], &config["prompt_tuning_init"]),
            (&json!("PROMPT_TUNING"), &json!("RANDOM"))
        );
        let [(name, saved)] = &tensors[..] else { panic!("one tensor") };
        assert_eq!(name, "prompt_embeddings");
        close(saved, &rows(&a.adapter), 0.0);
        let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
        assert!(loaded.methods[0].0.trains_on().is_ok(), "it is a prompt like others");
        close(&rows(&loaded.adapter), saved, 0.0);
    }

    #[test]
    fn the_source_stays_and_is_the_same_at_every_start() {
        let methods = [chosen("prompt", settings(json!([[1.0, 2.0, 3.0, 4.0]])))];
        let a = attached(&methods, &[]);
        let source = a.adapter.params().iter().find(|p| p.name == SOURCE).unwrap();
        assert!(!source.param.trainable() && !source.saved);
        // One saved row is repeated.
        assert_eq!(source.param.value().to_vec().unwrap(), [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let attach = |settings: Value| -> String {
            let (sites, info) = toy();
            let built = crate::find("prompt").unwrap().from_settings;
            let method = match built(settings.as_object().unwrap()) {
                Ok(method) => method,
                Err(e) => return e.to_string(),
            };
            crate::attach(&[(method, None)], &[], &sites, &info, 0).map(|_| ()).unwrap_err().to_string()
        };
        let two = |a: Value, b: Value| json!({ "tokens": 2, "projector": 5, "from_prompts": [{ "path": "a", "rows": a }, { "path": "b", "rows": b }] });
        let error = attach(two(json!([[1.0]]), json!([[1.0, 2.0]])));
        assert!(error.contains("b holds rows of 2 numbers") && error.contains("a of 1"), "{error}");
        assert!(attach(json!({ "tokens": 2, "projector": 5 })).contains("`from_prompts`"));
        let mut narrow = settings(json!([[1.0]]));
        narrow.as_object_mut().unwrap().remove("projector");
        assert!(attach(narrow).contains("projector = 768"));
    }
}
