use std::path::PathBuf;

use super::*;
use crate::example::{IGNORED, Labels};
use crate::read::{Content, Format, Message, ReadOptions, read};
use crate::testing::{byte_tokenizer, shared};
use crate::tokenizer::Tokenizer;

fn rows(contents: Vec<Content>) -> Rows {
    let rows = contents.into_iter().zip(2..).map(|(content, line)| Row { line, content }).collect();
    Rows { path: PathBuf::from("data.csv"), rows, guesses: Vec::new() }
}

fn labelled(text: &str, label: &str) -> Content {
    Content::Text { text: text.into(), pair: None, label: Some(label.into()) }
}

fn options(max_length: usize) -> EncodeOptions<'static> {
    EncodeOptions { max_length, ..EncodeOptions::default() }
}

fn token_labels(example: &Example) -> &[i64] {
    match &example.labels {
        Labels::Tokens(labels) => labels,
        other => panic!("token labels expected, found {other:?}"),
    }
}

#[test]
fn classes_are_sorted_and_unknown_ones_named() {
    let tokenizer = byte_tokenizer();
    let train = rows(vec![labelled("ab", "10"), labelled("abc", "9"), labelled("ab", "10")]);
    let data = encode(&train, &tokenizer, Task::Classify, &options(3)).unwrap();
    assert_eq!(data.labels.as_deref().unwrap(), ["9", "10"]);
    assert_eq!(data.examples[0].labels, Labels::Class(1));
    assert_eq!(data.examples[1].ids, [256, 97, 98]);
    assert_eq!((data.report.truncated_rows, data.report.truncated_tokens, data.report.duplicates), (1, 1, 1));
    let train = rows(vec![labelled("a", "refund"), labelled("b", "billing")]);
    let names = encode(&train, &tokenizer, Task::Classify, &options(9)).unwrap().labels;
    assert_eq!(names.as_deref().unwrap(), ["billing", "refund"]);
    let eval = rows(vec![labelled("a", "refund"), labelled("b", "biling")]);
    let given = EncodeOptions { labels: names, ..options(9) };
    let error = encode(&eval, &tokenizer, Task::Classify, &given).unwrap_err().to_string();
    assert!(error.starts_with("data.csv:3: there is no label `biling`; did you mean `billing`?"), "{error}");
    let scores = encode(&rows(vec![labelled("a", "0.5")]), &tokenizer, Task::Regress, &options(9)).unwrap();
    assert_eq!(scores.examples[0].labels, Labels::Score(0.5));
    let error = encode(&train, &tokenizer, Task::Regress, &options(9)).unwrap_err().to_string();
    assert!(error.contains("expected a number as label, found `refund`"), "{error}");
}

#[test]
fn only_the_first_token_of_a_word_is_tagged() {
    let words = Content::Words { words: vec!["ab".into(), "c".into()], tags: vec!["X".into(), "O".into()] };
    let data = encode(&rows(vec![words]), &byte_tokenizer(), Task::Tags, &options(9)).unwrap();
    assert_eq!(data.examples[0].ids, [256, 97, 98, 99]);
    assert_eq!(token_labels(&data.examples[0]), [IGNORED, 1, IGNORED, 0]);
    assert_eq!(data.labels.as_deref().unwrap(), ["O", "X"]);
}

#[test]
fn text_is_cut_into_blocks_without_loss() {
    let text = |text: &str| Content::Text { text: text.into(), pair: None, label: None };
    let data =
        encode(&rows(vec![text("abc"), text("de")]), &byte_tokenizer(), Task::Causal, &options(4)).unwrap();
    let ids: Vec<Vec<u32>> = data.examples.iter().map(|example| example.ids.clone()).collect();
    // The last token stands alone in its block, with nothing before it to be predicted from.
    assert_eq!(ids, [vec![256, 97, 98, 99], vec![257, 256, 100, 101]]);
    assert_eq!(token_labels(&data.examples[1]), [257, 256, 100, 101]);
    assert_eq!((data.report.rows, data.report.examples, data.report.trained_share), (2, 2, 0.75));
    assert_eq!(data.examples[1].row, 2);
}

#[test]
fn only_answers_are_learned() {
    let tokenizer = byte_tokenizer();
    let row = |prompt: &str, completion: &str| Content::Completion {
        prompt: prompt.into(),
        completion: completion.into(),
    };
    let data = encode(&rows(vec![row("1+1", "2")]), &tokenizer, Task::Completion, &options(99)).unwrap();
    assert_eq!(data.examples[0].ids, [256, 49, 43, 49, 10, 50, 257]);
    assert_eq!(token_labels(&data.examples[0]), [IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, 50, 257]);
    assert!(data.report.guesses[0].contains("line break"), "{:?}", data.report.guesses);
    let spaced = encode(&rows(vec![row("1+1", " 2")]), &tokenizer, Task::Completion, &options(99)).unwrap();
    assert_eq!(spaced.examples[0].ids, [256, 49, 43, 49, 32, 50, 257]);
    let two = rows(vec![row("1+1", "2"), row("a long prompt", "x"), row("q", "")]);
    let error = encode(&two, &tokenizer, Task::Completion, &options(7)).unwrap_err().to_string();
    assert!(error.contains("2 of 3 rows have nothing to learn (rows 3, 4)"), "{error}");
    let allowed = EncodeOptions { allow_empty: true, ..options(7) };
    let data = encode(&two, &tokenizer, Task::Completion, &allowed).unwrap();
    assert_eq!((data.examples.len(), data.report.untrained_rows.as_slice()), (1, &[3, 4][..]));
    let none = rows(vec![row("q", "")]);
    assert!(encode(&none, &tokenizer, Task::Completion, &allowed).is_err(), "nothing at all to learn");
    let error = encode(&two, &tokenizer, Task::Classify, &options(7)).unwrap_err().to_string();
    assert!(error.contains("data.csv:2") && error.contains("text with a label"), "{error}");
}

#[test]
fn conversations_need_a_template_and_learn_the_answers() {
    let tokenizer = byte_tokenizer();
    let chat = rows(vec![Content::Chat(vec![Message::new("user", "hi"), Message::new("assistant", "ho")])]);
    let error = encode(&chat, &tokenizer, Task::Completion, &options(99)).unwrap_err().to_string();
    assert!(error.contains("set data.template"), "{error}");
    let template = ChatTemplate::plain(&tokenizer).unwrap();
    let given = EncodeOptions { template: Some(&template), ..options(99) };
    let data = encode(&chat, &tokenizer, Task::Completion, &given).unwrap();
    let learned: Vec<i64> =
        token_labels(&data.examples[0]).iter().copied().filter(|l| *l != IGNORED).collect();
    assert_eq!(learned, [104, 111, 257]);
}

#[test]
fn masked_examples_label_all_but_special_tokens() {
    let text = Content::Text { text: "ab".into(), pair: None, label: None };
    let data = encode(&rows(vec![text]), &byte_tokenizer(), Task::Masked, &options(9)).unwrap();
    assert_eq!(token_labels(&data.examples[0]), [IGNORED, 97, 98]);
    let masked = mask(&data.examples[0], 0, 260, 256, 0, 0);
    assert!(masked.trained(false) >= 1);
}

#[test]
fn real_sets_give_the_known_counts() {
    let (Some(model), Some(train), Some(test)) =
        (shared("models/all-minilm-l6-v2"), shared("banking77/train.csv"), shared("banking77/test.csv"))
    else {
        return;
    };
    let tokenizer = Tokenizer::open(&model).unwrap();
    let read_options = ReadOptions::new(Format::Csv, Need::Label);
    let data =
        encode(&read(&train, &read_options).unwrap(), &tokenizer, Task::Classify, &options(64)).unwrap();
    assert_eq!((data.report.rows, data.labels.as_ref().map(Vec::len)), (10_003, Some(77)));
    assert_eq!(REPORT, (data.report.tokens, data.report.truncated_rows, data.report.truncated_tokens));
    let given = EncodeOptions { labels: data.labels, ..options(64) };
    let eval = encode(&read(&test, &read_options).unwrap(), &tokenizer, Task::Classify, &given).unwrap();
    assert_eq!((eval.examples.len(), eval.labels), (3080, given.labels));
}

/// Tokens, rows cut and tokens lost at 64 tokens a row, as `transformers` 5.23 gives them.
const REPORT: (usize, usize, usize) = (161896, 30, 290);

#[test]
fn shakespeare_becomes_blocks() {
    let (Some(model), Some(path)) = (shared("models/stories260k"), shared("tinyshakespeare/input.txt"))
    else {
        return;
    };
    let tokenizer = Tokenizer::open(&model).unwrap();
    let rows = read(&path, &ReadOptions::new(Format::Text, Need::Text)).unwrap();
    let data = encode(&rows, &tokenizer, Task::Causal, &options(256)).unwrap();
    assert_eq!(data.report.tokens, SHAKESPEARE, "as `transformers` gives, and one end token");
    assert_eq!(data.report.max_length, 256);
    assert_eq!(data.examples[0].ids[0], 1);
}

const SHAKESPEARE: usize = 693365;
