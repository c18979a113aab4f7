//! `engraft methods`: the catalogue, and a page for each method, from the registry.

use engraft_method::{Entry, Field, FieldKind, Info, METHODS, SIZES, find};
use engraft_recipe::{known_elsewhere, nearest};
use engraft_report::{Align, Table};
use engraft_train::method_specs;
use serde_json::{Value, json};

use crate::context::Context;
use crate::failure::{Failure, Outcome};

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft methods
  engraft methods lora
  engraft methods --json | jq '.methods[].name'")]
pub struct Args {
    /// Shows one method with all its settings
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// Prints the table, or the page of one method.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    let entries: Vec<&Entry> = match &args.name {
        None => METHODS.to_vec(),
        Some(name) => vec![find(name).ok_or_else(|| unknown(name))?],
    };
    if args.json {
        let list: Vec<Value> = entries.iter().map(|entry| object(entry)).collect();
        cx.ui.json(json!({ "methods": list }));
    } else if args.name.is_some() {
        entries.iter().for_each(|entry| cx.ui.print(&page(entry)));
    } else {
        cx.ui.print(&table(&entries, cx.ui.width()));
        cx.ui.say("\n`engraft methods NAME` shows the settings of one");
    }
    Ok(())
}

fn unknown(name: &str) -> Failure {
    if let Some(how) = known_elsewhere(name, &method_specs()) {
        let page = how.split('"').nth(1).and_then(find).filter(|_| how.starts_with("`name"));
        let more = page.map_or("combine --help".into(), |entry| format!("methods {}", entry.info.name));
        let message = format!("there is no method `{name}`: it is {how}; `engraft {more}` tells more");
        return Failure::before_work(message);
    }
    let known: Vec<&str> = METHODS.iter().map(|entry| entry.info.name).collect();
    let near = nearest(name, known.iter().copied());
    let near = near.map_or(String::new(), |near| format!("; did you mean `{near}`?"));
    Failure::before_work(format!("there is no method `{name}`{near}; there are {}", known.join(", ")))
}

/// Whether `peft` has the method, so that its adapters load there.
fn in_peft(entry: &Entry) -> bool {
    !entry.info.peft_type.is_empty() && !entry.info.peft_type.starts_with("ENGRAFT")
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn table(entries: &[&Entry], width: usize) -> String {
    let head = [
        ("method", Align::Left),
        ("class", Align::Left),
        ("sites", Align::Left),
        ("merges", Align::Left),
        ("peft", Align::Left),
        ("start with", Align::Left),
    ];
    let mut table = Table::new(&head);
    for entry in entries {
        let info = entry.info;
        table.row([
            info.name,
            info.class,
            info.sites,
            yes(info.mergeable),
            yes(in_peft(entry)),
            &start(info),
        ]);
    }
    table.render(width)
}

/// The first settings that are numbers, as a start.
fn start(info: &Info) -> String {
    let numbers =
        info.fields.iter().filter(|f| matches!(f.kind, FieldKind::Int { .. } | FieldKind::Float { .. }));
    let shown =
        numbers.filter_map(|f| Some(format!("{} {}", f.name, f.default.filter(|text| *text != "null")?)));
    shown.take(2).collect::<Vec<_>>().join(", ")
}

fn page(entry: &Entry) -> String {
    let info = entry.info;
    let mut text = format!("{} (name = \"{}\")\n{}\n\n", info.title, info.name, info.summary);
    let merges = if info.mergeable { "yes: `engraft merge` folds it into the weights" } else { "no" };
    let start = if info.identity_at_init {
        "a new adapter changes nothing"
    } else {
        "a new adapter changes the model"
    };
    let mut facts = vec![
        ("class", info.class.to_owned()),
        ("sites", info.sites.to_owned()),
        ("paper", info.paper.to_owned()),
        ("merges", merges.to_owned()),
        ("peft", if in_peft(entry) { format!("yes: {}", info.peft_type) } else { "no".into() }),
        ("start", start.to_owned()),
    ];
    if let Some(usual) = entry.usual_targets() {
        facts.push(("targets", format!("{usual} unless the recipe says otherwise")));
    }
    if let Some((own, shared)) = entry.trained_formula() {
        let shared = shared.map_or(String::new(), |shared| format!(", and {shared} for all together"));
        facts
            .push(("trained", format!("{own} numbers at a target [out, in]{shared}, as the settings stand")));
    }
    if (entry.example)().by_layers() {
        facts.push(("layers", "all, or those that `layers` names".into()));
    }
    if let Some(formula) = entry.own_formula() {
        facts.push((
            "trained",
            format!("{formula} (of a model of one stack, as the settings stand: {SIZES})"),
        ));
    }
    for (name, value) in facts {
        text.push_str(&format!("{name:9}{value}\n"));
    }
    if info.fields.is_empty() {
        return text + "\nNo settings of its own.\n";
    }
    text.push_str("\nsettings\n");
    let open = (entry.example)().chosen_in_use();
    let widest = info.fields.iter().map(|field| field.name.len()).max().unwrap_or(0);
    for field in info.fields {
        let default = field.default.map_or("by the model or form".into(), |text| format!("default {text}"));
        text.push_str(&format!("  {:widest$}  {}\n", field.name, field.doc));
        let anew = match open.iter().any(|(setting, _)| *setting == field.name) {
            true => "; also where the adapter is used (--choose)",
            false => "",
        };
        text.push_str(&format!("  {:widest$}  {}; {default}{anew}\n", "", takes(field)));
    }
    text
}

/// What a setting takes, in words.
fn takes(field: &Field) -> String {
    match field.kind {
        FieldKind::Bool => "true, false".into(),
        FieldKind::Int { min, max } => match (min, max) {
            (min, i64::MAX) => format!("whole, from {min}"),
            (min, max) => format!("whole, {min} to {max}"),
        },
        FieldKind::Float { min, max } => match (min, max) {
            (min, max) if min <= -f64::MAX && max >= f64::MAX => "number".into(),
            (min, max) if max >= f64::MAX => format!("number, from {}", bound(min)),
            (min, max) => format!("number, {} to {}", bound(min), bound(max)),
        },
        FieldKind::Text | FieldKind::Tokens => "text".into(),
        FieldKind::Prompts | FieldKind::Adapters => "list of paths".into(),
        FieldKind::OneOf(names) => names.join(", "),
        FieldKind::TextList => "list of texts".into(),
        FieldKind::IntList => "list of whole numbers".into(),
        FieldKind::IntMap | FieldKind::FloatMap => "{ pattern = number }".into(),
    }
}

/// A bound without the last digits that keep it open (`ABOVE_ZERO`, `BELOW_ONE`).
fn bound(value: f64) -> String {
    match value {
        engraft_recipe::ABOVE_ZERO => "above 0".into(),
        engraft_recipe::BELOW_ONE => "below 1".into(),
        value => value.to_string(),
    }
}

fn object(entry: &Entry) -> Value {
    let info = entry.info;
    let default = |field: &Field| field.default.and_then(|text| serde_json::from_str::<Value>(text).ok());
    let open = (entry.example)().chosen_in_use();
    let setting = |field: &Field| {
        json!({
            "name": field.name, "takes": takes(field), "default": default(field), "doc": field.doc,
            "chosen_in_use": open.iter().any(|(setting, _)| *setting == field.name),
        })
    };
    json!({
        "name": info.name,
        "title": info.title,
        "class": info.class,
        "sites": info.sites,
        "paper": info.paper,
        "summary": info.summary,
        "mergeable": info.mergeable,
        "identity_at_init": info.identity_at_init,
        "default_roles": info.default_roles.map(|roles| roles.iter().map(|role| role.name()).collect::<Vec<_>>()),
        "peft_type": in_peft(entry).then_some(info.peft_type),
        "settings": info.fields.iter().map(setting).collect::<Vec<_>>(),
    })
}
