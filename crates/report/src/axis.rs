//! From values to places on an axis, and the round numbers beside it.
//!
//! A `Range` maps `lo..=hi` to 0..=1, linearly or by logarithm. Steps between ticks are 1, 2 or 5 times a power of ten.

use crate::human;

/// How values are laid along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scale {
    /// Equal differences are equal lengths.
    #[default]
    Linear,
    /// Equal ratios are equal lengths; values not above zero cannot be shown.
    Log,
}

/// What an axis shows: its name, unit and scale.
#[derive(Debug, Clone, Default)]
pub struct Axis {
    pub(crate) label: String,
    pub(crate) unit: Option<String>,
    pub(crate) scale: Scale,
    pub(crate) limits: Option<(f64, f64)>,
}

impl Axis {
    /// A linear axis without a unit.
    pub fn new(label: &str) -> Axis {
        Axis { label: label.to_string(), ..Axis::default() }
    }

    /// The unit, shown in brackets behind the label.
    pub fn unit(mut self, unit: &str) -> Axis {
        self.unit = Some(unit.to_string());
        self
    }

    /// Lays values by logarithm.
    pub fn log(mut self) -> Axis {
        self.scale = Scale::Log;
        self
    }

    /// Shows exactly these limits instead of those of the data.
    pub fn limits(mut self, lo: f64, hi: f64) -> Axis {
        self.limits = Some((lo, hi));
        self
    }

    pub(crate) fn text(&self) -> String {
        match &self.unit {
            Some(unit) => format!("{} ({unit})", self.label),
            None => self.label.clone(),
        }
    }
}

/// A tick: where, and what is written there.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tick {
    pub value: f64,
    pub label: String,
}

/// The stretch of values that an axis covers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    lo: f64,
    hi: f64,
    scale: Scale,
}

/// Beyond this, differences overflow; such a value is treated like one that is not finite.
const MAGNITUDE_MAX: f64 = 1e300;

impl Range {
    /// The range of `values` that `scale` can show; 0..1 (1..10 by logarithm) when there is none.
    pub fn of(values: impl Iterator<Item = f64>, scale: Scale) -> Range {
        let mut found: Option<(f64, f64)> = None;
        for value in values.filter(|value| can_show(*value, scale)) {
            let (lo, hi) = found.unwrap_or((value, value));
            found = Some((lo.min(value), hi.max(value)));
        }
        match (found, scale) {
            (Some((lo, hi)), _) => Range::between(lo, hi, scale),
            (None, Scale::Linear) => Range::between(0.0, 1.0, scale),
            (None, Scale::Log) => Range::between(1.0, 10.0, scale),
        }
    }

    /// The range between two limits, widened where they are too close to tell apart.
    pub fn between(lo: f64, hi: f64, scale: Scale) -> Range {
        let (lo, hi) =
            if can_show(lo, scale) && can_show(hi, scale) { (lo.min(hi), lo.max(hi)) } else { (1.0, 10.0) };
        let close = hi - lo <= 1e-9 * hi.abs().max(lo.abs());
        let (lo, hi) = match scale {
            _ if !close => (lo, hi),
            Scale::Log => (lo / 2.0, hi * 2.0),
            Scale::Linear if lo == 0.0 => (-1.0, 1.0),
            Scale::Linear => (lo - 0.1 * lo.abs(), hi + 0.1 * hi.abs()),
        };
        Range { lo, hi, scale }
    }

    /// Includes zero where the data nearly reach it from above: a baseline that is not zero misleads.
    pub fn with_zero(self) -> Range {
        let near = self.scale == Scale::Linear && self.lo > 0.0 && self.lo < 0.4 * self.hi;
        if near { Range { lo: 0.0, ..self } } else { self }
    }

    /// Widens the ends to the next tick (linear) or by a twentieth (logarithm).
    pub fn rounded(self, ticks: usize) -> Range {
        match self.scale {
            Scale::Linear => {
                let step = nice_step((self.hi - self.lo) / ticks.max(1) as f64);
                Range {
                    lo: (self.lo / step + 1e-9).floor() * step,
                    hi: (self.hi / step - 1e-9).ceil() * step,
                    ..self
                }
            }
            Scale::Log => {
                let pad = (self.hi / self.lo).powf(0.05);
                Range { lo: self.lo / pad, hi: self.hi * pad, ..self }
            }
        }
    }

    /// Where `value` lies, 0 at the low end and 1 at the high end, outside values beyond; `None` if it has no place.
    pub fn place(&self, value: f64) -> Option<f64> {
        if !can_show(value, self.scale) {
            return None;
        }
        Some(match self.scale {
            Scale::Linear => (value - self.lo) / (self.hi - self.lo),
            Scale::Log => (value / self.lo).ln() / (self.hi / self.lo).ln(),
        })
    }

    /// Round values within the range, about `wanted` of them.
    pub fn ticks(&self, wanted: usize) -> Vec<Tick> {
        match self.scale {
            Scale::Linear => self.linear_ticks(wanted),
            Scale::Log => self.log_ticks(wanted),
        }
    }

    fn linear_ticks(&self, wanted: usize) -> Vec<Tick> {
        let step = nice_step((self.hi - self.lo) / wanted.max(1) as f64);
        let first = (self.lo / step - 1e-6).ceil();
        let last = (self.hi / step + 1e-6).floor();
        // Bounded by construction; the cap guards against rounding at extreme magnitudes.
        let ticks = ((last - first).max(0.0) as usize).min(4 * wanted.max(1));
        let largest = self.lo.abs().max(self.hi.abs());
        (0..=ticks)
            .map(|index| (first + index as f64) * step)
            .map(|value| Tick { value, label: tick_label(value, step, largest) })
            .collect()
    }

    fn log_ticks(&self, wanted: usize) -> Vec<Tick> {
        let (low, high) = (self.lo.log10().floor() as i32, self.hi.log10().ceil() as i32);
        let decades = (self.hi / self.lo).log10();
        let stride = ((decades / wanted.max(1) as f64).ceil() as i32).max(1);
        let multiples: &[f64] = if decades < 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let mut ticks = Vec::new();
        for power in (low..=high).step_by(stride as usize) {
            for multiple in multiples {
                let value = multiple * 10f64.powi(power);
                if value >= self.lo * (1.0 - 1e-9) && value <= self.hi * (1.0 + 1e-9) {
                    ticks.push(Tick { value, label: human::number(value, 1) });
                }
            }
        }
        // Within less than an octave no 1, 2 or 5 may fall: linear ticks are round there too.
        if ticks.len() < 2 { self.linear_ticks(wanted) } else { ticks }
    }
}

fn can_show(value: f64, scale: Scale) -> bool {
    let magnitude = value.abs();
    magnitude <= MAGNITUDE_MAX && (scale == Scale::Linear || value > 1e-300)
}

/// The next 1, 2 or 5 times a power of ten that is not below `step`.
fn nice_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor()).max(f64::MIN_POSITIVE);
    let multiple = step / power;
    let nice = [1.0, 2.0, 5.0].into_iter().find(|nice| multiple <= nice * (1.0 + 1e-9)).unwrap_or(10.0);
    nice * power
}

/// All labels of one axis share their form: a suffix for thousands, an exponent for the small, else equal decimals.
fn tick_label(value: f64, step: f64, largest: f64) -> String {
    if value.abs() < step * 1e-6 {
        return "0".to_string();
    }
    if (10_000.0..1e18).contains(&largest) && step >= 10.0 {
        return human::count(value);
    }
    if !(0.01..10_000.0).contains(&largest) {
        let digits = (largest.log10().floor() - step.log10().floor()).clamp(0.0, 6.0) as usize + 1;
        return human::number(value, digits);
    }
    let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(range: Range, wanted: usize) -> Vec<String> {
        range.ticks(wanted).into_iter().map(|tick| tick.label).collect()
    }

    #[test]
    fn linear_ticks_are_round() {
        let range = |lo, hi| Range::between(lo, hi, Scale::Linear);
        assert_eq!(labels(range(0.0, 1.0), 5), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(range(0.0, 450.0), 5), ["0", "100", "200", "300", "400"]);
        assert_eq!(labels(range(0.0, 100_000.0), 5), ["0", "20k", "40k", "60k", "80k", "100k"]);
        assert_eq!(labels(range(0.0, 2e-4), 4), ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"].map(String::from));
        assert_eq!(labels(range(-1.0, 1.0), 4), ["-1.0", "-0.5", "0", "0.5", "1.0"]);
    }

    #[test]
    fn log_ticks_are_decades_or_one_two_five() {
        let range = |lo, hi| Range::between(lo, hi, Scale::Log);
        assert_eq!(labels(range(0.01, 1.0), 5), ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]);
        assert_eq!(labels(range(1e-6, 1.0), 3), ["1e-6", "1e-4", "0.01", "1"]);
        assert!(labels(range(3.1, 3.9), 4).len() >= 2);
    }

    #[test]
    fn places_run_from_zero_to_one() {
        let linear = Range::between(2.0, 4.0, Scale::Linear);
        assert_eq!(
            (linear.place(2.0), linear.place(3.0), linear.place(5.0)),
            (Some(0.0), Some(0.5), Some(1.5))
        );
        let log = Range::between(1.0, 100.0, Scale::Log);
        assert!((log.place(10.0).unwrap() - 0.5).abs() < 1e-12);
        assert_eq!((log.place(0.0), log.place(f64::NAN), linear.place(f64::INFINITY)), (None, None, None));
    }

    #[test]
    fn no_range_is_empty_or_endless() {
        for scale in [Scale::Linear, Scale::Log] {
            for values in
                [vec![], vec![0.0], vec![3.0, 3.0], vec![f64::NAN], vec![1e308, -1e308], vec![1e-310, 5e299]]
            {
                let range = Range::of(values.iter().copied(), scale).with_zero().rounded(5);
                let ticks = range.ticks(5);
                assert!(ticks.len() <= 24, "{values:?} {scale:?}: {} ticks", ticks.len());
                assert!(range.hi > range.lo && range.hi.is_finite() && range.lo.is_finite(), "{values:?}");
            }
        }
    }
}
