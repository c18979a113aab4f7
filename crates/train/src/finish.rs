//! What a finished run leaves: the adapter, the plot, and `report.json`, from which `engraft report` makes its page.

use std::path::{Path, PathBuf};

use engraft_data::{Dataset, Tokenizer};
use engraft_method::{Chosen, Named, save_adapter, stored_as};
use engraft_nn::{Base, Layout, Pass, Patch, Patched, Sites, Value};
use engraft_report::run::{Change, EvalRow, Fact, Setting, Verdict};
use engraft_report::{Events, RunData, human, training_plot};
use engraft_store::{json, write_atomic};
use engraft_tensor::{Tensor, no_grad};

use crate::batch::Batch;
use crate::evaluate::Evaluated;
use crate::objective::Objective;
use crate::run::{Run, metric_name};
use crate::session::Session;
use crate::{Error, Result};

const EVENTS_BYTES_MAX: u64 = 1 << 30;
const REPORT_BYTES_MAX: u64 = 64 << 20;
/// Fixed evaluation rows in the report.
const ROWS: usize = 5;
/// Characters of a row's text that are shown.
const TEXT: usize = 300;

/// Writes the adapter directory, in `peft`'s form where the method exists there.
pub(crate) fn write_adapter(session: &Session, dir: &Path) -> Result<()> {
    let (config, tensors) = save_adapter(
        &session.adapter,
        &session.methods,
        &session.train_also,
        &session.plan.model,
        session.model.sites(),
        session.model.info(),
    )?;
    write_adapter_files(dir, &config, &tensors, &session.methods, session.model.sites())?;
    if let Some(names) = &session.labels {
        crate::labels::write_label_names(dir, names)?;
    }
    session.tasks.write(dir, &session.methods)
}

/// Writes the directory of an adapter of `methods` for the model that has `sites`.
pub fn write_adapter_files(
    dir: &Path,
    config: &serde_json::Value,
    tensors: &Named,
    methods: &[Chosen],
    sites: &Sites,
) -> Result<()> {
    let entry = |(name, tensor): &(String, Tensor)| {
        crate::tensors::stored(stored_as(methods, name, sites), name, tensor)
    };
    let entries = tensors.iter().map(entry).collect::<Result<Vec<_>>>()?;
    Ok(engraft_store::write_adapter(dir, config, &entries)?)
}

/// Writes `plot.svg` and `report.json`; gives the plot.
pub(crate) fn write_report(run: &mut Run<'_>, seconds: f64) -> Result<PathBuf> {
    let dir = run.dir.path().to_owned();
    let events = read_events(&dir)?;
    let plot = dir.join("plot.svg");
    write_atomic(&plot, training_plot(&events).as_bytes())?;
    let data = RunData {
        name: dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
        verdict: Some(verdict(run, &events, seconds)),
        rows: eval_rows(run.session)?,
        changes: Some(changes(run.session)?),
        data: Some(data_facts(run.session)),
        lengths: Some(lengths(&run.session.train)),
        settings: Some(settings(&run.session.plan.to_toml())),
        provenance: Some(provenance(run)),
        command: run.options.command.clone(),
        ..RunData::default()
    };
    let text = serde_json::to_string(&data).map_err(|e| Error::Setup(e.to_string()))?;
    write_atomic(&dir.join("report.json"), text.as_bytes())?;
    Ok(plot)
}

/// What `engraft report` shows of the run in `dir`: its `report.json`, if it came so far, and its events.
///
/// # Errors
/// No run is there, or its files are damaged.
pub fn run_data(dir: &Path) -> Result<RunData> {
    let path = dir.join("report.json");
    let mut data = match path.exists() {
        true => {
            let text = json::read_capped(&path, "report", REPORT_BYTES_MAX)?;
            serde_json::from_slice(&text).map_err(|e| Error::Setup(format!("{}: {e}", path.display())))?
        }
        false => RunData {
            name: dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            ..RunData::default()
        },
    };
    data.events = Some(read_events(dir)?);
    Ok(data)
}

fn read_events(dir: &Path) -> Result<Events> {
    let bytes = json::read_capped(&dir.join("events.jsonl"), "events", EVENTS_BYTES_MAX)?;
    Ok(Events::parse(&String::from_utf8_lossy(&bytes))?)
}

fn verdict(run: &Run<'_>, events: &Events, seconds: f64) -> Verdict {
    let session = run.session;
    // What was chosen for the best, but a classifier is judged by its accuracy rather than its loss.
    let classes =
        matches!(session.objective, Objective::SequenceClassification | Objective::TokenClassification);
    let name = match metric_name(session.plan.train.best_metric) {
        "loss" if classes => "accuracy",
        name => name,
    };
    let of = |eval: &engraft_report::events::Eval| match name {
        "loss" => eval.loss,
        name => eval.metrics.get(name).copied(),
    };
    let after = run.after.as_ref().and_then(|e| e.metric(name));
    let labels = run.after.as_ref().map_or(0, |e| e.labels);
    Verdict {
        task: Some(session.model.info().task.name().into()),
        method: Some(session.methods.iter().map(|(m, _)| m.info().title).collect::<Vec<_>>().join(" + "))
            .filter(|title| !title.is_empty()),
        metric: session.eval.as_ref().map(|_| name.into()),
        before: events.evals.iter().find(|e| e.step == 0).and_then(of),
        after,
        interval: after.filter(|_| name == "accuracy").and_then(|share| wilson(share, labels)),
        seconds: Some(seconds),
        peak_memory_bytes: engraft_store::process::peak_memory_bytes(),
    }
}

/// Wilson's interval of 95 % for a share of n (Wilson 1927).
fn wilson(share: f64, n: u64) -> Option<(f64, f64)> {
    if n == 0 {
        return None;
    }
    let (n, z) = (n as f64, 1.959_964);
    let middle = (share + z * z / (2.0 * n)) / (1.0 + z * z / n);
    let half = z / (1.0 + z * z / n) * (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt();
    Some(((middle - half).max(0.0), (middle + half).min(1.0)))
}

/// The first rows of the evaluation data with the answers of base and adapter.
fn eval_rows(session: &Session) -> Result<Option<Vec<EvalRow>>> {
    let (Some(data), Some(tokenizer)) = (&session.eval, &session.tokenizer) else { return Ok(None) };
    let (base, adapted) = (session.evaluated(false)?, session.evaluated(true)?);
    // The same five in every run on the same data, spread over the file.
    let apart = (data.examples.len() / ROWS).max(1);
    let mut rows = Vec::new();
    for example in data.examples.iter().step_by(apart).take(ROWS) {
        let batch = Batch::pack(std::slice::from_ref(example), adapted.packing(data))?;
        let answer = |of: &Evaluated<'_>| of.predict(session.objective, &batch).map(|a| a.predicted);
        let (base, adapted) = (answer(&base)?, answer(&adapted)?);
        let text = |ids: Vec<i64>| answer_text(session, tokenizer, &ids);
        rows.push(EvalRow {
            input: clipped(&tokenizer.decode(&example.ids, true)?),
            expected: text(adapted.iter().map(|(label, _)| *label).collect())?,
            base: Some(text(base.iter().map(|(_, predicted)| *predicted).collect())?),
            adapted: Some(text(adapted.iter().map(|(_, predicted)| *predicted).collect())?),
        });
    }
    Ok(Some(rows))
}

/// Classes by their names, tokens as text (each predicted from the true ones before it).
fn answer_text(session: &Session, tokenizer: &Tokenizer, ids: &[i64]) -> Result<String> {
    let name = |id: &i64| {
        let known = session.labels.as_ref().and_then(|labels| labels.get(*id as usize));
        known.cloned().unwrap_or_else(|| id.to_string())
    };
    Ok(match session.objective {
        Objective::SequenceClassification | Objective::TokenClassification => {
            clipped(&ids.iter().map(name).collect::<Vec<_>>().join(" "))
        }
        Objective::CausalLm | Objective::MaskedLm | Objective::Seq2Seq => {
            let ids: Vec<u32> = ids.iter().filter_map(|id| u32::try_from(*id).ok()).collect();
            clipped(&tokenizer.decode(&ids, false)?)
        }
    })
}

fn clipped(text: &str) -> String {
    match text.char_indices().nth(TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// ‖W′ − W‖/‖W‖ of every adapted weight that can be written as W′.
fn changes(session: &Session) -> Result<Vec<Change>> {
    let cx = Pass::new(Layout::counted(&[])?, None);
    let mut found = Vec::new();
    for id in session.adapter.sites() {
        let (site, patches) = (session.model.sites().get(id), session.adapter.at(id));
        let mergeable = patches.iter().all(|p| matches!(p, Patch::Weight(p) if p.mergeable()));
        let Value::Weight(weight) = &site.value else { continue };
        if !mergeable {
            continue;
        }
        let ratio = no_grad(|| -> Result<f64> {
            let w = weight.dense()?;
            let change = Patched::new(weight.as_ref(), patches, site, &cx).dense()?.sub(&w)?;
            let norm = |t: &Tensor| -> Result<f64> { Ok(f64::from(t.mul(t)?.sum()?.item()?).sqrt()) };
            Ok(norm(&change)? / norm(&w)?.max(f64::MIN_POSITIVE))
        })?;
        found.push(Change { layer: site.layer, role: site.role.name().into(), ratio });
    }
    Ok(found)
}

fn fact(name: &str, value: impl Into<String>) -> Fact {
    Fact { name: name.into(), value: value.into() }
}

fn data_facts(session: &Session) -> Vec<Fact> {
    let report = &session.train.report;
    let mut facts = vec![
        fact("rows", report.rows.to_string()),
        fact("examples", report.examples.to_string()),
        fact("tokens", report.tokens.to_string()),
        fact(
            "length",
            format!(
                "median {}, 99 % {}, longest {}",
                report.median_length, report.length_99, report.max_length
            ),
        ),
        fact("cut", format!("{} rows, {} tokens", report.truncated_rows, report.truncated_tokens)),
        fact("trained share", human::percent(report.trained_share)),
        fact("duplicates", report.duplicates.to_string()),
    ];
    facts.extend(
        session.eval.as_ref().map(|eval| fact("evaluation examples", eval.examples.len().to_string())),
    );
    facts
}

/// Rows by length, in eight classes of equal width.
fn lengths(data: &Dataset) -> Vec<(String, u64)> {
    let lengths = data.lengths();
    let width = lengths.iter().max().map_or(1, |longest| longest / 8 + 1);
    let mut counts = vec![0u64; 8];
    lengths.iter().for_each(|n| counts[(n / width).min(7)] += 1);
    counts
        .into_iter()
        .enumerate()
        .map(|(i, n)| (format!("{}-{}", i * width, (i + 1) * width - 1), n))
        .collect()
}

/// The lines of the plan; those that were not written in the recipe hold their defaults.
fn settings(plan: &str) -> Vec<Setting> {
    let (mut section, mut found) = (String::new(), Vec::new());
    for line in plan.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        if line.starts_with('[') {
            section = format!("{}.", line.trim_matches(['[', ']']));
            continue;
        }
        let (value, origin) = line.rsplit_once("  # ").unwrap_or((line, ""));
        let Some((name, value)) = value.split_once(" = ") else { continue };
        let default = (origin == "default").then(|| value.to_owned());
        found.push(Setting { name: format!("{section}{name}"), value: value.into(), default });
    }
    found
}

fn provenance(run: &Run<'_>) -> Vec<Fact> {
    let f = &run.session.fingerprint;
    vec![
        fact("engraft", f.version.clone()),
        fact("system", f.target.clone()),
        fact("kernels", f.kernels.clone()),
        fact("threads", f.threads.to_string()),
        fact("model", run.session.plan.model.clone()),
        fact("base, SHA-256 of samples", f.base.clone()),
        fact("data, SHA-256 of ids and labels", f.data.clone()),
        fact("seconds to load", format!("{:.2}", run.options.load_seconds)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_tell_defaults_from_what_was_written() {
        let found = settings("# x\nmodel = \"m\"  # recipe\n\n[train]\nseed = 0  # default\n");
        assert_eq!((found[0].name.as_str(), found[0].default.as_deref()), ("model", None));
        assert_eq!((found[1].name.as_str(), found[1].default.as_deref()), ("train.seed", Some("0")));
    }

    #[test]
    fn the_interval_is_wilson_s() {
        let (low, high) = wilson(0.9, 100).unwrap();
        assert!((low - 0.8256).abs() < 1e-3 && (high - 0.9448).abs() < 1e-3, "{low} {high}");
        assert_eq!(wilson(0.5, 0), None);
    }
}
