//! The CPU as a device: one line from each entry of the list to its kernel on slices.

use super::{AttentionBackward, Buffer, Kernels, NormBackward};
use crate::cpu::{adamw, attention, cross_entropy, dropout, math, norm, primitives, rope};
use crate::frozen::{FrozenMatrix, RowSource};
use crate::ops::{Attention, Binary, Norm, Product, Unary};
use crate::optim::AdamW;
use crate::tensor::Tensor;

/// The CPU.
pub(crate) struct Cpu;

/// The device every tensor lives on.
pub(crate) fn cpu() -> &'static Cpu {
    &Cpu
}

impl Kernels for Cpu {
    fn fill(&self, value: f32, y: &mut Buffer) {
        y.as_f32_mut().fill(value);
    }
    fn copy_block(&self, x: &Tensor, y: &mut Buffer, at: usize) {
        y.as_f32_mut()[at..at + x.len()].copy_from_slice(x.f32());
    }
    fn accumulate(&self, x: &Tensor, y: &mut Buffer) {
        primitives::accumulate(x.f32(), y.as_f32_mut());
    }
    fn unary(&self, f: Unary, x: &Tensor, y: &mut Buffer) {
        primitives::unary(f, x.f32(), y.as_f32_mut());
    }
    fn unary_backward(&self, f: Unary, x: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        primitives::unary_backward(f, x.f32(), dy.f32(), dx.as_f32_mut());
    }
    fn binary(&self, f: Binary, a: &Tensor, b: &Tensor, shape: &[usize], y: &mut Buffer) {
        primitives::binary(f, (a.f32(), a.shape()), (b.f32(), b.shape()), shape, y.as_f32_mut());
    }
    fn sum_to(&self, x: &Tensor, shape: &[usize], y: &mut Buffer) {
        primitives::sum_to(x.f32(), x.shape(), shape, y.as_f32_mut());
    }
    fn permute(&self, x: &Tensor, order: &[usize], y: &mut Buffer) {
        primitives::permute(x.f32(), x.shape(), order, y.as_f32_mut());
    }
    fn put_columns(&self, x: &Tensor, width: usize, y: &mut Buffer, total: usize, at: usize) {
        if width > 0 {
            let rows = x.f32().chunks_exact(width).zip(y.as_f32_mut().chunks_exact_mut(total));
            rows.for_each(|(x, y)| y[at..at + width].copy_from_slice(x));
        }
    }
    fn take_columns(&self, x: &Tensor, total: usize, at: usize, width: usize, y: &mut Buffer) {
        if width > 0 {
            let rows = x.f32().chunks_exact(total).zip(y.as_f32_mut().chunks_exact_mut(width));
            rows.for_each(|(x, y)| y.copy_from_slice(&x[at..at + width]));
        }
    }
    fn gather_rows(&self, x: &Tensor, index: &Tensor, y: &mut Buffer) {
        primitives::gather_rows(x.f32(), index.i64(), y.as_f32_mut());
    }
    fn scatter_add_rows(&self, x: &Tensor, index: &Tensor, y: &mut Buffer) {
        primitives::scatter_add_rows(x.f32(), index.i64(), y.as_f32_mut());
    }
    fn gather_frozen(&self, table: &dyn RowSource, ids: &Tensor, y: &mut Buffer) {
        let width = table.shape().1;
        for (&id, row) in ids.i64().iter().zip(y.as_f32_mut().chunks_exact_mut(width)) {
            table.rows(id as usize..id as usize + 1, row);
        }
    }
    fn matmul(&self, p: Product, a: &Tensor, b: &Tensor, y: &mut Buffer) {
        primitives::matmul(p, a.f32(), b.f32(), y.as_f32_mut());
    }
    fn frozen_forward(&self, w: &FrozenMatrix, x: &Tensor, bias: Option<&Tensor>, y: &mut Buffer) {
        w.forward(x.f32(), x.rows(), bias.map(Tensor::f32), y.as_f32_mut());
    }
    fn frozen_backward(&self, w: &FrozenMatrix, dy: &Tensor, dx: &mut Buffer) {
        w.backward(dy.f32(), dy.rows(), dx.as_f32_mut());
    }
    fn softmax(&self, x: &Tensor, y: &mut Buffer) {
        primitives::softmax(x.f32(), x.width(), y.as_f32_mut());
    }
    fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        primitives::softmax_backward(y.f32(), dy.f32(), y.width(), dx.as_f32_mut());
    }
    fn norm(&self, n: Norm, x: &Tensor, gain: &Tensor, bias: Option<&Tensor>, y: &mut Buffer, stats: &mut Buffer) {
        let (x, gain, y, stats) = (x.f32(), gain.f32(), y.as_f32_mut(), stats.as_f32_mut());
        match n {
            Norm::Layer { eps } => norm::layer_norm(x, gain, bias.map_or(&[], Tensor::f32), eps, y, stats),
            Norm::Rms { eps } => norm::rms_norm(x, gain, eps, y, stats),
        }
    }
    fn norm_backward(&self, n: Norm, g: NormBackward<'_>) {
        let (x, gain, stats, dy) = (g.x.f32(), g.gain.f32(), g.stats.f32(), g.dy.f32());
        let (dx, dgain) = (g.dx.as_f32_mut(), g.dgain.map(Buffer::as_f32_mut));
        match n {
            Norm::Layer { .. } => {
                norm::layer_norm_backward(x, gain, stats, dy, dx, dgain, g.dbias.map(Buffer::as_f32_mut))
            }
            Norm::Rms { .. } => norm::rms_norm_backward(x, gain, stats, dy, dx, dgain),
        }
    }
    fn rope(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &Tensor, inverse: bool, y: &mut Buffer) {
        let (heads, dim) = (x.dim(1), x.dim(2));
        rope::rope(x.f32(), heads, dim, cos.f32(), sin.f32(), cos.width(), positions.i32(), inverse, y.as_f32_mut());
    }
    fn attention(&self, a: &Attention, q: &Tensor, k: &Tensor, v: &Tensor, y: &mut Buffer, lse: &mut Buffer) {
        let s = &a.spans;
        let (qp, kp) = (s.query_positions.i32(), s.key_positions.i32());
        let (y, lse) = (y.as_f32_mut(), lse.as_f32_mut());
        attention::forward(&a.spec, &s.spans, q.f32(), k.f32(), v.f32(), qp, kp, y, lse);
    }
    fn attention_backward(&self, a: &Attention, g: AttentionBackward<'_>) {
        attention::backward(a, g);
    }
    fn silu_mul(&self, gate: &Tensor, up: &Tensor, y: &mut Buffer) {
        math::silu_mul(gate.f32(), up.f32(), y.as_f32_mut());
    }
    fn silu_mul_backward(&self, gate: &Tensor, up: &Tensor, dy: &Tensor, dgate: &mut Buffer, dup: &mut Buffer) {
        math::silu_mul_backward(gate.f32(), up.f32(), dy.f32(), dgate.as_f32_mut(), dup.as_f32_mut());
    }
    fn cross_entropy(&self, logits: &Tensor, labels: &Tensor, loss: &mut Buffer) {
        cross_entropy::forward(logits.f32(), labels.i64(), loss.as_f32_mut());
    }
    fn cross_entropy_backward(&self, logits: &Tensor, labels: &Tensor, dloss: &Tensor, dlogits: &mut Buffer) {
        cross_entropy::backward(logits.f32(), labels.i64(), dloss.f32(), dlogits.as_f32_mut());
    }
    fn dropout(&self, p: f32, seed: u64, stream: u64, x: &Tensor, y: &mut Buffer) {
        dropout::dropout(x.f32(), p, seed, stream, y.as_f32_mut());
    }
    fn add_sum_of_squares(&self, x: &Tensor, y: &mut Buffer) {
        y.as_f32_mut()[0] += primitives::sum_of_squares(x.f32());
    }
    fn clip_scale(&self, squares: &Tensor, max_norm: f32, norm: &mut Buffer, scale: &mut Buffer) {
        let n = squares.f32()[0].sqrt();
        norm.as_f32_mut()[0] = n;
        let factor = if max_norm > 0.0 { (max_norm / (n + 1e-6)).min(1.0) } else { 1.0 };
        // `min` drops a NaN and an infinite norm would clip to zero: both must stop the update instead.
        scale.as_f32_mut()[0] = if n.is_finite() { factor } else { f32::NAN };
    }
    fn adamw(&self, rule: &AdamW, scale: &Tensor, grad: &Tensor, value: &mut Buffer, m: &mut Buffer, v: &mut Buffer) {
        let scale = scale.f32()[0];
        if scale.is_finite() {
            adamw::step(rule, scale, grad.f32(), value.as_f32_mut(), m.as_f32_mut(), v.as_f32_mut());
        }
    }
}
