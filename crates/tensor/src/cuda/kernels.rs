//! The list of kernels, each handed to the file that launches it.

use super::driver::Cuda;
use crate::device::{AdamWState, AttentionBackward, Buffer, Kernels, NormBackward};
use crate::frozen::{FrozenMatrix, FrozenTable};
use crate::ops::{Anneal, Attention, Binary, Frequencies, Norm, Pattern, Product, Unary};
use crate::optim::AdamW;
use crate::tensor::Tensor;

impl Kernels for Cuda {
    fn fill(&self, value: f32, y: &mut Buffer) {
        Cuda::fill(self, value, y);
    }
    fn copy_block(&self, x: &Tensor, y: &mut Buffer, at: usize) {
        Cuda::copy_block(self, x, y, at);
    }
    fn accumulate(&self, x: &Tensor, y: &mut Buffer) {
        Cuda::accumulate(self, x, y);
    }
    fn unary(&self, f: Unary, x: &Tensor, y: &mut Buffer) {
        Cuda::unary(self, f, x, y);
    }
    fn unary_backward(&self, f: Unary, x: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        Cuda::unary_backward(self, f, x, dy, dx);
    }
    fn binary(&self, f: Binary, a: &Tensor, b: &Tensor, shape: &[usize], y: &mut Buffer) {
        Cuda::binary(self, f, a, b, shape, y);
    }
    fn sum_to(&self, x: &Tensor, shape: &[usize], y: &mut Buffer) {
        Cuda::sum_to(self, x, shape, y);
    }
    fn permute(&self, x: &Tensor, order: &[usize], y: &mut Buffer) {
        Cuda::permute(self, x, order, y);
    }
    fn put_columns(&self, x: &Tensor, width: usize, y: &mut Buffer, total: usize, at: usize) {
        Cuda::put_columns(self, x, width, y, total, at);
    }
    fn take_columns(&self, x: &Tensor, total: usize, at: usize, width: usize, y: &mut Buffer) {
        Cuda::take_columns(self, x, total, at, width, y);
    }
    fn gather_rows(&self, x: &Tensor, index: &Tensor, y: &mut Buffer) {
        Cuda::gather_rows(self, x, index, y);
    }
    fn scatter_add_rows(&self, x: &Tensor, index: &Tensor, y: &mut Buffer) {
        Cuda::scatter_add_rows(self, x, index, y);
    }
    fn gather_frozen(&self, table: &FrozenTable, ids: &Tensor, y: &mut Buffer) {
        self.look_up(table.on_card(self.precision()), ids, y);
    }
    fn top_k(&self, x: &Tensor, width: usize, k: usize, y: &mut Buffer, columns: &mut Buffer) {
        Cuda::top_k(self, x, width, k, y, columns);
    }
    fn soft_top_k(&self, s: &Tensor, segments: &[(usize, usize)], anneal: &Anneal, y: &mut Buffer) {
        Cuda::soft_top_k(self, s, segments, anneal, y);
    }
    fn soft_top_k_backward(
        &self,
        s: &Tensor,
        segments: &[(usize, usize)],
        anneal: &Anneal,
        dy: &Tensor,
        ds: &mut Buffer,
    ) {
        Cuda::soft_top_k_backward(self, s, segments, anneal, dy, ds);
    }
    fn largest_places(&self, s: &Tensor, segments: &[(usize, usize)]) -> Vec<i64> {
        Cuda::largest_places(self, s, segments)
    }
    fn half_spectrum(&self, x: &Tensor, n: usize, inner: f32, scale: f32, y: &mut Buffer) {
        Cuda::half_spectrum(self, x, n, inner, scale, y);
    }
    fn spectrum_sum(&self, x: &Tensor, n: usize, inner: f32, scale: f32, y: &mut Buffer) {
        Cuda::spectrum_sum(self, x, n, inner, scale, y);
    }
    fn few_frequencies(&self, f: &Frequencies, transposed: bool, c: &Tensor, x: &Tensor, y: &mut Buffer) {
        Cuda::few_frequencies(self, f, transposed, c, x, y);
    }
    fn few_frequencies_backward(&self, f: &Frequencies, x: &Tensor, dy: &Tensor, dc: &mut Buffer) {
        Cuda::few_frequencies_backward(self, f, x, dy, dc);
    }
    fn hadamard(&self, n: usize, y: &mut Buffer) {
        Cuda::hadamard(self, n, y);
    }
    fn matmul(&self, p: Product, a: &Tensor, b: &Tensor, y: &mut Buffer) {
        if p.batch * p.m * p.n == 0 {
            return;
        }
        if p.k == 0 {
            return self.empty_sum(p, None, y);
        }
        self.product(p, a, b, y);
    }
    fn block_product(&self, x: &Tensor, r: &Tensor, n: usize, transposed: bool, y: &mut Buffer) {
        Cuda::block_product(self, x, r, n, transposed, y);
    }
    fn block_gradient(&self, x: &Tensor, dy: &Tensor, n: usize, dr: &mut Buffer) {
        Cuda::block_gradient(self, x, dy, n, dr);
    }
    fn inverse(&self, a: &Tensor, y: &mut Buffer) {
        Cuda::inverse(self, a, y);
    }
    fn qr(&self, a: &Tensor, q: &mut Buffer, r: &mut Buffer) {
        Cuda::qr(self, a, q, r);
    }
    fn qr_backward(&self, q: &Tensor, r: &Tensor, dq: &Tensor, da: &mut Buffer) {
        Cuda::qr_backward(self, q, r, dq, da);
    }
    fn frozen_forward(&self, w: &FrozenMatrix, x: &Tensor, bias: Option<&Tensor>, y: &mut Buffer) {
        self.frozen_product(w.on_card(), x, bias, y);
    }
    fn frozen_backward(&self, w: &FrozenMatrix, dy: &Tensor, accumulate: bool, dx: &mut Buffer) {
        self.frozen_product_back(w.on_card(), dy, accumulate, dx);
    }
    fn sparse_forward(&self, s: &Pattern, values: &Tensor, x: &Tensor, y: &mut Buffer) {
        Cuda::sparse_forward(self, s, values, x, y);
    }
    fn sparse_backward(&self, s: &Pattern, values: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        Cuda::sparse_backward(self, s, values, dy, dx);
    }
    fn sparse_entries(&self, s: &Pattern, x: &Tensor, dy: &Tensor, dv: &mut Buffer) {
        Cuda::sparse_entries(self, s, x, dy, dv);
    }
    fn sparse_scatter(&self, s: &Pattern, values: &Tensor, w: &mut Buffer) {
        Cuda::sparse_scatter(self, s, values, w);
    }
    fn sparse_gather(&self, s: &Pattern, w: &Tensor, dv: &mut Buffer) {
        Cuda::sparse_gather(self, s, w, dv);
    }
    fn softmax(&self, x: &Tensor, y: &mut Buffer) {
        Cuda::softmax(self, x, y);
    }
    fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        Cuda::softmax_backward(self, y, dy, dx);
    }
    fn norm(
        &self,
        n: Norm,
        x: &Tensor,
        gain: &Tensor,
        bias: Option<&Tensor>,
        y: &mut Buffer,
        stats: &mut Buffer,
    ) {
        Cuda::norm(self, n, x, gain, bias, y, stats);
    }
    fn norm_backward(&self, n: Norm, g: NormBackward<'_>) {
        Cuda::norm_backward(self, n, g);
    }
    fn rope(
        &self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        positions: &Tensor,
        inverse: bool,
        y: &mut Buffer,
    ) {
        Cuda::rope(self, x, cos, sin, positions, inverse, y);
    }
    fn attention(&self, a: &Attention, q: &Tensor, k: &Tensor, v: &Tensor, y: &mut Buffer, lse: &mut Buffer) {
        Cuda::attention(self, a, q, k, v, y, lse, self.bf16_allowed());
    }
    fn attention_backward(&self, a: &Attention, g: AttentionBackward<'_>) {
        Cuda::attention_backward(self, a, g, self.bf16_allowed());
    }
    fn silu_mul(&self, gate: &Tensor, up: &Tensor, y: &mut Buffer) {
        Cuda::silu_mul(self, gate, up, y);
    }
    fn silu_mul_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
        dgate: &mut Buffer,
        dup: &mut Buffer,
    ) {
        Cuda::silu_mul_backward(self, gate, up, dy, dgate, dup);
    }
    fn cross_entropy(&self, logits: &Tensor, labels: &Tensor, loss: &mut Buffer, lse: &mut Buffer) {
        Cuda::cross_entropy(self, logits, labels, loss, lse);
    }
    fn cross_entropy_backward(&self, x: &mut Buffer, labels: &Tensor, lse: &Tensor, dloss: &Tensor) {
        Cuda::cross_entropy_backward(self, x, labels, lse, dloss);
    }
    fn dropout(&self, p: f32, seed: u64, stream: u64, x: &Tensor, y: &mut Buffer) {
        Cuda::dropout(self, p, seed, stream, x, y);
    }
    fn add_sum_of_squares(&self, x: &Tensor, y: &mut Buffer) {
        Cuda::add_sum_of_squares(self, x, y);
    }
    fn clip_scale(&self, squares: &Tensor, max_norm: f32, norm: &mut Buffer, scale: &mut Buffer) {
        Cuda::clip_scale(self, squares, max_norm, norm, scale);
    }
    fn adamw(&self, rule: &AdamW, step: u64, scale: &Tensor, grad: &Tensor, state: AdamWState<'_>) {
        Cuda::adamw(self, rule, step, scale, grad, state);
    }
}
