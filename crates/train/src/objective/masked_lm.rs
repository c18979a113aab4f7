//! Masked language modelling: the hidden tokens are predicted where they stand; [`engraft_data::mask`] hides them.

use engraft_nn::Layout;

use super::{Labelled, real_rows};

pub(super) fn rows(layout: &Layout, labels: &[i64]) -> Labelled {
    real_rows(layout, labels)
}
