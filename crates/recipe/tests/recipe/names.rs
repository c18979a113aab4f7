//! Keys and methods with a wrong name, one mistake a test, and the whole answer.

use crate::common::wrong;

#[test]
fn a_misspelt_key() {
    wrong(
        &[("batch_size = 32", "batchsize = 32")],
        &[],
        r#"error: unknown key `train.batchsize`
  --> recipe.toml:31:1
   |
31 | batchsize = 32
   | ^^^^^^^^^ did you mean `batch_size`?

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_misspelt_table() {
    wrong(
        &[("[train]", "[trian]")],
        &[],
        r#"error: unknown table `[trian]`
  --> recipe.toml:29:2
   |
29 | [trian]
   |  ^^^^^ did you mean `train`?

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_misspelt_required_key_is_one_mistake() {
    wrong(
        &[(r#"format = "csv""#, r#"formt = "csv""#)],
        &[],
        r#"error: unknown key `data.formt`
  --> recipe.toml:19:1
   |
19 | formt = "csv"
   | ^^^^^ did you mean `format`?

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_misspelt_method() {
    wrong(
        &[(r#"name = "lora""#, r#"name = "lroa""#)],
        &[],
        r#"error: unknown method `lroa`
 --> recipe.toml:9:8
  |
9 | name = "lroa"
  |        ^^^^^^ did you mean `lora`?

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_method_of_elsewhere() {
    wrong(
        &[(r#"name = "lora""#, r#"name = "DoRA""#)],
        &[],
        r#"error: unknown method `DoRA`
 --> recipe.toml:9:8
  |
9 | name = "DoRA"
  |        ^^^^^^ no method here
  |
  = help: write `dora = true`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn an_unknown_method() {
    wrong(
        &[(r#"name = "lora""#, r#"name = "magic""#)],
        &[],
        r#"error: unknown method `magic`
 --> recipe.toml:9:8
  |
9 | name = "magic"
  |        ^^^^^^^
  |
  = help: methods: lora, bitfit; `engraft methods` describes them

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn peft_s_names() {
    wrong(
        &[("rank = 8", "r = 8"), ("alpha = 16", "lora_alpha = 16"), ("targets =", "target_modules =")],
        &[],
        r#"error: unknown key `method.r`
  --> recipe.toml:10:1
   |
10 | r = 8
   | ^ called `rank` here

error: unknown key `method.lora_alpha`
  --> recipe.toml:11:1
   |
11 | lora_alpha = 16
   | ^^^^^^^^^^ called `alpha` here

error: unknown key `method.target_modules`
  --> recipe.toml:12:1
   |
12 | target_modules = ["query", "value"]
   | ^^^^^^^^^^^^^^ called `targets` here

3 errors in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_key_of_another_table() {
    wrong(
        &[("seed = 7", "seed = 7\nshuffle = false")],
        &[],
        r#"error: unknown key `train.shuffle`
  --> recipe.toml:37:1
   |
37 | shuffle = false
   | ^^^^^^^ belongs in `[data]`
   |
   = help: move the line below `[data]`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_foreign_name_in_the_wrong_table() {
    wrong(
        &[("task =", "lr = 1e-4\ntask =")],
        &[],
        r#"error: unknown key `lr`
 --> recipe.toml:2:1
  |
2 | lr = 1e-4
  | ^^ called `learning_rate` and belongs in `[train]`
  |
  = help: move the line below `[train]`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn the_model_below_a_table() {
    wrong(
        &[("model = \"models/bert\"\n", ""), ("seed = 7", r#"model = "models/bert""#)],
        &[],
        r#"error: unknown key `train.model`
  --> recipe.toml:35:1
   |
35 | model = "models/bert"
   | ^^^^^ belongs at the top of the file
   |
   = help: move the line above the first `[table]`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_setting_of_another_method() {
    wrong(
        &[
            (r#"name = "lora""#, r#"name = "bitfit""#),
            ("alpha = 16\n", ""),
            ("rank_pattern = { \"layer.0\" = 4 }\n", ""),
            ("alpha_pattern = { \"layer.0\" = 2.5 }\n", ""),
        ],
        &[],
        r#"error: unknown key `method.rank`
  --> recipe.toml:10:1
   |
10 | rank = 8
   | ^^^^ not a setting of `bitfit`
   |
   = help: keys here: name, from, targets, roles, exclude, layers, layers_pattern, trained_share, train_also

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}
