use std::io::Write;

use super::*;
use crate::testing::{file, shared};

fn rows(name: &str, bytes: &[u8], options: &ReadOptions) -> Result<Rows> {
    let (_directory, path) = file(name, bytes);
    read(&path, options)
}

fn error(name: &str, bytes: &[u8], format: Format, need: Need) -> String {
    let error = rows(name, bytes, &ReadOptions::new(format, need)).unwrap_err().to_string();
    error.rsplit('/').next().unwrap_or_default().to_owned()
}

fn labelled(text: &str, label: &str) -> Content {
    Content::Text { text: text.into(), pair: None, label: Some(label.into()) }
}

#[test]
fn csv_has_quotes_and_tsv_has_none() {
    let options = ReadOptions::new(Format::Csv, Need::Label);
    let data = b"\xEF\xBB\xBFtext,category\n\"a, \"\"b\"\"\nc\",x\nd,y\n";
    let read = rows("a.csv", data, &options).unwrap();
    assert_eq!(read.rows[0].content, labelled("a, \"b\"\nc", "x"));
    assert_eq!((read.rows[1].line, &read.rows[1].content), (4, &labelled("d", "y")));
    assert!(read.guesses[1].contains("`category` is taken as label"), "{:?}", read.guesses);
    let columns = Columns { text: Some("4".into()), label: Some("2".into()), ..Columns::default() };
    let options = ReadOptions { header: false, columns, ..ReadOptions::new(Format::Tsv, Need::Label) };
    let read = rows("a.tsv", b"s\t1\t\tHe said \"no.\ns\t0\t*\tx\n", &options).unwrap();
    assert_eq!(read.rows[0].content, labelled("He said \"no.", "1"));
    assert!(read.guesses.is_empty());
}

#[test]
fn broken_rows_name_their_line_and_what_to_do() {
    let csv = |bytes: &[u8]| error("a.csv", bytes, Format::Csv, Need::Label);
    assert!(csv(b"text,label\na,b\nc\n").contains("a.csv:3: expected 2 columns"));
    assert!(csv(b"text,label\na,b\n\xFFc,d\n").contains("a.csv:3: not UTF-8 from byte 1"));
    assert!(csv(b"\xFF\xFEt\0,\0").contains("is UTF-16"));
    assert!(csv(b"text;label\na;b\n").contains("separated by ';'"));
    assert!(csv(b"text,text\na,b\n").contains("two columns are called `text`"));
    assert!(csv(b"text,kind\na,b\n").contains("set data.columns.label to one of `text`, `kind`"));
    assert!(csv(b"text,label\na, \n").contains("the label is empty"));
    assert!(csv(b"text,label\n").contains("holds no rows"));
    let columns = Columns { label: Some("catgory".into()), ..Columns::default() };
    let options = ReadOptions { columns, ..ReadOptions::new(Format::Csv, Need::Label) };
    let unknown = rows("a.csv", b"text,category\na,b\n", &options).unwrap_err().to_string();
    assert!(
        unknown.contains("no column `catgory`; did you mean `category`? (there: `text`, `category`)"),
        "{unknown}"
    );
    let jsonl = |bytes: &[u8]| error("a.jsonl", bytes, Format::Jsonl, Need::Completion);
    assert!(
        jsonl(b"{\"prompt\":\"a\",\"completion\":\"b\"}\n\n{\"prompt\":\n").contains("a.jsonl:3: not JSON")
    );
    assert!(jsonl(b"{\"prompt\":\"a\",\"completion\":[1]}\n").contains("found a list"));
    assert!(
        jsonl(b"[{\"prompt\":\"a\",\"completion\":\"b\"}, 3]").contains("item 2 of the list is a number")
    );
    let text = error("a.txt", b"one\ntwo \xE9\n", Format::Text, Need::Text);
    assert!(text.contains("a.txt:2: not UTF-8 from byte 5"), "{text}");
    let chat = |bytes: &[u8]| error("a.jsonl", bytes, Format::Chat, Need::Completion);
    assert!(chat(b"{\"mesages\":[]}").contains("did you mean `mesages`?"));
    assert!(chat(b"{\"messages\":[{\"role\":\"user\"}]}").contains("message 1: `content` is missing"));
    let long = [vec![b'{'; ROW_LIMIT as usize + 1], b"\n".to_vec()].concat();
    assert!(jsonl(&long).contains("more than the limit"));
}

#[test]
fn conversations_and_instructions_are_read() {
    let chat = br#"{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]},
        {"role":"assistant","content":null,"tool_calls":[1]}]}"#;
    let chat = String::from_utf8_lossy(chat).replace('\n', "");
    let read = rows("a.jsonl", chat.as_bytes(), &ReadOptions::new(Format::Chat, Need::Completion)).unwrap();
    let Content::Chat(messages) = &read.rows[0].content else { panic!("a conversation expected") };
    assert_eq!(messages[0], Message::new("user", "hi"));
    assert_eq!(messages[1].extra["tool_calls"], serde_json::json!([1]));
    let share = br#"[{"conversations":[{"from":"human","value":"hi"},{"from":"gpt","value":"ho"}]}]"#;
    let read = rows("a.json", share, &ReadOptions::new(Format::Sharegpt, Need::Completion)).unwrap();
    let expected = vec![Message::new("user", "hi"), Message::new("assistant", "ho")];
    assert_eq!(read.rows[0].content, Content::Chat(expected));
    let unknown = br#"[{"conversations":[{"from":"humn","value":"hi"}]}]"#;
    assert!(error("a.json", unknown, Format::Sharegpt, Need::Completion).contains("did you mean `human`?"));
    let alpaca = br#"{"instruction":"Add","input":"1 1","output":"2"}"#;
    let read = rows("a.jsonl", alpaca, &ReadOptions::new(Format::Alpaca, Need::Completion)).unwrap();
    let Content::Completion { prompt, completion } = &read.rows[0].content else {
        panic!("a completion expected")
    };
    assert!(
        prompt.ends_with("### Instruction:\nAdd\n\n### Input:\n1 1\n\n### Response:") && completion == "2"
    );
}

#[test]
fn packed_files_lines_and_words() {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(b"one\r\n\ntwo\n").unwrap();
    let packed = packed.finish().unwrap();
    let options = ReadOptions { lines: true, ..ReadOptions::new(Format::Text, Need::Text) };
    let read = rows("a.txt.gz", &packed, &options).unwrap();
    let text = |text: &str| Content::Text { text: text.into(), pair: None, label: None };
    assert_eq!(
        (&read.rows[0].content, &read.rows[1]),
        (&text("one"), &Row { line: 3, content: text("two") })
    );
    assert!(rows("a.gz", &packed[..packed.len() - 9], &options).is_err(), "a cut archive is an error");
    let words = br#"{"tokens":["New","York"],"ner_tags":[1,2]}"#;
    let read = rows("a.jsonl", words, &ReadOptions::new(Format::Jsonl, Need::Tags)).unwrap();
    let expected =
        Content::Words { words: vec!["New".into(), "York".into()], tags: vec!["1".into(), "2".into()] };
    assert_eq!(read.rows[0].content, expected);
    let uneven = br#"{"tokens":["New","York"],"ner_tags":[1]}"#;
    assert!(error("a.jsonl", uneven, Format::Jsonl, Need::Tags).contains("2 words and 1 tags"));
}

#[test]
fn a_held_out_part_is_drawn_once_and_keeps_order() {
    let text: String = (0..50).map(|n| format!("line {n}\n")).collect();
    let options = ReadOptions { lines: true, ..ReadOptions::new(Format::Text, Need::Text) };
    let all = rows("a.txt", text.as_bytes(), &options).unwrap();
    let (train, eval) = all.clone().split(0.1, 7).unwrap();
    assert_eq!((train.rows.len(), eval.rows.len()), (45, 5));
    assert_eq!(all.clone().split(0.1, 7).unwrap(), (train.clone(), eval));
    assert_ne!(all.clone().split(0.1, 8).unwrap().0, train);
    assert!(train.rows.is_sorted_by_key(|row| row.line));
    assert!(all.split(0.001, 7).unwrap_err().to_string().contains("data.eval_path"));
}

#[test]
fn damaged_files_of_every_format_never_panic() {
    let samples: [&[u8]; 4] = [
        b"text,label\n\"a \"\"b\",x\nc,y\n",
        br#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        br#"[{"instruction":"a","input":"","output":"c"},{"conversations":[{"from":"gpt","value":"c"}]}]"#,
        b"\x1F\x8B\x08\x00\x00\x00\x00\x00\x00\x03\x4B\x04\x00\x43\xBE\xB7\xE8\x01\x00\x00\x00",
    ];
    let words: [&[u8]; 4] = [b"\"", b"[", b"null", b"\xFF"];
    let mut random = Random::new(2, 0, 0);
    let (directory, path) = file("mutant", b"");
    for round in 0..400 {
        std::fs::write(&path, crate::testing::damaged(samples[round % 4], &words, &mut random)).unwrap();
        for (format, _) in Format::ALL {
            for need in [Need::Label, Need::Completion] {
                let _ = read(&path, &ReadOptions::new(format, need));
            }
        }
        let _ = sniff(&path);
    }
    drop(directory);
}

#[test]
fn sniffing_says_what_a_file_is() {
    let look = |name: &str, bytes: &[u8]| {
        let (_directory, path) = file(name, bytes);
        sniff(&path).unwrap()
    };
    let seen = look("a.jsonl", br#"{"messages":[]}"#);
    assert_eq!((seen.format, seen.need, seen.rows), (Format::Chat, Need::Completion, 1));
    assert_eq!(look("a", b"[{\"instruction\":\"a\",\"output\":\"b\"}]").format, Format::Alpaca);
    assert_eq!(look("a", b"some words\nmore\n").format, Format::Text);
    let seen = look("a.tsv", b"x\tgood one\nx\tvery bad one\ny\tlong good one\ny\tfine\n");
    assert!(!seen.header && seen.need == Need::Label && seen.labels == Some(2));
    assert_eq!((seen.columns.text.as_deref(), seen.columns.label.as_deref()), (Some("2"), Some("1")));
}

#[test]
fn real_files_are_read_and_recognised() {
    let cases = [
        ("banking77/train.csv", Format::Csv, Need::Label, 10_003, Some(77)),
        ("gsm8k/test.jsonl", Format::Jsonl, Need::Completion, 1319, None),
        ("gsm8k/train.jsonl.gz", Format::Jsonl, Need::Completion, 7473, None),
        ("alpaca/code_alpaca_2k.json", Format::Alpaca, Need::Completion, 2017, None),
        ("cola/in_domain_train.tsv", Format::Tsv, Need::Label, 8551, Some(2)),
        ("tinyshakespeare/input.txt", Format::Text, Need::Text, 40_000, None),
    ];
    for (part, format, need, count, labels) in cases {
        let Some(path) = shared(part) else { continue };
        let seen = sniff(&path).unwrap();
        assert_eq!(
            (seen.format, seen.need, seen.rows, seen.labels),
            (format, need, count, labels),
            "{part}: {seen:?}"
        );
        let options =
            ReadOptions { header: seen.header, columns: seen.columns, ..ReadOptions::new(format, need) };
        let rows = read(&path, &options).unwrap();
        assert_eq!(rows.rows.len(), if format == Format::Text { 1 } else { count }, "{part}");
    }
}

#[test]
fn a_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let options = ReadOptions::new(Format::Text, Need::Text);
    let error = read(directory.path(), &options).unwrap_err().to_string();
    assert!(error.contains("expected a file, found a directory"), "{error}");
}
