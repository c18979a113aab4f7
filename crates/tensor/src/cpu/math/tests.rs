//! The functions against f64, the derivatives against finite differences, and what happens at the edges of f32.

use super::*;

/// erf in f64: the Maclaurin series, or the continued fraction of erfc.
fn erf64(x: f64) -> f64 {
    let t = x.abs();
    let y = if t < 3.0 {
        let (mut term, mut sum) = (t, t);
        for n in 1..200 {
            term *= -t * t / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let f = (1..60).rev().fold(t, |f, n| t + n as f64 / 2.0 / f);
        1.0 - (-t * t).exp() / f / std::f64::consts::PI.sqrt()
    };
    y.copysign(x)
}

fn reference(kind: Unary, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match kind {
        Unary::Exp => x.exp(),
        Unary::Erf => erf64(x),
        Unary::Tanh => x.tanh(),
        Unary::Sigmoid => sigmoid(x),
        Unary::Relu => x.max(0.0),
        Unary::Silu => x * sigmoid(x),
        Unary::Gelu => 0.5 * x * (1.0 + erf64(x / 2f64.sqrt())),
        Unary::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Unary::QuickGelu => x * sigmoid(1.702 * x),
    }
}

const ALL: [Unary; 9] = [
    Unary::Exp,
    Unary::Erf,
    Unary::Tanh,
    Unary::Sigmoid,
    Unary::Relu,
    Unary::Silu,
    Unary::Gelu,
    Unary::GeluTanh,
    Unary::QuickGelu,
];

fn grid(low: f32, high: f32, count: usize) -> Vec<f32> {
    (0..count).map(|i| low + (high - low) * (i as f32 + 0.37) / count as f32).collect()
}

fn apply(kind: Unary, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    forward(kind, x, &mut y);
    y
}

/// The largest error in units in the last place of the true value.
fn worst_ulp(kind: Unary, x: &[f32]) -> f64 {
    let error = |(&x, y): (&f32, f32)| {
        let truth = reference(kind, x as f64);
        let nearest = truth as f32;
        let unit = (f32::from_bits(nearest.abs().to_bits() + 1) - nearest.abs()) as f64;
        (y as f64 - truth).abs() / unit
    };
    x.iter().zip(apply(kind, x)).map(error).fold(0.0, f64::max)
}

#[test]
fn exp_tanh_and_erf_are_right_to_the_last_places() {
    let near_zero: Vec<f32> = (0..2000).map(|i| 10f32.powf(-30.0 + i as f32 * 0.015)).collect();
    for (kind, bound, low, high) in
        [(Unary::Exp, 1.2, -103.0, 88.7), (Unary::Tanh, 2.6, -12.0, 12.0), (Unary::Erf, 2.2, -5.0, 5.0)]
    {
        let worst = worst_ulp(kind, &grid(low, high, 400_000)).max(worst_ulp(kind, &near_zero));
        println!("{kind:?}: {worst:.2} ulp");
        assert!(worst <= bound, "{kind:?}: {worst} units in the last place, promised {bound}");
    }
}

#[test]
fn activations_equal_their_definitions() {
    let x = grid(-20.0, 20.0, 50_000);
    for kind in ALL {
        for (&x, y) in x.iter().zip(apply(kind, &x)) {
            let truth = reference(kind, x as f64);
            let bound = 3e-7 * (truth.abs() + x.abs().min(6.0) as f64 + 1e-3);
            assert!((y as f64 - truth).abs() <= bound, "{kind:?}({x}) = {y}, expected {truth}");
        }
    }
}

#[test]
fn slopes_equal_finite_differences() {
    let x: Vec<f32> = grid(-8.0, 8.0, 4_003).into_iter().filter(|x| x.abs() > 1e-3).collect();
    let dy: Vec<f32> = x.iter().map(|x| 0.5 + x.abs()).collect();
    let mut dx = vec![0.0; x.len()];
    for kind in ALL {
        backward(kind, &x, &dy, &mut dx);
        for i in 0..x.len() {
            let (x, h) = (x[i] as f64, 1e-4);
            let slope = (reference(kind, x + h) - reference(kind, x - h)) / (2.0 * h) * dy[i] as f64;
            let bound = 1e-5 * slope.abs() + 4e-6;
            assert!((dx[i] as f64 - slope).abs() < bound, "{kind:?}′({x}) = {}, expected {slope}", dx[i]);
        }
    }
}

#[test]
fn silu_mul_equals_its_composition() {
    let (gate, up) = (grid(-9.0, 9.0, 20_000), grid(3.0, -2.0, 20_000));
    let dy = grid(-1.0, 1.5, 20_000);
    let (mut y, mut dgate, mut dup) = (vec![0.0; 20_000], vec![0.0; 20_000], vec![0.0; 20_000]);
    silu_mul(&gate, &up, &mut y);
    silu_mul_backward(&gate, &up, &dy, &mut dgate, &mut dup);
    let silu = apply(Unary::Silu, &gate);
    let mut slope = vec![0.0; 20_000];
    backward(Unary::Silu, &gate, &dy, &mut slope);
    for i in 0..20_000 {
        assert!((y[i] - silu[i] * up[i]).abs() <= 1e-6 * y[i].abs() + 1e-30);
        assert!((dgate[i] - slope[i] * up[i]).abs() <= 1e-6 * dgate[i].abs() + 1e-9);
        assert!((dup[i] - silu[i] * dy[i]).abs() <= 1e-6 * dup[i].abs() + 1e-9);
    }
}

#[test]
fn edges_of_the_range() {
    let inf = f32::INFINITY;
    let x = [inf, -inf, 89.0, -200.0, 0.0, 3e38, -3e38];
    assert_eq!(apply(Unary::Exp, &x), [inf, 0.0, inf, 0.0, 1.0, inf, 0.0]);
    assert_eq!(apply(Unary::Tanh, &x), [1.0, -1.0, 1.0, -1.0, 0.0, 1.0, -1.0]);
    assert_eq!(apply(Unary::Erf, &x), [1.0, -1.0, 1.0, -1.0, 0.0, 1.0, -1.0]);
    assert_eq!(apply(Unary::Tanh, &[-0.0])[0].to_bits(), (-0.0f32).to_bits());
    for kind in ALL {
        assert!(apply(kind, &[f32::NAN; 9]).iter().all(|y| y.is_nan()), "{kind:?} hides NaN");
        let mut dx = [0.0; 2];
        backward(kind, &[60.0, -60.0], &[1.0, 1.0], &mut dx);
        assert!(dx.iter().all(|dx| dx.is_finite()), "{kind:?}′ overflows: {dx:?}");
    }
}
