//! Resampling as Pillow 13 does it (`Image.resize`, `src/libImaging/Resample.c`), to the bit.
//!
//! A separable convolution: one pass along rows and one along columns, each rounded to 8 bits. When a side shrinks, the
//! filter widens by the same factor, which is what keeps thin lines from vanishing. Weights are fixed-point with
//! [`PRECISION`] bits. A side that keeps its length is not touched.

use std::f64::consts::PI;

use super::picture::Picture;

/// Bits after the point of a weight: 8 for the level and 2 to spare, of 32.
const PRECISION: u32 = 32 - 8 - 2;

/// What a new level is made of, by its number in `preprocessor_config.json` (that of Pillow).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// 0: the level of the nearest point.
    Nearest,
    /// 1: a windowed sinc, three points to each side.
    Lanczos,
    /// 2: straight lines between points.
    Bilinear,
    /// 3: cubics with a = −1/2.
    Bicubic,
    /// 4: the mean.
    Box,
    /// 5: a Hamming window, sharper than `Bilinear`.
    Hamming,
}

impl Filter {
    /// The filter with Pillow's number `id`.
    pub fn from_id(id: u64) -> Option<Filter> {
        let all = [
            Filter::Nearest,
            Filter::Lanczos,
            Filter::Bilinear,
            Filter::Bicubic,
            Filter::Box,
            Filter::Hamming,
        ];
        all.get(usize::try_from(id).ok()?).copied()
    }

    /// Points to each side that take part where nothing shrinks.
    fn support(self) -> f64 {
        match self {
            Filter::Nearest => 0.0,
            Filter::Box => 0.5,
            Filter::Bilinear | Filter::Hamming => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    /// The weight of a point at distance `x`.
    fn weight(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) };
        let far = x.abs();
        match self {
            Filter::Nearest => 0.0,
            // Half open, so that a point between two belongs to one of them.
            Filter::Box => f64::from(x > -0.5 && x <= 0.5),
            Filter::Bilinear => (1.0 - far).max(0.0),
            Filter::Hamming if far == 0.0 => 1.0,
            Filter::Hamming if far >= 1.0 => 0.0,
            Filter::Hamming => {
                let x = far * PI;
                x.sin() / x * (0.54 + 0.46 * x.cos())
            }
            Filter::Bicubic if far < 1.0 => (1.5 * far - 2.5) * far * far + 1.0,
            Filter::Bicubic if far < 2.0 => (((far - 5.0) * far + 8.0) * far - 4.0) * -0.5,
            Filter::Bicubic => 0.0,
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Lanczos => 0.0,
        }
    }
}

/// `picture` at another size.
pub(crate) fn resize(picture: &Picture, height: usize, width: usize, filter: Filter) -> Picture {
    if (picture.height, picture.width) == (height, width) {
        return picture.clone();
    }
    if filter == Filter::Nearest {
        return nearest(picture, height, width);
    }
    let across = |picture: &Picture| match picture.width == width {
        true => picture.clone(),
        false => along_rows(picture, &Taps::new(picture.width, width, filter)),
    };
    let down = |picture: &Picture| match picture.height == height {
        true => picture.clone(),
        false => along_columns(picture, &Taps::new(picture.height, height, filter)),
    };
    // Where many more rows go than columns, Pillow 13 takes them out first: less is left to do. The order shows in the
    // rounding between the passes.
    let (rows_gone, columns_gone) =
        (picture.height as i64 - height as i64, picture.width as i64 - width as i64);
    if rows_gone > 0 && rows_gone > 2 * columns_gone {
        across(&down(picture))
    } else {
        down(&across(picture))
    }
}

/// For every place of the result: the first point that takes part, and the weights from there on.
struct Taps {
    starts: Vec<usize>,
    weights: Vec<Vec<i32>>,
}

impl Taps {
    fn new(from: usize, to: usize, filter: Filter) -> Taps {
        let scale = from as f64 / to as f64;
        // Above 1 a side shrinks.
        let stretch = scale.max(1.0);
        let support = filter.support() * stretch;
        let (mut starts, mut weights) = (Vec::with_capacity(to), Vec::with_capacity(to));
        for place in 0..to {
            let center = (place as f64 + 0.5) * scale;
            let start = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let exact: Vec<f64> = (start..end)
                .map(|point| filter.weight((point as f64 - center + 0.5) * (1.0 / stretch)))
                .collect();
            let sum: f64 = exact.iter().sum();
            let fixed = |weight: &f64| {
                let weight = if sum == 0.0 { *weight } else { weight / sum } * f64::from(1 << PRECISION);
                // Truncation after adding half rounds away from zero, as C does it.
                (weight + 0.5f64.copysign(weight)) as i32
            };
            starts.push(start);
            weights.push(exact.iter().map(fixed).collect());
        }
        Taps { starts, weights }
    }
}

/// A sum of levels and weights as a level.
fn level(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION - 1);

fn along_rows(picture: &Picture, taps: &Taps) -> Picture {
    let (channels, width) = (picture.channels, taps.starts.len());
    let mut levels = Vec::with_capacity(picture.height * width * channels);
    for row in picture.levels.chunks_exact(picture.width * channels) {
        for (start, weights) in taps.starts.iter().zip(&taps.weights) {
            let mut sums = [HALF; 3];
            for (point, weight) in row[start * channels..].chunks_exact(channels).zip(weights) {
                for (sum, part) in sums.iter_mut().zip(point) {
                    // The weights sum to 1 and lie within two bits of it: no overflow, so no check in the inner loop.
                    *sum = sum.wrapping_add(i32::from(*part).wrapping_mul(*weight));
                }
            }
            levels.extend(sums[..channels].iter().map(|sum| level(*sum)));
        }
    }
    Picture { width, levels, ..*picture }
}

fn along_columns(picture: &Picture, taps: &Taps) -> Picture {
    let row = picture.width * picture.channels;
    let mut levels = Vec::with_capacity(taps.starts.len() * row);
    let mut sums = vec![0i32; row];
    for (start, weights) in taps.starts.iter().zip(&taps.weights) {
        sums.fill(HALF);
        for (points, weight) in picture.levels[start * row..].chunks_exact(row).zip(weights) {
            for (sum, point) in sums.iter_mut().zip(points) {
                *sum = sum.wrapping_add(i32::from(*point).wrapping_mul(*weight));
            }
        }
        levels.extend(sums.iter().map(|sum| level(*sum)));
    }
    Picture { height: taps.starts.len(), levels, ..*picture }
}

fn nearest(picture: &Picture, height: usize, width: usize) -> Picture {
    // Pillow adds up the step, so the rounding of the sum is part of the result.
    let places = |from: usize, to: usize| -> Vec<usize> {
        let step = from as f64 / to as f64;
        let mut at = step * 0.5;
        let mut next = || {
            let place = (at as usize).min(from - 1);
            at += step;
            place
        };
        (0..to).map(|_| next()).collect()
    };
    let (rows, columns) = (places(picture.height, height), places(picture.width, width));
    let channels = picture.channels;
    let mut levels = Vec::with_capacity(height * width * channels);
    for row in rows {
        for column in &columns {
            let at = (row * picture.width + column) * channels;
            levels.extend_from_slice(&picture.levels[at..at + channels]);
        }
    }
    Picture { height, width, channels, levels }
}
