//! The plot area of a chart: values to pixels, lines with their gaps, and marks for what has no place.

use crate::axis::Range;
use crate::chart::{Area, Chart, Mark, Series, Shape};
use crate::human;
use crate::series::thin;
use crate::svg::{Anchor, Svg, fit, num, text_width};

/// What of a chart has no place in its plot.
pub(crate) struct Trouble {
    /// x of values that are not finite, or not above zero on a logarithmic axis.
    pub not_shown: Vec<f64>,
    /// x of values above the axis.
    pub above: Vec<f64>,
}

impl Trouble {
    pub fn of(chart: &Chart, x: &Range, y: &Range) -> Trouble {
        let mut found = Trouble { not_shown: Vec::new(), above: Vec::new() };
        for series in &chart.series {
            let upper = series.points.iter().zip(&series.upper).map(|(point, upper)| (point.0, *upper));
            for (at, value) in series.points.iter().copied().chain(upper) {
                match y.place(value) {
                    None => found.not_shown.push(at),
                    Some(place) if place > 1.0 + 1e-9 && x.place(at).is_some() => found.above.push(at),
                    Some(_) => {}
                }
            }
        }
        // A raw series and its smoothed twin lack the same steps.
        for list in [&mut found.not_shown, &mut found.above] {
            list.sort_by(f64::total_cmp);
            list.dedup();
        }
        found
    }

    pub fn notes(&self) -> Vec<String> {
        let note = |list: &[f64], text: &str| (!list.is_empty()).then(|| format!("{text} ({})", list.len()));
        [note(&self.not_shown, "✕ not finite"), note(&self.above, "▲ beyond the axis")]
            .into_iter()
            .flatten()
            .collect()
    }
}

/// A plot area with the ranges laid over it.
pub(crate) struct Frame {
    pub plot: Area,
    pub x: Range,
    pub y: Range,
}

impl Frame {
    pub fn x_of(&self, value: f64) -> Option<f64> {
        self.x.place(value).map(|place| self.plot.0 + place.clamp(-0.01, 1.01) * self.plot.2)
    }

    pub fn y_of(&self, value: f64) -> Option<f64> {
        self.y.place(value).map(|place| self.plot.1 + (1.0 - place.clamp(0.0, 1.0)) * self.plot.3)
    }

    fn pixel(&self, point: (f64, f64)) -> Option<(f64, f64)> {
        Some((self.x_of(point.0)?, self.y_of(point.1)?))
    }

    pub fn draw_series(&self, svg: &mut Svg, series: &Series, color: usize, y_name: &str) {
        if series.shape == Shape::Band {
            svg.path(&format!("band f{color}"), &self.band_path(series));
            return;
        }
        let points = thin(&series.points, self.plot.2.max(1.0) as usize);
        svg.path(&format!("{} c{color}", line_class(series.shape)), &self.line_path(&points));
        // A point without neighbours has no line: it is drawn as a dot. Hundreds of dots would only be a thick line.
        let all = series.shape == Shape::Dots && points.len() <= 80;
        for (index, point) in points.iter().enumerate() {
            let finite = |index: Option<usize>| {
                index.and_then(|index| points.get(index)).is_some_and(|point| self.pixel(*point).is_some())
            };
            let alone = !finite(index.checked_sub(1)) && !finite(Some(index + 1));
            if let (Some(at), true) = (self.pixel(*point), all || alone) {
                let tip = format!(
                    "{} {}: {y_name} {}",
                    series.label,
                    human::number(point.0, 7),
                    human::number(point.1, 5)
                );
                svg.dot(&format!("dot f{color}"), at, if all { 3.8 } else { 3.0 }, &tip);
            }
        }
    }

    /// Path data through the points, begun anew after each gap.
    fn line_path(&self, points: &[(f64, f64)]) -> String {
        let mut data = String::new();
        let mut joined = false;
        for point in points {
            let Some((x, y)) = self.pixel(*point) else {
                joined = false;
                continue;
            };
            data.push_str(if joined { "L" } else { "M" });
            data.push_str(&format!("{} {}", num(x), num(y)));
            joined = true;
        }
        data
    }

    /// Closed path around each stretch of a band between gaps.
    fn band_path(&self, series: &Series) -> String {
        let edges: Vec<(f64, f64, f64)> = {
            let stride = series.points.len().div_ceil(4 * self.plot.2.max(1.0) as usize).max(1);
            let all =
                series.points.iter().zip(&series.upper).map(|(point, upper)| (point.0, point.1, *upper));
            all.step_by(stride).collect()
        };
        let mut data = String::new();
        for part in edges.split(|edge| self.pixel((edge.0, edge.1)).is_none() || self.y_of(edge.2).is_none())
        {
            let lower = part.iter().map(|edge| (edge.0, edge.1));
            let around: Vec<(f64, f64)> =
                lower.chain(part.iter().rev().map(|edge| (edge.0, edge.2))).collect();
            if !around.is_empty() {
                data.push_str(&self.line_path(&around));
                data.push('Z');
            }
        }
        data
    }

    /// Crosses and triangles at the top edge, at most one every few pixels.
    pub fn draw_trouble(&self, svg: &mut Svg, found: &Trouble) {
        let apart = |values: &[f64]| {
            let mut places: Vec<f64> = Vec::new();
            for x in values.iter().filter_map(|value| self.x_of(*value)) {
                if places.last().is_none_or(|last| (x - last).abs() >= 7.0) {
                    places.push(x);
                }
            }
            places
        };
        let top = num(self.plot.1);
        for x in apart(&found.not_shown) {
            let left = num(x - 3.0);
            svg.path("bad", &format!("M{left} {top}m0 -3l6 6m0 -6l-6 6"));
        }
        for x in apart(&found.above) {
            svg.path("badf", &format!("M{} {top}m-3.5 3l3.5 -6l3.5 6Z", num(x)));
        }
    }

    pub fn draw_mark(&self, svg: &mut Svg, mark: &Mark) {
        let Some((x, y)) = self.pixel(mark.at) else { return };
        let (left, top, width, height) = self.plot;
        svg.dot(&format!("ring f{}", mark.color), (x, y), 5.5, &mark.text);
        // The note goes where there is room: above, or below near the top; never past the sides.
        let below = y - top < 24.0 && height > 60.0;
        let half = text_width(&mark.text) / 2.0;
        let (anchor, text_x) = if x + half > left + width {
            (Anchor::End, x + 6.0)
        } else if x - half < left {
            (Anchor::Start, x - 6.0)
        } else {
            (Anchor::Middle, x)
        };
        let text_y = if below { y + 21.0 } else { y - 12.0 };
        svg.text("ink b halo", (text_x, text_y), anchor, &fit(&mark.text, width));
    }
}

pub(crate) fn line_class(shape: Shape) -> &'static str {
    match shape {
        Shape::Raw => "raw",
        Shape::Dashed => "dash",
        Shape::Dots => "thin",
        Shape::Line | Shape::Band => "ln",
    }
}
