//! The assignment of least cost: the hard case of optimal transport with equal masses on both sides.

/// For each row the column it is given, so that the sum of `cost[row][column]` is least (Kuhn 1955; the shortest augmenting
/// paths of Jonker and Volgenant 1987, n³ steps). Of equals the lower column.
pub(super) fn assign(cost: &[Vec<f64>]) -> Vec<usize> {
    let n = cost.len();
    // Potentials of rows and columns; row 0 and column 0 stand for "none".
    let (mut rows, mut columns) = (vec![0.0f64; n + 1], vec![0.0f64; n + 1]);
    let mut row_of = vec![0usize; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        let (mut least, mut from) = (vec![f64::INFINITY; n + 1], vec![0usize; n + 1]);
        let mut visited = vec![false; n + 1];
        let mut at = 0;
        while row_of[at] != 0 {
            visited[at] = true;
            let (here, mut step, mut next) = (row_of[at], f64::INFINITY, 0);
            for column in (1..=n).filter(|&column| !visited[column]) {
                let reduced = cost[here - 1][column - 1] - rows[here] - columns[column];
                if reduced < least[column] {
                    (least[column], from[column]) = (reduced, at);
                }
                if least[column] < step {
                    (step, next) = (least[column], column);
                }
            }
            for column in 0..=n {
                if visited[column] {
                    rows[row_of[column]] += step;
                    columns[column] -= step;
                } else {
                    least[column] -= step;
                }
            }
            at = next;
        }
        // Along the path each column takes the row of the one before it.
        while at != 0 {
            row_of[at] = row_of[from[at]];
            at = from[at];
        }
    }
    let mut given = vec![0; n];
    (1..=n).for_each(|column| given[row_of[column] - 1] = column - 1);
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(cost: &[Vec<f64>], given: &[usize]) -> f64 {
        given.iter().enumerate().map(|(row, &column)| cost[row][column]).sum()
    }

    /// The least of all orders.
    fn least(cost: &[Vec<f64>], given: &mut Vec<usize>) -> f64 {
        if given.len() == cost.len() {
            return total(cost, given);
        }
        let free: Vec<usize> = (0..cost.len()).filter(|column| !given.contains(column)).collect();
        free.into_iter().fold(f64::INFINITY, |best, column| {
            given.push(column);
            let found = least(cost, given);
            given.pop();
            best.min(found)
        })
    }

    #[test]
    fn no_other_order_costs_less() {
        for seed in 0..40u64 {
            let n = 1 + (seed % 6) as usize;
            let values = engraft_tensor::testing::sample(&[n, n], seed).to_vec().unwrap();
            // Some with many equal costs.
            let round = |v: &f32| if seed % 3 == 0 { f64::from(*v).round() } else { f64::from(*v) };
            let cost: Vec<Vec<f64>> = values.chunks(n).map(|row| row.iter().map(round).collect()).collect();
            let given = assign(&cost);
            let mut sorted = given.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n).collect::<Vec<_>>(), "each column once");
            assert!(
                (total(&cost, &given) - least(&cost, &mut Vec::new())).abs() < 1e-9,
                "{cost:?} {given:?}"
            );
        }
        assert!(assign(&[]).is_empty());
    }
}
