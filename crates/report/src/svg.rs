//! A writer of SVG, and the one look of all pictures.
//!
//! A picture brings its own opaque card, so that it reads the same on a light page, on a dark page, and on a page whose
//! theme differs from the system's. Colours are classes: light by default, dark under `prefers-color-scheme: dark`, and
//! always light in print. A viewer that knows no media queries shows the light picture.

use std::fmt::Write;

use crate::human::trim_zeros;

/// How many colours tell series apart.
pub(crate) const COLORS: usize = 6;

/// Hues that stay apart for colour-blind readers, for the light and the dark card.
const LIGHT: [&str; COLORS] = ["#2563eb", "#c2410c", "#0f766e", "#7c3aed", "#be185d", "#4d7c0f"];
const DARK: [&str; COLORS] = ["#60a5fa", "#fb923c", "#2dd4bf", "#a78bfa", "#f472b6", "#a3e635"];

/// Ink of everything but the series: class, property, light, dark.
const INKS: [(&str, &str, &str, &str); 9] = [
    ("card", "fill", "#ffffff", "#0f1620"),
    ("edge", "stroke", "#d9dee5", "#2b3542"),
    ("grid", "stroke", "#e8ebef", "#212b37"),
    ("base", "stroke", "#9aa4b2", "#56626f"),
    ("ink", "fill", "#17202b", "#e8edf3"),
    ("soft", "fill", "#5b6675", "#9aa7b6"),
    ("bad", "stroke", "#c81e1e", "#f87171"),
    ("badf", "fill", "#c81e1e", "#f87171"),
    ("on", "fill", "#ffffff", "#0b1119"),
];

/// Horizontal alignment of text at its point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// A picture while it is drawn; coordinates are in pixels from the top left corner.
pub(crate) struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    /// A card of this size.
    pub fn new(width: f64, height: f64) -> Svg {
        let mut svg = Svg { body: String::new(), width, height };
        svg.put(format_args!(
            "<rect class=\"card edge\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"8\"/>\n",
            num(width - 1.0),
            num(height - 1.0)
        ));
        svg
    }

    pub fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let (x1, y1, x2, y2) = (num(from.0), num(from.1), num(to.0), num(to.1));
        self.put(format_args!("<path class=\"{class}\" d=\"M{x1} {y1}L{x2} {y2}\"/>\n"));
    }

    /// A path by its data; nothing when there is none.
    pub fn path(&mut self, class: &str, data: &str) {
        if !data.is_empty() {
            self.put(format_args!("<path class=\"{class}\" d=\"{data}\"/>\n"));
        }
    }

    /// A circle with a tip shown under the pointer.
    pub fn dot(&mut self, class: &str, at: (f64, f64), radius: f64, tip: &str) {
        let (x, y, radius) = (num(at.0), num(at.1), num(radius));
        self.put(format_args!("<circle class=\"{class}\" cx=\"{x}\" cy=\"{y}\" r=\"{radius}\">"));
        self.tip(tip);
        self.body.push_str("</circle>\n");
    }

    /// A rectangle with an opacity and a tip shown under the pointer.
    pub fn cell(&mut self, class: &str, at: (f64, f64), size: (f64, f64), opacity: f64, tip: &str) {
        let (x, y, width, height) = (num(at.0), num(at.1), num(size.0), num(size.1));
        self.put(format_args!(
            "<rect class=\"{class}\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"2\" \
             fill-opacity=\"{opacity:.2}\">"
        ));
        self.tip(tip);
        self.body.push_str("</rect>\n");
    }

    pub fn text(&mut self, class: &str, at: (f64, f64), anchor: Anchor, text: &str) {
        let (x, y) = (num(at.0), num(at.1));
        let anchor = anchor_attribute(anchor);
        self.put(format_args!(
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\"{anchor}>{}</text>\n",
            escape(text)
        ));
    }

    /// Text that runs upwards, centred on its point.
    pub fn upright_text(&mut self, class: &str, at: (f64, f64), text: &str) {
        let (x, y) = (num(at.0), num(at.1));
        self.put(format_args!(
            "<text class=\"{class}\" text-anchor=\"middle\" transform=\"translate({x} {y}) rotate(-90)\">{}</text>\n",
            escape(text)
        ));
    }

    /// The whole picture as an SVG file, named `label` for those who cannot see it.
    pub fn file(self, label: &str) -> String {
        let style = style();
        self.finish(label, &format!("<style>{style}</style>\n"))
    }

    /// The picture for a page that holds [`style`] once.
    pub fn inline(self, label: &str) -> String {
        self.finish(label, "")
    }

    fn finish(self, label: &str, style: &str) -> String {
        let (width, height) = (num(self.width), num(self.height));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"eg\" role=\"img\" aria-label=\"{}\" width=\"{width}\" \
             height=\"{height}\" viewBox=\"0 0 {width} {height}\">\n{style}{}</svg>\n",
            escape(label),
            self.body
        )
    }

    fn tip(&mut self, tip: &str) {
        if !tip.is_empty() {
            self.put(format_args!("<title>{}</title>", escape(tip)));
        }
    }

    fn put(&mut self, arguments: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = self.body.write_fmt(arguments);
    }
}

/// The style sheet of all pictures.
pub(crate) fn style() -> String {
    let mut css = String::from(
        "\n.eg{font-family:system-ui,-apple-system,\"Segoe UI\",Roboto,Helvetica,Arial,sans-serif;font-size:12px}\n\
         .eg text{font-variant-numeric:tabular-nums}\n.eg .h1{font-size:16px;font-weight:600}\n\
         .eg .h2{font-size:13px;font-weight:600}\n.eg .b{font-weight:600}\n.eg .s{font-size:11px}\n\
         .eg .ln,.eg .thin,.eg .dash,.eg .raw,.eg .grid,.eg .base,.eg .bad{fill:none}\n\
         .eg .ln{stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}\n\
         .eg .thin{stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}\n\
         .eg .raw{stroke-width:1;stroke-opacity:.3;stroke-linejoin:round}\n\
         .eg .dash{stroke-width:1.6;stroke-dasharray:5 4}\n.eg .rule{stroke-dasharray:2 3}\n\
         .eg .band{fill-opacity:.16}\n.eg .bad{stroke-width:1.6}\n.eg .ring{stroke-width:2.2}\n",
    );
    css.push_str(&inks(LIGHT, false));
    let _ = write!(css, "@media screen and (prefers-color-scheme:dark){{\n{}}}\n", inks(DARK, true));
    css
}

fn inks(series: [&str; COLORS], dark: bool) -> String {
    let mut css = String::new();
    for (class, property, light_ink, dark_ink) in INKS {
        let ink = if dark { dark_ink } else { light_ink };
        let _ = writeln!(css, ".eg .{class}{{{property}:{ink}}}");
    }
    let card = if dark { INKS[0].3 } else { INKS[0].2 };
    // A halo in the card's colour keeps text readable on top of lines.
    let _ =
        writeln!(css, ".eg .halo{{paint-order:stroke;stroke:{card};stroke-width:4px;stroke-linejoin:round}}");
    for (index, color) in series.into_iter().enumerate() {
        let _ = writeln!(css, ".eg .c{index}{{stroke:{color}}}.eg .f{index}{{fill:{color}}}");
    }
    let _ = writeln!(css, ".eg .dot,.eg .ring{{stroke:{card}}}");
    css
}

/// A coordinate with one decimal at most.
pub(crate) fn num(value: f64) -> String {
    let text = format!("{value:.1}");
    let text = trim_zeros(&text);
    if text == "-0" { "0".to_string() } else { text.to_string() }
}

fn anchor_attribute(anchor: Anchor) -> &'static str {
    match anchor {
        Anchor::Start => "",
        Anchor::Middle => " text-anchor=\"middle\"",
        Anchor::End => " text-anchor=\"end\"",
    }
}

/// Text safe between tags and in attributes; characters that XML cannot hold become U+FFFD.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' | '\r' => escaped.push(' '),
            '\u{0}'..='\u{1F}' | '\u{7F}' | '\u{FFFE}' | '\u{FFFF}' => escaped.push('\u{FFFD}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// An upper estimate of the width in pixels of text at 12 pixels; the font that shows it is not known here.
pub(crate) fn text_width(text: &str) -> f64 {
    let em: f64 = text
        .chars()
        .map(|c| match c {
            'i' | 'j' | 'l' | 't' | 'f' | 'I' | '.' | ',' | ':' | ' ' | '\'' | '|' => 0.38,
            'm' | 'w' | 'M' | 'W' | '@' | '%' => 0.95,
            'A'..='Z' => 0.74,
            c if c.is_ascii() => 0.62,
            _ => 1.05,
        })
        .sum();
    em * 12.0
}

/// Text cut to a width in pixels, with an ellipsis where something is missing.
pub(crate) fn fit(text: &str, width: f64) -> String {
    if text_width(text) <= width {
        return text.to_string();
    }
    let mut cut = String::new();
    for c in text.chars() {
        cut.push(c);
        if text_width(&cut) + 12.0 > width {
            cut.pop();
            break;
        }
    }
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_stays_text() {
        let hostile = "</text><script>alert('x')</script>\u{1b}[2J\u{0}\u{FFFF}&\"";
        let mut svg = Svg::new(100.0, 50.0);
        svg.text("ink", (5.0, 5.0), Anchor::End, hostile);
        svg.dot("dot f0", (1.0, 2.0), 3.0, hostile);
        let text = svg.file(hostile);
        assert!(!text.contains("<script"));
        let document = roxmltree::Document::parse(&text).unwrap();
        let shown = document
            .descendants()
            .find(|node| node.has_tag_name("text"))
            .and_then(|node| node.text())
            .unwrap();
        assert!(shown.starts_with("</text><script>alert('x')"), "{shown}");
    }

    #[test]
    fn both_themes_define_every_class() {
        let css = style();
        let (light, dark) = css.split_once("@media").unwrap();
        for index in 0..COLORS {
            assert!(light.contains(&format!(".c{index}{{")) && dark.contains(&format!(".c{index}{{")));
        }
        for (class, ..) in INKS {
            assert!(
                light.contains(&format!(".{class}{{")) && dark.contains(&format!(".{class}{{")),
                "{class}"
            );
        }
    }

    #[test]
    fn text_is_cut_only_when_too_wide() {
        assert_eq!(fit("loss", 100.0), "loss");
        let cut = fit(&"x".repeat(10_000), 100.0);
        assert!(cut.ends_with('…') && text_width(&cut) <= 106.0, "{cut}");
        assert_eq!((num(1.25), num(-0.01), num(3.0)), ("1.2".into(), "0".into(), "3".into()));
    }
}
