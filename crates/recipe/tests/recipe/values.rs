//! Values that a key does not take, texts that are no TOML, wrong arguments: the whole answer.

use crate::common::wrong;

#[test]
fn a_number_in_quotes() {
    wrong(
        &[("batch_size = 32", r#"batch_size = "32""#)],
        &[],
        r#"error: `train.batch_size` must be a whole number, found a string
  --> recipe.toml:31:14
   |
31 | batch_size = "32"
   |              ^^^^ write `32` without quotes

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_whole_number_with_a_point() {
    wrong(
        &[("rank = 8", "rank = 8.0")],
        &[],
        r#"error: `method.rank` must be a whole number, found a decimal number
  --> recipe.toml:10:8
   |
10 | rank = 8.0
   |        ^^^ write `8`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn python_s_true() {
    wrong(
        &[("double_quant = true", r#"double_quant = "True""#)],
        &[],
        r#"error: `base.double_quant` must be true or false, found a string
 --> recipe.toml:6:16
  |
6 | double_quant = "True"
  |                ^^^^^^ write `true` without quotes

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_text_for_a_list() {
    wrong(
        &[(r#"["classifier"]"#, r#""classifier""#)],
        &[],
        r#"error: `method.train_also` must be a list of strings, found a string
  --> recipe.toml:16:14
   |
16 | train_also = "classifier"
   |              ^^^^^^^^^^^^ write `["classifier"]`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_batch_of_none() {
    wrong(
        &[("batch_size = 32", "batch_size = 0")],
        &[],
        r#"error: `train.batch_size` must be at least 1, found 0
  --> recipe.toml:31:14
   |
31 | batch_size = 0
   |              ^ the default is 16

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_negative_rate() {
    wrong(
        &[("1e-3", "-1e-3")],
        &[],
        r#"error: `train.learning_rate` must be greater than 0, found -0.001
  --> recipe.toml:32:17
   |
32 | learning_rate = -1e-3
   |                 ^^^^^ the default is 0.0002

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_rate_that_is_no_number() {
    wrong(
        &[("1e-3", "nan")],
        &[],
        r#"error: `train.learning_rate` must be finite, found NaN
  --> recipe.toml:32:17
   |
32 | learning_rate = nan
   |                 ^^^ the default is 0.0002

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_type_that_is_not_there() {
    wrong(
        &[(r#""bf16""#, r#""fp16""#)],
        &[],
        r#"error: `train.dtype` must be one of "f32", "bf16", found "fp16"
  --> recipe.toml:35:9
   |
35 | dtype = "fp16"
   |         ^^^^^^ did you mean `bf16`?

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn an_unknown_schedule() {
    wrong(
        &[(r#""cosine""#, r#""polynomial""#)],
        &[],
        r#"error: `train.schedule` must be one of "constant", "linear", "cosine", found "polynomial"
  --> recipe.toml:33:12
   |
33 | schedule = "polynomial"
   |            ^^^^^^^^^^^^

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn layers_backwards() {
    wrong(
        &[("0-5,11", "5-0")],
        &[],
        r#"error: `method.layers` must be a list of layers or ranges, found "5-0"
  --> recipe.toml:13:10
   |
13 | layers = "5-0"
   |          ^^^^^ write `[0, 1]`, `"0-5"` or `"0-5,11"`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_rank_of_text_in_a_pattern() {
    wrong(
        &[(r#""layer.0" = 4"#, r#""layer.0" = "4""#)],
        &[],
        r#"error: `method.rank_pattern."layer.0"` must be a whole number, found a string
  --> recipe.toml:14:30
   |
14 | rank_pattern = { "layer.0" = "4" }
   |                              ^^^ write `4` without quotes

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_method_as_a_text() {
    wrong(
        &[
            (
                "[method]\nname = \"lora\"\nrank = 8\nalpha = 16\ntargets = [\"query\", \"value\"]\nlayers = \"0-5,11\"\nrank_pattern = { \"layer.0\" = 4 }\nalpha_pattern = { \"layer.0\" = 2.5 }\ntrain_also = [\"classifier\"]\n",
                "",
            ),
            ("task =", "method = \"lora\"\ntask ="),
        ],
        &[],
        r#"error: `method` must be a table, found a string
 --> recipe.toml:2:10
  |
2 | method = "lora"
  |          ^^^^^^ write `[method]` on a line of its own

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn no_quotes() {
    wrong(
        &[(r#""models/bert""#, "models/bert")],
        &[],
        r#"error: not valid TOML: a string needs quotes
 --> recipe.toml:1:9
  |
1 | model = models/bert
  |         ^^^^^^^^^^^ write `"models/bert"`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_quote_left_open() {
    wrong(
        &[(r#""train.csv""#, r#""train.csv"#)],
        &[],
        r#"error: not valid TOML: a string without its closing quote
  --> recipe.toml:20:18
   |
20 | path = "train.csv
   |                  ^ expected `"`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn the_same_key_twice() {
    wrong(
        &[("seed = 7", "seed = 7\nseed = 8")],
        &[],
        r#"error: not valid TOML: duplicate key
  --> recipe.toml:37:1
   |
37 | seed = 8
   | ^^^^

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn nothing_after_the_sign() {
    wrong(
        &[("seed = 7", "seed =")],
        &[],
        r#"error: not valid TOML: a value is missing
  --> recipe.toml:36:7
   |
36 | seed =
   |       ^ nothing after `=`

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn a_plan_of_the_future() {
    wrong(
        &[("model = ", "# engraft plan, format 2\nmodel = ")],
        &[],
        r#"error: plan format 2 is unknown; this program reads 1
 --> recipe.toml:1:1
  |
1 | # engraft plan, format 2
  | ^^^^^^^^^^^^^^^^^^^^^^^^

1 error in recipe.toml; nothing was loaded or written
"#,
    );
}

#[test]
fn arguments() {
    wrong(
        &[],
        &[
            "train.batch_size=0",
            "method.rnak=3",
            "seed",
            "data.path=",
            r#"method.targets=["a","#,
            "method[2].rank=1",
            "train.dtype=fp16",
            "model.x=1",
        ],
        r#"error: `train.batch_size` must be at least 1, found 0
 |
 | --set train.batch_size=0
 |                        ^ the default is 16

error: unknown key `method.rnak`
 |
 | --set method.rnak=3
 |              ^^^^ did you mean `rank`?

error: an argument of `--set` is `a.b=value`
 |
 | --set seed
 |       ^^^^ no `=` here
 |
 = help: for example `--set train.learning_rate=1e-3`

error: an argument of `--set` without a value
 |
 | --set data.path=
 |       ^^^^^^^^^^ nothing after `=`

error: not valid TOML: unclosed array, expected `]`
 |
 | --set method.targets=["a",
 |                           ^

error: `method[2]` is not there
 |
 | --set method[2].rank=1
 |       ^^^^^^^^^ `method` has 1

error: `train.dtype` must be one of "f32", "bf16", found "fp16"
 |
 | --set train.dtype=fp16
 |                   ^^^^ did you mean `bf16`?

error: `x` cannot be set inside a value
  |
  | --set model.x=1
  |             ^ what holds it is not a table
  |
 ::: recipe.toml:1:9
  |
1 | model = "models/bert"
  |         ------------- the value

8 errors in --set; nothing was loaded or written
"#,
    );
}
