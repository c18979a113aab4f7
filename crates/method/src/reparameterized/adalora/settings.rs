//! AdaLoRA's settings in a recipe and in `peft`'s file.

use serde_json::{Map, Value};

use super::AdaLora;
use super::allocation::Schedule;
use crate::read::Reader;
use crate::shared::biases::Biases;
use crate::shared::low_rank::RANK_MAX;
use crate::shared::token_indices::Tokens;

/// The names of the settings in a recipe, or those of the file.
pub(super) struct Names {
    init_rank: &'static str,
    target_rank: &'static str,
    alpha: &'static str,
    dropout: &'static str,
    delta_t: &'static str,
}

pub(super) const IN_RECIPE: Names = Names {
    init_rank: "init_rank",
    target_rank: "target_rank",
    alpha: "alpha",
    dropout: "dropout",
    delta_t: "delta_t",
};
pub(super) const IN_FILE: Names = Names {
    init_rank: "init_r",
    target_rank: "target_r",
    alpha: "lora_alpha",
    dropout: "lora_dropout",
    delta_t: "deltaT",
};

/// What recipe and file both say.
pub(super) fn read(r: &mut Reader<'_>, names: &Names) -> AdaLora {
    let schedule = Schedule {
        tinit: r.at_least("tinit", 0, 0),
        tfinal: r.at_least("tfinal", 0, 0),
        delta_t: r.at_least(names.delta_t, 1, 1),
        total: Some(r.at_least("total_step", 0, 1)).filter(|n| *n > 0),
    };
    let method = AdaLora {
        init_rank: r.count(names.init_rank, 12, RANK_MAX),
        target_rank: r.count(names.target_rank, 8, RANK_MAX),
        alpha: r.float(names.alpha, 8.0),
        dropout: r.dropout(names.dropout),
        schedule,
        beta1: r.float("beta1", 0.85),
        beta2: r.float("beta2", 0.85),
        orthogonality: r.float("orth_reg_weight", 0.5),
        bias: Biases::read(r, "lora_only"),
        random: false,
        unused_rank: 8,
        tokens: Tokens::default(),
        kept: Map::new(),
        pattern: None,
    };
    for (key, beta) in [("beta1", method.beta1), ("beta2", method.beta2)] {
        if beta <= 0.0 || beta >= 1.0 {
            r.problem(format!("`{key}`: expected a number between 0 and 1, found {beta}"));
        }
    }
    if let Some(problem) = method.grows(names.target_rank).filter(|_| !r.is_file()) {
        r.problem(problem);
    }
    if let Some(Err(e)) = method.schedule.total.map(|total| method.schedule.check(total)) {
        r.problem(e.to_string());
    }
    method
}

impl AdaLora {
    /// What is wrong with a target above the rank that there is to cut from. A file may say so all the same: it is computed
    /// with the ranks that it has, and only a run has to cut them.
    pub(super) fn grows(&self, target: &str) -> Option<String> {
        let (last, first) = (self.target_rank, self.init_rank);
        (last > first).then(|| format!("`{target}` is {last}, above the first rank {first}"))
    }
}

/// Keys of LoRA that say something to AdaLoRA and are null unless they do.
pub(super) const READ: &[&str] = &["layers_pattern", "layers_to_transform", "trainable_token_indices"];
/// Keys of LoRA that `peft` does not read for AdaLoRA.
pub(super) const UNREAD: &[&str] = &[
    "alpha_pattern",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "lora_bias",
    "megatron_core",
    "qalora_group_size",
    "use_qalora",
    "use_rslora",
];

/// `rank_pattern`: lists of marks by tensor.
pub(super) fn read_pattern(r: &mut Reader<'_>) -> Option<Map<String, Value>> {
    let value = r.value("rank_pattern")?.clone();
    let marks = |v: &Value| v.as_array().is_some_and(|list| list.iter().all(Value::is_boolean));
    match value.as_object().filter(|map| map.values().all(marks)) {
        Some(map) => Some(map.clone()).filter(|map| !map.is_empty()),
        None => {
            r.problem(format!("`rank_pattern`: expected lists of true and false by tensor, found {value}"));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use engraft_nn::Task;
    use serde_json::json;

    use crate::testing::{chosen, config, with};
    use crate::{Ahead, find, from_file};

    #[test]
    fn ranks_that_a_run_would_have_to_raise_are_refused_in_recipes_and_runs() {
        let grown =
            with(config(&[chosen("adalora", json!({}))], &[]), json!({ "init_r": 4, "total_step": 20 }));
        let loaded = from_file(&grown).unwrap().method;
        let run = Ahead { steps: 20, task: Task::CausalLm, tasks: None };
        let refused = loaded.suits(&run).unwrap_err().to_string();
        assert!(refused.contains("`target_r` is 8, above the first rank 4"), "{refused}");
        let recipe = json!({ "init_rank": 4 });
        assert!((find("adalora").unwrap().from_settings)(recipe.as_object().unwrap()).is_err());
    }
}
