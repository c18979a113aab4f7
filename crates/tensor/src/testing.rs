//! Checks that tests of this crate and of the crates above share.

use crate::error::{Error, Result};
use crate::param::Param;
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// The card that test binaries run on, by its number: the only switch of theirs that is not of the processor.
pub(crate) fn device_of_tests() -> Option<usize> {
    std::env::var("ENGRAFT_TEST_CUDA").ok().and_then(|number| number.parse().ok())
}

/// Reproducible numbers in −1..1 without structure.
pub fn sample(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x1234_5678);
    let data = (0..shape.iter().product::<usize>()).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    });
    Tensor::from_vec(data.collect(), shape).expect("the shape was used to make the data")
}

/// Panics unless both have the same shape and differ by at most `tolerance` of the largest value.
#[track_caller]
pub fn close(found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.shape(), expected.shape());
    let (a, b) = (found.to_vec().expect("readable"), expected.to_vec().expect("readable"));
    let largest = b.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let worst = a
        .iter()
        .zip(&b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0f32, |m, d| if d.is_nan() { d } else { m.max(d) });
    assert!(worst <= tolerance * largest, "differ by {worst:e}, largest value {largest:e}");
}

/// Compares the gradients of `f` at `inputs` with central differences, along every coordinate (at most 64 of each
/// input), of the projection of f's result on fixed numbers.
pub fn check_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    let params: Vec<Param> = inputs.iter().cloned().map(Param::new).collect();
    let values = |ps: &[Param]| ps.iter().map(Param::get).collect::<Vec<_>>();
    let y = f(&values(&params))?;
    let weights = sample(y.shape(), 99);
    let gradients = y.mul(&weights)?.sum()?.backward()?;
    // The projection in f64, so that the difference is limited by f's own rounding only.
    let projected = |ps: &[Param]| -> Result<f64> {
        let y = no_grad(|| f(&values(ps)))?.to_vec()?;
        Ok(y.iter().zip(weights.to_vec()?).map(|(&a, w)| a as f64 * w as f64).sum())
    };
    for (index, (param, input)) in params.iter().zip(inputs).enumerate() {
        let zero = Tensor::zeros(input.shape());
        let gradient = gradients.get(param).unwrap_or(&zero).to_vec()?;
        let largest = gradient.iter().fold(0.1f32, |m, g| m.max(g.abs()));
        let start = input.to_vec()?;
        for i in (0..start.len()).step_by(start.len().div_ceil(64).max(1)) {
            let step = 4e-3f32;
            let at = |delta: f32| -> Result<f64> {
                let mut moved = start.clone();
                moved[i] += delta;
                param.set(Tensor::from_vec(moved, input.shape())?)?;
                projected(&params)
            };
            // Fourth-order central difference.
            let (a, b) = (at(step)? - at(-step)?, at(2.0 * step)? - at(-2.0 * step)?);
            let expected = (8.0 * a - b) / (12.0 * step as f64);
            param.set(input.clone())?;
            let error = (gradient[i] as f64 - expected).abs();
            if error.is_nan() || error > 3e-3 * largest as f64 {
                let message =
                    format!("input {index}, element {i}: gradient {}, difference {expected}", gradient[i]);
                return Err(Error::Value { op: "check_gradients", message });
            }
        }
    }
    Ok(())
}
