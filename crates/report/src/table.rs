//! Plain-text tables for the terminal.
//!
//! Columns are aligned with spaces, two between neighbours, and no frame. The width is clamped to 60–120; what does not
//! fit goes away as whole columns from the right, named in a closing line. Cells are never shortened: a cut path or
//! tensor name is worse than none.

const NARROWEST: usize = 60;
const WIDEST: usize = 120;
const GAP: usize = 2;

/// The side on which a column's cells line up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// For words.
    Left,
    /// For numbers.
    Right,
}

/// A table of text cells; the first column is always shown.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these column names.
    pub fn new(columns: &[(&str, Align)]) -> Table {
        let columns = columns.iter().map(|(name, align)| (clean(name), *align)).collect();
        Table { columns, rows: Vec::new() }
    }

    /// Adds a row. Missing cells are empty; cells beyond the last column are a mistake of the caller.
    ///
    /// # Panics
    /// When the row has more cells than the table has columns.
    pub fn row<I, S>(&mut self, cells: I) -> &mut Table
    where
        I: IntoIterator<Item = S>,
        S: AsRef<str>,
    {
        let mut row: Vec<String> = cells.into_iter().map(|cell| clean(cell.as_ref())).collect();
        assert!(
            row.len() <= self.columns.len(),
            "a row of {} cells in {} columns",
            row.len(),
            self.columns.len()
        );
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
        self
    }

    /// True when no row was added.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The table for a terminal of `width` columns, each line ended by a newline.
    pub fn render(&self, width: usize) -> String {
        let width = width.clamp(NARROWEST, WIDEST);
        let widths: Vec<usize> = (0..self.columns.len()).map(|column| self.column_width(column)).collect();
        let shown = columns_that_fit(&widths, width);
        let mut text = String::new();
        let header: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        for row in std::iter::once(&header).chain(&self.rows) {
            self.push_line(&mut text, &row[..shown], &widths);
        }
        if shown < self.columns.len() {
            text.push_str(&format!("(not shown for lack of width: {})\n", header[shown..].join(", ")));
        }
        text
    }

    fn column_width(&self, column: usize) -> usize {
        let cells = self.rows.iter().map(|row| display_width(&row[column]));
        cells.chain([display_width(&self.columns[column].0)]).max().unwrap_or(0)
    }

    fn push_line(&self, text: &mut String, cells: &[String], widths: &[usize]) {
        let start = text.len();
        for (column, cell) in cells.iter().enumerate() {
            if column > 0 {
                text.push_str(&" ".repeat(GAP));
            }
            let padding = " ".repeat(widths[column] - display_width(cell));
            match self.columns[column].1 {
                Align::Left => text.extend([cell.as_str(), padding.as_str()]),
                Align::Right => text.extend([padding.as_str(), cell.as_str()]),
            }
        }
        text.truncate(start + text[start..].trim_end().len());
        text.push('\n');
    }
}

/// How many columns, from the left, fit into `width`; at least one.
fn columns_that_fit(widths: &[usize], width: usize) -> usize {
    let mut used = 0;
    for (index, column) in widths.iter().enumerate() {
        used += column + if index > 0 { GAP } else { 0 };
        if used > width && index > 0 {
            return index;
        }
    }
    widths.len()
}

/// A name from a file may hold an escape sequence; nothing that moves the cursor reaches the terminal.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Columns that a terminal uses: two for East Asian wide characters and emoji, none for combining marks.
fn display_width(text: &str) -> usize {
    text.chars()
        .map(|c| match c as u32 {
            0x0300..=0x036F | 0x200B..=0x200F | 0xFE00..=0xFE0F => 0,
            0x1100..=0x115F | 0x2E80..=0xA4CF | 0xAC00..=0xD7A3 | 0xF900..=0xFAFF | 0xFE30..=0xFE6F => 2,
            0xFF00..=0xFF60 | 0xFFE0..=0xFFE6 | 0x1F300..=0x1FAFF | 0x20000..=0x3FFFD => 2,
            _ => 1,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn methods() -> Table {
        let mut table =
            Table::new(&[("method", Align::Left), ("trained", Align::Right), ("peak", Align::Right)]);
        table.row(["lora", "540672", "2.4 GiB"]).row(["dora", "565248", "2.41 GiB"]).row(["ia3"]);
        table
    }

    #[test]
    fn columns_line_up_and_lines_have_no_tail() {
        let expected = "method  trained      peak\n\
                        lora     540672   2.4 GiB\n\
                        dora     565248  2.41 GiB\n\
                        ia3\n";
        assert_eq!(methods().render(80), expected);
    }

    #[test]
    fn columns_leave_from_the_right_and_paths_stay_whole() {
        let path = "models/a-directory-with-a-long-name/that-goes-on/model-00001-of-00002.safetensors";
        let mut table = Table::new(&[("file", Align::Left), ("bytes", Align::Right), ("dtype", Align::Left)]);
        table.row([path, "123", "bf16"]);
        let narrow = table.render(10);
        assert!(narrow.contains(path));
        assert!(narrow.ends_with("(not shown for lack of width: bytes, dtype)\n"), "{narrow}");
        assert!(table.render(500).contains("bf16"));
    }

    #[test]
    fn terminal_escapes_do_not_pass() {
        let mut table = Table::new(&[("name", Align::Left)]);
        table.row(["\u{1b}[2Jgone\nline"]);
        assert_eq!(table.render(80), "name\n?[2Jgone?line\n");
    }

    #[test]
    fn wide_characters_use_two_columns() {
        let mut table = Table::new(&[("name", Align::Left), ("n", Align::Right)]);
        table.row(["模型", "1"]).row(["abcd", "2"]);
        assert_eq!(table.render(80), "name  n\n模型  1\nabcd  2\n");
    }
}
