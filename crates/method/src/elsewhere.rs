//! What is called a method elsewhere and is a setting, a rule or another name here.
//!
//! Settings that are switched on by their own name (`dora = true`) and words that one method alone takes (`init = "pissa"`) follow
//! from the registry; what has another name here stands in a table.

use crate::algebra::Rule;
use crate::{Entry, FieldKind, METHODS};

/// How it is had here.
enum Here {
    /// A setting of a method, with its value as TOML.
    Set(&'static str, &'static str),
    /// A method of another name.
    Called,
    /// Several methods: the words after the name of the first.
    CalledAs(&'static str),
    /// Keys beside the method: several of its own, or one of another table.
    Beside(&'static str),
    /// A rule that combines saved adapters of the method.
    Combined(&'static str),
}

/// Name elsewhere, method, and how it is had with it.
const TABLE: &[(&str, &str, Here)] = &[
    ("lora+", "lora", Here::Set("lr_ratio", "16")),
    ("lora-plus", "lora", Here::Set("lr_ratio", "16")),
    ("lora-fa", "lora", Here::Set("freeze_a", "true")),
    ("moslora", "lora", Here::Set("mixer", "\"orthogonal\"")),
    ("lora-dropout", "lora", Here::Set("structured_dropout", "0.1")),
    ("bd-lora", "lora", Here::Beside("blocks = 2` and `blocks_of_a")),
    ("alora", "lora", Here::Set("alora_invocation_tokens", "[1, 2]")),
    ("qlora", "lora", Here::Beside("quantize = \"nf4\"` in `[base]")),
    ("bone", "miss", Here::Called),
    ("moelora", "molora", Here::Called),
    ("fastfood", "said", Here::Called),
    ("intrinsic-said", "said", Here::Called),
    ("loreft", "reft", Here::Called),
    ("ladder-side-tuning", "lst", Here::Called),
    ("magnitude", "supertuning", Here::CalledAs(MAGNITUDE)),
    ("magnitude-mask", "supertuning", Here::CalledAs(MAGNITUDE)),
    ("cross-attention", "full", Here::Beside(CROSS_ATTENTION)),
    ("cross-attention-only", "full", Here::Beside(CROSS_ATTENTION)),
    ("bias-tuning", "bitfit", Here::Called),
    ("norm-tuning", "ln_tuning", Here::Called),
    ("layernorm-tuning", "ln_tuning", Here::Called),
    ("full-fine-tuning", "full", Here::Called),
    ("linear-probe", "head", Here::Called),
    ("prompt-tuning", "prompt", Here::Called),
    ("prefix-tuning", "prefix", Here::Called),
    ("p-tuning-v2", "prefix", Here::Called),
    ("multitask-prompt-tuning", "mpt", Here::Called),
    ("adapter", "bottleneck", Here::Called),
    ("mad-x", "bottleneck", Here::Set("invertible", "true")),
    ("adapterdrop", "bottleneck", Here::Set("drop", "3")),
    ("supra", "supertuning", Here::Set("rank", "8")),
    ("adaptersoup", "bottleneck", Here::Combined("average")),
    ("dare", "lora", Here::Combined("dare_linear")),
    ("task-arithmetic", "lora", Here::Combined("linear")),
];

/// Which entries a mask by magnitude trains.
const MAGNITUDE: &str = "the entries of largest magnitude, and `name = \"pafi\"` for those of smallest";
const CROSS_ATTENTION: &str = "roles = [\"cross.q\", \"cross.k\", \"cross.v\", \"cross.o\"]";

/// Rules whose names are those of methods elsewhere, and whose adapters they combine.
const RULES: &[(&str, &str)] = &[("mera", "bottleneck"), ("lorahub", "lora"), ("ties", "lora")];

/// What is had with the method of `entry` and called otherwise elsewhere: the name there, and what to write.
pub fn elsewhere(entry: &Entry) -> Vec<(String, String)> {
    let method = entry.info.name;
    let with = |setting: &str, value: &str| format!("`name = \"{method}\"` with `{setting} = {value}`");
    let combined = |rule: &str| format!("`engraft combine --rule {rule}` on saved adapters");
    let mut found: Vec<(String, String)> = Vec::new();
    for (name, _, here) in TABLE.iter().filter(|(_, of, _)| *of == method) {
        let how = match here {
            Here::Set(setting, value) => with(setting, value),
            Here::Called => format!("`name = \"{method}\"`"),
            Here::CalledAs(what) => format!("`name = \"{method}\"` for {what}"),
            Here::Beside(key) => format!("`name = \"{method}\"` with `{key}`"),
            Here::Combined(rule) => combined(rule),
        };
        found.push(((*name).to_owned(), how));
    }
    for (name, _) in Rule::ALL {
        if RULES.contains(&(name, method)) {
            found.push(((*name).to_owned(), combined(name)));
        }
    }
    for (name, setting, value) in words(entry).into_iter().filter(|(name, ..)| is_of_one(name)) {
        found.push((name.to_owned(), with(setting, &value)));
    }
    if entry.info.title.to_lowercase() != method {
        found.push((entry.info.title.to_owned(), format!("`name = \"{method}\"`")));
    }
    found
}

/// Settings that may be switched on, and words that a setting takes: the name, the setting, its value as TOML.
fn words(entry: &Entry) -> Vec<(&'static str, &'static str, String)> {
    let of = |field: &'static crate::Field| match field.kind {
        FieldKind::Bool if field.default != Some("true") => vec![(field.name, field.name, "true".to_owned())],
        FieldKind::OneOf(words) => {
            words.iter().map(|word| (*word, field.name, format!("\"{word}\""))).collect()
        }
        _ => vec![],
    };
    entry.info.fields.iter().flat_map(of).collect()
}

fn is_of_one(word: &str) -> bool {
    METHODS.iter().filter(|entry| words(entry).iter().any(|(name, ..)| *name == word)).count() == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find;

    fn how(name: &str) -> Vec<String> {
        let all = METHODS.iter().flat_map(|entry| elsewhere(entry));
        all.filter(|(own, _)| own == name).map(|(_, how)| how).collect()
    }

    #[test]
    fn what_the_registry_knows_is_found() {
        assert_eq!(how("dora"), ["`name = \"lora\"` with `dora = true`"]);
        assert_eq!(how("pissa"), ["`name = \"lora\"` with `init = \"pissa\"`"]);
        assert_eq!(how("bone"), ["`name = \"miss\"`"]);
        assert_eq!(how("ties"), ["`engraft combine --rule ties` on saved adapters"]);
        assert_eq!(how("FISH mask"), ["`name = \"fish\"`"]);
        assert!(how("magnitude")[0].contains("`name = \"supertuning\"` for the entries of largest"));
        assert!(how("cross-attention")[0].contains("`name = \"full\"` with `roles = [\"cross.q\","));
        assert!(how("relu").is_empty(), "many methods have it");
        for name in ["kasa", "olora", "eva", "corda", "lora-ga", "rslora", "lorahub", "qlora", "mera"] {
            assert_eq!(how(name).len(), 1, "{name}");
        }
    }

    #[test]
    fn the_table_says_what_is_there() {
        let rules: Vec<&str> = Rule::ALL.iter().map(|(name, _)| *name).collect();
        for (name, method, here) in TABLE {
            assert!(find(name).is_none(), "{name} is a method");
            let entry = find(method).unwrap();
            match here {
                Here::Set(setting, value) => {
                    let value = serde_json::from_str(value).unwrap();
                    let settings = serde_json::Map::from_iter([((*setting).to_owned(), value)]);
                    assert!((entry.from_settings)(&settings).is_ok(), "{name}");
                    assert!(entry.info.fields.iter().any(|field| field.name == *setting), "{name}");
                }
                Here::Combined(rule) => assert!(rules.contains(rule), "{rule}"),
                Here::Called | Here::CalledAs(_) | Here::Beside(_) => {}
            }
        }
        assert!(RULES.iter().all(|(rule, method)| rules.contains(rule) && find(method).is_some()));
    }
}
