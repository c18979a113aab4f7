//! Which names from a file may become a path.
//!
//! A name read from a model's files is one plain component beneath the model's directory. A symbolic
//! link there may stay beneath that directory, or lead to another place of the same repository in
//! the Hub cache (`models--ORG--NAME/snapshots/REV/file → ../../blobs/HASH`), and nowhere else.

use crate::error::{Error, Result};
use std::path::{Component, Path, PathBuf};

/// True for one ordinary path component of at most 255 bytes.
pub(crate) fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let single = matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none();
    single && name.len() <= 255 && !name.contains(['/', '\\', '\0', ':'])
}

/// The path of `name`, which the file `source` gave, in `dir`.
pub(crate) fn beneath(dir: &Path, name: &str, source: &Path) -> Result<PathBuf> {
    if !is_plain(name) {
        let text = format!("expected a plain file name beneath {}, found {name:?}", dir.display());
        return Err(Error::malformed(source, text));
    }
    let path = dir.join(name);
    allowed_link(dir, &path)?;
    Ok(path)
}

/// Fails when `path`, an entry of `dir`, is a symbolic link that leaves what the model may use.
/// A path that does not exist passes: opening it says so.
pub(crate) fn allowed_link(dir: &Path, path: &Path) -> Result<()> {
    let is_link = path.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
    if !is_link {
        return Ok(());
    }
    let target = path.canonicalize().map_err(|e| Error::io("follow the link", path, e))?;
    let home = dir.canonicalize().map_err(|e| Error::io("read", dir, e))?;
    let allowed = target.starts_with(&home)
        || repository(&home).is_some_and(|repository| target.starts_with(repository));
    if allowed {
        return Ok(());
    }
    let text = format!(
        "is a link to {}, outside its directory and its Hub cache repository; copy the file instead",
        target.display()
    );
    Err(Error::malformed(path, text))
}

/// `…/models--ORG--NAME` when `dir` is one of its snapshots or beneath one.
fn repository(dir: &Path) -> Option<&Path> {
    dir.ancestors().find(|ancestor| {
        let name = ancestor.file_name().and_then(|n| n.to_str()).unwrap_or("");
        name.starts_with("models--") && dir.starts_with(ancestor.join("snapshots"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        let long = "a".repeat(256);
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "/etc/passwd",
            "a/../b",
            "./a",
            "a/",
            "\0",
            "a\0b",
            "..\\x",
            "C:x",
            &long,
        ] {
            assert!(!is_plain(bad), "{bad:?}");
        }
        for good in ["model-00001-of-00002.safetensors", "..a", "ünï", "a b"] {
            assert!(is_plain(good), "{good:?}");
        }
    }

    #[test]
    fn links_stay_within_one_cache_repository() {
        let root = tempfile::tempdir().unwrap();
        let repo = root.path().join("models--a--b");
        let snapshot = repo.join("snapshots/rev");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("blobs")).unwrap();
        std::fs::write(repo.join("blobs/h"), b"x").unwrap();
        std::fs::write(root.path().join("secret"), b"x").unwrap();
        symlink("../../blobs/h", snapshot.join("good")).unwrap();
        symlink("../../../secret", snapshot.join("bad")).unwrap();
        let source = Path::new("index");
        assert!(beneath(&snapshot, "good", source).is_ok());
        let e = beneath(&snapshot, "bad", source).unwrap_err().to_string();
        assert!(e.contains("outside its directory"), "{e}");
        assert!(beneath(&snapshot, "absent", source).is_ok());

        let plain = root.path().join("plain");
        std::fs::create_dir(&plain).unwrap();
        symlink("../secret", plain.join("bad")).unwrap();
        assert!(beneath(&plain, "bad", source).is_err());
    }
}
