//! Attention over packed sequences: no padding, no mask tensor, no [queries, keys] matrix of the whole batch.

use std::ops::Range;
use std::sync::Arc;

use crate::device::{AttentionBackward, Buffer, Kernels, cpu};
use crate::error::{Error, Result, shape_error};
pub use crate::cpu::attention::{AttentionSpec, Span};
use crate::tensor::{DType, Tensor};

/// Which rows attend to which: the sequences of a packed batch.
#[derive(Clone, Debug)]
pub struct Spans {
    /// Rows of queries and of keys of each sequence.
    pub spans: Arc<[Span]>,
    /// Position of each query row, `I32` [queries].
    pub query_positions: Tensor,
    /// Position of each key row, `I32` [keys].
    pub key_positions: Tensor,
}

/// One attention: the sequences, the heads, what is visible.
///
/// A key is visible to a query of its sequence unless `causal` and later than it, or outside `window`.
#[derive(Clone, Debug)]
pub struct Attention {
    /// The sequences.
    pub spans: Spans,
    /// Heads, widths, scale, masks.
    pub spec: AttentionSpec,
}

impl Spans {
    /// Rows beyond which queries and keys must reach.
    fn ends(&self) -> (usize, usize) {
        let end = |f: fn(&Span) -> &Range<usize>| self.spans.iter().map(|s| f(s).end).max().unwrap_or(0);
        (end(|s| &s.q), end(|s| &s.kv))
    }
}

/// softmax(scale·q·kᵀ)·v within each sequence; q [queries, heads, dim], k and v [keys, kv_heads, dim] → shape of q.
pub fn attention(a: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    check(a, q, k, v)?;
    let mut y = Buffer::f32(q.len());
    let mut lse = Buffer::f32(q.dim(0) * q.dim(1));
    cpu().attention(a, q, k, v, &mut y, &mut lse);
    let y = Tensor::new(q.shape(), y);
    let lse = Tensor::new([q.dim(0), q.dim(1)], lse);
    let edges = [q.edge(), k.edge(), v.edge()];
    let (a, kept) = (a.clone(), [q.detach(), k.detach(), v.detach(), y.clone()]);
    Ok(y.on_tape("attention", &[q, k, v], move |dy, sink| {
        let [q, k, v, y] = &kept;
        let (mut dq, mut dk, mut dv) = (Buffer::f32(q.len()), Buffer::f32(k.len()), Buffer::f32(v.len()));
        let (dq_, dk_, dv_) = (&mut dq, &mut dk, &mut dv);
        cpu().attention_backward(&a, AttentionBackward { q, k, v, y, lse: &lse, dy: &dy, dq: dq_, dk: dk_, dv: dv_ });
        for ((edge, d), shape) in edges.iter().zip([dq, dk, dv]).zip([q.shape(), k.shape(), v.shape()]) {
            sink.add(edge, Tensor::new(shape, d))?;
        }
        Ok(())
    }))
}

fn check(a: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
    let s = &a.spec;
    for t in [q, k, v] {
        t.expect_f32("attention")?;
    }
    v.expect_shape("attention", k.shape())?;
    let fits = q.shape().len() == 3 && k.shape().len() == 3 && q.shape()[1..] == [s.heads, s.dim];
    if !fits || k.shape()[1..] != [s.kv_heads, s.dim] || s.kv_heads == 0 || s.heads % s.kv_heads != 0 {
        let expected = format!("q [queries, {}, {}], k [keys, {}, {}]", s.heads, s.dim, s.kv_heads, s.dim);
        return shape_error("attention", expected, format!("q {:?}, k {:?}", q.shape(), k.shape()));
    }
    for (positions, rows) in [(&a.spans.query_positions, q.dim(0)), (&a.spans.key_positions, k.dim(0))] {
        if positions.dtype() != DType::I32 {
            return Err(Error::DType { op: "attention", expected: "I32", found: positions.dtype() });
        }
        if positions.len() != rows {
            return shape_error("attention", format!("{rows} positions"), positions.len().to_string());
        }
    }
    let (queries, keys) = a.spans.ends();
    if queries > q.dim(0) || keys > k.dim(0) {
        return shape_error("attention", format!("{queries} queries, {keys} keys"), format!("{}, {}", q.dim(0), k.dim(0)));
    }
    Ok(())
}
