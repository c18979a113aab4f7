//! What fixes the bits of a run beside its plan: the program, the machine's kernels, the base, the data.

use std::fmt::Write;

use engraft_data::Dataset;
use engraft_data::Labels;
use engraft_store::Weights;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Bytes taken of the start, middle and end of each tensor of the base.
const SAMPLE: usize = 4096;

/// The parts, so that a difference can be named.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Version of Engraft.
    pub version: String,
    /// Operating system and processor family.
    pub target: String,
    /// The instruction set that the kernels use, or the card.
    pub kernels: String,
    /// Threads; sums are split by them.
    pub threads: usize,
    /// Version of shuffles and masks.
    pub shuffle: u32,
    /// Names, shapes and samples of the base's tensors, SHA-256.
    pub base: String,
    /// Ids and labels of the training examples, SHA-256. Another tokenizer shows here.
    pub data: String,
}

impl Fingerprint {
    /// Of this program on this machine, with a base and data.
    pub fn new(base: String, data: String) -> Self {
        Fingerprint {
            version: env!("CARGO_PKG_VERSION").into(),
            target: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            kernels: engraft_tensor::device::name(),
            threads: rayon::current_num_threads(),
            shuffle: engraft_data::rng::VERSION,
            base,
            data,
        }
    }

    /// SHA-256 of all parts, hexadecimal.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(serde_json::to_string(self).unwrap_or_default().as_bytes()))
    }

    /// The parts that differ, in words.
    pub fn differences(&self, now: &Fingerprint) -> Vec<String> {
        let rows = [
            ("version", &self.version, &now.version),
            ("target", &self.target, &now.target),
            ("kernels", &self.kernels, &now.kernels),
            ("base", &self.base, &now.base),
            ("data", &self.data, &now.data),
        ];
        let mut found: Vec<String> = rows
            .iter()
            .filter(|(_, then, now)| then != now)
            .map(|(name, then, now)| format!("{name} was {}, is {}", short(then), short(now)))
            .collect();
        if self.threads != now.threads {
            found.push(format!("threads was {}, is {}", self.threads, now.threads));
        }
        if self.shuffle != now.shuffle {
            found.push(format!("shuffle version was {}, is {}", self.shuffle, now.shuffle));
        }
        found
    }
}

fn short(text: &str) -> &str {
    if text.len() == 64 { &text[..12] } else { text }
}

/// Names, types, shapes and samples of all tensors: reading gigabytes at each start would cost more than it tells.
pub fn of_weights(weights: &Weights) -> String {
    let mut hash = Sha256::new();
    for (name, tensor) in weights.iter() {
        hash.update(format!("{name} {} {:?}\n", tensor.dtype, tensor.shape));
        let bytes = tensor.bytes();
        for start in [0, bytes.len() / 2, bytes.len().saturating_sub(SAMPLE)] {
            hash.update(&bytes[start..(start + SAMPLE).min(bytes.len())]);
        }
    }
    hex(&hash.finalize())
}

/// Ids, pictures and labels of all examples.
pub fn of_data(data: &Dataset) -> String {
    let mut hash = Sha256::new();
    for example in &data.examples {
        hash.update((example.ids.len() as u64).to_le_bytes());
        example.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        example.task.iter().for_each(|task| hash.update(task.to_le_bytes()));
        if let (Some(images), Some(index)) = (&data.images, example.image) {
            hash.update(images.identity(index));
        }
        match &example.labels {
            Labels::None => hash.update([0]),
            Labels::Class(class) => hash.update(class.to_le_bytes()),
            Labels::Score(score) => hash.update(score.to_le_bytes()),
            Labels::Tokens(labels) => labels.iter().for_each(|l| hash.update(l.to_le_bytes())),
            Labels::Target(target) => {
                target.labels.iter().for_each(|l| hash.update(l.to_le_bytes()));
                target.inputs.iter().flatten().for_each(|id| hash.update(id.to_le_bytes()));
            }
        }
    }
    hex(&hash.finalize())
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
