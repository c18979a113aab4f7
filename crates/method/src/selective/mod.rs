//! A part of the pretrained numbers, trained in place.

pub(crate) mod bitfit;
pub(crate) mod full;
pub(crate) mod ln_tuning;
