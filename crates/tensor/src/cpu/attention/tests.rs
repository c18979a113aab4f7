//! Attention against its definition in f64, its gradients against finite differences, and the shape of its work.

use super::*;
use crate::cpu::random::Key;

struct Case {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dy: Vec<f32>,
    spans: Vec<Span>,
    q_pos: Vec<i32>,
    kv_pos: Vec<i32>,
    spec: AttentionSpec,
    /// `[heads, distances]` and the first distance; empty for none.
    bias: (Vec<f32>, i32),
}

const SPEC: AttentionSpec =
    AttentionSpec { heads: 4, kv_heads: 2, dim: 8, scale: 0.4, causal: true, window: None };

fn random(stream: u64, length: usize) -> Vec<f32> {
    let mut x = vec![0.0; length];
    Key { seed: 5, stream }.fill_normal(&mut x);
    x
}

/// Sequences of (queries, keys); the queries are the last positions of the keys.
fn case(spec: AttentionSpec, lengths: &[(usize, usize)]) -> Case {
    let (mut spans, mut q_pos, mut kv_pos) = (Vec::new(), Vec::new(), Vec::new());
    for &(q, kv) in lengths {
        spans.push(Span { q: q_pos.len()..q_pos.len() + q, kv: kv_pos.len()..kv_pos.len() + kv });
        q_pos.extend((0..q).map(|i| (kv + i) as i32 - q as i32));
        kv_pos.extend(0..kv as i32);
    }
    let (nq, nk) = (q_pos.len() * spec.heads * spec.dim, kv_pos.len() * spec.kv_heads * spec.dim);
    Case {
        q: random(1, nq),
        k: random(2, nk),
        v: random(3, nk),
        dy: random(4, nq),
        spans,
        q_pos,
        kv_pos,
        spec,
        bias: (vec![], 0),
    }
}

/// The same with a bias for every distance from −`reach` to `reach`.
fn with_bias(case: Case, reach: i32) -> Case {
    let distances = 2 * reach as usize + 1;
    Case { bias: (random(5, case.spec.heads * distances), -reach), ..case }
}

struct Found {
    y: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    dbias: Vec<f32>,
}

impl Case {
    fn inputs(&self) -> Inputs<'_> {
        let Case { q, k, v, spans, q_pos, kv_pos, spec, .. } = self;
        let (values, first) = (&self.bias.0[..], self.bias.1);
        let bias = (!values.is_empty()).then_some(Bias { values, first });
        Inputs { q, k, v, spans, q_pos, kv_pos, spec: *spec, bias }
    }

    /// What is added to the score of row `q` and key `kv` at head `h`.
    fn bias_at(&self, h: usize, q: usize, kv: usize) -> f64 {
        let distances = self.bias.0.len() / self.spec.heads;
        if distances == 0 {
            return 0.0;
        }
        f64::from(self.bias.0[h * distances + (self.kv_pos[kv] - self.q_pos[q] - self.bias.1) as usize])
    }

    fn run(&self) -> Found {
        let (mut y, mut lse) = (vec![9.0; self.q.len()], vec![9.0; self.q_pos.len() * self.spec.heads]);
        forward(&self.inputs(), &mut y, &mut lse);
        let (mut dq, mut dk, mut dv) =
            (vec![9.0; self.q.len()], vec![9.0; self.k.len()], vec![9.0; self.k.len()]);
        let mut dbias = vec![9.0; self.bias.0.len()];
        let biased = !dbias.is_empty();
        let wanted = Gradients {
            dq: Some(&mut dq),
            dk: Some(&mut dk),
            dv: Some(&mut dv),
            dbias: biased.then_some(&mut dbias[..]),
        };
        backward(&self.inputs(), &y, &lse, &self.dy, wanted);
        Found { y, lse, dq, dk, dv, dbias }
    }

    fn sees(&self, q: usize, kv: usize) -> bool {
        let behind = self.q_pos[q] as i64 - self.kv_pos[kv] as i64;
        !self.spec.causal || (behind >= 0 && self.spec.window.is_none_or(|w| behind < w as i64))
    }

    /// The weights of row `i` of head `h` on its span's keys, in f64; and the log-sum.
    fn weights(&self, span: &Span, i: usize, h: usize) -> (Vec<f64>, f64) {
        let s = self.spec;
        let (group, at) = (s.heads / s.kv_heads, (i * s.heads + h) * s.dim);
        let score = |j: usize| {
            let key = (j * s.kv_heads + h / group) * s.dim;
            let dot: f64 = (0..s.dim).map(|d| self.q[at + d] as f64 * self.k[key + d] as f64).sum();
            if self.sees(i, j) { dot * s.scale as f64 + self.bias_at(h, i, j) } else { f64::NEG_INFINITY }
        };
        let scores: Vec<f64> = span.kv.clone().map(score).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if top == f64::NEG_INFINITY {
            return (vec![0.0; scores.len()], top);
        }
        let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        (scores.iter().map(|s| (s - top).exp() / sum).collect(), top + sum.ln())
    }

    /// y, lse, dq, dk, dv, dbias by the definition, in f64.
    fn reference(&self) -> [Vec<f64>; 6] {
        let s = self.spec;
        let group = s.heads / s.kv_heads;
        let mut y = vec![0.0; self.q.len()];
        let mut lse = vec![f64::NEG_INFINITY; self.q_pos.len() * s.heads];
        let (mut dq, mut dk, mut dv) = (y.clone(), vec![0.0; self.k.len()], vec![0.0; self.k.len()]);
        let mut dbias = vec![0.0; self.bias.0.len()];
        let distances = self.bias.0.len() / s.heads;
        for (span, h) in self.spans.iter().flat_map(|span| (0..s.heads).map(move |h| (span, h))) {
            for i in span.q.clone() {
                let at = (i * s.heads + h) * s.dim;
                let (weights, log_sum) = self.weights(span, i, h);
                lse[i * s.heads + h] = log_sum;
                let key = |j: usize| ((span.kv.start + j) * s.kv_heads + h / group) * s.dim;
                let dw = |j: usize| -> f64 {
                    (0..s.dim).map(|d| self.dy[at + d] as f64 * self.v[key(j) + d] as f64).sum()
                };
                let mean: f64 = weights.iter().enumerate().map(|(j, w)| w * dw(j)).sum();
                for (j, w) in weights.iter().enumerate() {
                    let slope = w * (dw(j) - mean);
                    let ds = slope * s.scale as f64;
                    if distances > 0 {
                        let behind = self.kv_pos[span.kv.start + j] - self.q_pos[i];
                        dbias[h * distances + (behind - self.bias.1) as usize] += slope;
                    }
                    for d in 0..s.dim {
                        y[at + d] += w * self.v[key(j) + d] as f64;
                        dv[key(j) + d] += w * self.dy[at + d] as f64;
                        dk[key(j) + d] += ds * self.q[at + d] as f64;
                        dq[at + d] += ds * self.k[key(j) + d] as f64;
                    }
                }
            }
        }
        [y, lse, dq, dk, dv, dbias]
    }

    fn check(&self) {
        let Found { y, lse, dq, dk, dv, dbias } = self.run();
        let found = [("y", y), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv), ("dbias", dbias)];
        for ((name, found), truth) in found.into_iter().zip(self.reference()) {
            // A bias' gradient is a sum over hundreds of pairs.
            let tolerance = if name == "dbias" { 1e-4 } else { 1e-5 };
            for (at, (&found, truth)) in found.iter().zip(truth).enumerate() {
                let same = found as f64 == truth;
                let error = (found as f64 - truth).abs();
                assert!(
                    same || error < tolerance * (1.0 + truth.abs()),
                    "{name}[{at}] = {found}, expected {truth}; {:?}, {} spans",
                    self.spec,
                    self.spans.len()
                );
            }
        }
    }
}

#[test]
fn values_and_gradients_equal_the_definition() {
    let ragged = [(1, 1), (5, 5), (40, 40), (0, 0), (17, 17), (2, 70), (130, 130), (1, 200), (3, 9)];
    for (heads, kv_heads, dim) in [(4, 2, 8), (3, 3, 20), (8, 1, 5), (1, 1, 64)] {
        for (causal, window) in
            [(false, None), (true, None), (true, Some(7)), (true, Some(100)), (true, Some(1))]
        {
            let spec = AttentionSpec { heads, kv_heads, dim, causal, window, scale: 0.4 };
            case(spec, &ragged).check();
            with_bias(case(spec, &ragged), 200).check();
        }
    }
}

#[test]
fn a_long_sequence_that_is_cut_for_more_cores() {
    case(AttentionSpec { window: Some(150), ..SPEC }, &[(600, 600)]).check();
    with_bias(case(AttentionSpec { causal: false, ..SPEC }, &[(300, 330)]), 400).check();
    case(SPEC, &[(300, 330)]).check();
    case(AttentionSpec { causal: false, ..SPEC }, &[(10, 530)]).check();
}

#[test]
fn rows_that_see_nothing_and_positions_with_gaps() {
    let mut case = case(AttentionSpec { window: Some(4), ..SPEC }, &[(6, 6), (70, 90)]);
    case.q_pos[..6].copy_from_slice(&[-3, -1, 0, 50, 51, 400]);
    case.kv_pos[..6].copy_from_slice(&[0, 0, 1, 50, 60, 397]);
    case.kv_pos[20..].iter_mut().for_each(|p| *p += 30);
    case.check();
    let found = case.run();
    assert!(found.y[..2 * 32].iter().all(|&y| y == 0.0));
    assert_eq!(found.lse[0], f32::NEG_INFINITY);
}

#[test]
fn gradients_equal_finite_differences() {
    let mut case = case(AttentionSpec { window: Some(6), ..SPEC }, &[(9, 9), (3, 12)]);
    let found = case.run();
    let total = |case: &Case| -> f64 {
        let [y, ..] = case.reference();
        y.iter().zip(&case.dy).map(|(y, &dy)| y * dy as f64).sum()
    };
    type Pick = fn(&mut Case) -> &mut Vec<f32>;
    let parts: [(&Vec<f32>, Pick); 3] =
        [(&found.dq, |c| &mut c.q), (&found.dk, |c| &mut c.k), (&found.dv, |c| &mut c.v)];
    for (gradient, pick) in parts {
        for at in (0..gradient.len()).step_by(5) {
            let start = pick(&mut case)[at];
            let (up, down) = (start + 1e-2, start - 1e-2);
            pick(&mut case)[at] = up;
            let high = total(&case);
            pick(&mut case)[at] = down;
            let slope = (high - total(&case)) / (up as f64 - down as f64);
            pick(&mut case)[at] = start;
            assert!((gradient[at] as f64 - slope).abs() < 2e-4, "{at}: {}, expected {slope}", gradient[at]);
        }
    }
}

#[test]
#[should_panic(expected = "do not cover")]
fn a_bias_that_lacks_distances_is_refused() {
    with_bias(case(SPEC, &[(9, 9)]), 7).run();
}

#[test]
fn one_gradient_alone_equals_all_together() {
    for lengths in [&[(300, 300)][..], &[(20, 20); 9]] {
        let case = case(SPEC, lengths);
        let all = case.run();
        let (mut dq, mut dk, mut dv) =
            (vec![9.0; case.q.len()], vec![9.0; case.k.len()], vec![9.0; case.k.len()]);
        let alone = |wanted| backward(&case.inputs(), &all.y, &all.lse, &case.dy, wanted);
        alone(Gradients { dq: Some(&mut dq), ..Default::default() });
        alone(Gradients { dk: Some(&mut dk), ..Default::default() });
        alone(Gradients { dv: Some(&mut dv), ..Default::default() });
        assert!(dq == all.dq && dk == all.dk && dv == all.dv);
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let case = case(SPEC, &[(300, 300), (33, 70), (1, 5)]);
    let with = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| case.run())
    };
    let (one, three) = (with(1), with(3));
    assert!(one.y == three.y && one.lse == three.lse);
    assert!(one.dq == three.dq && one.dk == three.dk && one.dv == three.dv);
}

#[test]
fn large_scores_stay_finite_and_nan_shows() {
    let mut case = case(SPEC, &[(70, 70)]);
    case.q.iter_mut().for_each(|q| *q *= 1e4);
    let found = case.run();
    assert!(found.y.iter().chain(&found.dq).chain(&found.dk).all(|y| y.is_finite()));
    case.k[69 * 16] = f32::NAN;
    let found = case.run();
    assert!(found.y[..69 * 32].iter().all(|y| y.is_finite()));
    assert!(found.y[69 * 32].is_nan());
}

#[test]
#[should_panic(expected = "shares keys")]
fn gradients_of_shared_keys_are_refused() {
    let mut case = case(AttentionSpec { causal: false, ..SPEC }, &[(2, 4), (2, 4)]);
    case.spans[1].kv = 2..6;
    case.run();
}
