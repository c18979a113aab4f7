//! Checkpoints that are either whole or not there.
//!
//! `checkpoints/step-00001200/` holds the files of one step and `MANIFEST.json`, which names each with
//! size and SHA-256 and carries its own. The order of operations is the promise:
//!
//! 1. require the exact bytes and 64 MiB free;
//! 2. make `.tmp-STEP-RANDOM/`; write, hash and sync each file; `MANIFEST.json` last; sync the directory;
//! 3. rename to `step-N`, which must not exist, and sync `checkpoints/`: that is the commit;
//! 4. only then retire old ones: rename to `.del-…`, sync, delete.
//!
//! No pointer names the latest: recovery verifies the highest step first. Any error abandons the
//! temporary directory; no sync is ever tried twice.

use crate::atomic::{parent, random_name, write_body};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::json::{parse_json, python_json};
use crate::paths::is_plain;
use crate::write::Body;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Name of the file that lists the others.
pub const MANIFEST: &str = "MANIFEST.json";
/// Room left free beyond a checkpoint's own bytes.
pub const MARGIN_BYTES: u64 = 64 << 20;
const FORMAT: u64 = 1;
const MANIFEST_BYTES_MAX: u64 = 4 << 20;
const SELF_HASH: &str = "manifest_sha256";

/// Which run and moment a checkpoint belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The run's random name.
    pub run: String,
    /// Optimizer steps done.
    pub step: u64,
    /// SHA-256 of the plan, hexadecimal.
    pub plan: String,
    /// SHA-256 of what fixes the bits of a run: version, target, kernels, threads, base.
    pub fingerprint: String,
}

/// A file's size and SHA-256 as the manifest has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSum {
    /// Bytes.
    pub size: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

/// A verified manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Run and step.
    pub stamp: Stamp,
    /// The other files by name.
    pub files: BTreeMap<String, FileSum>,
}

/// A checkpoint that passed verification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its directory.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Newer ones that were passed over, each with the reason.
    pub skipped: Vec<String>,
}

/// Which checkpoints stay.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// This many of the newest; at least 1 stays.
    pub newest: usize,
    /// The step with the best evaluation.
    pub best: Option<u64>,
    /// Every step divisible by this.
    pub keep_every: Option<u64>,
}

impl Default for Retention {
    fn default() -> Self {
        Self { newest: 2, best: None, keep_every: None }
    }
}

/// `step-00001200`.
pub fn directory_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Saves `files` as the checkpoint `stamp.step` in `dir` and returns its directory.
/// A finished checkpoint of that step with the same bytes is kept; a damaged one moves to `.bad-…`.
pub fn save(disk: &dyn Disk, dir: &Path, stamp: &Stamp, files: &[(&str, Body)]) -> Result<PathBuf> {
    check_names(files)?;
    require_space(disk, dir, files.iter().map(|(_, body)| body.size()).sum())?;
    let aside = dir.join(format!(".tmp-{}-{}", stamp.step, random_name()));
    disk.create_dir(&aside, true).map_err(|e| Error::io("create", &aside, e))?;
    let result = fill(disk, &aside, stamp, files).and_then(|manifest| commit(disk, dir, &aside, &manifest));
    if result.is_err() {
        // The error matters more than what is left behind, which the next start removes.
        let _ = remove_tree(disk, &aside);
    }
    result
}

/// Fails when `dir` has less than `bytes` and the margin free.
pub fn require_space(disk: &dyn Disk, dir: &Path, bytes: u64) -> Result<()> {
    let free = disk.free_bytes(dir).map_err(|e| Error::io("ask for the free space of", dir, e))?;
    let need = bytes.saturating_add(MARGIN_BYTES);
    if free >= need {
        return Ok(());
    }
    Err(Error::Space { path: dir.to_owned(), need, free })
}

fn check_names(files: &[(&str, Body)]) -> Result<()> {
    for (i, (name, _)) in files.iter().enumerate() {
        let again = files[..i].iter().any(|(other, _)| other == name);
        if again || !is_plain(name) || *name == MANIFEST {
            return Err(Error::Request(format!("{name:?} cannot name a checkpoint's file")));
        }
    }
    Ok(())
}

/// Writes all files and the manifest, and makes them and their names durable.
fn fill(disk: &dyn Disk, aside: &Path, stamp: &Stamp, files: &[(&str, Body)]) -> Result<Manifest> {
    let mut sums = BTreeMap::new();
    for (name, body) in files {
        let path = aside.join(name);
        let file = disk.create(&path).map_err(|e| Error::io("create", &path, e))?;
        let mut hash = Sha256::new();
        write_body(file, &path, body, |piece| hash.update(piece))?;
        sums.insert((*name).to_owned(), FileSum { size: body.size(), sha256: hex(&hash.finalize()) });
    }
    let manifest = Manifest { stamp: stamp.clone(), files: sums };
    let path = aside.join(MANIFEST);
    let file = disk.create(&path).map_err(|e| Error::io("create", &path, e))?;
    write_body(file, &path, &Body::bytes(manifest.text().into_bytes()), |_| {})?;
    disk.sync_dir(aside).map_err(|e| Error::io("sync", aside, e))?;
    Ok(manifest)
}

/// Gives the finished directory its name and makes that durable.
fn commit(disk: &dyn Disk, dir: &Path, aside: &Path, manifest: &Manifest) -> Result<PathBuf> {
    let to = dir.join(directory_name(manifest.stamp.step));
    match disk.rename_new(aside, &to) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let old = verify(disk, &to);
            if old.as_ref().is_ok_and(|old| old == manifest) {
                remove_tree(disk, aside)?;
            } else {
                let kind = if old.is_ok() { "del" } else { "bad" };
                move_away(disk, &to, kind)?;
                disk.rename_new(aside, &to).map_err(|e| Error::io("name", &to, e))?;
            }
        }
        other => other.map_err(|e| Error::io("name", &to, e))?,
    }
    disk.sync_dir(dir).map_err(|e| Error::io("sync", dir, e))?;
    Ok(to)
}

/// The newest checkpoint that verifies and that `accept` takes (shapes against the plan, steps in the
/// files); `accept` gives the reason of a refusal. None at all is an error that lists every reason.
pub fn newest_valid(
    disk: &dyn Disk,
    dir: &Path,
    accept: impl Fn(&Path, &Manifest) -> std::result::Result<(), String>,
) -> Result<Found> {
    let mut skipped = Vec::new();
    for step in steps(disk, dir)?.into_iter().rev() {
        let path = dir.join(directory_name(step));
        let verdict = verify(disk, &path).map_err(|e| e.to_string()).and_then(|manifest| {
            accept(&path, &manifest)?;
            Ok(manifest)
        });
        match verdict {
            Ok(manifest) => return Ok(Found { path, manifest, skipped }),
            Err(reason) => skipped.push(format!("{}: {reason}", directory_name(step))),
        }
    }
    Err(Error::NoCheckpoint { path: dir.to_owned(), skipped })
}

/// Steps that have a directory, ascending, whether valid or not.
pub fn steps(disk: &dyn Disk, dir: &Path) -> Result<Vec<u64>> {
    let names = disk.list(dir).map_err(|e| Error::io("list", dir, e))?;
    let number = |name: &String| {
        let step: u64 = name.strip_prefix("step-")?.parse().ok()?;
        (directory_name(step) == *name).then_some(step)
    };
    let mut found: Vec<u64> = names.iter().filter_map(number).collect();
    found.sort_unstable();
    Ok(found)
}

/// Checks a checkpoint's manifest, sizes and hashes.
pub fn verify(disk: &dyn Disk, path: &Path) -> Result<Manifest> {
    let at = path.join(MANIFEST);
    let mut bytes = Vec::new();
    let file = disk.open(&at).map_err(|e| Error::io("read", &at, e))?;
    file.take(MANIFEST_BYTES_MAX).read_to_end(&mut bytes).map_err(|e| Error::io("read", &at, e))?;
    let manifest = Manifest::parse(&at, &bytes)?;
    let expected = directory_name(manifest.stamp.step);
    if path.file_name().is_none_or(|name| name != expected.as_str()) {
        return Err(Error::malformed(&at, format!("it belongs to {expected}")));
    }
    for (name, sum) in &manifest.files {
        let file = path.join(name);
        let found = sum_of(disk, &file)?;
        if found.size != sum.size {
            let text = format!("expected {} bytes, found {}", sum.size, found.size);
            return Err(Error::malformed(&file, text));
        }
        if found.sha256 != sum.sha256 {
            return Err(Error::malformed(&file, "its SHA-256 is not the manifest's; the file is damaged"));
        }
    }
    Ok(manifest)
}

fn sum_of(disk: &dyn Disk, path: &Path) -> Result<FileSum> {
    let mut file = disk.open(path).map_err(|e| Error::io("read", path, e))?;
    let (mut hash, mut size, mut piece) = (Sha256::new(), 0u64, vec![0u8; 1 << 20]);
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(FileSum { size, sha256: hex(&hash.finalize()) }),
            Ok(n) => {
                hash.update(&piece[..n]);
                size += n as u64;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", path, e)),
        }
    }
}

/// Deletes the checkpoints that `keep` does not name. Call it only after a save has returned.
pub fn retain(disk: &dyn Disk, dir: &Path, keep: &Retention) -> Result<()> {
    let all = steps(disk, dir)?;
    let newest = &all[all.len().saturating_sub(keep.newest.max(1))..];
    for step in &all {
        let periodic = keep.keep_every.is_some_and(|every| every > 0 && step % every == 0);
        if !newest.contains(step) && keep.best != Some(*step) && !periodic {
            let gone = move_away(disk, &dir.join(directory_name(*step)), "del")?;
            remove_tree(disk, &gone)?;
        }
    }
    Ok(())
}

/// Removes what a crash may have left: `.tmp-…` and `.del-…`.
pub fn clean(disk: &dyn Disk, dir: &Path) -> Result<()> {
    for name in disk.list(dir).map_err(|e| Error::io("list", dir, e))? {
        if name.starts_with(".tmp-") || name.starts_with(".del-") {
            remove_tree(disk, &dir.join(name))?;
        }
    }
    Ok(())
}

/// Renames to `.KIND-NAME-RANDOM` beside, durably.
fn move_away(disk: &dyn Disk, path: &Path, kind: &str) -> Result<PathBuf> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("step");
    let to = parent(path).join(format!(".{kind}-{name}-{}", random_name()));
    disk.rename_new(path, &to).map_err(|e| Error::io("move away", path, e))?;
    disk.sync_dir(parent(path)).map_err(|e| Error::io("sync", parent(path), e))?;
    Ok(to)
}

/// Removes a file or a directory of files; checkpoints have no deeper levels.
fn remove_tree(disk: &dyn Disk, path: &Path) -> Result<()> {
    let Ok(names) = disk.list(path) else {
        return disk.remove_file(path).map_err(|e| Error::io("remove", path, e));
    };
    for name in names {
        let file = path.join(name);
        disk.remove_file(&file).map_err(|e| Error::io("remove", &file, e))?;
    }
    disk.remove_dir(path).map_err(|e| Error::io("remove", path, e))
}

impl Manifest {
    /// The file's only accepted bytes, so that a change of any byte shows.
    fn text(&self) -> String {
        let mut map = self.map();
        let own = hex(&Sha256::digest(python_json(&Value::Object(map.clone())).as_bytes()));
        map.insert(SELF_HASH.into(), own.into());
        python_json(&Value::Object(map)) + "\n"
    }

    fn map(&self) -> Map<String, Value> {
        let files: Map<String, Value> = self
            .files
            .iter()
            .map(|(name, sum)| (name.clone(), json!({"size": sum.size, "sha256": sum.sha256})))
            .collect();
        let stamp = &self.stamp;
        let mut map = Map::new();
        map.insert("format".into(), FORMAT.into());
        map.insert("run".into(), stamp.run.clone().into());
        map.insert("step".into(), stamp.step.into());
        map.insert("plan_sha256".into(), stamp.plan.clone().into());
        map.insert("fingerprint_sha256".into(), stamp.fingerprint.clone().into());
        map.insert("files".into(), files.into());
        map
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let json = parse_json(path, bytes, 8)?;
        let format = json.get("format").and_then(Value::as_u64);
        if format != Some(FORMAT) {
            let text = format!("expected checkpoint format {FORMAT}, found {}", json["format"]);
            return Err(Error::malformed(path, text));
        }
        let manifest = Self::from_json(&json)
            .ok_or_else(|| Error::malformed(path, "a field is missing or of the wrong type"))?;
        if manifest.text().as_bytes() != bytes {
            return Err(Error::malformed(
                path,
                "its content is not what its own SHA-256 covers; it is damaged",
            ));
        }
        Ok(manifest)
    }

    fn from_json(json: &Value) -> Option<Self> {
        let text = |key: &str| json.get(key)?.as_str().map(str::to_owned);
        let mut files = BTreeMap::new();
        for (name, sum) in json.get("files")?.as_object()? {
            let sha256 = sum.get("sha256")?.as_str()?.to_owned();
            let sum = FileSum { size: sum.get("size")?.as_u64()?, sha256 };
            files.insert(is_plain(name).then(|| name.clone())?, sum);
        }
        let stamp = Stamp {
            run: text("run")?,
            step: json.get("step")?.as_u64()?,
            plan: text("plan_sha256")?,
            fingerprint: text("fingerprint_sha256")?,
        };
        Some(Self { stamp, files })
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
