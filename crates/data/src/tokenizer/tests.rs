use super::*;

const TEXTS: [&str; 3] = [
    "I am still waiting on my card?",
    "Naïve café — 東京 \u{1F600} don't  stop\n\nnow",
    "ROMEO: But, soft! what light",
];

/// A tokenizer of the shared data.
fn shared(part: &str) -> Option<Tokenizer> {
    crate::testing::shared(part).map(|path| Tokenizer::open(&path).unwrap())
}

// Ids and text as `transformers` 5.23 gives them.
const MINILM: [&[u32]; 3] = [
    &[101, 1045, 2572, 2145, 3403, 2006, 2026, 4003, 1029, 102],
    &[101, 15743, 7668, 1517, 1879, 1755, 100, 2123, 1005, 1056, 2644, 2085, 102],
    &[101, 12390, 1024, 2021, 1010, 3730, 999, 2054, 2422, 102],
];
const STORIES: [&[u32]; 3] = [
    &[1, 359, 261, 423, 349, 290, 421, 273, 275, 299, 353, 284, 422, 280, 295, 418, 450],
    &[
        1, 410, 458, 412, 198, 178, 360, 280, 412, 431, 485, 410, 481, 410, 233, 160, 180, 231, 189, 175,
        410, 243, 162, 155, 131, 279, 289, 439, 413, 410, 349, 414, 427, 13, 13, 416, 327,
    ],
    &[
        1, 410, 461, 441, 446, 459, 441, 467, 368, 323, 432, 384, 431, 413, 443, 263, 415, 294, 278, 333,
        415, 413,
    ],
];
const GPT2: [&[u32]; 3] = [
    &[40, 716, 991, 4953, 319, 616, 2657, 30],
    &[26705, 38776, 40304, 851, 10545, 251, 109, 12859, 105, 30325, 222, 836, 470, 220, 2245, 198, 198, 2197],
    &[33676, 4720, 25, 887, 11, 2705, 0, 644, 1657],
];

#[test]
fn ids_and_text_equal_transformers() {
    let parts =
        [("models/all-minilm-l6-v2", MINILM), ("models/stories260k", STORIES), ("tokenizers/gpt2", GPT2)];
    for (part, expected) in parts {
        let Some(tokenizer) = shared(part) else { continue };
        for (text, ids) in TEXTS.iter().zip(expected) {
            assert_eq!(tokenizer.encode(text, true).unwrap().ids, ids, "{part}");
            if !part.contains("minilm") {
                assert_eq!(tokenizer.decode(ids, true).unwrap(), *text);
            }
            let mut stream = tokenizer.stream(true);
            let mut streamed: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
            streamed.push_str(&stream.finish().unwrap());
            assert_eq!(streamed, tokenizer.decode(ids, true).unwrap(), "{part}");
        }
    }
}

#[test]
fn pairs_are_cut_longest_first_and_special_tokens_stay() {
    let Some(tokenizer) = shared("models/all-minilm-l6-v2") else { return };
    let (whole, lost) = tokenizer.encode_cut(TEXTS[0], Some(TEXTS[2]), 512).unwrap();
    assert_eq!((whole, lost), (tokenizer.encode_pair(TEXTS[0], TEXTS[2], true).unwrap(), 0));
    let (cut, lost) = tokenizer.encode_cut(TEXTS[0], Some(TEXTS[2]), 12).unwrap();
    assert_eq!(cut.ids, [101, 1045, 2572, 2145, 3403, 102, 12390, 1024, 2021, 1010, 3730, 102]);
    assert_eq!(cut.type_ids, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]);
    assert_eq!(lost, 7);
    let error = tokenizer.encode_cut(TEXTS[0], None, 2).unwrap_err().to_string();
    assert!(error.contains("raise data.max_length"), "{error}");
    let long = "word ".repeat(600);
    assert_eq!(tokenizer.encode(&long, true).unwrap().ids.len(), 602, "no truncation from the file");
    assert_eq!(tokenizer.model_max_length, Some(512));
    assert_eq!((tokenizer.pad_id(), tokenizer.mask_id(), tokenizer.eos_id()), (Some(0), Some(103), None));
    assert_eq!(tokenizer.special_tokens(), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]);
}

#[test]
fn special_names_can_be_read_as_text() {
    let Some(tokenizer) = shared("models/all-minilm-l6-v2") else { return };
    assert_eq!(tokenizer.encode("a [SEP] b", false).unwrap().ids, [1037, 102, 1038]);
    let literal = tokenizer.encode_literal("a [SEP] b").unwrap().ids;
    assert!(literal.len() > 3 && !literal.contains(&102), "{literal:?}");
}

#[test]
fn a_long_stream_gives_the_whole_text() {
    let Some(tokenizer) = shared("models/stories260k") else { return };
    let text = "Once 東京 upon a time \u{1F600}\u{1F600} there was é a cat. ".repeat(40);
    let ids = tokenizer.encode(&text, false).unwrap().ids;
    let mut stream = tokenizer.stream(true);
    let mut streamed = String::new();
    for id in &ids {
        let piece = stream.push(*id).unwrap();
        assert!(!piece.contains('\u{FFFD}'), "half a character: {piece:?}");
        streamed.push_str(&piece);
    }
    streamed.push_str(&stream.finish().unwrap());
    assert_eq!(streamed, text);
    let mut stream = tokenizer.stream(true);
    let broken: String = [233u32; 40].iter().map(|id| stream.push(*id).unwrap()).collect();
    assert!(broken.contains('\u{FFFD}'), "bytes that are no character are given, not held for ever");
    let mut stream = tokenizer.stream(true).after(&ids[..4]).unwrap();
    assert_eq!(stream.push(tokenizer.token_to_id("▁a").unwrap()).unwrap(), " a");
}

/// A byte-fallback tokenizer small enough to mutate, with most kinds of parts.
const SMALL: &str = r#"{"version":"1.0","truncation":{"max_length":4,"strategy":"LongestFirst","stride":0,
"direction":"Right"},"padding":null,"added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,
"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"Sequence","normalizers":[{"type":"NFC"},
{"type":"Replace","pattern":{"Regex":"\\s+"},"content":" "}]},"pre_tokenizer":{"type":"Sequence","pretokenizers":[
{"type":"Split","pattern":{"Regex":"(?i:'s|'t)|\\p{L}+| ?\\p{N}{1,3}"},"behavior":"Isolated","invert":false},
{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}]},"post_processor":{"type":
"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"<s>":{"id":
"<s>","ids":[0],"tokens":["<s>"]}}},"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,
"use_regex":true},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,
"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"<s>":0,"a":1,
"b":2,"c":3,"ab":4,"abc":5,"Ġ":6,"Ġa":7},"merges":["a b","ab c","Ġ a"]}}"#;

#[test]
fn mutants_of_a_tokenizer_are_errors_not_panics() {
    let path = Path::new("tokenizer.json");
    let sound = Tokenizer::from_bytes(path, SMALL.as_bytes()).unwrap();
    assert_eq!(sound.encode("abc a abc", true).unwrap().ids, [0, 5, 6, 1, 6, 5]);
    let words: [&[u8]; 8] = [b"null", b"-1", b"99999999999", b"\"\"", b"[]", b"{}", b"(((", b"\"a b c\""];
    let mut random = crate::rng::Random::new(11, 0, 0);
    let mut refused = 0;
    for _ in 0..2000 {
        let bytes = crate::testing::damaged(SMALL.as_bytes(), &words, &mut random);
        match Tokenizer::from_bytes(path, &bytes) {
            Err(_) => refused += 1,
            Ok(tokenizer) => {
                // Any result will do; what matters is that the call comes back.
                let encoding = tokenizer.encode("abc\u{FFFD} <s> 東 a", true).unwrap_or_default();
                let _ = tokenizer.decode(&encoding.ids, false);
                let _ = tokenizer.encode_cut("abc abc", Some("a"), 3);
            }
        }
    }
    assert!(refused > 500, "only {refused} of 2000 mutants refused: too mild");
    let error = Tokenizer::open(Path::new("/nowhere")).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

#[test]
fn templates_and_special_tokens_come_from_every_known_place() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("tokenizer.json", SMALL);
    write(
        "tokenizer_config.json",
        r#"{"bos_token":{"content":"<s>"},"model_max_length":1e30,
                "chat_template":[{"name":"tool_use","template":"T"},{"name":"default","template":"D"}]}"#,
    );
    write("special_tokens_map.json", r#"{"bos_token":"wrong","eos_token":"<s>"}"#);
    let tokenizer = Tokenizer::open(directory.path()).unwrap();
    assert_eq!((tokenizer.bos.as_deref(), tokenizer.eos_id()), (Some("<s>"), Some(0)));
    assert_eq!(tokenizer.model_max_length, None);
    let names: Vec<&str> = tokenizer.templates.iter().map(|template| template.name.as_str()).collect();
    assert_eq!(names, ["default", "tool_use"]);
    write("chat_template.jinja", "J");
    assert_eq!(Tokenizer::open(directory.path()).unwrap().templates[0].source, "J");
    write("special_tokens_map.json", "[1");
    let error = Tokenizer::open(directory.path()).err().unwrap().to_string();
    assert!(error.contains("special_tokens_map.json: expected a JSON object"), "{error}");
}
