//! PHA, prototype-based hyperadapters: adapters beside the MLP, in the decoder written by a generator from a task's prototype.
//!
//! y = x + MLP(n) + A(n), n what the MLP reads, A(n) = W_u·ReLU(W_d·n + b_d) + b_u. In an encoder W and b are trained themselves. In a
//! decoder, and in models of one stack, they are linear maps of I = LN(W₂·ReLU(W₁·[p_τ; ℓ_i] + c₁) + c₂), p_τ the prototype of the
//! row's task, ℓ_i the code of layer i. In training a sequence's key z, a perceptron on the mean of the encoder's output (of one
//! stack: of the last block's), brings two terms along, cosines over τ = 0.1:
//! c·mean_i −mean_{j: same task}(z_i·z_j − ln Σ_{k≠i} e^{z_i·z_k}) + c·mean_i −(z_i·p_{t_i} − ln Σ_{t≠t_i} e^{z_i·p_t}),
//! the second sum without the row's own task, as in the authors' code. The first takes rows that have a mate, the second needs
//! two tasks. The generator starts near zero and the encoder's adapters too, so that the base is nearly unchanged.
//!
//! Zhao, Fu and He 2023, arXiv:2310.11670.
//!
//! All names begin with `pha.`: task_embeddings.weight [tasks, e], layer_embeddings.weight [layers, e], project.0 [hidden, 2e],
//! project.2 [p, hidden], norm `[p]`, down [d·r, p], down_bias [r, p], up [r·d, p], up_bias [d, p], key.0 [hidden, d], key.2 [e, hidden]
//! (each .weight and .bias), and of the encoder's block i encoder.i.down [r, d], encoder.i.up [d, r]. As in the authors' files W_d is
//! written as [d, r] and W_u as [r, d].

use std::sync::Arc;

use engraft_nn::{
    Base, BlockPatch, Builder, Error, Init, Kind, Mode, Pass, Patch, Result, Role, Site, Stack, Sublayer,
    SublayerPatch, WeightPatch,
};
use engraft_tensor::ops::{Unary, cat, layer_norm};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::dense::Dense;
use crate::shared::fields::{float, int};
use crate::shared::sequences::means;
use crate::shared::tasks::{Tasks, task_field, tasks_field};
use crate::{Ahead, Described, Entry, Info, Loaded, Method, peft};

const MAX: usize = 1 << 16;
/// Of the norm on I.
const EPS: f32 = 1e-6;
const TEMPERATURE: f32 = 0.1;

#[derive(Clone, Debug)]
struct Pha {
    tasks: Tasks,
    bottleneck: usize,
    embedding: usize,
    hidden: usize,
    projection: usize,
    /// Weight of each of the two terms.
    contrast: f64,
}

static INFO: Info = Info {
    name: "pha",
    title: "PHA",
    class: "additive",
    sites: "sublayer, block, weight",
    paper: "arXiv:2310.11670",
    summary: "adapters beside the MLP, written from a prototype of the task that contrasts with those of others",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_PHA",
    fields: &[
        tasks_field("1"),
        task_field(),
        int("bottleneck", (1, MAX as i64), Some("64"), "Inner width of an adapter."),
        int("embedding", (1, MAX as i64), Some("64"), "Width of prototypes, layer codes and keys."),
        int("hidden", (1, MAX as i64), Some("128"), "Width inside the two perceptrons."),
        int("projection", (1, MAX as i64), Some("64"), "Width of what the generator reads."),
        float("contrast", (0.0, 1e3), "0.1", "Weight of each of the two contrastive terms."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Pha {
    let method = Pha {
        tasks: Tasks::read(r, ["tasks", "task"], 1),
        bottleneck: r.count("bottleneck", 64, MAX),
        embedding: r.count("embedding", 64, MAX),
        hidden: r.count("hidden", 128, MAX),
        projection: r.count("projection", 64, MAX),
        contrast: r.float("contrast", 0.1),
    };
    if !(0.0..=1e3).contains(&method.contrast) {
        r.problem(format!("`contrast`: expected 0 to 1000, found {}", method.contrast));
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
    let tasks = Tasks { count: 2, usual: 1 };
    Box::new(Pha { tasks, bottleneck: 3, embedding: 4, hidden: 12, projection: 9, contrast: 0.0 })
}

/// Uniform as the authors' generators start: ±10⁻³·√(3/(64·fan)).
fn near_zero(inn: usize, fan: usize) -> [Init; 2] {
    [Init::Uniform(1e-3 * (3.0 / (inn * fan) as f32).sqrt()), Init::Zeros]
}

/// The generator, common to all layers.
struct Net {
    prototypes: Param,
    layers: Param,
    project: [Dense; 2],
    norm: [Param; 2],
    down: Dense,
    down_bias: Dense,
    up: Dense,
    up_bias: Dense,
    /// Widths of the stream and of an adapter.
    sizes: (usize, usize),
}

impl Net {
    /// A(x) of a task and layer.
    fn added(&self, x: &Tensor, task: usize, layer: usize) -> Result<Tensor> {
        let row = |table: &Param, at: usize| table.get().rows_between(at, at + 1);
        let code = cat(&[&row(&self.prototypes, task)?, &row(&self.layers, layer)?], 1)?;
        let i = self.project[1].of(&self.project[0].of(&code)?.unary(Unary::Relu)?)?;
        let i = layer_norm(&i, &self.norm[0].get(), &self.norm[1].get(), EPS)?;
        let (d, r) = self.sizes;
        let inner = x.matmul(&self.down.of(&i)?.reshape([d, r])?)?.plus(&self.down_bias.of(&i)?)?;
        let inner = inner.unary(Unary::Relu)?;
        Ok(inner.matmul(&self.up.of(&i)?.reshape([r, d])?)?.plus(&self.up_bias.of(&i)?)?)
    }
}

/// The adapter of one sublayer.
enum Beside {
    Own { down: Dense, up: Dense },
    Generated { net: Arc<Net>, layer: usize, tasks: Tasks },
}

impl SublayerPatch for Beside {
    fn output(&self, s: &Sublayer<'_>, _site: &Site, cx: &Pass) -> Result<Tensor> {
        let added = match self {
            Beside::Own { down, up } => up.of(&down.of(s.input)?.unary(Unary::Relu)?)?,
            Beside::Generated { net, layer, tasks } => {
                tasks.each(s.input, cx, |task, x| net.added(x, task, *layer))?
            }
        };
        Ok(added.plus(&s.output)?)
    }
}

/// What makes a key of a sequence, and the terms that keys and prototypes bring along.
struct Keys {
    layers: [Dense; 2],
    prototypes: Param,
    tasks: Tasks,
    contrast: f32,
}

impl Keys {
    /// The states of the sequences [tokens, width], bringing the terms along in training.
    fn seen(&self, states: &Tensor, cx: &Pass) -> Result<Tensor> {
        if self.contrast == 0.0 || matches!(cx.mode(), Mode::Eval) {
            return Ok(states.clone());
        }
        let keys = self.layers[1].of(&self.layers[0].of(&means(states, cx)?)?.unary(Unary::Relu)?)?;
        let tasks = self.tasks.of(cx)?;
        let (keys, prototypes) = (unit(&keys)?, unit(&self.prototypes.get())?);
        let terms = [among_rows(&keys, &tasks)?, to_prototypes(&keys, &prototypes, &tasks)?];
        let mut states = states.clone();
        for term in terms.into_iter().flatten() {
            states = states.carrying(&term.scale(self.contrast * cx.share())?)?;
        }
        Ok(states)
    }
}

/// Rows of length one.
fn unit(x: &Tensor) -> Result<Tensor> {
    let squares = x.unary(Unary::Square)?.sum_to(&[x.dim(0), 1])?;
    Ok(x.mul(&squares.unary(Unary::Sqrt)?.unary(Unary::Recip)?)?)
}

/// −Σ_j w_ij·(s_ij − ln Σ_k m_ik·e^{s_ik}), s = a·bᵀ/τ, for the rows' weights w and masks m.
fn contrast(a: &Tensor, b: &Tensor, weights: Vec<f32>, mask: Vec<f32>) -> Result<Tensor> {
    let shape = [a.dim(0), b.dim(0)];
    let s = a.matmul_t(b)?.scale(1.0 / TEMPERATURE)?;
    let others = s.unary(Unary::Exp)?.mul(&Tensor::from_vec(mask, shape)?)?.sum_to(&[shape[0], 1])?;
    let terms = s.sub(&others.unary(Unary::Log)?)?.mul(&Tensor::from_vec(weights, shape)?)?;
    Ok(terms.sum()?.scale(-1.0)?)
}

/// The first term: rows of one task are alike. `None` where no row has a mate.
fn among_rows(keys: &Tensor, tasks: &[usize]) -> Result<Option<Tensor>> {
    let n = tasks.len();
    let mates = |i: usize| (0..n).filter(|&j| j != i && tasks[j] == tasks[i]).count();
    let with_mates = (0..n).filter(|&i| mates(i) > 0).count();
    if with_mates == 0 {
        return Ok(None);
    }
    let (mut weights, mut mask) = (vec![0.0; n * n], vec![1.0; n * n]);
    for i in 0..n {
        mask[i * n + i] = 0.0;
        for j in (0..n).filter(|&j| j != i && tasks[j] == tasks[i]) {
            weights[i * n + j] = 1.0 / (mates(i) * with_mates) as f32;
        }
    }
    contrast(keys, keys, weights, mask).map(Some)
}

/// The second term: a row is like its task's prototype. `None` where there is one task.
fn to_prototypes(keys: &Tensor, prototypes: &Tensor, tasks: &[usize]) -> Result<Option<Tensor>> {
    let (n, count) = (tasks.len(), prototypes.dim(0));
    if count == 1 {
        return Ok(None);
    }
    let (mut weights, mut mask) = (vec![0.0; n * count], vec![1.0; n * count]);
    for (i, task) in tasks.iter().enumerate() {
        weights[i * count + task] = 1.0 / n as f32;
        mask[i * count + task] = 0.0;
    }
    contrast(keys, prototypes, weights, mask).map(Some)
}

/// At the first matrix that reads the encoder's output.
impl WeightPatch for Keys {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }
    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, cx: &Pass) -> Result<Tensor> {
        base.forward(&self.seen(x, cx)?)
    }
    fn mergeable(&self) -> bool {
        false
    }
}

/// At the last block of a single stack.
impl BlockPatch for Keys {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        _site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        self.seen(&run(h, cx)?, cx)
    }
}

impl Pha {
    fn net(&self, b: &mut Builder<'_>, layers: usize, width: usize) -> Result<Net> {
        let (e, p, r) = (self.embedding, self.projection, self.bottleneck);
        let prototypes = b.param("pha.task_embeddings.weight", &[self.tasks.count, e], Init::Normal(1.0))?;
        let codes = b.param("pha.layer_embeddings.weight", &[layers, e], Init::Normal(1.0))?;
        let mut head = |part: &str, out: usize, fan: usize| {
            Dense::starting(b, &format!("pha.{part}"), (p, out), near_zero(p, fan))
        };
        let (down, down_bias) = (head("down", width * r, width)?, head("down_bias", r, 1)?);
        let (up, up_bias) = (head("up", r * width, r)?, head("up_bias", width, 1)?);
        Ok(Net {
            prototypes,
            layers: codes,
            project: [
                Dense::new(b, "pha.project.0", (2 * e, self.hidden))?,
                Dense::new(b, "pha.project.2", (self.hidden, p))?,
            ],
            norm: [
                b.param("pha.norm.weight", &[p], Init::Ones)?,
                b.param("pha.norm.bias", &[p], Init::Zeros)?,
            ],
            down,
            down_bias,
            up,
            up_bias,
            sizes: (width, r),
        })
    }

    fn own(&self, b: &mut Builder<'_>, layer: usize, width: usize) -> Result<Beside> {
        let bound = 1e-4 * (6.0 / (width + self.bottleneck) as f32).sqrt();
        let start = || [Init::Uniform(bound), Init::Zeros];
        let (r, name) = (self.bottleneck, |part: &str| format!("pha.encoder.{layer}.{part}"));
        Ok(Beside::Own {
            down: Dense::starting(b, &name("down"), (width, r), start())?,
            up: Dense::starting(b, &name("up"), (r, width), start())?,
        })
    }
}

impl Method for Pha {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some(
            "embedding·(tasks + L) + hidden·(2·embedding + 1) + projection·(hidden + 3) + (projection + 1)·(2·d·bottleneck + bottleneck + d) + hidden·(d + 1) + embedding·(hidden + 1)",
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

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let all = b.sites().clone();
        let is_mlp = |s: &&Site| s.role == Role::Mlp && matches!(s.kind, Kind::Sublayer { .. });
        let decodes = all.iter().any(|s| s.stack == Stack::Decoder);
        let (written, own): (Vec<&Site>, Vec<&Site>) =
            all.iter().filter(is_mlp).partition(|s| !decodes || s.stack == Stack::Decoder);
        let Some(&Kind::Sublayer { width }) = written.first().map(|s| &s.kind) else {
            return Err(Error::Unsupported("PHA needs a model whose blocks have an MLP".into()));
        };
        let net = Arc::new(self.net(b, written.len(), width)?);
        for (layer, site) in written.iter().enumerate() {
            let patch = Beside::Generated { net: net.clone(), layer, tasks: self.tasks };
            b.patch(site.id, Patch::Sublayer(Box::new(patch)))?;
        }
        for (layer, site) in own.iter().enumerate() {
            let patch = self.own(b, layer, width)?;
            b.patch(site.id, Patch::Sublayer(Box::new(patch)))?;
        }
        let keys = Keys {
            layers: [
                Dense::new(b, "pha.key.0", (width, self.hidden))?,
                Dense::new(b, "pha.key.2", (self.hidden, self.embedding))?,
            ],
            prototypes: net.prototypes.clone(),
            tasks: self.tasks,
            contrast: self.contrast as f32,
        };
        let reads = all.iter().find(|s| s.role == Role::CrossK && s.is_weight());
        let last = all.iter().filter(|s| matches!(s.kind, Kind::Block { .. })).last();
        match (reads, last) {
            (Some(site), _) => b.patch(site.id, Patch::Weight(Box::new(keys))),
            (None, Some(site)) => b.patch(site.id, Patch::Block(Box::new(keys))),
            (None, None) => Err(Error::Unsupported("PHA needs a model with blocks".into())),
        }
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "bottleneck": self.bottleneck, "contrast": self.contrast, "embedding": self.embedding, "hidden": self.hidden,
            "projection": self.projection, "task": self.tasks.usual, "tasks": self.tasks.count,
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

    fn small(more: Value) -> Value {
        with(json!({ "tasks": 3, "bottleneck": 2, "embedding": 3, "hidden": 5, "projection": 4 }), more)
    }

    #[test]
    fn count() {
        let a = attached(&[chosen("pha", small(json!({})))], &[]);
        let (d, r, e, h, p, layers) = (6, 2, 3, 5, 4, 2);
        let generator = h * (2 * e + 1) + p * (h + 1) + 2 * p + (p + 1) * (2 * d * r + r + d);
        let keys = h * (d + 1) + e * (h + 1);
        assert_eq!(a.adapter.trained_count(), e * (3 + layers) + generator + keys);
    }

    #[test]
    fn a_task_and_a_layer_have_one_adapter_wherever_their_rows_lie() {
        let a = attached(&[chosen("pha", small(json!({})))], &[]);
        stir(&a, 0.5);
        let (sites, _) = toy();
        let x = sample(&[5, 6], 1);
        let run = |layer: usize, x: &Tensor, lengths: &[usize], tasks: &[usize]| {
            let site = sites.get(site_id(&sites, &format!("layers.{layer}.output_adapters")));
            let [Patch::Sublayer(patch)] = a.adapter.at(site.id) else { panic!() };
            let cx = Pass::new(Layout::counted(lengths).unwrap().with_tasks(tasks.to_vec()), None);
            let s = Sublayer { residual: x, input: x, output: Tensor::zeros(x.shape()), norm: None };
            patch.output(&s, site, &cx).unwrap()
        };
        let part = |t: &Tensor, from, to| t.rows_between(from, to).unwrap();
        let both = run(1, &x, &[2, 3], &[2, 0]);
        let swapped = run(1, &x, &[2, 3], &[0, 2]);
        close(&part(&both, 0, 2), &run(1, &part(&x, 0, 2), &[2], &[2]), 1e-6);
        close(&part(&swapped, 2, 5), &run(1, &part(&x, 2, 5), &[3], &[2]), 1e-6);
        let differ =
            |a: &Tensor, b: &Tensor| a.sub(b).unwrap().to_vec().unwrap().iter().any(|v| v.abs() > 1e-3);
        assert!(differ(&both, &swapped), "tasks differ");
        assert!(differ(&both, &run(0, &x, &[2, 3], &[2, 0])), "layers differ");
    }

    /// The two terms, a row at a time in f64.
    fn expected(z: &[Vec<f64>], p: &[Vec<f64>], tasks: &[usize]) -> [f64; 2] {
        let cos = |a: &[f64], b: &[f64]| {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt() / 0.1
        };
        let (n, mut among, mut with_mates, mut to) = (z.len(), 0.0, 0.0, 0.0);
        for i in 0..n {
            let others: Vec<usize> = (0..n).filter(|&j| j != i).collect();
            let below = others.iter().map(|&k| cos(&z[i], &z[k]).exp()).sum::<f64>().ln();
            let mates: Vec<f64> = others
                .iter()
                .filter(|&&j| tasks[j] == tasks[i])
                .map(|&j| below - cos(&z[i], &z[j]))
                .collect();
            if !mates.is_empty() {
                among += mates.iter().sum::<f64>() / mates.len() as f64;
                with_mates += 1.0;
            }
            let rest = (0..p.len()).filter(|&t| t != tasks[i]);
            let below = rest.map(|t| cos(&z[i], &p[t]).exp()).sum::<f64>().ln();
            to += (below - cos(&z[i], &p[tasks[i]])) / n as f64;
        }
        [among / with_mates, to]
    }

    #[test]
    fn terms_pull_rows_to_their_mates_and_prototypes() {
        let (keys, prototypes) = (sample(&[5, 4], 1), sample(&[3, 4], 2));
        let tasks = [2, 0, 2, 1, 2];
        let rows = |t: &Tensor| -> Vec<Vec<f64>> {
            let values = t.to_vec().unwrap();
            values.chunks(4).map(|row| row.iter().map(|&v| f64::from(v)).collect()).collect()
        };
        let [among, to] = expected(&rows(&keys), &rows(&prototypes), &tasks);
        let (z, p) = (unit(&keys).unwrap(), unit(&prototypes).unwrap());
        close(&among_rows(&z, &tasks).unwrap().unwrap(), &Tensor::scalar(among as f32), 1e-5);
        close(&to_prototypes(&z, &p, &tasks).unwrap().unwrap(), &Tensor::scalar(to as f32), 1e-5);
        assert!(among_rows(&z, &[0, 1, 2, 3, 4]).unwrap().is_none(), "no row has a mate");
        let one = p.rows_between(0, 1).unwrap();
        assert!(to_prototypes(&z, &one, &[0; 5]).unwrap().is_none(), "there is no other task");
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("pha", small(json!({})))], &["head"]);
        let settings = |text: Value| (ENTRY.from_settings)(text.as_object().unwrap());
        assert!(settings(json!({ "tasks": 2, "task": 2 })).is_err());
        assert!(settings(json!({ "contrast": -1.0 })).is_err());
        assert!(from_file(&json!({ "peft_type": "ENGRAFT_PHA", "odd": 1 })).is_err());
    }
}
