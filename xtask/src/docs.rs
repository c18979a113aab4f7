//! `docs/methods.md` and `docs/models.md`, from the registries.

use std::fmt::Write;

use engraft_method::{METHODS, SIZES};
use engraft_model::ARCHITECTURES;
use serde_json::Value;

const HEAD: &str = "<!-- Written by `cargo run --release -p engraft-xtask -- docs`; do not edit. -->\n";

/// Writes both pages.
pub fn write() -> std::io::Result<()> {
    let docs = crate::root().join("docs");
    std::fs::create_dir_all(&docs)?;
    for (name, text) in pages() {
        std::fs::write(docs.join(name), text)?;
    }
    Ok(())
}

/// Each page's name and text.
pub fn pages() -> [(&'static str, String); 2] {
    [("methods.md", methods()), ("models.md", models())]
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// A cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// What a training step costs beside LoRA's, as `engraft-bench methods` measured it.
struct Costs(Value);

/// Results, and the machine that they are from.
const MEASURED: (&str, &str) = (
    "bench/results/methods-zen3-avx2.json",
    "a machine with an AMD processor of the Zen 3 generation (AVX2)",
);

impl Costs {
    fn read() -> Costs {
        let file = crate::root().join(MEASURED.0);
        let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        Costs(serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display())))
    }

    fn rows(&self) -> impl Iterator<Item = (&str, [String; 2])> {
        self.0["methods"].as_array().into_iter().flatten().map(|row| {
            let ratio = |key: &str| row[key].as_f64().map_or(String::new(), |ratio| format!("{ratio:.2}"));
            (row["method"].as_str().unwrap_or_default(), ["time_to_lora", "memory_to_lora"].map(ratio))
        })
    }

    /// Time and memory of the method called `name`; nothing where it was not measured.
    fn of(&self, name: &str) -> [String; 2] {
        self.rows().find(|(of, _)| *of == name).map_or_else(Default::default, |(_, costs)| costs)
    }

    /// What the columns mean and where they come from; forms of a method that have no line of their own.
    fn note(&self) -> String {
        let forms = self.rows().filter_map(|(of, [time, memory])| {
            let (name, form) = of.split_once(", ")?;
            Some(format!("`{name}` with {form} {time} and {memory}"))
        });
        let forms: Vec<String> = forms.collect();
        format!(
            "Time and memory are those of a training step beside plain LoRA's, where `engraft-bench methods` measured them: on {} with {} threads, MiniLM as a classifier of texts, batches of 32, all linear layers, f32, ranks of 8 or settings that train about as much; medians of {} rounds, and the peak memory of the process, model included (`{}`). Of forms that have no line: {}.\n\n",
            MEASURED.1,
            self.0["threads"],
            self.0["rounds"],
            MEASURED.0,
            forms.join("; "),
        )
    }
}

fn methods() -> String {
    let mut text = format!("{HEAD}\n# Methods\n\n");
    let costs = Costs::read();
    text.push_str(&costs.note());
    let _ = write!(
        text,
        "Formulas of what is trained hold for a model of one stack, with {SIZES}; other names are settings. They are counted in a test.\n\n"
    );
    text.push_str("| name | method | class | sites | merges | peft type | time | memory | paper |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for info in METHODS.iter().map(|entry| entry.info) {
        let [time, memory] = costs.of(info.name);
        let row = [
            info.name,
            info.title,
            info.class,
            info.sites,
            yes(info.mergeable),
            info.peft_type,
            time.as_str(),
            memory.as_str(),
            info.paper,
        ];
        let _ = writeln!(text, "| {} |", row.map(cell).join(" | "));
    }
    for entry in METHODS {
        let info = entry.info;
        let _ = write!(text, "\n## {} (`name = \"{}\"`)\n\n{}\n", info.title, info.name, info.summary);
        if let Some(usual) = entry.usual_targets() {
            let _ = write!(text, "\nTargets, unless the recipe names others: {usual}.\n");
        }
        if let Some((own, shared)) = entry.trained_formula() {
            let shared = shared.map_or(String::new(), |shared| format!(", and {shared} for all together"));
            let _ = write!(text, "\nTrained at a target [out, in], as the settings stand: {own}{shared}.\n");
        }
        if (entry.example)().by_layers() {
            text.push_str("\nIn all layers, or in those that `layers` names.\n");
        }
        if let Some(formula) = entry.own_formula() {
            let _ = write!(text, "\nTrained, as the settings stand: {formula}.\n");
        }
        if info.fields.is_empty() {
            continue;
        }
        text.push_str("\n| setting | default | |\n| --- | --- | --- |\n");
        for field in info.fields {
            let default =
                field.default.map_or("by the model or form".to_owned(), |value| format!("`{value}`"));
            let _ = writeln!(text, "| `{}` | {} | {} |", field.name, cell(&default), cell(field.doc));
        }
    }
    text
}

fn models() -> String {
    let mut text = format!(
        "{HEAD}\n# Models\n\nDirectories in Hugging Face form, by `model_type` of `config.json`.\n\n"
    );
    text.push_str("| model_type | classes |\n| --- | --- |\n");
    for architecture in ARCHITECTURES {
        let classes: Vec<String> =
            architecture.classes.iter().map(|(class, _)| format!("`{class}`")).collect();
        let _ = writeln!(text, "| `{}` | {} |", architecture.name, classes.join(", "));
    }
    text
}
