//! AdapterFusion: an attention, trained for every token, over adapters that were trained apart and stay as they are.
//!
//! With x the input of the adapters at a sublayer, z_m the output of adapter m without its residual, and d the width:
//!   α = softmax_m((Q·x + b_q)·(K·z_m + b_k)), without 1/√d
//!   o = Σ_m α_m·V·z_m + the adapters' residual (static: without V)
//! and 0.01·Σ‖I − V‖² is added to the loss. Q and K start as N(0, 0.02), their biases as zero, V as I with 10⁻⁶ beside the
//! diagonal. What is computed is (Kᵀ·q)·z_m + q·b_k and V·Σ_m α_m·z_m: one product of each matrix, however many adapters.
//!
//! What is fused are bottleneck adapters, Compacter's too, or others that read something at a sublayer and add to it
//! (`Method::branches`). A sublayer mixes those that sit there, be it one alone. Each reads what it was trained on; x is what the last
//! of them there reads, as in AdapterHub's library, which gives that to all of them and refuses adapters of unlike places.
//!
//! Pfeiffer et al. 2021, arXiv:2005.00247, section 3; the variants are those of AdapterHub's `adapters` 1.3.
//!
//! Of every sublayer with adapters, under adapter_fusion_layer.A,B,… (the adapters' names): query.weight, key.weight,
//! value.weight [d, d], query.bias, key.bias `[d]`. The adapters' own tensors lie in the same file, so that a saved fusion needs
//! nothing else: under their names in AdapterHub's form, those of other methods under fused.NAME.

mod layer;

use engraft_nn::{Adapter, Builder, Error, Kind, Patch, Result, Site};
use engraft_tensor::Tensor;
use engraft_tensor::ops::Unary;
use serde_json::{Map, Value, json};

use crate::additive::adamix;
use crate::additive::bottleneck::{self, Bottleneck};
use crate::assemble::{is_union, methods_of};
use crate::read::{Reader, as_written, number};
use crate::shared::activations::Activation;
use crate::shared::branches::{Branch, Branches, Reads};
use crate::shared::fields::{ANY_BASE, choice, float};
use crate::shared::orthogonal::identity;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, Named, SavedAdapter, Step, peft};
use layer::{Fused, Member};

/// In the names of what is trained.
const LAYER: &str = ".adapter_fusion_layer.";
/// What precedes the names of an adapter's tensors that have no name of it in theirs.
const FUSED: &str = "fused.";

struct Fusion {
    sources: Vec<Source>,
    has_query: bool,
    has_key: bool,
    has_value: bool,
    /// On the scores.
    dropout: f32,
    /// Weight of ‖I − V‖²; 0 for none.
    regularization: f64,
    /// What a file calls it, where that is not the adapters' names.
    name: Option<String>,
    /// Whether its file leaves the dropout open, as AdapterHub's do.
    open_dropout: bool,
    /// Whether AdapterHub's library made it: there all read what the last reads, and not each what it was trained on, and layers that
    /// all adapters leave out have tensors too.
    reads_of_last: bool,
}

/// A fused adapter.
struct Source {
    adapter: Box<dyn Branches>,
    name: String,
    /// Of a new fusion: what its tensors hold, by their names here.
    tensors: Option<Named>,
    /// What the model was that it was trained on.
    base: Option<Base>,
}

#[derive(PartialEq)]
struct Base {
    path: String,
    architecture: Option<String>,
    width: Option<usize>,
}

static INFO: Info = Info {
    name: "adapter_fusion",
    title: "AdapterFusion",
    class: "additive",
    sites: "sublayer",
    paper: "arXiv:2005.00247",
    summary: "attention for every token over saved adapters at sublayers, which stay as they are",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_ADAPTER_FUSION",
    fields: &[
        Field {
            name: "adapters",
            kind: FieldKind::Adapters,
            default: None,
            doc: "Directories of the adapters that are fused, all trained on this model: bottleneck, Compacter, AdaptFormer, KronA^B or sparse adapters, and those of a finished AdaMix. At each sublayer those that sit there are mixed; they add to the same thing where they meet.",
        },
        ANY_BASE,
        choice(
            "form",
            &["dynamic", "static"],
            "\"dynamic\"",
            "With values V of their own, or the adapters' outputs as they are.",
        ),
        float(
            "regularization",
            (0.0, 1e6),
            "0.01",
            "Weight of ‖I − V‖² in the loss of the dynamic form; 0 for none.",
        ),
        float("dropout", (0.0, 0.999), "0", "Dropout on the scores while training."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    r.ignore(&[ANY_BASE.name]);
    if r.texts("adapters").is_none_or(|paths| paths.is_empty()) {
        r.problem("`adapters`: expected at least one saved adapter");
    }
    let has_value = r.one_of("form", &[("dynamic", true), ("static", false)]);
    let regularization = r.float("regularization", 0.01);
    let fusion = Fusion {
        sources: vec![],
        has_query: true,
        has_key: true,
        has_value,
        dropout: r.dropout("dropout"),
        regularization: if has_value { regularization } else { 0.0 },
        name: None,
        open_dropout: false,
        reads_of_last: false,
    };
    r.finish()?;
    Ok(Box::new(fusion))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    // AdapterHub's, read with its adapters, has no `peft_type`.
    let theirs = config.get("peft_type").is_none_or(Value::is_null) && config.get("fusion_config").is_some();
    let own = theirs || peft::is_type(config, INFO.peft_type);
    let Some(map) = config.as_object().filter(|_| own) else { return Ok(None) };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let weight = r.float("regularization_weight", 0.01);
    let name = r.text("name");
    let reads_of_last = r.flag("reads_of_last", theirs);
    let inner = r.value("fusion_config").and_then(Value::as_object).cloned().unwrap_or_default();
    let adapters = r.value("adapters").and_then(Value::as_array).cloned().unwrap_or_default();
    if adapters.is_empty() {
        r.problem("`adapters`: expected at least one adapter");
    }
    r.finish()?;
    let open_dropout = inner.get("dropout_prob").is_none_or(Value::is_null);
    let mut r = Reader::file(&inner);
    r.must_be_off(&["query_before_ln", "residual_before", "temperature"]);
    // V is linear, so that it does not matter when it is applied; nor how it started.
    r.ignore(&["value_before_softmax", "value_initialized"]);
    let mut fusion = Fusion {
        sources: vec![],
        has_query: r.flag("query", true),
        has_key: r.flag("key", true),
        has_value: r.flag("value", true),
        dropout: r.dropout("dropout_prob"),
        regularization: if r.flag("regularization", true) { weight } else { 0.0 },
        name,
        open_dropout,
        reads_of_last,
    };
    r.finish()?;
    for adapter in &adapters {
        let name = adapter.get("name").and_then(Value::as_str).unwrap_or("engraft").to_owned();
        // Another method's is told by its type, AdapterHub's by its keys.
        let inner = adapter.get("config").filter(|config| config.get("peft_type").is_some());
        let adapter =
            branches(inner.unwrap_or(adapter)).map_err(|e| Error::Unsupported(format!("`{name}` {e}")))?;
        if theirs && adapter.form().reads == Reads::Stream {
            return Err(Error::Unsupported(format!(
                "`{name}` is beside its sublayer, where `adapters` adds the stream twice in a fusion; fuse it anew"
            )));
        }
        fusion.sources.push(Source { adapter, name, tensors: None, base: None });
    }
    fusion.check()?;
    Ok(Some(Loaded { method: Box::new(fusion), targets: None, train_also }))
}

fn example() -> Box<dyn Method> {
    let source = |name: &str, reduction: f64| {
        let form = Bottleneck::of(bottleneck::Form::Pfeiffer);
        let adapter = Bottleneck { name: name.into(), reduction, activation: Activation::GELU, ..form };
        Source { adapter: Box::new(adapter), name: name.into(), tensors: None, base: None }
    };
    Box::new(Fusion {
        sources: vec![source("a", 4.0), source("b", 8.0)],
        has_query: true,
        has_key: true,
        has_value: true,
        dropout: 0.0,
        regularization: 0.01,
        name: None,
        open_dropout: false,
        reads_of_last: false,
    })
}

/// What the adapter of a file adds at its sublayers; in words what it is, where that cannot be mixed with others.
fn branches(config: &Value) -> std::result::Result<Box<dyn Branches>, String> {
    let fusable = || {
        let fused = crate::METHODS.iter().filter(|entry| (entry.example)().branches().is_some());
        fused.map(|entry| entry.info.name).collect::<Vec<_>>().join(", ")
    };
    if is_union(config) {
        let methods = methods_of(config).map_err(|e| format!("cannot be read: {e}"))?;
        let titles: Vec<&str> = methods.iter().map(|(method, _)| method.info().title).collect();
        return Err(format!(
            "is a union of several methods ({}), which were trained together, and a fusion mixes what one method adds at sublayers; fuse \
             adapters of one of {} each",
            titles.join(", "),
            fusable()
        ));
    }
    let loaded = crate::from_file(config).map_err(|e| format!("cannot be read: {e}"))?;
    loaded.method.branches().ok_or_else(|| {
        let Info { title, sites, .. } = loaded.method.info();
        let why = match sites.contains(',') && sites.contains("sublayer") {
            true => format!("which is a union of parts at {sites} that were trained together"),
            false => "which adds nothing at sublayers that could be mixed".to_owned(),
        };
        format!("is of {title}, {why}; fuse adapters of {}", fusable())
    })
}

impl Source {
    /// The adapter that `saved` holds, under a name that none of `taken` has.
    fn of(saved: SavedAdapter, taken: &[Source]) -> std::result::Result<Source, String> {
        if saved.config.get(crate::layers::KEY).is_some_and(|layers| !layers.is_null()) {
            return Err(format!(
                "{} is in some layers alone (`layers`), and adapters of its method are fused where they are in all",
                saved.path
            ));
        }
        let SavedAdapter { path, config, tensors } = adamix::averaged(saved)
            .map_err(|e| format!("an AdaMix whose experts cannot be averaged: {e}"))?;
        let adapter = branches(&config).map_err(|e| format!("{path} {e}"))?;
        let own = adapter.name().unwrap_or("engraft").to_owned();
        let is_free = |name: &String| taken.iter().all(|source| source.name != *name);
        let further = (2..).map(|n| format!("{own}_{n}"));
        let name = std::iter::once(own.clone()).chain(further).find(is_free).unwrap_or_default();
        let here = |(key, t): (String, Tensor)| Some((adapter.tensor(&key, &name)?, t));
        let tensors: Named = tensors.into_iter().filter_map(here).collect();
        let word = |key: &str| config.get(key).and_then(Value::as_str).map(str::to_owned);
        let width = config.get("hidden_size").and_then(Value::as_u64).map(|n| n as usize);
        let base = Some(Base { path, architecture: word("model_type"), width });
        Ok(Source { adapter, name, tensors: Some(tensors), base })
    }
}

impl Fusion {
    /// Whether the adapters can be fused: alike in what they add to, where they meet, and of a form that has an output of its own.
    fn check(&self) -> Result<()> {
        let mut problems = Vec::new();
        for Source { adapter, name, .. } in &self.sources {
            for what in adapter.hindrances() {
                problems.push(format!("`adapters`: `{name}` {what}; fuse adapters without it"));
            }
        }
        for (number, second) in self.sources.iter().enumerate() {
            let own = second.adapter.form();
            let unlike = |first: &&Source| {
                let form = first.adapter.form();
                form.meets(&own) && (form.rest, form.goes_on) != (own.rest, own.goes_on)
            };
            if let Some(first) = self.sources[..number].iter().find(unlike) {
                problems.push(format!(
                    "`adapters`: `{}` and `{}` meet at a sublayer and add to different things there, the output, the stream or what \
                     they read, so that their sum has no place; fuse adapters of one form",
                    first.name, second.name
                ));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Mismatch(problems)) }
    }

    /// Whether each adapter was trained on a model like this one.
    fn check_bases(&self, architecture: &str, width: usize) -> Result<()> {
        let mut problems = Vec::new();
        for base in self.sources.iter().filter_map(|source| source.base.as_ref()) {
            if let Some(own) = base.architecture.as_ref().filter(|own| *own != architecture) {
                problems.push(format!(
                    "`adapters`: {} was trained on a {own}, and this model is a {architecture}; fuse adapters of one base",
                    base.path
                ));
            } else if let Some(own) = base.width.filter(|own| *own != width) {
                problems.push(format!(
                    "`adapters`: {} was trained on a model of width {own}, and this one has {width}; fuse adapters of one base",
                    base.path
                ));
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Mismatch(problems)) }
    }

    /// The fused adapters' names, as they stand in those of tensors, or what else the fusion is called.
    fn names(&self) -> String {
        if let Some(name) = &self.name {
            return name.clone();
        }
        self.sources.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(",")
    }

    /// The adapters at their sublayers, none of them trained. AdapterHub's files have something where all leave a layer out, too.
    fn adapters<'s>(&self, b: &mut Builder<'s>) -> Result<BySite<'s>> {
        let sublayers = b.sites().of_kind(|k| matches!(k, Kind::Sublayer { .. }));
        let mut found: Vec<(&Site, Vec<_>)> = sublayers.map(|site| (site, vec![])).collect();
        for source in &self.sources {
            let problem = |e| match (e, &source.base) {
                (Error::Mismatch(lines), Some(base)) => Error::Mismatch(
                    lines
                        .iter()
                        .map(|line| format!("{} does not fit this model: {line}", base.path))
                        .collect(),
                ),
                (e, _) => e,
            };
            let prefix = b.prefix().to_owned();
            if source.adapter.name().is_none() {
                b.set_prefix(format!("{prefix}{FUSED}{}.", source.name));
            }
            let parts = b
                .frozen(source.tensors.clone(), |b| source.adapter.build(b, &source.name))
                .map_err(problem)?;
            b.set_prefix(prefix);
            for (id, branch) in parts {
                if let Some((_, here)) = found.iter_mut().find(|(site, _)| site.id == id) {
                    here.push((source.adapter.form().reads, branch));
                }
            }
        }
        let is_place = |site: &Site| self.sources.iter().any(|s| s.adapter.form().is_at(site.role));
        found.retain(|(site, here)| !here.is_empty() || self.reads_of_last && is_place(site));
        Ok(found.into_iter().map(|(site, here)| (site, self.members(here))).collect())
    }

    /// The adapters of one sublayer, each with what it reads.
    fn members(&self, here: Vec<(Reads, Box<dyn Branch>)>) -> Vec<Member> {
        let last = here.last().map(|(reads, _)| *reads);
        let member = |(reads, branch): (Reads, Box<dyn Branch>)| Member {
            branch,
            reads_with_last: self.reads_of_last || Some(reads) == last,
        };
        here.into_iter().map(member).collect()
    }
}

impl Method for Fusion {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("L·(3·d^2 + 2·d); of the adapters nothing")
    }

    fn take_adapters(&mut self, _setting: &str, adapters: Vec<SavedAdapter>) -> Result<()> {
        let mut problems = Vec::new();
        for saved in adapters {
            match Source::of(saved, &self.sources) {
                Ok(source) => self.sources.push(source),
                Err(problem) => problems.push(format!("`adapters`: {problem}")),
            }
        }
        if problems.is_empty() { self.check() } else { Err(Error::Mismatch(problems)) }
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.check_bases(&b.info().architecture, b.info().width)?;
        let adapters = self.adapters(b)?;
        if adapters.iter().all(|(_, members)| members.is_empty()) {
            let text = "AdapterFusion needs saved adapters, and a model with the sublayers that they sit at";
            return Err(Error::Unsupported(text.into()));
        }
        for (site, members) in adapters {
            let is_used = !members.is_empty();
            let fused = Fused::build(self, b, site, members)?;
            if is_used {
                b.patch(site.id, Patch::Sublayer(Box::new(fused)))?;
            }
        }
        Ok(())
    }

    /// Values that stay near the identity.
    fn penalty(&self, adapter: &Adapter, _step: Step) -> Result<Option<Tensor>> {
        if self.regularization == 0.0 {
            return Ok(None);
        }
        let values =
            adapter.trainable().filter(|p| p.name.contains(LAYER) && p.name.ends_with(".value.weight"));
        let mut sum: Option<Tensor> = None;
        for v in values.map(|p| p.param.get()) {
            let one = identity(v.width())?.reshape(v.shape())?;
            let off = v.sub(&one)?.unary(Unary::Square)?.sum()?;
            sum = Some(match sum {
                Some(sum) => sum.add(&off)?,
                None => off,
            });
        }
        Ok(sum.map(|sum| sum.scale(self.regularization as f32)).transpose()?)
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let adapter = |s: &Source| json!({ "config": s.adapter.config(), "name": s.name });
        let mut own = json!({
            "adapters": self.sources.iter().map(adapter).collect::<Vec<_>>(),
            "fusion_config": {
                "dropout_prob": if self.open_dropout { Value::Null } else { json!(as_written(self.dropout)) }, "key": self.has_key, "query": self.has_query,
                "query_before_ln": false, "regularization": self.regularization != 0.0, "residual_before": false,
                "temperature": false, "value": self.has_value, "value_before_softmax": true,
                "value_initialized": self.has_value,
            },
            "regularization_weight": number(self.regularization),
        });
        if let Some(name) = &self.name {
            own["name"] = json!(name);
        }
        if self.reads_of_last {
            own["reads_of_last"] = true.into();
        }
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        let own = [".adapters.", "shared_parameters.", LAYER].iter().any(|part| name.contains(part));
        if own || name.starts_with(FUSED) { name.into() } else { format!("base_model.model.{name}") }
    }
}

/// The adapters of each sublayer.
type BySite<'s> = Vec<(&'s Site, Vec<Member>)>;

#[cfg(test)]
mod tests;
