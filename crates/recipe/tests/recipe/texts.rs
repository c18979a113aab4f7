//! Texts as they come from real editors, and hostile ones.

use std::time::{Duration, Instant};

use engraft_recipe::{Length, Recipe, Targets, Task, Warmup};

#[test]
fn a_good_recipe_is_read_as_written() {
    let recipe = crate::common::parse(crate::common::GOOD, &[]).unwrap();
    assert_eq!(recipe.model.value, "models/bert");
    assert_eq!(recipe.task, Task::SequenceClassification);
    assert!(recipe.base.double_quant);
    let method = &recipe.methods[0];
    assert_eq!(method.name.as_ref().unwrap().value, "lora");
    assert_eq!(method.targets, Some(Targets::Names(vec!["query".into(), "value".into()])));
    assert_eq!(method.layers.as_deref(), Some(&[0, 1, 2, 3, 4, 5, 11][..]));
    let settings = serde_json::json!({
        "rank": 8, "alpha": 16.0, "rank_pattern": { "layer.0": 4 }, "alpha_pattern": { "layer.0": 2.5 },
    });
    assert_eq!(serde_json::Value::Object(method.settings.clone()), settings);
    assert_eq!(recipe.data.labels.as_deref(), Some(&["nö".to_owned(), "yes".to_owned()][..]));
    assert_eq!(recipe.data.columns.text.as_deref(), Some("question"));
    assert_eq!(recipe.train.length, Length::Epochs(3.0));
    assert_eq!(recipe.train.warmup, Warmup::Ratio(0.06));
    assert_eq!(recipe.train.eval_every, Some(50));
    assert_eq!(recipe.train.gradient_accumulation, 1, "a default");
}

#[test]
fn an_empty_file_says_what_to_write() {
    let expected = "error: `model` is missing
  = help: add `model = \"DIR-or-Hub-id\"` as the first line

error: `[method]` is missing
  = help: add
          [method]
          name = \"lora\"

error: `[data]` is missing
  = help: add
          [data]
          format = \"csv\"
          path = \"train.csv\"

3 errors in recipe.toml; nothing was loaded or written
";
    assert_eq!(crate::common::messages("", &[]), expected);
    assert_eq!(crate::common::messages("\u{feff}", &[]), expected);
}

#[test]
fn windows_line_ends_and_a_byte_order_mark_change_no_place() {
    let broken = crate::common::GOOD.replace("batch_size = 32", "batch_size = \"32\"");
    let windows = format!("\u{feff}{}", broken.replace('\n', "\r\n"));
    assert_eq!(crate::common::messages(&windows, &[]), crate::common::messages(&broken, &[]));
    assert!(
        crate::common::parse(&format!("\u{feff}{}", crate::common::GOOD.replace('\n', "\r\n")), &[]).is_ok()
    );
}

#[test]
fn tabs_and_wide_letters_keep_the_caret_below_the_value() {
    let source = crate::common::GOOD.replace("seed = 7", "\tseed\t= \"日本\"\t# é");
    let expected = "error: `train.seed` must be a whole number, found a string
  --> recipe.toml:36:9
   |
36 |     seed    = \"日本\"    # é
   |               ^^^^^^

1 error in recipe.toml; nothing was loaded or written
";
    assert_eq!(crate::common::messages(&source, &[]), expected);
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let source = crate::common::GOOD.replace("seed = 7", "\"\\u001b[31mred\" = 7");
    let message = crate::common::messages(&source, &["train.\u{1b}[2J=1"]);
    assert!(!message.contains('\u{1b}'), "{message:?}");
}

#[test]
fn bytes_that_are_no_text_name_their_line() {
    let error =
        Recipe::parse_bytes(b"model = 'm'\n\xff\n", "r.toml", &[], &crate::common::methods()).unwrap_err();
    let expected = "error: line 2 of r.toml is not UTF-8\n  = help: save the file as UTF-8\n\n\
                    1 error in r.toml; nothing was loaded or written\n";
    assert_eq!(error.render(80, false), expected);
}

#[test]
fn colour_changes_no_word() {
    let error = crate::common::parse(&crate::common::GOOD.replace("seed", "sed"), &[]).unwrap_err();
    let colored = error.render(80, true);
    assert!(colored.contains("\u{1b}["));
    let mut plain = String::new();
    let mut inside = false;
    for c in colored.chars() {
        inside |= c == '\u{1b}';
        if !inside {
            plain.push(c);
        }
        inside &= c != 'm';
    }
    assert_eq!(plain, error.render(80, false));
}

#[test]
fn hostile_texts_cost_little() {
    let long = |part: &str| part.repeat((1 << 20) / part.len() - 300);
    let numbered =
        |form: &str, count: usize| (0..count).map(|n| form.replace("{}", &n.to_string())).collect::<String>();
    let texts = [
        "[".repeat(1 << 19),
        format!("a = {}{}", "[".repeat(40), "]".repeat(40)),
        format!("a = {}{}", "[".repeat(5000), "]".repeat(5000)),
        format!("{}a = 1", "b.".repeat(60)),
        long("\n"),
        long("[[method]]\n"),
        numbered("k{} = 1\n", 70_000),
        format!("[train]\n{}", numbered("epochs{} = 1\n", 50_000)),
        format!("{}\nlabels = [{}]\n[method]\nname=\"lora\"", "[data]", long("1,")),
        format!("[data]\nlabels = [{}]", long("99999999999999999999,")),
        format!("[method]\nlayers = \"{}\"", long("0-9999,")),
        format!("model = \"{}\"\nmodle = 1", long("é")),
        format!("[method]\nname = \"{}\"", long("x")),
        format!("[method]\nfrom = \"a\"\n{}", numbered("k{} = 1\n", 70_000)),
        "x".repeat((1 << 20) + 1),
    ];
    for text in texts {
        let start = Instant::now();
        let message = crate::common::messages(&text, &[]);
        let seconds = start.elapsed();
        assert!(message.contains("error"), "{}", &text[..20]);
        assert!(seconds < Duration::from_secs(5), "{:?} takes {seconds:?}", &text[..20]);
    }
}

/// Small generator (xorshift64*), so that the mutants are the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound.max(1)
    }
}

fn mutant(random: &mut Random) -> Vec<u8> {
    const PIECES: &[&str] = &[
        "[",
        "]",
        "\"",
        "=",
        "{",
        "}",
        "\n",
        ".",
        "#",
        "'",
        "\"\"\"",
        "-",
        "nan",
        "é",
        "\r",
        "\t",
        "[[",
        "9999999999",
        "\0",
    ];
    let mut bytes = crate::common::GOOD.as_bytes().to_vec();
    for _ in 0..1 + random.below(4) {
        let (at, other) = (random.below(bytes.len()), random.below(bytes.len()));
        let (low, high) = (at.min(other), at.max(other));
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => drop(bytes.drain(low..high.min(low + 30))),
            2 => bytes.truncate(at.max(1)),
            3 => drop(bytes.splice(at..at, PIECES[random.below(PIECES.len())].bytes())),
            4 => bytes.swap(at, other),
            _ => {
                let copy = bytes[low..high.min(low + 60)].to_vec();
                drop(bytes.splice(at..at, copy));
            }
        }
        if bytes.is_empty() {
            bytes.push(b'a');
        }
    }
    bytes
}

#[test]
fn mutants_give_errors_and_never_a_panic() {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let methods = crate::common::methods();
    let (mut good, mut bad) = (0, 0);
    for _ in 0..5000 {
        let bytes = mutant(&mut random);
        let sets = if random.below(4) == 0 {
            vec![String::from_utf8_lossy(&mutant(&mut random)).into_owned()]
        } else {
            vec![]
        };
        let start = Instant::now();
        match Recipe::parse_bytes(&bytes, "recipe.toml", &sets, &methods) {
            Ok(_) => good += 1,
            Err(problems) => {
                assert!(!problems.render(80, bad % 2 == 0).is_empty());
                bad += 1;
            }
        }
        assert!(start.elapsed() < Duration::from_secs(1));
    }
    assert!(good > 20 && bad > 1000, "{good} good, {bad} bad: the mutants are too tame or too wild");
}
