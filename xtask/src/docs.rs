//! `docs/methods.md` and `docs/models.md`, from the registries.

use std::fmt::Write;

use engraft_method::METHODS;
use engraft_model::ARCHITECTURES;

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

fn methods() -> String {
    let mut text = format!("{HEAD}\n# Methods\n\n");
    text.push_str("| name | method | class | sites | merges | peft type | paper |\n| --- | --- | --- | --- | --- | --- | --- |\n");
    for info in METHODS.iter().map(|entry| entry.info) {
        let row =
            [info.name, info.title, info.class, info.sites, yes(info.mergeable), info.peft_type, info.paper];
        let _ = writeln!(text, "| {} |", row.map(cell).join(" | "));
    }
    for info in METHODS.iter().map(|entry| entry.info) {
        let _ = write!(text, "\n## {} (`name = \"{}\"`)\n\n{}\n", info.title, info.name, info.summary);
        if let Some(roles) = info.default_roles {
            let names: Vec<String> = roles.iter().map(|role| format!("`{}`", role.name())).collect();
            let _ = write!(text, "\nTargets, unless the recipe names others: roles {}.\n", names.join(", "));
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
