//! Fourier transforms of rows of real numbers, and products with matrices of few frequencies.

use std::cell::RefCell;

use rayon::prelude::*;
use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use std::sync::Arc;

use crate::ops::Frequencies;

/// Rows that one task transforms.
const ROWS: usize = 16;

thread_local! {
    // Plans are made once a length and thread.
    static PLANNER: RefCell<RealFftPlanner<f32>> = RefCell::new(RealFftPlanner::new());
}

/// A row of real numbers to the lower half of its transform.
struct Forward {
    plan: Arc<dyn RealToComplex<f32>>,
    row: Vec<f32>,
    half: Vec<Complex<f32>>,
    scratch: Vec<Complex<f32>>,
}

impl Forward {
    fn new(n: usize) -> Forward {
        let plan = PLANNER.with_borrow_mut(|planner| planner.plan_fft_forward(n));
        let (row, half, scratch) = (plan.make_input_vec(), plan.make_output_vec(), plan.make_scratch_vec());
        Forward { plan, row, half, scratch }
    }

    fn run(&mut self, x: &[f32]) -> &[Complex<f32>] {
        self.row.copy_from_slice(x);
        self.plan
            .process_with_scratch(&mut self.row, &mut self.half, &mut self.scratch)
            .expect("the buffers are the plan's own");
        &self.half
    }
}

/// The lower half of a transform to its row of real numbers, not divided by their number.
struct Backward {
    plan: Arc<dyn ComplexToReal<f32>>,
    half: Vec<Complex<f32>>,
    scratch: Vec<Complex<f32>>,
}

impl Backward {
    fn new(n: usize) -> Backward {
        let plan = PLANNER.with_borrow_mut(|planner| planner.plan_fft_inverse(n));
        let (half, scratch) = (plan.make_input_vec(), plan.make_scratch_vec());
        Backward { plan, half, scratch }
    }

    /// From `self.half`, which is used up.
    fn run(&mut self, y: &mut [f32]) {
        self.half[0].im = 0.0;
        if y.len().is_multiple_of(2) {
            self.half[y.len() / 2].im = 0.0;
        }
        self.plan
            .process_with_scratch(&mut self.half, y, &mut self.scratch)
            .expect("the buffers are the plan's own");
    }
}

/// Whether frequency `k` of `n` is its own mirror image.
fn at_edge(k: usize, n: usize) -> bool {
    k == 0 || 2 * k == n
}

/// x [rows, n] → y [rows, n/2 + 1, 2]: real and imaginary parts, times `scale`, and times `inner` but for the frequencies
/// that are their own mirror images.
pub fn half_spectrum(x: &[f32], n: usize, inner: f32, scale: f32, y: &mut [f32]) {
    let width = 2 * (n / 2 + 1);
    y.par_chunks_mut(width * ROWS).zip(x.par_chunks(n * ROWS)).for_each(|(y, x)| {
        let mut forward = Forward::new(n);
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(n)) {
            for ((k, value), y) in forward.run(x).iter().enumerate().zip(y.chunks_exact_mut(2)) {
                let edge = at_edge(k, n);
                let factor = if edge { scale } else { scale * inner };
                y[0] = value.re * factor;
                y[1] = if edge { 0.0 } else { value.im * factor };
            }
        }
    });
}

/// x [rows, n/2 + 1, 2] → y [rows, n]: the sum of all frequencies, times `scale`; those that are not their own mirror
/// images count `inner` times. Imaginary parts of those that are count nothing.
pub fn spectrum_sum(x: &[f32], n: usize, inner: f32, scale: f32, y: &mut [f32]) {
    let width = 2 * (n / 2 + 1);
    y.par_chunks_mut(n * ROWS).zip(x.par_chunks(width * ROWS)).for_each(|(y, x)| {
        let mut backward = Backward::new(n);
        for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(width)) {
            for ((k, value), x) in backward.half.iter_mut().enumerate().zip(x.chunks_exact(2)) {
                let factor = if at_edge(k, n) { scale } else { scale * inner };
                *value = Complex::new(x[0] * factor, x[1] * factor);
            }
            backward.run(y);
        }
    });
}

/// Σₚ xₚ·e^(2πi·k·p/n), from the lower half of the transform of the row x, whose exponents are negative.
fn at(half: &[Complex<f32>], k: usize, n: usize) -> Complex<f32> {
    if k <= n / 2 { half[k].conj() } else { half[n - k] }
}

/// y[t, o] = Σₖ cₖ Σᵢ x[t, i]·cos(2π(uₖ·o/out + vₖ·i/in)), with (u, v) the frequencies of `f`.
pub fn few_frequencies(f: &Frequencies, transposed: bool, c: &[f32], x: &[f32], y: &mut [f32]) {
    let (mut to, mut from) = ((f.out, &f.rows), (f.inn, &f.columns));
    if transposed {
        (to, from) = (from, to);
    }
    let ((out, to), (inn, from)) = (to, from);
    y.par_chunks_mut(out * ROWS).zip(x.par_chunks(inn * ROWS)).for_each(|(y, x)| {
        let (mut forward, mut backward) = (Forward::new(inn), Backward::new(out));
        for (y, x) in y.chunks_exact_mut(out).zip(x.chunks_exact(inn)) {
            let half = forward.run(x);
            backward.half.fill(Complex::default());
            for ((&c, &u), &v) in c.iter().zip(to).zip(from) {
                let (u, value) = (u as usize, at(half, v as usize, inn) * c);
                // The transform back counts what lies inside twice: with its mirror image.
                if at_edge(u, out) {
                    backward.half[u].re += value.re;
                } else if u <= out / 2 {
                    backward.half[u] += value * 0.5;
                } else {
                    backward.half[out - u] += value.conj() * 0.5;
                }
            }
            backward.run(y);
        }
    });
}

/// `dc[k] = Σₜ Σₒᵢ dy[t, o]·x[t, i]·cos(2π(uₖ·o/out + vₖ·i/in))`.
pub fn few_frequencies_backward(f: &Frequencies, x: &[f32], dy: &[f32], dc: &mut [f32]) {
    let parts: Vec<Vec<f32>> = x
        .par_chunks(f.inn * ROWS)
        .zip(dy.par_chunks(f.out * ROWS))
        .map(|(x, dy)| {
            let (mut inputs, mut outputs) = (Forward::new(f.inn), Forward::new(f.out));
            let mut sum = vec![0.0; f.rows.len()];
            for (x, dy) in x.chunks_exact(f.inn).zip(dy.chunks_exact(f.out)) {
                let (x, dy) = (inputs.run(x), outputs.run(dy));
                for ((sum, &u), &v) in sum.iter_mut().zip(&f.rows).zip(&f.columns) {
                    *sum += (at(dy, u as usize, f.out) * at(x, v as usize, f.inn)).re;
                }
            }
            sum
        })
        .collect();
    dc.fill(0.0);
    for part in parts {
        dc.iter_mut().zip(part).for_each(|(dc, part)| *dc += part);
    }
}
