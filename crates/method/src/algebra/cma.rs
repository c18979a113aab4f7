//! A search without gradients in a few dimensions: CMA-ES (Hansen and Ostermeier 2001), whose steps follow the shape of what
//! was found good so far. The covariance is kept with its Cholesky factor (Suttorp, Hansen and Igel 2009).

use engraft_nn::Result;
use engraft_tensor::cpu::random::Key;

/// A box −bound … bound in so many dimensions, the number of values asked for, and the seed of the draws.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    pub dimensions: usize,
    pub bound: f64,
    pub evaluations: usize,
    pub seed: u64,
}

/// What was found.
pub(super) struct Minimum {
    pub at: Vec<f64>,
    pub value: f64,
    /// The value in the middle, where the search begins.
    pub start: f64,
    pub evaluations: usize,
}

/// Share of the bound that the first steps have as their deviation.
const FIRST_STEP: f64 = 1.0 / 3.0;

/// The least value of `f` that was met, the middle of the box first. What is not finite counts as the worst.
pub(super) fn minimise(space: Space, f: &mut dyn FnMut(&[f64]) -> Result<f64>) -> Result<Minimum> {
    let n = space.dimensions;
    let mut value = |at: &[f64]| f(at).map(|v| if v.is_finite() { v } else { f64::INFINITY });
    let start = value(&vec![0.0; n])?;
    let mut best = Minimum { at: vec![0.0; n], value: start, start, evaluations: 1 };
    let mut state = State::new(n, space.bound * FIRST_STEP);
    let key = Key { seed: space.seed, stream: 0x6c6f_7261 };
    let mut drawn = 0u64;
    while best.evaluations < space.evaluations {
        let mut population = Vec::new();
        for _ in 0..state.size.min(space.evaluations - best.evaluations) {
            let z: Vec<f64> = (0..n as u64).map(|i| f64::from(key.normal(drawn + i))).collect();
            drawn += n as u64;
            let at = state.at(&z, space.bound);
            let found = value(&at)?;
            best.evaluations += 1;
            if found < best.value {
                (best.value, best.at) = (found, at.clone());
            }
            population.push((found, at, z));
        }
        // Of equals the first.
        population.sort_by(|a, b| a.0.total_cmp(&b.0));
        state.learn(&population);
    }
    Ok(best)
}

/// The distribution that is drawn from, and its paths.
struct State {
    size: usize,
    weights: Vec<f64>,
    /// 1/Σw², how many points the weighted mean is worth.
    worth: f64,
    mean: Vec<f64>,
    deviation: f64,
    covariance: Vec<Vec<f64>>,
    /// Its Cholesky factor, the lower half.
    factor: Vec<Vec<f64>>,
    path: Vec<f64>,
    path_of_deviation: Vec<f64>,
}

impl State {
    fn new(n: usize, deviation: f64) -> State {
        let size = 4 + (3.0 * (n as f64).ln().max(0.0)) as usize;
        let raw: Vec<f64> =
            (1..=size / 2).map(|i| ((size as f64 + 1.0) / 2.0).ln() - (i as f64).ln()).collect();
        let sum: f64 = raw.iter().sum();
        let weights: Vec<f64> = raw.iter().map(|w| w / sum).collect();
        let unit = |i: usize| (0..n).map(|j| if i == j { 1.0 } else { 0.0 }).collect::<Vec<f64>>();
        State {
            size,
            worth: 1.0 / weights.iter().map(|w| w * w).sum::<f64>(),
            weights,
            mean: vec![0.0; n],
            deviation,
            covariance: (0..n).map(unit).collect(),
            factor: (0..n).map(unit).collect(),
            path: vec![0.0; n],
            path_of_deviation: vec![0.0; n],
        }
    }

    /// mean + σ·L·z, within the box.
    fn at(&self, z: &[f64], bound: f64) -> Vec<f64> {
        let step = |row: &Vec<f64>| row.iter().zip(z).map(|(l, z)| l * z).sum::<f64>();
        let moved = self.mean.iter().zip(&self.factor).map(|(m, row)| m + self.deviation * step(row));
        moved.map(|x| x.clamp(-bound, bound)).collect()
    }

    /// Moves to the better half of `population`, which is sorted, and learns from the way there.
    fn learn(&mut self, population: &[(f64, Vec<f64>, Vec<f64>)]) {
        let (n, worth) = (self.mean.len() as f64, self.worth);
        let better: Vec<_> = self.weights.iter().zip(population).collect();
        if better.len() < self.weights.len() {
            return;
        }
        let steps: Vec<Vec<f64>> = population
            .iter()
            .map(|(_, at, _)| at.iter().zip(&self.mean).map(|(x, m)| (x - m) / self.deviation).collect())
            .collect();
        let mixed =
            |of: &dyn Fn(usize) -> f64| self.weights.iter().enumerate().map(|(i, w)| w * of(i)).sum::<f64>();
        let dimensions = 0..self.mean.len();
        let way: Vec<f64> = dimensions.clone().map(|d| mixed(&|i| steps[i][d])).collect();
        let drawn: Vec<f64> = dimensions.clone().map(|d| mixed(&|i| population[i].2[d])).collect();

        let c_sigma = (worth + 2.0) / (n + worth + 5.0);
        let damping = 1.0 + 2.0 * (((worth - 1.0) / (n + 1.0)).sqrt() - 1.0).max(0.0) + c_sigma;
        let c_path = (4.0 + worth / n) / (n + 4.0 + 2.0 * worth / n);
        let c_one = 2.0 / ((n + 1.3).powi(2) + worth);
        let c_rest = (1.0 - c_one).min(2.0 * (worth - 2.0 + 1.0 / worth) / ((n + 2.0).powi(2) + worth));
        let expected = n.sqrt() * (1.0 - 1.0 / (4.0 * n) + 1.0 / (21.0 * n * n));

        let grow = (c_sigma * (2.0 - c_sigma) * worth).sqrt();
        let next = |path: &[f64], keep: f64, grow: f64, by: &[f64]| -> Vec<f64> {
            path.iter().zip(by).map(|(p, b)| keep * p + grow * b).collect()
        };
        self.path_of_deviation = next(&self.path_of_deviation, 1.0 - c_sigma, grow, &drawn);
        let length = self.path_of_deviation.iter().map(|v| v * v).sum::<f64>().sqrt();
        let grow = (c_path * (2.0 - c_path) * worth).sqrt();
        self.path = next(&self.path, 1.0 - c_path, grow, &way);
        self.mean.iter_mut().zip(&way).for_each(|(m, w)| *m += self.deviation * w);
        for i in dimensions.clone() {
            for j in dimensions.clone() {
                let rest: f64 = self.weights.iter().zip(&steps).map(|(w, s)| w * s[i] * s[j]).sum();
                let kept = (1.0 - c_one - c_rest) * self.covariance[i][j];
                self.covariance[i][j] = kept + c_one * self.path[i] * self.path[j] + c_rest * rest;
            }
        }
        self.deviation *= ((c_sigma / damping) * (length / expected - 1.0)).exp();
        if let Some(factor) = cholesky(&self.covariance) {
            self.factor = factor;
        }
    }
}

/// L with L·Lᵀ = `a`; `None` where rounding has left it indefinite, and the factor before stays.
fn cholesky(a: &[Vec<f64>]) -> Option<Vec<Vec<f64>>> {
    let n = a.len();
    let mut l = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..=i {
            let rest = a[i][j] - (0..j).map(|k| l[i][k] * l[j][k]).sum::<f64>();
            l[i][j] = match i == j {
                true if rest > 1e-300 => rest.sqrt(),
                true => return None,
                false => rest / l[j][j],
            };
        }
    }
    Some(l)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(dimensions: usize, evaluations: usize) -> Space {
        Space { dimensions, bound: 1.5, evaluations, seed: 7 }
    }

    #[test]
    fn a_bent_bowl_is_found_and_the_same_seed_finds_the_same() {
        for n in [1, 2, 5] {
            let aim: Vec<f64> = (0..n).map(|i| 0.9 - 0.3 * i as f64).collect();
            // Long in one direction: what CMA learns and a search by axes does not.
            let bowl = |x: &[f64]| {
                let off: Vec<f64> = x.iter().zip(&aim).map(|(x, a)| x - a).collect();
                let sum: f64 = off.iter().sum();
                Ok(off.iter().map(|v| v * v).sum::<f64>() + 30.0 * sum * sum)
            };
            let run = || minimise(space(n, 600), &mut |x| bowl(x)).unwrap();
            let (found, again) = (run(), run());
            assert!(found.value < 1e-6 * found.start, "{n}: {} of {}", found.value, found.start);
            assert_eq!((found.at.clone(), found.evaluations), (again.at, 600));
            assert!(found.at.iter().all(|x| x.abs() <= 1.5));
        }
    }

    #[test]
    fn the_box_holds_and_nothing_is_worse_than_the_middle() {
        let found = minimise(space(2, 60), &mut |x| Ok(-x[0] - x[1])).unwrap();
        assert!(found.at.iter().all(|x| (1.2..=1.5).contains(x)), "{:?}", found.at);
        let found = minimise(space(3, 40), &mut |x| Ok(x.iter().map(|v| v.abs()).sum())).unwrap();
        assert_eq!((found.at, found.value, found.evaluations), (vec![0.0; 3], 0.0, 40));
        let found = minimise(space(1, 1), &mut |_| Ok(f64::NAN)).unwrap();
        assert_eq!((found.value, found.evaluations), (f64::INFINITY, 1));
    }
}
