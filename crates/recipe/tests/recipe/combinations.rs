//! Values that cannot stand together, one mistake a test, and the whole answer.

use crate::common::wrong;

#[test]
fn epochs_and_steps() {
    wrong(
        &[("epochs = 3", "steps = 10\nepochs = 3")],
        &[],
        r#"error: `train.epochs` and `train.steps` cannot both be set
  --> recipe.toml:31:1
   |
30 | steps = 10
   | ----- first length
31 | epochs = 3
   | ^^^^^^ second length
   |
   = help: delete one

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn two_kinds_of_evaluation_data() {
    wrong(
        &[(r#"eval_path = "test.csv""#, "eval_path = \"test.csv\"\neval_fraction = 0.1")],
        &[],
        r#"error: `data.eval_path` and `data.eval_fraction` cannot both be set
  --> recipe.toml:22:1
   |
21 | eval_path = "test.csv"
   | --------- first evaluation data
22 | eval_fraction = 0.1
   | ^^^^^^^^^^^^^ second evaluation data
   |
   = help: delete one

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn two_kinds_of_warm_up() {
    wrong(
        &[("warmup_ratio = 0.06", "warmup_ratio = 0.06\nwarmup_steps = 10")],
        &[],
        r#"error: `train.warmup_ratio` and `train.warmup_steps` cannot both be set
  --> recipe.toml:35:1
   |
34 | warmup_ratio = 0.06
   | ------------ first warm-up
35 | warmup_steps = 10
   | ^^^^^^^^^^^^ second warm-up
   |
   = help: delete one

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn evaluation_without_data() {
    wrong(
        &[("eval_path = \"test.csv\"\n", ""), ("seed = 7", "early_stopping_patience = 3")],
        &[],
        r#"error: `train.early_stopping_patience` needs evaluation data
  --> recipe.toml:35:27
   |
35 | early_stopping_patience = 3
   |                           ^
   |
   = help: add `eval_path = "test.csv"` or `eval_fraction = 0.1` to `[data]`

error: `train.eval_every` needs evaluation data
  --> recipe.toml:36:14
   |
36 | eval_every = 50
   |              ^^
   |
   = help: add `eval_path = "test.csv"` or `eval_fraction = 0.1` to `[data]`

2 errors in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn settings_beside_a_saved_adapter() {
    wrong(
        &[
            ("name = \"lora\"\nrank = 8\nalpha = 16", "from = \"runs/a/adapter\"\nrank = 8"),
            ("rank_pattern = { \"layer.0\" = 4 }\nalpha_pattern = { \"layer.0\" = 2.5 }\n", ""),
            ("targets = [\"query\", \"value\"]\nlayers = \"0-5,11\"\n", ""),
            ("train_also = [\"classifier\"]\n", ""),
        ],
        &[],
        r#"error: `method.from` and `method.rank` cannot both be set
  --> recipe.toml:10:1
   |
 9 | from = "runs/a/adapter"
   | ---- the saved adapter
10 | rank = 8
   | ^^^^ the saved adapter has its own
   |
   = help: delete `rank`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn packing_rows_that_have_a_class() {
    wrong(
        &[("max_length = 128", "max_length = 128\npacking = true")],
        &[],
        r#"error: `data.packing` does not go with the task sequence-classification
  --> recipe.toml:23:11
   |
 2 | task = "sequence-classification"
   |        ------------------------- the task
...
23 | packing = true
   |           ^^^^ a packed row would hold several answers

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_double_quantization_of_nothing() {
    wrong(
        &[(r#"quantize = "nf4""#, r#"quantize = "none""#)],
        &[],
        r#"error: `base.double_quant` needs `quantize = "nf4"`
 --> recipe.toml:6:16
  |
6 | double_quant = true
  |                ^^^^ nothing is quantized

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn columns_of_a_text() {
    wrong(
        &[(r#"format = "csv""#, r#"format = "text""#)],
        &[],
        r#"error: `data.columns` does not go with `format = "text"`
  --> recipe.toml:25:1
   |
19 | format = "text"
   |          ------ the format
...
25 | [data.columns]
   | ^^^^^^^^^^^^^^ this format has no columns

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_label_twice() {
    wrong(
        &[(r#"["nö", "yes"]"#, r#"["nö", "yes", "nö"]"#)],
        &[],
        r#"error: `data.labels` has "nö" twice
  --> recipe.toml:23:24
   |
23 | labels = ["nö", "yes", "nö"]
   |           ---- first   ^^^^ second

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn targets_and_roles() {
    wrong(
        &[(r#"targets = ["query", "value"]"#, "targets = [\"query\", \"value\"]\nroles = [\"q\"]")],
        &[],
        r#"error: `method.targets` and `method.roles` cannot both be set
  --> recipe.toml:13:1
   |
12 | targets = ["query", "value"]
   | ------- first choice of sites
13 | roles = ["q"]
   | ^^^^^ second choice of sites
   |
   = help: delete one

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}
