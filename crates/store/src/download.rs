//! Downloading a model into the Hub cache by `hf-hub`, and believing nothing until it is verified.
//!
//! `hf-hub` checks neither size nor hash, so it works in a private corner of the repository's cache
//! (`.engraft-partial/`, where an interrupted file is taken up again). A file moves to `blobs/` only with
//! the announced size and, where the server names one (large files), the announced SHA-256. The
//! snapshot's link and at last the branch's name follow, so that a cut download is never taken for a model.

use crate::atomic::{random_name, write_atomic};
use crate::checkpoint::{hex, require_space};
use crate::disk::RealDisk;
use crate::error::{Error, Result};
use crate::hub::{Hub, Progress, is_complete, wanted};
use crate::json::open_regular;
use crate::paths::is_plain;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo, Metadata};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Attempts after the first, each going on where the last was cut, after pauses of 1, 2 and 4 times this.
const RETRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(300);

pub(crate) fn download(
    hub: &Hub,
    id: &str,
    revision: &str,
    repository: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf> {
    let partial = repository.join(".engraft-partial");
    let api = client(hub, &partial).map_err(|e| failed(hub, id, "reach", &e))?;
    let at =
        |revision: &str| api.repo(Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned()));
    let info = at(revision).info().map_err(|e| failed(hub, id, "look up", &e))?;
    if !is_plain(&info.sha) {
        return Err(Error::Hub(format!("{} answered a strange commit {:?}", hub.endpoint, info.sha)));
    }
    let names: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let files = wanted(&names);
    let snapshot = repository.join("snapshots").join(&info.sha);
    for dir in [&partial, &snapshot, &repository.join("blobs"), &repository.join("refs")] {
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    }
    let job = Job { hub, id, api: &api, repo: at(&info.sha), repository, snapshot: &snapshot };
    for file in files {
        if !snapshot.join(file).is_file() {
            job.fetch(file, progress)?;
        }
    }
    if !is_complete(&snapshot) {
        return Err(Error::Hub(format!(
            "`{id}` at {} has no config.json with safetensors weights (it holds {}); choose a model with model.safetensors, or convert it",
            hub.endpoint,
            names.iter().take(12).map(String::as_str).collect::<Vec<_>>().join(", ")
        )));
    }
    let reference = repository.join("refs").join(revision);
    if revision != info.sha {
        let dir = crate::atomic::parent(&reference);
        fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
        write_atomic(&reference, info.sha.as_bytes())?;
    }
    // What remains there are empty directories, links and locks.
    let _ = fs::remove_dir_all(&partial);
    Ok(snapshot)
}

fn client(hub: &Hub, partial: &Path) -> std::result::Result<Api, ApiError> {
    ApiBuilder::from_cache(Cache::new(partial.to_owned()))
        .with_endpoint(hub.endpoint.clone())
        .with_token(hub.token.clone())
        .with_progress(false)
        // hf-hub's own retries lose the place in a resumed file; ours begin each attempt anew.
        .with_retries(0)
        .build()
}

struct Job<'a> {
    hub: &'a Hub,
    id: &'a str,
    api: &'a Api,
    repo: ApiRepo,
    repository: &'a Path,
    snapshot: &'a Path,
}

impl Job<'_> {
    /// Downloads one file, verifies it, and gives it its place.
    fn fetch(&self, file: &str, progress: &mut dyn FnMut(Progress)) -> Result<()> {
        let action = format!("download {file} of");
        let fail = |e: ApiError| failed(self.hub, self.id, &action, &e);
        let expected = self.api.metadata(&self.repo.url(file)).map_err(fail)?;
        let etag = expected.etag().trim_start_matches("W/").to_owned();
        if !is_plain(&etag) {
            return Err(Error::Hub(format!(
                "{} answered a strange etag {etag:?} for {file}",
                self.hub.endpoint
            )));
        }
        let blob = self.repository.join("blobs").join(&etag);
        if !blob.is_file() {
            require_space(&RealDisk, self.repository, expected.size() as u64)?;
            self.drop_useless_part(&etag, expected.size() as u64);
            let got = self.attempts(file, progress).map_err(fail)?;
            // The result is a link into the corner's own blobs.
            let got = got.canonicalize().map_err(|e| Error::io("read", &got, e))?;
            if let Err(e) = verify(&got, file, &etag, &expected) {
                let _ = fs::remove_file(&got);
                return Err(e);
            }
            fs::rename(&got, &blob).map_err(|e| Error::io("move to", &blob, e))?;
        }
        self.link(file, &etag)
    }

    fn attempts(
        &self,
        file: &str,
        progress: &mut dyn FnMut(Progress),
    ) -> std::result::Result<PathBuf, ApiError> {
        for attempt in 0..RETRIES {
            let report = Report { file, done: 0, total: 0, progress };
            match self.repo.download_with_progress(file, report) {
                Ok(path) => return Ok(path),
                Err(_) => std::thread::sleep(PAUSE * 2u32.pow(attempt)),
            }
        }
        self.repo.download_with_progress(file, Report { file, done: 0, total: 0, progress })
    }

    /// A part that already has the whole length cannot be taken up again; it was damaged.
    fn drop_useless_part(&self, etag: &str, size: u64) {
        let folder = Repo::new(self.id.to_owned(), RepoType::Model).folder_name();
        let blob = self.repository.join(".engraft-partial").join(folder).join("blobs").join(etag);
        let part = blob.with_extension("part");
        if part.metadata().is_ok_and(|meta| meta.len() >= size) {
            let _ = fs::remove_file(part);
        }
    }

    fn link(&self, file: &str, etag: &str) -> Result<()> {
        let to = self.snapshot.join(file);
        let aside = self.snapshot.join(format!(".tmp-{}", random_name()));
        let target = Path::new("../../blobs").join(etag);
        std::os::unix::fs::symlink(target, &aside)
            .and_then(|()| fs::rename(&aside, &to))
            .map_err(|e| Error::io("link", &to, e))
    }
}

/// Checks size and, where the etag is one, SHA-256, and makes the bytes durable.
fn verify(path: &Path, name: &str, etag: &str, expected: &Metadata) -> Result<()> {
    let mut file = open_regular(path)?;
    let (mut hash, mut size, mut piece) = (Sha256::new(), 0u64, vec![0u8; 1 << 20]);
    loop {
        let n = file.read(&mut piece).map_err(|e| Error::io("read", path, e))?;
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
        size += n as u64;
    }
    if size != expected.size() as u64 {
        let text = format!(
            "the download of {name} has {size} bytes, the server announced {}; it was discarded, try again",
            expected.size()
        );
        return Err(Error::Hub(text));
    }
    // Large files are named by their SHA-256, small ones by a git hash of 40 digits.
    let is_sha256 = etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit());
    if is_sha256 && hex(&hash.finalize()) != etag.to_ascii_lowercase() {
        let text = format!(
            "the download of {name} does not have the SHA-256 that the server announced; it was discarded, try again"
        );
        return Err(Error::Hub(text));
    }
    file.sync_all().map_err(|e| Error::io("sync", path, e))
}

fn failed(hub: &Hub, id: &str, action: &str, error: &ApiError) -> Error {
    let text = error.to_string();
    let hint = if ["401", "403", "404"].iter().any(|code| text.contains(code)) {
        "check the spelling; a private or gated model needs HF_TOKEN and accepted terms"
    } else {
        "check the connection and run the same command again: it goes on where it stopped"
    };
    Error::Hub(format!("cannot {action} `{id}` at {}: {text}\n  {hint}", hub.endpoint))
}

/// Turns `hf-hub`'s increments into totals.
struct Report<'a> {
    file: &'a str,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl hf_hub::api::Progress for Report<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.progress)(Progress { file: self.file, done: self.done, total: self.total });
    }

    fn finish(&mut self) {}
}
