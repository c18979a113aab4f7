//! Fourier transforms of rows of real numbers, and products with matrices of few frequencies.

use std::cell::RefCell;

use rayon::prelude::*;
use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use std::sync::Arc;

use crate::cpu::simd::{dispatch, fma, sum16};
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

/// Where frequency `k` of `n` lies in the lower half of a transform whose exponents are negative, and the sign that its
/// imaginary part has there when the exponents are positive.
fn in_half(k: u32, n: usize) -> (u32, f32) {
    if k as usize <= n / 2 { (k, -1.0) } else { (n as u32 - k, 1.0) }
}

/// The lower halves of the transforms of up to `ROWS` rows, a frequency's parts of all rows side by side.
type Halves = [[[f32; ROWS]; 2]];

fn no_halves(n: usize) -> Vec<[[f32; ROWS]; 2]> {
    vec![[[0.0; ROWS]; 2]; n / 2 + 1]
}

/// The transforms of the rows x `[rows, n]`.
fn halves(forward: &mut Forward, x: &[f32], n: usize, into: &mut Halves) {
    for (row, x) in x.chunks_exact(n).enumerate() {
        for (into, value) in into.iter_mut().zip(forward.run(x)) {
            (into[0][row], into[1][row]) = (value.re, value.im);
        }
    }
}

/// What a coefficient does: the frequency `from` of the rows, its parts times these two, is added to the frequency `to`.
struct Move {
    from: u32,
    to: u32,
    real: f32,
    imaginary: f32,
}

#[inline(always)]
fn move_all_body<const L: usize>(moves: &[Move], x: &Halves, y: &mut Halves) {
    for m in moves {
        let (x, y) = (&x[m.from as usize], &mut y[m.to as usize]);
        for row in 0..ROWS {
            y[0][row] = fma::<L>(m.real, x[0][row], y[0][row]);
            y[1][row] = fma::<L>(m.imaginary, x[1][row], y[1][row]);
        }
    }
}

/// The frequencies of `f` between the lower halves, both of positive exponents: (row's, column's, the product of their signs).
fn places(f: &Frequencies) -> impl Iterator<Item = (u32, u32, f32)> + '_ {
    f.rows.iter().zip(&f.columns).map(|(&u, &v)| {
        let ((u, u_sign), (v, v_sign)) = (in_half(u, f.out), in_half(v, f.inn));
        (u, v, u_sign * v_sign)
    })
}

/// y[t, o] = Σₖ cₖ Σᵢ x[t, i]·cos(2π(uₖ·o/out + vₖ·i/in)), with (u, v) the frequencies of `f`.
pub fn few_frequencies(f: &Frequencies, transposed: bool, c: &[f32], x: &[f32], y: &mut [f32]) {
    let (inn, out) = if transposed { (f.out, f.inn) } else { (f.inn, f.out) };
    let moves: Vec<Move> = places(f)
        .zip(c)
        .map(|((u, v, sign), &c)| {
            let (from, to) = if transposed { (u, v) } else { (v, u) };
            // The transform back counts what lies inside twice: with its mirror image. Its exponents are positive.
            let real = if at_edge(to as usize, out) { c } else { 0.5 * c };
            Move { from, to, real, imaginary: -sign * real }
        })
        .collect();
    y.par_chunks_mut(out * ROWS).zip(x.par_chunks(inn * ROWS)).for_each(|(y, x)| {
        let (mut forward, mut backward) = (Forward::new(inn), Backward::new(out));
        let (mut read, mut written) = (no_halves(inn), no_halves(out));
        halves(&mut forward, x, inn, &mut read);
        move_all(&moves, &read, &mut written);
        for (row, y) in y.chunks_exact_mut(out).enumerate() {
            for (half, written) in backward.half.iter_mut().zip(&written) {
                *half = Complex::new(written[0][row], written[1][row]);
            }
            backward.run(y);
        }
    });
}

#[inline(always)]
fn add_products_body<const L: usize>(places: &[(u32, u32, f32)], dy: &Halves, x: &Halves, sums: &mut [f32]) {
    for (sum, &(u, v, sign)) in sums.iter_mut().zip(places) {
        let (dy, x) = (&dy[u as usize], &x[v as usize]);
        let row = |row: usize| fma::<L>(dy[0][row], x[0][row], -sign * dy[1][row] * x[1][row]);
        *sum += sum16(std::array::from_fn(row));
    }
}

dispatch! {
    fn move_all(moves: &[Move], x: &Halves, y: &mut Halves) = move_all_body;
    fn add_products(places: &[(u32, u32, f32)], dy: &Halves, x: &Halves, sums: &mut [f32]) = add_products_body;
}

/// `dc[k] = Σₜ Σₒᵢ dy[t, o]·x[t, i]·cos(2π(uₖ·o/out + vₖ·i/in))`.
pub fn few_frequencies_backward(f: &Frequencies, x: &[f32], dy: &[f32], dc: &mut [f32]) {
    let places: Vec<(u32, u32, f32)> = places(f).collect();
    let parts: Vec<Vec<f32>> = x
        .par_chunks(f.inn * ROWS)
        .zip(dy.par_chunks(f.out * ROWS))
        .map(|(x, dy)| {
            let (mut of_x, mut of_dy) = (no_halves(f.inn), no_halves(f.out));
            halves(&mut Forward::new(f.inn), x, f.inn, &mut of_x);
            halves(&mut Forward::new(f.out), dy, f.out, &mut of_dy);
            let mut sums = vec![0.0; places.len()];
            add_products(&places, &of_dy, &of_x, &mut sums);
            sums
        })
        .collect();
    dc.fill(0.0);
    for part in parts {
        dc.iter_mut().zip(part).for_each(|(dc, part)| *dc += part);
    }
}
