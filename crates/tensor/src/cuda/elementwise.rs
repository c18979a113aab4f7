//! Launches of `kernels/elementwise.cu`: functions of single elements, and copies that reorder.

use super::compile::Source;
use super::driver::{Arg, Cuda, Dims};
use crate::device::Buffer;
use crate::ops::{Binary, Unary};
use crate::tensor::Tensor;

fn count(n: usize) -> Arg {
    Arg::I64(n as i64)
}

/// The function's number in `enum Unary` of the kernels, and its parameter.
fn opcode(f: Unary) -> (i32, f32) {
    match f {
        Unary::Scale(c) => (0, c),
        Unary::Shift(c) => (1, c),
        Unary::Exp => (2, 0.0),
        Unary::Sin => (3, 0.0),
        Unary::Cos => (4, 0.0),
        Unary::Log => (5, 0.0),
        Unary::Sqrt => (6, 0.0),
        Unary::Recip => (7, 0.0),
        Unary::Square => (8, 0.0),
        Unary::Abs => (9, 0.0),
        Unary::Relu => (10, 0.0),
        Unary::Silu => (11, 0.0),
        Unary::Gelu => (12, 0.0),
        Unary::GeluTanh => (13, 0.0),
        Unary::QuickGelu => (14, 0.0),
        Unary::Sigmoid => (15, 0.0),
        Unary::Tanh => (16, 0.0),
        Unary::Erf => (17, 0.0),
        Unary::LnGamma | Unary::Digamma => unreachable!("{f:?} has a kernel of its own"),
    }
}

/// Which derivative of ln Γ the function is.
fn order_of_gamma(f: Unary) -> Option<i32> {
    match f {
        Unary::LnGamma => Some(0),
        Unary::Digamma => Some(1),
        _ => None,
    }
}

fn opcode_of_two(f: Binary) -> i32 {
    match f {
        Binary::Add => 0,
        Binary::Sub => 1,
        Binary::Mul => 2,
    }
}

/// How an operand of shape `of` repeats in the shape `to`: number (i / inner) % len at i. None where its own dimensions
/// are not next to one another.
fn periods(of: &[usize], to: &[usize]) -> Option<(usize, usize)> {
    let missing = to.len() - of.len();
    let own: Vec<usize> = (0..of.len()).filter(|&d| of[d] != 1).map(|d| d + missing).collect();
    let (Some(&first), Some(&last)) = (own.first(), own.last()) else { return Some((1, 1)) };
    let contiguous = (first..=last).all(|d| of[d - missing] == to[d]);
    contiguous.then(|| (to[last + 1..].iter().product(), of.iter().product()))
}

/// Steps of an operand of shape `of` in the shape `to`: 0 where it repeats.
fn strides(of: &[usize], to: &[usize]) -> Vec<usize> {
    let mut strides = vec![0; to.len()];
    let mut step = 1;
    for (d, &size) in of.iter().enumerate().rev() {
        if size != 1 {
            strides[d + to.len() - of.len()] = step;
        }
        step *= size;
    }
    strides
}

/// Sizes of `shape` and strides of its dimensions in the order `order`, the slowest first: without those of size 1, and
/// those made one that stay neighbours.
fn simplified(shape: &[usize], order: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let steps = strides(shape, shape);
    let (mut sizes, mut kept) = (Vec::<usize>::new(), Vec::<usize>::new());
    for (size, step) in order.iter().map(|&d| (shape[d], steps[d])).filter(|&(size, _)| size != 1) {
        match (sizes.last_mut(), kept.last_mut()) {
            (Some(before), Some(stride)) if *stride == size * step => {
                *before *= size;
                *stride = step;
            }
            _ => {
                sizes.push(size);
                kept.push(step);
            }
        }
    }
    (sizes, kept)
}

impl Cuda {
    /// Launches over `n` elements, four a thread.
    fn launch_fours(&self, kernel: &'static str, n: usize, args: &[Arg]) {
        self.launch_over(Source::Elementwise, kernel, n.div_ceil(4), args);
    }

    pub(super) fn fill(&self, value: f32, y: &mut Buffer) {
        self.launch_fours("fill", y.len(), &[Arg::F32(value), y.arg(), count(y.len())]);
    }

    pub(super) fn copy_block(&self, x: &Tensor, y: &mut Buffer, at: usize) {
        self.copy(x.arg().address(), y.arg().offset(4 * at).address(), 4 * x.len());
    }

    pub(super) fn accumulate(&self, x: &Tensor, y: &mut Buffer) {
        if !x.is_empty() {
            let args = [x.arg(), count(x.len()), y.arg(), count(y.len())];
            self.launch_fours("accumulate", y.len(), &args);
        }
    }

    pub(super) fn unary(&self, f: Unary, x: &Tensor, y: &mut Buffer) {
        if let Some(order) = order_of_gamma(f) {
            return self.gamma_function(order, x, Arg::NULL, y);
        }
        let (f, c) = opcode(f);
        self.launch_fours("unary", x.len(), &[Arg::I32(f), Arg::F32(c), x.arg(), y.arg(), count(x.len())]);
    }

    pub(super) fn unary_backward(&self, f: Unary, x: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        if let Some(order) = order_of_gamma(f) {
            return self.gamma_function(order + 1, x, dy.arg(), dx);
        }
        let (f, c) = opcode(f);
        let args = [Arg::I32(f), Arg::F32(c), x.arg(), dy.arg(), dx.arg(), count(x.len())];
        self.launch_fours("unary_backward", x.len(), &args);
    }

    fn gamma_function(&self, order: i32, x: &Tensor, dy: Arg, y: &mut Buffer) {
        let args = [Arg::I32(order), x.arg(), dy, y.arg(), count(x.len())];
        self.launch_over(Source::Elementwise, "gamma_function", x.len(), &args);
    }

    pub(super) fn binary(&self, f: Binary, a: &Tensor, b: &Tensor, shape: &[usize], y: &mut Buffer) {
        let (op, n) = (Arg::I32(opcode_of_two(f)), y.len());
        if let (Some(of_a), Some(of_b)) = (periods(a.shape(), shape), periods(b.shape(), shape)) {
            let (a, b) = ([a.arg(), count(of_a.0), count(of_a.1)], [b.arg(), count(of_b.0), count(of_b.1)]);
            let args = [op, a[0], a[1], a[2], b[0], b[1], b[2], y.arg(), count(n)];
            return self.launch_fours("binary", n, &args);
        }
        let steps = |of: &Tensor| Arg::Dims(Dims::of(&strides(of.shape(), shape)));
        let sizes = Arg::Dims(Dims::of(shape));
        let args = [op, a.arg(), steps(a), b.arg(), steps(b), sizes, y.arg(), count(n)];
        self.launch_over(Source::Elementwise, "binary_strided", n, &args);
    }

    pub(super) fn permute(&self, x: &Tensor, order: &[usize], y: &mut Buffer) {
        let n = x.len();
        if n == 0 {
            return;
        }
        let (mut sizes, mut steps) = simplified(x.shape(), order);
        if sizes.len() <= 1 {
            return self.copy_block(x, y, 0);
        }
        let last = sizes.len() - 1;
        // The two last dimensions change places, whatever matrices these are of.
        let (rows, columns) = (sizes[last], sizes[last - 1]);
        let swapped = steps[last] == columns && steps[last - 1] == 1;
        if swapped && (last == 1 || last == 2 && steps[0] == rows * columns) {
            let blocks = n / (rows * columns) * rows.div_ceil(32) * columns.div_ceil(32);
            let args = [x.arg(), y.arg(), count(rows), count(columns)];
            return self.launch(Source::Elementwise, "transpose", [blocks, 1, 1], [32, 8, 1], 0, &args);
        }
        let aligned = x.arg().address().is_multiple_of(16) && y.arg().address().is_multiple_of(16);
        let fours = aligned && steps[last] == 1 && sizes[last].is_multiple_of(4);
        let (kernel, n) = if fours { ("permute_fours", n / 4) } else { ("permute", n) };
        if fours {
            sizes[last] /= 4;
            steps[..last].iter_mut().for_each(|step| *step /= 4);
        }
        let [sizes, steps] = [sizes, steps].map(|dims| Arg::Dims(Dims::of(&dims)));
        self.launch_over(Source::Elementwise, kernel, n, &[x.arg(), steps, sizes, y.arg(), count(n)]);
    }

    pub(super) fn put_columns(&self, x: &Tensor, width: usize, y: &mut Buffer, total: usize, at: usize) {
        if width > 0 {
            self.copy_columns((x.arg(), width), (y.arg().offset(4 * at), total), width, x.len() / width);
        }
    }

    pub(super) fn take_columns(&self, x: &Tensor, total: usize, at: usize, width: usize, y: &mut Buffer) {
        if width > 0 {
            self.copy_columns((x.arg().offset(4 * at), total), (y.arg(), width), width, x.len() / total);
        }
    }

    /// Columns of a matrix from one place to another, each with the length of its rows.
    fn copy_columns(&self, from: (Arg, usize), to: (Arg, usize), width: usize, rows: usize) {
        let args = [from.0, count(from.1), to.0, count(to.1), count(width), count(rows)];
        self.launch_fours("copy_columns", rows * width, &args);
    }

    pub(super) fn dropout(&self, p: f32, seed: u64, stream: u64, x: &Tensor, y: &mut Buffer) {
        let threshold = (f64::from(p) * 4_294_967_296.0).round() as u64;
        let scale = if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 };
        let draw = [Arg::U64(threshold), Arg::F32(scale), Arg::U64(seed), Arg::U64(stream)];
        let args = [draw[0], draw[1], draw[2], draw[3], x.arg(), y.arg(), count(x.len())];
        self.launch_fours("dropout", x.len(), &args);
    }

    pub(super) fn silu_mul(&self, gate: &Tensor, up: &Tensor, y: &mut Buffer) {
        let args = |y: Arg| [gate.arg(), up.arg(), y, count(up.len())];
        if !self.bf16_allowed() {
            return self.launch_fours("silu_mul", up.len(), &args(y.arg()));
        }
        let short = self.take(2 * up.len());
        self.launch_fours("silu_mul_bf16", up.len(), &args(short.arg()));
        y.hold_bf16(short);
    }

    pub(super) fn silu_mul_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
        dgate: &mut Buffer,
        dup: &mut Buffer,
    ) {
        let args = |dgate: Arg, dup: Arg| [gate.arg(), up.arg(), dy.arg(), dgate, dup, count(dy.len())];
        if !self.bf16_allowed() {
            return self.launch_fours("silu_mul_backward", dy.len(), &args(dgate.arg(), dup.arg()));
        }
        let [gates, ups] = [(); 2].map(|()| self.take(2 * dy.len()));
        self.launch_fours("silu_mul_backward_bf16", dy.len(), &args(gates.arg(), ups.arg()));
        dgate.hold_bf16(gates);
        dup.hold_bf16(ups);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_repeat_in_one_period_where_they_can() {
        assert_eq!(periods(&[2, 3], &[2, 3]), Some((1, 6)));
        assert_eq!(periods(&[3], &[2, 3]), Some((1, 3)));
        assert_eq!(periods(&[2, 1], &[2, 3]), Some((3, 2)));
        assert_eq!(periods(&[5, 1], &[4, 5, 3]), Some((3, 5)));
        assert_eq!(periods(&[], &[2, 3]), Some((1, 1)));
        assert_eq!(periods(&[1, 1], &[2, 1]), Some((1, 1)));
        assert_eq!(periods(&[2, 1, 3], &[2, 4, 3]), None);
        assert_eq!(strides(&[2, 1, 3], &[5, 2, 4, 3]), [0, 3, 0, 1]);
    }

    #[test]
    fn orders_are_made_as_short_as_they_can_be() {
        assert_eq!(simplified(&[2, 3, 4], &[0, 1, 2]), (vec![24], vec![1]));
        assert_eq!(simplified(&[2, 3, 4], &[2, 0, 1]), (vec![4, 6], vec![1, 4]));
        assert_eq!(simplified(&[2, 1, 3, 4], &[0, 3, 1, 2]), (vec![2, 4, 3], vec![12, 1, 4]));
        assert_eq!(simplified(&[2, 3, 4], &[1, 0, 2]), (vec![3, 2, 4], vec![4, 12, 1]));
        assert_eq!(simplified(&[1, 1], &[1, 0]), (vec![], vec![]));
    }
}
