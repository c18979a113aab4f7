//! Ladder side-tuning: a small transformer beside the frozen one, which reads every block and writes the last output.
//!
//! s₀ = D₀·sg(x₀) + c₀; at each side layer i: s ← Block_i(μ_i·s + (1 − μ_i)·(D_i·sg(x_i) + c_i)), μ_i = σ(α_i/0.1), x_i the output of
//! the frozen block i. Other blocks leave s as it is. In place of the last block's output stands U·LN(s) + u; what the model has
//! behind its blocks (a last norm, the head) reads it. Block_i, of width w = d/ρ: u = s + W_o·Attn(W_q·LN s, W_k·LN s, W_v·LN s),
//! s = u + W₂·σ(W₁·LN u), as many heads as the model, each of its width/ρ; with `block = "mlp"` the second half alone. α starts at 0,
//! the matrices uniform in ±1/√in; the paper also cuts them out of the frozen blocks, by their Fisher information.
//!
//! Sung, Cho and Bansal 2022, arXiv:2206.06522, section 3. Attention is causal where the model writes text, and has a cache
//! there. Of an encoder–decoder model the ladder goes along the decoder, whose states have read the source, and has no
//! cross-attention of its own.
//!
//! All names begin with `side.`. entry.weight [w, d], .bias; of block i: i.down.weight [w, d], .bias, i.gate `[1]`,
//! i.attention_norm.weight `[w]`, .bias, i.q.weight, i.k.weight, i.v.weight [h, w], i.o.weight [w, h], i.mlp_norm.weight, .bias,
//! i.wi.weight [f, w], i.wo.weight [w, f]; norm.weight, .bias; up.weight [d, w], .bias. f is the model's own inner width over ρ.

use engraft_nn::{Builder, Error, Init, Kind, Pass, Result, Role, Site, Stack, Task};
use engraft_tensor::cpu::attention::AttentionSpec;
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::beside::{self, Side, mixed};
use crate::shared::branch::Norm;
use crate::shared::dense::Dense;
use crate::shared::fields::{choice, int};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const MAX: usize = 1 << 16;
/// Of the gates.
const TEMPERATURE: f32 = 0.1;

/// The first is the default.
const ACTIVATIONS: &[(&str, Unary)] =
    &[("relu", Unary::Relu), ("gelu", Unary::Gelu), ("gelu_new", Unary::GeluTanh), ("swish", Unary::Silu)];

#[derive(Clone, Debug)]
struct Lst {
    reduction: usize,
    /// Whether side layers have an attention.
    attends: bool,
    activation: Unary,
    /// `None` for all blocks.
    layers: Option<Vec<usize>>,
}

static INFO: Info = Info {
    name: "lst",
    title: "Ladder side-tuning",
    class: "additive",
    sites: "block",
    paper: "arXiv:2206.06522",
    summary: "a small transformer beside the blocks reads each and replaces the last output; backward does not enter the base",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_LST",
    fields: &[
        int("reduction", (1, MAX as i64), Some("8"), "Width of the model over width of the side network."),
        choice("block", &["transformer", "mlp"], "\"transformer\"", "What a side layer is made of."),
        choice(
            "activation",
            &["relu", "gelu", "gelu_new", "swish"],
            "\"relu\"",
            "Function in the perceptrons of side layers.",
        ),
        Field {
            name: "side_layers",
            kind: FieldKind::IntList,
            default: None,
            doc: "Blocks that have a side layer, from 0; all without it.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Lst {
    let method = Lst {
        reduction: r.count("reduction", 8, MAX),
        attends: r.one_of("block", &[("transformer", true), ("mlp", false)]),
        activation: r.one_of("activation", ACTIVATIONS),
        layers: r.counts("side_layers"),
    };
    if method.layers.as_ref().is_some_and(Vec::is_empty) {
        r.problem("`side_layers`: expected one block at least; leave it out for all");
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
    Box::new(Lst { reduction: 4, attends: true, activation: Unary::Gelu, layers: None })
}

/// Sizes of the side network.
struct Sizes {
    width: usize,
    own: usize,
    inner: usize,
    spec: AttentionSpec,
}

impl Lst {
    fn sizes(&self, b: &Builder<'_>, blocks: &[&Site], width: usize) -> Result<Sizes> {
        let own = width / self.reduction;
        if own == 0 {
            let message =
                format!("`reduction`: expected at most {width}, the width, found {}", self.reduction);
            return Err(Error::Unsupported(message));
        }
        if let Some(far) = self.layers.iter().flatten().find(|&&i| i >= blocks.len()) {
            let message = format!("`side_layers`: block {far}, of {} blocks, from 0", blocks.len());
            return Err(Error::Unsupported(message));
        }
        let stack = blocks.first().map_or(Stack::Only, |s| s.stack);
        let up = b.sites().iter().find(|s| s.role == Role::Up && s.stack == stack);
        let inner = match up.map(|s| &s.kind) {
            Some(&Kind::Linear { out, .. }) => out,
            _ => 4 * width,
        };
        let (heads, dim) = (b.info().heads, (b.info().head_dim / self.reduction).max(1));
        let spec = AttentionSpec {
            heads,
            kv_heads: heads,
            dim,
            scale: 1.0 / (dim as f32).sqrt(),
            causal: stack == Stack::Decoder || b.info().task == Task::CausalLm,
            window: None,
        };
        Ok(Sizes { width, own, inner: (inner / self.reduction).max(1), spec })
    }

    fn rung(&self, b: &mut Builder<'_>, number: usize, s: &Sizes) -> Result<Rung> {
        let name = |part: &str| format!("side.{number}.{part}");
        let attention = if self.attends {
            let rows = s.spec.heads * s.spec.dim;
            let norm = Norm::build(b, &name("attention_norm"), s.own)?;
            let mut read = |part| b.param(&name(part), &[rows, s.own], Init::kaiming(s.own));
            let qkv = [read("q.weight")?, read("k.weight")?, read("v.weight")?];
            let o = b.param(&name("o.weight"), &[s.own, rows], Init::kaiming(rows))?;
            // Layers of the cache behind the model's.
            Some(SideAttention { norm, qkv, o, spec: s.spec, layer: b.info().layers + number })
        } else {
            None
        };
        Ok(Rung {
            down: Dense::new(b, &name("down"), (s.width, s.own))?,
            gate: b.param(&name("gate"), &[1], Init::Zeros)?,
            attention,
            norm: Norm::build(b, &name("mlp_norm"), s.own)?,
            wide: b.param(&name("wi.weight"), &[s.inner, s.own], Init::kaiming(s.own))?,
            back: b.param(&name("wo.weight"), &[s.own, s.inner], Init::kaiming(s.inner))?,
            activation: self.activation,
        })
    }
}

impl Method for Lst {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some(
            "w·(d + 3) + d·(w + 1) + L·(w·(d + 5) + 1 + 2·w·⌊f/reduction⌋ + 4·w·heads·⌊head_dim/reduction⌋), w = ⌊d/reduction⌋",
        )
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (blocks, width) = beside::blocks(b)?;
        let sizes = self.sizes(b, &blocks, width)?;
        let kept = |number: usize| self.layers.as_ref().is_none_or(|own| own.contains(&number));
        let rung = |number: usize, b: &mut Builder<'_>| {
            if kept(number) { self.rung(b, number, &sizes).map(Some) } else { Ok(None) }
        };
        let ladder = Ladder {
            entry: Dense::new(b, "side.entry", (width, sizes.own))?,
            rungs: (0..blocks.len()).map(|number| rung(number, b)).collect::<Result<_>>()?,
            norm: Norm::build(b, "side.norm", sizes.own)?,
            up: Dense::new(b, "side.up", (sizes.own, width))?,
        };
        beside::attach(b, ladder, &blocks, kept)
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "activation": ACTIVATIONS.iter().find(|(_, f)| *f == self.activation).map(|(name, _)| *name),
            "block": if self.attends { "transformer" } else { "mlp" },
            "reduction": self.reduction, "side_layers": self.layers,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// The side network.
struct Ladder {
    entry: Dense,
    rungs: Vec<Option<Rung>>,
    norm: Norm,
    up: Dense,
}

/// A side layer with what it reads.
struct Rung {
    down: Dense,
    gate: Param,
    attention: Option<SideAttention>,
    norm: Norm,
    wide: Param,
    back: Param,
    activation: Unary,
}

struct SideAttention {
    norm: Norm,
    qkv: [Param; 3],
    o: Param,
    spec: AttentionSpec,
    layer: usize,
}

impl SideAttention {
    /// s [tokens, w] → [tokens, w].
    fn of(&self, s: &Tensor, cx: &Pass) -> Result<Tensor> {
        let (x, spec) = (self.norm.apply(s)?, self.spec);
        let heads = |p: &Param| x.matmul_t(&p.get())?.reshape([x.dim(0), spec.heads, spec.dim]);
        let [q, k, v] = &self.qkv;
        let y = cx.attend(self.layer, spec, [&heads(q)?, &heads(k)?, &heads(v)?])?;
        Ok(y.reshape([x.dim(0), spec.heads * spec.dim])?.matmul_t(&self.o.get())?)
    }
}

impl Side for Ladder {
    fn start(&self, x: &Tensor) -> Result<Tensor> {
        self.entry.of(x)
    }

    fn step(&self, state: Tensor, number: usize, out: &Tensor, cx: &Pass) -> Result<Tensor> {
        let Some(rung) = self.rungs.get(number).and_then(Option::as_ref) else { return Ok(state) };
        let gate = rung.gate.get().scale(1.0 / TEMPERATURE)?.unary(Unary::Sigmoid)?;
        let mut s = mixed(&state, &rung.down.of(out)?, &gate)?;
        if let Some(attention) = &rung.attention {
            s = attention.of(&s, cx)?.plus(&s)?;
        }
        let inner = rung.norm.apply(&s)?.matmul_t(&rung.wide.get())?.unary(rung.activation)?;
        Ok(inner.matmul_t(&rung.back.get())?.plus(&s)?)
    }

    fn end(&self, state: Tensor, _out: &Tensor) -> Result<Tensor> {
        self.up.of(&self.norm.apply(&state)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patch};
    use engraft_tensor::testing::{close, sample};

    fn ladder(settings: Value) -> crate::Attached {
        attached(&[chosen("lst", settings)], &[])
    }

    #[test]
    fn count_of_both_forms() {
        // Toy sizes: d 6, two blocks, three heads of 2, no matrix that goes up.
        let (d, w, h, f) = (6, 3, 3, 12);
        let ends = w * (d + 1) + 2 * w + d * (w + 1);
        let mlp = w * (d + 1) + 1 + 2 * w + 2 * f * w;
        let a = ladder(json!({ "reduction": 2, "block": "mlp" }));
        assert_eq!(a.adapter.trained_count(), ends + 2 * mlp);
        let a = ladder(json!({ "reduction": 2, "side_layers": [1] }));
        assert_eq!(a.adapter.trained_count(), ends + mlp + 2 * w + 4 * h * w);
    }

    #[test]
    fn an_open_gate_hides_the_blocks_and_a_shut_one_the_state() {
        let a = ladder(json!({ "reduction": 2 }));
        let (sites, _) = toy();
        let run = |gate: f32, factor: f32| {
            for name in ["side.0.gate", "side.1.gate"] {
                param(&a.adapter, name).set(Tensor::full(gate, [1])).unwrap();
            }
            let cx = Pass::new(Layout::counted(&[3, 2]).unwrap(), None);
            let mut h = sample(&[5, 6], 1);
            for path in ["layers.0", "layers.1"] {
                let site = sites.get(site_id(&sites, path));
                let [Patch::Block(patch)] = a.adapter.at(site.id) else { panic!() };
                h = patch.around(&h, &|x: &Tensor, _: &Pass| Ok(x.scale(factor)?), site, &cx).unwrap();
            }
            h
        };
        close(&run(100.0, 0.3), &run(100.0, 0.7), 1e-5);
        let different = run(0.0, 0.3).sub(&run(0.0, 0.7)).unwrap().to_vec().unwrap();
        assert!(different.iter().any(|v| v.abs() > 1e-3));
        let shut = run(-100.0, 0.3);
        param(&a.adapter, "side.entry.bias").set(Tensor::full(9.0, [3])).unwrap();
        close(&run(-100.0, 0.3), &shut, 0.0);
    }

    #[test]
    fn configurations() {
        let small = json!({ "reduction": 2, "side_layers": [1], "activation": "swish" });
        survives_saving(&[chosen("lst", small)], &["head"]);
        survives_saving(&[chosen("lst", json!({ "reduction": 3, "block": "mlp" }))], &[]);
        let settings = |text: Value| (ENTRY.from_settings)(text.as_object().unwrap());
        assert!(settings(json!({ "side_layers": [] })).is_err());
        let (sites, info) = toy();
        for (wrong, word) in [
            (json!({ "reduction": 7 }), "reduction"),
            (json!({ "side_layers": [2], "reduction": 2 }), "block 2"),
        ] {
            let error = crate::attach(&[chosen("lst", wrong)], &[], &sites, &info, 1).err().unwrap();
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(from_file(&json!({ "peft_type": "ENGRAFT_LST", "block": "lstm" })).is_err());
    }
}
