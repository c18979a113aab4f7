//! The report of a run: one HTML file without script or network, with every chart repeated as a table.

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment};
use serde::Serialize;

use crate::cells::{Bars, HeatMap};
use crate::error::Result;
use crate::events::Events;
use crate::human;
use crate::plot::{course_card, headline, training_card};
use crate::run::{Change, Fact, RunData, Verdict};
use crate::svg::style;

const PAGE: &str = include_str!("report.html");
/// Rows of a table that repeats a chart; `events.jsonl` holds them all.
const ROWS_MAX: usize = 200;
const EVAL_ROWS: usize = 5;
const WIDTH: f64 = 900.0;

#[derive(Serialize)]
struct Page {
    name: String,
    style: String,
    verdict: Option<String>,
    warnings: Vec<String>,
    sections: Vec<Section>,
}

#[derive(Serialize, Default)]
struct Section {
    title: &'static str,
    charts: Vec<String>,
    table: Option<Cells>,
    /// Folds the table under this line.
    fold: Option<String>,
    more: Option<Cells>,
    command: Option<String>,
}

#[derive(Serialize)]
struct Cells {
    head: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

/// The report as the text of an HTML file.
///
/// # Errors
/// [`crate::Error::Page`] when the page cannot be filled, which is a fault of this crate.
pub fn report(run: &RunData) -> Result<String> {
    let empty = Events::default();
    let events = run.events.as_ref().unwrap_or(&empty);
    let mut sections = Vec::new();
    if !events.steps.is_empty() || !events.evals.is_empty() {
        sections.push(loss_section(events));
    }
    sections.extend(rows_section(run));
    sections.extend(course_section(events));
    sections.extend(run.changes.as_deref().filter(|changes| !changes.is_empty()).map(changes_section));
    sections.extend(data_section(run));
    sections.extend(run.damage.as_deref().map(|facts| facts_section("Merge and quantization", facts)));
    sections.extend(settings_section(run));
    if run.provenance.is_some() || run.command.is_some() {
        let facts = run.provenance.as_deref().unwrap_or_default();
        let section = facts_section("How to repeat it", facts);
        sections.push(Section { command: run.command.clone(), ..section });
    }
    let page = Page {
        name: run.name.clone(),
        style: style(),
        verdict: run.verdict.as_ref().map(verdict_line),
        warnings: events.warnings.iter().map(|warning| warning.message.clone()).collect(),
        sections,
    };
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("report.html", PAGE)?;
    Ok(environment.get_template("report.html")?.render(Serde(page))?)
}

fn verdict_line(verdict: &Verdict) -> String {
    let mut parts: Vec<String> = [&verdict.task, &verdict.method].into_iter().flatten().cloned().collect();
    let shown = |value: Option<f64>| value.map(|value| human::number(value, 3));
    let values: Vec<String> = [shown(verdict.before), shown(verdict.after)].into_iter().flatten().collect();
    if !values.is_empty() {
        let interval = verdict.interval.map_or(String::new(), |(low, high)| {
            format!(" (interval {} to {})", human::number(low, 3), human::number(high, 3))
        });
        let only_before = if verdict.after.is_none() { " before training" } else { "" };
        let metric = verdict.metric.as_deref().unwrap_or("metric");
        parts.push(format!("{metric} {}{only_before}{interval}", values.join(" → ")));
    }
    parts.extend(verdict.seconds.map(human::duration));
    parts.extend(verdict.peak_memory_bytes.map(|bytes| format!("{} peak", human::bytes(bytes))));
    parts.join(" · ")
}

fn loss_section(events: &Events) -> Section {
    let mut rows: Vec<(u64, Vec<String>)> = Vec::new();
    let stride = events.steps.len().div_ceil(ROWS_MAX).max(1);
    for step in events.steps.iter().step_by(stride) {
        rows.push((
            step.step,
            vec![step.step.to_string(), human::number(step.loss, 5), String::new(), String::new()],
        ));
    }
    let eval_stride = events.evals.len().div_ceil(ROWS_MAX).max(1);
    for eval in events.evals.iter().step_by(eval_stride) {
        let loss = eval.loss.map_or(String::new(), |loss| human::number(loss, 5));
        let metrics: Vec<String> =
            eval.metrics.iter().map(|(name, value)| format!("{name} {}", human::number(*value, 5))).collect();
        rows.push((eval.step, vec![eval.step.to_string(), String::new(), loss, metrics.join(", ")]));
    }
    rows.sort_by_key(|row| row.0);
    let rows = rows.into_iter().map(|row| row.1).collect();
    Section {
        title: "Loss and evaluation",
        charts: vec![training_card(events).inline(&headline(events))],
        table: Some(Cells { head: vec!["step", "training loss", "evaluation loss", "metrics"], rows }),
        fold: Some(fold(events.steps.len(), "steps")),
        ..Section::default()
    }
}

fn fold(total: usize, what: &str) -> String {
    if total > ROWS_MAX {
        format!("As a table (one in {} of {total} {what})", total.div_ceil(ROWS_MAX))
    } else {
        "As a table".to_string()
    }
}

fn rows_section(run: &RunData) -> Option<Section> {
    let rows = run.rows.as_ref().filter(|rows| !rows.is_empty())?;
    let cells = rows.iter().take(EVAL_ROWS).map(|row| {
        let answer = |text: &Option<String>| text.clone().unwrap_or_default();
        vec![row.input.clone(), row.expected.clone(), answer(&row.base), answer(&row.adapted)]
    });
    let table = Cells { head: vec!["input", "expected", "base", "adapted"], rows: cells.collect() };
    Some(Section { title: "Evaluation rows", table: Some(table), ..Section::default() })
}

fn course_section(events: &Events) -> Option<Section> {
    let card = course_card(events)?;
    let text = |value: Option<f64>| value.map_or(String::new(), |value| human::number(value, 4));
    let stride = events.steps.len().div_ceil(ROWS_MAX).max(1);
    let rows = events.steps.iter().step_by(stride).map(|step| {
        let seconds = step.seconds.filter(|seconds| *seconds > 0.0);
        let speed = step.tokens.zip(seconds).map(|(tokens, seconds)| tokens as f64 / seconds);
        let memory = step.memory_bytes.map_or(String::new(), human::bytes);
        vec![step.step.to_string(), text(step.grad_norm), text(step.learning_rate), text(speed), memory]
    });
    let head = vec!["step", "gradient norm", "learning rate", "tokens/s", "memory"];
    Some(Section {
        title: "Course of the run",
        charts: vec![card.inline("Gradient norm, learning rate, speed and memory")],
        table: Some(Cells { head, rows: rows.collect() }),
        fold: Some(fold(events.steps.len(), "steps")),
        ..Section::default()
    })
}

fn changes_section(changes: &[Change]) -> Section {
    let mut roles: Vec<String> = Vec::new();
    for change in changes {
        if !roles.contains(&change.role) {
            roles.push(change.role.clone());
        }
    }
    let mut layers: Vec<Option<usize>> = changes.iter().map(|change| change.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    let name = |layer: Option<usize>| layer.map_or("-".to_string(), |layer| layer.to_string());
    let value = |layer: Option<usize>, role: &String| {
        changes.iter().find(|change| change.layer == layer && change.role == *role).map(|change| change.ratio)
    };
    let rows = layers
        .iter()
        .map(|layer| (name(*layer), roles.iter().map(|role| value(*layer, role)).collect()))
        .collect();
    let title = "‖ΔW‖ / ‖W‖ by layer and role";
    let cells = changes
        .iter()
        .map(|change| vec![name(change.layer), change.role.clone(), human::number(change.ratio, 4)]);
    Section {
        title: "How far the weights moved",
        charts: vec![HeatMap::new(title, roles, rows).card(WIDTH).inline(title)],
        table: Some(Cells { head: vec!["layer", "role", "‖ΔW‖ / ‖W‖"], rows: cells.collect() }),
        fold: Some("As a table".to_string()),
        ..Section::default()
    }
}

fn data_section(run: &RunData) -> Option<Section> {
    if run.data.is_none() && run.lengths.is_none() {
        return None;
    }
    let lengths = run.lengths.as_deref().unwrap_or_default();
    let mut section = facts_section("Data", run.data.as_deref().unwrap_or_default());
    if !lengths.is_empty() {
        let bars = lengths.iter().map(|(name, rows)| (name.clone(), *rows as f64)).collect();
        section
            .charts
            .push(Bars::new("Rows by length in tokens", "", bars).card(WIDTH).inline("Rows by length"));
        let rows = lengths
            .iter()
            .map(|(name, rows)| Fact { name: format!("{name} tokens"), value: rows.to_string() });
        let facts: Vec<Fact> = run.data.iter().flatten().cloned().chain(rows).collect();
        section.table = facts_section("Data", &facts).table;
    }
    Some(section)
}

fn facts_section(title: &'static str, facts: &[Fact]) -> Section {
    let rows: Vec<Vec<String>> =
        facts.iter().map(|fact| vec![fact.name.clone(), fact.value.clone()]).collect();
    let table = (!rows.is_empty()).then_some(Cells { head: vec!["", ""], rows });
    Section { title, table, ..Section::default() }
}

fn settings_section(run: &RunData) -> Option<Section> {
    let settings = run.settings.as_ref().filter(|settings| !settings.is_empty())?;
    let cells = |all: bool| Cells {
        head: vec!["setting", "value", "default"],
        rows: settings
            .iter()
            .filter(|setting| all || setting.default.as_ref() != Some(&setting.value))
            .map(|setting| {
                vec![setting.name.clone(), setting.value.clone(), setting.default.clone().unwrap_or_default()]
            })
            .collect(),
    };
    let title = "Settings that differ from the defaults";
    Some(Section { title, table: Some(cells(false)), more: Some(cells(true)), ..Section::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Step, Warning};
    use crate::run::{EvalRow, Setting};

    fn full(steps: u64) -> RunData {
        let bad = "<script>alert(1)</script>\"'&".to_string();
        let noise = |step: u64| ((step * 7919) % 1009) as f64 / 1009.0;
        let step = |step: u64| Step {
            step,
            loss: 0.5 + noise(step),
            grad_norm: Some(1.0 + noise(step + 1)),
            learning_rate: Some(1e-3 / step as f64),
            tokens: Some(300 + step % 97),
            seconds: Some(0.1 + 0.1 * noise(step + 2)),
            memory_bytes: Some(1 << 30),
            ..Step::default()
        };
        let warnings = vec![Warning { step: None, message: bad.clone() }];
        RunData {
            name: bad.clone(),
            verdict: Some(Verdict { task: Some(bad.clone()), after: Some(0.9), ..Verdict::default() }),
            events: Some(Events { steps: (1..=steps).map(step).collect(), warnings, ..Events::default() }),
            rows: Some(vec![EvalRow { input: bad.clone(), expected: bad.clone(), ..EvalRow::default() }]),
            changes: Some(vec![Change { layer: Some(0), role: bad.clone(), ratio: 0.1 }]),
            data: Some(vec![Fact { name: bad.clone(), value: bad.clone() }]),
            lengths: Some(vec![(bad.clone(), 3)]),
            damage: Some(vec![Fact { name: bad.clone(), value: bad.clone() }]),
            settings: Some(vec![Setting {
                name: bad.clone(),
                value: bad.clone(),
                default: Some("1".into()),
            }]),
            provenance: Some(vec![Fact { name: bad.clone(), value: bad.clone() }]),
            command: Some(bad),
        }
    }

    #[test]
    fn a_long_hostile_run_gives_a_small_safe_page_in_order() {
        let page = report(&full(100_000)).unwrap();
        assert!(!page.contains("<script") && !page.contains("<img"));
        assert!(page.len() < 500_000, "{} bytes", page.len());
        let order = [
            "Warnings",
            "Loss and",
            "Evaluation rows",
            "Course",
            "How far",
            "Data",
            "Merge",
            "Settings",
            "repeat",
        ];
        let places: Vec<usize> =
            order.iter().map(|title| page.find(&format!("<h2>{title}")).unwrap_or(0)).collect();
        assert!(places[..8].windows(2).all(|pair| pair[0] < pair[1]), "{places:?}");
    }

    #[test]
    fn what_was_not_recorded_is_left_out() {
        let page = report(&RunData { name: "run".into(), ..RunData::default() }).unwrap();
        assert!(!page.contains("<h2>") && page.contains("<h1>run</h1>"));
    }
}
