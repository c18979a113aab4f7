//! Mistakes and how they are shown: what is wrong, the lines with the place underlined, `note:`, `help:`, and one
//! closing line that counts them and says what was left untouched.

use std::ops::Range;
use std::sync::Arc;

use annotate_snippets::renderer::{DEFAULT_EMPHASIS_STYLE, DEFAULT_ERROR_STYLE};
use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

use crate::spec::Origin;

/// Problems shown in full; the rest are counted.
const SHOWN: usize = 40;
/// Bytes of a line that is still shown.
const LONGEST: usize = 4096;
/// Characters of a name or a value that a message repeats.
const QUOTED: usize = 60;

/// A text that problems point into: the recipe, or one argument of `--set`.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// The file as the user named it; empty for an argument.
    pub name: String,
    /// The text; for an argument with `--set ` in front.
    pub text: String,
}

/// A stretch of the recipe, or of one argument of `--set`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub(crate) source: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Place {
    pub(crate) fn new(source: usize, span: Range<usize>) -> Self {
        Self { source, start: span.start, end: span.end }
    }

    pub(crate) fn origin(&self) -> Origin {
        if self.source == 0 { Origin::Recipe } else { Origin::Set }
    }
}

/// An underlined place and the words beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Where.
    pub place: Place,
    /// Words; may be empty.
    pub text: String,
    /// `^^^` and the place in the header, rather than `---`.
    pub primary: bool,
}

/// Rows beneath a title where a mistake is in files rather than in the recipe: tensor, expected, found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Names of the columns.
    pub head: [String; 3],
    /// The rows; ten are shown and the rest counted.
    pub rows: Vec<[String; 3]>,
}

/// One mistake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub title: String,
    /// Where.
    pub labels: Vec<Label>,
    /// Rows of names, expected and found.
    pub grid: Option<Box<Grid>>,
    /// Facts that were checked.
    pub notes: Vec<String>,
    /// Edits or commands to paste.
    pub helps: Vec<String>,
}

impl Problem {
    /// A mistake without a place.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), ..Self::default() }
    }

    /// Underlines a place with `^^^`.
    pub fn label(mut self, place: Place, text: impl Into<String>) -> Self {
        self.labels.push(Label { place, text: text.into(), primary: true });
        self
    }

    /// Underlines a place that belongs to it with `---`.
    pub fn context(mut self, place: Place, text: impl Into<String>) -> Self {
        self.labels.push(Label { place, text: text.into(), primary: false });
        self
    }

    /// Puts words beside the last underlined place.
    pub fn saying(mut self, text: impl Into<String>) -> Self {
        if let Some(label) = self.labels.last_mut() {
            label.text = text.into();
        }
        self
    }

    /// Adds rows of name, expected and found.
    pub fn grid(mut self, head: [&str; 3], rows: Vec<[String; 3]>) -> Self {
        self.grid = Some(Box::new(Grid { head: head.map(str::to_owned), rows }));
        self
    }

    /// Adds a fact.
    pub fn note(mut self, text: impl Into<String>) -> Self {
        self.notes.push(text.into());
        self
    }

    /// Adds an edit or command.
    pub fn help(mut self, text: impl Into<String>) -> Self {
        self.helps.push(text.into());
        self
    }

    /// Shows this problem alone, where no recipe is at hand (its labels, if any, are left out). No closing line.
    pub fn render(&self, width: usize, color: bool) -> String {
        show(self, &[], &renderer(width, color), color)
    }

    /// Where it stands in the text, for sorting: the recipe first, then the arguments; those without a place first.
    fn order(&self) -> Option<Place> {
        self.labels.iter().find(|label| label.primary).map(|label| label.place.clone())
    }
}

/// All mistakes of one reading.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", self.render(100, false))]
pub struct Problems {
    /// In the order of the text.
    pub list: Vec<Problem>,
    sources: Arc<[Source]>,
    untouched: &'static str,
}

impl Problems {
    pub(crate) fn new(sources: Arc<[Source]>, mut list: Vec<Problem>) -> Self {
        list.sort_by_cached_key(Problem::order);
        Self { list, sources, untouched: "nothing was loaded or written" }
    }

    /// Says in the closing line what was left untouched, where it is not "nothing was loaded or written".
    pub fn leaving(mut self, untouched: &'static str) -> Self {
        self.untouched = untouched;
        self
    }

    /// All of them as text, with the closing line. `width` in characters, held between 60 and 120.
    pub fn render(&self, width: usize, color: bool) -> String {
        let renderer = renderer(width, color);
        let mut text = String::new();
        for problem in self.list.iter().take(SHOWN) {
            text.push_str(&show(problem, &self.sources, &renderer, color));
            text.push('\n');
        }
        if self.list.len() > SHOWN {
            text.push_str(&format!("and {} more\n\n", self.list.len() - SHOWN));
        }
        text.push_str(&self.closing());
        text.push('\n');
        text
    }

    /// `3 errors in recipe.toml; nothing was loaded or written`.
    fn closing(&self) -> String {
        let in_source = |set: bool| move |label: &Label| label.primary && (label.place.source > 0) == set;
        let argument = self.list.iter().any(|problem| problem.labels.iter().any(in_source(true)));
        let file = self.list.iter().any(|p| p.labels.is_empty() || p.labels.iter().any(in_source(false)));
        let name = self.sources.first().map_or("the recipe", |source| source.name.as_str());
        let place = match (file, argument) {
            (false, true) => "--set".to_owned(),
            (true, true) => format!("{name} and --set"),
            _ => name.to_owned(),
        };
        let count = self.list.len();
        let errors = if count == 1 { "error" } else { "errors" };
        format!("{count} {errors} in {place}; {}", self.untouched)
    }
}

fn renderer(width: usize, color: bool) -> Renderer {
    let renderer = if color { Renderer::styled() } else { Renderer::plain() };
    renderer.term_width(width.clamp(60, 120))
}

/// One problem, ending in a line end.
fn show(problem: &Problem, sources: &[Source], renderer: &Renderer, color: bool) -> String {
    let labels: Vec<&Label> = problem.labels.iter().filter(|l| l.place.source < sources.len()).collect();
    if labels.is_empty() {
        return plain(problem, None, color);
    }
    if labels.iter().any(|label| line_of(&sources[label.place.source].text, &label.place).len() > LONGEST) {
        return plain(problem, Some(&whereabouts(labels[0], sources)), color);
    }
    let mut group = Group::with_title(Level::ERROR.primary_title(problem.title.as_str()));
    let mut done: Vec<usize> = Vec::new();
    // The source of the first primary label leads: its place is in the header.
    let first = labels.iter().find(|label| label.primary).unwrap_or(&labels[0]).place.source;
    for source in std::iter::once(first).chain(labels.iter().map(|label| label.place.source)) {
        if done.contains(&source) {
            continue;
        }
        done.push(source);
        let here: Vec<&Label> = labels.iter().copied().filter(|label| label.place.source == source).collect();
        group = group.element(snippet(&sources[source], &here));
    }
    for note in &problem.notes {
        group = group.element(Level::NOTE.message(note.as_str()));
    }
    for help in &problem.helps {
        group = group.element(Level::HELP.message(help.as_str()));
    }
    let mut text = renderer.render(&[group]);
    text.push('\n');
    text
}

/// The lines from the first label to the last, so that the cost does not depend on the size of the file.
fn snippet<'a>(source: &'a Source, labels: &[&'a Label]) -> Snippet<'a, annotate_snippets::Annotation<'a>> {
    let text = source.text.as_str();
    let first = labels.iter().map(|label| label.place.start).min().unwrap_or(0);
    let last = labels.iter().map(|label| label.place.start).max().unwrap_or(0);
    let start = text[..floor(text, first)].rfind('\n').map_or(0, |at| at + 1);
    let end = line_end(text, floor(text, last));
    let line = text[..start].matches('\n').count() + 1;
    let mut snippet = Snippet::source(&text[start..end]).line_start(line);
    if source.name.is_empty() {
        snippet = snippet.line_numbering(false);
    } else {
        snippet = snippet.path(source.name.as_str());
    }
    for label in labels {
        let kind = if label.primary { AnnotationKind::Primary } else { AnnotationKind::Context };
        let span = clip(text, &label.place);
        let annotation = kind.span(span.start - start..span.end - start);
        snippet = snippet.annotation(match label.text.is_empty() {
            true => annotation,
            false => annotation.label(label.text.as_str()),
        });
    }
    snippet
}

/// The part of a place on its first line, inside the text and on character borders.
fn clip(text: &str, place: &Place) -> Range<usize> {
    let start = floor(text, place.start);
    let end = floor(text, place.end).min(line_end(text, start)).max(start);
    start..end
}

/// The line on which a place begins.
fn line_of<'a>(text: &'a str, place: &Place) -> &'a str {
    let at = floor(text, place.start);
    &text[text[..at].rfind('\n').map_or(0, |end| end + 1)..line_end(text, at)]
}

/// ` --> recipe.toml:2:11 words`, for a line too long to show.
fn whereabouts(label: &Label, sources: &[Source]) -> String {
    let source = &sources[label.place.source];
    let before = &source.text[..floor(&source.text, label.place.start)];
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    let name = if source.name.is_empty() { "--set" } else { source.name.as_str() };
    format!(" --> {name}:{line}:{column} {}", label.text).trim_end().to_owned() + "\n"
}

/// The end of the line of `at`, without its line end.
fn line_end(text: &str, at: usize) -> usize {
    let end = text[at..].find('\n').map_or(text.len(), |found| at + found);
    if end > at && text.as_bytes()[end - 1] == b'\r' { end - 1 } else { end }
}

fn floor(text: &str, at: usize) -> usize {
    text.floor_char_boundary(at.min(text.len()))
}

/// A problem without lines to show: title, rows, notes, helps.
fn plain(problem: &Problem, place: Option<&str>, color: bool) -> String {
    let mut text = if color {
        let (red, bold) = (DEFAULT_ERROR_STYLE, DEFAULT_EMPHASIS_STYLE);
        format!("{red}error{red:#}{bold}: {}{bold:#}\n", problem.title)
    } else {
        format!("error: {}\n", problem.title)
    };
    text.push_str(place.unwrap_or(""));
    if let Some(grid) = &problem.grid {
        text.push_str(&rows(grid));
    }
    let notes = problem.notes.iter().map(|note| ("note", note));
    for (word, message) in notes.chain(problem.helps.iter().map(|help| ("help", help))) {
        let indent = format!("\n{}", " ".repeat("  = note: ".len()));
        text.push_str(&format!("  = {word}: {}\n", message.replace('\n', &indent)));
    }
    text
}

/// Ten rows at most, then a count. Widths in characters.
fn rows(grid: &Grid) -> String {
    const MOST: usize = 10;
    let shown = &grid.rows[..grid.rows.len().min(MOST)];
    let width = |column: usize| {
        std::iter::once(&grid.head).chain(shown).map(|row| row[column].chars().count()).max().unwrap_or(0)
    };
    let (first, second) = (width(0) + 2, width(1) + 3);
    let mut text = String::new();
    for [name, expected, found] in std::iter::once(&grid.head).chain(shown) {
        text.push_str(&format!("  {name:first$}{expected:second$}{found}\n"));
    }
    if grid.rows.len() > MOST {
        text.push_str(&format!("  and {} more\n", grid.rows.len() - MOST));
    }
    text
}

/// A user's text inside a message: control characters escaped, long ones cut.
pub(crate) fn quoted(text: &str) -> String {
    let mut shown: String = text
        .chars()
        .take(QUOTED)
        .flat_map(|c| if c.is_control() { c.escape_debug().collect::<Vec<_>>() } else { vec![c] })
        .collect();
    if text.chars().nth(QUOTED).is_some() {
        shown.push_str("...");
    }
    shown
}
