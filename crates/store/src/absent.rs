//! A directory that is not there: told from a Hub id by the form of its text, and said with what lies nearest to it.

use std::path::{Path, PathBuf};

use engraft_words::nearest;

/// True for a text that means a directory rather than a Hub id: `.`, `/` or `~` in front, several or trailing slashes,
/// or a first part that is a directory here. `path` is where `text` leads if it is a path.
pub(crate) fn reads_as_path(text: &str, path: &Path) -> bool {
    let beneath = || path.parent().is_some_and(Path::is_dir);
    match text.matches('/').count() {
        _ if text.starts_with(['.', '/', '~']) || text.ends_with('/') => true,
        0 => false,
        1 => beneath(),
        _ => true,
    }
}

/// "no such directory", with the nearest directory above that exists and a name in it like the one that was asked for.
pub(crate) fn no_such_directory(path: &Path) -> String {
    let above = path.ancestors().skip(1).find(|dir| here(dir).exists()).unwrap_or(Path::new(""));
    if path.iter().any(|part| part == "~") {
        return "no such directory; `~` is your home only to a shell, write the directory in full".into();
    }
    let dir = here(above);
    if !dir.is_dir() {
        return format!("no such directory; {} is a file", dir.display());
    }
    let shown = dir.display();
    match meant(path) {
        None => format!("no such directory; the nearest that exists is {shown}"),
        Some(near) => format!("no such directory in {shown}; did you mean {}?", near.display()),
    }
}

/// The directory whose name is like the first part of `path` that is not there, with what follows where that is there too.
pub(crate) fn meant(path: &Path) -> Option<PathBuf> {
    let above = path.ancestors().skip(1).find(|dir| here(dir).exists()).unwrap_or(Path::new(""));
    let mut missing = path.strip_prefix(above).unwrap_or(path).iter();
    let name = sibling(here(above), &missing.next()?.to_string_lossy())?;
    let whole: PathBuf = above.iter().chain([name.as_ref()]).chain(missing).collect();
    Some(if whole.is_dir() { whole } else { above.join(name) })
}

/// The empty path is the working directory.
fn here(dir: &Path) -> &Path {
    if dir.as_os_str().is_empty() { Path::new(".") } else { dir }
}

/// The directory in `dir` whose name is nearest to `wanted`.
fn sibling(dir: &Path, wanted: &str) -> Option<String> {
    /// Entries looked at: a cache may hold very many.
    const MOST: usize = 10_000;
    let entries = std::fs::read_dir(dir).ok()?.take(MOST).flatten();
    let names = entries.filter(|e| e.path().is_dir()).filter_map(|e| e.file_name().into_string().ok());
    let mut names: Vec<String> = names.collect();
    // The order of a directory is nobody's: of equals the first by name.
    names.sort();
    nearest(wanted, names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_from_ids_by_their_form() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("models")).unwrap();
        let is_path = |text: &str| reads_as_path(text, &root.path().join(text));
        for path in ["./m", "../m", "/m", "~/m", ".", "m/", "a/b/c", "models/qwen"] {
            assert!(is_path(path), "{path}");
        }
        for id in ["gpt2", "org/name", "models"] {
            assert!(!is_path(id), "{id}");
        }
    }

    #[test]
    fn what_is_absent_is_said_with_what_is_near() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path();
        std::fs::create_dir_all(dir.join("models/qwen3-0.6b/base")).unwrap();
        std::fs::write(dir.join("models/config.json"), "{}").unwrap();
        let says =
            |path: &str| no_such_directory(&dir.join(path)).replace(&dir.display().to_string(), "ROOT");
        assert_eq!(
            says("models/qwen3-0.6"),
            "no such directory in ROOT/models; did you mean ROOT/models/qwen3-0.6b?"
        );
        assert_eq!(
            says("model/qwen3-0.6b/base"),
            "no such directory in ROOT; did you mean ROOT/models/qwen3-0.6b/base?"
        );
        assert_eq!(says("models/other/x"), "no such directory; the nearest that exists is ROOT/models");
        assert_eq!(says("models/config.json/x"), "no such directory; ROOT/models/config.json is a file");
        assert_eq!(
            no_such_directory(Path::new("absent/x/y")),
            "no such directory; the nearest that exists is ."
        );
        assert!(no_such_directory(Path::new("~/m")).contains("write the directory in full"));
    }
}
