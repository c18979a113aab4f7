//! One file replaced so that a reader, a crash or a full disk sees the old bytes or the new, never a
//! mixture: written beside under a random name, synced, renamed, and the directory synced.
//!
//! A failed sync is never tried again: the kernel may have dropped the pages and would say yes.

use crate::disk::{Disk, DiskFile, RealDisk};
use crate::error::{Error, Result};
use crate::write::Body;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Bytes handed to the system in one call.
pub(crate) const PIECE: usize = 4 << 20;

/// Replaces the file `path` by `bytes`, atomically and durably.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_on(&RealDisk, path, &Body::bytes(bytes))
}

/// Replaces the file `path` by `body` on a given disk.
pub fn write_atomic_on(disk: &dyn Disk, path: &Path, body: &Body) -> Result<()> {
    let path = &replaceable(path)?;
    let aside = write_aside(disk, path, body)?;
    if let Err(e) = disk.rename(&aside, path) {
        discard(disk, &aside);
        return Err(Error::io("replace", path, e));
    }
    let dir = parent(path);
    disk.sync_dir(dir).map_err(|e| Error::io("sync", dir, e))
}

/// The file to replace: `path`, or what it links to. A device, a directory or a pipe is never replaced by a file.
pub(crate) fn replaceable(path: &Path) -> Result<PathBuf> {
    let Ok(meta) = path.symlink_metadata() else { return Ok(path.to_owned()) };
    let target = match meta.is_symlink() {
        true => path.canonicalize().map_err(|e| Error::io("follow the link", path, e))?,
        false => path.to_owned(),
    };
    let kind =
        if meta.is_symlink() { target.metadata().map_err(|e| Error::io("read", path, e))? } else { meta };
    if kind.is_file() {
        return Ok(target);
    }
    let found = if kind.is_dir() { "a directory" } else { "a device or pipe" };
    Err(Error::malformed(
        path,
        format!("expected a regular file to write to, found {found}; nothing was changed"),
    ))
}

/// Writes and syncs `body` beside `path`; on any error the new file is removed.
pub(crate) fn write_aside(disk: &dyn Disk, path: &Path, body: &Body) -> Result<PathBuf> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("file");
    let aside = parent(path).join(format!(".tmp-{name}-{}", random_name()));
    let file = disk.create(&aside).map_err(|e| Error::io("write", path, e))?;
    let written = write_body(file, path, body, |_| {});
    if written.is_err() {
        discard(disk, &aside);
    }
    written.map(|()| aside)
}

/// Writes `body` in pieces that `seen` is shown, then syncs. Errors name `path`.
pub(crate) fn write_body(
    mut file: Box<dyn DiskFile>,
    path: &Path,
    body: &Body,
    seen: impl FnMut(&[u8]),
) -> Result<()> {
    let mut pieces = Pieces { file: &mut *file, buffer: Vec::new(), seen, written: 0 };
    body.write_to(&mut pieces).map_err(|e| Error::io("write", path, e))?;
    pieces.empty().map_err(|e| Error::io("write", path, e))?;
    if pieces.written != body.size() {
        let text = format!("announced {} bytes and wrote {}", body.size(), pieces.written);
        return Err(Error::malformed(path, text));
    }
    file.sync().map_err(|e| Error::io("sync", path, e))
}

/// Gathers small writes into pieces of [`PIECE`] bytes.
struct Pieces<'a, S> {
    file: &'a mut dyn DiskFile,
    buffer: Vec<u8>,
    seen: S,
    written: u64,
}

impl<S: FnMut(&[u8])> Pieces<'_, S> {
    fn empty(&mut self) -> io::Result<()> {
        // write_all goes on after short writes and interruptions.
        self.file.write_all(&self.buffer)?;
        (self.seen)(&self.buffer);
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

impl<S: FnMut(&[u8])> Write for Pieces<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == PIECE {
            self.empty()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Removes a file of ours; what stays behind is cleaned at the next start.
pub(crate) fn discard(disk: &dyn Disk, path: &Path) {
    let _ = disk.remove_file(path);
}

pub(crate) fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// Sixteen hexadecimal digits that differ from call to call and between processes.
pub(crate) fn random_name() -> String {
    format!("{:016x}", RandomState::new().hash_one(std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_and_what_is_no_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::write(&real, b"one").unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        write_atomic(&link, b"two").unwrap();
        assert_eq!(std::fs::read(&real).unwrap(), b"two");
        assert!(link.symlink_metadata().unwrap().is_symlink());
        let socket = dir.path().join("socket");
        let _held = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for (path, found) in [(dir.path().to_owned(), "a directory"), (socket, "a device or pipe")] {
            let e = write_atomic(&path, b"x").unwrap_err().to_string();
            assert!(e.contains(found), "{e}");
        }
    }

    #[test]
    fn replaces_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(RealDisk.list(dir.path()).unwrap(), ["a"]);
        let e = write_atomic(&dir.path().join("none/a"), b"x").unwrap_err().to_string();
        assert!(e.starts_with("cannot write") && e.contains("none/a"), "{e}");
    }
}
