//! The contract between models and methods.
//!
//! A model declares [`Site`]s and asks the [`Pass`] at each of them; a method fills an [`Adapter`] with [`Patch`]es at
//! the sites it chose. Neither knows the other, and neither knows how a frozen [`Weight`] is stored.

mod adapter;
mod attention;
mod builder;
mod cache;
mod convolution;
mod embedding;
mod error;
mod init;
mod joined;
mod layout;
mod linear;
mod merge;
mod model;
mod norm;
mod parameter;
mod pass;
mod patch;
pub mod pattern;
mod replace;
pub mod rotary;
mod site;
mod targets;
mod virtual_rows;
pub mod weight;

pub use adapter::{Adapter, NamedParam, TaskName};
pub use attention::{Attend, Memory};
pub use builder::Builder;
pub use cache::KvCache;
pub use convolution::Convolution;
pub use embedding::Embedding;
pub use error::{Error, Result};
pub use init::Init;
pub use joined::Joined;
pub use layout::Layout;
pub use linear::{Linear, Patched};
pub use merge::{MergedTensor, mergeable_sites, merged_tensor, merged_tensors};
pub use model::{Inputs, Model, ModelInfo, Output, Picture, Source, Target, Task};
pub use norm::Norm;
pub use parameter::Parameter;
pub use pass::{Mode, Pass, Route};
pub use patch::{
    Base, BlockPatch, HeadPatch, KeyValuePatch, KeyValues, Patch, PromptPatch, RowsFn, Sublayer,
    SublayerPatch, VectorPatch, WeightPatch,
};
pub use pattern::Pattern;
pub use replace::{LeftOut, Replacement};
pub use site::{Kind, Names, Numbers, Role, Site, SiteId, Sites, Stack, Value};
pub use targets::{LayerChoice, Matcher, Resolution, TargetError, Targets, few};
pub use weight::Weight;
