//! The alarm about trained tensors that nothing moves: no gradient at all, or zeros for ten steps.

use std::collections::BTreeSet;

use engraft_tensor::{Gradients, no_grad};

use crate::Result;
use crate::optimizer::{Optimizer, Slot};

/// Steps of zeros that raise the alarm.
const STEPS: u64 = 10;
/// The first ten steps of so many are looked at.
const EVERY: u64 = 100;

/// Which tensors had only zeros since the window began.
#[derive(Default)]
pub(crate) struct ZeroWatch {
    zero: Option<BTreeSet<usize>>,
    told: BTreeSet<usize>,
}

impl ZeroWatch {
    /// The tensors that backward did not reach, before methods drop gradients of those that wait for their turn.
    pub fn unreached(optimizer: &Optimizer, gradients: &Gradients) -> Vec<usize> {
        let none = |(_, s): &(usize, &Slot)| !s.rests && gradients.get(&s.param).is_none();
        optimizer.slots.iter().enumerate().filter(none).map(|(i, _)| i).collect()
    }

    /// Looks at the gradients of step `number`; gives warnings, each tensor in one at most.
    pub fn look(
        &mut self,
        number: u64,
        optimizer: &Optimizer,
        gradients: &Gradients,
        unreached: &[usize],
    ) -> Result<Vec<String>> {
        let slots = &optimizer.slots;
        let mut warnings = Vec::new();
        self.tell(unreached, slots, "no gradient: the loss does not depend on", &mut warnings);
        let place = (number - 1) % EVERY;
        if place >= STEPS {
            return Ok(warnings);
        }
        let mut zero = if place == 0 { None } else { self.zero.take() }
            .unwrap_or_else(|| if place == 0 { (0..slots.len()).collect() } else { BTreeSet::new() });
        let mut still = BTreeSet::new();
        for index in std::mem::take(&mut zero) {
            let Some(gradient) = gradients.get(&slots[index].param) else { continue };
            if no_grad(|| gradient.mul(gradient)?.sum())?.item()? == 0.0 {
                still.insert(index);
            }
        }
        if place == STEPS - 1 {
            let still: Vec<usize> = still.iter().copied().collect();
            self.tell(&still, slots, "a gradient of zero for 10 steps:", &mut warnings);
        }
        self.zero = Some(still);
        Ok(warnings)
    }

    fn tell(&mut self, indices: &[usize], slots: &[Slot], what: &str, warnings: &mut Vec<String>) {
        let new: Vec<usize> = indices.iter().copied().filter(|i| self.told.insert(*i)).collect();
        if let Some(first) = new.first() {
            let more = if new.len() > 1 { format!(" and {} more", new.len() - 1) } else { String::new() };
            let message = format!(
                "{what} {}{more}; {} of {} trained tensors do not learn",
                slots[*first].name,
                self.told.len(),
                slots.len()
            );
            warnings.push(message);
        }
    }
}
