//! SIGKILL at 20 random moments, and a file-size limit in the middle: the run goes on to the same bits.
//!
//! The killed process is this test binary itself, started on the ignored test `child`.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{golden, recipe, session};
use engraft_train::{RunOptions, train};

const RUN: &str = "ENGRAFT_TEST_RUN";
const STEPS: u64 = 60;

/// Trains in the directory that the parent names, from wherever the run there stands.
#[test]
#[ignore = "started by the other tests of this file"]
fn child() {
    let Some(out) = std::env::var_os(RUN).map(PathBuf::from) else { return };
    let dir = golden().join("trajectories/llama__lora");
    let text = format!("steps = {STEPS}\nbatch_size = 2\ncheckpoint_every = 5\nschedule = \"linear\"\n");
    let session = session(&recipe(&dir, &golden().join("models/llama"), &text, "")).unwrap();
    let resume = out.join("run.lock").exists();
    let options = RunOptions { out, resume, exact: true, ..RunOptions::default() };
    if let Err(e) = train(&session, &options, &mut ()) {
        panic!("{e}");
    }
}

fn start(out: &Path) -> Child {
    child_command(Command::new(std::env::current_exe().unwrap()), out).spawn().unwrap()
}

fn child_command(mut command: Command, out: &Path) -> Command {
    command.args(["--exact", "child", "--ignored", "--nocapture"]).env(RUN, out);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn result(out: &Path) -> [Vec<u8>; 3] {
    let saved = out.join(format!("checkpoints/step-{STEPS:08}"));
    let files = [
        out.join("adapter/adapter_model.safetensors"),
        saved.join("params.safetensors"),
        saved.join("optim.safetensors"),
    ];
    files.map(|path| std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Pseudo-random numbers in 0..1, the same in every run of the test.
fn fractions() -> impl Iterator<Item = f64> {
    let mut random = engraft_data::rng::Random::new(20, 26, 11);
    std::iter::repeat_with(move || random.unit())
}

#[test]
fn twenty_kills_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let started = Instant::now();
    finish(start(&whole));
    let (seconds, expected) = (started.elapsed().as_secs_f64(), result(&whole));
    let (mut kills, mut round) = (0, 0);
    let mut out = dir.path().join("run-0");
    for fraction in fractions() {
        let mut child = start(&out);
        std::thread::sleep(Duration::from_secs_f64(seconds * fraction));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
        } else {
            finish(child);
            assert!(result(&out) == expected, "after {kills} kills");
            round += 1;
            out = dir.path().join(format!("run-{round}"));
        }
        if kills == 20 {
            break;
        }
    }
    finish(start(&out));
    assert!(result(&out) == expected, "after all kills");
}

#[test]
fn a_full_disk_is_told_and_the_run_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("run"));
    finish(start(&whole));
    // Files may not grow beyond half of what the log will take: some step fails to be logged or saved.
    let limit = std::fs::metadata(whole.join("events.jsonl")).unwrap().len().div_ceil(2 * 512);
    let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" \"$@\"");
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).arg(std::env::current_exe().unwrap());
    let output = child_command(shell, &out).spawn().unwrap().wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("cannot write"), "{text}");
    finish(start(&out));
    assert!(result(&out) == result(&whole));
}
