//! Next-token prediction: row i of a sequence is trained towards the label of row i + 1.
//!
//! As in `peft`, the last virtual token of a soft prompt predicts the first real one.

use engraft_data::IGNORED;
use engraft_nn::Layout;

use super::Labelled;

/// Labels that are predicted by something before them.
pub(super) fn count(layout: &Layout, labels: &[i64], prompted: bool) -> usize {
    let of = |s: &std::ops::Range<usize>| {
        let from = s.start + usize::from(!prompted);
        (from..s.end).filter(|&i| labels.get(i).is_some_and(|&l| l != IGNORED)).count()
    };
    layout.sequences().iter().map(of).sum()
}

/// The row before each labelled token; `labels` count real tokens, `layout` may hold virtual ones.
pub(super) fn rows(layout: &Layout, labels: &[i64]) -> Labelled {
    let mut found = Labelled::default();
    let mut at = 0;
    for (sequence, &virtual_count) in layout.sequences().iter().zip(layout.virtual_counts()) {
        let first = sequence.start + virtual_count;
        for row in first..sequence.end {
            let label = labels.get(at).copied().unwrap_or(IGNORED);
            at += 1;
            if label != IGNORED && row > sequence.start {
                found.rows.push(row as i64 - 1);
                found.labels.push(label);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_move_back_by_one_inside_each_sequence() {
        let layout = Layout::counted(&[3, 2]).unwrap();
        let labels = [7, 8, IGNORED, 5, 6];
        assert_eq!(rows(&layout, &labels), Labelled { rows: vec![0, 3], labels: vec![8, 6] });
        assert_eq!((count(&layout, &labels, false), count(&layout, &labels, true)), (2, 4));
    }
}
