//! X-LoRA: a router that reads what the frozen model says of the text scales several LoRAs, token by token.
//!
//! y = x·Wᵀ + λ·α/r·Σ_e s_e·(drop(x)·A_eᵀ)·B_eᵀ. A first pass without the adapter gives the states h of the last block, as
//! a head reads them; s = softmax(R(h)/T), one row for every token or, in models of pictures and where the setting asks for
//! it, for every sequence, from what the head reads of it. R is one linear layer, or several with ReLU and dropout between them;
//! it gives `experts` numbers for all layers together or, with `layerwise_scalings`, for each. Of these the `top_k_lora`
//! largest stay, as they are or in a softmax of their own. A is Kaiming-uniform noise, B zero, so the base is unchanged at the
//! start.
//!
//! Buehler & Buehler 2024, arXiv:2402.07148; the settings are those of `peft`'s XLoraConfig. In the paper the adapters were
//! trained before and rest, as `adapters` are here that are given; else they start anew and are trained with the router
//! (`use_trainable_adapters`). `peft` saves the router alone; here A and B lie in the file too, so its form is our own.
//!
//! A [experts·rank, in], B [out, experts·rank] of each target, one expert after another; `xlora_classifier.N.weight`
//! [size, in] and `.bias` `[size]`, the last of them [layers·experts, …] where layerwise.

mod saved;

use std::sync::Arc;

use engraft_nn::{
    Adapter, Base, BlockPatch, Builder, Error, Init, Kind, Output, Pass, Patch, Result, Role, Site, SiteId,
    Sites, Targets, Task, WeightPatch,
};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, no_grad};
use serde_json::{Map, Value, json};

use self::saved::Packed;
use crate::read::{Reader, as_written, number};
use crate::shared::fields::{ANY_BASE, alpha, choice, dropout, flag, float, int, rank};
use crate::shared::low_rank::linear;
use crate::shared::mixture::{EXPERTS_MAX, Mixture};
use crate::shared::sequences::Summary;
use crate::shared::sizes;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, SavedAdapter, peft};

const DEPTH_MAX: usize = 64;
const SIZE_MAX: usize = 1 << 20;

/// Where the states of the first pass lie, a row for every token.
const STATES: &str = "xlora.states";

const USUAL: Mixture = Mixture { rank: 8, alpha: 16.0, dropout: 0.0, experts: 4 };

#[derive(Clone, Debug)]
struct XLora {
    sizes: Mixture,
    /// One row of scalings for a whole sequence.
    by_sequence: bool,
    layerwise: bool,
    depth: usize,
    size: usize,
    dropout: f32,
    softmax: bool,
    temperature: f64,
    top_k: Option<usize>,
    softmax_of_top_k: bool,
    /// λ.
    weight: f64,
    /// Whether A and B are trained with the router.
    trainable: bool,
    /// The adapters that are given.
    given: Option<Arc<Packed>>,
}

static INFO: Info = Info {
    name: "xlora",
    title: "X-LoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2402.07148",
    summary: "LoRAs scaled for each token by a router that reads what a first, frozen pass says of it",
    mergeable: false,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_XLORA",
    fields: &[
        rank("8"),
        alpha("16"),
        dropout("0"),
        int("experts", (1, EXPERTS_MAX as i64), Some("4"), "LoRAs at each matrix, without `adapters`."),
        Field {
            name: "adapters",
            kind: FieldKind::Adapters,
            default: None,
            doc: "Directories of saved LoRAs that are scaled, with their own ranks, scales and targets; new ones without it.",
        },
        ANY_BASE,
        Field {
            name: "use_trainable_adapters",
            kind: FieldKind::Bool,
            default: None,
            doc: "Train the adapters with the router: usually those that are new, and not those that are given.",
        },
        choice("scalings", &["token", "sequence"], "\"token\"", "What has scalings of its own."),
        flag("layerwise_scalings", "false", "Scalings of its own for each layer, not the same in all."),
        int("xlora_depth", (1, DEPTH_MAX as i64), Some("1"), "Linear layers of the router."),
        int("xlora_size", (1, SIZE_MAX as i64), Some("2048"), "Width between the router's layers."),
        float("xlora_dropout_p", (0.0, 0.999), "0.2", "Dropout between the router's layers while training."),
        flag("enable_softmax", "true", "Scalings that sum to one."),
        float("softmax_temperature", (1e-6, 1e6), "1", "What is divided by before the softmax."),
        int(
            "top_k_lora",
            (1, EXPERTS_MAX as i64),
            None,
            "Use the adapters with so many largest scalings alone.",
        ),
        flag("enable_softmax_topk", "false", "A softmax over the scalings that are used."),
        float("global_scaling_weight", (0.0, 1e9), "1", "Factor of every adapter."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, names: [&'static str; 3]) -> XLora {
    let sizes = Mixture::read(r, names, &USUAL);
    let top_k = r.value("top_k_lora").is_some().then(|| r.count("top_k_lora", 1, EXPERTS_MAX));
    if top_k.is_some_and(|k| k > sizes.experts) && !r.gives("adapters") {
        r.problem(format!("`top_k_lora`: there are {} experts to choose from", sizes.experts));
    }
    let temperature = r.float("softmax_temperature", 1.0);
    if temperature <= 0.0 {
        r.problem("`softmax_temperature`: expected a number above 0");
    }
    XLora {
        sizes,
        by_sequence: r.one_of("scalings", &[("token", false), ("sequence", true)]),
        layerwise: r.flag("layerwise_scalings", false),
        depth: r.count("xlora_depth", 1, DEPTH_MAX),
        size: r.count("xlora_size", 2048, SIZE_MAX),
        dropout: match r.value("xlora_dropout_p") {
            None => 0.2,
            Some(_) => r.dropout("xlora_dropout_p"),
        },
        softmax: r.flag("enable_softmax", true),
        temperature,
        top_k,
        softmax_of_top_k: r.flag("enable_softmax_topk", false),
        weight: r.float("global_scaling_weight", 1.0),
        trainable: r.flag("use_trainable_adapters", true),
        given: None,
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| {
        let mut method = read(r, ["rank", "alpha", "dropout"]);
        r.ignore(&[ANY_BASE.name]);
        let given = r.texts("adapters").map_or(0, |paths| paths.len());
        if given == 0 && !method.trainable {
            r.problem("`use_trainable_adapters`: expected `adapters` that rest, or true");
        }
        if given > 0 && ![USUAL.experts, given].contains(&method.sizes.experts) {
            r.problem(format!("`experts`: there are {given} `adapters`, so leave it out"));
        }
        if given > 0 {
            method.sizes.experts = given;
            method.trainable = r.flag("use_trainable_adapters", false);
            if method.top_k.is_some_and(|k| k > given) {
                r.problem(format!("`top_k_lora`: there are {given} adapters to choose from"));
            }
        }
        method
    })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    if peft::is_type(config, "XLORA") {
        return Err(Error::Unsupported(
            "an X-LoRA of peft holds its router alone, the adapters lie elsewhere; train one here with xlora, or load the adapters as lora".into(),
        ));
    }
    peft::own_file(&INFO, config, |r| read(r, ["r", "lora_alpha", "lora_dropout"]))
}

fn example() -> Box<dyn Method> {
    Box::new(XLora {
        sizes: Mixture { rank: 2, alpha: 4.0, dropout: 0.0, experts: 3 },
        by_sequence: false,
        layerwise: true,
        depth: 2,
        size: 5,
        dropout: 0.0,
        softmax: true,
        temperature: 0.7,
        top_k: None,
        softmax_of_top_k: false,
        weight: 1.5,
        trainable: true,
        given: None,
    })
}

/// Where what the first pass says of whole sequences lies.
fn said(summary: Summary) -> String {
    format!("xlora.{}", summary.name())
}

impl Method for XLora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn take_adapters(&mut self, _setting: &str, adapters: Vec<SavedAdapter>) -> Result<()> {
        let packed = Packed::of(adapters)?;
        (self.sizes.rank, self.sizes.alpha) = (packed.rank, packed.alpha);
        self.given = Some(Arc::new(packed));
        Ok(())
    }

    fn default_targets(&self, sites: &Sites) -> Option<Targets> {
        match &self.given {
            Some(given) => Some(given.targets()),
            None => INFO.usual_targets(sites),
        }
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |_| self.sizes.rank)
    }

    fn chosen_in_use(&self) -> &'static [(&'static str, &'static str)] {
        // What its published code lets be set at a trained model.
        &[("top_k_lora", "top_k_lora"), ("global_scaling_weight", "global_scaling_weight")]
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let targets = b.targets();
        if let Some(given) = &self.given {
            given.check(&targets)?;
        }
        let router = Arc::new(self.router(b, targets.len())?);
        for (layer, site) in targets.into_iter().enumerate() {
            let (out, inn) = linear(site, INFO.title)?;
            if site.role == Role::Head {
                let message = "X-LoRA's scalings are those of all tokens, of which a head reads some; leave it out of the targets";
                return Err(Error::Site { path: site.path.clone(), message: message.into() });
            }
            let wide = self.sizes.experts * self.sizes.rank;
            let [down, up] = match &self.given {
                Some(given) => given.at(site, [out, inn])?,
                None => [Init::kaiming(inn), Init::Zeros],
            };
            let experts = Experts {
                a: self.factor(b, &format!("{}.lora_A.weight", site.path), [wide, inn], down)?,
                b: self.factor(b, &format!("{}.lora_B.weight", site.path), [out, wide], up)?,
                router: router.clone(),
                layer: if self.layerwise { layer } else { 0 },
            };
            b.patch(site.id, Patch::Weight(Box::new(experts)))?;
        }
        b.patch(router.site, Patch::Block(Box::new(Ahead(router))))
    }

    fn before_forward(
        &self,
        _adapter: &Arc<Adapter>,
        first: &dyn Fn() -> Result<Output>,
        cx: &Pass,
    ) -> Result<()> {
        // Scalings of sequences that are gone on with lie in their cache.
        if self.by_sequence && cx.continues() {
            return Ok(());
        }
        let out = no_grad(first)?;
        let features = out.features.detach();
        match &out.states {
            Some(states) => cx.put(STATES, states.detach()),
            None if features.dim(0) == cx.layout().tokens() => cx.put(STATES, features.clone()),
            None => {}
        }
        let per_sequence = features.dim(0) == cx.layout().sequences().len();
        for summary in [Summary::First, Summary::Last] {
            let row = if per_sequence { features.clone() } else { summary.of(&features, &out.pass)? };
            cx.put(said(summary), row);
        }
        Ok(())
    }

    fn follows(&self) -> bool {
        !self.by_sequence
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let mut keys = self.sizes.keys();
        let own = json!({
            "enable_softmax": self.softmax, "enable_softmax_topk": self.softmax_of_top_k,
            "global_scaling_weight": number(self.weight), "layerwise_scalings": self.layerwise,
            "scalings": if self.by_sequence { "sequence" } else { "token" }, "softmax_temperature": number(self.temperature),
            "top_k_lora": self.top_k, "xlora_depth": self.depth, "xlora_dropout_p": as_written(self.dropout),
            "use_trainable_adapters": self.trainable, "xlora_size": self.size,
        });
        keys.extend(own.as_object().cloned().unwrap_or_default());
        keys
    }
}

impl XLora {
    fn factor(&self, b: &mut Builder<'_>, name: &str, shape: [usize; 2], init: Init) -> Result<Param> {
        if self.trainable { b.param(name, &shape, init) } else { b.fixed(name, &shape, init) }
    }

    /// The router of an adapter with so many targets.
    fn router(&self, b: &mut Builder<'_>, targets: usize) -> Result<Router> {
        let task = b.info().task;
        if task == Task::Seq2Seq && !self.by_sequence {
            return Err(Error::Unsupported(
                "an encoder and a decoder read different tokens, so that X-LoRA's have no scalings in common; choose `scalings = \"sequence\"`".into(),
            ));
        }
        let Some(block) = b.sites().of_kind(|k| matches!(k, Kind::Block { .. })).next() else {
            return Err(Error::Unsupported("X-LoRA needs a model made of blocks; choose lora".into()));
        };
        let of_head = |s: &Site| match s.kind {
            Kind::Head { inn, .. } => Some(inn),
            _ => None,
        };
        // A classifier of pictures has rows of its own that no token is behind.
        let by_token = !self.by_sequence && task != Task::ImageClassification;
        let of_head = b.sites().iter().find_map(of_head).filter(|_| !by_token);
        let read = of_head.unwrap_or(b.info().width);
        let layers = if self.layerwise { targets } else { 1 };
        let mut steps = Vec::new();
        for number in 0..self.depth {
            let inn = if number == 0 { read } else { self.size };
            let out = if number + 1 == self.depth { layers * self.sizes.experts } else { self.size };
            let name = |part: &str| format!("xlora_classifier.{number}.{part}");
            let weight = b.param(&name("weight"), &[out, inn], Init::kaiming(inn))?;
            steps.push((weight, b.param(&name("bias"), &[out], Init::kaiming(inn))?));
        }
        Ok(Router {
            steps,
            method: self.clone(),
            layers,
            by_token,
            states: if by_token { STATES.into() } else { said(Summary::usual(task)) },
            scalings: format!("{}xlora.scalings", b.prefix()),
            site: block.id,
        })
    }
}

/// States → scalings.
struct Router {
    steps: Vec<(Param, Param)>,
    method: XLora,
    layers: usize,
    by_token: bool,
    /// What the first pass left.
    states: String,
    /// Where the scalings of a pass are left.
    scalings: String,
    /// The first block, before which they are made.
    site: SiteId,
}

impl Router {
    /// Scalings of the tokens or sequences of a pass [rows, layers, experts].
    fn scalings(&self, cx: &Pass) -> Result<Tensor> {
        match cx.find(&self.scalings) {
            Some(made) => Ok(made),
            // A target that is read before the first block, or in a decoder whose encoder ran in an earlier pass.
            None => self.make(cx),
        }
    }

    fn make(&self, cx: &Pass) -> Result<Tensor> {
        let missing = || {
            let message =
                "X-LoRA needs a first pass of the model without the adapter, which this pass did not have";
            Error::Unsupported(message.into())
        };
        if !self.by_token {
            let of = || self.of(&cx.find_sequences(&self.states)?.ok_or_else(missing)?, cx);
            return cx.once(&self.scalings, of);
        }
        if cx.layout().virtual_counts().iter().any(|&count| count > 0) {
            return Err(Error::Unsupported(
                "rows of a prompt have no scalings of X-LoRA; choose `scalings = \"sequence\"` beside prompts".into(),
            ));
        }
        self.of(&cx.find_rows(&self.states)?.ok_or_else(missing)?, cx)
    }

    /// h [rows, width] → [rows, layers, experts].
    fn of(&self, h: &Tensor, cx: &Pass) -> Result<Tensor> {
        let XLora { softmax, temperature, top_k, softmax_of_top_k, dropout, .. } = self.method;
        let mut x = h.clone();
        for (number, (weight, bias)) in self.steps.iter().enumerate() {
            if number > 0 {
                x = cx.dropout(&x.unary(Unary::Relu)?, dropout, self.site, number as u8)?;
            }
            x = x.matmul_t(&weight.get())?.add(&bias.get())?;
        }
        let mut s = x.reshape([h.dim(0), self.layers, self.method.sizes.experts])?;
        if softmax {
            s = s.scale((1.0 / temperature) as f32)?.softmax()?;
        }
        let chosen = top_k.map(|k| largest(&s, k)).transpose()?;
        if softmax_of_top_k {
            // What is not chosen is so far below that nothing is left of it.
            let own = match &chosen {
                Some(mask) => s.mul(mask)?.add(&mask.unary(Unary::Shift(-1.0))?.scale(1e30)?)?,
                None => s,
            };
            return own.softmax().map_err(Into::into);
        }
        match chosen {
            Some(mask) => Ok(s.mul(&mask)?),
            None => Ok(s),
        }
    }
}

/// Ones at the `k` largest numbers of each row.
fn largest(s: &Tensor, k: usize) -> Result<Tensor> {
    let columns = s.detach().top_k(k)?.1.to_i64()?;
    let mut mask = vec![0.0; s.len()];
    for (at, column) in columns.into_iter().enumerate() {
        mask[at / k * s.width() + column as usize] = 1.0;
    }
    Ok(Tensor::from_vec(mask, s.shape())?)
}

/// Makes the scalings before the first block, once for all targets; blocks that are run again find them.
struct Ahead(Arc<Router>);

impl BlockPatch for Ahead {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        _site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        cx.put(&self.0.scalings, self.0.make(cx)?);
        run(h, cx)
    }
}

struct Experts {
    a: Param,
    b: Param,
    router: Arc<Router>,
    layer: usize,
}

impl Experts {
    /// Scalings of the rows of `x` [rows, experts].
    fn scalings(&self, x: &Tensor, cx: &Pass) -> Result<Tensor> {
        let all = self.router.scalings(cx)?;
        let own = all.narrow(1, self.layer, 1)?.reshape([all.dim(0), all.width()])?;
        let sequences = cx.layout().sequences();
        let owners: Vec<i64> = match self.router.by_token {
            true => (0..own.dim(0) as i64).collect(),
            false => (0i64..).zip(sequences).flat_map(|(i, s)| std::iter::repeat_n(i, s.len())).collect(),
        };
        if owners.len() != x.dim(0) {
            return Err(Error::Unsupported(format!(
                "a target of X-LoRA reads {} rows where the pass has {}; leave it out of the targets",
                x.dim(0),
                owners.len()
            )));
        }
        if self.router.by_token {
            return Ok(own);
        }
        Ok(own.gather(&Tensor::from_i64(owners, [x.dim(0)])?)?)
    }
}

impl WeightPatch for Experts {
    fn weight(&self, _base: &dyn Base) -> Result<Tensor> {
        let text = "X-LoRA depends on its input and cannot be folded into a weight; use it unmerged";
        Err(Error::Unsupported(text.into()))
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let XLora { sizes: Mixture { rank, alpha, dropout, experts }, weight, .. } = self.router.method;
        let scalings = self.scalings(x, cx)?;
        let dropped = cx.dropout(x, dropout, site.id, 0)?;
        let (rows, scale) = (x.dim(0), (alpha / rank as f64 * weight) as f32);
        let inner = dropped.matmul_t(&self.a.get())?.reshape([rows, experts, rank])?;
        let inner = inner.mul(&scalings.scale(scale)?.reshape([rows, experts, 1])?)?;
        let change = inner.reshape([rows, experts * rank])?.matmul_t(&self.b.get())?;
        Ok(base.forward(x)?.plus(&change)?)
    }

    fn mergeable(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;
