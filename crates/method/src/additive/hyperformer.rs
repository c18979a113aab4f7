//! Hyperformer: one generator for all tasks and layers writes the weights of adapters after attention and MLP and of the
//! norm behind each.
//!
//! I = LN(W₂·ReLU(W₁·[z_τ; ℓ_i; p_j] + b₁) + b₂), for task τ, layer i and, in Hyperformer++, position j; each of W_d, b_d,
//! W_u, b_u, γ, β is a linear map of I. o ← o + LN_{γ,β}(W_u·σ(W_d·o + b_d) + b_u) on the output of the sublayer, before it
//! joins the stream. Without ++ each of the two positions has generators of its own and p is left out. Encoder and decoder
//! have each a set, the tasks' z are common. The generators start as N(0, 0.01) with zero biases, the embeddings as N(0, 1);
//! γ then is near 0, so that the base is nearly unchanged. The base's norms are trained too.
//!
//! Mahabadi, Ruder, Dehghani and Henderson 2021, arXiv:2106.04489, equations 2 to 6.
//!
//! All names begin with `hypernet.`. z: task_embeddings.weight [tasks, e]. Of each stack S (`encoder`, `decoder`, or none):
//! S.layer_embeddings.weight [layers, e], S.position_embeddings.weight [2, e] (0 the MLP, 1 attention), S.project.0
//! [hidden, 3e or 2e], S.project.2 [p, hidden], S.norm [p], and of each set G of generators (`adapter`, or `mlp` and
//! `attention`) S.G.down [r·d, p], S.G.down_bias [r, p], S.G.up [d·r, p], S.G.up_bias, S.G.gain, S.G.shift [d, p], each with
//! a bias.

use std::sync::Arc;

use engraft_nn::{
    Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, Stack, Sublayer, SublayerPatch,
    Value as Frozen,
};
use engraft_tensor::ops::{Unary, cat, layer_norm};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::activations::Activation;
use crate::shared::fields::{choice, flag, int};
use crate::shared::tasks::{Tasks, task_field, tasks_field};
use crate::{Ahead, Described, Entry, Info, Loaded, Method, peft};

const MAX: usize = 1 << 16;
/// Of the norm on I, and of that behind an adapter.
const EPS: [f32; 2] = [1e-6, 1e-5];

#[derive(Clone, Debug)]
struct Hyperformer {
    tasks: Tasks,
    embedding: usize,
    hidden: usize,
    projection: usize,
    reduction: usize,
    /// One set of generators for both positions (++).
    shared: bool,
    activation: Activation,
    norms: bool,
}

/// The first is the default.
const ACTIVATIONS: &[(&str, Activation)] = &[
    ("gelu", Activation::GELU),
    ("gelu_new", Activation::GELU_NEW),
    ("relu", Activation::RELU),
    ("swish", Activation::SWISH),
];

static INFO: Info = Info {
    name: "hyperformer",
    title: "Hyperformer",
    class: "additive",
    sites: "sublayer, vector",
    paper: "arXiv:2106.04489",
    summary: "adapters after attention and MLP whose weights one generator writes for every task and layer",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_HYPERFORMER",
    fields: &[
        tasks_field("1"),
        task_field(),
        int("reduction", (1, MAX as i64), Some("32"), "Width of the model over width of an adapter."),
        flag("shared", "true", "One set of generators for both positions (Hyperformer++)."),
        int(
            "embedding",
            (1, MAX as i64),
            Some("64"),
            "Width of the embeddings of tasks, layers and positions.",
        ),
        int("hidden", (1, MAX as i64), Some("128"), "Width inside the projection of the embeddings."),
        int("projection", (1, MAX as i64), Some("64"), "Width of what the generators read."),
        choice(
            "activation",
            &["gelu", "gelu_new", "relu", "swish"],
            "\"gelu\"",
            "Function in the middle of an adapter.",
        ),
        flag("norms", "true", "Train the base's norms too."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Hyperformer {
    Hyperformer {
        tasks: Tasks::read(r, ["tasks", "task"], 1),
        embedding: r.count("embedding", 64, MAX),
        hidden: r.count("hidden", 128, MAX),
        projection: r.count("projection", 64, MAX),
        reduction: r.count("reduction", 32, MAX),
        shared: r.flag("shared", true),
        activation: r.one_of("activation", ACTIVATIONS),
        norms: r.flag("norms", true),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    let tasks = Tasks { count: 2, usual: 1 };
    Box::new(Hyperformer {
        tasks,
        embedding: 3,
        hidden: 5,
        projection: 4,
        reduction: 2,
        shared: true,
        activation: Activation::GELU,
        norms: true,
    })
}

/// A linear map of a vector: W [out, in], b `[out]`.
struct Map1 {
    weight: Param,
    bias: Param,
}

impl Map1 {
    fn new(b: &mut Builder<'_>, name: &str, out: usize, inn: usize) -> Result<Map1> {
        Ok(Map1 {
            weight: b.param(&format!("{name}.weight"), &[out, inn], Init::Normal(0.01))?,
            bias: b.param(&format!("{name}.bias"), &[out], Init::Zeros)?,
        })
    }

    /// x [1, in] → [1, out].
    fn of(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul_t(&self.weight.get())?.add(&self.bias.get())?)
    }
}

/// What writes the tensors of one position's adapters.
struct Generators {
    down: Map1,
    down_bias: Map1,
    up: Map1,
    up_bias: Map1,
    gain: Map1,
    shift: Map1,
}

/// One stack's part.
struct Net {
    tasks: Param,
    layers: Param,
    positions: Option<Param>,
    project: [Map1; 2],
    norm: [Param; 2],
    /// By position; both the same where they are shared.
    generators: [Arc<Generators>; 2],
    width: usize,
    inner: usize,
    activation: Activation,
}

impl Net {
    /// I [1, projection] of a task, layer and position.
    fn input(&self, task: usize, layer: usize, position: usize) -> Result<Tensor> {
        let row = |table: &Param, at: usize| table.get().rows_between(at, at + 1);
        let mut parts = vec![row(&self.tasks, task)?, row(&self.layers, layer)?];
        if let Some(positions) = &self.positions {
            parts.push(row(positions, position)?);
        }
        let e = cat(&parts.iter().collect::<Vec<_>>(), 1)?;
        let i = self.project[1].of(&self.project[0].of(&e)?.unary(Unary::Relu)?)?;
        Ok(layer_norm(&i, &self.norm[0].get(), &self.norm[1].get(), EPS[0])?)
    }

    /// What the adapter of a task adds to x [tokens, width].
    fn added(&self, x: &Tensor, task: usize, layer: usize, position: usize) -> Result<Tensor> {
        let (i, g) = (self.input(task, layer, position)?, &self.generators[position]);
        let (d, r) = (self.width, self.inner);
        let inner = x.matmul_t(&g.down.of(&i)?.reshape([r, d])?)?.add(&g.down_bias.of(&i)?)?;
        let outer = self.activation.apply(inner)?.matmul_t(&g.up.of(&i)?.reshape([d, r])?)?;
        let outer = outer.add(&g.up_bias.of(&i)?)?;
        let vector = |map: &Map1| map.of(&i)?.reshape([d]).map_err(Error::from);
        Ok(layer_norm(&outer, &vector(&g.gain)?, &vector(&g.shift)?, EPS[1])?)
    }
}

/// The adapter of one sublayer.
struct Generated {
    net: Arc<Net>,
    layer: usize,
    position: usize,
    tasks: Tasks,
}

impl SublayerPatch for Generated {
    fn output(&self, s: &Sublayer<'_>, _site: &Site, cx: &Pass) -> Result<Tensor> {
        self.tasks.each(&s.output, cx, |task, x| {
            Ok(x.add(&self.net.added(x, task, self.layer, self.position)?)?)
        })
    }
}

/// 0 after the MLP, 1 after self-attention.
fn position(site: &Site) -> Option<usize> {
    match (site.role, &site.kind) {
        (Role::Mlp, Kind::Sublayer { .. }) => Some(0),
        (Role::Attention, Kind::Sublayer { .. }) => Some(1),
        _ => None,
    }
}

impl Hyperformer {
    fn net(
        &self,
        b: &mut Builder<'_>,
        stack: Stack,
        tasks: &Param,
        layers: usize,
        width: usize,
    ) -> Result<Net> {
        let inner = width / self.reduction;
        if inner == 0 {
            return Err(Error::Unsupported(format!(
                "`reduction`: expected at most {width}, the width of the model, found {}",
                self.reduction
            )));
        }
        let name = |part: &str| match stack {
            Stack::Only => format!("hypernet.{part}"),
            Stack::Encoder => format!("hypernet.encoder.{part}"),
            Stack::Decoder => format!("hypernet.decoder.{part}"),
        };
        let (e, p) = (self.embedding, self.projection);
        let parts = if self.shared { 3 } else { 2 };
        let positions =
            self.shared.then(|| b.param(&name("position_embeddings.weight"), &[2, e], Init::Normal(1.0)));
        let set = |b: &mut Builder<'_>, of: &str| -> Result<Arc<Generators>> {
            let mut map = |part: &str, out: usize| Map1::new(b, &name(&format!("{of}.{part}")), out, p);
            Ok(Arc::new(Generators {
                down: map("down", inner * width)?,
                down_bias: map("down_bias", inner)?,
                up: map("up", width * inner)?,
                up_bias: map("up_bias", width)?,
                gain: map("gain", width)?,
                shift: map("shift", width)?,
            }))
        };
        Ok(Net {
            tasks: tasks.clone(),
            layers: b.param(&name("layer_embeddings.weight"), &[layers, e], Init::Normal(1.0))?,
            positions: positions.transpose()?,
            project: [
                Map1::new(b, &name("project.0"), self.hidden, parts * e)?,
                Map1::new(b, &name("project.2"), p, self.hidden)?,
            ],
            norm: [
                b.param(&name("norm.weight"), &[p], Init::Ones)?,
                b.param(&name("norm.bias"), &[p], Init::Zeros)?,
            ],
            generators: if self.shared {
                let one = set(b, "adapter")?;
                [one.clone(), one]
            } else {
                [set(b, "mlp")?, set(b, "attention")?]
            },
            width,
            inner,
            activation: self.activation,
        })
    }
}

impl Method for Hyperformer {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some(
            "(projection + 1)·(2·d·r + r + 3·d) + embedding·(tasks + L + 2) + hidden·(3·embedding + 1) + projection·(hidden + 3) + n, r = ⌊d/reduction⌋",
        )
    }

    fn tasks(&self) -> Option<usize> {
        Some(self.tasks.count)
    }

    fn suits(&self, run: &Ahead) -> Result<()> {
        self.tasks.suit(run)
    }

    fn chosen_in_use(&self) -> &'static [(&'static str, &'static str)] {
        &[("task", "task")]
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let all = b.sites().clone();
        let tasks = b.param(
            "hypernet.task_embeddings.weight",
            &[self.tasks.count, self.embedding],
            Init::Normal(1.0),
        )?;
        for stack in [Stack::Only, Stack::Encoder, Stack::Decoder] {
            let sites: Vec<&Site> =
                all.iter().filter(|s| s.stack == stack && position(s).is_some()).collect();
            let mut blocks: Vec<usize> = sites.iter().filter_map(|s| s.layer).collect();
            blocks.dedup();
            let Some(Kind::Sublayer { width }) = sites.first().map(|s| s.kind.clone()) else { continue };
            let net = Arc::new(self.net(b, stack, &tasks, blocks.len(), width)?);
            for site in sites {
                let Some(layer) = blocks.iter().position(|block| Some(*block) == site.layer) else {
                    continue;
                };
                let Some(position) = position(site) else { continue };
                let patch = Generated { net: net.clone(), layer, position, tasks: self.tasks };
                b.patch(site.id, Patch::Sublayer(Box::new(patch)))?;
            }
        }
        let norms = all.iter().filter(|s| s.role == Role::Norm && matches!(s.value, Frozen::Vector(_)));
        for site in norms.filter(|_| self.norms) {
            b.replace(site.id)?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "activation": self.activation.name(), "embedding": self.embedding, "hidden": self.hidden, "norms": self.norms,
            "projection": self.projection, "reduction": self.reduction, "shared": self.shared,
            "task": self.tasks.usual, "tasks": self.tasks.count,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    const SMALL: &str =
        r#"{ "tasks": 3, "reduction": 2, "embedding": 3, "hidden": 5, "projection": 4, "norms": false }"#;

    fn small(more: Value) -> Value {
        with(serde_json::from_str(SMALL).unwrap(), more)
    }

    #[test]
    fn count_of_the_shared_form() {
        let a = attached(&[chosen("hyperformer", small(json!({})))], &[]);
        let (d, r, e, h, p, layers) = (6, 3, 3, 5, 4, 2);
        let generators = (p + 1) * (2 * d * r + r + 3 * d);
        let rest = e * (3 + layers + 2) + h * (3 * e + 1) + p * (h + 1) + 2 * p;
        assert_eq!(a.adapter.trained_count(), generators + rest);
        let apart = attached(&[chosen("hyperformer", small(json!({ "shared": false })))], &[]);
        let rest = e * (3 + layers) + h * (2 * e + 1) + p * (h + 1) + 2 * p;
        assert_eq!(apart.adapter.trained_count(), 2 * generators + rest);
    }

    #[test]
    fn rows_of_two_tasks_have_what_each_has_alone() {
        let a = attached(&[chosen("hyperformer", small(json!({})))], &[]);
        stir(&a, 0.5);
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "layers.1.output_adapters"));
        let [Patch::Sublayer(patch)] = a.adapter.at(site.id) else { panic!() };
        let (x, rows) = (sample(&[5, 6], 1), |from, to| sample(&[5, 6], 1).rows_between(from, to).unwrap());
        let run = |x: &Tensor, lengths: &[usize], tasks: &[usize]| {
            let cx = Pass::new(Layout::counted(lengths).unwrap().with_tasks(tasks.to_vec()), None);
            let s = Sublayer { residual: x, input: x, output: x.clone(), norm: None };
            patch.output(&s, site, &cx).unwrap()
        };
        let both = run(&x, &[2, 3], &[2, 0]);
        close(&both.rows_between(0, 2).unwrap(), &run(&rows(0, 2), &[2], &[2]), 1e-6);
        close(&both.rows_between(2, 5).unwrap(), &run(&rows(2, 5), &[3], &[0]), 1e-6);
        let other = run(&x, &[2, 3], &[1, 0])
            .rows_between(0, 2)
            .unwrap()
            .sub(&both.rows_between(0, 2).unwrap())
            .unwrap();
        assert!(other.to_vec().unwrap().iter().any(|v| v.abs() > 1e-3), "tasks differ");
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("hyperformer", small(json!({ "norms": true })))], &["head"]);
        survives_saving(
            &[chosen("hyperformer", small(json!({ "shared": false, "activation": "relu" })))],
            &[],
        );
        let settings = |text: Value| (ENTRY.from_settings)(text.as_object().unwrap());
        assert!(settings(json!({ "tasks": 2, "task": 2 })).is_err());
        assert!(from_file(&json!({ "peft_type": "ENGRAFT_HYPERFORMER", "odd": 1 })).is_err());
    }
}
