//! A recipe that is right, and two methods to check it against.

use engraft_recipe::{ABOVE_ZERO, FieldKind, FieldSpec, MethodSpec, Problems, Recipe};

/// Every kind of key occurs.
pub const GOOD: &str = r#"model = "models/bert"
task = "sequence-classification"

[base]
quantize = "nf4"
double_quant = true

[method]
name = "lora"
rank = 8
alpha = 16
targets = ["query", "value"]
layers = "0-5,11"
rank_pattern = { "layer.0" = 4 }
alpha_pattern = { "layer.0" = 2.5 }
train_also = ["classifier"]

[data]
format = "csv"
path = "train.csv"
eval_path = "test.csv"
max_length = 128
labels = ["nö", "yes"]

[data.columns]
text = "question"
label = "intent"

[train]
epochs = 3
batch_size = 32
learning_rate = 1e-3
schedule = "cosine"
warmup_ratio = 0.06
dtype = "bf16"
seed = 7
eval_every = 50
"#;

/// LoRA and a method without settings.
pub fn methods() -> Vec<MethodSpec> {
    let rank = FieldKind::Int { min: 1, max: 4096 };
    let fields = vec![
        FieldSpec::new("rank", rank, "Width of the update.").or(8),
        FieldSpec::new("alpha", FieldKind::Float { min: ABOVE_ZERO, max: f64::MAX }, "Scale.").or(16.0),
        FieldSpec::new("dropout", FieldKind::Float { min: 0.0, max: 1.0 }, "Dropout before the update.")
            .or(0.0),
        FieldSpec::new("rslora", FieldKind::Bool, "Scale by the root of the rank.").or(false),
        FieldSpec::new("bias", FieldKind::OneOf(&["none", "all", "lora_only"]), "Biases trained too.")
            .or("none"),
        FieldSpec::new("rank_pattern", FieldKind::IntMap, "Ranks by pattern."),
        FieldSpec::new("alpha_pattern", FieldKind::FloatMap, "Scales by pattern."),
    ];
    vec![
        MethodSpec {
            name: "lora",
            summary: "Low-rank updates.",
            fields,
            elsewhere: vec![("dora".into(), "`dora = true`".into())],
        },
        MethodSpec { name: "bitfit", summary: "Biases alone.", fields: vec![], elsewhere: vec![] },
    ]
}

/// Reads as `recipe.toml`.
pub fn parse(source: &str, sets: &[&str]) -> Result<Recipe, Problems> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    Recipe::parse(source, "recipe.toml", &sets, &methods())
}

/// The messages without colour.
pub fn messages(source: &str, sets: &[&str]) -> String {
    parse(source, sets).expect_err("the recipe has a mistake").render(80, false)
}

/// Applies the edits to the good recipe and compares the whole message.
pub fn wrong(edits: &[(&str, &str)], sets: &[&str], expected: &str) {
    let mut source = GOOD.to_owned();
    for (from, to) in edits {
        assert!(source.contains(from), "the good recipe has {from}");
        source = source.replacen(from, to, 1);
    }
    assert_eq!(messages(&source, sets), expected);
}
