//! The engine's side of the race: a process that opens a recipe, writes its examples down for the peers, and takes steps.

use std::io::{BufRead, stdin};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use engraft_data::{Example, IGNORED, Labels};
use engraft_nn::{Kind, Role};
use engraft_tensor::device;
use engraft_train::{Session, Trainer};
use serde_json::{Value, json};

use super::On;
use crate::open::open;
use crate::peer::say;

/// Answers lines like `{"steps": 2}` until the input ends.
pub fn answer(recipe: &Path, examples: &Path, threads: usize, on: On) -> Result<()> {
    let started = Instant::now();
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    on.choose()?;
    let session = open(recipe, &Default::default())?;
    if !examples.exists() {
        std::fs::write(examples, dump(&session).to_string())?;
    }
    let mut trainer = Trainer::new(&session)?;
    say(&hello(&session, started.elapsed().as_secs_f64()))?;
    let mut number = 0;
    for line in stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let steps = request["steps"].as_u64().context("expected steps")?;
        let (mut tokens, mut loss) = (0, 0.0);
        let profiled = request["profile"].as_bool() == Some(true);
        device::profile(profiled);
        let started = Instant::now();
        for _ in 0..steps {
            number += 1;
            let event = trainer.step(number)?.event;
            (tokens, loss) = (tokens + event.tokens, event.loss);
        }
        let seconds = started.elapsed().as_secs_f64();
        let peak = on.peak_bytes();
        let calls: Vec<_> = if profiled { device::profiled() } else { Vec::new() };
        device::profile(false);
        say(
            &json!({ "calls": calls, "seconds": seconds, "tokens": tokens, "peak_bytes": peak, "loss": loss }),
        )?;
    }
    Ok(())
}

/// Tokens and labels of every example.
fn dump(session: &Session) -> Value {
    let one = |example: &Example| match &example.labels {
        Labels::Class(class) => json!({ "ids": example.ids, "label": class }),
        Labels::Tokens(labels) => json!({ "ids": example.ids, "labels": labels }),
        _ => Value::Null,
    };
    Value::Array(session.train.examples.iter().map(one).collect())
}

/// What the count of operations needs.
fn hello(session: &Session, seconds: f64) -> Value {
    let info = session.model.info();
    let weights = |head: bool| -> usize {
        let sites = session
            .model
            .sites()
            .iter()
            .filter(|site| (site.role == Role::Head) == head && site.role != Role::Pool);
        sites.map(|site| if let Kind::Linear { out, inn, .. } = site.kind { out * inn } else { 0 }).sum()
    };
    let lengths: Vec<f64> = session.train.examples.iter().map(|e| e.ids.len() as f64).collect();
    let tokens: f64 = lengths.iter().sum();
    let labelled = |example: &Example| match &example.labels {
        Labels::Tokens(labels) => labels.iter().filter(|label| **label != IGNORED).count(),
        _ => 1,
    };
    let labelled: usize = session.train.examples.iter().map(labelled).sum();
    json!({
        "seconds": seconds, "trained": session.adapter.trained_count(), "block_weights": weights(false), "head_weights": weights(true), "width": info.width,
        "layers": info.layers, "labelled_share": labelled as f64 / tokens,
        // A token sees as many others as its own row has.
        "mean_length": lengths.iter().map(|length| length * length).sum::<f64>() / tokens,
    })
}
