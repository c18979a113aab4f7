//! Picture files that a folder or a list names: within the directory, regular, within the limits.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use super::decode::{self, Alpha};
use super::{PICTURE_BYTES_MAX, Picture};
use crate::error::{Error, Result};
use crate::read::read_limited;

/// Bytes in which a size is nearly always found.
const BEGINNING: u64 = 64 << 10;

/// A picture file as it was when the set was opened.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub path: PathBuf,
    /// Its path beneath the directory of the set.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// (height, width) of the picture.
    pub size: (usize, usize),
}

/// The directory that picture files must lie in.
pub(super) struct Home {
    dir: PathBuf,
    /// Without links, to compare with.
    real: PathBuf,
}

impl Home {
    pub fn new(dir: &Path) -> Result<Home> {
        let io = |source| Error::Io { path: dir.into(), source };
        Ok(Home { dir: dir.into(), real: dir.canonicalize().map_err(io)? })
    }

    /// The picture file called `name` in the directory.
    ///
    /// # Errors
    /// In words, without the file's name: it leads out of the directory, is no regular file, or no picture.
    pub fn entry(&self, name: &Path) -> std::result::Result<Entry, String> {
        let is_plain = name.components().all(|part| matches!(part, Component::Normal(_)));
        if !is_plain || name.as_os_str().is_empty() {
            return Err(
                "is not a path beneath the directory of its list; give it without `..` and leading `/`"
                    .into(),
            );
        }
        let path = self.dir.join(name);
        let missing = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => "does not exist".to_string(),
            _ => format!("cannot be read: {error}"),
        };
        let real = path.canonicalize().map_err(missing)?;
        if !real.starts_with(&self.real) {
            return Err(format!(
                "is a link to {}, outside its directory; copy the file instead",
                real.display()
            ));
        }
        let about = real.metadata().map_err(missing)?;
        if !about.is_file() {
            return Err("is not a regular file".into());
        }
        let bytes = about.len();
        if bytes > PICTURE_BYTES_MAX {
            return Err(format!(
                "is {bytes} bytes; a picture may have {PICTURE_BYTES_MAX}, so make it smaller"
            ));
        }
        let size = size(&real, bytes)?;
        Ok(Entry { path, name: name.to_string_lossy().into_owned(), bytes, size })
    }
}

/// (height, width) by the beginning of the file; by all of it where the beginning does not tell.
fn size(path: &Path, bytes: u64) -> std::result::Result<(usize, usize), String> {
    let start = |count: u64| -> std::result::Result<Vec<u8>, String> {
        let mut start = Vec::new();
        let read = File::open(path).and_then(|file| file.take(count).read_to_end(&mut start));
        read.map_err(|error| format!("cannot be read: {error}"))?;
        Ok(start)
    };
    let mut file = File::open(path).map_err(|error| format!("cannot be read: {error}"))?;
    match decode::size_in(&start(BEGINNING)?, &mut file) {
        Err(_) if bytes > BEGINNING => decode::size(&start(PICTURE_BYTES_MAX)?),
        found => found,
    }
}

impl Entry {
    /// The picture, decoded.
    ///
    /// # Errors
    /// The file is damaged, or no longer what it was; its name is given.
    pub fn picture(&self, alpha: Alpha) -> Result<Picture> {
        let fail = |message: String| Error::Data { place: self.path.display().to_string(), message };
        let bytes = read_limited(&self.path, PICTURE_BYTES_MAX, "make the picture smaller")?;
        let picture = decode::picture(&bytes, alpha).map_err(fail)?;
        if (picture.height, picture.width) != self.size {
            return Err(fail(
                "has another size than when the run began; leave the data alone while it is used".into(),
            ));
        }
        Ok(picture)
    }
}
