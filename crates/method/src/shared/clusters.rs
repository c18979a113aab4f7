//! Clusters of points by Lloyd's k-means, as scikit-learn runs it once from random points: the same draws, order of clusters,
//! tolerance and handling of clusters that run empty. Sums are in double precision, there in single: only a point that is as
//! near to two centres, to rounding, may land elsewhere.

use crate::shared::torch_random::{Generator, Seed};

/// How far centres may still move together, as a share of the variance.
const TOLERANCE: f64 = 1e-4;

/// The cluster, of `count`, of each point of `width` numbers, after at most `iterations`. There must be `count` points or more.
pub(crate) fn clusters(
    points: &[f32],
    width: usize,
    count: usize,
    iterations: usize,
    seed: u64,
) -> Vec<usize> {
    let n = points.len() / width;
    let mut points: Vec<Vec<f64>> =
        points.chunks(width).map(|p| p.iter().map(|&v| f64::from(v)).collect()).collect();
    let mean = |points: &[Vec<f64>], k: usize| points.iter().map(|p| p[k]).sum::<f64>() / n as f64;
    for k in 0..width {
        let middle = mean(&points, k);
        points.iter_mut().for_each(|p| p[k] -= middle);
    }
    let variance = points.iter().flatten().map(|v| v * v).sum::<f64>() / (n * width) as f64;
    let mut centres: Vec<Vec<f64>> = chosen(n, count, seed).into_iter().map(|i| points[i].clone()).collect();
    let mut before = Vec::new();
    for _ in 0..iterations {
        let labels = nearest(&points, &centres);
        let moved = means(&points, &labels, &centres);
        let shift: f64 = moved.iter().zip(&centres).map(|(a, b)| square(a, b)).sum();
        centres = moved;
        if labels == before {
            return labels;
        }
        before = labels;
        if shift <= TOLERANCE * variance {
            break;
        }
    }
    nearest(&points, &centres)
}

/// `RandomState(seed).choice(n, count, replace=False, p=…)` of NumPy, all chances equal as single-precision numbers.
fn chosen(n: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut generator = Generator::new(Seed::of(seed));
    let mut unit = || {
        let (upper, lower) = (generator.bits() >> 5, generator.bits() >> 6);
        (f64::from(upper) * f64::from(1u32 << 26) + f64::from(lower)) / (1u64 << 53) as f64
    };
    let mut chances = vec![f64::from(1.0 / n as f32); n];
    let mut found: Vec<usize> = Vec::with_capacity(count);
    while found.len() < count {
        let draws: Vec<f64> = (found.len()..count).map(|_| unit()).collect();
        found.iter().for_each(|&i| chances[i] = 0.0);
        let mut sums: Vec<f64> = Vec::with_capacity(n);
        chances.iter().for_each(|p| sums.push(sums.last().copied().unwrap_or(0.0) + p));
        let whole = sums.last().copied().unwrap_or(1.0);
        for draw in draws {
            let at = sums.partition_point(|sum| sum / whole <= draw);
            if !found.contains(&at) {
                found.push(at);
            }
        }
    }
    found
}

fn square(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// The nearest centre of each point, of several as near the first.
fn nearest(points: &[Vec<f64>], centres: &[Vec<f64>]) -> Vec<usize> {
    let of = |point: &Vec<f64>| {
        let mut best = (f64::INFINITY, 0);
        for (i, centre) in centres.iter().enumerate() {
            let far = square(point, centre);
            if far < best.0 {
                best = (far, i);
            }
        }
        best.1
    };
    points.iter().map(of).collect()
}

/// The means of clusters; one that is empty gets the point that is farthest from its centre.
fn means(points: &[Vec<f64>], labels: &[usize], centres: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let (mut sums, mut sizes) = (vec![vec![0.0; centres[0].len()]; centres.len()], vec![0.0; centres.len()]);
    for (point, &label) in points.iter().zip(labels) {
        sizes[label] += 1.0;
        sums[label].iter_mut().zip(point).for_each(|(sum, v)| *sum += v);
    }
    let empty: Vec<usize> = (0..sizes.len()).filter(|&i| sizes[i] == 0.0).collect();
    if !empty.is_empty() {
        let far: Vec<f64> = points.iter().zip(labels).map(|(p, &l)| square(p, &centres[l])).collect();
        let mut order: Vec<usize> = (0..points.len()).collect();
        order.sort_by(|&a, &b| far[b].total_cmp(&far[a]));
        let distinct = far.iter().any(|far| *far > 0.0);
        for (new, point) in empty.into_iter().zip(order).filter(|_| distinct) {
            let old = labels[point];
            sums[old].iter_mut().zip(&points[point]).for_each(|(sum, v)| *sum -= v);
            sums[new].clone_from(&points[point]);
            (sizes[new], sizes[old]) = (1.0, sizes[old] - 1.0);
        }
    }
    for (sum, size) in sums.iter_mut().zip(sizes).filter(|(_, size)| *size > 0.0) {
        sum.iter_mut().for_each(|v| *v /= size);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn clusters_are_those_of_scikit_learn() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/random/clusters.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for case in file["cases"].as_array().unwrap() {
            let points: Vec<Vec<f32>> = serde_json::from_value(case["points"].clone()).unwrap();
            let expected: Vec<usize> = serde_json::from_value(case["labels"].clone()).unwrap();
            let count = (case["clusters"].as_u64().unwrap() as usize).min(points.len());
            assert_eq!(clusters(&points.concat(), points[0].len(), count, 10, 123_456_789), expected);
        }
    }

    #[test]
    fn every_point_is_nearest_to_the_mean_of_its_own_cluster() {
        let points: Vec<f32> = (0..60).map(|i| 10.0 * (i % 3) as f32 + (0.7 * i as f32).sin()).collect();
        let labels = clusters(&points, 2, 4, 100, 7);
        let points: Vec<Vec<f64>> =
            points.chunks(2).map(|p| p.iter().map(|&v| f64::from(v)).collect()).collect();
        let centres = means(&points, &labels, &vec![vec![0.0; 2]; 4]);
        assert_eq!(nearest(&points, &centres), labels);
        assert!((0..4).all(|i| labels.contains(&i)), "{labels:?}");
    }
}
