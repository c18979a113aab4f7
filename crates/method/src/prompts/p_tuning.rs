//! P-tuning: rows before the embedded tokens that a small network makes of trained rows.
//!
//! H₀ = [P; E], P = M(R), R [tokens, width] trained. M is a perceptron, three layers with ReLU between them, or recurrent layers
//! in both directions and two layers with a ReLU between. Once trained only P is needed. P stands before the input; rows
//! among its words, as the paper's templates have them, are not there.
//!
//! Liu et al. 2021, arXiv:2103.10385, equation 3 and section 3.2; network and defaults are `peft`'s.
//!
//! R N(0, 1), N(0, 1) as PyTorch's embeddings; layers uniform in ±1/√in and recurrent ones in ±1/√hidden. While in training
//! `prompt_encoder.{embedding, mlp_head.i, lstm_head}` in PyTorch's names; the file holds P as `prompt_embeddings`. In an
//! encoder–decoder model `peft` makes twice the rows, which the recurrent layers read all, and puts the first half before the
//! encoder's input.

use engraft_nn::{Builder, Error, Init, Kind, Pass, Patch, PromptPatch, Result, SiteId};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::{TOKENS_MAX, prompt_file_name, read_prompt_keys, submodules};
use crate::read::{Reader, as_written};
use crate::shared::fields::{choice, float, int};
use crate::shared::network::{Lookup, Network, Part, layer, named, recurrent};
use crate::{Described, Entry, Info, Loaded, Method, Named, peft};

const HIDDEN_MAX: usize = 1 << 16;
const LAYERS_MAX: usize = 64;

#[derive(Clone)]
struct PTuning {
    tokens: usize,
    /// Times that there are `tokens` rows; `None` is what `peft` makes for the model.
    submodules: Option<usize>,
    encoder: Encoder,
    /// Width inside the network; `None` is that of the rows.
    hidden: Option<usize>,
    /// Recurrent layers.
    layers: usize,
    dropout: f32,
    /// Whether only P is left.
    saved: bool,
}

/// The network.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Encoder {
    Mlp,
    Lstm,
}

const ENCODERS: &[(&str, Encoder)] = &[("MLP", Encoder::Mlp), ("LSTM", Encoder::Lstm)];

static INFO: Info = Info {
    name: "p_tuning",
    title: "P-tuning",
    class: "prompt",
    sites: "prompt",
    paper: "arXiv:2103.10385",
    summary: "rows before the embedded input that a small network makes; only they are saved",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "P_TUNING",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("20"), "Number of rows."),
        choice("encoder", &["MLP", "LSTM"], "\"MLP\"", "The network that makes the rows."),
        int(
            "encoder_hidden_size",
            (1, HIDDEN_MAX as i64),
            None,
            "Width inside the network, of a direction where recurrent; that of the rows if absent.",
        ),
        int("encoder_layers", (1, LAYERS_MAX as i64), Some("2"), "Recurrent layers of the LSTM."),
        float(
            "encoder_dropout",
            (0.0, 0.999),
            "0",
            "Dropout between recurrent layers of the LSTM while training.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let given = r.value("encoder_hidden_size").is_some();
    let hidden = r.count("encoder_hidden_size", 1, HIDDEN_MAX);
    let method = PTuning {
        tokens: r.count("tokens", 20, TOKENS_MAX),
        submodules: None,
        encoder: r.one_of("encoder", ENCODERS),
        hidden: given.then_some(hidden),
        layers: r.count("encoder_layers", 2, LAYERS_MAX),
        dropout: r.dropout("encoder_dropout"),
        saved: false,
    };
    if method.encoder == Encoder::Mlp && (method.layers != 2 || method.dropout != 0.0) {
        r.problem(
            "`encoder_layers` and `encoder_dropout` are the LSTM's; the MLP has three layers and no dropout",
        );
    }
    r.finish()?;
    Ok(Box::new(method))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::file_without_targets(INFO.peft_type, config, |r| {
        let (tokens, submodules) = read_prompt_keys(r);
        let given = r.value("encoder_hidden_size").is_some();
        let hidden = r.count("encoder_hidden_size", 1, usize::MAX);
        PTuning {
            tokens,
            submodules,
            encoder: r.one_of("encoder_reparameterization_type", ENCODERS),
            hidden: given.then_some(hidden),
            layers: r.count("encoder_num_layers", 2, usize::MAX),
            dropout: r.dropout("encoder_dropout"),
            saved: true,
        }
    })
}

fn example() -> Box<dyn Method> {
    Box::new(PTuning {
        tokens: 3,
        submodules: None,
        encoder: Encoder::Lstm,
        hidden: Some(4),
        layers: 2,
        dropout: 0.0,
        saved: false,
    })
}

impl Method for PTuning {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("tokens·d + q·(d + 1) + q·(q + 1) + d·(q + 1), q = encoder_hidden_size")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let found = b.sites().of_kind(|k| matches!(k, Kind::Prompt { .. })).next();
        let Some((site, Kind::Prompt { width })) = found.map(|s| (s, s.kind.clone())) else {
            return Err(Error::Unsupported("P-tuning needs a model with an embedded input".into()));
        };
        let count = self.tokens * self.submodules.unwrap_or_else(|| submodules(b.sites()));
        let source = match self.saved {
            true => Source::Rows(b.param("prompt_embeddings", &[count, width], Init::Zeros)?),
            false => Source::Network(Network::new(b, self.parts(count, width))?),
        };
        let rows = Rows { config: self.clone(), source, site: site.id };
        b.patch(site.id, Patch::Prompt(Box::new(rows)))
    }

    fn trains_on(&self) -> Result<()> {
        if self.saved {
            let message = "the file holds the rows that the network made, not the network, so this adapter can be used but not trained on; start a new one with method `p_tuning`";
            return Err(Error::Unsupported(message.into()));
        }
        Ok(())
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "encoder_dropout": as_written(self.dropout), "encoder_hidden_size": self.hidden.unwrap_or(model.info.width),
            "encoder_num_layers": self.layers,
            "encoder_reparameterization_type": ENCODERS.iter().find(|e| e.1 == self.encoder).map(|e| e.0),
            "num_attention_heads": model.info.heads, "num_layers": model.info.layers,
            "num_transformer_submodules": self.submodules.unwrap_or_else(|| submodules(model.sites)),
            "num_virtual_tokens": self.tokens, "token_dim": model.info.width,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        prompt_file_name(name)
    }

    fn file_tensors(&self, mut tensors: Named, state: &Named) -> Result<Named> {
        if !self.saved {
            tensors.push(("prompt_embeddings".into(), self.encoded(&named(state), |_, x| Ok(x))?));
        }
        Ok(tensors)
    }
}

impl PTuning {
    /// The network for `count` rows.
    fn parts(&self, count: usize, width: usize) -> Vec<Part> {
        let hidden = self.hidden.unwrap_or(width);
        let rows = Part::embedding("prompt_encoder.embedding", count, width);
        let layer = |number: usize, sizes| Part::layer(&format!("prompt_encoder.mlp_head.{number}"), sizes);
        let rest = match self.encoder {
            Encoder::Mlp => {
                vec![layer(0, (width, hidden)), layer(2, (hidden, hidden)), layer(4, (hidden, width))]
            }
            Encoder::Lstm => vec![
                Part::recurrent("prompt_encoder.lstm_head", width, hidden, self.layers),
                layer(0, (2 * hidden, 2 * hidden)),
                layer(2, (2 * hidden, width)),
            ],
        };
        rows.into_iter().chain(rest.into_iter().flatten()).collect()
    }

    /// P = M(R); `between` is what is done to the output of a recurrent layer that another one reads.
    fn encoded(&self, get: &Lookup<'_>, between: impl Fn(usize, Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let mut x = get("prompt_encoder.embedding.weight")?;
        if self.encoder == Encoder::Lstm {
            for number in 0..self.layers {
                x = recurrent(get, "prompt_encoder.lstm_head", number, &x)?;
                if number + 1 < self.layers {
                    x = between(number, x)?;
                }
            }
        }
        let last = if self.encoder == Encoder::Lstm { 2 } else { 4 };
        for number in (0..=last).step_by(2) {
            x = layer(get, &format!("prompt_encoder.mlp_head.{number}"), &x)?;
            if number != last {
                x = x.unary(Unary::Relu)?;
            }
        }
        Ok(x)
    }
}

/// Where P comes from.
enum Source {
    Network(Network),
    Rows(Param),
}

struct Rows {
    config: PTuning,
    source: Source,
    site: SiteId,
}

impl PromptPatch for Rows {
    fn count(&self) -> usize {
        self.config.tokens
    }

    fn rows(&self, _embedded: &Tensor, cx: &Pass) -> Result<Tensor> {
        let dropped = |number: usize, x: Tensor| cx.dropout(&x, self.config.dropout, self.site, number as u8);
        let rows = match &self.source {
            Source::Network(network) => self.config.encoded(&|name| network.get(name), dropped)?,
            Source::Rows(rows) => rows.get(),
        };
        // What `peft` makes for the decoder is carried along and not used.
        Ok(rows.rows_between(0, self.config.tokens)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::close;

    fn rows(a: &crate::Attached) -> Tensor {
        let (sites, _) = toy();
        let [Patch::Prompt(p)] = a.adapter.at(site_id(&sites, "tok.prompt")) else { panic!("no prompt") };
        let cx = Pass::new(engraft_nn::Layout::counted(&[1]).unwrap(), None);
        p.rows(&Tensor::zeros([1, 6]), &cx).unwrap()
    }

    #[test]
    fn parameters_are_counted_by_the_formulas() {
        // l·d + the layers; 8q(d + q + 2) + 8q(3q + 2) for two recurrent layers of width q a direction.
        let (l, d, q) = (5, 6, 4);
        let count = |settings| attached(&[chosen("p_tuning", settings)], &[]).adapter.trained_count();
        let mlp = json!({ "tokens": l, "encoder_hidden_size": q });
        assert_eq!(count(mlp), l * d + (d + 1) * q + (q + 1) * q + (q + 1) * d);
        let recurrent = 8 * q * (d + q + 2) + 8 * q * (3 * q + 2);
        let lstm = json!({ "tokens": l, "encoder": "LSTM", "encoder_hidden_size": q });
        assert_eq!(count(lstm), l * d + recurrent + (2 * q + 1) * 2 * q + (2 * q + 1) * d);
    }

    #[test]
    fn the_perceptron_by_hand() {
        let a = attached(&[chosen("p_tuning", json!({ "tokens": 2, "encoder_hidden_size": 3 }))], &[]);
        let value = |name: &str| value_of(&a, &format!("prompt_encoder.{name}"));
        let layer = |x: &Tensor, n: usize| {
            let y = x.matmul_t(&value(&format!("mlp_head.{n}.weight"))).unwrap();
            y.add(&value(&format!("mlp_head.{n}.bias"))).unwrap()
        };
        let relu = |x: Tensor| x.unary(Unary::Relu).unwrap();
        let x = value("embedding.weight");
        let expected = layer(&relu(layer(&relu(layer(&x, 0)), 2)), 4);
        close(&rows(&a), &expected, 1e-6);
    }

    #[test]
    fn the_file_holds_the_rows_alone() {
        let (sites, info) = toy();
        for encoder in ["MLP", "LSTM"] {
            let methods = [chosen("p_tuning", json!({ "tokens": 3, "encoder": encoder }))];
            let a = attached(&methods, &[]);
            let (config, tensors) =
                crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
            assert_eq!(tensors.len(), 1);
            close(&tensors[0].1, &rows(&a), 0.0);
            let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
            assert!(loaded.methods[0].0.trains_on().is_err());
            let again = crate::Attached {
                adapter: loaded.adapter,
                dead_targets: vec![],
                dead_modules: vec![],
                without_targets: vec![],
            };
            close(&rows(&again), &rows(&a), 0.0);
        }
    }

    #[test]
    fn configurations() {
        let written = config(&[chosen("p_tuning", json!({ "encoder": "LSTM", "encoder_layers": 3 }))], &[]);
        assert_eq!(
            (&written["encoder_hidden_size"], &written["encoder_num_layers"]),
            (&json!(6), &json!(3)),
            "the width is the default"
        );
        for bad in [json!({ "encoder_reparameterization_type": "GRU" }), json!({ "odd": 1 })] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
        for bad in [json!({ "tokens": 0 }), json!({ "encoder": "mlp" }), json!({ "encoder_dropout": 0.1 })] {
            assert!(from_settings(bad.as_object().unwrap()).is_err(), "{bad}");
        }
    }
}
