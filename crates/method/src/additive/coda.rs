//! Conditional adapters (CoDA): in each block a router chooses k of n tokens that pass the frozen block; all pass an adapter.
//!
//! s = LN(h)·w; λ = a soft choice of k (see `Tensor::soft_top_k`); I the k largest. h′_i = h_i + A(LN(h)_i) +
//! 1[i ∈ I]·λ_i·(block(h_I) − h_I)_i, A(x) = W_u·σ(W_d·x + b_d) + b_u. The chosen tokens see each other only (the paper's
//! k-to-k). LN has no numbers of its own; W_u, b_d and b_u start at zero, W_d and w Kaiming-uniform. k = ⌈share·n⌉ of every
//! sequence by itself; the choice is by rank, as Σλ stays below k at a small temperature.
//!
//! Lei et al. 2023, arXiv:2304.04947, section 3. A choice that looks at the whole text cannot be made while it is written, so
//! decoders are refused; of an encoder–decoder model the encoder is adapted.
//!
//! BLOCK.router.weight `[width]`, BLOCK.adapter.down.weight [r, width], .bias, BLOCK.adapter.up.weight [width, r], .bias.

use engraft_nn::{BlockPatch, Builder, Error, Init, Kind, Pass, Patch, Result, Site, Stack, Task};
use engraft_tensor::ops::{Anneal, cat, layer_norm};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::activations::Activation;
use crate::shared::fields::{choice, float, int};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const MAX: usize = 1 << 16;
const EPS: f32 = 1e-5;
/// ε of the first iteration and its decay, as in the paper.
const FIRST: f32 = 4.0;
const DECAY: f32 = 0.7;

/// The first is the default.
const ACTIVATIONS: &[(&str, Activation)] =
    &[("relu", Activation::RELU), ("gelu", Activation::GELU), ("swish", Activation::SWISH)];

#[derive(Clone, Debug)]
struct Coda {
    share: f64,
    reduction: usize,
    iterations: usize,
    epsilon: f64,
    activation: Activation,
}

static INFO: Info = Info {
    name: "coda",
    title: "CoDA",
    class: "additive",
    sites: "block",
    paper: "arXiv:2304.04947",
    summary: "a router lets some tokens through each frozen block, a small adapter takes all",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_CODA",
    fields: &[
        float(
            "share",
            (1e-6, 1.0),
            "0.3333333333333333",
            "Share of a sequence's tokens that pass a block, rounded up.",
        ),
        int("reduction", (1, MAX as i64), Some("16"), "Width of the model over width of an adapter."),
        int("iterations", (1, 1000), Some("20"), "Iterations of the soft choice."),
        choice("activation", &["relu", "gelu", "swish"], "\"relu\"", "Function in the middle of an adapter."),
        float(
            "epsilon",
            (1e-3, 4.0),
            "1.0",
            "Temperature that the soft choice comes down to from 4; lower is harder.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Coda {
    let method = Coda {
        share: r.share("share", 1.0 / 3.0),
        reduction: r.count("reduction", 16, MAX),
        iterations: r.count("iterations", 20, 1000),
        epsilon: r.float("epsilon", 1.0),
        activation: r.one_of("activation", ACTIVATIONS),
    };
    if !(1e-3..=4.0).contains(&method.epsilon) {
        r.problem(format!("`epsilon`: expected 0.001 to 4, found {}", method.epsilon));
    }
    method
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    Box::new(Coda { share: 1.0, reduction: 2, iterations: 3, epsilon: 1.0, activation: Activation::GELU })
}

impl Method for Coda {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("L·(2·d·r + r + 2·d), r = ⌊d/reduction⌋")
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        if b.info().task == Task::CausalLm {
            let text = "CoDA chooses among all tokens of a text, which is not there yet while it is written; take an encoder or an encoder–decoder model";
            return Err(Error::Unsupported(text.into()));
        }
        let all = b.sites().clone();
        for site in all.iter().filter(|s| s.stack != Stack::Decoder) {
            let Kind::Block { width } = site.kind else { continue };
            let inner = width / self.reduction;
            if inner == 0 {
                let message =
                    format!("`reduction`: expected at most {width}, the width, found {}", self.reduction);
                return Err(Error::Unsupported(message));
            }
            let name = |part: &str| format!("{}.{part}", site.path);
            let routed = Routed {
                router: b.param(&name("router.weight"), &[width], Init::kaiming(width))?,
                down: b.param(&name("adapter.down.weight"), &[inner, width], Init::kaiming(width))?,
                down_bias: b.param(&name("adapter.down.bias"), &[inner], Init::Zeros)?,
                up: b.param(&name("adapter.up.weight"), &[width, inner], Init::Zeros)?,
                up_bias: b.param(&name("adapter.up.bias"), &[width], Init::Zeros)?,
                norm: [Tensor::full(1.0, [width]), Tensor::zeros([width])],
                method: self.clone(),
            };
            b.patch(site.id, Patch::Block(Box::new(routed)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "activation": self.activation.name(),
            "epsilon": self.epsilon, "iterations": self.iterations, "reduction": self.reduction, "share": self.share,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// The router and adapter of one block.
struct Routed {
    router: Param,
    down: Param,
    down_bias: Param,
    up: Param,
    up_bias: Param,
    /// Gain and bias of a norm without numbers of its own.
    norm: [Tensor; 2],
    method: Coda,
}

impl Routed {
    /// Length and k of each sequence.
    fn segments(&self, cx: &Pass) -> Vec<(usize, usize)> {
        let k = |n: usize| ((n as f64 * self.method.share).ceil() as usize).clamp(1, n.max(1));
        cx.layout().sequences().iter().map(|s| (s.len(), k(s.len()))).collect()
    }

    /// A(x) [tokens, width].
    fn adapter(&self, x: &Tensor) -> Result<Tensor> {
        let inner = x.matmul_t(&self.down.get())?.add(&self.down_bias.get())?;
        let inner = self.method.activation.apply(inner)?;
        Ok(inner.matmul_t(&self.up.get())?.add(&self.up_bias.get())?)
    }
}

impl BlockPatch for Routed {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let (tokens, width) = (h.dim(0), h.width());
        if (0..cx.layout().sequences().len()).any(|i| cx.layout().is_padded(i)) {
            let message = "rows padded on the left are classified by padding, which CoDA cannot choose; pad on the right";
            return Err(Error::Site { path: site.path.clone(), message: message.into() });
        }
        let x = layer_norm(h, &self.norm[0], &self.norm[1], EPS)?;
        let scores = x.matmul_t(&self.router.get().reshape([1, width])?)?.reshape([tokens])?;
        let anneal = Anneal {
            iterations: self.method.iterations,
            first: FIRST,
            decay: DECAY,
            least: self.method.epsilon as f32,
        };
        let (shares, chosen) = scores.soft_top_k(&self.segments(cx), anneal)?;
        let count = chosen.len();
        // Where each token finds its change: behind the chosen ones there is a row of zeros for the others.
        let mut places = vec![count as i64; tokens];
        chosen.iter().enumerate().for_each(|(at, &row)| places[row as usize] = at as i64);
        let rows = Tensor::from_i64(chosen.clone(), [count])?;
        let own = h.gather(&rows)?;
        let through = run(&own, &cx.select(&chosen)?)?.sub(&own)?;
        let through = through.mul(&shares.reshape([tokens, 1])?.gather(&rows)?)?;
        let zeros = Tensor::zeros([1, width]);
        let through = cat(&[&through, &zeros], 0)?.gather(&Tensor::from_i64(places, [tokens])?)?;
        Ok(h.add(&self.adapter(&x)?)?.plus(&through)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    fn routed(share: f64, width: usize) -> Routed {
        let param = |shape: &[usize], seed| Param::new(sample(shape, seed));
        Routed {
            router: param(&[width], 1),
            down: param(&[2, width], 2),
            down_bias: param(&[2], 3),
            up: Param::new(Tensor::zeros([width, 2])),
            up_bias: Param::new(Tensor::zeros([width])),
            norm: [Tensor::full(1.0, [width]), Tensor::zeros([width])],
            method: Coda { share, reduction: 2, iterations: 20, epsilon: 1.0, activation: Activation::RELU },
        }
    }

    #[test]
    fn trained_numbers() {
        let (sites, mut info) = crate::testing::toy();
        info.task = engraft_nn::Task::SequenceClassification;
        let methods = [crate::testing::chosen("coda", json!({ "reduction": 2 }))];
        let adapter = crate::attach(&methods, &[], &sites, &info, 1).unwrap().adapter;
        // A router, and an adapter of width 3 with its biases, in two blocks.
        assert_eq!(adapter.trained_count(), 2 * (6 + (3 * 6 + 3) + (6 * 3 + 6)));
    }

    #[test]
    fn the_block_runs_on_the_chosen_tokens_alone() {
        let (sites, _) = crate::testing::toy();
        let site = sites.iter().next().unwrap();
        let h = sample(&[9, 4], 9);
        let cx = Pass::new(Layout::counted(&[6, 3]).unwrap(), None);
        let seen = std::sync::Mutex::new(Vec::new());
        let run = |x: &Tensor, cx: &Pass| {
            seen.lock().unwrap().push((x.dim(0), cx.layout().sequences().to_vec()));
            Ok(x.scale(3.0)?)
        };
        let out = routed(1.0 / 3.0, 4).around(&h, &run, site, &cx).unwrap();
        assert_eq!(*seen.lock().unwrap(), [(3, vec![0..2, 2..3])]);
        let changed = out.sub(&h).unwrap().to_vec().unwrap();
        assert_eq!(changed.chunks(4).filter(|row| row.iter().any(|v| v.abs() > 1e-4)).count(), 3);
        // All tokens: shares are one, and the block is the dense one.
        let all = routed(1.0, 4).around(&h, &run, site, &cx).unwrap();
        close(&all, &h.scale(3.0).unwrap(), 2e-2);
    }

    #[test]
    fn configurations() {
        let settings = |v: Value| (ENTRY.from_settings)(v.as_object().unwrap());
        assert!(settings(json!({})).is_ok());
        let written = settings(json!({ "share": 0.2, "epsilon": 0.3 })).unwrap();
        let (sites, info) = crate::testing::toy();
        let causal = crate::attach(&[(written, None)], &[], &sites, &info, 1);
        assert!(causal.err().unwrap().to_string().contains("while it is written"));
        assert!(from_file(&json!({ "peft_type": "ENGRAFT_CODA", "share": 0.0 })).is_err());
        assert!(from_file(&json!({ "peft_type": "ENGRAFT_CODA", "odd": 0.5 })).is_err());
    }
}
