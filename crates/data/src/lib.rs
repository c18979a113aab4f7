//! Tokenizers, chat templates, data sets and batches: text in, token ids and labels out.
//!
//! Nothing here knows tensors, models or the environment, and nothing prints.

mod batches;
mod decode;
mod error;
mod example;
mod read;
pub mod rng;
mod template;
mod tokenizer;

pub use batches::{Batches, Epoch, Order, WINDOW};
pub use decode::DecodeStream;
pub use error::{Error, Result};
pub use example::{Dataset, Example, IGNORED, Labels, Report};
pub use tokenizer::{Encoding, FILE_LIMIT, NamedTemplate, Tokenizer};
