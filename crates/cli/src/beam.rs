//! Beam search: the texts of the highest probability among those that keep the best few at every step.
//!
//! As `transformers` (5.23) searches: of the sum of log-probabilities of all continuations the best `2 · beams` are looked
//! at; those that end, and are among the first `beams`, are kept with their score, the sum over length^penalty; the best
//! others go on. The search ends when no running text can beat the worst kept one at its present length, or, stopping
//! early, as soon as `beams` texts have ended.

use std::collections::HashSet;

use crate::engine::Engine;
use crate::failure::{Failure, Outcome};
use crate::generation::{Decoding, Prompt};

/// How to search.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    /// Texts kept at every step.
    pub beams: usize,
    /// Above 0 favours longer texts.
    pub length_penalty: f64,
    /// Whether to end as soon as there are enough texts.
    pub early_stopping: bool,
}

/// A text that was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Σ log p / length^penalty.
    pub score: f64,
}

/// A text that goes on.
#[derive(Clone)]
struct Running {
    tokens: Vec<u32>,
    sum: f64,
}

/// One text with one more token.
#[derive(Clone, Copy)]
struct Continuation {
    beam: usize,
    token: u32,
    sum: f64,
}

/// The texts of at most `most` tokens after `prompt`, the best first.
///
/// # Errors
/// As [`Decoding::new`], and logits that are not numbers.
pub fn search(
    engine: &Engine,
    prompt: Prompt<'_>,
    most: usize,
    ends: &HashSet<u32>,
    by: Search,
) -> Outcome<Vec<Found>> {
    let (mut decoding, first) = Decoding::new(engine, prompt, by.beams, most)?;
    // All texts are the same at first, so only one of them counts.
    let start = |beam| Running { tokens: Vec::new(), sum: if beam == 0 { 0.0 } else { f64::NEG_INFINITY } };
    let mut running: Vec<Running> = (0..by.beams).map(start).collect();
    let mut found: Vec<Found> = Vec::new();
    let mut next = vec![first; by.beams];
    for length in 1..=most {
        let fed: Vec<&[u32]> = next.iter().map(Vec::as_slice).collect();
        let best = best(&decoding.feed(&fed)?, &running, by.beams * (1 + ends.len()).max(2))?;
        let ended = |c: &Continuation| ends.contains(&c.token) || length == most;
        let scale = (length as f64).powf(by.length_penalty);
        for c in best.iter().take(by.beams).filter(|c| ended(c)) {
            let mut tokens = running[c.beam].tokens.clone();
            tokens.push(c.token);
            found.push(Found { tokens, score: c.sum / scale });
        }
        // Stable, so that of equals the one found first stays.
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        found.truncate(by.beams);
        let open: Vec<Continuation> = best.into_iter().filter(|c| !ended(c)).take(by.beams).collect();
        let full = found.len() == by.beams;
        let improvable =
            |c: &Continuation| !full || found.last().is_none_or(|worst| c.sum / scale > worst.score);
        if open.len() < by.beams || !open.first().is_some_and(improvable) || (full && by.early_stopping) {
            break;
        }
        decoding.reorder(&open.iter().map(|c| c.beam).collect::<Vec<_>>())?;
        next = open.iter().map(|c| vec![c.token]).collect();
        let longer = |c: &Continuation| {
            let mut tokens = running[c.beam].tokens.clone();
            tokens.push(c.token);
            Running { tokens, sum: c.sum }
        };
        running = open.iter().map(longer).collect();
    }
    Ok(found)
}

/// The `count` continuations of the largest sums, the largest first.
fn best(logits: &[Vec<f32>], running: &[Running], count: usize) -> Outcome<Vec<Continuation>> {
    let mut all = Vec::new();
    for (beam, (logits, text)) in logits.iter().zip(running).enumerate() {
        let largest = logits.iter().fold(f64::NEG_INFINITY, |m, &l| m.max(f64::from(l)));
        let sum = logits.iter().map(|&l| (f64::from(l) - largest).exp()).sum::<f64>();
        if !sum.is_finite() {
            let message = format!("the logits after {} tokens are not finite numbers", text.tokens.len());
            return Err(Failure::running(message));
        }
        let base = text.sum - largest - sum.ln();
        let of =
            |(token, &l): (usize, &f32)| Continuation { beam, token: token as u32, sum: base + f64::from(l) };
        all.extend(logits.iter().enumerate().map(of).filter(|c| c.sum > f64::NEG_INFINITY));
    }
    let falling = |a: &Continuation, b: &Continuation| {
        b.sum.total_cmp(&a.sum).then(a.beam.cmp(&b.beam)).then(a.token.cmp(&b.token))
    };
    if count < all.len() {
        all.select_nth_unstable_by(count - 1, falling);
        all.truncate(count);
    }
    all.sort_unstable_by(falling);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::path::Path;

    /// What `transformers` found, by tools/golden/generation_t5.py.
    #[test]
    fn finds_what_the_reference_finds() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        let mut count = 0;
        for name in ["t5_flan", "t5_untied"] {
            let text = std::fs::read_to_string(golden.join(format!("generation/{name}.json"))).unwrap();
            let expected: Value = serde_json::from_str(&text).unwrap();
            let dir = golden.join("models").join(name);
            let loaded = engraft_model::load(&dir, &Default::default()).unwrap();
            let (model, config) = (loaded.model, loaded.config);
            let engine = Engine {
                dir,
                config,
                model,
                adapter: None,
                methods: Vec::new(),
                beside: Vec::new(),
                labels: None,
                tasks: Vec::new(),
                new_tensors: Vec::new(),
            };
            let most = expected["max_new_tokens"].as_u64().unwrap() as usize;
            for row in expected["rows"].as_array().unwrap() {
                let by = Search {
                    beams: row["num_beams"].as_u64().unwrap() as usize,
                    length_penalty: row["length_penalty"].as_f64().unwrap_or(1.0),
                    early_stopping: row["early_stopping"] == true,
                };
                let ends = HashSet::from([row["eos_token_id"].as_u64().unwrap() as u32]);
                let found =
                    search(&engine, Prompt { ids: &ids(&row["prompt"]), task: None }, most, &ends, by)
                        .unwrap();
                assert_eq!(found[0].tokens, ids(&row["new_tokens"]), "{name}, {by:?}");
                for (found, beam) in found.iter().zip(row["beams"].as_array().into_iter().flatten()) {
                    assert_eq!(found.tokens, ids(&beam["new_tokens"]), "{name}, {by:?}");
                    assert!((found.score - beam["score"].as_f64().unwrap()).abs() < 1e-4, "{name}, {by:?}");
                }
                count += 1;
            }
        }
        assert!(count >= 20, "{count}");
    }

    fn ids(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
    }
}
