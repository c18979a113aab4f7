//! The CPU as a device: one line from each entry of the list to its kernel on slices.

use super::{AdamWState, AttentionBackward, Buffer, Kernels, NormBackward};
use crate::cpu::random::Key;
use crate::cpu::{
    attention, blocks, cross_entropy, dense, dropout, fourier, hadamard, math, norm, primitives, rope,
    soft_top_k, sparse,
};
use crate::frozen::{FrozenMatrix, FrozenTable};
use crate::ops::{Anneal, Attention, Binary, Frequencies, Norm, Pattern, Product, Unary};
use crate::optim::AdamW;
use crate::tensor::Tensor;

/// The CPU.
pub(crate) struct Cpu;

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
    fn gather_frozen(&self, table: &FrozenTable, ids: &Tensor, y: &mut Buffer) {
        let width = table.shape().1;
        for (&id, row) in ids.i64().iter().zip(y.as_f32_mut().chunks_exact_mut(width)) {
            table.source().rows(id as usize..id as usize + 1, row);
        }
    }
    fn top_k(&self, x: &Tensor, width: usize, k: usize, y: &mut Buffer, columns: &mut Buffer) {
        primitives::top_k(x.f32(), width, k, y.as_f32_mut(), columns.as_i64_mut());
    }
    fn soft_top_k(&self, s: &Tensor, segments: &[(usize, usize)], anneal: &Anneal, y: &mut Buffer) {
        soft_top_k::soft_top_k(s.f32(), segments, anneal, y.as_f32_mut());
    }
    fn soft_top_k_backward(
        &self,
        s: &Tensor,
        segments: &[(usize, usize)],
        anneal: &Anneal,
        dy: &Tensor,
        ds: &mut Buffer,
    ) {
        soft_top_k::soft_top_k_backward(s.f32(), segments, anneal, dy.f32(), ds.as_f32_mut());
    }
    fn largest_places(&self, s: &Tensor, segments: &[(usize, usize)]) -> Vec<i64> {
        soft_top_k::largest(s.f32(), segments)
    }
    fn half_spectrum(&self, x: &Tensor, n: usize, inner: f32, scale: f32, y: &mut Buffer) {
        fourier::half_spectrum(x.f32(), n, inner, scale, y.as_f32_mut());
    }
    fn spectrum_sum(&self, x: &Tensor, n: usize, inner: f32, scale: f32, y: &mut Buffer) {
        fourier::spectrum_sum(x.f32(), n, inner, scale, y.as_f32_mut());
    }
    fn few_frequencies(&self, f: &Frequencies, transposed: bool, c: &Tensor, x: &Tensor, y: &mut Buffer) {
        fourier::few_frequencies(f, transposed, c.f32(), x.f32(), y.as_f32_mut());
    }
    fn few_frequencies_backward(&self, f: &Frequencies, x: &Tensor, dy: &Tensor, dc: &mut Buffer) {
        fourier::few_frequencies_backward(f, x.f32(), dy.f32(), dc.as_f32_mut());
    }
    fn hadamard(&self, n: usize, y: &mut Buffer) {
        hadamard::hadamard(y.as_f32_mut(), n);
    }
    fn matmul(&self, p: Product, a: &Tensor, b: &Tensor, y: &mut Buffer) {
        primitives::matmul(p, a.f32(), b.f32(), y.as_f32_mut());
    }
    fn block_product(&self, x: &Tensor, r: &Tensor, n: usize, transposed: bool, y: &mut Buffer) {
        blocks::block_product(x.f32(), r.f32(), n, transposed, y.as_f32_mut());
    }
    fn block_gradient(&self, x: &Tensor, dy: &Tensor, n: usize, dr: &mut Buffer) {
        blocks::block_gradient(x.f32(), dy.f32(), n, dr.as_f32_mut());
    }
    fn inverse(&self, a: &Tensor, y: &mut Buffer) {
        dense::inverse(a.f32(), a.width(), y.as_f32_mut());
    }
    fn qr(&self, a: &Tensor, q: &mut Buffer, r: &mut Buffer) {
        dense::qr(a.f32(), a.dim(0), a.dim(1), q.as_f32_mut(), r.as_f32_mut());
    }
    fn qr_backward(&self, q: &Tensor, r: &Tensor, dq: &Tensor, da: &mut Buffer) {
        dense::qr_backward(q.f32(), r.f32(), dq.f32(), q.dim(0), q.dim(1), da.as_f32_mut());
    }
    fn frozen_forward(&self, w: &FrozenMatrix, x: &Tensor, bias: Option<&Tensor>, y: &mut Buffer) {
        w.forward(x.f32(), x.rows(), bias.map(Tensor::f32), y.as_f32_mut());
    }
    fn frozen_backward(&self, w: &FrozenMatrix, dy: &Tensor, accumulate: bool, dx: &mut Buffer) {
        w.backward(dy.f32(), dy.rows(), accumulate, dx.as_f32_mut());
    }
    fn sparse_forward(&self, s: &Pattern, values: &Tensor, x: &Tensor, y: &mut Buffer) {
        sparse::add_product(s.places(), s.part(values.f32()), x.f32(), y.as_f32_mut());
    }
    fn sparse_backward(&self, s: &Pattern, values: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        sparse::add_product_back(s.places(), s.part(values.f32()), dy.f32(), dx.as_f32_mut());
    }
    fn sparse_entries(&self, s: &Pattern, x: &Tensor, dy: &Tensor, dv: &mut Buffer) {
        sparse::add_entries(s.places(), x.f32(), dy.f32(), s.part_mut(dv.as_f32_mut()));
    }
    fn sparse_scatter(&self, s: &Pattern, values: &Tensor, w: &mut Buffer) {
        sparse::scatter(s.places(), s.part(values.f32()), w.as_f32_mut());
    }
    fn sparse_gather(&self, s: &Pattern, w: &Tensor, dv: &mut Buffer) {
        sparse::gather(s.places(), w.f32(), s.part_mut(dv.as_f32_mut()));
    }
    fn softmax(&self, x: &Tensor, y: &mut Buffer) {
        primitives::softmax(x.f32(), x.width(), y.as_f32_mut());
    }
    fn softmax_backward(&self, y: &Tensor, dy: &Tensor, dx: &mut Buffer) {
        primitives::softmax_backward(y.f32(), dy.f32(), y.width(), dx.as_f32_mut());
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
        let (rows, x, gain, y) = (x.rows(), x.f32(), Some(gain.f32()), y.as_f32_mut());
        let (mean, rstd) =
            stats.as_f32_mut().split_at_mut(if matches!(n, Norm::Layer { .. }) { rows } else { 0 });
        match n {
            Norm::Layer { eps } => norm::layer_norm(x, gain, bias.map(Tensor::f32), eps, y, mean, rstd),
            Norm::Rms { eps } => norm::rms_norm(x, gain, eps, y, rstd),
        }
    }
    fn norm_backward(&self, n: Norm, g: NormBackward<'_>) {
        let (x, gain, dy) = (g.x.f32(), Some(g.gain.f32()), g.dy.f32());
        let wanted = norm::Gradients {
            dx: Some(g.dx.as_f32_mut()),
            dgain: g.dgain.map(Buffer::as_f32_mut),
            dbias: g.dbias.map(Buffer::as_f32_mut),
        };
        match n {
            Norm::Layer { .. } => {
                let (mean, rstd) = g.stats.f32().split_at(g.x.rows());
                norm::layer_norm_backward(x, dy, gain, mean, rstd, wanted);
            }
            Norm::Rms { .. } => norm::rms_norm_backward(x, dy, gain, g.stats.f32(), wanted),
        }
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
        let tables = rope::Tables { cos: cos.f32(), sin: sin.f32(), half: cos.width() };
        let turn = if inverse { rope::Turn::Inverse } else { rope::Turn::Forward };
        rope::rotate(x.f32(), x.dim(1), positions.i32(), tables, turn, y.as_f32_mut());
    }
    fn attention(&self, a: &Attention, q: &Tensor, k: &Tensor, v: &Tensor, y: &mut Buffer, lse: &mut Buffer) {
        attention::forward(&attention_inputs(a, q, k, v), y.as_f32_mut(), lse.as_f32_mut());
    }
    fn attention_backward(&self, a: &Attention, g: AttentionBackward<'_>) {
        let inputs = attention_inputs(a, g.q, g.k, g.v);
        let wanted = attention::Gradients {
            dq: g.dq.map(Buffer::as_f32_mut),
            dk: g.dk.map(Buffer::as_f32_mut),
            dv: g.dv.map(Buffer::as_f32_mut),
            dbias: g.dbias.map(Buffer::as_f32_mut),
        };
        attention::backward(&inputs, g.y.f32(), g.lse.f32(), g.dy.f32(), wanted);
    }
    fn silu_mul(&self, gate: &Tensor, up: &Tensor, y: &mut Buffer) {
        math::silu_mul(gate.f32(), up.f32(), y.as_f32_mut());
    }
    fn silu_mul_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        dy: &Tensor,
        dgate: &mut Buffer,
        dup: &mut Buffer,
    ) {
        math::silu_mul_backward(gate.f32(), up.f32(), dy.f32(), dgate.as_f32_mut(), dup.as_f32_mut());
    }
    fn cross_entropy(&self, logits: &Tensor, labels: &Tensor, loss: &mut Buffer, lse: &mut Buffer) {
        let (loss, lse) = (loss.as_f32_mut(), lse.as_f32_mut());
        cross_entropy::forward(logits.f32(), labels.i64(), logits.width(), loss, lse).expect(CHECKED);
    }
    fn cross_entropy_backward(&self, x: &mut Buffer, labels: &Tensor, lse: &Tensor, dloss: &Tensor) {
        if !labels.is_empty() {
            let (classes, lse, scale) = (x.len() / labels.len(), lse.f32(), dloss.f32());
            cross_entropy::backward(x.as_f32_mut(), labels.i64(), classes, lse, scale).expect(CHECKED);
        }
    }
    fn dropout(&self, p: f32, seed: u64, stream: u64, x: &Tensor, y: &mut Buffer) {
        dropout::apply(x.f32(), p, Key { seed, stream }, y.as_f32_mut());
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
    fn adamw(&self, rule: &AdamW, step: u64, scale: &Tensor, grad: &Tensor, state: AdamWState<'_>) {
        let scale = scale.f32()[0];
        if scale.is_finite() {
            let (m, v) = (state.m.as_f32_mut(), state.v.as_f32_mut());
            rule.step(state.value.as_f32_mut(), grad.f32(), m, v, step, scale);
        }
    }
}

/// What a kernel reports only if the operation did not check the labels.
const CHECKED: &str = "labels were checked by the operation";

fn attention_inputs<'a>(
    a: &'a Attention,
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
) -> attention::Inputs<'a> {
    attention::Inputs {
        q: q.f32(),
        k: k.f32(),
        v: v.f32(),
        spans: &a.spans.spans,
        q_pos: a.spans.query_positions.i32(),
        kv_pos: a.spans.key_positions.i32(),
        spec: a.spec,
        bias: a.bias.as_ref().map(|b| attention::Bias { values: b.values.f32(), first: b.first }),
    }
}
