//! `adapter_config.json` as `peft` has it.

use engraft_nn::Result;
use serde_json::{Map, Value, json};

use super::settings::{BIASES, INFO, RANK_MAX, check};
use super::{Lora, Start};
use crate::read::{Pattern, Reader, as_written, number};
use crate::{Loaded, peft};

/// Keys of variants that are not here.
const OFF: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];
/// Keys that only say how the tensors started, or hold a default that matters only to a variant that is off.
const SILENT: &[&str] = &[
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
];

pub(super) fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.must_be_off(OFF);
    r.ignore(SILENT);
    let lora = Lora {
        rank: r.count("r", 8, RANK_MAX),
        alpha: r.float("lora_alpha", 8.0),
        root_scaling: r.flag("use_rslora", false),
        dropout: r.dropout("lora_dropout"),
        rank_pattern: r.patterns("rank_pattern"),
        alpha_pattern: r.patterns("alpha_pattern"),
        bias: r.one_of("bias", BIASES),
        product_bias: r.flag("lora_bias", false),
        start: read_start(&mut r),
        dora: r.flag("use_dora", false),
        tied: r.flag("ensure_weight_tying", false),
    };
    check(&lora, &mut r);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(lora), targets, train_also }))
}

/// `init_lora_weights`. Starts that edit the base (PiSSA and its kin) leave a file that means nothing without that base.
fn read_start(r: &mut Reader<'_>) -> Start {
    match r.value("init_lora_weights").cloned() {
        None | Some(Value::Bool(true)) => Start::Kaiming,
        Some(Value::Bool(false)) => Start::Random,
        Some(Value::String(s)) if s == "gaussian" => Start::Gaussian,
        Some(Value::String(s)) if s == "eva" || s == "orthogonal" => Start::Kaiming,
        Some(other) => {
            r.problem(format!(
                "`init_lora_weights` is {other}: such adapters fit only a base that was changed with them; save it in peft with `path_initial_model_for_weight_conversion` first"
            ));
            Start::Kaiming
        }
    }
}

impl Lora {
    /// The keys that are this method's own.
    pub(super) fn config(&self) -> Map<String, Value> {
        let start = match self.start {
            Start::Kaiming => json!(true),
            Start::Gaussian => json!("gaussian"),
            Start::Random => json!(false),
        };
        let mut map: Map<String, Value> =
            OFF.iter().chain(SILENT).map(|k| (k.to_string(), Value::Null)).collect();
        let own = json!({
            "alpha_pattern": Pattern::table(&self.alpha_pattern), "bias": name_of(BIASES, self.bias), "ensure_weight_tying": self.tied,
            "fan_in_fan_out": false, "init_lora_weights": start, "loftq_config": {}, "lora_alpha": number(self.alpha),
            "layers_pattern": null, "layers_to_transform": null, "lora_bias": self.product_bias, "lora_dropout": as_written(self.dropout), "megatron_core": "megatron.core",
            "qalora_group_size": 16, "r": self.rank, "rank_pattern": Pattern::table(&self.rank_pattern),
            "use_dora": self.dora, "use_qalora": false, "use_rslora": self.root_scaling,
        });
        map.extend(own.as_object().cloned().unwrap_or_default());
        map
    }
}

fn name_of<T: PartialEq>(names: &[(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|n| n.1 == value).map_or("", |n| n.0)
}
