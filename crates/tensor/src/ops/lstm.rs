//! A recurrent layer in one direction: long short-term memory (Hochreiter & Schmidhuber 1997), as in PyTorch.
//!
//! With the four gates [i, f, g, o] = z_t + h_{t−1}·Wᵀ side by side, c_t = σ(f)·c_{t−1} + σ(i)·tanh(g) and
//! h_t = σ(o)·tanh(c_t), from h = c = 0. One node on the tape: backward goes through the steps once and takes the gradient
//! of W as one product.

use crate::error::{Result, shape_error};
use crate::ops::{Unary, cat};
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// z [steps, 4·hidden] (what the inputs and biases give the gates), W [4·hidden, hidden] → h [steps, hidden].
pub fn lstm(z: &Tensor, w: &Tensor) -> Result<Tensor> {
    z.expect_f32("lstm")?;
    w.expect_f32("lstm")?;
    let (steps, hidden) = (z.dim(0), w.width());
    if w.shape() != [4 * hidden, hidden] || z.shape() != [steps, 4 * hidden] || steps == 0 || hidden == 0 {
        return shape_error(
            "lstm",
            "[steps, 4·hidden] and [4·hidden, hidden]",
            format!("{:?} and {:?}", z.shape(), w.shape()),
        );
    }
    let (kept, weight) = no_grad(|| -> Result<_> { Ok((steps_of(&z.detach(), &w.detach())?, w.detach())) })?;
    let h = no_grad(|| cat(&kept.iter().map(|s| &s.h).collect::<Vec<_>>(), 0))?;
    let (ez, ew, all) = (z.edge(), w.edge(), h.clone());
    Ok(h.on_tape("lstm", &[z, w], move |dy, sink| {
        let dz = backward(&kept, &weight, &dy)?;
        if ew.wanted() && steps > 1 {
            // What each step read of the one before it.
            let read = all.rows_between(0, steps - 1)?;
            sink.add(&ew, dz.rows_between(1, steps)?.t_matmul(&read)?)?;
        } else if ew.wanted() {
            sink.add(&ew, Tensor::zeros(weight.shape()))?;
        }
        sink.add(&ez, dz)
    }))
}

/// What backward needs of a step, each [1, hidden].
struct Step {
    write: Tensor,
    forget: Tensor,
    candidate: Tensor,
    read: Tensor,
    c: Tensor,
    h: Tensor,
}

fn steps_of(z: &Tensor, w: &Tensor) -> Result<Vec<Step>> {
    let (steps, hidden) = (z.dim(0), w.width());
    let mut kept: Vec<Step> = Vec::with_capacity(steps);
    for t in 0..steps {
        let before = kept.last();
        let gates = match before {
            Some(before) => z.rows_between(t, t + 1)?.add(&before.h.matmul_t(w)?)?,
            None => z.rows_between(t, t + 1)?,
        };
        let gate = |i: usize, f: Unary| gates.narrow(1, i * hidden, hidden)?.unary(f);
        let (write, forget) = (gate(0, Unary::Sigmoid)?, gate(1, Unary::Sigmoid)?);
        let (candidate, read) = (gate(2, Unary::Tanh)?, gate(3, Unary::Sigmoid)?);
        let mut c = write.mul(&candidate)?;
        if let Some(before) = before {
            c = c.add(&forget.mul(&before.c)?)?;
        }
        let h = read.mul(&c.unary(Unary::Tanh)?)?;
        kept.push(Step { write, forget, candidate, read, c, h });
    }
    Ok(kept)
}

/// The gradient of z [steps, 4·hidden] from that of h.
fn backward(kept: &[Step], w: &Tensor, dy: &Tensor) -> Result<Tensor> {
    // y·(1 − y) and 1 − y², the derivatives of σ and tanh by their values.
    let through_sigmoid = |d: Tensor, y: &Tensor| d.mul(&y.sub(&y.unary(Unary::Square)?)?);
    let through_tanh =
        |d: Tensor, y: &Tensor| d.mul(&y.unary(Unary::Square)?.scale(-1.0)?.unary(Unary::Shift(1.0))?);
    let mut rows = Vec::with_capacity(kept.len());
    // The gradients that the step after hands back.
    let mut later: Option<(Tensor, Tensor)> = None;
    for (t, step) in kept.iter().enumerate().rev() {
        let mut dh = dy.rows_between(t, t + 1)?;
        if let Some((gates, _)) = &later {
            dh = dh.add(&gates.matmul(w)?)?;
        }
        let tanh = step.c.unary(Unary::Tanh)?;
        let mut dc = through_tanh(dh.mul(&step.read)?, &tanh)?;
        if let Some((_, c)) = &later {
            dc = dc.add(c)?;
        }
        let forgotten = match t {
            0 => Tensor::zeros(dc.shape()),
            _ => through_sigmoid(dc.mul(&kept[t - 1].c)?, &step.forget)?,
        };
        let parts = [
            through_sigmoid(dc.mul(&step.candidate)?, &step.write)?,
            forgotten,
            through_tanh(dc.mul(&step.write)?, &step.candidate)?,
            through_sigmoid(dh.mul(&tanh)?, &step.read)?,
        ];
        let gates = cat(&parts.iter().collect::<Vec<_>>(), 1)?;
        later = Some((gates.clone(), dc.mul(&step.forget)?));
        rows.push(gates);
    }
    rows.reverse();
    cat(&rows.iter().collect::<Vec<_>>(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, close, sample};

    #[test]
    fn equals_the_steps_by_hand_and_differentiates() {
        for (steps, hidden) in [(1, 3), (2, 1), (5, 4)] {
            let (z, w) = (sample(&[steps, 4 * hidden], 1), sample(&[4 * hidden, hidden], 2));
            let (zs, ws) = (z.to_vec().unwrap(), w.to_vec().unwrap());
            let (mut h, mut c) = (vec![0.0f32; hidden], vec![0.0f32; hidden]);
            let mut expected = Vec::new();
            let sigmoid = |v: f32| 1.0 / (1.0 + (-v).exp());
            for t in 0..steps {
                let gates: Vec<f32> = (0..4 * hidden)
                    .map(|r| {
                        zs[t * 4 * hidden + r] + (0..hidden).map(|k| ws[r * hidden + k] * h[k]).sum::<f32>()
                    })
                    .collect();
                for k in 0..hidden {
                    c[k] =
                        sigmoid(gates[hidden + k]) * c[k] + sigmoid(gates[k]) * gates[2 * hidden + k].tanh();
                    h[k] = sigmoid(gates[3 * hidden + k]) * c[k].tanh();
                }
                expected.extend_from_slice(&h);
            }
            close(&lstm(&z, &w).unwrap(), &Tensor::from_vec(expected, [steps, hidden]).unwrap(), 1e-6);
            check_gradients(&[z, w], |v| lstm(&v[0], &v[1])).unwrap();
        }
        assert!(lstm(&sample(&[2, 8], 1), &sample(&[8, 3], 1)).is_err());
        assert!(lstm(&sample(&[2, 12], 1), &sample(&[8, 2], 1)).is_err());
    }
}
