//! Tokenizers, chat templates, data sets and batches: text in, token ids and labels out; pictures in, numbers out.
//!
//! Nothing here knows tensors, models or the environment, and nothing prints. The way of a row: [`read()`] gives
//! [`Rows`] of text, [`encode`] makes a [`Dataset`] of them for a [`Task`], [`Batches`] says which examples go together.
//! Pictures come by [`read_images`], as a [`Processor`] makes them.

mod batches;
mod chat;
mod clock;
mod decode;
mod error;
mod example;
mod fence;
mod images;
mod read;
pub mod rng;
mod task;
mod template;
mod tensors;
#[cfg(test)]
mod testing;
mod tokenizer;

pub use batches::{Batches, Epoch, Order, WINDOW};
pub use chat::{Conversation, encode_conversation, encode_prompt};
pub use decode::DecodeStream;
pub use error::{Error, Result};
pub use example::{Dataset, Example, IGNORED, Labels, Report, Target};
pub use fence::is_fenced;
pub use images::{
    Filter, ImageSource, Images, OUTPUT_POINTS_MAX, PICTURE_BYTES_MAX, POINTS_MAX, Picture, PictureModel,
    Processor, SIDE_MAX, Size, read_images,
};
pub use read::{Columns, Content, Format, Message, Need, ReadOptions, Row, Rows, Sniff, read, sniff};
pub use task::{EncodeOptions, Task, encode, mask};
pub use template::{
    ChatTemplate, MEMORY_LIMIT as TEMPLATE_MEMORY, TemplateOptions, Worker, serve as serve_template,
};
pub use tensors::{PixelTensors, Seq2SeqTensors, Tensors};
pub use tokenizer::{Encoding, NamedTemplate, Tokenizer};
