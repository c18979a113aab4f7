//! What a device must do: hold buffers and run the kernels listed in `Kernels`.
//!
//! The list is the whole surface that another device implements. Calls are in order but need not have finished when
//! they return: no kernel returns a number to the host, scalars such as the clipping factor stay on the device, and
//! only `Tensor::to_vec` waits. Shapes are checked by the operations before a kernel is called.

mod buffer;
mod host;

use std::sync::OnceLock;

pub(crate) use buffer::{Buffer, Indices};
use host::Cpu;

pub use crate::cuda::KernelCache;
use crate::cuda::{self, Cuda};
use crate::error::{Error, Result};

use crate::frozen::{FrozenMatrix, FrozenTable, Precision};
use crate::ops::{Anneal, Attention, Binary, Frequencies, Norm, Pattern, Product, Unary};
use crate::optim::AdamW;
use crate::tensor::Tensor;

/// What the process computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    Cpu,
    /// An NVIDIA card, by its number.
    Cuda(usize),
}

static CHOSEN: OnceLock<Device> = OnceLock::new();

/// Makes the whole process compute on `device`; to be called before the first tensor is made. Compiled kernels are kept in
/// `cache`.
///
/// # Errors
/// The card or one of NVIDIA's libraries is not there, or another device is in use already.
pub fn choose(device: Device, cache: Option<Box<dyn KernelCache>>) -> Result<()> {
    let taken = |other: &Device| Error::Device(format!("{other:?} is in use already"));
    if let Some(other) = CHOSEN.get() {
        return if *other == device { Ok(()) } else { Err(taken(other)) };
    }
    if let Device::Cuda(ordinal) = device {
        cuda::open(ordinal, cache)?;
    }
    let _ = CHOSEN.set(device);
    Ok(())
}

/// What the process computes on: the processor, unless [`choose`] came first.
pub fn chosen() -> Device {
    *CHOSEN.get_or_init(|| match crate::testing::device_of_tests() {
        None => Device::Cpu,
        Some(ordinal) => match cuda::open(ordinal, None) {
            Ok(()) => Device::Cuda(ordinal),
            Err(e) => panic!("these tests are to run on a card: {e}"),
        },
    })
}

/// The card in use, if one is.
pub(crate) fn card() -> Option<&'static Cuda> {
    match chosen() {
        Device::Cpu => None,
        Device::Cuda(_) => cuda::card(),
    }
}

/// The kernels of the device in use.
pub(crate) fn device() -> &'static dyn Kernels {
    match card() {
        Some(card) => card,
        None => &Cpu,
    }
}

/// What the model computes in. With bf16 weights a card rounds the factors of other products too, to TF32, and attention's to
/// bf16; the processor computes these in f32 always.
pub fn compute_in(precision: Precision) {
    if let Some(card) = card() {
        card.allow_bf16(precision == Precision::Bf16);
    }
}

/// The instruction set that the kernels use, or the card: what decides a result's last bits.
pub fn name() -> String {
    match card() {
        Some(card) => card.name(),
        None => crate::cpu::gemm::isa().name().into(),
    }
}

/// Numbers that one temporary of a step may hold, such as logits: few beside a large model, enough to keep the device busy.
pub fn temporary_elements() -> usize {
    card().map_or(8 << 20, |card| (card.total_memory() / 1024).max(8 << 20))
}

/// Bytes of the card's memory, where work ended because they did not suffice.
pub fn exhausted() -> Option<u64> {
    card().filter(|card| card.ran_out()).map(|card| card.total_memory() as u64)
}

/// Waits until the device has done everything that it was asked for: for clocks.
///
/// # Errors
/// What went wrong on the card.
pub fn wait() -> Result<()> {
    let Some(card) = card() else { return Ok(()) };
    card.wait();
    card.failure().map_or(Ok(()), |message| Err(Error::Device(message)))
}

/// Times every call of the card by itself from now on, or no longer. Steps are slower then.
pub fn profile(on: bool) {
    if let Some(card) = card() {
        card.profile.switch(on);
    }
}

/// What was timed, the longest first: a kernel or the shape of a product, how often, and its seconds.
pub fn profiled() -> Vec<(String, usize, f64)> {
    card().map(|card| card.profile.calls()).unwrap_or_default()
}

/// The card's name, memory and libraries, without using it; an error says what is missing.
pub fn describe_cards() -> Result<Vec<String>> {
    cuda::describe().map_err(Error::Device)
}

/// The kernels of a device. `y`, `dx`, … are outputs, overwritten unless said otherwise.
pub(crate) trait Kernels {
    /// y = value.
    fn fill(&self, value: f32, y: &mut Buffer);
    /// y[at..at + len(x)] = x.
    fn copy_block(&self, x: &Tensor, y: &mut Buffer, at: usize);
    /// y += x, repeated where y is longer.
    fn accumulate(&self, x: &Tensor, y: &mut Buffer);
    /// y = f(x).
    fn unary(&self, f: Unary, x: &Tensor, y: &mut Buffer);
    /// dx = dy · f′(x).
    fn unary_backward(&self, f: Unary, x: &Tensor, dy: &Tensor, dx: &mut Buffer);
    /// y = f(a, b), both broadcast to `shape`.
    fn binary(&self, f: Binary, a: &Tensor, b: &Tensor, shape: &[usize], y: &mut Buffer);
    /// y = x summed over the dimensions that `shape` (same rank) has as 1.
    fn sum_to(&self, x: &Tensor, shape: &[usize], y: &mut Buffer);
    /// Dimensions of x in the order `order`.
    fn permute(&self, x: &Tensor, order: &[usize], y: &mut Buffer);
    /// Copies x, seen as [outer, width], to columns `at..at + width` of y, seen as [outer, total].
    fn put_columns(&self, x: &Tensor, width: usize, y: &mut Buffer, total: usize, at: usize);
    /// Copies columns `at..at + width` of x, seen as [outer, total], to y [outer, width].
    fn take_columns(&self, x: &Tensor, total: usize, at: usize, width: usize, y: &mut Buffer);
    /// y[i] = x[index[i]], rows of the first dimension.
    fn gather_rows(&self, x: &Tensor, index: &Tensor, y: &mut Buffer);
    /// y[index[i]] += x[i], in order of i; y is not cleared.
    fn scatter_add_rows(&self, x: &Tensor, index: &Tensor, y: &mut Buffer);
    /// y[i] = table row ids[i].
    fn gather_frozen(&self, table: &FrozenTable, ids: &Tensor, y: &mut Buffer);
    /// The `k` largest of each row of `width`, the largest and earliest first, and their columns (`I64`).
    fn top_k(&self, x: &Tensor, width: usize, k: usize, y: &mut Buffer, columns: &mut Buffer);
    /// Shares of a soft choice of k of each segment (its length, k) of s.
    fn soft_top_k(&self, s: &Tensor, segments: &[(usize, usize)], anneal: &Anneal, y: &mut Buffer);
    /// Gradient of the scores in `soft_top_k`.
    fn soft_top_k_backward(
        &self,
        s: &Tensor,
        segments: &[(usize, usize)],
        anneal: &Anneal,
        dy: &Tensor,
        ds: &mut Buffer,
    );
    /// The places of the k largest of each segment, ascending: read on the host.
    fn largest_places(&self, s: &Tensor, segments: &[(usize, usize)]) -> Vec<i64>;
    /// Lower halves of the transforms of rows of n, times `scale`; inner frequencies times `inner` too.
    fn half_spectrum(&self, x: &Tensor, n: usize, inner: f32, scale: f32, y: &mut Buffer);
    /// Sums of the frequencies of half transforms, times `scale`; inner frequencies count `inner` times.
    fn spectrum_sum(&self, x: &Tensor, n: usize, inner: f32, scale: f32, y: &mut Buffer);
    /// y = x·Mᵀ, or x·M where `transposed`, with M the matrix of the frequencies f with coefficients c.
    fn few_frequencies(&self, f: &Frequencies, transposed: bool, c: &Tensor, x: &Tensor, y: &mut Buffer);
    /// Gradient of c in `few_frequencies`.
    fn few_frequencies_backward(&self, f: &Frequencies, x: &Tensor, dy: &Tensor, dc: &mut Buffer);
    /// The Walsh–Hadamard transform of rows of n, in place.
    fn hadamard(&self, n: usize, y: &mut Buffer);
    /// Batched product, see [`Product`].
    fn matmul(&self, p: Product, a: &Tensor, b: &Tensor, y: &mut Buffer);
    /// y = x times the blocks r [count, n, n] on a diagonal, or times their transposes.
    fn block_product(&self, x: &Tensor, r: &Tensor, n: usize, transposed: bool, y: &mut Buffer);
    /// Gradient of the blocks: of each, xᵀ·dy of its columns.
    fn block_gradient(&self, x: &Tensor, dy: &Tensor, n: usize, dr: &mut Buffer);
    /// y = a⁻¹ for matrices a [.., n, n]; not finite where one is singular.
    fn inverse(&self, a: &Tensor, y: &mut Buffer);
    /// q·r = a [m, n] with orthonormal columns q [m, n] and upper triangular r [n, n].
    fn qr(&self, a: &Tensor, q: &mut Buffer, r: &mut Buffer);
    /// The gradient of a from that of q.
    fn qr_backward(&self, q: &Tensor, r: &Tensor, dq: &Tensor, da: &mut Buffer);
    /// y = x·Wᵀ + bias.
    fn frozen_forward(&self, w: &FrozenMatrix, x: &Tensor, bias: Option<&Tensor>, y: &mut Buffer);
    /// dx = dy·W, or dx += dy·W.
    fn frozen_backward(&self, w: &FrozenMatrix, dy: &Tensor, accumulate: bool, dx: &mut Buffer);
    /// y += x·Sᵀ, the entries of S being the pattern's part of `values`.
    fn sparse_forward(&self, s: &Pattern, values: &Tensor, x: &Tensor, y: &mut Buffer);
    /// dx += dy·S.
    fn sparse_backward(&self, s: &Pattern, values: &Tensor, dy: &Tensor, dx: &mut Buffer);
    /// The pattern's part of dv += the entries of dyᵀ·x at its places.
    fn sparse_entries(&self, s: &Pattern, x: &Tensor, dy: &Tensor, dv: &mut Buffer);
    /// w += S.
    fn sparse_scatter(&self, s: &Pattern, values: &Tensor, w: &mut Buffer);
    /// The pattern's part of dv += w at its places.
    fn sparse_gather(&self, s: &Pattern, w: &Tensor, dv: &mut Buffer);
    /// Softmax over rows of `width`.
    fn softmax(&self, x: &Tensor, y: &mut Buffer);
    /// dx = y·(dy − Σ y·dy).
    fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &mut Buffer);
    /// Norm of rows; `stats` receives what backward needs.
    fn norm(
        &self,
        n: Norm,
        x: &Tensor,
        gain: &Tensor,
        bias: Option<&Tensor>,
        y: &mut Buffer,
        stats: &mut Buffer,
    );
    /// Gradients of a norm; gains and biases only where wanted.
    fn norm_backward(&self, n: Norm, g: NormBackward<'_>);
    /// Rotary embedding of x [tokens, heads, dim]; `inverse` rotates back.
    fn rope(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &Tensor, inverse: bool, y: &mut Buffer);
    /// Attention over packed sequences; `lse` [queries, heads] is kept for backward.
    fn attention(&self, a: &Attention, q: &Tensor, k: &Tensor, v: &Tensor, y: &mut Buffer, lse: &mut Buffer);
    /// Gradients of attention.
    fn attention_backward(&self, a: &Attention, g: AttentionBackward<'_>);
    /// y = silu(gate) · up.
    fn silu_mul(&self, gate: &Tensor, up: &Tensor, y: &mut Buffer);
    /// Gradients of `silu_mul`.
    fn silu_mul_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
        dgate: &mut Buffer,
        dup: &mut Buffer,
    );
    /// loss[i] = −log softmax(logits[i])[labels[i]], 0 where the label is −100; `lse` `[rows]` is kept for backward.
    fn cross_entropy(&self, logits: &Tensor, labels: &Tensor, loss: &mut Buffer, lse: &mut Buffer);
    /// x[i] = dloss[i] · (softmax(x[i]) − onehot), in the place of the logits.
    fn cross_entropy_backward(&self, x: &mut Buffer, labels: &Tensor, lse: &Tensor, dloss: &Tensor);
    /// y = x · keep / (1 − p), keep drawn from (seed, stream, element).
    fn dropout(&self, p: f32, seed: u64, stream: u64, x: &Tensor, y: &mut Buffer);
    /// y[0] += Σ x².
    fn add_sum_of_squares(&self, x: &Tensor, y: &mut Buffer);
    /// norm = √squares; scale = min(1, max_norm/(norm + 1e-6)), or 1 where `max_norm` is 0; not finite where norm is not.
    fn clip_scale(&self, squares: &Tensor, max_norm: f32, norm: &mut Buffer, scale: &mut Buffer);
    /// One AdamW update; does nothing when `scale` (one element) is not finite.
    fn adamw(&self, rule: &AdamW, step: u64, scale: &Tensor, grad: &Tensor, state: AdamWState<'_>);
}

/// Arguments of [`Kernels::norm_backward`].
pub(crate) struct NormBackward<'a> {
    pub x: &'a Tensor,
    pub gain: &'a Tensor,
    pub stats: &'a Tensor,
    pub dy: &'a Tensor,
    pub dx: &'a mut Buffer,
    pub dgain: Option<&'a mut Buffer>,
    pub dbias: Option<&'a mut Buffer>,
}

/// Arguments of [`Kernels::attention_backward`].
pub(crate) struct AttentionBackward<'a> {
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub y: &'a Tensor,
    pub lse: &'a Tensor,
    pub dy: &'a Tensor,
    pub dq: Option<&'a mut Buffer>,
    pub dk: Option<&'a mut Buffer>,
    pub dv: Option<&'a mut Buffer>,
    pub dbias: Option<&'a mut Buffer>,
}

/// What [`Kernels::adamw`] changes.
pub(crate) struct AdamWState<'a> {
    pub value: &'a mut Buffer,
    pub m: &'a mut Buffer,
    pub v: &'a mut Buffer,
}
