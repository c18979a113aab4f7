//! `adapter_config.json` of `adapters` 1.3: `{"config": {…}, "name": …}`, ours with a `peft_type` beside.

use engraft_nn::{Error, Result};
use serde_json::{Map, Value, json};

use super::phm::Phm;
use super::settings::{Bottleneck, Form, Residual, Scaling, Start};
use crate::read::{Reader, as_written, number, reduction};
use crate::shared::activations::ACTIVATIONS;
use crate::{Described, Info, Loaded, peft};

/// Keys that only matter to variants that are not here or to how tensors start, with `adapters`' values for them.
const SILENT: [(&str, &str); 3] = [
    ("hypercomplex_nonlinearity", "\"glorot-uniform\""),
    ("init_weights_seed", "null"),
    ("inv_adapter_reduction_factor", "null"),
];
const STARTS: &[(&str, Start)] =
    &[("bert", Start::Bert), ("mam_adapter", Start::ZeroUp), ("houlsby", Start::Houlsby)];

/// The inner configuration of a file of AdapterHub or of our `peft_type`, and the adapter's name.
pub(crate) fn from_adapter_hub<'c>(
    config: &'c Value,
    info: &Info,
) -> Option<(&'c Map<String, Value>, &'c str)> {
    let ours = peft::is_type(config, info.peft_type);
    if config.get("peft_type").is_some_and(|t| !t.is_null()) && !ours {
        return None;
    }
    let inner = config.get("config").and_then(Value::as_object)?;
    Some((inner, config.get("name").and_then(Value::as_str).unwrap_or("engraft")))
}

/// A file with or without Compacter's layers; `None` where it is another method's.
pub(crate) fn read_file(config: &Value, info: &Info, has_phm: bool) -> Result<Option<Loaded>> {
    let Some(method) = saved(config, info, has_phm)? else { return Ok(None) };
    let train_also = config.get("modules_to_save").and_then(crate::read::texts).unwrap_or_default();
    Ok(Some(Loaded { method: Box::new(method), targets: None, train_also }))
}

/// The adapter of such a file.
fn saved(config: &Value, info: &Info, has_phm: bool) -> Result<Option<Bottleneck>> {
    let Some((inner, name)) = from_adapter_hub(config, info) else { return Ok(None) };
    let ours = peft::is_type(config, info.peft_type);
    if inner.get("architecture").is_some_and(|kind| kind == "union") && !ours {
        return Ok(None);
    }
    if !inner.contains_key("reduction_factor") {
        return match inner.get("architecture").and_then(Value::as_str) {
            Some("reft" | "lora" | "prefix_tuning" | "prompt_tuning") => Ok(None),
            kind => Err(Error::Unsupported(format!(
                "this AdapterHub adapter is of kind `{}`; readable are bottleneck adapters, ReFT, prefixes, prompts, LoRA and (IA)³, and their unions",
                kind.unwrap_or("unknown")
            ))),
        };
    }
    let says_phm = inner.get("phm_layer").and_then(Value::as_bool).unwrap_or(false);
    if !ours && says_phm != has_phm {
        return Ok(None);
    }
    let mut r = Reader::file(inner);
    let mut method = read(&mut r, name, has_phm);
    r.finish()?;
    method.robust_drop = config.get("robust_drop").and_then(Value::as_bool).unwrap_or(false);
    Ok(Some(method))
}

/// The keys of an adapter called `name`.
pub(crate) fn read(r: &mut Reader<'_>, name: &str, has_phm: bool) -> Bottleneck {
    let invertible = match r.value("inv_adapter").cloned() {
        None => None,
        Some(kind) if kind == "nice" => Some(r.reduction("inv_adapter_reduction_factor", 2.0)),
        Some(kind) => {
            r.problem(format!(
                "`inv_adapter`: expected nice, found {kind}; glow fails in the library that writes such files"
            ));
            None
        }
    };
    if r.flag("phm_layer", has_phm) != has_phm {
        r.problem("`phm_layer` does not agree with the file's `peft_type`");
    }
    let silent = |(key, usual): (&'static str, &str)| {
        let usual = || serde_json::from_str(usual).unwrap_or(Value::Null);
        (key.to_owned(), r.value(key).cloned().unwrap_or_else(usual))
    };
    let mut silent: Map<String, Value> = SILENT.into_iter().map(silent).collect();
    let phm = if has_phm { Some(Phm::from_file(r)) } else { None };
    if !has_phm {
        silent.extend(Phm::silent(r));
    }
    let (reduction, reduction_by_layer) = read_reduction(r);
    Bottleneck {
        name: name.into(),
        after_attention: r.flag("mh_adapter", false),
        after_cross_attention: r.flag("cross_adapter", false),
        after_mlp: r.flag("output_adapter", true),
        parallel: r.flag("is_parallel", false),
        activation: r.one_of("non_linearity", ACTIVATIONS),
        reduction,
        reduction_by_layer,
        leave_out: r.counts("leave_out").unwrap_or_default(),
        scaling: read_scaling(r),
        dropout: r.dropout("dropout"),
        depth: r.dropout("stochastic_depth"),
        ln_before: r.flag("ln_before", false),
        ln_after: r.flag("ln_after", false),
        original_ln_before: r.flag("original_ln_before", false),
        original_ln_after: r.flag("original_ln_after", true),
        residual: read_residual(r),
        residual_before_own_norm: r.flag("adapter_residual_before_ln", false),
        gating: r.flag("use_gating", false),
        start: r.one_of("init_weights", STARTS),
        invertible,
        phm,
        silent,
        ..Bottleneck::of(Form::Pfeiffer)
    }
}

/// A number, or numbers by layer with a `default`.
fn read_reduction(r: &mut Reader<'_>) -> (f64, Vec<(usize, f64)>) {
    let (mut all, mut by_layer) = (16.0, Vec::new());
    let Some(value) = r.value("reduction_factor").cloned() else { return (all, by_layer) };
    let table = match &value {
        Value::Object(map) => map.clone(),
        single => Map::from_iter([("default".to_string(), single.clone())]),
    };
    for (key, value) in &table {
        match (key.as_str(), key.parse(), reduction(value)) {
            ("default", _, Some(reduction)) => all = reduction,
            (_, Ok(layer), Some(reduction)) => by_layer.push((layer, reduction)),
            _ => r.problem(format!(
                "`reduction_factor`: expected a number of at least 0.01 by layer or `default`, found `{key}`: {value}"
            )),
        }
    }
    (all, by_layer)
}

fn read_scaling(r: &mut Reader<'_>) -> Scaling {
    match r.value("scaling").cloned() {
        None => Scaling::Fixed(1.0),
        Some(Value::String(s)) if s == "learned" => Scaling::Learned,
        Some(Value::String(s)) if s == "channel" => Scaling::Channel,
        Some(_) => Scaling::Fixed(r.float("scaling", 1.0)),
    }
}

fn read_residual(r: &mut Reader<'_>) -> Residual {
    match r.value("residual_before_ln").cloned() {
        None | Some(Value::Bool(true)) => Residual::Output,
        Some(Value::Bool(false)) => Residual::Input,
        Some(Value::String(s)) if s == "post_add" => Residual::Sum,
        Some(other) => {
            r.problem(format!("`residual_before_ln`: expected true, false or post_add, found {other}"));
            Residual::Output
        }
    }
}

impl Bottleneck {
    /// The outer keys around `to_config`.
    pub(super) fn to_file(&self, model: &Described<'_>) -> Map<String, Value> {
        let mut file = around(model, &self.name, self.to_config());
        if self.robust_drop {
            file.insert("robust_drop".into(), json!(true));
        }
        file
    }

    /// All keys of the adapter, so that `adapters` finds what it expects.
    pub(crate) fn to_config(&self) -> Value {
        let by_layer = self.reduction_by_layer.iter().map(|(layer, v)| (layer.to_string(), number(*v)));
        let reduction = match self.reduction_by_layer.is_empty() {
            true => number(self.reduction),
            false => {
                Value::Object(by_layer.chain([("default".to_string(), number(self.reduction))]).collect())
            }
        };
        let scaling = match self.scaling {
            Scaling::Fixed(s) => json!(s),
            Scaling::Learned => json!("learned"),
            Scaling::Channel => json!("channel"),
        };
        let residual = match self.residual {
            Residual::Output => json!(true),
            Residual::Input => json!(false),
            Residual::Sum => json!("post_add"),
        };
        let start = STARTS.iter().find(|s| s.1 == self.start).map_or("bert", |s| s.0);
        let config = json!({
            "adapter_residual_before_ln": self.residual_before_own_norm, "cross_adapter": self.after_cross_attention,
            "dropout": as_written(self.dropout), "init_weights": start, "inv_adapter": null, "is_parallel": self.parallel,
            "leave_out": self.leave_out, "ln_after": self.ln_after, "ln_before": self.ln_before,
            "mh_adapter": self.after_attention, "non_linearity": self.activation.name(),
            "original_ln_after": self.original_ln_after, "original_ln_before": self.original_ln_before,
            "output_adapter": self.after_mlp, "phm_layer": self.phm.is_some(), "reduction_factor": reduction,
            "residual_before_ln": residual, "scaling": scaling, "stochastic_depth": as_written(self.depth),
            "use_gating": self.gating,
        });
        let mut map = config.as_object().cloned().unwrap_or_default();
        let usual =
            SILENT.map(|(key, usual)| (key.to_owned(), serde_json::from_str(usual).unwrap_or(Value::Null)));
        let phm = self.phm.clone().unwrap_or_default().to_file();
        map.extend(usual.into_iter().chain(phm.as_object().cloned().unwrap_or_default()));
        map.extend(self.silent.clone());
        if let Some(reduction) = self.invertible {
            map.insert("inv_adapter".into(), json!("nice"));
            map.insert("inv_adapter_reduction_factor".into(), number(reduction));
        }
        Value::Object(map)
    }
}

/// A file of AdapterHub around the configuration of an adapter called `name`.
pub(crate) fn around(model: &Described<'_>, name: &str, config: Value) -> Map<String, Value> {
    let file = json!({
        "config": config, "hidden_size": model.info.width, "model_type": model.info.architecture, "name": name,
        "version": "adapters.1.3.0",
    });
    file.as_object().cloned().unwrap_or_default()
}
