//! A part of the pretrained numbers, trained in place.

pub(crate) mod bitfit;
pub(crate) mod child_tuning;
pub(crate) mod diff_pruning;
pub(crate) mod far;
pub(crate) mod fish;
pub(crate) mod full;
pub(crate) mod gps;
pub(crate) mod lisa;
pub(crate) mod ln_tuning;
pub(crate) mod lt_sft;
pub(crate) mod pafi;
pub(crate) mod random_mask;
pub(crate) mod sam_mask;
pub(crate) mod shira;
pub(crate) mod sift;
pub(crate) mod spt;
pub(crate) mod supertuning;
pub(crate) mod top_layers;
pub(crate) mod trainable_tokens;
