//! Rows of a table that name picture files, beneath the directory of the table.

use std::path::Path;

use super::files::Home;
use super::{Classes, Found, Store};
use crate::error::{Error, Result};
use crate::read::{Content, Rows};

pub(super) fn find(rows: &Rows) -> Result<Found> {
    let dir = rows.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let home = Home::new(dir)?;
    let mut problems = Vec::new();
    let (mut files, mut labels, mut lines) = (Vec::new(), Vec::new(), Vec::new());
    for row in &rows.rows {
        let Content::Image { path, label } = &row.content else {
            return Err(rows.fail(row.line, "the task takes the path of a picture with a label (check task)"));
        };
        match home.entry(Path::new(path)) {
            Ok(entry) => {
                files.push(entry);
                labels.push(label.clone());
                lines.push(row.line);
            }
            Err(problem) => problems.push(format!("line {}: {path} {problem}", row.line)),
        }
    }
    if !problems.is_empty() {
        return Err(Error::Several { place: rows.path.display().to_string(), problems });
    }
    let labels = Classes::Named(labels);
    Ok(Found { images: Store::Files(files), labels, rows: lines, guesses: rows.guesses.clone() })
}
