//! Every fault at every operation of saving a checkpoint and retiring the one before: whatever a power
//! loss then leaves, recovery finds the last finished or the previous one with equal bytes, and every
//! `step-…` directory verifies. The last tests break the protocol and expect that this is noticed.

use engraft_store::Body;
use engraft_store::checkpoint::{
    MARGIN_BYTES, Retention, Stamp, clean, newest_valid, retain, save, steps, verify,
};
use engraft_store::disk::Disk;
use engraft_store::sim::{Fault, Sabotage, SimDisk};
use std::io::{ErrorKind, Read};
use std::path::Path;

const DIR: &str = "/checkpoints";
const NAMES: [&str; 3] = ["params.safetensors", "optim.safetensors", "state.json"];

fn bytes(step: u64, name: &str) -> Vec<u8> {
    (0..4500 + name.len()).map(|i| (i as u64 * 31 + step) as u8).collect()
}

fn save_step(disk: &SimDisk, step: u64) -> engraft_store::Result<()> {
    let hash = |c: &str| c.repeat(64);
    let stamp = Stamp { run: "r".into(), step, plan: hash("a"), fingerprint: hash("b") };
    let files: Vec<(&str, Body)> = NAMES.iter().map(|name| (*name, Body::bytes(bytes(step, name)))).collect();
    save(disk, Path::new(DIR), &stamp, &files).map(|_| ())
}

fn retire(disk: &SimDisk) -> engraft_store::Result<()> {
    retain(disk, Path::new(DIR), &Retention { newest: 1, ..Retention::default() })
}

/// A disk that holds step 100, durably.
fn start() -> SimDisk {
    let disk = SimDisk::default();
    disk.create_dir(Path::new(DIR), false).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    save_step(&disk, 100).unwrap();
    assert_eq!(disk.pending(), 0);
    disk.fork()
}

/// What may be found: only `last` once its save has returned, else it or the previous.
fn check(disk: &SimDisk, allowed: &[u64]) -> Result<(), String> {
    let dir = Path::new(DIR);
    let found = newest_valid(disk, dir, |_, _| Ok(())).map_err(|e| e.to_string())?;
    let step = found.manifest.stamp.step;
    if !allowed.contains(&step) || !found.skipped.is_empty() {
        return Err(format!("found {step}, allowed {allowed:?}, skipped {:?}", found.skipped));
    }
    for name in NAMES {
        let mut read = Vec::new();
        disk.open(&found.path.join(name)).unwrap().read_to_end(&mut read).unwrap();
        if read != bytes(step, name) {
            return Err(format!("{name} of {step} differs"));
        }
    }
    Ok(())
}

/// Checks what a power loss now may leave: nothing unsynced, everything, each change alone lost, and
/// sixteen seeded subsets. Returns how many disks were looked at.
fn check_crashes(disk: &SimDisk, allowed: &[u64]) -> Result<usize, String> {
    let pending = disk.pending();
    let mut outcomes = vec![disk.crash(|_| false), disk.crash(|_| true)];
    outcomes.extend((0..pending).map(|lost| disk.crash(|i| i != lost)));
    outcomes.extend((0..16u64).map(|seed| {
        let bits = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
        disk.crash(|i| bits >> (i % 40) & 1 == 1)
    }));
    for outcome in &outcomes {
        check(outcome, allowed)?;
        // The next start cleans up, and saving works again.
        clean(outcome, Path::new(DIR)).map_err(|e| e.to_string())?;
        check(outcome, allowed)?;
    }
    Ok(outcomes.len())
}

/// Saves step 200, retires step 100, and checks everything that a crash at the end may leave.
fn run(disk: &SimDisk) -> Result<usize, String> {
    let saved = save_step(disk, 200).is_ok();
    if saved {
        // A retirement that fails is no harm; the next start cleans up.
        let _ = retire(disk);
    }
    check_crashes(disk, if saved { &[200] } else { &[100, 200] })
}

#[test]
fn every_fault_at_every_operation() {
    let clean_run = start();
    run(&clean_run).unwrap();
    let operations = clean_run.operations().len();
    let kinds =
        [ErrorKind::Interrupted, ErrorKind::Other, ErrorKind::StorageFull, ErrorKind::ReadOnlyFilesystem];
    let mut faults = vec![Fault::CrashBefore, Fault::CrashAfter, Fault::Short];
    faults.extend([1, 2250, 4096].map(Fault::Torn));
    faults.extend(kinds.map(Fault::Error));
    let (mut injected, mut outcomes) = (0, 0);
    for at in 0..operations {
        for fault in &faults {
            let disk = start();
            disk.set_fault(at, *fault);
            let label = || format!("{fault:?} at {at}, {}", disk.operations()[at]);
            outcomes += run(&disk).unwrap_or_else(|e| panic!("{}: {e}", label()));
            injected += 1;
            if matches!(fault, Fault::Error(_) | Fault::Short) {
                // The process lives on: saving again from memory must hold.
                save_step(&disk, 200).unwrap_or_else(|e| panic!("{}: {e}", label()));
                check_crashes(&disk, &[200]).unwrap_or_else(|e| panic!("again, {}: {e}", label()));
            }
        }
    }
    assert!(operations >= 20 && injected >= 200 && outcomes >= 4000, "{operations} {injected} {outcomes}");
}

#[test]
fn dropping_any_sync_is_noticed() {
    let reference = start();
    save_step(&reference, 200).unwrap();
    let labels = reference.operations();
    let syncs: Vec<usize> = (0..labels.len()).filter(|i| labels[*i].starts_with("sync")).collect();
    assert_eq!(syncs.len(), 6, "{labels:?}");
    for at in syncs {
        let disk = start();
        disk.set_sabotage(Sabotage::DropSync(at));
        save_step(&disk, 200).unwrap();
        assert!(check_crashes(&disk, &[200]).is_err(), "{}", labels[at]);
    }
}

#[test]
fn swapping_two_steps_is_noticed() {
    let reference = start();
    save_step(&reference, 200).unwrap();
    let labels = reference.operations();
    let rename = labels.iter().position(|label| label.starts_with("rename")).unwrap();
    // The directory's sync after the rename instead of before.
    assert!(labels[rename - 1].starts_with("sync_dir"));
    let disk = start();
    disk.set_sabotage(Sabotage::LateSync(rename - 1));
    disk.set_fault(rename, Fault::CrashAfter);
    assert!(run(&disk).is_err());
    // Retirement before the commit.
    let disk = start();
    let operations = {
        let probe = start();
        retire_all(&probe);
        probe.operations().len()
    };
    disk.set_fault(operations + 3, Fault::CrashBefore);
    retire_all(&disk);
    assert!(run(&disk).is_err());
}

/// Removes step 100 as retirement would, with no newer one there.
fn retire_all(disk: &SimDisk) {
    let dir = Path::new(DIR);
    disk.rename(&dir.join("step-00000100"), &dir.join(".del-100")).unwrap();
    disk.sync_dir(dir).unwrap();
    clean(disk, dir).unwrap();
}

#[test]
fn no_changed_byte_is_accepted() {
    let path = Path::new(DIR).join("step-00000100");
    let good = start();
    verify(&good, &path).unwrap();
    let mut manifest = Vec::new();
    good.open(&path.join("MANIFEST.json")).unwrap().read_to_end(&mut manifest).unwrap();
    for at in 0..manifest.len() {
        for bit in [0, 5] {
            let mut bad = manifest.clone();
            bad[at] ^= 1 << bit;
            assert!(replaced(&path.join("MANIFEST.json"), &bad).is_err(), "byte {at}");
        }
    }
    for at in (0..4500).step_by(13) {
        for name in NAMES {
            let mut bad = bytes(100, name);
            bad[at] ^= 0x10;
            assert!(replaced(&path.join(name), &bad).unwrap_err().contains(name));
        }
    }
    assert!(replaced(&path.join(NAMES[0]), b"short").unwrap_err().contains("found 5"));
}

/// Recovery's answer when one file has other bytes.
fn replaced(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let disk = start();
    disk.remove_file(path).unwrap();
    disk.create(path).unwrap().write_all(bytes).unwrap();
    newest_valid(&disk, Path::new(DIR), |_, _| Ok(())).map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn a_damaged_newest_falls_back_and_says_why() {
    let disk = start();
    save_step(&disk, 200).unwrap();
    let file = Path::new(DIR).join("step-00000200/state.json");
    disk.remove_file(&file).unwrap();
    let found = newest_valid(&disk, Path::new(DIR), |_, _| Ok(())).unwrap();
    assert_eq!(found.manifest.stamp.step, 100);
    assert!(found.skipped[0].contains("step-00000200") && found.skipped[0].contains("state.json"));
    let e = newest_valid(&disk, Path::new(DIR), |_, _| Err("other shapes".into())).unwrap_err();
    assert!(e.to_string().contains("step-00000100: other shapes"), "{e}");
    // Saving the damaged step again moves the bad one aside.
    save_step(&disk, 200).unwrap();
    check(&disk, &[200]).unwrap();
    assert!(disk.list(Path::new(DIR)).unwrap().iter().any(|name| name.starts_with(".bad-")));
    // Saving a good one again changes nothing.
    save_step(&disk, 200).unwrap();
    check(&disk, &[200]).unwrap();
}

#[test]
fn retention_keeps_newest_best_and_periodic() {
    let disk = start();
    for step in [200, 300, 400, 500, 600] {
        save_step(&disk, step).unwrap();
    }
    let keep = Retention { newest: 2, best: Some(200), keep_every: Some(300) };
    retain(&disk, Path::new(DIR), &keep).unwrap();
    assert_eq!(steps(&disk, Path::new(DIR)).unwrap(), [200, 300, 500, 600]);
    retain(&disk, Path::new(DIR), &Retention { newest: 0, best: None, keep_every: Some(0) }).unwrap();
    assert_eq!(steps(&disk, Path::new(DIR)).unwrap(), [600]);
}

#[test]
fn too_little_space_is_said_before_anything_is_written() {
    let disk = start();
    disk.set_free(MARGIN_BYTES + 100);
    let e = save_step(&disk, 200).unwrap_err();
    assert!(e.is_disk_full() && e.to_string().contains("bytes are needed"), "{e}");
    assert!(disk.operations().is_empty());
}
