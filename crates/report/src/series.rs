//! Series of points: thinning without losing spikes, smoothing without lag.

/// At most about `5 * columns` of `points` (in order of x), such that a line through them looks the same.
///
/// Each of `columns` stretches keeps its first, lowest, highest and last point and its first one that is not finite: a
/// spike or a gap of one step out of a million stays visible.
pub(crate) fn thin(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    let columns = columns.max(1);
    if points.len() <= 4 * columns {
        return points.to_vec();
    }
    let mut kept = Vec::with_capacity(5 * columns);
    for column in 0..columns {
        let from = column * points.len() / columns;
        let to = (column + 1) * points.len() / columns;
        let finite = || (from..to).filter(|index| points[*index].1.is_finite());
        let mut indices: Vec<usize> = [
            finite().next(),
            finite().min_by(|a, b| points[*a].1.total_cmp(&points[*b].1)),
            finite().max_by(|a, b| points[*a].1.total_cmp(&points[*b].1)),
            finite().next_back(),
            (from..to).find(|index| !points[*index].1.is_finite()),
        ]
        .into_iter()
        .flatten()
        .collect();
        indices.sort_unstable();
        indices.dedup();
        kept.extend(indices.into_iter().map(|index| points[index]));
    }
    kept
}

/// A mean over a triangle of `2 * half + 1` points around each, made of two moving means; NaN stays where it was.
///
/// The window shrinks on both sides towards the start, where a loss falls fastest and a one-sided mean would lie above
/// it, and on the right side only towards the end, where the value that people read should not be one noisy step.
pub(crate) fn smooth(values: &[f64], half: usize) -> Vec<f64> {
    moving_mean(&moving_mean(values, half.div_ceil(2)), half / 2)
}

fn moving_mean(values: &[f64], half: usize) -> Vec<f64> {
    // Sums of all finite values before each index, and how many they are.
    let mut sums = vec![(0.0, 0usize)];
    for value in values {
        let (sum, count) = sums[sums.len() - 1];
        sums.push(if value.is_finite() { (sum + value, count + 1) } else { (sum, count) });
    }
    let mean = |index: usize| {
        let from = index - half.min(index);
        let to = (index + half.min(index) + 1).min(values.len());
        let count = sums[to].1 - sums[from].1;
        (sums[to].0 - sums[from].0) / count as f64
    };
    (0..values.len()).map(|index| if values[index].is_finite() { mean(index) } else { f64::NAN }).collect()
}

/// Half the smoothing window for a run of this many steps: a fortieth of it, none for short runs.
pub(crate) fn half_window(steps: usize) -> usize {
    if steps < 20 { 0 } else { (steps / 40).clamp(2, 500) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_spikes_gaps_and_ends() {
        let mut points: Vec<(f64, f64)> = (0..100_000).map(|i| (i as f64, (i as f64 * 0.01).sin())).collect();
        points[54_321].1 = 50.0;
        points[70_007].1 = f64::NAN;
        let thinned = thin(&points, 600);
        assert!(thinned.len() <= 3000, "{}", thinned.len());
        assert!(thinned.contains(&(54_321.0, 50.0)));
        assert!(thinned.iter().any(|point| point.1.is_nan()));
        assert_eq!((thinned[0], thinned[thinned.len() - 1]), (points[0], points[99_999]));
        assert!(thinned.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn smoothing_keeps_lines_and_gaps() {
        let line: Vec<f64> = (0..50).map(|i| 3.0 - 0.05 * i as f64).collect();
        let smoothed = smooth(&line, 6);
        for index in 0..40 {
            assert!((smoothed[index] - line[index]).abs() < 1e-12, "{index}");
        }
        let mut gap = line.clone();
        gap[20] = f64::NAN;
        let smoothed = smooth(&gap, 6);
        assert!(smoothed[20].is_nan() && smoothed[19].is_finite());
        assert_eq!(smooth(&[], 3), Vec::<f64>::new());
        assert_eq!(smooth(&[2.0], 3), [2.0]);
    }

    #[test]
    fn smoothing_quiets_noise() {
        let noisy: Vec<f64> = (0..400).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let smoothed = smooth(&noisy, half_window(400));
        assert!(smoothed[100..].iter().all(|value| value.abs() < 0.2));
    }
}
