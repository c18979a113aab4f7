//! From a model argument to a directory: a path, else the Hub's standard cache, else a download.
//!
//! The cache is the one that Python uses: `models--ORG--NAME/refs/REVISION` holds a commit,
//! `snapshots/COMMIT/FILE` links to `blobs/ETAG`. Nothing is sent when the cache has the model.

use crate::absent::{meant, no_such_directory, reads_as_path};
use crate::download;
use crate::error::{Error, Result};
use crate::paths::is_plain;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Files of a model or adapter that are of use here; weights are matched by [`wanted`].
const WANTED: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter.safetensors",
];

/// Where models come from. Holds a token, so it cannot be formatted.
pub struct Hub {
    /// The cache, `$HF_HUB_CACHE` or `$HF_HOME/hub`.
    pub cache: PathBuf,
    /// Never ask the network.
    pub offline: bool,
    /// The server, without a slash at the end.
    pub endpoint: String,
    /// Sent to the endpoint alone.
    pub token: Option<String>,
}

/// How far a download is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The file's name.
    pub file: &'a str,
    /// Bytes here, those of an earlier attempt included.
    pub done: u64,
    /// Bytes of the whole file.
    pub total: u64,
}

/// The cache directory from the values of `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME` and `HOME`.
pub fn cache_dir(
    hub_cache: Option<&str>,
    hf_home: Option<&str>,
    xdg_cache: Option<&str>,
    home: Option<&str>,
) -> Option<PathBuf> {
    let set = |value: Option<&str>| value.filter(|v| !v.is_empty()).map(PathBuf::from);
    set(hub_cache)
        .or_else(|| set(hf_home).map(|p| p.join("hub")))
        .or_else(|| set(xdg_cache).map(|p| p.join("huggingface/hub")))
        .or_else(|| set(home).map(|p| p.join(".cache/huggingface/hub")))
}

impl Hub {
    /// The public Hub over the given cache.
    pub fn new(cache: PathBuf) -> Self {
        Self { cache, offline: false, endpoint: "https://huggingface.co".into(), token: None }
    }

    /// The directory of `model`: itself if it is one, else the snapshot of that Hub id at `revision`
    /// (a branch, tag or commit; `main` when none), downloaded when the cache lacks it.
    pub fn resolve(
        &self,
        model: &str,
        revision: Option<&str>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PathBuf> {
        self.resolve_from(model, Path::new(model), revision, progress)
    }

    /// [`Hub::resolve`] where the directory that `model` may be is `path`, such as one relative to a recipe.
    ///
    /// # Errors
    /// What reads as a path and is no directory; the Hub is not asked for it.
    pub fn resolve_from(
        &self,
        model: &str,
        path: &Path,
        revision: Option<&str>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PathBuf> {
        if path.is_dir() {
            return Ok(path.to_owned());
        }
        if path.exists() {
            return Err(Error::malformed(path, "expected a model directory, found a file"));
        }
        let is_path = reads_as_path(model, path);
        if !is_id(model) {
            let text = match is_path {
                true => no_such_directory(path),
                false => "no such directory, and not a Hub id either (NAME or ORGANISATION/NAME)".into(),
            };
            return Err(Error::missing(path, text));
        }
        let revision = revision.unwrap_or("main");
        if revision.split('/').any(|part| !is_plain(part)) {
            return Err(Error::Hub(format!("{revision:?} cannot be a revision")));
        }
        let repository = self.repository(model);
        let looked = match cached(&repository, revision) {
            Ok(snapshot) => return Ok(snapshot),
            Err(looked) => looked,
        };
        if is_path {
            return Err(Error::missing(path, no_such_directory(path)));
        }
        if self.offline {
            let near =
                meant(path).map_or_else(String::new, |near| format!("\n  did you mean {}?", near.display()));
            return Err(Error::Hub(format!(
                "`{model}` is not a directory and not in the cache, and offline mode forbids a download\n  \
                 looked for {}\n  looked for {looked}\n  \
                 unset HF_HUB_OFFLINE to download it, or give a model directory{near}",
                path.display()
            )));
        }
        // hf-hub asserts some of what a server answers; a strange answer must not end the process.
        let work = || download::download(self, model, revision, &repository, progress);
        let found = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            Err(Error::Hub(format!("{} gave an answer that makes no sense for `{model}`", self.endpoint)))
        });
        found.map_err(|error| self.as_path_too(path, error))
    }

    /// An id that the Hub does not give may have been meant as a path.
    fn as_path_too(&self, path: &Path, error: Error) -> Error {
        let Error::Hub(text) = error else { return error };
        match meant(path) {
            Some(near) => Error::missing(
                path,
                format!("no such directory; did you mean {}?\n  as a Hub id: {text}", near.display()),
            ),
            None => Error::Hub(format!("{text}\n  (a directory of that name is not here either)")),
        }
    }

    fn repository(&self, id: &str) -> PathBuf {
        self.cache.join(format!("models--{}", id.replace('/', "--")))
    }
}

/// True for a name that the Hub could have given.
fn is_id(text: &str) -> bool {
    let part = |p: &str| {
        let letters = p.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        let edges = |c| p.starts_with(c) || p.ends_with(c);
        !p.is_empty()
            && p.len() <= 96
            && letters
            && !edges('.')
            && !edges('-')
            && !p.contains("--")
            && !p.contains("..")
    };
    text.split('/').count() <= 2 && text.split('/').all(part)
}

/// The complete snapshot of a revision in the cache, or what was looked for in vain.
fn cached(repository: &Path, revision: &str) -> std::result::Result<PathBuf, String> {
    let reference = repository.join("refs").join(revision);
    let commit = match std::fs::read_to_string(&reference) {
        Ok(text) => text.trim().to_owned(),
        Err(_) => revision.to_owned(),
    };
    let snapshot = repository.join("snapshots").join(&commit);
    if !is_plain(&commit) || !snapshot.is_dir() {
        return Err(format!("{} (or a snapshot of that name)", reference.display()));
    }
    if is_complete(&snapshot) {
        return Ok(snapshot);
    }
    Err(format!("config.json and the weights in {}", snapshot.display()))
}

/// True when a snapshot has a config and all weights that it announces.
pub(crate) fn is_complete(snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).is_file();
    let adapter =
        has("adapter_config.json") && (has("adapter_model.safetensors") || has("adapter.safetensors"));
    adapter || has("config.json") && (has("model.safetensors") || has_shards(snapshot))
}

fn has_shards(snapshot: &Path) -> bool {
    let limits = crate::Limits::default();
    let index = snapshot.join("model.safetensors.index.json");
    let json = crate::read_json(&index, "index_json", limits.index_json, limits.json_depth);
    let Ok(json) = json else { return false };
    let Some(map) = json.get("weight_map").and_then(|map| map.as_object()) else { return false };
    let present = |shard: &str| is_plain(shard) && snapshot.join(shard).is_file();
    map.values().all(|shard| shard.as_str().is_some_and(present))
}

/// Which of a repository's files to download: the known ones, and either the single file of weights
/// or its shards.
pub(crate) fn wanted(names: &[String]) -> Vec<&str> {
    let single = names.iter().any(|name| name == "model.safetensors");
    let is_weight = |name: &str| {
        if single {
            name == "model.safetensors"
        } else {
            name.starts_with("model-") && name.ends_with(".safetensors")
        }
    };
    let is_wanted = |name: &&str| is_plain(name) && (WANTED.contains(name) || is_weight(name));
    names.iter().map(String::as_str).filter(is_wanted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn offline(cache: &Path) -> Hub {
        Hub { offline: true, ..Hub::new(cache.to_owned()) }
    }

    #[test]
    fn ids_are_told_from_paths() {
        for good in ["gpt2", "org/name", "Qwen/Qwen3-0.6B", "a_b/c.d"] {
            assert!(is_id(good), "{good}");
        }
        for bad in ["", "a/b/c", "../x", "a/..", "/a", "a/", "a--b", "a b", ".a", "a/\0", "ä/b"] {
            assert!(!is_id(bad), "{bad:?}");
        }
    }

    #[test]
    fn the_cache_answers_offline_or_says_what_was_looked_for() {
        let cache = tempfile::tempdir().unwrap();
        let hub = offline(cache.path());
        let ask = |revision| hub.resolve("org/name", revision, &mut |_| {});
        let e = ask(None).unwrap_err().to_string();
        assert!(e.contains("models--org--name/refs/main") && e.contains("HF_HUB_OFFLINE"), "{e}");
        let repository = cache.path().join("models--org--name");
        let snapshot = repository.join("snapshots/abc");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(repository.join("refs")).unwrap();
        fs::write(repository.join("refs/main"), "abc").unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert!(ask(None).unwrap_err().to_string().contains("the weights in"));
        let index = snapshot.join("model.safetensors.index.json");
        fs::write(&index, r#"{"weight_map":{"a":"model-1.safetensors"}}"#).unwrap();
        assert!(ask(None).is_err());
        fs::write(snapshot.join("model-1.safetensors"), "").unwrap();
        assert_eq!(ask(None).unwrap(), snapshot);
        assert_eq!(ask(Some("abc")).unwrap(), snapshot);
        assert!(ask(Some("../../x")).is_err() && ask(Some("v2")).is_err());
        fs::write(repository.join("refs/main"), "../../../etc").unwrap();
        assert!(ask(None).is_err());
        assert_eq!(hub.resolve(cache.path().to_str().unwrap(), None, &mut |_| {}).unwrap(), cache.path());
    }

    #[test]
    fn only_useful_files_are_wanted() {
        let names = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect::<Vec<String>>();
        let repo = names(&[
            "config.json",
            "model.safetensors",
            "model-1.safetensors",
            "pytorch_model.bin",
            "onnx/model.safetensors",
            "README.md",
            "tokenizer.json",
        ]);
        assert_eq!(wanted(&repo), ["config.json", "model.safetensors", "tokenizer.json"]);
        let shards = names(&[
            "model-00001-of-00002.safetensors",
            "../model-x.safetensors",
            "model-00002-of-00002.safetensors",
        ]);
        assert_eq!(wanted(&shards).len(), 2);
    }

    #[test]
    fn the_cache_follows_the_environment() {
        let dir = |a, b, c, d| cache_dir(a, b, c, d).unwrap().to_string_lossy().into_owned();
        assert_eq!(dir(Some("/c"), Some("/h"), None, Some("/u")), "/c");
        assert_eq!(dir(Some(""), Some("/h"), None, Some("/u")), "/h/hub");
        assert_eq!(dir(None, None, Some("/x"), Some("/u")), "/x/huggingface/hub");
        assert_eq!(dir(None, None, None, Some("/u")), "/u/.cache/huggingface/hub");
        assert!(cache_dir(None, None, None, None).is_none());
    }
}
