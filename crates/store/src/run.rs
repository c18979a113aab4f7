//! A run directory: `run.lock`, `plan.toml`, `events.jsonl`, `checkpoints/`, `adapter/`.
//!
//! One process at a time: it holds an advisory lock on `run.lock`, which the system releases with the
//! process, however that ends. Who comes second changes nothing.

use crate::atomic::{parent, random_name, replaceable, write_atomic};
use crate::checkpoint::{self, require_space};
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::json::open_regular;
use crate::limits::{Limits, check};
use serde_json::Value;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const LOCK: &str = "run.lock";
const PLAN: &str = "plan.toml";
const EVENTS: &str = "events.jsonl";
const CHECKPOINTS: &str = "checkpoints";

/// A locked run directory. Dropping it releases the lock.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Makes a new run directory, or takes an empty one. `bytes` are what the run will at least write:
    /// missing room or permission is found now, not at the first checkpoint.
    pub fn create(path: &Path, bytes: u64) -> Result<Self> {
        make_dir(path)?;
        let mut lock = lock(path)?;
        require_empty(path)?;
        name_holder(path, &mut lock)?;
        make_dir(&path.join(CHECKPOINTS))?;
        let run = Self { path: path.to_owned(), _lock: lock };
        run.prepare(bytes)?;
        Ok(run)
    }

    /// Whether a run can begin in `path`, or with `resume` go on there, as far as that can be told before its size is
    /// known. Nothing is left behind.
    ///
    /// # Errors
    /// It holds something else or no run to resume, or it cannot be written.
    pub fn look(path: &Path, resume: bool) -> Result<()> {
        let above = above_that_exists(path)?;
        if resume {
            // A run that was killed before its plan stood has only its lock.
            if !path.join(LOCK).is_file() {
                require_plan(path)?;
            }
        } else if path.is_dir() {
            require_empty(path)?;
        }
        probe(above, above)
    }

    /// Opens the directory of an earlier run to go on with it; `bytes` as for [`RunDir::create`].
    pub fn open(path: &Path, bytes: u64) -> Result<Self> {
        require_plan(path)?;
        let mut lock = lock(path)?;
        name_holder(path, &mut lock)?;
        make_dir(&path.join(CHECKPOINTS))?;
        let run = Self { path: path.to_owned(), _lock: lock };
        run.prepare(bytes)?;
        Ok(run)
    }

    /// Removes what a crash left and proves that the directory can be written.
    fn prepare(&self, bytes: u64) -> Result<()> {
        checkpoint::clean(&RealDisk, &self.path)?;
        checkpoint::clean(&RealDisk, &self.checkpoints())?;
        if self.adapter().is_dir() {
            checkpoint::clean(&RealDisk, &self.adapter())?;
        }
        require_space(&RealDisk, &self.path, bytes)?;
        probe(&self.checkpoints(), &self.path)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `checkpoints/`, for [`crate::checkpoint`].
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }

    /// `adapter/`, the result.
    pub fn adapter(&self) -> PathBuf {
        self.path.join("adapter")
    }

    /// `plan.toml`.
    pub fn plan(&self) -> PathBuf {
        self.path.join(PLAN)
    }

    /// `events.jsonl`.
    pub fn events(&self) -> PathBuf {
        self.path.join(EVENTS)
    }

    /// Writes `plan.toml`.
    pub fn write_plan(&self, toml: &str) -> Result<()> {
        write_atomic(&self.plan(), toml.as_bytes())
    }

    /// Opens `events.jsonl` for appending; a last line that a crash cut short is removed.
    pub fn open_events(&self, limits: &Limits) -> Result<Events> {
        Events::open(&self.events(), limits.event_line)
    }
}

/// The event log: one JSON object a line.
#[derive(Debug)]
pub struct Events {
    path: PathBuf,
    file: File,
    line_max: u64,
}

impl Events {
    fn open(path: &Path, line_max: u64) -> Result<Self> {
        let is_new = !path.exists();
        let io = |action| move |e| Error::io(action, path, e);
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io("open"))?;
        let whole = whole_lines(&mut file).map_err(io("read"))?;
        if whole != file.metadata().map_err(io("read"))?.len() {
            file.set_len(whole).map_err(io("cut the torn last line of"))?;
        }
        if is_new {
            RealDisk.sync_dir(parent(path)).map_err(io("sync"))?;
        }
        Ok(Self { path: path.to_owned(), file, line_max })
    }

    /// Appends one event in a single write, so that readers see whole lines. Not yet durable.
    pub fn append(&mut self, event: &Value) -> Result<()> {
        let line = event.to_string() + "\n";
        check(&self.path, "bytes of one event", "event_line", self.line_max, line.len() as u64)?;
        self.file.write_all(line.as_bytes()).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Makes all events so far durable.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("sync", &self.path, e))
    }
}

/// Length of a file up to and with its last line break, read from the end.
fn whole_lines(file: &mut File) -> std::io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut block = vec![0u8; 1 << 16];
    while end > 0 {
        let size = end.min(block.len() as u64) as usize;
        file.seek(SeekFrom::Start(end - size as u64))?;
        file.read_exact(&mut block[..size])?;
        if let Some(at) = block[..size].iter().rposition(|byte| *byte == b'\n') {
            return Ok(end - size as u64 + at as u64 + 1);
        }
        end -= size as u64;
    }
    Ok(0)
}

/// Whether `path` can be made, with the directories above it, and written: nothing stays behind.
///
/// # Errors
/// Something above it is no directory, or cannot be written.
pub fn require_writable(path: &Path) -> Result<()> {
    let above = above_that_exists(path)?;
    probe(above, above)
}

/// An error where the file `path` could not be written. Nothing is left behind.
pub fn require_place(path: &Path) -> Result<()> {
    let path = &replaceable(path)?;
    probe(parent(path), path)
}

/// The nearest directory to `path` that exists, itself included.
fn above_that_exists(path: &Path) -> Result<&Path> {
    let above = path.ancestors().map(or_here).find(|dir| dir.exists()).unwrap_or(Path::new("."));
    if !above.is_dir() {
        return Err(Error::malformed(above, "expected a directory to write to, found something else"));
    }
    Ok(above)
}

/// Writes a file in `dir` and removes it again; an error names `shown`.
fn probe(dir: &Path, shown: &Path) -> Result<()> {
    let probe = dir.join(format!(".tmp-probe-{}", random_name()));
    let mut file = RealDisk.create(&probe).map_err(|e| Error::io("write to", shown, e))?;
    let tried = file.write_all(&[0; 4096]).and_then(|()| file.sync());
    let removed = RealDisk.remove_file(&probe);
    tried.and(removed).map_err(|e| Error::io("write to", shown, e))
}

/// The empty path is the working directory.
fn or_here(dir: &Path) -> &Path {
    if dir.as_os_str().is_empty() { Path::new(".") } else { dir }
}

fn require_plan(path: &Path) -> Result<()> {
    if path.join(PLAN).is_file() {
        return Ok(());
    }
    Err(Error::missing(
        path,
        format!("holds no run to resume: expected `{PLAN}`; leave --resume out to begin one"),
    ))
}

/// An existing run is never written over, nor are files of somebody else put among its own.
fn require_empty(path: &Path) -> Result<()> {
    let Some(name) = foreign_entry(path)? else { return Ok(()) };
    let text = match path.join(PLAN).exists() {
        true => "holds a run already; go on with it by --resume, or choose another --out".to_owned(),
        false => format!(
            "expected an empty directory, or none, for a new run; this one holds `{name}` and no run to resume; choose \
             another --out"
        ),
    };
    Err(Error::malformed(path, text + " (nothing was changed)"))
}

/// A name that a run which never began its first step would not have left.
fn foreign_entry(path: &Path) -> Result<Option<String>> {
    let list = |dir: &Path| RealDisk.list(dir).map_err(|e| Error::io("list", dir, e));
    for name in list(path)? {
        let is_ours = name == LOCK
            || name.starts_with(".tmp-")
            || name == CHECKPOINTS && list(&path.join(CHECKPOINTS))?.iter().all(|n| n.starts_with(".tmp-"));
        if !is_ours {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Creates a directory and those above it, durably; existing ones are left as they are.
fn make_dir(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    if !above.as_os_str().is_empty() {
        make_dir(above)?;
    }
    match fs::create_dir(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
        other => other.map_err(|e| Error::io("create", path, e))?,
    }
    RealDisk.sync_dir(above).map_err(|e| Error::io("sync", above, e))
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let file = opened.map_err(|e| Error::io("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: dir.to_owned(), holder: holder(&path) }),
        Err(TryLockError::Error(e)) => Err(Error::io("lock", &path, e)),
    }
}

/// What the holder of the lock wrote about itself.
fn holder(path: &Path) -> String {
    let mut text = String::new();
    let read = open_regular(path).map(|file| file.take(200).read_to_string(&mut text));
    match text.trim() {
        name if read.is_ok() && !name.is_empty() => name.to_owned(),
        _ => "another process".into(),
    }
}

/// Says in the lock file who holds it. Only for people: the lock itself is the system's.
fn name_holder(dir: &Path, lock: &mut File) -> Result<()> {
    let text = format!("process {}\n", std::process::id());
    let written = lock.set_len(0).and_then(|()| lock.write_all(text.as_bytes()));
    written.map_err(|e| Error::io("write", &dir.join(LOCK), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn of_many_starts_one_wins_and_the_losers_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs/a");
        let starts: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..20).map(|_| scope.spawn(|| RunDir::create(&path, 0))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let winners: Vec<_> = starts.iter().filter(|s| s.is_ok()).collect();
        assert_eq!(winners.len(), 1);
        let before = RealDisk.list(&path).unwrap();
        winners[0].as_ref().unwrap().write_plan("a = 1").unwrap();
        let e = RunDir::open(&path, 0).unwrap_err().to_string();
        assert!(e.contains(&format!("process {}", std::process::id())), "{e}");
        assert_eq!(RealDisk.list(&path).unwrap().len(), before.len() + 1);
        drop(starts);
        RunDir::open(&path, 0).unwrap();
    }

    #[test]
    fn leftovers_are_removed_and_other_runs_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        // A start that was killed before its plan was written is no obstacle.
        drop(RunDir::create(dir.path(), 0).unwrap());
        let run = RunDir::create(dir.path(), 0).unwrap();
        run.write_plan("a = 1").unwrap();
        fs::create_dir(run.checkpoints().join(".tmp-5-x")).unwrap();
        fs::write(run.checkpoints().join(".tmp-5-x/params"), b"x").unwrap();
        fs::write(run.path().join(".tmp-plan"), b"x").unwrap();
        drop(run);
        let run = RunDir::open(dir.path(), 0).unwrap();
        assert!(RealDisk.list(&run.checkpoints()).unwrap().is_empty());
        assert_eq!(RealDisk.list(run.path()).unwrap(), [CHECKPOINTS, PLAN, LOCK]);
        drop(run);
        let e = RunDir::create(dir.path(), 0).unwrap_err().to_string();
        assert!(e.contains("--resume"), "{e}");
        let e = RunDir::open(&dir.path().join("checkpoints"), 0).unwrap_err().to_string();
        assert!(e.contains("plan.toml"), "{e}");
        assert!(RunDir::open(dir.path(), u64::MAX).unwrap_err().is_disk_full());
    }

    #[test]
    fn a_look_says_what_creating_would_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (free, taken) = (dir.path().join("a/b"), dir.path().join("taken"));
        RunDir::look(&free, false).unwrap();
        assert!(!dir.path().join("a").exists());
        let says = |path: &Path, resume| RunDir::look(path, resume).unwrap_err().to_string();
        assert!(says(&free, true).contains("holds no run to resume"));
        fs::create_dir(&taken).unwrap();
        RunDir::look(&taken, false).unwrap();
        fs::write(taken.join("notes.txt"), "x").unwrap();
        assert!(says(&taken, false).contains("holds `notes.txt`"));
        assert!(says(&taken.join("notes.txt"), false).contains("expected a directory"));
        fs::write(taken.join(PLAN), "").unwrap();
        assert!(says(&taken, false).contains("go on with it by --resume"));
        RunDir::look(&taken, true).unwrap();
        assert_eq!(RealDisk.list(&taken).unwrap(), ["notes.txt", PLAN]);
    }

    #[test]
    fn a_torn_last_event_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(dir.path(), 0).unwrap();
        let limits = Limits::default();
        for torn in ["", "{\"event\":\"st", &"x".repeat(200_000)] {
            fs::write(run.events(), format!("{{\"event\":\"step\"}}\n{torn}")).unwrap();
            let mut events = run.open_events(&limits).unwrap();
            events.append(&json!({"event": "resume"})).unwrap();
            events.sync().unwrap();
            let text = fs::read_to_string(run.events()).unwrap();
            assert_eq!(text, "{\"event\":\"step\"}\n{\"event\":\"resume\"}\n");
        }
        fs::write(run.events(), "torn").unwrap();
        let mut events = run.open_events(&limits).unwrap();
        assert_eq!(fs::read(run.events()).unwrap(), b"");
        let long = json!("x".repeat(1 << 20));
        assert!(events.append(&long).unwrap_err().to_string().contains("event_line"));
    }
}
