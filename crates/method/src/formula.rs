//! How many numbers a method with sites of its own trains, as a formula of its model's sizes and its settings.
//!
//! The formula stands in the method's file ([`crate::Method::formula`]); the test here works it out and counts, with the usual settings
//! and with each that it names changed. Methods on weights have theirs from `count.rs`.

use crate::Entry;

/// What formulas mean by single letters.
pub const SIZES: &str = "d the width of the model, L its blocks, kv the width of a block's keys, f the inner width of its MLP, o the \
                         outputs of all matrices in blocks, n the numbers of all norms, N those of the model";

impl Entry {
    /// What [`crate::Method::formula`] says of its usual form.
    pub fn own_formula(&self) -> Option<&'static str> {
        (self.example)().formula()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use engraft_nn::{Kind, Role, Task, Value as Frozen};
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::testing::{Toy, toy_of};
    use crate::{FieldKind, METHODS, attach};

    /// Names, and what they stand for.
    type Names = HashMap<String, f64>;

    /// A sum of products, read from the left.
    struct Text<'t> {
        rest: &'t str,
        names: &'t Names,
    }

    impl Text<'_> {
        fn eat(&mut self, sign: char) -> bool {
            let rest = self.rest.trim_start();
            let found = rest.strip_prefix(sign);
            self.rest = found.unwrap_or(rest);
            found.is_some()
        }

        fn sum(&mut self) -> f64 {
            let mut value = self.product();
            loop {
                value = match () {
                    () if self.eat('+') => value + self.product(),
                    () if self.eat('−') => value - self.product(),
                    () => return value,
                };
            }
        }

        fn product(&mut self) -> f64 {
            let mut value = self.power();
            loop {
                value = match () {
                    () if self.eat('·') => value * self.power(),
                    () if self.eat('/') => value / self.power(),
                    () => return value,
                };
            }
        }

        fn power(&mut self) -> f64 {
            let value = self.single();
            if self.eat('^') { value.powf(self.single()) } else { value }
        }

        fn single(&mut self) -> f64 {
            for (open, close, whole) in [('(', ')', false), ('⌊', '⌋', true)] {
                if self.eat(open) {
                    let value = self.sum();
                    assert!(self.eat(close), "expected {close} before {:?}", self.rest);
                    return if whole { value.floor() } else { value };
                }
            }
            let rest = self.rest.trim_start();
            let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
            let (word, rest) = rest.split_at(end);
            self.rest = rest;
            let known =
                || *self.names.get(word).unwrap_or_else(|| panic!("`{word}` is no size and no setting"));
            word.parse().unwrap_or_else(|_| known())
        }
    }

    /// The value of a whole formula.
    fn worked_out(formula: &str, names: &Names) -> f64 {
        let formula = formula.split(';').next().unwrap();
        let mut names = names.clone();
        let mut parts = formula.split(", ");
        let main = parts.next().unwrap();
        for part in parts {
            let (name, text) = part.split_once(" = ").unwrap();
            let value = Text { rest: text, names: &names }.sum();
            names.insert(name.into(), value);
        }
        let mut text = Text { rest: main, names: &names };
        let value = text.sum();
        assert_eq!(text.rest.trim(), "", "{formula}");
        value
    }

    /// What a setting is where its default is none, or no size of the toys fits it.
    fn given(name: &str) -> Map<String, Value> {
        let settings = match name {
            "bottleneck" => json!({ "reduction": 16 }),
            "krona_b" => json!({ "a1": 8, "a2": 16 }),
            "p_tuning" => json!({ "encoder_hidden_size": 24 }),
            "idpg" => json!({ "bottleneck": 64, "tokens": 8 }),
            "llama_adapter" | "llama_adapter_v2" => json!({ "adapter_layers": 2 }),
            "lpt" => json!({ "layer": 1 }),
            "s4" => json!({ "budget": 0.05 }),
            _ => json!({}),
        };
        settings.as_object().cloned().unwrap()
    }

    /// The sizes of a toy.
    fn sizes(toy: &Toy) -> Names {
        let (sites, info) = toy_of(toy);
        let of = |is: &dyn Fn(&engraft_nn::Site) -> usize| sites.iter().map(is).sum::<usize>() as f64;
        let outputs = of(&|s| match s.kind {
            Kind::Linear { out, .. } if s.layer.is_some() => out,
            _ => 0,
        });
        let norms = of(&|s| match (&s.value, &s.kind) {
            (Frozen::Vector(_), Kind::Vector { len }) if s.role == Role::Norm => *len,
            _ => 0,
        });
        [
            ("d", info.width as f64),
            ("L", info.layers as f64),
            ("kv", (info.kv_heads * info.head_dim) as f64),
            ("f", toy.inner as f64),
            ("heads", info.heads as f64),
            ("head_dim", info.head_dim as f64),
            ("o", outputs),
            ("n", norms),
            ("N", sites.parameters() as f64),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// What the formula gives and what is trained, with these settings over the usual ones.
    fn both(entry: &Entry, settings: &Map<String, Value>, toy: &Toy) -> Result<(f64, f64), String> {
        let mut names = sizes(toy);
        for field in entry.info.fields {
            let default = || field.default.and_then(|text| serde_json::from_str(text).ok());
            let value = settings.get(field.name).cloned().or_else(default).and_then(|v: Value| v.as_f64());
            value.into_iter().for_each(|value| _ = names.insert(field.name.into(), value));
        }
        let method = match entry.info.name {
            // What it reads lies in files.
            "adapter_fusion" => (entry.example)(),
            _ => (entry.from_settings)(settings).map_err(|e| e.to_string())?,
        };
        let formula = method.formula().ok_or("no formula")?;
        let (sites, mut info) = toy_of(toy);
        // CoDA is for models that do not write.
        info.task = if entry.info.name == "coda" { Task::Embedding } else { info.task };
        let attached = attach(&[(method, None)], &[], &sites, &info, 1).map_err(|e| e.to_string())?;
        let formula = formula.strip_prefix("≈ ").unwrap_or(formula);
        Ok((worked_out(formula, &names), attached.adapter.trained_count() as f64))
    }

    const TOYS: [Toy; 2] = [
        Toy { layers: 2, heads: 8, kv_heads: 4, head_dim: 16, inner: 512, vocabulary: 600 },
        Toy { layers: 3, heads: 8, kv_heads: 2, head_dim: 32, inner: 1024, vocabulary: 600 },
    ];

    /// Every method of the classes that live on activations says what it trains.
    #[test]
    fn formulas_count_what_is_trained() {
        let (mut wrong, mut count) = (Vec::new(), 0);
        let classes = ["additive", "prompt", "hybrid"];
        for entry in METHODS.iter().filter(|entry| classes.contains(&entry.info.class)) {
            let name = entry.info.name;
            let Some(formula) = entry.own_formula() else {
                if entry.trained_formula().is_none() {
                    wrong.push(format!("{name} has no formula of what it trains"));
                }
                continue;
            };
            count += 1;
            let terms = formula.split(';').next().unwrap();
            let near = if formula.starts_with('≈') { 0.05 } else { 0.0 };
            for (number, toy) in TOYS.iter().enumerate() {
                let usual = given(name);
                let mut runs = vec![usual.clone()];
                for field in
                    entry.info.fields.iter().filter(|field| number == 0 && terms.contains(field.name))
                {
                    let default = || field.default.and_then(|text| serde_json::from_str::<Value>(text).ok());
                    let value = usual.get(field.name).cloned().or_else(default).and_then(|v| v.as_f64());
                    if let Some(value) = value.filter(|_| !["depth", "adapter_layers"].contains(&field.name))
                    {
                        let half = if value >= 2.0 { (value / 2.0).floor() } else { value * 2.0 };
                        let half = if matches!(field.kind, FieldKind::Int { .. }) {
                            json!(half as u64)
                        } else {
                            json!(half)
                        };
                        runs.push(usual.clone().into_iter().chain([(field.name.to_owned(), half)]).collect());
                    }
                }
                for settings in runs {
                    match both(entry, &settings, toy) {
                        Ok((expected, found)) if (expected - found).abs() <= near * found => {}
                        Ok((expected, found)) => wrong.push(format!(
                            "{name} with {settings:?}: {formula} is {expected}, trained are {found}"
                        )),
                        Err(error) => wrong.push(format!("{name} with {settings:?}: {error}")),
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(count >= 34, "{count}");
    }
}
