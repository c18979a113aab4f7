//! A disk in memory that can lose power: it keeps what programs see apart from what would survive.
//!
//! Bytes survive after a file's sync, names after their directory's sync. Each directory keeps a log of
//! its unsynced changes (a rename is one change), each file one pending change of content; a crash
//! keeps any subset of them. A failed sync loses the pages for good, and later syncs of that file lie,
//! as Linux does. Faults strike at the N-th operation.

use crate::disk::{Disk, DiskFile};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// What happens at the chosen operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Power goes before the operation.
    CrashBefore,
    /// Power goes right after it.
    CrashAfter,
    /// A write of which only this many bytes arrive, then power goes.
    Torn(usize),
    /// A write that takes only half of its bytes.
    Short,
    /// The operation fails once with this kind of error.
    Error(ErrorKind),
}

/// A deliberate breach of the protocol, to show that tests notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Operation N, a sync, says yes and does nothing.
    DropSync(usize),
    /// Operation N, a sync, is done only after operation N + 1.
    LateSync(usize),
}

type Id = usize;

#[derive(Clone, Debug)]
enum Node {
    File { seen: Vec<u8>, durable: Vec<u8>, lost: bool },
    Dir { seen: BTreeMap<String, Id>, durable: BTreeMap<String, Id>, log: Vec<Change> },
}

/// One change of a directory: names set or removed together.
type Change = Vec<(String, Option<Id>)>;

#[derive(Clone, Debug)]
struct State {
    nodes: Vec<Node>,
    done: usize,
    labels: Vec<String>,
    fault: Option<(usize, Fault)>,
    sabotage: Option<Sabotage>,
    late: Option<Id>,
    crashed: bool,
    free: u64,
}

/// The simulated disk. Clones share it.
#[derive(Clone, Debug)]
pub struct SimDisk(Rc<RefCell<State>>);

impl Default for SimDisk {
    fn default() -> Self {
        Self::of(vec![Node::Dir { seen: BTreeMap::new(), durable: BTreeMap::new(), log: Vec::new() }])
    }
}

fn error(kind: ErrorKind) -> io::Error {
    io::Error::new(kind, "simulated")
}

impl SimDisk {
    fn of(nodes: Vec<Node>) -> Self {
        Self(Rc::new(RefCell::new(State {
            nodes,
            done: 0,
            labels: Vec::new(),
            fault: None,
            sabotage: None,
            late: None,
            crashed: false,
            free: u64::MAX,
        })))
    }

    /// A copy that no longer shares anything, with the operation count at 0.
    pub fn fork(&self) -> Self {
        Self::of(self.0.borrow().nodes.clone())
    }

    /// Lets `fault` strike at operation `at`, counted from 0.
    pub fn set_fault(&self, at: usize, fault: Fault) {
        self.0.borrow_mut().fault = Some((at, fault));
    }

    /// Breaks the protocol on purpose.
    pub fn set_sabotage(&self, sabotage: Sabotage) {
        self.0.borrow_mut().sabotage = Some(sabotage);
    }

    /// Sets what [`Disk::free_bytes`] answers.
    pub fn set_free(&self, bytes: u64) {
        self.0.borrow_mut().free = bytes;
    }

    /// The operations so far, such as `sync /run/params`.
    pub fn operations(&self) -> Vec<String> {
        self.0.borrow().labels.clone()
    }

    /// Number of changes that a crash now could lose, each on its own.
    pub fn pending(&self) -> usize {
        let count = |node: &Node| match node {
            Node::File { seen, durable, .. } => usize::from(seen != durable),
            Node::Dir { log, .. } => log.len(),
        };
        self.0.borrow().nodes.iter().map(count).sum()
    }

    /// The disk found after a power loss in which the `i`-th pending change survived if `keep(i)`.
    pub fn crash(&self, mut keep: impl FnMut(usize) -> bool) -> Self {
        let mut index = 0;
        let mut kept = || {
            index += 1;
            keep(index - 1)
        };
        let mut nodes = self.0.borrow().nodes.clone();
        for node in &mut nodes {
            match node {
                Node::File { seen, durable, .. } => {
                    if seen != durable && !kept() {
                        seen.clone_from(durable);
                    }
                    durable.clone_from(seen);
                }
                Node::Dir { seen, durable, log } => {
                    for change in log.drain(..) {
                        if kept() {
                            apply(durable, change);
                        }
                    }
                    seen.clone_from(durable);
                }
            }
        }
        Self::of(nodes)
    }

    /// Counts an operation and lets a fault strike before it.
    fn begin(&self, label: &str, path: &Path) -> io::Result<Step> {
        let mut state = self.0.borrow_mut();
        if state.crashed {
            return Err(error(ErrorKind::Other));
        }
        let at = state.done;
        state.done += 1;
        state.labels.push(format!("{label} {}", path.display()));
        let fault = state.fault.filter(|(n, _)| *n == at).map(|(_, fault)| fault);
        if fault == Some(Fault::CrashBefore) {
            state.crashed = true;
            return Err(error(ErrorKind::Other));
        }
        Ok(Step { at, fault })
    }

    /// Ends an operation: power may go, and a late sync is done.
    fn end(&self, step: Step) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        if matches!(step.fault, Some(Fault::CrashAfter | Fault::Torn(_))) {
            state.crashed = true;
            return Err(error(ErrorKind::Other));
        }
        let is_late = matches!(state.sabotage, Some(Sabotage::LateSync(n)) if n == step.at);
        if !is_late && let Some(id) = state.late.take() {
            make_durable(&mut state.nodes[id]);
        }
        Ok(())
    }

    fn find(&self, path: &Path) -> io::Result<Id> {
        let state = self.0.borrow();
        let mut at = 0;
        for part in path.iter().filter_map(|part| part.to_str()).filter(|part| *part != "/") {
            let Node::Dir { seen, .. } = &state.nodes[at] else {
                return Err(error(ErrorKind::NotADirectory));
            };
            at = *seen.get(part).ok_or_else(|| error(ErrorKind::NotFound))?;
        }
        Ok(at)
    }

    /// Applies changes to the directory of `path`.
    fn change(&self, dir: &Path, change: Change) -> io::Result<()> {
        let id = self.find(dir)?;
        match &mut self.0.borrow_mut().nodes[id] {
            Node::Dir { seen, log, .. } => {
                apply(seen, change.clone());
                log.push(change);
                Ok(())
            }
            Node::File { .. } => Err(error(ErrorKind::NotADirectory)),
        }
    }

    fn add(&self, path: &Path, node: Node) -> io::Result<Id> {
        let (dir, name) = split(path)?;
        if self.find(path).is_ok() {
            return Err(error(ErrorKind::AlreadyExists));
        }
        let id = self.0.borrow().nodes.len();
        self.change(dir, vec![(name, Some(id))])?;
        self.0.borrow_mut().nodes.push(node);
        Ok(id)
    }

    fn sync(&self, label: &str, path: &Path, id: Id) -> io::Result<()> {
        let step = self.begin(label, path)?;
        if let Some(Fault::Error(kind)) = step.fault {
            if let Node::File { lost, .. } = &mut self.0.borrow_mut().nodes[id] {
                *lost = true;
            }
            return Err(error(kind));
        }
        {
            let mut state = self.0.borrow_mut();
            match state.sabotage {
                Some(Sabotage::DropSync(n)) if n == step.at => {}
                Some(Sabotage::LateSync(n)) if n == step.at => state.late = Some(id),
                _ => make_durable(&mut state.nodes[id]),
            }
        }
        self.end(step)
    }

    fn simple(&self, label: &str, path: &Path, act: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let step = self.begin(label, path)?;
        if let Some(Fault::Error(kind)) = step.fault {
            return Err(error(kind));
        }
        act()?;
        self.end(step)
    }
}

#[derive(Clone, Copy)]
struct Step {
    at: usize,
    fault: Option<Fault>,
}

fn apply(names: &mut BTreeMap<String, Id>, change: Change) {
    for (name, id) in change {
        match id {
            Some(id) => names.insert(name, id),
            None => names.remove(&name),
        };
    }
}

fn make_durable(node: &mut Node) {
    match node {
        Node::File { seen, durable, lost: false } => durable.clone_from(seen),
        Node::File { .. } => {}
        Node::Dir { seen, durable, log } => {
            durable.clone_from(seen);
            log.clear();
        }
    }
}

fn split(path: &Path) -> io::Result<(&Path, String)> {
    match (path.parent(), path.file_name().and_then(|name| name.to_str())) {
        (Some(dir), Some(name)) => Ok((dir, name.to_owned())),
        _ => Err(error(ErrorKind::InvalidInput)),
    }
}

struct SimFile {
    disk: SimDisk,
    path: PathBuf,
    id: Id,
}

impl Write for SimFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let step = self.disk.begin("write", &self.path)?;
        let taken = match step.fault {
            Some(Fault::Error(kind)) => return Err(error(kind)),
            Some(Fault::Torn(n)) => n.min(bytes.len()),
            Some(Fault::Short) => bytes.len().div_ceil(2),
            _ => bytes.len(),
        };
        if let Node::File { seen, .. } = &mut self.disk.0.borrow_mut().nodes[self.id] {
            seen.extend_from_slice(&bytes[..taken]);
        }
        self.disk.end(step)?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn sync(&mut self) -> io::Result<()> {
        self.disk.sync("sync", &self.path, self.id)
    }
}

impl Disk for SimDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let step = self.begin("create", path)?;
        if let Some(Fault::Error(kind)) = step.fault {
            return Err(error(kind));
        }
        let id = self.add(path, Node::File { seen: Vec::new(), durable: Vec::new(), lost: false })?;
        self.end(step)?;
        Ok(Box::new(SimFile { disk: self.clone(), path: path.to_owned(), id }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        let id = self.find(path)?;
        match &self.0.borrow().nodes[id] {
            Node::File { seen, .. } => Ok(Box::new(io::Cursor::new(seen.clone()))),
            Node::Dir { .. } => Err(error(ErrorKind::IsADirectory)),
        }
    }

    fn create_dir(&self, path: &Path, _private: bool) -> io::Result<()> {
        let node = Node::Dir { seen: BTreeMap::new(), durable: BTreeMap::new(), log: Vec::new() };
        self.simple("create_dir", path, || self.add(path, node).map(|_| ()))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        match &self.0.borrow().nodes[self.find(dir)?] {
            Node::Dir { seen, .. } => Ok(seen.keys().cloned().collect()),
            Node::File { .. } => Err(error(ErrorKind::NotADirectory)),
        }
    }

    fn exists(&self, path: &Path) -> bool {
        self.find(path).is_ok()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.simple("rename", to, || {
            let id = self.find(from)?;
            let ((dir, old), (to_dir, new)) = (split(from)?, split(to)?);
            if dir != to_dir {
                return Err(error(ErrorKind::CrossesDevices));
            }
            self.change(dir, vec![(old, None), (new, Some(id))])
        })
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        if self.exists(to) {
            return Err(error(ErrorKind::AlreadyExists));
        }
        self.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.simple("remove", path, || {
            self.find(path)?;
            let (dir, name) = split(path)?;
            self.change(dir, vec![(name, None)])
        })
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        if !self.list(path)?.is_empty() {
            return Err(error(ErrorKind::DirectoryNotEmpty));
        }
        self.remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let id = self.find(dir)?;
        self.sync("sync_dir", dir, id)
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        Ok(self.0.borrow().free)
    }
}
