//! Bars for amounts by name, and a map of layers by roles.

use crate::human;
use crate::svg::{Anchor, Svg, fit, text_width};

/// Horizontal bars, one for each named amount.
#[derive(Debug, Clone)]
pub struct Bars {
    title: String,
    unit: String,
    bars: Vec<(String, f64)>,
}

impl Bars {
    /// Bars of `(name, amount)` from top to bottom; `unit` stands behind each amount.
    pub fn new(title: &str, unit: &str, bars: Vec<(String, f64)>) -> Bars {
        Bars { title: title.to_string(), unit: unit.to_string(), bars }
    }

    /// The bars as an SVG file of this width in pixels; the height follows from their number.
    pub fn svg(&self, width: f64) -> String {
        self.card(width).file(&self.title)
    }

    pub(crate) fn card(&self, width: f64) -> Svg {
        const ROW: f64 = 22.0;
        let mut svg = Svg::new(width, 48.0 + ROW * self.bars.len() as f64);
        svg.text("ink h2", (16.0, 26.0), Anchor::Start, &fit(&self.title, width - 32.0));
        let names = self.bars.iter().map(|bar| text_width(&bar.0)).fold(0.0, f64::max).min(width * 0.4);
        let texts: Vec<String> = self.bars.iter().map(|bar| self.amount(bar.1)).collect();
        let amounts = texts.iter().map(|text| text_width(text)).fold(0.0, f64::max);
        let (left, room) = (16.0 + names + 10.0, (width - names - amounts - 52.0).max(10.0));
        let finite = || self.bars.iter().map(|bar| bar.1).filter(|amount| amount.abs() < 1e300);
        let (lowest, highest) = (finite().fold(0.0, f64::min), finite().fold(0.0, f64::max));
        let span = if highest > lowest { highest - lowest } else { 1.0 };
        for (index, ((name, amount), text)) in self.bars.iter().zip(&texts).enumerate() {
            let y = 40.0 + ROW * index as f64;
            svg.text("ink", (left - 10.0, y + 13.0), Anchor::End, &fit(name, names));
            let (from, to) = (amount.min(0.0), amount.max(0.0));
            let shown = amount.abs() < 1e300;
            let (x, length) =
                if shown { ((from - lowest) / span * room, (to - from) / span * room) } else { (0.0, 0.0) };
            if length > 0.0 {
                let tip = format!("{name}: {text}");
                svg.cell("f0", (left + x, y + 2.0), (length.max(1.0), ROW - 7.0), 0.85, &tip);
            }
            svg.text(
                if shown { "soft" } else { "badf" },
                (left + x + length + 6.0, y + 13.0),
                Anchor::Start,
                text,
            );
        }
        svg
    }

    fn amount(&self, amount: f64) -> String {
        format!("{} {}", human::number(amount, 3), self.unit).trim_end().to_string()
    }
}

/// A map of values by layer (rows) and role (columns); deeper colour is a larger value.
#[derive(Debug, Clone)]
pub struct HeatMap {
    title: String,
    columns: Vec<String>,
    rows: Vec<(String, Vec<Option<f64>>)>,
}

const CELL_HEIGHT: f64 = 20.0;

impl HeatMap {
    /// A map with a column for each role; each row is a layer's name and its values, `None` where nothing was adapted.
    pub fn new(title: &str, columns: Vec<String>, rows: Vec<(String, Vec<Option<f64>>)>) -> HeatMap {
        HeatMap { title: title.to_string(), columns, rows }
    }

    /// The map as an SVG file of at most this width in pixels; the height follows from the number of layers.
    pub fn svg(&self, width: f64) -> String {
        self.card(width).file(&self.title)
    }

    pub(crate) fn card(&self, width: f64) -> Svg {
        let names = self.rows.iter().map(|row| text_width(&row.0)).fold(20.0, f64::max).min(width * 0.4);
        let left = 16.0 + names + 10.0;
        let cell = ((width - left - 16.0) / self.columns.len().max(1) as f64).clamp(4.0, 72.0);
        let mut svg = Svg::new(width, 92.0 + CELL_HEIGHT * self.rows.len() as f64);
        svg.text("ink h2", (16.0, 26.0), Anchor::Start, &fit(&self.title, width - 32.0));
        for (index, column) in self.columns.iter().enumerate() {
            let x = left + cell * (index as f64 + 0.5);
            svg.text("soft", (x, 50.0), Anchor::Middle, &fit(column, cell - 4.0));
        }
        let values = || self.rows.iter().flat_map(|row| row.1.iter().flatten().copied());
        let largest = values().filter(|value| value.is_finite()).fold(0.0, f64::max);
        for (index, (name, cells)) in self.rows.iter().enumerate() {
            let y = 58.0 + CELL_HEIGHT * index as f64;
            svg.text("soft", (left - 10.0, y + 14.0), Anchor::End, &fit(name, names));
            for (column, value) in cells.iter().enumerate().take(self.columns.len()) {
                let place = (left + cell * column as f64, y, cell);
                let tip =
                    |value: f64| format!("{name} {}: {}", self.columns[column], human::number(value, 4));
                match value {
                    Some(value) => draw_cell(&mut svg, place, *value, largest, &tip(*value)),
                    None => svg.text("soft", (place.0 + cell / 2.0, y + 14.0), Anchor::Middle, "·"),
                }
            }
        }
        self.draw_scale(&mut svg, left, largest);
        svg
    }

    fn draw_scale(&self, svg: &mut Svg, left: f64, largest: f64) {
        let y = 66.0 + CELL_HEIGHT * self.rows.len() as f64;
        svg.text("soft s", (left, y + 11.0), Anchor::Start, "0");
        for index in 0..8 {
            svg.cell(
                "f0",
                (left + 12.0 + 14.0 * index as f64, y + 1.0),
                (13.0, 12.0),
                opacity(index as f64 / 7.0),
                "",
            );
        }
        svg.text("soft s", (left + 130.0, y + 11.0), Anchor::Start, &human::number(largest, 3));
    }
}

/// Draws one value; `place` is left, top, width.
fn draw_cell(svg: &mut Svg, place: (f64, f64, f64), value: f64, largest: f64, tip: &str) {
    let (x, y, width) = place;
    let middle = (x + width / 2.0, y + 14.0);
    if !value.is_finite() {
        svg.text("badf b s", middle, Anchor::Middle, &fit(&human::number(value, 2), width));
        return;
    }
    let share = if largest > 0.0 { (value / largest).clamp(0.0, 1.0) } else { 0.0 };
    svg.cell("f0", (x + 1.0, y + 1.0), (width - 2.0, CELL_HEIGHT - 2.0), opacity(share), tip);
    let text = human::number(value, 2);
    if text_width(&text) <= width - 4.0 {
        svg.text(if share > 0.5 { "on s" } else { "ink s" }, middle, Anchor::Middle, &text);
    }
}

/// Even the smallest value is told apart from nothing.
fn opacity(share: f64) -> f64 {
    0.06 + 0.94 * share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_of_any_sign_and_size() {
        let bars = [("a<b", 3.0), ("b", -1.0), ("c", f64::NAN), ("d", 0.0), ("e", f64::INFINITY)];
        let text =
            Bars::new("t", "rows", bars.map(|(name, amount)| (name.to_string(), amount)).to_vec()).svg(500.0);
        roxmltree::Document::parse(&text).unwrap();
        assert!(text.contains("a&lt;b") && text.contains("NaN rows") && text.contains("inf rows"));
        for rect in text.split("width=\"").skip(1) {
            assert!(rect.split('"').next().unwrap().parse::<f64>().unwrap() <= 500.0);
        }
        roxmltree::Document::parse(&Bars::new("", "", Vec::new()).svg(100.0)).unwrap();
    }

    #[test]
    fn the_largest_cell_is_the_deepest() {
        let rows = vec![
            ("0".to_string(), vec![Some(0.01), None]),
            ("1".to_string(), vec![Some(0.02), Some(f64::NAN)]),
        ];
        let text = HeatMap::new("t", vec!["q".into(), "v&".into()], rows).svg(400.0);
        let document = roxmltree::Document::parse(&text).unwrap();
        let depth = |tip: &str| {
            let title = document.descendants().find(|node| node.text() == Some(tip)).unwrap();
            title.parent_element().unwrap().attribute("fill-opacity").unwrap().to_string()
        };
        let tip_of = |node: roxmltree::Node| node.text().map(str::to_string);
        assert!(document.descendants().filter_map(tip_of).any(|text| text == "NaN"));
        assert_eq!((depth("0 q: 0.01"), depth("1 q: 0.02")), ("0.53".to_string(), "1.00".to_string()));
        roxmltree::Document::parse(&HeatMap::new("", Vec::new(), Vec::new()).svg(100.0)).unwrap();
    }
}
