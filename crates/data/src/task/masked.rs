//! Masked language modelling (Devlin et al., 2019): of the tokens, 15 % are to be predicted; of those 80 % are
//! hidden behind the mask token, 10 % replaced by a random one, 10 % left.
//!
//! Examples hold every token as its label (special tokens ignored); [`mask`] draws at batch time, a function of
//! (seed, epoch, example) alone, so a resumed run draws the same.

use super::Maker;
use crate::error::Result;
use crate::example::{Example, IGNORED, Labels};
use crate::rng::Random;

impl Maker<'_> {
    pub(super) fn masked(&mut self) -> Result<Vec<Example>> {
        let mut examples = Vec::with_capacity(self.rows.rows.len());
        for row in &self.rows.rows {
            let mut example = self.text(row, Labels::None)?;
            let special = self.tokenizer.special_ids();
            let label = |id: &u32| if special.contains(id) { IGNORED } else { i64::from(*id) };
            example.labels = Labels::Tokens(example.ids.iter().map(label).collect());
            examples.push(example);
        }
        Ok(examples)
    }
}

/// `example` as masked in epoch `epoch`: what is not to be predicted is ignored. At least one token is predicted.
///
/// `index` is its number in the data set, `mask_id` the mask token, `vocabulary` the bound of random ids.
pub fn mask(
    example: &Example,
    index: usize,
    mask_id: u32,
    vocabulary: u32,
    seed: u64,
    epoch: u64,
) -> Example {
    let mut masked = example.clone();
    let Labels::Tokens(labels) = &mut masked.labels else { return masked };
    let candidates: Vec<usize> = (0..labels.len()).filter(|at| labels[*at] != IGNORED).collect();
    let mut random = Random::new(seed ^ 0x6D61_736B, epoch, index as u64);
    let mut chosen: Vec<usize> = candidates.iter().copied().filter(|_| random.unit() < 0.15).collect();
    if chosen.is_empty() && !candidates.is_empty() {
        chosen.push(candidates[random.below(candidates.len() as u64) as usize]);
    }
    for at in candidates.iter().filter(|at| !chosen.contains(at)) {
        labels[*at] = IGNORED;
    }
    for at in chosen {
        match random.below(10) {
            0..8 => masked.ids[at] = mask_id,
            8 => masked.ids[at] = random.below(u64::from(vocabulary)) as u32,
            _ => {}
        }
    }
    masked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_are_bert_s_and_the_draw_repeats() {
        let ids: Vec<u32> = (10..1010).collect();
        let labels =
            Labels::Tokens(ids.iter().map(|id| if *id < 20 { IGNORED } else { i64::from(*id) }).collect());
        let example = Example { ids, labels, row: 1, ..Example::default() };
        let (mut predicted, mut hidden, mut kept) = (0, 0, 0);
        for epoch in 0..50 {
            let masked = mask(&example, 3, 7, 2000, 1, epoch);
            assert_eq!(masked, mask(&example, 3, 7, 2000, 1, epoch));
            let Labels::Tokens(labels) = &masked.labels else { panic!("token labels expected") };
            for (at, label) in labels.iter().enumerate() {
                let same = masked.ids[at] == example.ids[at];
                assert!(*label != IGNORED || same, "only predicted tokens change");
                predicted += usize::from(*label != IGNORED);
                hidden += usize::from(*label != IGNORED && masked.ids[at] == 7);
                kept += usize::from(*label != IGNORED && same);
            }
            assert!(labels[..10].iter().all(|label| *label == IGNORED));
        }
        let share = |count: usize, of: usize| count as f64 / of as f64;
        assert!((share(predicted, 50 * 990) - 0.15).abs() < 0.01, "{predicted}");
        assert!((share(hidden, predicted) - 0.8).abs() < 0.02, "{hidden}");
        assert!((share(kept, predicted) - 0.1).abs() < 0.02, "{kept}");
    }
}
