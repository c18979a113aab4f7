//! ProPETL: one small module, the prototype, shared by all layers and tasks; each layer uses the part of it that a binary mask
//! of its own keeps, and with several tasks also what the task's mask, one for all layers, keeps.
//!
//! Φⱼ = Φ ⊙ mⱼ, for task t Φ ⊙ (mⱼ ∨ mₜ) with 1 − (1 − mⱼ)·(1 − mₜ) for gradients. A mask keeps the share `keep` of the entries of each matrix, those of the largest |score|. Scores are trained with
//! the mask's gradient as it is (straight through the choice) and are not needed afterwards. Φ is
//!   adapter  a bottleneck after the MLP, h ← h + W_u·ReLU(W_d·x + b_d) + b_u, x the normed sum of stream and output; biases
//!            have no masks
//!   lora     B·A for each kind of target, y = x·Wᵀ + α/r·x·(A ⊙ m)ᵀ·(B ⊙ m)ᵀ
//!   prefix   keys and values [tokens, 2·kv_heads·dim] before those of every attention, whose tokens keep their positions
//!
//! Zeng et al. 2023, arXiv:2305.17682; starts, rates and the number of kept entries, n − ⌊(1 − keep)·n⌋, as in the authors'
//! code.
//! The prefix is trained as it is, without a network that makes it.
//!
//! prototype.adapter_down.weight and so on, prototype.ROLE_OUTxIN.lora_A and .lora_B, or prototype.prefix; in files
//! PATH.PART.mask and, of several tasks, prototype.PART.task_T.mask, bits. While training .mask_scores, of the matrix's shape,
//! Kaiming-uniform.

mod masks;

use std::collections::HashMap;
use std::sync::Arc;

use engraft_nn::{
    Base, Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Pass, Patch, Result, Role, Site, Sites,
    Stack, Sublayer, SublayerPatch, Targets, WeightPatch,
};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use self::masks::{Mask, Masked, Prototype, chosen};
use crate::prompts::prompt::TOKENS_MAX;
use crate::read::{Reader, number};
use crate::shared::bits::{Bits, MASK, pack};
use crate::shared::fields::{choice, float, int};
use crate::shared::low_rank::{RANK_MAX, added, changed, linear};
use crate::shared::tasks::{Tasks, task_field, tasks_field};
use crate::{Ahead, Described, Entry, Field, FieldKind, Info, Loaded, Method, Named, Stored, peft};

const SCORES: &str = ".mask_scores";
const GROUP: &str = "mask";

#[derive(Clone, Debug)]
struct Propetl {
    form: Form,
    tasks: Tasks,
    keep: f64,
    reduction: f64,
    rank: usize,
    alpha: f64,
    tokens: usize,
    mask_rate: f64,
    /// Masks come from a file and stay.
    saved: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Adapter,
    Lora,
    Prefix,
}

const FORMS: &[(&str, Form)] = &[("adapter", Form::Adapter), ("lora", Form::Lora), ("prefix", Form::Prefix)];

static INFO: Info = Info {
    name: "propetl",
    title: "ProPETL",
    class: "hybrid",
    sites: "sublayer, weight, or keys and values",
    paper: "arXiv:2305.17682",
    summary: "one module shared by all layers, each of which keeps a part of it by a binary mask",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_PROPETL",
    fields: &[
        choice("form", &["adapter", "lora", "prefix"], "\"adapter\"", "What is shared."),
        tasks_field("1"),
        task_field(),
        Field {
            name: "keep",
            kind: FieldKind::Float { min: 0.0, max: 1.0 },
            default: None,
            doc: "Share of the entries that a layer keeps; 0.5 of an adapter, 0.1 of a LoRA or a prefix.",
        },
        float("reduction", (1.0, 1e6), "12", "Width of the model over width of the bottleneck (adapter)."),
        int("rank", (1, RANK_MAX as i64), Some("32"), "Inner size of the product (lora)."),
        float("alpha", (0.0, 1e9), "48", "The product is scaled by alpha/rank (lora)."),
        int(
            "tokens",
            (1, TOKENS_MAX as i64),
            Some("64"),
            "Number of extra keys and values in a layer (prefix).",
        ),
        Field {
            name: "mask_rate",
            kind: FieldKind::Float { min: 0.0, max: 1e6 },
            default: None,
            doc: "Learning rate of the scores over that of the prototype; 30 of an adapter, 300 of a LoRA, 1 of a prefix.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Propetl {
    let form = r.one_of("form", FORMS);
    let (keep, rate) = match form {
        Form::Adapter => (0.5, 30.0),
        Form::Lora => (0.1, 300.0),
        Form::Prefix => (0.1, 1.0),
    };
    Propetl {
        form,
        tasks: Tasks::read(r, ["tasks", "task"], 1),
        keep: r.share("keep", keep),
        reduction: r.reduction("reduction", 12.0),
        rank: r.count("rank", 32, RANK_MAX),
        alpha: r.float("alpha", 48.0),
        tokens: r.count("tokens", 64, TOKENS_MAX),
        mask_rate: r.float("mask_rate", rate),
        saved: false,
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| Propetl { saved: true, ..read(r) })
}

fn example() -> Box<dyn Method> {
    Box::new(Propetl {
        form: Form::Adapter,
        tasks: Tasks { count: 2, usual: 1 },
        keep: 0.5,
        reduction: 4.0,
        rank: 2,
        alpha: 4.0,
        tokens: 3,
        mask_rate: 1.0,
        saved: false,
    })
}

impl Method for Propetl {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some(
            "2·d·r + r + d + 2·L·d·r, r = ⌊d/reduction⌋; the last term are the scores of masks, of which files hold bits",
        )
    }

    fn tasks(&self) -> Option<usize> {
        (self.tasks.count > 1).then_some(self.tasks.count)
    }

    fn suits(&self, run: &Ahead) -> Result<()> {
        self.tasks.suit(run)
    }

    fn chosen_in_use(&self) -> &'static [(&'static str, &'static str)] {
        &[("task", "task")]
    }

    fn by_layers(&self) -> bool {
        self.form != Form::Lora
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        match self.form {
            Form::Adapter => self.adapters(b),
            Form::Lora => self.loras(b),
            Form::Prefix => self.prefixes(b),
        }
    }

    fn default_targets(&self, sites: &Sites) -> Option<Targets> {
        let parted = sites.iter().any(|s| s.role == Role::Q);
        let roles: &[Role] = if parted { &[Role::Q, Role::V] } else { &[Role::Qkv] };
        (self.form == Form::Lora).then(|| Targets::roles(roles))
    }

    fn learning_rate_factor(&self, group: &str) -> f32 {
        if group == GROUP { self.mask_rate as f32 } else { 1.0 }
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let form = FORMS.iter().find(|f| f.1 == self.form).map_or("adapter", |f| f.0);
        let mut own = json!({
            "alpha": number(self.alpha), "form": form, "keep": self.keep, "mask_rate": number(self.mask_rate),
            "rank": self.rank, "reduction": number(self.reduction), "tokens": self.tokens,
        });
        if self.tasks.count > 1 {
            own["tasks"] = json!(self.tasks.count);
            own["task"] = json!(self.tasks.usual);
        }
        own.as_object().cloned().unwrap_or_default()
    }

    /// Bits in the place of scores.
    fn file_tensors(&self, mut tensors: Named, state: &Named) -> Result<Named> {
        for (name, scores) in state {
            if let Some(stem) = name.strip_suffix(SCORES) {
                let ones = chosen(scores, self.kept(scores.len()))?.to_vec()?;
                let bits: Vec<bool> = ones.iter().map(|one| *one == 1.0).collect();
                tensors.push((format!("{stem}{MASK}"), pack(&bits)?));
            }
        }
        Ok(tensors)
    }

    fn stored_as(&self, key: &str) -> Stored {
        if key.ends_with(MASK) { Stored::U8 } else { Stored::F32 }
    }
}

impl Propetl {
    /// How many of n entries a mask keeps.
    fn kept(&self, n: usize) -> usize {
        (n - ((1.0 - self.keep) * n as f64) as usize).max(1)
    }

    /// The mask of one matrix of one layer.
    fn mask(&self, b: &mut Builder<'_>, name: &str, shape: &[usize]) -> Result<Mask> {
        if self.saved {
            return Ok(Mask::Saved(Bits::new(b, name, shape)?));
        }
        let start = Init::kaiming(shape.last().copied().unwrap_or(1));
        let scores = b.working(&format!("{name}{SCORES}"), shape, start, GROUP)?;
        Ok(Mask::trained(scores, self.kept(shape.iter().product())))
    }

    /// A matrix for all layers, with the masks of the tasks.
    fn prototype(&self, b: &mut Builder<'_>, name: &str, shape: &[usize], init: Init) -> Result<Prototype> {
        let name = format!("prototype.{name}");
        let values = b.param(&name, shape, init)?;
        let stem = name.strip_suffix(".weight").unwrap_or(&name);
        let count = if self.tasks.count > 1 { self.tasks.count } else { 0 };
        let of_task = |task| Ok(Arc::new(self.mask(b, &format!("{stem}.task_{task}"), shape)?));
        Ok(Prototype { values, tasks: (0..count).map(of_task).collect::<Result<_>>()? })
    }

    /// What the layer's matrix at `path` has of it.
    fn masked(&self, b: &mut Builder<'_>, prototype: &Prototype, path: &str) -> Result<Masked> {
        let shape = prototype.values.value().shape().to_vec();
        Ok(Masked { prototype: prototype.clone(), layer: self.mask(b, path, &shape)? })
    }

    fn adapters(&self, b: &mut Builder<'_>) -> Result<()> {
        let of = |s: &Site| match s.kind {
            Kind::Sublayer { width } if s.role == Role::Mlp => Some((s.id, s.path.clone(), width)),
            _ => None,
        };
        let places: Vec<_> = b.sites().iter().filter_map(of).collect();
        let Some(&(_, _, width)) = places.first() else {
            return Err(Error::Unsupported("ProPETL's adapters need a model with MLPs".into()));
        };
        let inner = ((width as f64 / self.reduction).floor() as usize).max(1);
        let down = self.prototype(b, "adapter_down.weight", &[inner, width], Init::Normal(0.02))?;
        let down_bias = b.param("prototype.adapter_down.bias", &[inner], Init::Zeros)?;
        let up = self.prototype(b, "adapter_up.weight", &[width, inner], Init::Normal(0.02))?;
        let up_bias = b.param("prototype.adapter_up.bias", &[width], Init::Zeros)?;
        for (site, path, _) in places {
            let adapter = MaskedAdapter {
                down: self.masked(b, &down, &format!("{path}.adapter_down"))?,
                up: self.masked(b, &up, &format!("{path}.adapter_up"))?,
                biases: [down_bias.clone(), up_bias.clone()],
                tasks: self.tasks,
            };
            b.patch(site, Patch::Sublayer(Box::new(adapter)))?;
        }
        Ok(())
    }

    fn loras(&self, b: &mut Builder<'_>) -> Result<()> {
        let mut prototypes: HashMap<String, [Prototype; 2]> = HashMap::new();
        for site in b.targets() {
            let (out, inn) = linear(site, INFO.title)?;
            let key = format!("{}_{out}x{inn}", site.role.name());
            if !prototypes.contains_key(&key) {
                let (name_a, name_b) = (format!("{key}.lora_A"), format!("{key}.lora_B"));
                let pair = [
                    self.prototype(b, &name_a, &[self.rank, inn], Init::kaiming(inn))?,
                    self.prototype(b, &name_b, &[out, self.rank], Init::Zeros)?,
                ];
                prototypes.insert(key.clone(), pair);
            }
            let [a, up] = &prototypes[&key];
            let lora = MaskedLora {
                a: self.masked(b, a, &format!("{}.lora_A", site.path))?,
                b: self.masked(b, up, &format!("{}.lora_B", site.path))?,
                tasks: self.tasks,
                scale: (self.alpha / self.rank as f64) as f32,
            };
            b.patch(site.id, Patch::Weight(Box::new(lora)))?;
        }
        Ok(())
    }

    fn prefixes(&self, b: &mut Builder<'_>) -> Result<()> {
        let of = |s: &Site| match s.kind {
            Kind::KeyValue { heads, dim } if s.stack == Stack::Only => {
                Some((s.id, s.path.clone(), heads, dim))
            }
            _ => None,
        };
        let places: Vec<_> = b.sites().iter().filter_map(of).collect();
        let Some(&(_, _, heads, dim)) = places.first() else {
            let text =
                "ProPETL's prefix needs a model with one stack and attention; choose `form = \"adapter\"`";
            return Err(Error::Unsupported(text.into()));
        };
        let prototype = self.prototype(b, "prefix", &[self.tokens, 2 * heads * dim], Init::Normal(1.0))?;
        for (site, path, heads, dim) in places {
            let part = self.masked(b, &prototype, &format!("{path}.prefix"))?;
            let prefix = MaskedPrefix { part, tasks: self.tasks, heads, dim };
            b.patch(site, Patch::KeyValue(Box::new(prefix)))?;
        }
        Ok(())
    }
}

/// The adapter of one layer: W_d, W_u, and b_d, b_u of all.
struct MaskedAdapter {
    down: Masked,
    up: Masked,
    biases: [Param; 2],
    tasks: Tasks,
}

impl SublayerPatch for MaskedAdapter {
    fn output(&self, s: &Sublayer<'_>, _site: &Site, cx: &Pass) -> Result<Tensor> {
        let [down_bias, up_bias] = &self.biases;
        let sum = s.output.add(s.residual)?;
        let x = s.norm.map_or_else(|| Ok(sum.clone()), |norm| norm(&sum))?;
        let added = self.tasks.each(&x, cx, |task, x| {
            let inner = x.matmul_t(&self.down.of(task)?)?.plus(&down_bias.get())?.unary(Unary::Relu)?;
            Ok(inner.matmul_t(&self.up.of(task)?)?.plus(&up_bias.get())?)
        })?;
        Ok(added.plus(&s.output)?)
    }
}

/// The LoRA of one matrix.
struct MaskedLora {
    a: Masked,
    b: Masked,
    tasks: Tasks,
    scale: f32,
}

impl WeightPatch for MaskedLora {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let task = self.tasks.usual;
        changed(base, &self.a.of(task)?, &self.b.of(task)?, self.scale)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, cx: &Pass) -> Result<Tensor> {
        let y = base.forward(x)?;
        if self.tasks.count == 1 {
            return added(y, x, &self.a.of(0)?, &self.b.of(0)?, self.scale);
        }
        let change = self.tasks.each(x, cx, |task, x| {
            Ok(x.matmul_t(&self.a.of(task)?)?.matmul_t(&self.b.of(task)?)?.scale(self.scale)?)
        })?;
        Ok(y.plus(&change)?)
    }
}

/// The prefix of one attention: keys beside values.
struct MaskedPrefix {
    part: Masked,
    tasks: Tasks,
    heads: usize,
    dim: usize,
}

impl KeyValuePatch for MaskedPrefix {
    fn count(&self) -> usize {
        self.part.prototype.values.value().dim(0)
    }

    fn rows(&self, _input: &Tensor, cx: &Pass) -> Result<KeyValues> {
        let mut tasks = self.tasks.of(cx)?;
        if tasks.iter().all(|task| Some(task) == tasks.first()) {
            // One prefix for all sequences.
            tasks.truncate(1);
        }
        let rows = tasks.iter().map(|&task| self.part.of(task)).collect::<Result<Vec<_>>>()?;
        let rows = cat(&rows.iter().collect::<Vec<_>>(), 0)?;
        let width = self.heads * self.dim;
        let part = |first: usize| rows.narrow(1, first, width)?.reshape([rows.dim(0), self.heads, self.dim]);
        Ok(KeyValues { keys: part(0)?, values: part(width)? })
    }

    fn moves(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;
