//! Attention over packed sequences: no padding, no mask tensor, no [queries, keys] matrix of the whole batch.

use std::ops::Range;
use std::sync::Arc;

pub use crate::cpu::attention::{AttentionSpec, Span};
use crate::device::{AttentionBackward, Buffer, device};
use crate::error::{Error, Result, shape_error};
use crate::tape::Edge;
use crate::tensor::{DType, Tensor};

/// Which rows attend to which: the sequences of a packed batch.
#[derive(Clone, Debug)]
pub struct Spans {
    /// Rows of queries and of keys of each sequence.
    pub spans: Arc<[Span]>,
    /// Position of each query row, `I32` `[queries]`.
    pub query_positions: Tensor,
    /// Position of each key row, `I32` `[keys]`.
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
    /// Added to the scaled scores. It must cover every distance that occurs in a sequence: a programmer's error else.
    pub bias: Option<RelativeBias>,
}

/// A number for each distance of a key from a query (T5's relative positions).
#[derive(Clone, Debug)]
pub struct RelativeBias {
    /// [heads, distances]; differentiable.
    pub values: Tensor,
    /// Key position − query position of the first column.
    pub first: i32,
}

impl Attention {
    /// The same with nothing on the tape.
    fn detached(&self) -> Attention {
        let bias = self.bias.as_ref().map(|b| RelativeBias { values: b.values.detach(), first: b.first });
        Attention { spans: self.spans.clone(), spec: self.spec, bias }
    }
}

impl Spans {
    /// Rows beyond which queries and keys must reach.
    fn ends(&self) -> (usize, usize) {
        let end = |f: fn(&Span) -> &Range<usize>| self.spans.iter().map(|s| f(s).end).max().unwrap_or(0);
        (end(|s| &s.q), end(|s| &s.kv))
    }
}

/// softmax(scale·q·kᵀ + bias)·v within each sequence; q [queries, heads, dim], k and v [keys, kv_heads, dim] → shape of q.
pub fn attention(a: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    check(a, q, k, v)?;
    let mut y = Buffer::f32(q.len());
    let mut lse = Buffer::f32(q.dim(0) * q.dim(1));
    device().attention(a, q, k, v, &mut y, &mut lse);
    let y = Tensor::new(q.shape(), y);
    let lse = Tensor::new([q.dim(0), q.dim(1)], lse);
    // Where there is no bias, q stands in for it and nobody wants its gradient.
    let bias = a.bias.as_ref().map(|b| &b.values);
    let edges = [q.edge(), k.edge(), v.edge(), bias.map_or(Edge(None), Tensor::edge)];
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(bias).collect();
    let (a, kept) = (a.detached(), [q, k, v, bias.unwrap_or(q), &y].map(Tensor::detach));
    Ok(y.on_tape("attention", &inputs, move |dy, sink| {
        let [q, k, v, bias, y] = &kept;
        let of = [q, k, v, bias];
        let mut d = [0, 1, 2, 3].map(|i| edges[i].wanted().then(|| Buffer::f32(of[i].len())));
        let [dq, dk, dv, dbias] = d.each_mut().map(Option::as_mut);
        device()
            .attention_backward(&a, AttentionBackward { q, k, v, y, lse: &lse, dy: &dy, dq, dk, dv, dbias });
        for ((edge, d), of) in edges.iter().zip(d).zip(of) {
            if let Some(d) = d {
                sink.add(edge, Tensor::new(of.shape(), d))?;
            }
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
    if let Some(RelativeBias { values, .. }) = &a.bias {
        values.expect_f32("attention bias")?;
        if values.shape().len() != 2 || values.dim(0) != s.heads {
            let expected = format!("[{}, distances]", s.heads);
            return shape_error("attention bias", expected, format!("{:?}", values.shape()));
        }
    }
    let fits = q.shape().len() == 3 && k.shape().len() == 3 && q.shape()[1..] == [s.heads, s.dim];
    if !fits
        || k.shape()[1..] != [s.kv_heads, s.dim]
        || s.kv_heads == 0
        || !s.heads.is_multiple_of(s.kv_heads)
    {
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
        return shape_error(
            "attention",
            format!("{queries} queries, {keys} keys"),
            format!("{}, {}", q.dim(0), k.dim(0)),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Unary, cat};
    use crate::testing::{check_gradients, close, sample};

    /// Two sequences of queries 0..3 and 3..5 over keys 0..4 and 4..6; 4 heads share 2 key heads.
    fn example(causal: bool, window: Option<usize>) -> Attention {
        let spans = [Span { q: 0..3, kv: 0..4 }, Span { q: 3..5, kv: 4..6 }];
        Attention {
            spans: Spans {
                spans: spans.into(),
                query_positions: Tensor::from_i32(vec![1, 2, 3, 0, 1], [5]).unwrap(),
                key_positions: Tensor::from_i32(vec![0, 1, 2, 3, 0, 1], [6]).unwrap(),
            },
            spec: AttentionSpec { heads: 4, kv_heads: 2, dim: 3, scale: 0.6, causal, window },
            bias: None,
        }
    }

    fn biased(a: &Attention, values: &Tensor) -> Attention {
        Attention { bias: Some(RelativeBias { values: values.clone(), first: -4 }), ..a.clone() }
    }

    /// The same from primitives: scores of every pair, hidden ones at −∞, one sequence and head after another.
    fn composed(a: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let s = &a.spec;
        let head = |t: &Tensor, h: usize, r: &Range<usize>| {
            t.narrow(1, h, 1).unwrap().narrow(0, r.start, r.len()).unwrap().reshape([r.len(), s.dim]).unwrap()
        };
        let one = |span: &Span, h: usize| {
            let (q, kv) = (head(q, h, &span.q), h / (s.heads / s.kv_heads));
            let (k, v) = (head(k, kv, &span.kv), head(v, kv, &span.kv));
            let hidden: Vec<f32> = span
                .q
                .clone()
                .flat_map(|i| span.kv.clone().map(move |j| (i, j)))
                .map(|(i, j)| {
                    let (qp, kp) = (a.spans.query_positions.i32()[i], a.spans.key_positions.i32()[j]);
                    let seen = !s.causal || (kp <= qp && s.window.is_none_or(|w| qp - kp < w as i32));
                    if seen { 0.0 } else { -1e9 }
                })
                .collect();
            let hidden = Tensor::from_vec(hidden, [span.q.len(), span.kv.len()]).unwrap();
            let mut scores = q.matmul_t(&k).unwrap().scale(s.scale).unwrap().add(&hidden).unwrap();
            if let Some(bias) = &a.bias {
                let pairs = span.q.clone().flat_map(|i| span.kv.clone().map(move |j| (i, j)));
                let (q_pos, k_pos) = (a.spans.query_positions.i32(), a.spans.key_positions.i32());
                let index: Vec<i64> =
                    pairs.map(|(i, j)| i64::from(k_pos[j] - q_pos[i] - bias.first)).collect();
                let index = Tensor::from_i64(index.clone(), [index.len()]).unwrap();
                let of_head = bias.values.narrow(0, h, 1).unwrap().reshape([bias.values.dim(1), 1]).unwrap();
                let added = of_head.gather(&index).unwrap().reshape([span.q.len(), span.kv.len()]).unwrap();
                scores = scores.add(&added).unwrap();
            }
            scores.softmax().unwrap().matmul(&v).unwrap().reshape([span.q.len(), 1, s.dim]).unwrap()
        };
        let sequence = |span: &Span| {
            let heads: Vec<Tensor> = (0..s.heads).map(|h| one(span, h)).collect();
            cat(&heads.iter().collect::<Vec<_>>(), 1).unwrap()
        };
        let rows: Vec<Tensor> = a.spans.spans.iter().map(sequence).collect();
        cat(&rows.iter().collect::<Vec<_>>(), 0).unwrap()
    }

    #[test]
    fn equals_its_composition() {
        let inputs = [sample(&[5, 4, 3], 1), sample(&[6, 2, 3], 2), sample(&[6, 2, 3], 3)];
        for (causal, window) in [(false, None), (true, None), (true, Some(2))] {
            let a = example(causal, window);
            let [q, k, v] = &inputs;
            close(&attention(&a, q, k, v).unwrap(), &composed(&a, q, k, v), 1e-5);
            check_gradients(&inputs, |t| attention(&a, &t[0], &t[1], &t[2])).unwrap();
            let values = sample(&[4, 9], 4);
            let with = biased(&a, &values);
            close(&attention(&with, q, k, v).unwrap(), &composed(&with, q, k, v), 1e-5);
            let all = [q.clone(), k.clone(), v.clone(), values];
            check_gradients(&all, |t| attention(&biased(&a, &t[3]), &t[0], &t[1], &t[2])).unwrap();
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let a = example(true, None);
        let (q, k) = (sample(&[5, 4, 3], 1), sample(&[6, 2, 3], 2));
        assert!(attention(&a, &k, &k, &k).is_err());
        assert!(attention(&a, &q, &k.rows_between(0, 5).unwrap(), &k.rows_between(0, 5).unwrap()).is_err());
        assert!(attention(&a, &q.unary(Unary::Exp).unwrap(), &q, &q).is_err());
        assert!(attention(&a, &q, &k, &k).is_ok());
        assert!(attention(&biased(&a, &sample(&[3, 9], 4)), &q, &k, &k).is_err());
    }
}
