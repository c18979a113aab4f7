//! The environment variables that are read, in one place, once.

use std::path::PathBuf;

use engraft_store::hub::{Hub, cache_dir};

/// What the environment says.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// `NO_COLOR` is set and not empty.
    pub no_color: bool,
    /// `FORCE_COLOR` is set and neither empty nor 0.
    pub force_color: bool,
    /// `TERM` is `dumb`.
    pub dumb_terminal: bool,
    /// The Hub's cache, by `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME` and `HOME`.
    pub cache: Option<PathBuf>,
    /// `HF_HUB_OFFLINE` is on.
    pub offline: bool,
    /// `ENGRAFT_DEVICE`.
    pub device: Option<String>,
    /// Where kernels compiled for a card are kept, by `XDG_CACHE_HOME` and `HOME`.
    pub kernels: Option<PathBuf>,
    /// `ENGRAFT_THREADS`.
    pub threads: Option<usize>,
    /// What `ENGRAFT_THREADS` holds where that is not a number of threads.
    pub bad_threads: Option<String>,
    /// The locale writes UTF-8 (`LC_ALL`, `LC_CTYPE`, `LANG`).
    pub utf8: bool,
    /// `HF_TOKEN`.
    pub token: Option<Secret>,
}

/// A value that cannot be printed.
#[derive(Clone)]
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(set)")
    }
}

fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn switched_on(name: &str) -> bool {
    text(name).is_some_and(|value| !matches!(value.to_lowercase().as_str(), "0" | "false" | "no" | "off"))
}

/// Most threads that may be asked for.
const THREADS_MAX: usize = 4096;

fn threads(text: &str) -> Option<usize> {
    text.trim().parse().ok().filter(|n| (1..=THREADS_MAX).contains(n))
}

impl Environment {
    /// Reads the process's environment.
    pub fn read() -> Environment {
        let [hub_cache, hf_home, xdg, home] = ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"].map(text);
        let locale = text("LC_ALL").or_else(|| text("LC_CTYPE")).or_else(|| text("LANG")).unwrap_or_default();
        let locale = locale.to_lowercase();
        let given = text("ENGRAFT_THREADS");
        let threads = given.as_deref().and_then(threads);
        Environment {
            no_color: text("NO_COLOR").is_some(),
            force_color: switched_on("FORCE_COLOR"),
            dumb_terminal: text("TERM").is_some_and(|term| term == "dumb"),
            cache: cache_dir(hub_cache.as_deref(), hf_home.as_deref(), xdg.as_deref(), home.as_deref()),
            device: text("ENGRAFT_DEVICE"),
            kernels: xdg
                .clone()
                .map(PathBuf::from)
                .or_else(|| home.as_ref().map(|home| PathBuf::from(home).join(".cache")))
                .map(|caches| caches.join("engraft/kernels")),
            offline: switched_on("HF_HUB_OFFLINE"),
            bad_threads: given.filter(|_| threads.is_none()),
            threads,
            utf8: locale.contains("utf-8") || locale.contains("utf8"),
            token: text("HF_TOKEN").map(Secret),
        }
    }

    /// The Hub as this environment sees it.
    pub fn hub(&self) -> Hub {
        // Without a home there is no cache to look into or to download to: the error will name this directory.
        let cache = self.cache.clone().unwrap_or_else(|| PathBuf::from("huggingface/hub"));
        let mut hub = Hub::new(cache);
        hub.offline = self.offline;
        hub.token = self.token.as_ref().map(|secret| secret.0.clone());
        hub
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_a_positive_number() {
        assert_eq!(threads("2"), Some(2));
        for bad in ["0", "-1", "two", "1.5", "99999999"] {
            assert_eq!(threads(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_token_cannot_be_printed() {
        let environment = Environment { token: Some(Secret("hf_abc".into())), ..Environment::default() };
        assert!(!format!("{environment:?}").contains("hf_abc"));
    }
}
