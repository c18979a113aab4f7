//! What tests of several files share: a byte tokenizer, temporary data files, the shared data.

use std::path::{Path, PathBuf};

use crate::tokenizer::Tokenizer;

/// A tokenizer of single bytes (ids 0 to 255) with `<bos>` 256, `<eos>` 257, `<|im_start|>` 258, `<|im_end|>` 259,
/// `<mask>` 260; `<bos>` is put before a text.
pub fn byte_tokenizer() -> Tokenizer {
    let mut vocabulary = serde_json::Map::new();
    let mut shifted = 0;
    for byte in 0..=255u8 {
        // The alphabet of byte-level tokenizers: printable bytes are themselves, the others count from U+0100.
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let symbol = if printable { char::from(byte) } else { char::from_u32(256 + shifted).unwrap() };
        shifted += u32::from(!printable);
        vocabulary.insert(symbol.to_string(), byte.into());
    }
    let names = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<mask>"];
    let added: Vec<serde_json::Value> = names
        .iter()
        .zip(256..)
        .map(|(name, id)| {
            serde_json::json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
        "use_regex": true});
    let bos = serde_json::json!({"SpecialToken": {"id": "<bos>", "type_id": 0}});
    let sequence = |id: &str| serde_json::json!({"Sequence": {"id": id, "type_id": 0}});
    let file = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "decoder": level,
        "post_processor": {"type": "TemplateProcessing", "single": [bos, sequence("A")],
            "pair": [bos, sequence("A"), sequence("B")],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [256], "tokens": ["<bos>"]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []},
    });
    let mut tokenizer =
        Tokenizer::from_bytes(Path::new("tokenizer.json"), file.to_string().as_bytes()).unwrap();
    (tokenizer.bos, tokenizer.eos) = (Some("<bos>".into()), Some("<eos>".into()));
    tokenizer.mask = Some("<mask>".into());
    tokenizer
}

/// A file of the shared data; a line and `None` when it is not there.
pub fn shared(part: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(part);
    if !path.exists() {
        eprintln!("skipped: {part} of the shared data is not there");
        return None;
    }
    Some(path)
}

/// A data file in a folder that lives as long as the first value.
pub fn file(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (directory, path)
}

/// `bytes` with up to three small damages: a byte changed, a stretch removed, doubled, or replaced by a `word`.
pub fn damaged(bytes: &[u8], words: &[&[u8]], random: &mut crate::rng::Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len() as u64) as usize;
        let end = bytes.len().min(at + 1 + random.below(12) as usize);
        match random.below(4) {
            0 => bytes[at] = random.below(256) as u8,
            1 => drop(bytes.drain(at..end)),
            2 => {
                drop(bytes.splice(at..end, words[random.below(words.len() as u64) as usize].iter().copied()))
            }
            _ => drop(bytes.splice(at..at, bytes[at..end].to_vec())),
        }
    }
    bytes
}
