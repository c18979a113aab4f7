//! AdaMSS's adaptive allocation: which subspaces are still trained, by their importance.

use std::collections::HashMap;

use engraft_nn::{Adapter, Result};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};

/// The schedule of subspaces.
#[derive(Clone, Copy)]
pub(super) struct Allocation {
    pub target: usize,
    pub first: u64,
    pub last: u64,
    pub interval: u64,
    pub importance: f64,
    pub uncertainty: f64,
    pub exponent: f64,
}

impl Allocation {
    /// How many of `all` subspaces are to be left after step `now`.
    pub fn left(&self, now: u64, all: usize) -> usize {
        let share = 1.0 - (now - self.first) as f64 / (self.last - self.first) as f64;
        let target = self.target as f64;
        (target + (all as f64 - target) * share.clamp(0.0, 1.0).powf(self.exponent)) as usize
    }

    /// One step of a factor's averages, of |w·g|.
    pub fn smooth(&self, factor: &Tracked, now: &Tensor) -> Result<()> {
        let [importance, uncertainty] = &factor.averages;
        let mix = |old: &Param, new: &Tensor, beta: f64| -> Result<()> {
            Ok(old.set(old.value().scale(beta as f32)?.add(&new.scale((1.0 - beta) as f32)?)?)?)
        };
        let change = now.sub(&importance.value())?.unary(Unary::Abs)?;
        mix(uncertainty, &change, self.uncertainty)?;
        mix(importance, now, self.importance)
    }
}

/// Which subspaces are still trained: ones and zeros in the order of the subspaces of all targets.
pub(super) const MARKS: &str = "adamss_active";

/// The tensor of [`MARKS`].
pub(super) fn marks(adapter: &Adapter) -> Option<&Param> {
    let named = |name: &str| {
        name.strip_suffix(MARKS).is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('.'))
    };
    adapter.params().iter().find(|p| named(&p.name)).map(|p| &p.param)
}

/// A factor with the averages of its importance and of how that changes.
pub(super) struct Tracked {
    pub param: Param,
    pub averages: [Param; 2],
}

/// A and B of the subspaces of all targets, in order.
pub(super) fn tracked(adapter: &Adapter) -> Vec<[Tracked; 2]> {
    let by_name: HashMap<&str, &Param> =
        adapter.params().iter().map(|p| (p.name.as_str(), &p.param)).collect();
    let factor = |name: &str| -> Option<Tracked> {
        let find = |name: &str| by_name.get(name).map(|p| (*p).clone());
        let average = |end: &str| find(&format!("{name}.{end}"));
        Some(Tracked { param: find(name)?, averages: [average("importance")?, average("uncertainty")?] })
    };
    let of = |a: &str| Some([factor(a)?, factor(&a.replacen(A, B, 1))?]);
    adapter.params().iter().filter(|p| p.name.contains(A)).filter_map(|p| of(&p.name)).collect()
}

const A: &str = ".adamss_A.";
const B: &str = ".adamss_B.";

/// Marks off those of the `active` that are not more important than the one at place `count` by importance.
pub(super) fn drop_least(all: &[[Tracked; 2]], active: &[bool], count: usize) -> Result<Vec<f32>> {
    let mut scores = Vec::new();
    for (factors, _) in all.iter().zip(active).filter(|(_, active)| **active) {
        let mut score = 0.0;
        for [importance, uncertainty] in factors.each_ref().map(|f| &f.averages) {
            score += importance.value().mul(&uncertainty.value())?.mean()?.item()?;
        }
        scores.push(score);
    }
    let mut order = scores.clone();
    order.sort_by(|a, b| b.total_cmp(a));
    let threshold = if count < order.len() { order[count.saturating_sub(1)] } else { f32::NEG_INFINITY };
    let mut scores = scores.into_iter();
    let stays = |active: &bool| *active && scores.next().is_some_and(|score| score > threshold);
    Ok(active.iter().map(stays).map(|stays| f32::from(u8::from(stays))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use crate::{Forget, Step};
    use engraft_tensor::Gradients;
    use engraft_tensor::testing::sample;
    use serde_json::json;

    /// An optimizer that only shows gradients.
    struct Shown(Gradients, Tensor);

    impl Forget for Shown {
        fn forget(&mut self, _param: &Param) {}

        fn last(&self) -> Option<crate::Update<'_>> {
            Some(crate::Update { gradients: &self.0, scale: &self.1, learning_rate: 0.1 })
        }
    }

    #[test]
    fn the_number_of_subspaces_falls_to_the_target() {
        let (first, last, interval, exponent) = (2, 10, 2, 3.0);
        let a =
            Allocation { target: 4, first, last, interval, importance: 0.85, uncertainty: 0.85, exponent };
        assert_eq!([2, 4, 6, 10].map(|now| a.left(now, 20)), [20, 10, 6, 4]);
    }

    #[test]
    fn averages_begin_with_the_change() {
        let a = Allocation {
            target: 1,
            first: 0,
            last: 1,
            interval: 1,
            importance: 0.5,
            uncertainty: 0.25,
            exponent: 1.0,
        };
        let zero = || Param::frozen(Tensor::zeros([1]));
        let factor = Tracked { param: zero(), averages: [zero(), zero()] };
        for now in [4.0, 2.0] {
            a.smooth(&factor, &Tensor::full(now, [1])).unwrap();
        }
        // 4·0.5, then (2 + 2)/2; 4·0.75, then 3/4 + |2 − 2|·0.75.
        assert_eq!(factor.averages.each_ref().map(|p| p.value().item().unwrap()), [2.0, 0.75]);
    }

    #[test]
    fn unimportant_subspaces_are_dropped_for_good() {
        let mut settings = json!({ "rank": 3, "num_subspaces": 2 });
        for (key, value) in
            [("use_asa", json!(true)), ("asa_target_subspaces", json!(3)), ("init_warmup", json!(1))]
        {
            settings[key] = value;
        }
        (settings["final_warmup"], settings["mask_interval"]) = (json!(5), json!(2));
        let methods = [chosen("adamss", settings)];
        let a = attached(&methods, &[]);
        stir(&a, 0.5);
        let method = &methods[0].0;
        let (mut dropped, mut counts) = (Vec::new(), Vec::new());
        for number in 1..=8 {
            let step = Step { number, total: 8, seed: 0 };
            let mut gradients = Gradients::default();
            for (i, p) in a.adapter.trainable().enumerate() {
                gradients.set(&p.param, sample(p.param.value().shape(), 50 * number + i as u64));
            }
            method.after_backward(&a.adapter, &mut gradients, step).unwrap();
            let resting: Vec<String> = a
                .adapter
                .trainable()
                .filter(|p| gradients.get(&p.param).is_none())
                .map(|p| p.name.clone())
                .collect();
            assert!(dropped.iter().all(|name| resting.contains(name)), "{dropped:?} then {resting:?}");
            counts.push(resting.len() / 2);
            dropped = resting;
            method.after_step(&a.adapter, &mut Shown(gradients, Tensor::scalar(1.0)), step).unwrap();
        }
        // Eight subspaces; after the steps counted 2 and 4 from 0, 3 + 5·(3/4)³ = 5 and 3 + 5·(1/4)³ = 3, less one each.
        assert_eq!(counts, [0, 0, 0, 4, 4, 6, 6, 6]);
    }
}
