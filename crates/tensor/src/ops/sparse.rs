//! A sparse matrix of trained values, added to a frozen one: its product, its scattered sum, and the values' gradient.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::cpu::sparse::Places;
use crate::cuda::{Arg, Cuda, DeviceMemory};
use crate::device::device;
use crate::error::{Error, Result, shape_error};
use crate::tensor::Tensor;

/// Where the entries of a sparse matrix S [out, in] are, and which part of a vector of values is theirs.
#[derive(Debug)]
pub struct Pattern {
    starts: Vec<usize>,
    columns: Vec<u32>,
    inn: usize,
    first: usize,
    by_row: OnceLock<OnCard>,
    by_column: OnceLock<OnCard>,
}

/// Entries on a card, kept from when it first wanted them: where those of each row start and the column of each; and, where
/// rows are the columns of S, its number in S.
struct OnCard(DeviceMemory, DeviceMemory, Option<DeviceMemory>);

impl OnCard {
    fn args(&self) -> [Arg; 3] {
        [self.0.arg(), self.1.arg(), self.2.as_ref().map_or(Arg::Ptr(0), DeviceMemory::arg)]
    }
}

impl fmt::Debug for OnCard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("on a card")
    }
}

impl Pattern {
    /// Entries at the ascending flat places `row·in + column`; their values are those of a vector from `first` on.
    ///
    /// # Errors
    /// Places outside the matrix, out of order or twice.
    pub fn new(places: impl IntoIterator<Item = u64>, shape: (usize, usize), first: usize) -> Result<Self> {
        Self::checked(places, shape, first, false)
    }

    /// The same where a place may occur several times: its values add up.
    ///
    /// # Errors
    /// Places outside the matrix or out of order.
    pub fn with_repeats(
        places: impl IntoIterator<Item = u64>,
        shape: (usize, usize),
        first: usize,
    ) -> Result<Self> {
        Self::checked(places, shape, first, true)
    }

    fn checked(
        places: impl IntoIterator<Item = u64>,
        (out, inn): (usize, usize),
        first: usize,
        repeats: bool,
    ) -> Result<Self> {
        let (mut starts, mut columns) = (vec![0; out + 1], Vec::new());
        let (size, width) = ((out * inn) as u64, inn.max(1) as u64);
        let mut before = None;
        for place in places {
            if place >= size || before.is_some_and(|before| place < before || place == before && !repeats) {
                let message = format!(
                    "expected ascending places in {out}×{inn}, found {place} after {}",
                    before.map_or("none".into(), |place| place.to_string())
                );
                return Err(Error::Value { op: "sparse", message });
            }
            before = Some(place);
            starts[(place / width) as usize + 1] += 1;
            columns.push((place % width) as u32);
        }
        for row in 0..out {
            starts[row + 1] += starts[row];
        }
        Ok(Pattern { starts, columns, inn, first, by_row: OnceLock::new(), by_column: OnceLock::new() })
    }

    /// (out, in).
    pub fn shape(&self) -> (usize, usize) {
        (self.starts.len() - 1, self.inn)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    pub(crate) fn places(&self) -> Places<'_> {
        Places { starts: &self.starts, columns: &self.columns, inn: self.inn }
    }

    /// Its part of a vector of values.
    pub(crate) fn part<'v>(&self, values: &'v [f32]) -> &'v [f32] {
        &values[self.first..self.first + self.len()]
    }

    /// Its part of a vector of values.
    pub(crate) fn part_mut<'v>(&self, values: &'v mut [f32]) -> &'v mut [f32] {
        &mut values[self.first..self.first + self.len()]
    }

    /// Its part of a vector of values on a card.
    pub(crate) fn part_on_card(&self, values: Arg) -> Arg {
        values.offset(4 * self.first)
    }

    /// Starts and columns on the card, and no order.
    pub(crate) fn by_row(&self, card: &Cuda) -> [Arg; 3] {
        let kept = || OnCard(card.upload(&self.starts), card.upload(&self.columns), None);
        self.by_row.get_or_init(kept).args()
    }

    /// The same of Sᵀ, and the number in S of each of its entries; those of a column stay in their order.
    pub(crate) fn by_column(&self, card: &Cuda) -> [Arg; 3] {
        let kept = || {
            let (starts, rows, order) = self.turned();
            OnCard(card.upload(&starts), card.upload(&rows), Some(card.upload(&order)))
        };
        self.by_column.get_or_init(kept).args()
    }

    /// Where the entries of each column start, the row of each, and its number.
    fn turned(&self) -> (Vec<usize>, Vec<u32>, Vec<u32>) {
        let mut starts = vec![0; self.inn + 1];
        self.columns.iter().for_each(|&column| starts[column as usize + 1] += 1);
        for column in 0..self.inn {
            starts[column + 1] += starts[column];
        }
        let mut next = starts.clone();
        let (mut rows, mut order) = (vec![0; self.len()], vec![0; self.len()]);
        for (row, range) in self.starts.windows(2).enumerate() {
            for entry in range[0]..range[1] {
                let place = &mut next[self.columns[entry] as usize];
                (rows[*place], order[*place]) = (row as u32, entry as u32);
                *place += 1;
            }
        }
        (starts, rows, order)
    }

    fn expect_values(&self, values: &Tensor) -> Result<()> {
        values.expect_f32("sparse values")?;
        let end = self.first + self.len();
        if values.shape().len() != 1 || values.len() < end {
            return shape_error(
                "sparse values",
                format!("a vector of {end} or more"),
                format!("{:?}", values.shape()),
            );
        }
        Ok(())
    }
}

impl Tensor {
    /// self + x·Sᵀ; self [.., out], x [.., in], the values `[n]` of S at the places that `pattern` says.
    ///
    /// Added in place where nobody else holds `self`. Kept for backward is x. The gradient of a value at row o and column i
    /// is Σ dy[t, o]·x[t, i]: dyᵀ·x is computed at these places alone. dx += dy·S.
    pub fn add_sparse(mut self, x: &Tensor, values: &Tensor, pattern: &Arc<Pattern>) -> Result<Tensor> {
        self.expect_f32("sparse")?;
        x.expect_f32("sparse")?;
        pattern.expect_values(values)?;
        let (out, inn) = pattern.shape();
        if self.shape().is_empty()
            || x.shape().is_empty()
            || self.rows() != x.rows()
            || self.width() != out
            || x.width() != inn
        {
            let found = format!("{:?} and {:?}", self.shape(), x.shape());
            return shape_error("sparse", format!("[.., {out}] and [.., {inn}]"), found);
        }
        let base = self.edge();
        device().sparse_forward(pattern, values, x, self.own());
        let (ex, ev) = (x.edge(), values.edge());
        let below = self.detach().with_node(base.0.clone());
        let (kept_x, kept_values, pattern) =
            (ev.wanted().then(|| x.detach()), values.detach(), pattern.clone());
        let shape = x.shape().to_vec();
        Ok(self.detach().on_tape("sparse", &[&below, x, values], move |dy, sink| {
            if let Some(x) = kept_x {
                sink.grow(&ev, kept_values.shape(), |dv, accumulate| {
                    if !accumulate {
                        device().fill(0.0, dv);
                    }
                    device().sparse_entries(&pattern, &x, &dy, dv);
                })?;
            }
            sink.grow(&ex, &shape, |dx, accumulate| {
                if !accumulate {
                    device().fill(0.0, dx);
                }
                device().sparse_backward(&pattern, &kept_values, &dy, dx);
            })?;
            sink.add(&base, dy)
        }))
    }

    /// self + S; self [out, in]. The gradient of a value is that of its place.
    pub fn scatter_sparse(mut self, values: &Tensor, pattern: &Arc<Pattern>) -> Result<Tensor> {
        self.expect_f32("sparse")?;
        pattern.expect_values(values)?;
        let (out, inn) = pattern.shape();
        self.expect_shape("sparse", &[out, inn])?;
        let base = self.edge();
        device().sparse_scatter(pattern, values, self.own());
        let (ev, pattern, shape) = (values.edge(), pattern.clone(), values.shape().to_vec());
        let below = self.detach().with_node(base.0.clone());
        Ok(self.detach().on_tape("sparse sum", &[&below, values], move |dw, sink| {
            sink.grow(&ev, &shape, |dv, accumulate| {
                if !accumulate {
                    device().fill(0.0, dv);
                }
                device().sparse_gather(&pattern, &dw, dv);
            })?;
            sink.add(&base, dw)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::param::Param;
    use crate::testing::{check_gradients, close, sample};

    const PLACES: [u64; 6] = [1, 3, 4, 11, 30, 34];

    fn pattern(first: usize) -> Arc<Pattern> {
        Arc::new(Pattern::new(PLACES, (7, 5), first).unwrap())
    }

    /// S as a dense matrix, from the definition.
    fn dense(values: &Tensor, first: usize) -> Tensor {
        let mut all = vec![0.0; 35];
        for (place, value) in PLACES.iter().zip(&values.to_vec().unwrap()[first..]) {
            all[*place as usize] = *value;
        }
        Tensor::from_vec(all, [7, 5]).unwrap()
    }

    #[test]
    fn the_product_is_that_of_the_dense_matrix() {
        for (rows, first) in [(1, 0), (3, 2), (33, 0), (130, 1)] {
            let (y, x, values) = (sample(&[rows, 7], 1), sample(&[rows, 5], 2), sample(&[9], 3));
            let expected = y.add(&x.matmul_t(&dense(&values, first)).unwrap()).unwrap();
            close(&y.clone().add_sparse(&x, &values, &pattern(first)).unwrap(), &expected, 1e-6);
            close(&y, &sample(&[rows, 7], 1), 0.0);
            let w = sample(&[7, 5], 4);
            let sum = w.clone().scatter_sparse(&values, &pattern(first)).unwrap();
            close(&sum, &w.add(&dense(&values, first)).unwrap(), 0.0);
        }
    }

    #[test]
    fn turned_over_the_entries_of_a_column_keep_their_order() {
        let pattern = Pattern::with_repeats([0, 2, 2, 8, 9], (3, 4), 0).unwrap();
        let (starts, rows, order) = pattern.turned();
        assert_eq!(starts, [0, 2, 3, 5, 5]);
        assert_eq!(rows, [0, 2, 2, 0, 0]);
        assert_eq!(order, [0, 3, 4, 1, 2]);
    }

    #[test]
    fn gradients_are_finite_differences() {
        let (y, x, values, w) =
            (sample(&[2, 3, 7], 1), sample(&[2, 3, 5], 2), sample(&[9], 3), sample(&[7, 5], 4));
        check_gradients(&[y, x.clone(), values.clone()], |v| {
            v[0].clone().add_sparse(&v[1], &v[2], &pattern(2))
        })
        .unwrap();
        check_gradients(&[w, values.clone()], |v| v[0].clone().scatter_sparse(&v[1], &pattern(0))).unwrap();
        // Two matrices share a vector of values, and one input serves twice.
        check_gradients(&[x, values], |v| {
            let h = v[0].scale(0.5)?;
            let first = Tensor::zeros([2, 3, 7]).add_sparse(&h, &v[1], &pattern(0))?;
            h.matmul_t(&sample(&[7, 5], 6))?.add_sparse(&h, &v[1], &pattern(3))?.mul(&first)
        })
        .unwrap();
    }

    #[test]
    fn the_gradient_of_many_rows_is_the_dense_one_at_the_places() {
        let (rows, out, inn) = (201, 90, 70);
        let places: Vec<u64> = (0..out as u64 * inn as u64).filter(|p| p % 3 != 1).collect();
        let pattern = Arc::new(Pattern::new(places.iter().copied(), (out, inn), 0).unwrap());
        assert!(pattern.len() > 4096, "several tasks");
        let (x, dy) = (sample(&[rows, inn], 1), sample(&[rows, out], 2));
        let values = Param::new(sample(&[pattern.len()], 3));
        let y = Tensor::zeros([rows, out]).add_sparse(&x, &values.get(), &pattern).unwrap();
        let gradients = y.backward_from(dy.clone()).unwrap();
        let whole = dy.t_matmul(&x).unwrap().to_vec().unwrap();
        let expected = places.iter().map(|&p| whole[p as usize]).collect();
        close(gradients.get(&values).unwrap(), &Tensor::from_vec(expected, [places.len()]).unwrap(), 1e-5);
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let (x, values) = (sample(&[150, 5], 1), sample(&[6], 2));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (x, v) = (Param::new(x.clone()), Param::new(values.clone()));
                let y = Tensor::zeros([150, 7]).add_sparse(&x.get(), &v.get(), &pattern(0)).unwrap();
                let g = y.backward_from(sample(&[150, 7], 5)).unwrap();
                [y.to_vec(), g.get(&x).unwrap().to_vec(), g.get(&v).unwrap().to_vec()].map(Result::unwrap)
            })
        };
        assert_eq!(run(1), run(2));
    }

    #[test]
    fn places_and_shapes_that_do_not_fit_are_errors() {
        for bad in [vec![3, 2], vec![4, 4], vec![35]] {
            assert!(Pattern::new(bad, (7, 5), 0).is_err());
        }
        let (x, y) = (sample(&[3, 5], 1), sample(&[3, 7], 2));
        assert!(y.clone().add_sparse(&x, &sample(&[7], 3), &pattern(2)).is_err(), "too few values");
        assert!(y.clone().add_sparse(&sample(&[2, 5], 1), &sample(&[9], 3), &pattern(0)).is_err());
        assert!(sample(&[5, 7], 1).scatter_sparse(&sample(&[9], 3), &pattern(0)).is_err());
    }

    #[test]
    fn a_small_share_of_a_matrix_needs_no_gradient_of_its_size() {
        let (rows, out, inn) = (64, 4096, 4096);
        let places = (0..(out * inn) as u64).step_by(200);
        let pattern = Arc::new(Pattern::new(places, (out, inn), 0).unwrap());
        let values = Param::new(Tensor::zeros([pattern.len()]));
        let (x, y) = (sample(&[rows, inn], 1), Tensor::zeros([rows, out]));
        crate::memory::reset_peak();
        let before = crate::memory::live_bytes();
        let gradients = y.add_sparse(&x, &values.get(), &pattern).unwrap().sum().unwrap().backward().unwrap();
        let most = crate::memory::peak_bytes() - before;
        assert_eq!(gradients.get(&values).unwrap().len(), pattern.len());
        // Other tests run meanwhile, with small tensors.
        assert!(
            most < 4 * out * inn / 2,
            "{most} bytes, where a gradient of the matrix takes {}",
            4 * out * inn
        );
    }
}
