//! Real models beside the repository, when they are there.

use engraft_store::{Limits, Weights};
use std::path::PathBuf;

/// A directory of the shared data; none is said aloud and the test counts as skipped.
fn shared(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/models").join(name);
    if path.is_dir() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

#[test]
fn a_sentence_model_opens() {
    let Some(dir) = shared("all-minilm-l6-v2") else { return };
    let weights = Weights::open(&dir, &Limits::default()).unwrap();
    let words = weights.get("embeddings.word_embeddings.weight").unwrap();
    assert_eq!(words.shape, [30522, 384]);
    let all = words.to_f32().unwrap();
    let mut two = vec![0.0; 768];
    words.rows_f32(100..102, &mut two).unwrap();
    assert_eq!(two, all[38_400..39_168]);
    assert!(all.iter().all(|x| x.is_finite()) && all.iter().any(|x| *x != 0.0));
}

#[test]
fn a_story_model_opens() {
    let Some(dir) = shared("stories260k") else { return };
    let weights = Weights::open(&dir, &Limits::default()).unwrap();
    assert!(!weights.is_empty() && weights.iter().all(|(_, tensor)| tensor.to_f32().is_ok()));
}
