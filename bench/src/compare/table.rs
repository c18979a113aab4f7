//! The tables of a comparison: a budget each, a method a row, mean and spread over seeds.

use super::Outcome;
use super::methods::{BOUNDS, BUDGETS, Entry, METHODS};

const DATA: &[&str] = &["trec", "sst2", "banking77"];

pub fn print(outcomes: &[Outcome]) {
    for (at, budget) in BUDGETS.iter().enumerate() {
        println!("\n### About {budget}\n");
        println!("| method | class | trained | learning rate | {} | mean |", DATA.join(" | "));
        println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
        let mut rows: Vec<(f64, String)> = BOUNDS
            .iter()
            .chain(METHODS)
            .filter(|entry| entry.settings[at].is_some())
            .filter_map(|entry| row(entry, budget, outcomes))
            .collect();
        rows.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, line) in rows {
            println!("{line}");
        }
    }
}

/// The mean over data sets, and the line.
fn row(entry: &Entry, budget: &str, outcomes: &[Outcome]) -> Option<(f64, String)> {
    let of = |data: &str| -> Vec<&Outcome> {
        let mine =
            |o: &&Outcome| !o.held_out && o.data == data && o.method == entry.name && o.budget == budget;
        outcomes.iter().filter(mine).collect()
    };
    let first = of(DATA[0]).first().copied()?;
    let mut cells = Vec::new();
    let mut total = 0.0;
    for data in DATA {
        let scores: Vec<f64> = of(data).iter().map(|o| 100.0 * o.accuracy).collect();
        if scores.is_empty() {
            return None;
        }
        let mean = scores.iter().sum::<f64>() / scores.len() as f64;
        total += mean;
        cells.push(match spread(&scores, mean) {
            Some(spread) => format!("{mean:.1} ± {spread:.1}"),
            None => format!("{mean:.1}"),
        });
    }
    let mean = total / DATA.len() as f64;
    let line = format!(
        "| {} | {} | {} | {:.0e} | {} | {mean:.1} |",
        entry.name,
        entry.class,
        first.trained,
        first.learning_rate,
        cells.join(" | ")
    );
    Some((mean, line))
}

/// The standard deviation over seeds, of more than one.
fn spread(scores: &[f64], mean: f64) -> Option<f64> {
    (scores.len() > 1).then(|| {
        let squares: f64 = scores.iter().map(|score| (score - mean).powi(2)).sum();
        (squares / (scores.len() - 1) as f64).sqrt()
    })
}
