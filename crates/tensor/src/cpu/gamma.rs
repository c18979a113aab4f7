//! ln Γ and its first two derivatives, for x > 0 (not a number elsewhere).
//!
//! Γ(x + 1) = x·Γ(x) carries the argument above `LEAST`, where Stirling's series, cut after the term in x⁻¹¹, is exact to
//! 1e-14. In f64: the numbers are few, and differences of neighbours matter.

/// Where the series is used.
const LEAST: f64 = 10.0;

/// x carried above [`LEAST`], and the sum of `f` over the steps.
fn carried(mut x: f64, f: impl Fn(f64) -> f64) -> (f64, f64) {
    let mut sum = 0.0;
    while x < LEAST {
        sum += f(x);
        x += 1.0;
    }
    (x, sum)
}

/// Σ c·x⁻²ᵏ of the coefficients from k = 0.
fn series(x: f64, coefficients: [f64; 6]) -> f64 {
    let t = 1.0 / (x * x);
    coefficients.iter().rev().fold(0.0, |sum, c| sum * t + c)
}

/// ln Γ(x).
pub fn ln_gamma(x: f64) -> f64 {
    if x.is_nan() || x <= 0.0 {
        return f64::NAN;
    }
    let (y, sum) = carried(x, f64::ln);
    let rest = [1.0 / 12.0, -1.0 / 360.0, 1.0 / 1260.0, -1.0 / 1680.0, 1.0 / 1188.0, -691.0 / 360_360.0];
    (y - 0.5) * y.ln() - y + 0.5 * std::f64::consts::TAU.ln() + series(y, rest) / y - sum
}

/// ψ(x) = (ln Γ)′.
pub fn digamma(x: f64) -> f64 {
    if x.is_nan() || x <= 0.0 {
        return f64::NAN;
    }
    let (y, sum) = carried(x, f64::recip);
    let rest = [1.0 / 12.0, -1.0 / 120.0, 1.0 / 252.0, -1.0 / 240.0, 1.0 / 132.0, -691.0 / 32_760.0];
    y.ln() - 0.5 / y - series(y, rest) / (y * y) - sum
}

/// ψ′(x).
pub fn trigamma(x: f64) -> f64 {
    if x.is_nan() || x <= 0.0 {
        return f64::NAN;
    }
    let (y, sum) = carried(x, |x| 1.0 / (x * x));
    let rest = [1.0 / 6.0, -1.0 / 30.0, 1.0 / 42.0, -1.0 / 30.0, 5.0 / 66.0, -691.0 / 2730.0];
    1.0 / y + 0.5 / (y * y) + series(y, rest) / (y * y * y) + sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f64::consts::PI;

    /// Euler's constant.
    const EULER: f64 = 0.577_215_664_901_532_9;

    #[test]
    fn known_values() {
        let close = |found: f64, expected: f64| {
            assert!((found - expected).abs() < 1e-12 * expected.abs().max(1.0), "{found} {expected}");
        };
        for (x, expected) in
            [(0.5, 0.5 * PI.ln()), (1.0, 0.0), (2.0, 0.0), (5.0, 24f64.ln()), (11.0, 3_628_800f64.ln())]
        {
            close(ln_gamma(x), expected);
        }
        for (x, expected) in [
            (0.5, -EULER - 2.0 * 2f64.ln()),
            (1.0, -EULER),
            (2.0, 1.0 - EULER),
            (12.0, (1..12).map(|n| 1.0 / f64::from(n)).sum::<f64>() - EULER),
        ] {
            close(digamma(x), expected);
        }
        for (x, expected) in [(0.5, PI * PI / 2.0), (1.0, PI * PI / 6.0), (2.0, PI * PI / 6.0 - 1.0)] {
            close(trigamma(x), expected);
        }
        assert!([ln_gamma, digamma, trigamma].iter().all(|f| f(0.0).is_nan() && f(-0.5).is_nan()));
    }

    #[test]
    fn each_is_the_derivative_of_the_one_before() {
        for i in 1..400 {
            let (x, h) = (0.05 * f64::from(i), 1e-5);
            for (f, slope) in [(ln_gamma as fn(f64) -> f64, digamma as fn(f64) -> f64), (digamma, trigamma)] {
                let found = (f(x + h) - f(x - h)) / (2.0 * h);
                assert!(
                    (found - slope(x)).abs() < 1e-5 * slope(x).abs().max(1.0),
                    "{x}: {found} {}",
                    slope(x)
                );
            }
        }
    }
}
