//! Fixtures: models, padded inputs and the logits that `transformers` computes for them.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engraft_model::{LoadOptions, Loaded, load};
use engraft_nn::{Adapter, Inputs, Layout, Model, Pass};
use engraft_store::{Limits, Weights};
use engraft_tensor::{Tensor, no_grad};

pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

/// A path in the folder shared between projects, if it is there.
pub fn shared(path: &str) -> Option<PathBuf> {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(path);
    if found.exists() {
        return Some(found);
    }
    println!("skipped: {path} of the shared folder is not there");
    None
}

pub fn model(dir: &Path) -> Loaded {
    load(dir, &LoadOptions::default()).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// A padded batch as a packed one, and where its tokens lie in the padded form.
pub struct Batch {
    pub inputs: Inputs,
    /// Row and column of each token.
    pub places: Vec<(usize, usize)>,
}

pub fn tensors(path: &Path) -> Weights {
    Weights::open_file(path, &Limits::default()).unwrap()
}

/// Pictures, or the tokens of a file, packed; places are those of the target where there is one.
pub fn read_batch(path: &Path) -> Batch {
    let file = tensors(path);
    if let Some(pixels) = file.get("pixel_values") {
        let pixels = Tensor::from_vec(pixels.to_f32().unwrap(), pixels.shape.clone()).unwrap();
        return Batch { inputs: Inputs::pixels(pixels).unwrap(), places: vec![] };
    }
    let (ids, types, layout, places) = packed(&file, "input_ids", "attention_mask");
    let inputs = Inputs::tokens(ids, types, layout);
    if file.get("decoder_input_ids").is_none() {
        return Batch { inputs, places };
    }
    let (ids, _, layout, places) = packed(&file, "decoder_input_ids", "decoder_attention_mask");
    Batch { inputs: inputs.with_target(ids, layout), places }
}

/// The tokens that a mask keeps, with their types, positions (columns) and places.
fn packed(file: &Weights, ids: &str, mask: &str) -> (Tensor, Option<Tensor>, Layout, Vec<(usize, usize)>) {
    let ints = |name: &str| file.get(name).map(|t| t.to_i64().unwrap());
    let shape = file.get(ids).unwrap().shape.clone();
    let (all, mask, all_types) = (ints(ids).unwrap(), ints(mask).unwrap(), ints("token_type_ids"));
    let (mut ids, mut types, mut positions, mut lengths, mut places) =
        (vec![], vec![], vec![], vec![], vec![]);
    for row in 0..shape[0] {
        let kept = (0..shape[1]).filter(|column| mask[row * shape[1] + column] == 1);
        let before = ids.len();
        for column in kept {
            let at = row * shape[1] + column;
            ids.push(all[at]);
            types.extend(all_types.as_ref().map(|t| t[at]));
            positions.push(column as i32);
            places.push((row, column));
        }
        lengths.push(ids.len() - before);
    }
    let layout = Layout::new(&lengths, positions).unwrap();
    let vector = |v: Vec<i64>| Tensor::from_i64(v.clone(), [v.len()]).unwrap();
    (vector(ids), all_types.is_some().then(|| vector(types)), layout, places)
}

/// The expected logits of each row that counts: all sequences, or the tokens at `places`.
pub fn read_logits(path: &Path, places: &[(usize, usize)]) -> Vec<f32> {
    let file = tensors(path);
    let logits = file.get("logits").unwrap();
    let values = logits.to_f32().unwrap();
    match logits.shape[..] {
        [_, columns, width] => {
            let row = |&(r, c): &(usize, usize)| values[(r * columns + c) * width..][..width].to_vec();
            places.iter().flat_map(row).collect()
        }
        _ => values,
    }
}

pub fn run(model: &dyn Model, inputs: &Inputs, adapter: Option<Arc<Adapter>>) -> Vec<f32> {
    let cx = Pass::new(inputs.layout.clone(), adapter);
    no_grad(|| model.forward(inputs, &cx)).unwrap().to_vec().unwrap()
}

/// Largest difference over the largest expected value.
pub fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let worst = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0f32, |m, d| if d.is_nan() { d } else { m.max(d) });
    worst / largest
}

/// A packed batch without types, of the given sequences.
pub fn batch(sequences: &[&[i64]]) -> Inputs {
    let lengths: Vec<usize> = sequences.iter().map(|s| s.len()).collect();
    let ids: Vec<i64> = sequences.concat();
    let count = ids.len();
    Inputs::tokens(Tensor::from_i64(ids, [count]).unwrap(), None, Layout::counted(&lengths).unwrap())
}
