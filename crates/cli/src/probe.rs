//! What a change of the model does to its outputs: logits and perplexity on a few texts.

use std::path::Path;

use engraft_data::{Example, Tokenizer};
use engraft_nn::{Init, Inputs, Picture, Task};

use crate::commands::logits::pack;
use crate::engine::Engine;
use crate::failure::{BeforeWork, Failure, Outcome};

/// Texts on which models are compared when none are given.
const PROBES: [&str; 6] = [
    "Once upon a time there was a little girl who lived near the sea with her old grandfather.",
    "The committee has reviewed your application and will write to you before the end of the month.",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature in the mountains.",
    "I cannot log in since this morning; my password seems to have expired over the weekend.",
    "def add(a, b):\n    return a + b\n",
    "The ship left the harbour at dawn, and nobody on board knew where the captain meant to go.",
];
/// Tokens of a probe.
const PROBE_TOKENS: usize = 256;

/// Logits and loss on the probes.
#[derive(Clone)]
pub struct Measured {
    /// Of all real tokens, one after another.
    pub logits: Vec<f32>,
    /// Mean loss of the next token; for models that predict it and texts that are words.
    pub loss: Option<f64>,
}

impl Measured {
    /// The largest logit by magnitude.
    pub fn largest(&self) -> f64 {
        self.logits.iter().fold(0.0, |most, x| larger(most, f64::from(x.abs())))
    }
}

/// What two models are compared on.
pub enum Probes {
    /// Token ids, and whether they are text.
    Tokens { examples: Vec<Example>, is_text: bool },
    /// Pictures of noise.
    Pictures(Box<Inputs>),
}

impl Probes {
    /// The texts of a file, a text a line, or a few of our own; pictures of noise for models that read pictures.
    pub fn of(file: Option<&Path>, engine: &Engine) -> Outcome<Probes> {
        let example = |ids: Vec<u32>| Example { ids, ..Example::default() };
        if let Some(Picture { channels, height, width }) = engine.model.info().picture {
            let shape = [4, channels, height, width];
            let inputs = Inputs::pixels(Init::Normal(1.0).tensor(&shape, 0, "probes")?)?;
            return Ok(Probes::Pictures(Box::new(inputs)));
        }
        if !engine.dir.join("tokenizer.json").is_file() {
            // Without a tokenizer any ids show whether the logits agree; they say nothing of perplexity.
            let vocabulary = engine.model.info().vocabulary as u64;
            let mut random = engraft_data::rng::Random::new(0, 0, 0);
            let mut ids = || (0..16).map(|_| random.below(vocabulary) as u32).collect();
            return Ok(Probes::Tokens { examples: (0..4).map(|_| example(ids())).collect(), is_text: false });
        }
        let tokenizer = Tokenizer::open(&engine.dir)?;
        let text = match file {
            Some(path) => {
                let bytes = engraft_store::json::read_capped(path, "config_json", 4 << 20).before_work()?;
                String::from_utf8(bytes)
                    .map_err(|_| Failure::before_work(format!("{} is not UTF-8", path.display())))?
            }
            None => PROBES.join("\u{0}"),
        };
        let separator = if file.is_some() { '\n' } else { '\u{0}' };
        let limit = engine.model.info().max_positions.min(PROBE_TOKENS);
        let mut examples = Vec::new();
        for line in text.split(separator).filter(|line| !line.trim().is_empty()).take(64) {
            examples.push(example(tokenizer.encode_cut(line, None, limit)?.0.ids));
        }
        examples.retain(|e| e.ids.len() > 1);
        if examples.is_empty() {
            return Err(Failure::before_work("the probe file holds no text; give it a few lines"));
        }
        Ok(Probes::Tokens { examples, is_text: true })
    }

    /// What a model makes of them.
    pub fn measure(&self, engine: &Engine) -> Outcome<Measured> {
        let info = engine.model.info();
        let (examples, is_text) = match self {
            Probes::Pictures(inputs) => {
                return Ok(Measured { logits: engine.logits(inputs)?.to_vec()?, loss: None });
            }
            Probes::Tokens { examples, is_text } => (examples, *is_text),
        };
        let (mut logits, mut loss, mut count) = (Vec::new(), 0.0, 0usize);
        for example in examples {
            let inputs = pack(std::slice::from_ref(example))?;
            // A decoder is given the same text as its encoder.
            let inputs = match info.task {
                Task::Seq2Seq => {
                    let (ids, layout) = (inputs.ids()?.clone(), inputs.layout.clone());
                    inputs.with_target(ids, layout)
                }
                _ => inputs,
            };
            let rows = engine.logits(&inputs)?.to_vec()?;
            if info.task == Task::CausalLm {
                let next = example.ids.iter().skip(1);
                for (row, id) in rows.chunks_exact(info.outputs).zip(next) {
                    loss += negative_log_likelihood(row, *id as usize);
                    count += 1;
                }
            }
            logits.extend(rows);
        }
        let loss = (is_text && count > 0).then(|| loss / count as f64);
        Ok(Measured { logits, loss })
    }
}

/// −log softmax of `row` at `id`, in f64.
fn negative_log_likelihood(row: &[f32], id: usize) -> f64 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
    sum.ln() - f64::from(row.get(id).copied().unwrap_or(largest) - largest)
}

/// The largest difference of two lists of logits.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).fold(0.0, |most, (a, b)| larger(most, f64::from((a - b).abs())))
}

/// The larger of two, and NaN if one of them is: `f64::max` would leave it out.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b <= a { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_not_left_out() {
        assert_eq!(largest_difference(&[1.0, -2.0], &[1.0, 1.0]), 3.0);
        assert!(largest_difference(&[f32::NAN, 2.0], &[1.0, 1.0]).is_nan());
        assert!(largest_difference(&[2.0, f32::NAN], &[1.0, 1.0]).is_nan());
    }

    #[test]
    fn the_loss_is_minus_log_softmax() {
        let row = [1.0f32, 2.0, 3.0];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        assert!((negative_log_likelihood(&row, 0) - (sum.ln() - 1.0)).abs() < 1e-6);
    }
}
