//! `adapter_config.json` of `adapters` 1.3: `{"config": {…}, "name": …}`, ours with a `peft_type` beside.

use engraft_nn::{Error, Result};
use serde_json::{Map, Value, json};

use super::{ACTIVATIONS, Bottleneck, INFO, Residual, Scaling, Start};
use crate::read::{Reader, number};
use crate::{Described, Loaded, peft};

/// Keys of variants that are not here.
const OFF: &[&str] = &[
    "cross_adapter",
    "inv_adapter",
    "phm_layer",
    "stochastic_depth",
    "use_gating",
    "shared_W_phm",
    "factorized_phm_rule",
];
/// Keys that only matter to those variants, with `adapters`' defaults, and how tensors started.
const SILENT: &[&str] = &[
    "factorized_phm_W",
    "hypercomplex_nonlinearity",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_phm_rule",
];
const STARTS: &[(&str, Start)] =
    &[("bert", Start::Bert), ("mam_adapter", Start::ZeroUp), ("houlsby", Start::Houlsby)];

pub(super) fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let ours = peft::is_type(config, INFO.peft_type);
    if config.get("peft_type").is_some_and(|t| !t.is_null()) && !ours {
        return Ok(None);
    }
    let Some(inner) = config.get("config").and_then(Value::as_object) else { return Ok(None) };
    if inner.get("architecture").is_some_and(|kind| kind == "union") && !ours {
        return Ok(None);
    }
    if !inner.contains_key("reduction_factor") {
        let kind = inner.get("architecture").and_then(Value::as_str).unwrap_or("unknown");
        let message =
            format!("this AdapterHub adapter is of kind `{kind}`; readable are bottleneck adapters");
        return Err(Error::Unsupported(message));
    }
    let method = read(inner, config.get("name").and_then(Value::as_str).unwrap_or("engraft"))?;
    let train_also = config.get("modules_to_save").and_then(crate::read::texts).unwrap_or_default();
    Ok(Some(Loaded { method: Box::new(method), targets: None, train_also }))
}

fn read(map: &Map<String, Value>, name: &str) -> Result<Bottleneck> {
    let mut r = Reader::file(map);
    r.must_be_off(OFF);
    r.ignore(SILENT);
    let (reduction, reduction_by_layer) = read_reduction(&mut r);
    let method = Bottleneck {
        name: name.into(),
        after_attention: r.flag("mh_adapter", false),
        after_mlp: r.flag("output_adapter", true),
        parallel: r.flag("is_parallel", false),
        activation: r.one_of("non_linearity", ACTIVATIONS),
        reduction,
        reduction_by_layer,
        leave_out: r.counts("leave_out").unwrap_or_default(),
        scaling: read_scaling(&mut r),
        dropout: r.dropout("dropout"),
        ln_before: r.flag("ln_before", false),
        ln_after: r.flag("ln_after", false),
        original_ln_before: r.flag("original_ln_before", false),
        original_ln_after: r.flag("original_ln_after", true),
        residual: read_residual(&mut r),
        residual_before_own_norm: r.flag("adapter_residual_before_ln", false),
        start: r.one_of("init_weights", STARTS),
    };
    r.finish()?;
    Ok(method)
}

/// A number, or numbers by layer with a `default`.
fn read_reduction(r: &mut Reader<'_>) -> (f64, Vec<(usize, f64)>) {
    let positive = |v: &Value| v.as_f64().filter(|f| *f > 0.0);
    let (mut all, mut by_layer) = (16.0, Vec::new());
    let Some(value) = r.value("reduction_factor").cloned() else { return (all, by_layer) };
    let table = match &value {
        Value::Object(map) => map.clone(),
        single => Map::from_iter([("default".to_string(), single.clone())]),
    };
    for (key, value) in &table {
        match (key.as_str(), key.parse(), positive(value)) {
            ("default", _, Some(reduction)) => all = reduction,
            (_, Ok(layer), Some(reduction)) => by_layer.push((layer, reduction)),
            _ => r.problem(format!(
                "`reduction_factor`: expected a number above 0 by layer or `default`, found `{key}`: {value}"
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
    /// All keys, so that `adapters` finds what it expects.
    pub(super) fn to_file(&self, model: &Described<'_>) -> Map<String, Value> {
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
        let activation = ACTIVATIONS.iter().find(|a| a.1 == self.activation).map_or("relu", |a| a.0);
        let start = STARTS.iter().find(|s| s.1 == self.start).map_or("bert", |s| s.0);
        let config = json!({
            "adapter_residual_before_ln": self.residual_before_own_norm, "cross_adapter": false,
            "dropout": self.dropout.to_string().parse::<f64>().unwrap_or(0.0),
            "factorized_phm_W": true, "factorized_phm_rule": false, "hypercomplex_nonlinearity": "glorot-uniform",
            "init_weights": start, "init_weights_seed": null, "inv_adapter": null, "inv_adapter_reduction_factor": null,
            "is_parallel": self.parallel, "learn_phm": true, "leave_out": self.leave_out, "ln_after": self.ln_after,
            "ln_before": self.ln_before, "mh_adapter": self.after_attention, "non_linearity": activation,
            "original_ln_after": self.original_ln_after, "original_ln_before": self.original_ln_before,
            "output_adapter": self.after_mlp, "phm_bias": true, "phm_c_init": "normal", "phm_dim": 4,
            "phm_init_range": 0.0001, "phm_layer": false, "phm_rank": 1, "reduction_factor": reduction,
            "residual_before_ln": residual, "scaling": scaling, "shared_W_phm": false, "shared_phm_rule": true,
            "stochastic_depth": 0.0, "use_gating": false,
        });
        let file = json!({
            "config": config, "hidden_size": model.info.width, "model_type": model.info.architecture, "name": self.name,
            "version": "adapters.1.3.0",
        });
        file.as_object().cloned().unwrap_or_default()
    }
}
