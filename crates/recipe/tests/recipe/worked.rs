//! The three worked errors of the design, byte for byte.

use engraft_recipe::Problem;

const THREE: &str = r#"model = "models/bert-base-uncased"

[method]
name = "lora"
rnak = 8

[data]
format = "csv"
path = "train.csv"
shuffle = true
max_length = 256

[train]
epochs = 3
steps = 500
learning_rate = "2e-4"
"#;

#[test]
fn three_mistakes_are_shown_together() {
    let expected = r#"error: unknown key `method.rnak`
 --> recipe.toml:5:1
  |
5 | rnak = 8
  | ^^^^ did you mean `rank`?

error: `train.epochs` and `train.steps` cannot both be set
  --> recipe.toml:15:1
   |
14 | epochs = 3
   | ------ first length
15 | steps = 500
   | ^^^^^ second length
   |
   = help: delete one

error: `train.learning_rate` must be a number, found a string
  --> recipe.toml:16:17
   |
16 | learning_rate = "2e-4"
   |                 ^^^^^^ write `2e-4` without quotes

3 errors in recipe.toml; nothing was loaded or written
"#;
    assert_eq!(crate::common::messages(THREE, &[]), expected);
}

#[test]
fn later_mistakes_point_into_the_recipe() {
    let source = "model = \"models/bert-base-uncased\"\ntask = \"sequence-classification\"\n\n[method]\n\
                  name = \"lora\"\nrank = 8\ntargets = [\"q_proj\", \"v_proj\"]\n\n[data]\nformat = \"csv\"\npath = \"a.csv\"\n";
    let recipe = crate::common::parse(source, &[]).unwrap();
    let place = |path: &str| recipe.place(path).unwrap();
    let problem = Problem::new("`method.targets` matches nothing in models/bert-base-uncased")
        .label(place("method.targets[0]"), "")
        .label(place("method.targets[1]"), "0 of 73 linear weights")
        .note("in this model role q is `query` (12), role v is `value` (12)")
        .help("write `targets = [\"query\", \"value\"]`, or `roles = [\"q\", \"v\"]` for any model");
    let expected = r#"error: `method.targets` matches nothing in models/bert-base-uncased
 --> recipe.toml:7:12
  |
7 | targets = ["q_proj", "v_proj"]
  |            ^^^^^^^^  ^^^^^^^^ 0 of 73 linear weights
  |
  = note: in this model role q is `query` (12), role v is `value` (12)
  = help: write `targets = ["query", "value"]`, or `roles = ["q", "v"]` for any model

1 error in recipe.toml; nothing was trained or written
"#;
    let problems = recipe.problems(vec![problem]).leaving("nothing was trained or written");
    assert_eq!(problems.render(80, false), expected);
}

#[test]
fn tensors_that_do_not_fit_are_rows() {
    let row = |cells: [&str; 3]| cells.map(str::to_owned);
    let problem = Problem::new("2 of 290 tensors in models/qwen2.5-0.5b do not fit its config.json")
        .grid(
            ["tensor", "expected", "found"],
            vec![
                row(["model.embed_tokens.weight", "[151936, 896]", "[151665, 896]"]),
                row(["model.norm.weight", "[896]", "absent"]),
            ],
        )
        .note("`vocab_size` is 151936; tokenizer.json has 151665 entries, as the tensor has")
        .help(
            "take weights and config.json from one revision, or set `vocab_size = 151665`;\n\
             `engraft inspect models/qwen2.5-0.5b` lists all tensors",
        );
    let expected = "error: 2 of 290 tensors in models/qwen2.5-0.5b do not fit its config.json
  tensor                     expected        found
  model.embed_tokens.weight  [151936, 896]   [151665, 896]
  model.norm.weight          [896]           absent
  = note: `vocab_size` is 151936; tokenizer.json has 151665 entries, as the tensor has
  = help: take weights and config.json from one revision, or set `vocab_size = 151665`;
          `engraft inspect models/qwen2.5-0.5b` lists all tensors
";
    assert_eq!(problem.render(80, false), expected);
}

#[test]
fn more_than_ten_rows_are_counted() {
    let rows = (0..14).map(|n| [format!("t{n}"), "[2]".to_owned(), "absent".to_owned()]).collect();
    let text =
        Problem::new("14 tensors do not fit").grid(["tensor", "expected", "found"], rows).render(80, false);
    assert!(text.ends_with("  t9      [2]        absent\n  and 4 more\n"), "{text}");
}
