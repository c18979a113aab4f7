//! Launches of `kernels/rows.cu`: sums, lookups, softmax, norms, losses, choices, and the optimizer's step.
//!
//! How a sum is cut into parts depends on the shape alone, so that its bits are the same on every card and in every run.

use super::compile::Source;
use super::driver::{Arg, Cuda};
use crate::device::{AdamWState, Buffer, NormBackward};
use crate::ops::Norm;
use crate::optim::AdamW;
use crate::tensor::Tensor;

/// Longer rows are summed in several parts.
const LONGEST_ROW: usize = 1 << 15;
/// The most parts of a sum over rows.
const MOST_PARTS: usize = 1024;
/// Threads of a block of the first and of the second stage of a sum over rows.
const STAGES: [usize; 2] = [256, 1024];
/// Up to so many of a row are found one after another; for more the row is sorted.
const FEW: usize = 16;
/// Keys that one block sorts, as in the kernels.
const SORTED_TOGETHER: usize = 2048;

fn count(n: usize) -> Arg {
    Arg::I64(n as i64)
}

/// How a sum over rows is cut: into blocks of columns side by side and rows below one another, and parts of the rows.
struct Cut {
    block: [u32; 3],
    tiles: usize,
    rows_per_part: usize,
    parts: usize,
}

impl Cut {
    fn new(rows: usize, width: usize, threads: usize, most_parts: usize) -> Cut {
        let deep = rows.div_ceil(16).next_power_of_two().min(threads / 32);
        let across = width.next_power_of_two().min(threads / deep);
        let deep = threads / across;
        let rows_per_part = rows.div_ceil(most_parts).max(if most_parts > 1 { 16 * deep } else { 1 });
        Cut {
            block: [across as u32, deep as u32, 1],
            tiles: width.div_ceil(across),
            rows_per_part,
            parts: rows.div_ceil(rows_per_part),
        }
    }

    fn args(&self) -> [Arg; 3] {
        [count(self.rows_per_part), count(self.parts), count(self.tiles)]
    }
}

/// Neighbouring dimensions as one where both are summed or both stay: their sizes, and whether they are summed.
fn groups(from: &[usize], to: &[usize]) -> Vec<(usize, bool)> {
    let mut groups: Vec<(usize, bool)> = Vec::new();
    for (&size, &kept) in from.iter().zip(to).filter(|(size, _)| **size != 1) {
        let summed = kept == 1;
        match groups.last_mut() {
            Some(group) if group.1 == summed => group.0 *= size,
            _ => groups.push((size, summed)),
        }
    }
    groups
}

impl Cuda {
    /// Launches over rows of `width`, a team of threads each.
    fn launch_rows(&self, kernel: &'static str, rows: usize, width: usize, args: &[Arg]) {
        let (threads, rows_per_block) = match width {
            ..=512 => (32, 8),
            513..=2048 => (128, 1),
            2049..=8192 => (256, 1),
            8193..=32768 => (512, 1),
            _ => (1024, 1),
        };
        let grid = [rows.div_ceil(rows_per_block), 1, 1];
        self.launch(Source::Rows, kernel, grid, [threads, rows_per_block as u32, 1], 0, args);
    }

    pub(super) fn sum_to(&self, x: &Tensor, shape: &[usize], y: &mut Buffer) {
        if x.is_empty() {
            return self.fill(0.0, y);
        }
        let mut groups = groups(x.shape(), shape);
        if !groups.iter().any(|group| group.1) {
            return self.copy_block(x, y, 0);
        }
        // The last dimensions first: the numbers grow fewer fast.
        let mut sum: Option<Buffer> = None;
        while let Some(at) = groups.iter().rposition(|group| group.1) {
            let size = |groups: &[(usize, bool)]| groups.iter().map(|group| group.0).product::<usize>();
            let (outer, inner) = (size(&groups[..at]), size(&groups[at + 1..]));
            let rows = groups.remove(at).0;
            let from = sum.as_ref().map_or_else(|| x.arg(), Buffer::arg);
            if groups.iter().any(|group| group.1) {
                let next = Buffer::f32(outer * inner);
                self.sum_middle(from, [outer, rows, inner], next.arg());
                sum = Some(next);
            } else {
                self.sum_middle(from, [outer, rows, inner], y.arg());
            }
        }
    }

    /// y [outer, inner] = x [outer, rows, inner] summed over its rows.
    fn sum_middle(&self, x: Arg, [outer, rows, inner]: [usize; 3], y: Arg) {
        if inner == 1 && rows <= LONGEST_ROW {
            return self.launch_rows("sum_rows", outer, rows, &[x, count(outer), count(rows), y]);
        }
        let cut = Cut::new(rows, inner, STAGES[0], MOST_PARTS);
        if cut.parts == 1 {
            return self.column_sums(x, [outer, rows, inner], &cut, y);
        }
        let partial = Buffer::f32(outer * cut.parts * inner);
        self.column_sums(x, [outer, rows, inner], &cut, partial.arg());
        self.sum_parts(partial.arg(), [outer, cut.parts, inner], y);
    }

    /// The second stage of a sum over rows.
    fn sum_parts(&self, partial: Arg, [outer, parts, inner]: [usize; 3], y: Arg) {
        let cut = Cut::new(parts, inner, STAGES[1], 1);
        self.column_sums(partial, [outer, parts, inner], &cut, y);
    }

    fn column_sums(&self, x: Arg, [outer, rows, inner]: [usize; 3], cut: &Cut, y: Arg) {
        let [per_part, parts, tiles] = cut.args();
        let args = [x, count(rows), count(inner), per_part, parts, tiles, y];
        let grid = [outer * cut.parts * cut.tiles, 1, 1];
        self.launch(Source::Rows, "column_sums", grid, cut.block, 0, &args);
    }

    pub(super) fn gather_rows(&self, x: &Tensor, index: &Tensor, y: &mut Buffer) {
        if y.len() > 0 {
            let args = [x.arg(), index.arg(), count(y.len() / index.len()), count(index.len()), y.arg()];
            self.launch_over(Source::Rows, "gather_rows", y.len().div_ceil(4), &args);
        }
    }

    /// The order is the host's work: indices come from there, and each row of y is then one thread's sum a column.
    pub(super) fn scatter_add_rows(&self, x: &Tensor, index: &Tensor, y: &mut Buffer) {
        if x.is_empty() {
            return;
        }
        let (index, width) = (index.i64(), x.len() / index.len());
        let mut source: Vec<i64> = (0..index.len() as i64).collect();
        if !index.is_sorted() {
            // A stable sort keeps the order of those that go to the same row.
            source.sort_by_key(|&i| index[i as usize]);
        }
        let (mut targets, mut starts) = (Vec::new(), Vec::new());
        for (at, &i) in source.iter().enumerate() {
            let target = index[i as usize];
            if targets.last() != Some(&target) {
                targets.push(target);
                starts.push(at as i64);
            }
        }
        starts.push(source.len() as i64);
        let n = targets.len();
        let lists = self.upload(&[targets, starts, source].concat());
        let [targets, starts, source] = [0, n, 2 * n + 1].map(|at| lists.arg().offset(8 * at));
        let args = [x.arg(), targets, starts, source, count(width), count(n), y.arg()];
        self.launch_over(Source::Rows, "scatter_add_rows", n * width, &args);
    }

    pub(super) fn top_k(&self, x: &Tensor, width: usize, k: usize, y: &mut Buffer, columns: &mut Buffer) {
        if x.is_empty() || k == 0 {
            return;
        }
        let rows = x.len() / width;
        if k <= FEW {
            let args = [x.arg(), count(rows), count(width), count(k), y.arg(), columns.arg()];
            return self.launch_rows("few_largest", rows, width, &args);
        }
        let size = width.next_power_of_two();
        let n = rows * size;
        // Keys of 64 bits.
        let keys = Buffer::f32(2 * n);
        let args = [x.arg(), count(width), count(size), count(n), keys.arg()];
        self.launch_over(Source::Rows, "make_keys", n, &args);
        self.sort_rows(keys.arg(), size, n);
        let args = [keys.arg(), count(size), count(k), count(rows * k), y.arg(), columns.arg()];
        self.launch_over(Source::Rows, "take_sorted", rows * k, &args);
    }

    /// Sorts rows of `size` keys, a power of two, into descending order: `n` keys in all.
    fn sort_rows(&self, keys: Arg, size: usize, n: usize) {
        let together = |first: usize, last: usize| {
            let grid = [n.div_ceil(SORTED_TOGETHER), 1, 1];
            let args = [keys, count(size), count(first), count(last), count(n)];
            let threads = (SORTED_TOGETHER / 2) as u32;
            self.launch(Source::Rows, "sort_together", grid, [threads, 1, 1], 0, &args);
        };
        together(2, size.min(SORTED_TOGETHER));
        let mut run = 2 * SORTED_TOGETHER;
        while run <= size {
            let mut apart = run / 2;
            while apart >= SORTED_TOGETHER {
                let args = [keys, count(size), count(run), count(apart), count(n)];
                self.launch_over(Source::Rows, "sort_step", n / 2, &args);
                apart /= 2;
            }
            together(run, run);
            run *= 2;
        }
    }

    pub(super) fn softmax(&self, x: &Tensor, y: &mut Buffer) {
        let (rows, width) = (x.rows(), x.width());
        if width > 0 {
            self.launch_rows("softmax", rows, width, &[x.arg(), count(rows), count(width), y.arg()]);
        }
    }

    pub(super) fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        let (rows, width) = (y.rows(), y.width());
        if width > 0 {
            let args = [y.arg(), dy.arg(), count(rows), count(width), dx.arg()];
            self.launch_rows("softmax_backward", rows, width, &args);
        }
    }

    pub(super) fn norm(
        &self,
        n: Norm,
        x: &Tensor,
        gain: &Tensor,
        bias: Option<&Tensor>,
        y: &mut Buffer,
        stats: &mut Buffer,
    ) {
        let (rows, width) = (x.rows(), x.width());
        if width == 0 {
            return;
        }
        let (mean, rstd) = places_of_stats(n, stats.arg(), rows);
        let (Norm::Layer { eps } | Norm::Rms { eps }) = n;
        let bias = bias.filter(|_| matches!(n, Norm::Layer { .. })).map_or(Arg::NULL, Tensor::arg);
        let sizes = [count(rows), count(width)];
        let args = [x.arg(), gain.arg(), bias, Arg::F32(eps), sizes[0], sizes[1], y.arg(), mean, rstd];
        self.launch_rows("norm_rows", rows, width, &args);
    }

    pub(super) fn norm_backward(&self, n: Norm, g: NormBackward<'_>) {
        let (rows, width) = (g.x.rows(), g.x.width());
        if rows == 0 || width == 0 {
            return g.dgain.into_iter().chain(g.dbias).for_each(|sum| self.fill(0.0, sum));
        }
        let (mean, rstd) = places_of_stats(n, g.stats.arg(), rows);
        let (x, dy, sizes) = (g.x.arg(), g.dy.arg(), [count(rows), count(width)]);
        let args = [x, g.gain.arg(), mean, rstd, dy, sizes[0], sizes[1], g.dx.arg()];
        self.launch_rows("norm_rows_backward", rows, width, &args);
        if g.dgain.is_none() && g.dbias.is_none() {
            return;
        }
        let cut = Cut::new(rows, width, STAGES[0], MOST_PARTS);
        let [per_part, parts, tiles] = cut.args();
        let wanted = [g.dgain, g.dbias];
        let partial = wanted.each_ref().map(|sum| sum.is_some().then(|| Buffer::f32(cut.parts * width)));
        let [dgain, dbias] = partial.each_ref().map(|sums| sums.as_ref().map_or(Arg::NULL, Buffer::arg));
        let args = [x, mean, rstd, dy, sizes[0], sizes[1], per_part, parts, tiles, dgain, dbias];
        self.launch(Source::Rows, "norm_sums", [cut.parts * cut.tiles, 1, 1], cut.block, 0, &args);
        for (sums, sum) in partial.iter().zip(wanted) {
            if let (Some(sums), Some(sum)) = (sums, sum) {
                self.sum_parts(sums.arg(), [1, cut.parts, width], sum.arg());
            }
        }
    }

    pub(super) fn rope(
        &self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        positions: &Tensor,
        inverse: bool,
        y: &mut Buffer,
    ) {
        let (heads, dim, half) = (x.dim(1), x.dim(2), cos.width());
        let n = x.dim(0) * heads * (dim - half);
        let sign = Arg::F32(if inverse { -1.0 } else { 1.0 });
        let [heads, dim, half, of] = [heads, dim, half, n].map(count);
        let args = [x.arg(), cos.arg(), sin.arg(), positions.arg(), sign, heads, dim, half, of, y.arg()];
        self.launch_over(Source::Rows, "rope", n, &args);
    }

    pub(super) fn cross_entropy(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        loss: &mut Buffer,
        lse: &mut Buffer,
    ) {
        let (rows, width) = (labels.len(), logits.width());
        let args = [logits.arg(), labels.arg(), count(rows), count(width), loss.arg(), lse.arg()];
        self.launch_rows("cross_entropy", rows, width, &args);
    }

    pub(super) fn cross_entropy_backward(
        &self,
        x: &mut Buffer,
        labels: &Tensor,
        lse: &Tensor,
        dloss: &Tensor,
    ) {
        let (rows, width) = (labels.len(), x.len() / labels.len().max(1));
        let args = |dx| [x.arg(), labels.arg(), lse.arg(), dloss.arg(), count(rows), count(width), dx];
        if !self.bf16_allowed() {
            return self.launch_rows("cross_entropy_backward", rows, width, &args(x.arg()));
        }
        let short = self.take(2 * x.len());
        self.launch_rows("cross_entropy_backward_bf16", rows, width, &args(short.arg()));
        x.hold_bf16(short);
    }

    pub(super) fn add_sum_of_squares(&self, x: &Tensor, y: &mut Buffer) {
        if x.is_empty() {
            return;
        }
        let blocks = x.len().div_ceil(4096).min(MOST_PARTS);
        // Sums of 64 bits.
        let partial = Buffer::f32(2 * blocks);
        let args = [x.arg(), count(x.len()), partial.arg()];
        self.launch(Source::Rows, "sum_of_squares", [blocks, 1, 1], [256, 1, 1], 0, &args);
        let args = [partial.arg(), count(blocks), y.arg()];
        self.launch(Source::Rows, "add_total", [1; 3], [1024, 1, 1], 0, &args);
    }

    pub(super) fn clip_scale(&self, squares: &Tensor, max_norm: f32, norm: &mut Buffer, scale: &mut Buffer) {
        let args = [squares.arg(), Arg::F32(max_norm), norm.arg(), scale.arg()];
        self.launch(Source::Rows, "clip_scale", [1; 3], [1; 3], 0, &args);
    }

    pub(super) fn adamw(
        &self,
        rule: &AdamW,
        step: u64,
        scale: &Tensor,
        grad: &Tensor,
        state: AdamWState<'_>,
    ) {
        // Worked out in f64 and rounded once, as on the processor.
        let power = |beta: f64| beta.powf(step as f64);
        let [keep, beta1, rest1, beta2, rest2, correction2, eps, step_size] = [
            1.0 - rule.learning_rate * rule.weight_decay,
            rule.beta1,
            1.0 - rule.beta1,
            rule.beta2,
            1.0 - rule.beta2,
            (1.0 - power(rule.beta2)).sqrt(),
            rule.eps,
            rule.learning_rate / (1.0 - power(rule.beta1)),
        ]
        .map(|scalar| Arg::F32(scalar as f32));
        let (value, m, v) = (state.value.arg(), state.m.arg(), state.v.arg());
        let scalars = [keep, beta1, rest1, beta2, rest2, correction2, eps, step_size];
        let args = [&[scale.arg(), grad.arg(), value, m, v][..], &scalars, &[count(grad.len())]].concat();
        self.launch_over(Source::Rows, "adamw", grad.len().div_ceil(4), &args);
    }
}

/// Where the means, if there are any, and the reciprocal deviations of `rows` rows lie.
fn places_of_stats(n: Norm, stats: Arg, rows: usize) -> (Arg, Arg) {
    match n {
        Norm::Layer { .. } => (stats, stats.offset(4 * rows)),
        Norm::Rms { .. } => (Arg::NULL, stats),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_dimensions_are_summed_as_one() {
        assert_eq!(groups(&[2, 3, 4], &[1, 1, 4]), [(6, true), (4, false)]);
        assert_eq!(groups(&[2, 3, 4], &[2, 1, 4]), [(2, false), (3, true), (4, false)]);
        assert_eq!(groups(&[2, 1, 4], &[2, 1, 4]), [(8, false)]);
        assert_eq!(groups(&[1, 5], &[1, 1]), [(5, true)]);
    }

    #[test]
    fn a_cut_has_every_row_and_column_once() {
        for (rows, width) in [(1, 1), (7, 3), (16384, 4096), (1 << 20, 1), (300_000, 128), (5, 100_000)] {
            for (threads, most) in [(STAGES[0], MOST_PARTS), (STAGES[1], 1)] {
                let cut = Cut::new(rows, width, threads, most);
                let [across, deep, _] = cut.block.map(|n| n as usize);
                assert_eq!(across * deep, threads);
                assert!(across.is_power_of_two() && deep.is_power_of_two());
                assert!(cut.tiles * across >= width && (cut.tiles - 1) * across < width);
                assert!(cut.parts <= most && cut.parts * cut.rows_per_part >= rows);
                assert!((cut.parts - 1) * cut.rows_per_part < rows);
            }
        }
    }
}
