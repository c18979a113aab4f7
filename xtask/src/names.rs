//! Models and methods do not name each other: what the registries call them is looked for in the quoted strings and the
//! identifiers of the other crate. Comments may say what they like.

use std::collections::BTreeSet;

use crate::tidy::{sources, without_tests};

/// Methods whose names are words that any model may use; only a string that is nothing else names one of them.
const ORDINARY: [&str; 4] = ["prompt", "prefix", "full", "head"];
/// Names that no registry holds: variants of methods, and a storage format.
const BESIDES: [&str; 3] = ["dora", "nf4", "peft"];
/// Files and names that are excused, each with its reason.
const EXCUSED: [(&str, &str, &str); 5] = [
    (
        "crates/method/src/additive/bottleneck",
        "bert",
        "what AdapterHub calls one of its ways to draw weights",
    ),
    ("crates/method/src/prompts", "llama", "the name of the method"),
    ("crates/method/src/reparameterized/lora/file.rs", "gpt", "GPTQ, a form of quantized weights"),
    ("crates/model/src", "head", "the path of the site of the head, in every model"),
    ("crates/model/src/picture.rs", "prompt", "the path of the site of the prompt"),
];

/// Strings and identifiers of Rust source, comments left out.
#[derive(Default)]
struct Words {
    strings: Vec<String>,
    identifiers: BTreeSet<String>,
}

fn words(code: &str) -> Words {
    let mut found = Words::default();
    let mut rest = code;
    while let Some(c) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some((text, length)) = string(rest) {
            found.strings.push(text.to_owned());
            length
        } else if c == '\'' {
            character(rest)
        } else if c.is_alphabetic() || c == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            found.identifiers.insert(rest[..end].to_owned());
            end
        } else {
            c.len_utf8()
        };
        rest = &rest[length..];
    }
    found
}

/// The string that `code` begins with, and the length of its literal.
fn string(code: &str) -> Option<(&str, usize)> {
    let raw = code.strip_prefix('r').map(|rest| rest.trim_start_matches('#')).filter(|s| s.starts_with('"'));
    if let Some(inner) = raw {
        let start = code.len() - inner.len() + 1;
        let end = format!("\"{}", "#".repeat(start - 2));
        let length = code[start..].find(&end)?;
        return Some((&code[start..start + length], start + length + end.len()));
    }
    let inner = code.strip_prefix('"')?;
    let mut escaped = false;
    let end = inner.find(|c| {
        let ends = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })?;
    Some((&inner[..end], end + 2))
}

/// Length of the character or lifetime that `code` begins with.
fn character(code: &str) -> usize {
    let mut chars = code.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => code[3..].find('\'').map_or(1, |end| end + 4),
        Some((at, c)) if code[at + c.len_utf8()..].starts_with('\'') => at + c.len_utf8() + 1,
        _ => 1,
    }
}

/// Whether `text` holds `name` as a word: `gpt2`, `gpt2_layers`, `Gpt2Block`, "for GPT-2", but not "convit".
fn holds(text: &str, name: &str) -> bool {
    let is = |word: &str| {
        let lower = word.to_lowercase();
        let rest = lower.strip_prefix(name).map(|rest| &word[word.len() - rest.len()..]);
        let begins =
            |rest: &str| word.starts_with(char::is_uppercase) && rest.starts_with(char::is_uppercase);
        rest.is_some_and(|rest| rest.is_empty() || begins(rest))
    };
    let apart = |c: char| !c.is_alphanumeric();
    text.split(apart).any(is) || text.replace('-', "").split(apart).any(is)
}

/// What architectures are called: model types, the families of their classes, and both without a number.
fn models() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for architecture in engraft_model::ARCHITECTURES {
        names.insert(architecture.name.to_owned());
        for (class, _) in architecture.classes {
            let end = ["For", "LMHead", "Model", "Encoder"].iter().filter_map(|end| class.find(end)).min();
            names.insert(class[..end.unwrap_or(class.len())].to_lowercase());
        }
    }
    let bare = |name: &String| name.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned();
    let bare: Vec<String> = names.iter().map(bare).filter(|name| name.len() > 2).collect();
    names.extend(bare);
    names
}

/// The names of architectures in a file of methods.
fn models_named(code: &str) -> Vec<String> {
    let found = words(code);
    let all = || found.strings.iter().chain(&found.identifiers);
    models().into_iter().filter(|name| all().any(|text| holds(text, name))).collect()
}

/// The names of methods in a file of models.
fn methods_named(code: &str) -> Vec<String> {
    let found = words(code);
    let all = || found.strings.iter().chain(&found.identifiers);
    let mut named: Vec<String> = BESIDES.iter().map(|name| (*name).to_owned()).collect();
    named.retain(|name| all().any(|text| holds(text, name)));
    let plain = |text: &str| text.to_lowercase().replace([' ', '_', '-'], "");
    for entry in engraft_method::METHODS {
        let (name, title) = (entry.info.name, plain(entry.info.title));
        let is_named = match ORDINARY.contains(&name) {
            true => found.strings.iter().any(|text| text == name),
            // A name of several words is no word of its own.
            false if name.contains('_') => all().any(|text| text.to_lowercase().contains(name)),
            false => all().any(|text| holds(text, name)),
        };
        // A title of one word is looked for as a word: "oft" is in "of tensors" without its space.
        let one_word = entry.info.title.chars().all(char::is_alphanumeric);
        let titled =
            |text: &String| if one_word { holds(text, &title) } else { plain(text).contains(&title) };
        if is_named || all().any(titled) {
            named.push(name.to_owned());
        }
    }
    named
}

fn is_excused(path: &str, name: &str) -> bool {
    EXCUSED.iter().any(|(place, excused, _)| path.starts_with(place) && *excused == name)
}

#[test]
fn models_and_methods_do_not_name_each_other() {
    for (path, text) in sources() {
        let code = without_tests(&text);
        let (named, rule) = if path.starts_with("crates/method/")
            && !path.ends_with("testing.rs")
            && !path.ends_with("tests.rs")
        {
            (models_named(code), "methods choose sites by kind, role and stack, never by an architecture")
        } else if path.starts_with("crates/model/") {
            (methods_named(code), "models know neither methods nor storage formats")
        } else {
            continue;
        };
        let named: Vec<&String> = named.iter().filter(|name| !is_excused(&path, name)).collect();
        assert!(named.is_empty(), "{path} names {named:?}: {rule}; a good reason goes into `EXCUSED`");
    }
    assert!(EXCUSED.iter().all(|(.., reason)| !reason.is_empty()));
}

#[test]
fn every_registered_name_is_caught_and_prose_is_not() {
    for architecture in engraft_model::ARCHITECTURES {
        let code = format!("fn f(a: &str) -> bool {{ a == \"{}\" }}", architecture.name);
        assert!(!models_named(&code).is_empty(), "{code}");
    }
    for name in ["gpt2", "t5", "vit", "deit", "dinov2", "bert", "roberta", "llama", "qwen"] {
        for code in [
            format!("if info.architecture == {name:?} {{}}"),
            format!("info.architecture.starts_with(\"{name}\")"),
            format!("fn {name}_only() {{}}"),
            format!("const A: &str = r#\"only \"{}\" here\"#;", name.to_uppercase()),
        ] {
            assert!(models_named(&code).contains(&name.to_owned()), "{code}");
        }
    }
    assert!(!models_named("struct Gpt2Names; // and").is_empty());
    assert!(!models_named("\"GPT-2 has it\"").is_empty());
    for entry in engraft_method::METHODS {
        let (name, title) = (entry.info.name, entry.info.title);
        for code in [format!("if method == {name:?} {{}}"), format!("(\"{title} is not for this model\")")] {
            assert!(methods_named(&code).contains(&name.to_owned()), "{code}");
        }
    }
    for code in ["struct LoraSite;", "fn vpt_rows() {}", "PrefixTuning::new()", "let c = '\"'; \"bitfit\""] {
        assert!(!methods_named(code).is_empty(), "{code}");
    }
    let prose = "// the prefix of a vit, as in bert; lora\nfn with_prefixes(prefix: &str, head: Head) {}\n\
                 let text = \"a prefix of tensors, a prompt's rows and the full path\"; let life: &'static str = \"x\";";
    assert_eq!((models_named(prose), methods_named(prose)), (vec![], vec![]));
    assert!(models_named("\"activity vital debit\"").is_empty());
}
