//! A class for each token that has one: the first token of a word carries the word's tag.

use engraft_nn::Layout;

use super::{Labelled, real_rows};

pub(super) fn rows(layout: &Layout, labels: &[i64]) -> Labelled {
    real_rows(layout, labels)
}
