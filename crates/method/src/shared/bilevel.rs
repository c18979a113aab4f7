//! Two levels that take turns: the lower fits factors on its part of the rows, the upper fits a few numbers on the rest.

use engraft_nn::Adapter;
use engraft_tensor::Gradients;

use crate::Part;

/// Leaves the gradients of one level: of the parameters whose names end in `upper`, or of all others. Where the rows are
/// not parted, the upper numbers have had their time.
pub(crate) fn keep_level(adapter: &Adapter, gradients: &mut Gradients, upper: &str, part: Part) {
    for p in adapter.trainable() {
        if p.name.ends_with(upper) != (part == Part::Upper) {
            gradients.remove(&p.param);
        }
    }
}

/// The level of step `number`: odd ones are the lower's.
pub(crate) fn turn(number: u64) -> Part {
    if number.is_multiple_of(2) { Part::Upper } else { Part::Lower }
}
