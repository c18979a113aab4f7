//! A class for each sequence: the features hold one row a sequence, in order.

use super::Labelled;

pub(super) fn rows(labels: &[i64]) -> Labelled {
    Labelled { rows: (0..labels.len() as i64).collect(), labels: labels.to_vec() }
}
