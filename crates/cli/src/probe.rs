//! What a change of the model does to its outputs: logits and perplexity on a few texts.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use engraft_data::{Example, Tokenizer};
use engraft_nn::{Init, Inputs, Picture, Task};

use crate::commands::logits::pack;
use crate::context::Context;
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
/// Most texts that are read of a file.
const PROBE_LINES: usize = 64;
/// Most tokens that are read of a text.
const PROBE_TOKENS: usize = 256;
/// Bytes that a text of so many tokens is looked for in.
const PROBE_BYTES: u64 = 1 << 16;

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

/// What is wrong with the texts of `file` for the model in `dir`: told before anything else is read.
pub fn check(file: Option<&Path>, dir: &Path) -> Outcome {
    let Some(file) = file else { return Ok(()) };
    let io = |e| engraft_store::Error::io("read", file, e);
    std::fs::File::open(file).map_err(io).before_work()?;
    if has_tokenizer(dir) {
        return if lines(file)?.0.is_empty() { Err(no_text()) } else { Ok(()) };
    }
    Err(Failure::before_work(format!(
        "{} has no tokenizer.json, so that it cannot read the texts of {}; put the tokenizer there, or leave `--probe` out to \
         compare on random inputs",
        dir.display(),
        file.display()
    )))
}

fn has_tokenizer(dir: &Path) -> bool {
    dir.join("tokenizer.json").is_file()
}

fn no_text() -> Failure {
    Failure::before_work("the probe file holds no text; give it a few lines")
}

impl Probes {
    /// The texts of a file, a text a line, or a few of our own; pictures of noise for models that read pictures.
    pub fn of(file: Option<&Path>, engine: &Engine, cx: &Context) -> Outcome<Probes> {
        check(file, &engine.dir)?;
        let example = |ids: Vec<u32>| Example { ids, ..Example::default() };
        if let Some(Picture { channels, height, width }) = engine.model.info().picture {
            if file.is_some() {
                let message = "`--probe` is a file of texts, and this model reads pictures: leave it out to compare on noise";
                return Err(Failure::before_work(message));
            }
            let shape = [4, channels, height, width];
            let inputs = Inputs::pixels(Init::Normal(1.0).tensor(&shape, 0, "probes")?)?;
            return Ok(Probes::Pictures(Box::new(inputs)));
        }
        if !has_tokenizer(&engine.dir) {
            // Without a tokenizer any ids show whether the logits agree; they say nothing of perplexity.
            if engine.model.info().task == Task::CausalLm {
                let dir = engine.dir.display();
                cx.ui.note(&format!(
                    "{dir} has no tokenizer.json: compared on random ids, which have no perplexity"
                ));
            }
            let vocabulary = engine.model.info().vocabulary as u64;
            let mut random = engraft_data::rng::Random::new(0, 0, 0);
            let mut ids = || (0..16).map(|_| random.below(vocabulary) as u32).collect();
            return Ok(Probes::Tokens { examples: (0..4).map(|_| example(ids())).collect(), is_text: false });
        }
        let tokenizer = Tokenizer::open(&engine.dir)?;
        let (texts, more) = match file {
            Some(path) => lines(path)?,
            None => (PROBES.map(str::to_owned).to_vec(), false),
        };
        let limit = engine.model.info().max_positions.min(PROBE_TOKENS);
        let (mut examples, mut cut) = (Vec::new(), 0);
        for text in &texts {
            let (encoding, lost) = tokenizer.encode_cut(text, None, limit)?;
            cut += usize::from(lost > 0 || text.len() as u64 >= PROBE_BYTES);
            examples.push(example(encoding.ids));
        }
        if more {
            cx.ui.note(&format!("compared on the first {PROBE_LINES} texts of the probe file alone"));
        }
        if cut > 0 {
            cx.ui.note(&format!("compared on the first {limit} tokens of {cut} texts that have more"));
        }
        examples.retain(|e| e.ids.len() > 1);
        if examples.is_empty() {
            return Err(no_text());
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

/// The first texts of a file, and whether there are more. However long it and its lines are, only what is compared is read.
fn lines(path: &Path) -> Outcome<(Vec<String>, bool)> {
    let io = |e| engraft_store::Error::io("read", path, e);
    let mut file = BufReader::new(std::fs::File::open(path).map_err(io).before_work()?);
    let mut texts = Vec::new();
    loop {
        let mut line = Vec::new();
        let read = (&mut file).take(PROBE_BYTES).read_until(b'\n', &mut line).map_err(io).before_work()?;
        if read == 0 {
            return Ok((texts, false));
        }
        if !line.ends_with(b"\n") {
            file.skip_until(b'\n').map_err(io).before_work()?;
        }
        let text = match std::str::from_utf8(&line) {
            Ok(text) => text,
            // The cut may lie inside a character.
            Err(e) if e.error_len().is_none() && read as u64 == PROBE_BYTES => {
                std::str::from_utf8(&line[..e.valid_up_to()]).unwrap_or_default()
            }
            Err(_) => return Err(Failure::before_work(format!("{} is not UTF-8", path.display()))),
        };
        if text.trim().is_empty() {
            continue;
        }
        if texts.len() == PROBE_LINES {
            return Ok((texts, true));
        }
        texts.push(text.trim_end_matches(['\n', '\r']).to_owned());
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
    fn no_more_is_read_than_is_compared() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("texts.txt");
        // A text longer than what 256 tokens are looked for in, cut inside a character; blank lines; more texts than are read.
        let long = format!("x{}", "é".repeat(1 << 20));
        std::fs::write(&file, format!("{long}\n\none\r\n{}", "more\n".repeat(100))).unwrap();
        let (texts, more) = lines(&file).unwrap();
        assert!(more && texts.len() == PROBE_LINES);
        assert_eq!((texts[0].len(), &texts[1][..], &texts[2][..]), ((1 << 16) - 1, "one", "more"));
        std::fs::write(&file, "one\ntwo").unwrap();
        assert_eq!(lines(&file).unwrap(), (vec!["one".to_owned(), "two".to_owned()], false));
        std::fs::write(&file, b"\xff\xfe\n").unwrap();
        assert!(lines(&file).is_err() && lines(&dir.path().join("absent")).is_err());
    }

    #[test]
    fn the_loss_is_minus_log_softmax() {
        let row = [1.0f32, 2.0, 3.0];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        assert!((negative_log_likelihood(&row, 0) - (sum.ln() - 1.0)).abs() < 1e-6);
    }
}
