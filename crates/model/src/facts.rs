//! What must be known of an architecture before a model of it is built, or beside one: from `config.json` alone.

use engraft_nn::Task;
use serde_json::Value;

use crate::{ARCHITECTURES, Architecture};

/// See the module.
pub struct Facts {
    /// Linear layers with one output a label.
    pub(crate) labelled: &'static [&'static str],
    /// How many tokens a sequence may have.
    pub(crate) length: Length,
    /// What a `config.json` without `model_type` says where it is of this architecture.
    pub(crate) known_by: &'static [(&'static str, &'static str)],
    /// Ends of names of tensors in old files that are no weights.
    pub(crate) buffers: &'static [&'static str],
    /// Tables and heads share a tensor where the files hold no other values for them, whatever `tie_word_embeddings` says;
    /// that key has a meaning of its own.
    pub(crate) ties_by_values: bool,
    /// Heads of AdapterHub's library that compute what the model's own do.
    pub(crate) flexible: &'static [Flexible],
    /// Whether AdapterHub's library calls an MLP's last matrix the intermediate one, and the first, beside the gate, the output.
    pub(crate) mlp_reversed: bool,
}

impl Facts {
    /// Nothing to say.
    pub(crate) const NONE: Facts = Facts {
        labelled: &[],
        length: Length::Any,
        known_by: &[],
        buffers: &[],
        ties_by_values: false,
        flexible: &[],
        mlp_reversed: false,
    };
}

/// A head that AdapterHub's library builds after a description (a flexible head) and that computes what a class of `transformers`
/// does.
pub struct Flexible {
    /// What it computes.
    pub task: Task,
    /// Linear layers.
    pub layers: usize,
    /// Whether it reads the pooled row, where it could.
    pub pooled: bool,
    /// What stands between the layers, where there are several.
    pub activation: &'static str,
    /// Numbers of its modules with what the model has in their place.
    pub modules: &'static [(usize, &'static str)],
}

impl Flexible {
    /// One layer on a row for each sequence, which the trunk's pooling made where `pooled`.
    pub(crate) const fn one(task: Task, pooled: bool, modules: &'static [(usize, &'static str)]) -> Flexible {
        Flexible { task, layers: 1, pooled, activation: "", modules }
    }

    /// Whether a head described so is this one. What reads every token, or a row that the model's class chooses, has no choice of
    /// pooling.
    fn is(&self, config: &Value) -> bool {
        let says = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default();
        let pooled = config.get("use_pooler").and_then(Value::as_bool).unwrap_or(self.pooled);
        flexible_task(config) == Some(self.task)
            && config.get("layers").and_then(Value::as_u64) == Some(self.layers as u64)
            && pooled == self.pooled
            && (self.layers == 1 || says("activation_function") == self.activation)
    }
}

/// What a flexible head with this description computes; `None` where it tells no classes apart.
pub fn flexible_task(config: &Value) -> Option<Task> {
    match config.get("head_type")?.as_str()? {
        "classification" => Some(Task::SequenceClassification),
        "tagging" => Some(Task::TokenClassification),
        "image_classification" => Some(Task::ImageClassification),
        _ => None,
    }
}

/// How many tokens a sequence may have.
#[derive(Clone, Copy)]
pub(crate) enum Length {
    /// Any number, or the model reads pictures.
    Any,
    /// The model was trained on as many as this key says; more are possible.
    Trained(&'static str),
    /// As many as the table of positions has, whose size this key says.
    Table(&'static str),
    /// The same, but the positions of tokens begin after that of padding (RoBERTa).
    TableAfterPad(&'static str),
}

/// Tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenLimit {
    /// How many.
    pub tokens: usize,
    /// More are impossible: there is a table of positions.
    pub is_table: bool,
}

impl Architecture {
    /// The one that `config` is of, by `model_type`, or by what only it says where that is missing.
    pub fn of(config: &Value) -> Option<&'static Architecture> {
        let says = |(key, value): &(&str, &str)| config.get(key).and_then(Value::as_str) == Some(value);
        let known = |a: &Architecture| !a.facts.known_by.is_empty() && a.facts.known_by.iter().all(says);
        let all = ARCHITECTURES.iter().copied();
        match config.get("model_type") {
            Some(name) => all.into_iter().find(|a| name.as_str() == Some(a.name)),
            None => all.into_iter().find(|a| known(a)),
        }
    }

    /// The flexible head of AdapterHub's library that is described so, if the model's own computes the same.
    pub fn flexible(&self, config: &Value) -> Option<&'static Flexible> {
        self.facts.flexible.iter().find(|head| head.is(config))
    }

    /// What a class of `transformers` computes; `None` where it is not read.
    pub fn task_of(&self, class: &str) -> Option<Task> {
        self.classes.iter().find(|(name, _)| *name == class).map(|(_, task)| *task)
    }

    /// Whether a module or tensor lies in a head.
    pub fn in_head(&self, path: &str) -> bool {
        self.heads.iter().any(|head| path.starts_with(head))
    }

    /// What precedes the trunk's modules in classes with a head.
    pub fn trunk_prefix(&self) -> &'static str {
        self.prefix
    }

    /// The class of `transformers` that computes `task`: `present`, if it does, else the first.
    pub fn class_for(&self, task: Task, present: Option<&str>) -> Option<&'static str> {
        let mut classes = self.classes.iter().filter(|(_, t)| *t == task).map(|(class, _)| *class);
        classes.clone().find(|class| Some(*class) == present).or_else(|| classes.next())
    }
}

/// How many tokens a sequence may have; `None` where nothing limits them or the architecture is not known.
pub fn token_limit(config: &Value) -> Option<TokenLimit> {
    let size = |key: &str| config.get(key).and_then(Value::as_u64).map(|n| n as usize);
    let table = |tokens| TokenLimit { tokens, is_table: true };
    match Architecture::of(config)?.facts.length {
        Length::Any => None,
        Length::Trained(key) => Some(TokenLimit { tokens: size(key)?, is_table: false }),
        Length::Table(key) => size(key).map(table),
        Length::TableAfterPad(key) => {
            let pad = size("pad_token_id").unwrap_or(1);
            Some(table(size(key)?.saturating_sub(pad + 1)))
        }
    }
}

/// Whether tables and heads of this model share a tensor by its values in the files alone: then `tie_word_embeddings` stays
/// as it is when one of them gets a tensor of its own.
pub fn ties_by_values(config: &Value) -> bool {
    Architecture::of(config).is_some_and(|a| a.facts.ties_by_values)
}

/// Whether an adapter's tensors, by the names that `peft` gives them, are those of a model with a head on its trunk: their
/// modules lie below the trunk's own name, or in a head.
pub fn has_head<'a>(config: &Value, names: impl IntoIterator<Item = &'a str>) -> bool {
    let Some(architecture) = Architecture::of(config) else { return false };
    let below = |path: &str| !architecture.prefix.is_empty() && path.starts_with(architecture.prefix);
    let in_head = |path: &str| architecture.heads.iter().any(|head| path.starts_with(head));
    names
        .into_iter()
        .filter_map(|name| name.strip_prefix("base_model.model."))
        .any(|p| below(p) || in_head(p))
}

/// The number of labels of the classifier that an adapter's `tensors`, names and shapes, hold; `None` where they hold none.
pub fn labels_in<'a>(
    config: &Value,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>,
) -> Option<usize> {
    let labelled = Architecture::of(config)?.facts.labelled;
    let is_head = |name: &str| {
        let Some(path) = name.strip_suffix(".weight") else { return false };
        let path = path.strip_suffix(".modules_to_save").unwrap_or(path);
        labelled.iter().any(|head| path == *head || path.strip_suffix(head).is_some_and(|p| p.ends_with('.')))
    };
    let mut heads = tensors.into_iter().filter(|(name, shape)| shape.len() == 2 && is_head(name));
    heads.next().map(|(_, shape)| shape[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_configuration_tells_its_architecture_and_length() {
        let name = |config: Value| Architecture::of(&config).map(|a| a.name);
        assert_eq!(name(json!({ "model_type": "gpt2" })), Some("gpt2"));
        assert_eq!(name(json!({ "norm": "post", "pooling": "mean" })), Some("post-norm-vit"));
        assert_eq!(name(json!({ "norm": "post", "pooling": "mean", "model_type": "x" })), None);
        assert_eq!(name(json!({ "norm": "post" })), None);
        let limit = |config: Value| token_limit(&config).map(|l| (l.tokens, l.is_table));
        assert_eq!(limit(json!({ "model_type": "gpt2", "n_positions": 32 })), Some((32, true)));
        let roberta = json!({ "model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1 });
        assert_eq!(limit(roberta), Some((512, true)));
        let llama = json!({ "model_type": "llama", "max_position_embeddings": 2048 });
        assert_eq!(limit(llama), Some((2048, false)));
        assert_eq!(limit(json!({ "model_type": "t5", "n_positions": 512 })), None);
    }

    #[test]
    fn an_adapter_tells_whether_its_model_has_a_head() {
        let has = |model: &str, name: &str| has_head(&json!({ "model_type": model }), [name]);
        assert!(has("bert", "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"));
        assert!(!has("bert", "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"));
        assert!(has("t5", "base_model.model.decoder.block.0.layer.0.SelfAttention.q.lora_A.weight"));
        assert!(!has("t5", "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"));
    }

    #[test]
    fn labels_are_counted_at_the_layer_that_gives_them() {
        let labels = |model: &str, name: &str, shape: &[usize]| {
            labels_in(&json!({ "model_type": model }), [(name, shape)])
        };
        assert_eq!(labels("gpt2", "base_model.model.score.weight", &[7, 32]), Some(7));
        assert_eq!(labels("gpt2", "base_model.score.weight", &[3, 32]), Some(3));
        assert_eq!(labels("vit", "base_model.classifier.weight", &[2, 24]), Some(2));
        assert_eq!(labels("deit", "base_model.model.cls_classifier.weight", &[2, 24]), Some(2));
        let saved = "base_model.model.classifier.modules_to_save.weight";
        assert_eq!(labels("bert", saved, &[5, 32]), Some(5));
        assert_eq!(labels("roberta", "base_model.model.classifier.dense.weight", &[32, 32]), None);
        assert_eq!(labels("roberta", "base_model.model.classifier.out_proj.weight", &[4, 32]), Some(4));
        assert_eq!(labels("bert", "base_model.model.classifier.lora_A.weight", &[4, 32]), None);
        assert_eq!(labels("bert", "base_model.model.classifier.bias", &[4]), None);
    }

    #[test]
    fn a_flexible_head_is_the_models_own_where_it_computes_the_same() {
        let of = |model: &str, config: Value| {
            let architecture = Architecture::of(&json!({ "model_type": model })).unwrap();
            architecture.flexible(&config).map(|head| head.modules[0].1)
        };
        let classifies = |layers: u64, pooled: bool| json!({ "head_type": "classification", "layers": layers, "use_pooler": pooled, "activation_function": "tanh" });
        assert_eq!(of("bert", classifies(1, true)), Some("classifier"));
        assert_eq!(of("bert", classifies(1, false)), None);
        assert_eq!(of("bert", classifies(2, true)), None);
        assert_eq!(of("roberta", classifies(2, false)), Some("classifier.dense"));
        let mut other = classifies(2, false);
        other["activation_function"] = json!("relu");
        assert_eq!(of("roberta", other), None);
        let tagging = json!({ "head_type": "tagging", "layers": 1, "activation_function": "tanh" });
        assert_eq!(of("roberta", tagging.clone()), Some("classifier"));
        assert_eq!(of("llama", tagging), None);
        assert_eq!(of("gpt2", classifies(1, false)), Some("score"));
        assert_eq!(of("bert", json!({ "head_type": "question_answering", "layers": 1 })), None);
    }

    #[test]
    fn a_class_is_kept_where_it_computes_the_task() {
        let of = |name: &str| Architecture::of(&json!({ "model_type": name })).unwrap();
        let class = |name: &str, task, present| of(name).class_for(task, present);
        let classify = Task::SequenceClassification;
        assert_eq!(class("gpt2", classify, Some("GPT2LMHeadModel")), Some("GPT2ForSequenceClassification"));
        let teacher = "DeiTForImageClassificationWithTeacher";
        assert_eq!(class("deit", Task::ImageClassification, Some(teacher)), Some(teacher));
        assert_eq!(class("t5", classify, None), None);
    }
}
