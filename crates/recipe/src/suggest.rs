//! "Did you mean": names that other programs use for the same thing, and keys
//! that stand in the wrong table. And the format of data by their name.

use crate::keys::table;
use crate::spec::{FieldKind, FieldSpec, MethodSpec};

/// What other programs call a key of ours: foreign name, ours. Offered only where ours is a key of the table.
const FOREIGN: &[(&str, &str)] = &[
    ("base_model", "model"),
    ("model_name", "model"),
    ("model_name_or_path", "model"),
    ("pretrained_model_name_or_path", "model"),
    ("task_type", "task"),
    ("peft_type", "name"),
    ("type", "name"),
    ("r", "rank"),
    ("lora_r", "rank"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "dropout"),
    ("target_modules", "targets"),
    ("exclude_modules", "exclude"),
    ("modules_to_save", "train_also"),
    ("layers_to_transform", "layers"),
    ("lr", "learning_rate"),
    ("num_epochs", "epochs"),
    ("num_train_epochs", "epochs"),
    ("max_steps", "steps"),
    ("micro_batch_size", "batch_size"),
    ("per_device_train_batch_size", "batch_size"),
    ("gradient_accumulation_steps", "gradient_accumulation"),
    ("lr_scheduler", "schedule"),
    ("lr_scheduler_type", "schedule"),
    ("scheduler", "schedule"),
    ("save_steps", "checkpoint_every"),
    ("eval_steps", "eval_every"),
    ("logging_steps", "log_every"),
    ("metric_for_best_model", "best_metric"),
    ("adam_eps", "adam_epsilon"),
    ("precision", "dtype"),
    ("train_file", "path"),
    ("train_path", "path"),
    ("file", "path"),
    ("validation_file", "eval_path"),
    ("test_path", "eval_path"),
    ("val_set_size", "eval_fraction"),
    ("max_seq_length", "max_length"),
    ("sequence_len", "max_length"),
    ("cutoff_len", "max_length"),
    ("chat_template", "template"),
    ("sample_packing", "packing"),
    ("load_in_4bit", "quantize"),
];

/// Our name for what another program calls `word`, where it is one of `names`.
pub(crate) fn ours<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase().replace('-', "_");
    let same: Vec<&str> =
        FOREIGN.iter().filter(|(foreign, _)| *foreign == lower).map(|(_, ours)| *ours).collect();
    names.into_iter().find(|name| same.contains(name))
}

/// A name without what people write differently: case, hyphens, brackets.
fn plain(name: &str) -> String {
    let name = name.to_lowercase().replace('+', "plus").replace('³', "3");
    name.chars().filter(|c| c.is_alphanumeric()).collect()
}

/// What to write here for a method that is called `name` elsewhere, or spelled so.
pub fn known_elsewhere(name: &str, methods: &[MethodSpec]) -> Option<String> {
    let wanted = plain(name);
    let spelled = methods.iter().find(|method| plain(method.name) == wanted);
    if let Some(method) = spelled.filter(|_| !wanted.is_empty()) {
        return Some(format!("`name = \"{}\"`", method.name));
    }
    let mut all = methods.iter().flat_map(|method| &method.elsewhere);
    all.find(|(own, _)| plain(own) == wanted && !wanted.is_empty()).map(|(_, how)| how.clone())
}

/// What to write as `data.format` for data of this name: by its end, and without one a folder of pictures.
pub(crate) fn format_for(path: &str) -> String {
    let lower = path.to_lowercase();
    let name = lower.rsplit('/').next().unwrap_or("");
    let name = name.strip_suffix(".gz").unwrap_or(name);
    let format = match name.rsplit_once('.').map_or("", |(_, end)| end) {
        "csv" => "csv",
        "tsv" => "tsv",
        "json" | "jsonl" | "ndjson" => "jsonl",
        "txt" | "md" => "text",
        "npy" => "npy",
        "safetensors" => "tensors",
        _ if name.contains("idx") || name.ends_with("ubyte") => "idx",
        "" => "images",
        _ => {
            let of = |field: &FieldSpec| match field.kind {
                FieldKind::OneOf(names) if field.name == "format" => Some(names.join(", ")),
                _ => None,
            };
            let names = table("data").and_then(|data| data.fields.iter().find_map(of)).unwrap_or_default();
            return format!("add `format = …`, one of {names}");
        }
    };
    let why = match format {
        "images" => " for a folder with a folder of pictures for each class",
        "jsonl" => "; or \"chat\", \"alpaca\", \"sharegpt\" where the rows are such",
        _ => "",
    };
    format!("add `format = \"{format}\"`{why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_elsewhere_is_known_however_it_is_written() {
        let lora = MethodSpec {
            name: "ln_lora",
            summary: "",
            fields: vec![],
            elsewhere: vec![("lora+".into(), "so".into())],
        };
        let known = |name| known_elsewhere(name, std::slice::from_ref(&lora));
        assert_eq!(known("LoRA-Plus").as_deref(), Some("so"));
        assert_eq!(known("LN-LoRA").as_deref(), Some("`name = \"ln_lora\"`"));
        assert_eq!((known("lora"), known(""), known("--")), (None, None, None));
    }

    #[test]
    fn foreign_names_only_where_ours_is_a_key() {
        assert_eq!(ours("lora_alpha", ["rank", "alpha"]), Some("alpha"));
        assert_eq!(ours("lora_alpha", ["rank"]), None);
    }
}
