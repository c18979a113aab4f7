//! Every fault at every operation of replacing a file and an adapter: after a power loss each file has
//! its old bytes or its new ones, and the new ones once the write has returned.

use engraft_store::adapter::{self, write_adapter_on};
use engraft_store::atomic::write_atomic_on;
use engraft_store::disk::Disk;
use engraft_store::sim::{Fault, Sabotage, SimDisk};
use engraft_store::{Body, Entry};
use serde_json::json;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

type Write = fn(&SimDisk, u8) -> bool;

fn plan(disk: &SimDisk, version: u8) -> bool {
    write_atomic_on(disk, Path::new("/run/plan.toml"), &Body::bytes(vec![version; 5000])).is_ok()
}

fn adapter(disk: &SimDisk, version: u8) -> bool {
    let config = json!({"peft_type": "LORA", "r": version});
    let values = vec![f32::from(version); 900];
    let entries = [Entry::f32("w", &[900], &values)];
    write_adapter_on(disk, Path::new("/run/adapter"), &config, &entries).is_ok()
}

fn files(write: Write) -> Vec<PathBuf> {
    if std::ptr::fn_addr_eq(write, plan as Write) {
        return vec!["/run/plan.toml".into()];
    }
    [adapter::WEIGHTS, adapter::CONFIG].iter().map(|n| Path::new("/run/adapter").join(n)).collect()
}

fn start(write: Write) -> SimDisk {
    let disk = SimDisk::default();
    disk.create_dir(Path::new("/run"), false).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    assert!(write(&disk, 1));
    assert_eq!(disk.pending(), 0);
    disk.fork()
}

fn read(disk: &SimDisk, path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(mut file) = disk.open(path) {
        file.read_to_end(&mut bytes).unwrap();
    }
    bytes
}

/// True when each file is whole in everything that a crash now may leave.
fn holds(disk: &SimDisk, write: Write, done: bool) -> bool {
    let (old, new) = (start(write), start(write));
    assert!(write(&new, 2));
    let pending = disk.pending();
    let mut outcomes = vec![disk.crash(|_| false), disk.crash(|_| true)];
    outcomes.extend((0..pending).map(|lost| disk.crash(|i| i != lost)));
    outcomes.extend((0..pending).map(|kept| disk.crash(|i| i == kept)));
    outcomes.iter().all(|outcome| {
        files(write).iter().all(|path| {
            let found = read(outcome, path);
            found == read(&new, path) || !done && found == read(&old, path)
        })
    })
}

#[test]
fn old_or_new_after_every_fault() {
    for write in [plan as Write, adapter] {
        let probe = start(write);
        assert!(write(&probe, 2));
        let operations = probe.operations();
        let faults = [
            Fault::CrashBefore,
            Fault::CrashAfter,
            Fault::Torn(1),
            Fault::Torn(2000),
            Fault::Short,
            Fault::Error(ErrorKind::Interrupted),
            Fault::Error(ErrorKind::Other),
            Fault::Error(ErrorKind::StorageFull),
        ];
        for (at, label) in operations.iter().enumerate() {
            for fault in faults {
                let disk = start(write);
                disk.set_fault(at, fault);
                let done = write(&disk, 2);
                assert!(holds(&disk, write, done), "{fault:?} at {label}");
                if matches!(fault, Fault::Error(_) | Fault::Short) {
                    assert!(write(&disk, 2) && holds(&disk, write, true), "again, {fault:?} at {label}");
                }
            }
        }
    }
}

#[test]
fn dropping_any_sync_is_noticed() {
    for write in [plan as Write, adapter] {
        let probe = start(write);
        assert!(write(&probe, 2));
        let labels = probe.operations();
        let syncs: Vec<usize> = (0..labels.len()).filter(|i| labels[*i].starts_with("sync")).collect();
        for at in syncs {
            // A directory's earlier sync is covered by its last; only the others must bite.
            let covered = labels[at].starts_with("sync_dir") && labels[at + 1..].contains(&labels[at]);
            let disk = start(write);
            disk.set_sabotage(Sabotage::DropSync(at));
            let done = write(&disk, 2);
            assert!(covered || !holds(&disk, write, done), "{}", labels[at]);
        }
    }
}
