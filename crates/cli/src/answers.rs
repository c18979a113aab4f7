//! What a model writes for the prompts of a data set, and how near that comes to the answers there.

use std::collections::{BTreeMap, HashMap, HashSet};

use engraft_data::{Dataset, Example, IGNORED, Labels, Tokenizer};
use engraft_train::{Bleu, ExactMatch, Rouge};
use serde_json::{Value, json};

use crate::engine::Engine;
use crate::failure::Outcome;
use crate::generation::{Prompt, Writing, write};

/// A prompt with the answers that the data have for it.
pub struct Question {
    /// Where it first stands in its file.
    pub row: usize,
    /// What the model reads.
    pub prompt: Vec<u32>,
    /// The task that it is of, where the data have several.
    pub task: Option<usize>,
    /// One or more answers.
    pub references: Vec<String>,
}

/// An answer of the model.
pub struct Answer {
    question: Question,
    text: String,
}

/// The prompts of `data` in the order of the file, each once a task with all its answers; examples without a prompt or without an
/// answer are left out. Answers are the labels as text, without special tokens and those that end a text.
///
/// # Errors
/// Labels that the tokenizer does not know.
pub fn questions(data: &Dataset, tokenizer: &Tokenizer, ends: &HashSet<u32>) -> Outcome<Vec<Question>> {
    let mut questions: Vec<Question> = Vec::new();
    let mut known: HashMap<(Option<usize>, Vec<u32>), usize> = HashMap::new();
    for example in &data.examples {
        let Some((prompt, mut answer)) = parted(example) else { continue };
        while answer.last().is_some_and(|id| ends.contains(id)) {
            answer.pop();
        }
        let reference = tokenizer.decode(&answer, true)?;
        let at = *known.entry((example.task, prompt.clone())).or_insert(questions.len());
        match questions.get_mut(at) {
            Some(question) => question.references.push(reference),
            None => {
                let (row, task) = (example.row, example.task);
                questions.push(Question { row, prompt, task, references: vec![reference] });
            }
        }
    }
    Ok(questions)
}

/// What comes before the first labelled tokens, and these.
fn parted(example: &Example) -> Option<(Vec<u32>, Vec<u32>)> {
    let tokens = |labels: &[i64]| -> Vec<u32> {
        labels.iter().take_while(|label| **label != IGNORED).filter_map(|l| u32::try_from(*l).ok()).collect()
    };
    let (prompt, answer) = match &example.labels {
        Labels::Target(target) => (example.ids.clone(), tokens(&target.labels)),
        Labels::Tokens(labels) => {
            let first = labels.iter().position(|label| *label != IGNORED)?;
            (example.ids.get(..first)?.to_vec(), tokens(&labels[first..]))
        }
        _ => return None,
    };
    (!prompt.is_empty() && !answer.is_empty()).then_some((prompt, answer))
}

/// Lets the model answer every question; `progress` is told (answered, all).
///
/// # Errors
/// As [`write()`].
pub fn answers(
    engine: &Engine,
    tokenizer: &Tokenizer,
    questions: Vec<Question>,
    writing: Writing,
    ends: &HashSet<u32>,
    progress: &mut dyn FnMut(usize, usize),
) -> Outcome<Vec<Answer>> {
    let all = questions.len();
    let mut answers = Vec::with_capacity(all);
    for (number, question) in questions.into_iter().enumerate() {
        let prompt = Prompt { ids: &question.prompt, task: question.task };
        let text = write(engine, tokenizer, prompt, writing, ends)?.text;
        answers.push(Answer { question, text });
        progress(number + 1, all);
    }
    Ok(answers)
}

/// `bleu` (0 to 100), `rouge1`, `rouge2`, `rougeL`, `rougeLsum` and `exact_match` (0 to 1).
/// Of several `tasks` each has its own as TASK.NAME, and mean_NAME is the mean over these.
pub fn scores(answers: &[Answer], tasks: &[&str]) -> BTreeMap<String, f64> {
    let mut found = scores_of(&mut answers.iter());
    let (mut sums, mut count) = (BTreeMap::<String, f64>::new(), 0.0);
    for (number, name) in tasks.iter().enumerate() {
        let mut own = answers.iter().filter(|answer| answer.question.task == Some(number)).peekable();
        if own.peek().is_none() {
            continue;
        }
        count += 1.0;
        for (metric, value) in scores_of(&mut own) {
            *sums.entry(format!("mean_{metric}")).or_default() += value;
            found.insert(format!("{}.{metric}", name.replace(char::is_whitespace, "_")), value);
        }
    }
    found.extend(sums.into_iter().map(|(metric, sum)| (metric, sum / count)));
    found
}

fn scores_of(answers: &mut dyn Iterator<Item = &Answer>) -> BTreeMap<String, f64> {
    let (mut bleu, mut rouge, mut equal) = (Bleu::default(), Rouge::default(), ExactMatch::default());
    for answer in answers {
        let references: Vec<&str> = answer.question.references.iter().map(String::as_str).collect();
        bleu.add(&answer.text, &references);
        rouge.add(&answer.text, &references);
        equal.add(&answer.text, &references);
    }
    let means = rouge.scores();
    let named = [
        ("bleu", bleu.score()),
        ("exact_match", equal.score()),
        ("rouge1", means.rouge_1),
        ("rouge2", means.rouge_2),
        ("rougeL", means.rouge_l),
        ("rougeLsum", means.rouge_lsum),
    ];
    named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// One JSON object a line: the prompt, what was written, the answers of the data.
pub fn lines(answers: &[Answer], tokenizer: &Tokenizer) -> Outcome<String> {
    let line = |answer: &Answer| -> Outcome<Value> {
        let prompt = tokenizer.decode(&answer.question.prompt, false)?;
        let question = &answer.question;
        Ok(
            json!({ "row": question.row, "prompt": prompt, "text": answer.text, "references": question.references }),
        )
    };
    answers.iter().map(|answer| Ok(format!("{}\n", line(answer)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_data::Target;

    #[test]
    fn a_prompt_ends_where_the_first_answer_begins() {
        let chat = Example {
            ids: vec![1, 5, 6, 7, 8, 9],
            labels: Labels::Tokens(vec![IGNORED, IGNORED, 6, 7, IGNORED, 9]),
            ..Example::default()
        };
        assert_eq!(parted(&chat), Some((vec![1, 5], vec![6, 7])));
        let target = Target { labels: vec![8, 2, IGNORED], inputs: None, positions: None };
        let pair = Example { ids: vec![3, 4], labels: Labels::Target(target), ..Example::default() };
        assert_eq!(parted(&pair), Some((vec![3, 4], vec![8, 2])));
        // Text without a prompt, and a prompt without an answer.
        let text = Example { ids: vec![1, 2], labels: Labels::Tokens(vec![1, 2]), ..Example::default() };
        assert_eq!(parted(&text), None);
        let open =
            Example { ids: vec![1, 2], labels: Labels::Tokens(vec![IGNORED; 2]), ..Example::default() };
        assert_eq!(parted(&open), None);
    }
}
