//! AdapterHub's unions (`ConfigUnion`) of a prefix, bottleneck adapters, LoRAs and a prompt, and their file; and these without
//! adapters alone in a file of AdapterHub.
//!
//! Adapters are those of the method `bottleneck`, of which nothing is known here but its file; a gate lies around them:
//! u + g + G·A(x), G of x, the adapter's input.

use std::sync::Mutex;

use engraft_nn::{
    Builder, Error, Kind, Pass, Patch, Result, Role, Site, SiteId, Sites, Sublayer, SublayerPatch, Targets,
};
use engraft_tensor::Tensor;
use serde_json::{Map, Value, json};

use super::lora::Lora;
use super::prefix::Prefix;
use super::prompt::Prompt;
use crate::additive::bottleneck::{add_blocks, around};
use crate::read::Reader;
use crate::shared::gate::Gate;
use crate::{Described, Info, Loaded, Method, peft};

/// `peft_type` of a file that holds one part.
const ALONE: &str = "ENGRAFT_ADAPTER_HUB";

/// What may be alone in a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Alone {
    Prefix,
    Prompt,
    Lora,
    Ia3,
}

impl Alone {
    /// What AdapterHub's inner configuration is of.
    fn of(inner: &Map<String, Value>) -> Option<Alone> {
        match inner.get("architecture").and_then(Value::as_str)? {
            "prefix_tuning" => Some(Alone::Prefix),
            "prompt_tuning" => Some(Alone::Prompt),
            "lora" if inner.get("composition_mode") == Some(&json!("scale")) => Some(Alone::Ia3),
            "lora" => Some(Alone::Lora),
            _ => None,
        }
    }
}

/// The adapter of a file of AdapterHub that holds such a part alone, as one of the method `info`.
pub(crate) fn alone(config: &Value, info: &'static Info, what: Alone) -> Result<Option<Loaded>> {
    let kind = config.get("peft_type").filter(|kind| !kind.is_null());
    let inner = config.get("config").and_then(Value::as_object);
    let Some(inner) = inner.filter(|inner| Alone::of(inner) == Some(what)) else { return Ok(None) };
    if kind.is_some_and(|kind| kind != ALONE) {
        return Ok(None);
    }
    let name = config.get("name").and_then(Value::as_str).unwrap_or("engraft");
    let mut union = Union { name: name.into(), ..Union::alone(info) };
    match what {
        Alone::Prefix => union.prefix = Some(Prefix { in_view: true, ..Prefix::read(inner)? }),
        Alone::Prompt => union.prompt = Some(Prompt::read(inner)?),
        Alone::Lora | Alone::Ia3 => union.lora = Some(Lora::read(inner)?),
    }
    let train_also = config.get("modules_to_save").and_then(crate::read::texts).unwrap_or_default();
    Ok(Some(Loaded { method: Box::new(union), targets: None, train_also }))
}

/// AdapterHub's prefix as the method `info`: of so many rows, made by a network of a width inside unless that is 0; `at` are the
/// encoder's attention and what a decoder reads of it.
pub(crate) fn hub_prefix(
    info: &'static Info,
    (tokens, inner): (usize, usize),
    dropout: f32,
    at: [bool; 2],
) -> Box<dyn Method> {
    let prefix = Prefix { dropout, at, in_view: true, ..Prefix::new(tokens, inner, false) };
    Box::new(Union { prefix: Some(prefix), ..Union::alone(info) })
}

/// AdapterHub's prompt of so many rows as the method `info`.
pub(crate) fn hub_prompt(info: &'static Info, length: usize) -> Box<dyn Method> {
    let start = ("random_uniform".into(), Value::Null);
    Box::new(Union { prompt: Some(Prompt { length, behind_first: false, start }), ..Union::alone(info) })
}

pub(super) struct Union {
    /// The method that it is.
    info: &'static Info,
    /// Part of the tensors' names.
    pub name: String,
    pub prefix: Option<Prefix>,
    pub adapter: Option<Adapters>,
    pub lora: Option<Lora>,
    pub prompt: Option<Prompt>,
    /// Whether it is one part, and the file no union.
    alone: bool,
    /// The paths of the attentions, as last attached: AdapterHub's file holds the prefix once for each.
    attentions: Mutex<Vec<String>>,
}

/// Bottleneck adapters and whether they are gated.
pub(super) struct Adapters {
    pub method: Box<dyn Method>,
    /// Their configuration in AdapterHub's words.
    config: Map<String, Value>,
    gated: bool,
}

impl Adapters {
    /// Adapters from a recipe's settings of `bottleneck`.
    pub fn from_settings(settings: Value, gated: bool) -> Result<Adapters> {
        let settings = settings.as_object().cloned().unwrap_or_default();
        let entry = &crate::additive::bottleneck::ENTRY;
        let method = (entry.from_settings)(&settings)?;
        Ok(Adapters { method, config: Map::new(), gated })
    }

    fn read(map: &Map<String, Value>, name: &str) -> Result<Adapters> {
        let gated = map.get("use_gating").and_then(Value::as_bool).unwrap_or(false);
        let mut plain = map.clone();
        plain.insert("use_gating".into(), false.into());
        let file = json!({ "config": plain, "name": name });
        let found = (crate::additive::bottleneck::ENTRY.from_file)(&file)?;
        let Some(Loaded { method, .. }) = found else {
            return Err(Error::Unsupported("a part of the union is no bottleneck adapter".into()));
        };
        let adapters = Adapters { method, config: plain, gated };
        if gated && !adapters.adds() {
            return Err(Error::Unsupported(
                "`use_gating` with `ln_after`, `original_ln_after` = false or another residual than the output is not there".into(),
            ));
        }
        Ok(adapters)
    }

    fn leave_out(&mut self, blocks: &[usize]) -> bool {
        let own = self.config.get("leave_out").and_then(Value::as_array).into_iter().flatten();
        let mut all: Vec<usize> = own.filter_map(Value::as_u64).map(|block| block as usize).collect();
        add_blocks(&mut all, blocks);
        self.config.insert("leave_out".into(), json!(all));
        self.method.leave_out(blocks)
    }

    fn flag(&self, key: &str, usual: bool) -> bool {
        self.config.get(key).and_then(Value::as_bool).unwrap_or(usual)
    }

    /// Whether what they give is the sublayer's output and something added to it.
    fn adds(&self) -> bool {
        let residual = self.config.get("residual_before_ln").is_none_or(|v| *v == json!(true));
        residual && !self.flag("ln_after", false) && self.flag("original_ln_after", true)
    }

    fn reads(&self) -> Reads {
        match (self.flag("is_parallel", false), self.flag("original_ln_before", true)) {
            (true, _) => Reads::Stream,
            (false, true) => Reads::Sum,
            (false, false) => Reads::Output,
        }
    }

    fn attach(&self, b: &mut Builder<'_>, name: &str) -> Result<()> {
        if !self.gated {
            return self.method.attach(b);
        }
        let left = self.config.get("leave_out").and_then(Value::as_array).cloned().unwrap_or_default();
        let wanted = |s: &Site| match s.role {
            Role::Attention => self.flag("mh_adapter", false),
            Role::CrossAttention => self.flag("cross_adapter", false),
            Role::Mlp => self.flag("output_adapter", true),
            _ => false,
        };
        let sites = b.sites();
        let places: Vec<(SiteId, String, usize)> = sites
            .iter()
            .filter(|s| wanted(s) && sites.number(s).is_none_or(|layer| !left.contains(&json!(layer))))
            .filter_map(|s| match s.kind {
                Kind::Sublayer { width } => Some((s.id, s.path.clone(), width)),
                _ => None,
            })
            .collect();
        // The next adapter's takes its place: none is kept for longer than its own sublayer.
        let raw = format!("{}union.raw", b.prefix());
        for (site, ..) in &places {
            b.patch(*site, Patch::Sublayer(Box::new(Noted(raw.clone()))))?;
        }
        self.method.attach(b)?;
        for (site, path, width) in places {
            let raw = raw.clone();
            let gate = Gate::new(b, &format!("{path}.adapters.{name}.gate"), (1, width))?;
            b.patch(site, Patch::Sublayer(Box::new(Gated { raw, gate, reads: self.reads() })))?;
        }
        Ok(())
    }
}

/// What an adapter reads.
#[derive(Clone, Copy)]
enum Reads {
    Stream,
    Output,
    Sum,
}

/// Leaves the sublayer's output for the gate behind the adapter, in the same block.
struct Noted(String);

impl SublayerPatch for Noted {
    fn output(&self, s: &Sublayer<'_>, _site: &Site, cx: &Pass) -> Result<Tensor> {
        cx.put(self.0.clone(), s.output.clone());
        Ok(s.output.clone())
    }
}

/// Weighs what the adapter before it has added.
struct Gated {
    raw: String,
    gate: Gate,
    reads: Reads,
}

impl SublayerPatch for Gated {
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        let Some(raw) = cx.find(&self.raw) else {
            let message = "the gate found no output before the adapter".into();
            return Err(Error::Site { path: site.path.clone(), message });
        };
        let x = match (self.reads, s.norm) {
            (Reads::Stream, _) => s.residual.clone(),
            (Reads::Output, _) => raw.clone(),
            (Reads::Sum, None) => raw.add(s.residual)?,
            (Reads::Sum, Some(norm)) => norm(&raw.add(s.residual)?)?,
        };
        let gates = self.gate.of_rows(&x, cx)?;
        Ok(s.output.sub(&raw)?.mul(&gates)?.plus(&raw)?)
    }
}

impl Union {
    pub fn new(
        info: &'static Info,
        prefix: Option<Prefix>,
        adapter: Option<Adapters>,
        lora: Option<Lora>,
    ) -> Union {
        let (name, attentions) = ("engraft".into(), Mutex::default());
        Union { info, name, prefix, adapter, lora, prompt: None, alone: false, attentions }
    }

    /// One part, to be set, as the method `info`.
    pub fn alone(info: &'static Info) -> Union {
        Union { alone: true, ..Union::new(info, None, None, None) }
    }

    /// Whether any of its parts is gated.
    pub fn gated(&self) -> bool {
        self.prefix.as_ref().is_some_and(|p| p.gated)
            || self.adapter.as_ref().is_some_and(|a| a.gated)
            || self.lora.as_ref().is_some_and(|l| l.gated)
    }

    /// The union of a saved adapter, where it is one and not of another type than the method's, its parts `gated` or not.
    pub fn from_file(config: &Value, info: &'static Info, gated: bool) -> Result<Option<Loaded>> {
        let own = peft::is_type(config, info.peft_type);
        let inner = config.get("config").and_then(Value::as_object);
        let is_union = inner.is_some_and(|c| c.get("architecture") == Some(&json!("union")));
        let theirs = is_union && config.get("peft_type").is_none_or(Value::is_null);
        let Some(inner) = inner.filter(|_| own || theirs) else { return Ok(None) };
        let mut r = Reader::file(inner);
        r.one_of("architecture", &[("union", ())]);
        let parts = r.value("configs").and_then(Value::as_array).cloned().unwrap_or_default();
        if parts.is_empty() {
            r.problem("`configs` names no parts");
        }
        r.finish()?;
        let name = config.get("name").and_then(Value::as_str).unwrap_or("engraft");
        let mut union = Union { name: name.into(), ..Union::new(info, None, None, None) };
        for part in parts.iter().filter_map(Value::as_object) {
            let twice = match part.get("architecture").and_then(Value::as_str) {
                Some("prefix_tuning") => {
                    union.prefix.replace(Prefix { in_view: theirs, ..Prefix::read(part)? }).is_some()
                }
                Some("lora") => union.lora.replace(Lora::read(part)?).is_some(),
                Some("prompt_tuning") => union.prompt.replace(Prompt::read(part)?).is_some(),
                None => union.adapter.replace(Adapters::read(part, name)?).is_some(),
                Some(other) => {
                    return Err(Error::Unsupported(format!(
                        "this union has a part of kind `{other}`; readable are prefixes, prompts, bottleneck adapters and LoRAs"
                    )));
                }
            };
            if twice {
                return Err(Error::Unsupported("this union has two parts of one kind".into()));
            }
        }
        let train_also = config.get("modules_to_save").and_then(crate::read::texts).unwrap_or_default();
        let is_this = union.gated() == gated;
        Ok(is_this.then(|| Loaded { method: Box::new(union), targets: None, train_also }))
    }
}

impl Method for Union {
    fn info(&self) -> &'static Info {
        self.info
    }

    fn formula(&self) -> Option<&'static str> {
        match (&self.prefix, &self.lora) {
            _ if self.alone => None,
            (Some(_), Some(_)) => Some(
                "tokens·d + projection·(d + 1) + 2·L·kv·(projection + 1) + L·(2·d·r + r + d + rank·(3·d + kv) + 4·(d + 1)), r = ⌊d/reduction⌋",
            ),
            _ => Some(
                "tokens·d + projection·(d + 1) + 2·L·kv·(projection + 1) + L·(2·d·r + r + d), r = ⌊d/reduction⌋",
            ),
        }
    }

    fn by_layers(&self) -> bool {
        self.prompt.is_none()
    }

    fn leave_out(&mut self, blocks: &[usize]) -> bool {
        if let Some(prefix) = &mut self.prefix {
            add_blocks(&mut prefix.leave_out, blocks);
        }
        if let Some(lora) = &mut self.lora {
            add_blocks(&mut lora.leave_out, blocks);
        }
        self.adapter.as_mut().is_none_or(|adapter| adapter.leave_out(blocks))
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        if let Some(prefix) = &self.prefix {
            let paths = prefix.attach(b, &self.name)?;
            *self.attentions.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = paths;
        }
        if let Some(adapter) = &self.adapter {
            adapter.attach(b, &self.name)?;
        }
        if let Some(prompt) = &self.prompt {
            prompt.attach(b, &self.name)?;
        }
        self.lora.as_ref().map_or(Ok(()), |lora| lora.attach(b, &self.name))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let adapter = self.adapter.as_ref().map(|a| {
            let mut own = a.method.config(model).get("config").cloned().unwrap_or_default();
            own["use_gating"] = a.gated.into();
            own
        });
        let lora = self.lora.as_ref().map(Lora::config);
        let prompt = self.prompt.as_ref().map(Prompt::config);
        let parts = [self.prefix.as_ref().map(Prefix::config), adapter, lora, prompt];
        let mut parts: Vec<Value> = parts.into_iter().flatten().collect();
        let inner = match self.alone {
            true => parts.pop().unwrap_or_default(),
            false => json!({ "architecture": "union", "configs": parts }),
        };
        around(model, &self.name, inner)
    }

    fn peft_type(&self) -> &'static str {
        if self.alone { ALONE } else { self.info.peft_type }
    }

    /// Its sites are its parts'.
    fn default_targets(&self, _sites: &Sites) -> Option<Targets> {
        None
    }

    fn file_name(&self, name: &str) -> String {
        let own = [".adapters.", ".loras.", ".prefix_gates.", "prefix_tunings.", "prompt_tunings."];
        match own.iter().any(|part| name.contains(part)) {
            true => name.into(),
            false => format!("base_model.model.{name}"),
        }
    }

    /// AdapterHub's file holds the prefix once for each attention and once by itself.
    fn file_copies(&self, name: &str, adapter: &engraft_nn::Adapter) -> Vec<String> {
        let own = self.adapter.as_ref().map_or(vec![], |a| a.method.file_copies(name, adapter));
        let Some((_, rest)) = name.split_once("prefix_tuning.prefix_tunings.") else { return own };
        let attentions = self.attentions.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        attentions.iter().map(|path| format!("{path}.prefix_tuning.pool.prefix_tunings.{rest}")).collect()
    }
}
