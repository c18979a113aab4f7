//! Charts of series over one x-axis.
//!
//! From top to bottom: title, legend (in rows of its own, so that it never lies on data), plot, x-axis. A value that is
//! not finite leaves a gap in its line and a cross at the top edge; a value beyond a trimmed axis leaves a triangle
//! there. Both are counted in the legend.

use crate::axis::{Axis, Range, Scale};
use crate::frame::{Frame, Trouble, line_class};
use crate::svg::{Anchor, COLORS, Svg, fit, text_width};

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Line,
    Raw,
    Dashed,
    Dots,
    Band,
}

/// Named points in order of x.
#[derive(Debug, Clone)]
pub struct Series {
    pub(crate) label: String,
    pub(crate) shape: Shape,
    pub(crate) points: Vec<(f64, f64)>,
    /// Upper edge of a band, one value for each point; empty for other shapes.
    pub(crate) upper: Vec<f64>,
    color: Option<usize>,
}

impl Series {
    /// A line.
    pub fn line(label: &str, points: Vec<(f64, f64)>) -> Series {
        Series { label: label.to_string(), shape: Shape::Line, points, upper: Vec::new(), color: None }
    }

    /// A thin faint line, for raw values behind smoothed ones.
    pub fn raw(label: &str, points: Vec<(f64, f64)>) -> Series {
        Series { shape: Shape::Raw, ..Series::line(label, points) }
    }

    /// A dashed line.
    pub fn dashed(label: &str, points: Vec<(f64, f64)>) -> Series {
        Series { shape: Shape::Dashed, ..Series::line(label, points) }
    }

    /// Points joined by a thin line, for measurements that are far apart.
    pub fn dots(label: &str, points: Vec<(f64, f64)>) -> Series {
        Series { shape: Shape::Dots, ..Series::line(label, points) }
    }

    /// The area between two values: x, lower, upper.
    pub fn band(label: &str, points: Vec<(f64, f64, f64)>) -> Series {
        let upper = points.iter().map(|point| point.2).collect();
        let lower = points.into_iter().map(|point| (point.0, point.1)).collect();
        Series { shape: Shape::Band, upper, ..Series::line(label, lower) }
    }

    /// Draws in the given colour instead of the next one.
    pub fn color(mut self, color: usize) -> Series {
        self.color = Some(color % COLORS);
        self
    }
}

/// A point with a ring and a note.
#[derive(Debug, Clone)]
pub(crate) struct Mark {
    pub at: (f64, f64),
    pub text: String,
    pub color: usize,
}

/// Series over one x-axis.
#[derive(Debug, Clone)]
pub struct Chart {
    title: String,
    x: Axis,
    y: Axis,
    pub(crate) series: Vec<Series>,
    marks: Vec<Mark>,
    rules: Vec<(f64, String)>,
    trimmed: bool,
    /// Least room in pixels left of the plot, so that charts below each other line up.
    gutter: f64,
}

/// A rectangle in pixels: left, top, width, height.
pub(crate) type Area = (f64, f64, f64, f64);

impl Chart {
    /// An empty chart.
    pub fn new(title: &str, x: Axis, y: Axis) -> Chart {
        Chart {
            title: title.to_string(),
            x,
            y,
            series: Vec::new(),
            marks: Vec::new(),
            rules: Vec::new(),
            trimmed: false,
            gutter: 0.0,
        }
    }

    /// Adds a series; later ones are drawn on top.
    pub fn with(mut self, series: Series) -> Chart {
        self.series.push(series);
        self
    }

    /// Puts a ring and a note at a point.
    pub fn mark(mut self, at: (f64, f64), text: &str, color: usize) -> Chart {
        self.marks.push(Mark { at, text: text.to_string(), color: color % COLORS });
        self
    }

    /// Draws a vertical dotted line at `x`, with a note.
    pub fn rule(mut self, x: f64, text: &str) -> Chart {
        self.rules.push((x, text.to_string()));
        self
    }

    /// Lets rare raw values (beyond the 99th percentile) leave the y-axis instead of flattening all others.
    pub fn trim_outliers(mut self) -> Chart {
        self.trimmed = true;
        self
    }

    /// Leaves at least this room left of the plot.
    pub(crate) fn gutter(mut self, gutter: f64) -> Chart {
        self.gutter = gutter;
        self
    }

    /// The chart as an SVG file of this size in pixels.
    pub fn svg(&self, width: f64, height: f64) -> String {
        self.card(width, height).file(&self.title)
    }

    pub(crate) fn card(&self, width: f64, height: f64) -> Svg {
        let mut svg = Svg::new(width, height);
        self.draw(&mut svg, (16.0, 12.0, width - 32.0, height - 24.0));
        svg
    }

    /// Draws the chart into a part of a picture.
    pub(crate) fn draw(&self, svg: &mut Svg, area: Area) {
        let (left, top, width, height) = area;
        if !self.title.is_empty() {
            svg.text("ink h2", (left, top + 12.0), Anchor::Start, &fit(&self.title, width));
        }
        let (x, y) = self.ranges(height);
        let y_ticks = y.ticks(wanted_ticks(height - 90.0, 40.0));
        let labels = y_ticks.iter().map(|tick| text_width(&tick.label)).fold(0.0, f64::max);
        let gutter = (labels + 26.0).max(self.gutter);
        let found = Trouble::of(self, &x, &y);
        let legend_top = top + if self.title.is_empty() { 0.0 } else { 20.0 };
        let plot_width = (width - gutter - 6.0).max(20.0);
        let legend = self.draw_legend(svg, &found, (left + gutter, legend_top, plot_width));
        let plot_top = legend_top + legend + 8.0;
        let plot = (left + gutter, plot_top, plot_width, (top + height - 36.0 - plot_top).max(20.0));
        let frame = Frame { plot, x, y };
        self.draw_axes(svg, &frame, &y_ticks, left);
        for (index, series) in self.series.iter().enumerate() {
            frame.draw_series(svg, series, self.color_of(index), &self.y.label);
        }
        frame.draw_trouble(svg, &found);
        for mark in &self.marks {
            frame.draw_mark(svg, mark);
        }
    }

    /// Series without a colour of their own take the palette in turn.
    fn color_of(&self, index: usize) -> usize {
        self.series[index].color.unwrap_or(index % COLORS)
    }

    fn ranges(&self, height: f64) -> (Range, Range) {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x = match self.x.limits {
            Some((lo, hi)) => Range::between(lo, hi, self.x.scale),
            None => Range::of(points().map(|point| point.0), self.x.scale),
        };
        let y = match self.y.limits {
            Some((lo, hi)) => Range::between(lo, hi, self.y.scale),
            None => {
                let marks = self.marks.iter().map(|mark| mark.at.1);
                let values = self.series.iter().flat_map(|series| self.counted(series));
                Range::of(values.chain(marks), self.y.scale)
                    .with_zero()
                    .rounded(wanted_ticks(height - 90.0, 40.0))
            }
        };
        (x, y)
    }

    /// The values of a series that the y-axis must hold.
    fn counted(&self, series: &Series) -> Vec<f64> {
        let mut values: Vec<f64> =
            series.points.iter().map(|point| point.1).chain(series.upper.clone()).collect();
        if self.trimmed && series.shape == Shape::Raw {
            values.retain(|value| value.is_finite());
            values.sort_by(f64::total_cmp);
            let most = values.len() - values.len() / 100;
            // Only what lies far out leaves; ordinary noise stays.
            let limit = values.get(most.saturating_sub(1)).map_or(f64::INFINITY, |value| value.abs() * 1.5);
            values.retain(|value| *value <= limit);
        }
        values
    }

    /// Draws the legend and returns its height.
    fn draw_legend(&self, svg: &mut Svg, found: &Trouble, area: (f64, f64, f64)) -> f64 {
        let (left, top, width) = area;
        let mut items: Vec<(Option<usize>, String)> =
            (0..self.series.len()).map(|index| (Some(index), self.series[index].label.clone())).collect();
        items.extend(found.notes().into_iter().map(|note| (None, note)));
        items.retain(|(_, label)| !label.is_empty());
        let (mut x, mut y) = (left, top + 11.0);
        for (series, label) in &items {
            let label = fit(label, width - 30.0);
            let needed = if series.is_some() { 24.0 } else { 0.0 } + text_width(&label);
            if x > left && x + needed > left + width {
                (x, y) = (left, y + 17.0);
            }
            let text_x = match series {
                Some(index) => self.draw_swatch(svg, *index, (x, y - 4.0)),
                None => x,
            };
            svg.text(if series.is_some() { "soft" } else { "badf" }, (text_x, y), Anchor::Start, &label);
            x += needed + 14.0;
        }
        if items.is_empty() { 0.0 } else { y - top + 5.0 }
    }

    fn draw_swatch(&self, svg: &mut Svg, index: usize, at: (f64, f64)) -> f64 {
        let (color, end) = (self.color_of(index), (at.0 + 17.0, at.1));
        match self.series[index].shape {
            Shape::Band => svg.cell(&format!("f{color}"), (at.0, at.1 - 5.0), (17.0, 10.0), 0.2, ""),
            Shape::Dots => {
                svg.line(&format!("thin c{color}"), at, end);
                svg.dot(&format!("dot f{color}"), (at.0 + 8.5, at.1), 3.6, "");
            }
            shape => svg.line(&format!("{} c{color}", line_class(shape)), at, end),
        }
        at.0 + 23.0
    }

    fn draw_axes(&self, svg: &mut Svg, frame: &Frame, y_ticks: &[crate::axis::Tick], left: f64) {
        let (plot_left, plot_top, width, height) = frame.plot;
        let (right, bottom) = (plot_left + width, plot_top + height);
        for tick in y_ticks {
            let Some(y) = frame.y_of(tick.value) else { continue };
            if y < plot_top - 0.5 || y > bottom + 0.5 {
                continue;
            }
            svg.line("grid", (plot_left, y), (right, y));
            svg.text("soft", (plot_left - 8.0, y + 4.0), Anchor::End, &tick.label);
        }
        for tick in frame.x.ticks(wanted_ticks(width, 80.0)) {
            let Some(x) = frame.x_of(tick.value) else { continue };
            svg.line("base", (x, bottom), (x, bottom + 4.0));
            svg.text("soft", (x, bottom + 17.0), Anchor::Middle, &tick.label);
        }
        svg.line("base", (plot_left, bottom), (right, bottom));
        for (x, text) in &self.rules {
            if let Some(x) = frame.x_of(*x).filter(|x| (plot_left..=right).contains(x)) {
                svg.line("base rule", (x, plot_top), (x, bottom));
                svg.text("soft s halo", (x + 4.0, bottom - 6.0), Anchor::Start, &fit(text, right - x));
            }
        }
        let scale = |axis: &Axis| if axis.scale == Scale::Log { ", log scale" } else { "" };
        let x_text = format!("{}{}", self.x.text(), scale(&self.x));
        svg.text("soft", (plot_left + width / 2.0, bottom + 33.0), Anchor::Middle, &fit(&x_text, width));
        let y_text = format!("{}{}", self.y.text(), scale(&self.y));
        svg.upright_text("soft", (left + 9.0, plot_top + height / 2.0), &fit(&y_text, height + 30.0));
    }
}

fn wanted_ticks(length: f64, spacing: f64) -> usize {
    (length / spacing).clamp(2.0, 10.0) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart() -> Chart {
        Chart::new("Loss", Axis::new("step"), Axis::new("loss").unit("nats"))
    }

    fn parsed(text: &str) -> roxmltree::Document<'_> {
        let document = roxmltree::Document::parse(text).unwrap();
        assert!(!text.contains("NaN ") && !text.contains("inf "), "a coordinate is not a number");
        document
    }

    fn with_class<'a>(document: &'a roxmltree::Document<'_>, class: &str) -> Vec<roxmltree::Node<'a, 'a>> {
        let has = |node: &roxmltree::Node| {
            node.attribute("class").is_some_and(|classes| classes.split(' ').any(|found| found == class))
        };
        document.descendants().filter(|node| has(node)).collect()
    }

    #[test]
    fn empty_and_single_points_are_drawn() {
        parsed(&chart().svg(400.0, 240.0));
        for series in [Series::line, Series::raw, Series::dashed, Series::dots] {
            let text = chart().with(series("a", vec![(1.0, 2.0)])).svg(400.0, 240.0);
            // One dot for the point; markers in the legend aside.
            let document = parsed(&text);
            assert!(
                with_class(&document, "dot")
                    .iter()
                    .any(|node| node.children().any(|c| c.has_tag_name("title")))
            );
        }
        parsed(&chart().with(Series::band("b", vec![(1.0, 2.0, 3.0)])).svg(10.0, 10.0));
    }

    #[test]
    fn a_gap_is_left_and_marked_for_values_that_are_not_finite() {
        let points =
            vec![(1.0, 1.0), (2.0, 2.0), (3.0, f64::NAN), (4.0, f64::INFINITY), (5.0, 1.0), (6.0, 1.5)];
        let text = chart().with(Series::line("a", points)).svg(600.0, 300.0);
        let document = parsed(&text);
        let line = with_class(&document, "ln")
            .into_iter()
            .max_by_key(|node| node.attribute("d").map(str::len))
            .unwrap();
        assert_eq!(line.attribute("d").unwrap().matches('M').count(), 2);
        assert_eq!(with_class(&document, "bad").len(), 2);
        assert!(text.contains("not finite (2)"));
    }

    #[test]
    fn a_logarithmic_axis_marks_what_it_cannot_show() {
        let points = vec![(1.0, 1.0), (2.0, 0.0), (3.0, 0.01)];
        let log = Chart::new("l", Axis::new("x"), Axis::new("y").log()).with(Series::line("a", points));
        let text = log.svg(600.0, 300.0);
        parsed(&text);
        assert!(text.contains("log scale") && text.contains("not finite (1)"));
    }

    #[test]
    fn rare_spikes_leave_a_trimmed_axis_with_a_mark() {
        let mut points: Vec<(f64, f64)> = (0..500).map(|i| (i as f64, 1.0)).collect();
        points[250].1 = 1e6;
        let text = chart().with(Series::raw("a", points)).trim_outliers().svg(600.0, 300.0);
        assert!(text.contains("beyond the axis (1)"), "{text}");
    }

    #[test]
    fn a_hundred_thousand_points_stay_small() {
        let points: Vec<(f64, f64)> = (0..100_000).map(|i| (i as f64, (i as f64).sin())).collect();
        let text = chart()
            .with(Series::raw("raw", points.clone()))
            .with(Series::line("line", points))
            .svg(800.0, 300.0);
        parsed(&text);
        assert!(text.len() < 150_000, "{} bytes", text.len());
    }

    #[test]
    fn legend_items_do_not_overlap() {
        let mut chart = chart();
        for index in 0..9 {
            chart = chart
                .with(Series::line(&format!("a series with quite a long name {index}"), vec![(0.0, 1.0)]));
        }
        let text = chart.svg(500.0, 400.0);
        let document = parsed(&text);
        let spot = |node: roxmltree::Node| {
            let number = |name| node.attribute(name).unwrap().parse::<f64>().unwrap();
            (number("x"), number("y"), text_width(node.text().unwrap()))
        };
        let items: Vec<_> = with_class(&document, "soft")
            .into_iter()
            .filter(|node| node.text().is_some_and(|text| text.starts_with("a series")))
            .map(spot)
            .collect();
        assert_eq!(items.len(), 9);
        for pair in items.windows(2) {
            let apart = pair[1].1 > pair[0].1 || pair[1].0 >= pair[0].0 + pair[0].2;
            assert!(apart && pair[1].0 + pair[1].2 <= 500.0, "{pair:?}");
        }
    }

    #[test]
    fn hostile_labels_are_escaped_everywhere() {
        let bad = "</svg><script>x</script>\"'&";
        let chart = Chart::new(bad, Axis::new(bad).unit(bad), Axis::new(bad))
            .with(Series::dots(bad, vec![(1.0, 1.0), (2.0, 2.0)]))
            .mark((1.0, 1.0), bad, 7)
            .rule(1.5, bad);
        let text = chart.svg(900.0, 300.0);
        assert!(parsed(&text).descendants().all(|node| !node.has_tag_name("script")));
    }
}
