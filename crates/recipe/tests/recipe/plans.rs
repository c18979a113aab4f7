//! Arguments laid over a recipe, plans and their text, the schema.

use std::path::{Path, PathBuf};

use engraft_recipe::{Facts, FieldKind, Length, Origin, Recipe, Task, Template, schema, tables};
use serde_json::{Value, json};

fn facts(task: Task) -> Facts {
    Facts { model_dir: None, task, model_length: 512, steps_per_epoch: 41, working_dir: "/here".into() }
}

#[test]
fn arguments_come_before_the_recipe() {
    let sets =
        ["train.steps=50", "method.rank=4", "method[0].alpha=2", "model=7", "data.labels=[\"a\", \"b\"]"];
    let recipe = crate::common::parse(crate::common::GOOD, &sets).unwrap();
    assert_eq!(recipe.train.length, Length::Steps(50), "the recipe's epochs give way");
    assert_eq!(recipe.methods[0].settings["rank"], 4);
    assert_eq!(recipe.methods[0].settings["alpha"], 2.0);
    assert_eq!(recipe.model.value, "7", "a bare number is a name where a name is wanted");
    assert_eq!(recipe.data.labels.as_ref().unwrap().len(), 2);
    assert_eq!(recipe.origin("train.steps"), Origin::Set);
    assert_eq!(recipe.origin("train.seed"), Origin::Recipe);
    assert_eq!(recipe.origin("train.threads"), Origin::Default);
}

#[test]
fn two_arguments_that_exclude_each_other_do_not_give_way() {
    let message = crate::common::messages(crate::common::GOOD, &["train.steps=5", "train.epochs=1"]);
    assert!(message.contains("`train.epochs` and `train.steps` cannot both be set"), "{message}");
    assert!(message.ends_with("1 error in --set; nothing was loaded or written\n"), "{message}");
}

#[test]
fn paths_are_relative_to_where_they_are_written() {
    let read = |sets: &[String]| {
        Recipe::parse(crate::common::GOOD, "recipes/a.toml", sets, &crate::common::methods()).unwrap()
    };
    let recipe = read(&["data.eval_path=other.csv".into()]);
    assert_eq!(recipe.data.path, Path::new("recipes/train.csv"));
    assert_eq!(recipe.data.eval_path.as_deref(), Some(Path::new("other.csv")));
    assert_eq!(recipe.model_path, Path::new("recipes/models/bert"));
    assert_eq!(read(&["model=m".into()]).model_path, Path::new("m"));
    let template = |value: &str| read(&[format!("data.template={value}")]).data.template;
    assert_eq!(template("chat.jinja"), Some(Template::Path("chat.jinja".into())));
    assert_eq!(template("plain"), Some(Template::Text("plain".into())), "the built-in form, not a file");
    assert_eq!(template("'{{ messages }}'"), Some(Template::Text("{{ messages }}".into())));
}

#[test]
fn a_plan_decides_everything() {
    let recipe = crate::common::parse(crate::common::GOOD, &["train.warmup_ratio=0.1"]).unwrap();
    let plan = recipe.plan(&facts(Task::SequenceClassification)).unwrap();
    assert_eq!((plan.steps, plan.warmup_steps, plan.eval_every, plan.max_length), (123, 13, 50, 128));
    assert_eq!(plan.methods[0].settings["bias"], "none", "defaults are filled in");
    assert_eq!(plan.data.path, Path::new("/here/train.csv"));
}

#[test]
fn a_plan_s_text_names_each_origin() {
    let source = "model = \"org/name\"\n[method]\nname = \"bitfit\"\nlayers = [3, 1]\n[data]\nformat = \"text\"\npath = \"a \\\"b\\\".txt\"\n";
    let recipe = crate::common::parse(source, &["train.steps=5", "data.eval_fraction=0.1"]).unwrap();
    let text = recipe.plan(&facts(Task::CausalLm)).unwrap().to_toml();
    let expected = r#"# engraft plan, format 1
# 5 optimizer steps, 0 of them warm-up
model = "org/name"  # recipe
task = "causal-lm"  # found

[base]
quantize = "none"  # default
double_quant = false  # default
block_size = 64  # default

[method]
name = "bitfit"  # recipe
layers = [1, 3]  # recipe

[data]
format = "text"  # recipe
path = "/here/a \"b\".txt"  # recipe
eval_fraction = 0.1  # --set
temperature = 1.0  # default
shuffle = true  # default
header = true  # default
group_by_length = false  # default
packing = false  # default
allow_empty = false  # default
max_length = 512  # found

[train]
steps = 5  # --set
batch_size = 16  # default
gradient_accumulation = 1  # default
learning_rate = 0.0002  # default
weight_decay = 0.0  # default
schedule = "linear"  # default
warmup_ratio = 0.0  # default
max_grad_norm = 1.0  # default
adam_beta1 = 0.9  # default
adam_beta2 = 0.999  # default
adam_epsilon = 1e-8  # default
dtype = "f32"  # default
seed = 0  # default
threads = 0  # default
gradient_checkpointing = false  # default
log_every = 1  # default
checkpoint_every = 100  # default
keep_every = 0  # default
early_stopping_patience = 0  # default
best_metric = "loss"  # default
eval_every = 1  # found
"#;
    assert_eq!(text, expected);
}

#[test]
fn a_plan_is_a_recipe() {
    let two = crate::common::GOOD.replace("[data]\n", "[data]\ntemplate = \"t.jinja\"\n").replace(
        "[method]\nname = \"lora\"",
        "[[method]]\nfrom = \"runs/a\"\n[[method]]\nname = \"bitfit\"\nroles = [\"q\"]\n[[method]]\nname = \"lora\"",
    );
    for source in [crate::common::GOOD, two.as_str()] {
        let facts =
            Facts { model_dir: Some(PathBuf::from("models/bert")), ..facts(Task::SequenceClassification) };
        let plan = crate::common::parse(source, &[]).unwrap().plan(&facts).unwrap();
        let again = Recipe::parse(&plan.to_toml(), "runs/x/plan.toml", &[], &crate::common::methods());
        let again = again.unwrap_or_else(|problems| panic!("{problems}\n{}", plan.to_toml()));
        let again = again.plan(&Facts { model_dir: Some("/here/models/bert".into()), ..facts }).unwrap();
        assert_eq!(again.data, plan.data);
        assert_eq!(again.train, plan.train);
        assert_eq!(
            (again.model.as_str(), again.base, again.steps),
            ("/here/models/bert", plan.base, plan.steps)
        );
        assert_eq!(again.methods.len(), plan.methods.len());
        for (again, method) in again.methods.iter().zip(&plan.methods) {
            assert_eq!(again.settings, method.settings);
            assert_eq!(again.targets, method.targets);
            assert_eq!(
                again.from.as_ref().map(|from| &from.value),
                method.from.as_ref().map(|from| &from.value)
            );
        }
    }
}

#[test]
fn a_task_found_later_is_checked_too() {
    let source = crate::common::GOOD
        .replace("task = \"sequence-classification\"\n", "")
        .replace("labels = [\"nö\", \"yes\"]", "packing = true");
    let recipe = crate::common::parse(&source, &[]).unwrap();
    let problems = recipe.plan(&facts(Task::TokenClassification)).unwrap_err();
    let expected = "error: `data.packing` does not go with the task token-classification
  --> recipe.toml:22:11
   |
22 | packing = true
   |           ^^^^ a packed row would hold several answers
   |
   = note: the task token-classification follows from the model and the data

1 error in recipe.toml; nothing was loaded or written
";
    assert_eq!(problems.render(80, false), expected);
}

#[test]
fn the_schema_has_every_key_and_every_method() {
    let schema = schema(&crate::common::methods());
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(schema["required"], json!(["model", "method", "data"]));
    let train = &schema["properties"]["train"];
    assert_eq!(train["properties"]["epochs"]["exclusiveMinimum"], 0);
    assert_eq!(train["properties"]["adam_beta1"]["exclusiveMaximum"], 1);
    assert_eq!(train["properties"]["dtype"]["enum"], json!(["f32", "bf16"]));
    assert_eq!(train["allOf"][0], json!({ "not": { "required": ["epochs", "steps"] } }));
    for table in tables().iter().filter(|table| table.path != "method") {
        let path: String = table
            .path
            .split('.')
            .filter(|part| !part.is_empty())
            .map(|p| format!("/properties/{p}{}", if p == "tasks" { "/items" } else { "" }))
            .collect();
        for field in &table.fields {
            let property = schema.pointer(&format!("{path}/properties/{}", field.name));
            assert_eq!(property.unwrap()["description"], field.doc, "{} {}", table.path, field.name);
        }
    }
    let methods = schema["properties"]["method"]["anyOf"][0]["anyOf"].as_array().unwrap();
    assert_eq!(methods.len(), 3, "two methods and a saved adapter");
    assert_eq!(methods[0]["properties"]["name"]["const"], "lora");
    assert_eq!(methods[0]["properties"]["rank"]["default"], 8);
    assert!(methods[0]["properties"]["targets"].is_object());
    assert_eq!(methods[1]["properties"].get("rank"), None);
}

#[test]
fn every_default_is_a_value_its_own_key_takes() {
    for field in tables().iter().flat_map(|table| &table.fields) {
        let Some(default) = &field.default else { continue };
        let fits = match (&field.kind, default) {
            (FieldKind::Bool, Value::Bool(_)) => true,
            (FieldKind::Int { min, max }, Value::Number(n)) => {
                n.as_i64().is_some_and(|n| (*min..=*max).contains(&n))
            }
            (FieldKind::Float { min, max }, Value::Number(n)) => {
                n.as_f64().is_some_and(|n| (*min..=*max).contains(&n))
            }
            (FieldKind::OneOf(names), Value::String(text)) => names.contains(&text.as_str()),
            _ => false,
        };
        assert!(fits, "{} = {default}", field.name);
    }
}

#[test]
fn the_reference_page_has_every_key() {
    let page = engraft_recipe::reference();
    for field in tables().iter().flat_map(|table| &table.fields) {
        assert!(page.contains(&format!("| `{}` | ", field.name)), "{}", field.name);
    }
    assert!(page.contains(
        "| `batch_size` | a whole number, at least 1, at most 1048576 | `16` | Rows a micro-batch. |"
    ));
}

/// The good recipe with its data as tasks.
fn with_tasks(tasks: &str) -> String {
    let lines = ["path = \"train.csv\"\n", "eval_path = \"test.csv\"\n"];
    let without = lines.iter().fold(crate::common::GOOD.to_owned(), |text, line| text.replace(line, ""));
    assert_eq!(without.len() + lines.concat().len(), crate::common::GOOD.len());
    let train = without.find("[train]").unwrap();
    format!("{}{tasks}\n{}", &without[..train], &without[train..])
}

#[test]
fn tasks_take_from_the_table_what_they_do_not_say() {
    let text = with_tasks(
        "[[data.tasks]]\nname = \"a\"\npath = \"a.csv\"\neval_path = \"b.csv\"\ncolumns = { text = \"sentence\" }\n\n[[data.tasks]]\nname = \"b\"\npath = \"b.jsonl\"\nformat = \"jsonl\"\nlabels = [\"x\"]\n",
    );
    let recipe = crate::common::parse(&text, &["data.temperature=10"]).unwrap();
    assert_eq!(recipe.data.temperature, 10.0);
    let [a, b] = &recipe.data.tasks[..] else { panic!("{:?}", recipe.data.tasks) };
    assert_eq!(
        (a.name.as_str(), a.data.path.to_str(), a.data.columns.text.as_deref()),
        ("a", Some("a.csv"), Some("sentence"))
    );
    assert_eq!(a.data.columns.label, recipe.data.columns.label, "the rest as the table says");
    assert_eq!((a.data.format, b.data.format), (engraft_recipe::Format::Csv, engraft_recipe::Format::Jsonl));
    assert_eq!(b.data.labels.as_deref(), Some(&["x".to_owned()][..]));
    assert!(recipe.data.evaluates() && b.data.eval_path.is_none());
    let plan = recipe.plan(&facts(Task::SequenceClassification)).unwrap();
    assert_eq!(plan.data.tasks[0].data.path, Path::new("/here/a.csv"));
    let again = Recipe::parse(&plan.to_toml(), "/run/plan.toml", &[], &crate::common::methods()).unwrap();
    assert_eq!(again.data.tasks, plan.data.tasks, "the plan's text says the same");
}

#[test]
fn mistakes_in_tasks() {
    let one = "[[data.tasks]]\nname = \"a\"\npath = \"a.csv\"\n";
    let text = with_tasks(&format!(
        "{one}colums = {{}}\n{one}eval_path = \"x\"\neval_fraction = 0.2\n[[data.tasks]]\nname = \"c\"\ncolumns = {{ txt = \"t\" }}\n"
    ));
    let found = crate::common::messages(&text, &["data.path=p.csv"]);
    for expected in [
        "unknown key `data.tasks[0].colums`",
        "did you mean `columns`?",
        "`data.tasks[1].eval_path` and `data.tasks[1].eval_fraction` cannot both be set",
        "two tasks are called `a`",
        "`data.tasks[2].path` is missing",
        "`data.tasks[2].columns` must be one of \"text\"",
        "did you mean `text`?",
        "`data.path` and `[[data.tasks]]` cannot both be set",
    ] {
        assert!(found.contains(expected), "{expected}\n{found}");
    }
}
