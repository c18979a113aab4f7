//! `DIR/class/picture.png`: the name of a folder is the label of the pictures in it.
//!
//! Classes and pictures are taken in the order of their names. Names that begin with a dot are left alone; files that
//! are no pictures by their ending are left out and mentioned.

use std::fs::FileType;
use std::path::{Path, PathBuf};

use super::files::Home;
use super::{Classes, Found, Store};
use crate::error::{Error, Result};

const READ: [&str; 3] = ["png", "jpg", "jpeg"];
/// Pictures that somebody meant to be used, so leaving them out would be wrong.
const NOT_READ: [&str; 10] = ["webp", "gif", "bmp", "tif", "tiff", "heic", "avif", "ppm", "pgm", "jp2"];

pub(super) fn find(dir: &Path) -> Result<Found> {
    let home = Home::new(dir)?;
    let (mut problems, mut left_out) = (Vec::new(), 0);
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for (name, kind) in listing(dir)? {
        let is_folder = if kind.is_symlink() { dir.join(&name).is_dir() } else { kind.is_dir() };
        if !is_folder {
            match ends(&name, &READ) || ends(&name, &NOT_READ) {
                true => {
                    problems.push(format!("{name} lies beside the folders of the classes; move it into one"))
                }
                false => left_out += 1,
            }
            continue;
        }
        let mut count = 0;
        for (file, kind) in listing(&dir.join(&name))? {
            let path = PathBuf::from(&name).join(&file);
            let shown = path.display();
            if kind.is_dir() {
                problems.push(format!("{shown} is a folder inside a class; put its pictures into {name}"));
            } else if ends(&file, &NOT_READ) {
                problems.push(format!("{shown} is neither PNG nor JPEG; convert it"));
            } else if !ends(&file, &READ) {
                left_out += 1;
                continue;
            } else {
                match home.entry(&path) {
                    Ok(entry) => {
                        files.push(entry);
                        labels.push(name.clone());
                    }
                    Err(problem) => problems.push(format!("{shown} {problem}")),
                }
            }
            count += 1;
        }
        if count == 0 {
            problems.push(format!("the folder {name} holds no PNG or JPEG files; fill it or take it away"));
        }
    }
    if files.is_empty() && problems.is_empty() {
        problems.push(
            "holds no folders with pictures; expected one folder a class with PNG or JPEG files".into(),
        );
    }
    if !problems.is_empty() {
        return Err(Error::Several { place: dir.display().to_string(), problems });
    }
    let guesses = match left_out {
        0 => Vec::new(),
        count => vec![format!("{count} files that do not end in .png, .jpg or .jpeg are left out")],
    };
    let rows = (0..files.len()).collect();
    Ok(Found { images: Store::Files(files), labels: Classes::Named(labels), rows, guesses })
}

fn ends(name: &str, endings: &[&str]) -> bool {
    let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| endings.iter().any(|known| ending.eq_ignore_ascii_case(known)))
}

/// What lies in `dir`, in the order of the names.
fn listing(dir: &Path) -> Result<Vec<(String, FileType)>> {
    let io = |source| Error::Io { path: dir.into(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().into_string().map_err(|name| Error::Data {
            place: dir.display().to_string(),
            message: format!("the name {} is not UTF-8; rename it", name.display()),
        })?;
        if !name.starts_with('.') {
            found.push((name, entry.file_type().map_err(io)?));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}
