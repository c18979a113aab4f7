//! Launches of `kernels/transforms.cu`: Fourier and Walsh–Hadamard transforms.

use super::compile::Source;
use super::driver::{Arg, Cuda, DeviceMemory};
use crate::device::Buffer;
use crate::ops::Frequencies;
use crate::tensor::Tensor;

/// Shared memory that a block may use for its rows.
const SHARED: usize = 96 << 10;
/// Numbers of the spectra that exist at a time where they are only on the way: they stay in the card's cache.
const ON_THE_WAY: usize = 1 << 22;
/// Tokens whose gradients are summed first, and numbers and rows of a Hadamard block, as the kernels have them.
const TOKENS: usize = 32;
const NEAR: usize = 4096;
const GROUP: usize = 128;

/// How the blocks of a transform of rows of n are made up.
struct Layout {
    grid: usize,
    block: [u32; 3],
    /// Never none: what the first launch of a kernel asks for decides whether later ones may have more.
    shared: usize,
    scratch: Option<Buffer>,
}

impl Cuda {
    pub(super) fn half_spectrum(&self, x: &Tensor, n: usize, inner: f32, scale: f32, y: &mut Buffer) {
        let roots = self.roots(n);
        self.transform("half_spectrum", (x.arg(), x.len() / n), n, (inner, scale), &roots, y.arg());
    }

    pub(super) fn spectrum_sum(&self, x: &Tensor, n: usize, inner: f32, scale: f32, y: &mut Buffer) {
        let (rows, roots) = (x.len() / (2 * half(n)), self.roots(n));
        self.transform("spectrum_sum", (x.arg(), rows), n, (inner, scale), &roots, y.arg());
    }

    pub(super) fn few_frequencies(
        &self,
        f: &Frequencies,
        transposed: bool,
        c: &Tensor,
        x: &Tensor,
        y: &mut Buffer,
    ) {
        let mut sides = ((f.out, &f.rows), (f.inn, &f.columns));
        if transposed {
            sides = (sides.1, sides.0);
        }
        let ((out, to), (inn, from)) = sides;
        let (places, [starts, which, to, from]) = self.collected(out, to, from);
        let (roots_in, roots_out) = (self.roots(inn), self.roots(out));
        for (first, count) in pieces(x.len() / inn, inn.max(out)) {
            let spectrum = self.spectrum(x, (first, count), inn, &roots_in);
            let mixed = Buffer::f32(count * 2 * half(out));
            let [rows, inn, out_arg] = sizes(count, inn, out);
            let args = [spectrum.arg(), rows, inn, out_arg, starts, which, to, from, c.arg(), mixed.arg()];
            self.launch_over(Source::Transforms, "few_frequencies", count * half(out), &args);
            let target = y.arg().offset(4 * first * out);
            self.transform("spectrum_sum", (mixed.arg(), count), out, (1.0, 1.0), &roots_out, target);
        }
        drop(places);
    }

    pub(super) fn few_frequencies_backward(&self, f: &Frequencies, x: &Tensor, dy: &Tensor, dc: &mut Buffer) {
        let (rows, number) = (x.len() / f.inn, f.rows.len());
        let (to, from) = (self.upload(&f.rows), self.upload(&f.columns));
        let (roots_in, roots_out) = (self.roots(f.inn), self.roots(f.out));
        let parts = Buffer::f32(rows.div_ceil(TOKENS) * number);
        for (first, count) in pieces(rows, f.inn.max(f.out)) {
            let inputs = self.spectrum(x, (first, count), f.inn, &roots_in);
            let outputs = self.spectrum(dy, (first, count), f.out, &roots_out);
            let [tokens, inn, out] = sizes(count, f.inn, f.out);
            let target = parts.arg().offset(4 * (first / TOKENS) * number);
            let (x, dy, number_arg) = (inputs.arg(), outputs.arg(), Arg::I32(number as i32));
            let args = [x, dy, tokens, inn, out, number_arg, to.arg(), from.arg(), target];
            let grid = [number.div_ceil(128), count.div_ceil(TOKENS), 1];
            self.launch(Source::Transforms, "frequency_gradient", grid, [128, 1, 1], 0, &args);
        }
        let [pieces, count] = [rows.div_ceil(TOKENS), number].map(|n| Arg::I64(n as i64));
        let args = [parts.arg(), pieces, count, dc.arg()];
        self.launch_over(Source::Transforms, "frequency_sum", number, &args);
    }

    pub(super) fn hadamard(&self, n: usize, y: &mut Buffer) {
        let total = y.len();
        let args = [y.arg(), Arg::I64(total as i64), Arg::I64(n as i64)];
        self.launch(Source::Transforms, "hadamard_near", [total.div_ceil(NEAR), 1, 1], [256, 1, 1], 0, &args);
        let mut stride = NEAR;
        while stride < n {
            let group = (n / stride).min(GROUP);
            let args = [y.arg(), Arg::I64(stride as i64), Arg::I32(group as i32)];
            let grid = [total / (32 * group), 1, 1];
            self.launch(Source::Transforms, "hadamard_far", grid, [32, 8, 1], 0, &args);
            stride *= group;
        }
    }

    /// Half spectra of rows `first..first + count` of x.
    fn spectrum(&self, x: &Tensor, (first, count): (usize, usize), n: usize, roots: &Buffer) -> Buffer {
        let spectrum = Buffer::f32(count * 2 * half(n));
        let rows = x.arg().offset(4 * first * n);
        self.transform("half_spectrum", (rows, count), n, (1.0, 1.0), roots, spectrum.arg());
        spectrum
    }

    fn transform(
        &self,
        kernel: &'static str,
        (x, rows): (Arg, usize),
        n: usize,
        (inner, scale): (f32, f32),
        roots: &Buffer,
        y: Arg,
    ) {
        let layout = self.layout(n, rows);
        let scratch = layout.scratch.as_ref().map_or(Arg::NULL, Buffer::arg);
        let (rows, n) = (Arg::I64(rows as i64), Arg::I32(n as i32));
        let args = [x, rows, n, Arg::F32(inner), Arg::F32(scale), roots.arg(), scratch, y];
        self.launch(Source::Transforms, kernel, [layout.grid, 1, 1], layout.block, layout.shared, &args);
    }

    /// Short rows share a block; the longest are transformed in the card's memory, by as many blocks as run at once.
    fn layout(&self, n: usize, rows: usize) -> Layout {
        let m = if n.is_multiple_of(2) { n / 2 } else { n };
        let across = (m / 4).next_multiple_of(32).clamp(32, 512);
        let together = (128 / across).max(1);
        let bytes = together * 2 * m * size_of::<[f32; 2]>();
        let block = [across as u32, together as u32, 1];
        if bytes <= SHARED {
            return Layout { grid: rows.div_ceil(together), block, shared: bytes, scratch: None };
        }
        let grid = rows.div_ceil(together).min(2 * self.processors());
        Layout { grid, block, shared: 8, scratch: Some(Buffer::f32(grid * bytes / 4)) }
    }

    /// e^(2πi·k/n) for all k.
    fn roots(&self, n: usize) -> Buffer {
        let roots = Buffer::f32(2 * n);
        self.launch_over(Source::Transforms, "roots", n, &[Arg::I64(n as i64), roots.arg()]);
        roots
    }

    /// For `few_frequencies`: which frequencies each place of half a spectrum of `out` collects, and where all lie.
    fn collected(&self, out: usize, to: &[u32], from: &[u32]) -> (DeviceMemory, [Arg; 4]) {
        let (mut starts, which) = by_place(out, to);
        let ends = [0, starts.len(), which.len(), to.len()];
        starts.extend(which.iter().chain(to).chain(from));
        let memory = self.upload(&starts);
        let mut at = 0;
        let args = ends.map(|length| {
            at += length;
            memory.arg().offset(4 * at)
        });
        (memory, args)
    }
}

/// Frequencies in half a spectrum.
fn half(n: usize) -> usize {
    n / 2 + 1
}

fn sizes(rows: usize, inn: usize, out: usize) -> [Arg; 3] {
    [Arg::I64(rows as i64), Arg::I32(inn as i32), Arg::I32(out as i32)]
}

/// Parts of `rows` rows of up to `width` numbers: where each begins, a multiple of `TOKENS`, and its length.
fn pieces(rows: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = (ON_THE_WAY / width / TOKENS * TOKENS).clamp(TOKENS, 1 << 16);
    (0..rows).step_by(step).map(move |first| (first, step.min(rows - first)))
}

/// Where the frequencies of each place of half a spectrum of n start, and their numbers, ascending.
fn by_place(n: usize, to: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let place = |u: u32| if u as usize <= n / 2 { u as usize } else { n - u as usize };
    let mut starts = vec![0u32; half(n) + 1];
    to.iter().for_each(|&u| starts[place(u) + 1] += 1);
    for at in 0..half(n) {
        starts[at + 1] += starts[at];
    }
    let (mut next, mut which) = (starts.clone(), vec![0; to.len()]);
    for (k, &u) in to.iter().enumerate() {
        which[next[place(u)] as usize] = k as u32;
        next[place(u)] += 1;
    }
    (starts, which)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_collected_where_they_or_their_mirror_images_lie() {
        let (starts, which) = by_place(6, &[5, 0, 1, 3, 5, 4]);
        assert_eq!(starts, [0, 1, 4, 5, 6]);
        assert_eq!(which, [1, 0, 2, 4, 5, 3]);
        assert_eq!(by_place(1, &[0, 0]), (vec![0, 2], vec![0, 1]));
    }
}
