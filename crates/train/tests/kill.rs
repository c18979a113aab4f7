//! SIGKILL at random moments, and a file-size limit in the middle: the run goes on to the same bits, also of methods that look
//! at the data before the first step.
//!
//! The killed process is this test binary itself, started on the ignored test `child`.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{golden, recipe, recipe_of, session};
use engraft_train::{RunOptions, train};

const RUN: &str = "ENGRAFT_TEST_RUN";
const METHOD: &str = "ENGRAFT_TEST_METHOD";
const STEPS: u64 = 60;
/// Steps of a run that is prepared.
const FEW: u64 = 12;

/// Trains in the directory that the parent names, from wherever the run there stands.
#[test]
#[ignore = "started by the other tests of this file"]
fn child() {
    let Some(out) = std::env::var_os(RUN).map(PathBuf::from) else { return };
    let dir = golden().join("trajectories/llama__lora");
    let method = std::env::var(METHOD).ok();
    let (steps, every) = if method.is_some() { (FEW, 2) } else { (STEPS, 5) };
    let text =
        format!("steps = {steps}\nbatch_size = 2\ncheckpoint_every = {every}\nschedule = \"linear\"\n");
    let base = golden().join("models/llama");
    let text = match method {
        None => recipe(&dir, &base, &text, ""),
        Some(method) => recipe_of(&method, &dir, &base, &text, ""),
    };
    let session = session(&text).unwrap();
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
    result_at(out, STEPS)
}

fn result_at(out: &Path, step: u64) -> [Vec<u8>; 3] {
    let saved = out.join(format!("checkpoints/step-{step:08}"));
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

/// Methods that look at the data before the first step.
const PREPARED: [&str; 8] = [
    "name = \"fish\"\nsamples = 16",
    "name = \"child_tuning\"",
    "name = \"sam_mask\"\nburn_in = 40",
    "name = \"sift\"",
    "name = \"spt\"",
    "name = \"lora\"\ninit = \"corda\"",
    "name = \"lora\"\ninit = \"lora-ga\"",
    "name = \"lora\"\ninit = \"eva\"",
];

#[test]
fn kills_of_prepared_methods_change_no_bit() {
    let mut fractions = fractions();
    for method in PREPARED {
        let dir = tempfile::tempdir().unwrap();
        let begin = |out: &Path| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.env(METHOD, method);
            child_command(command, out).spawn().unwrap()
        };
        let (whole, out) = (dir.path().join("whole"), dir.path().join("run"));
        let started = Instant::now();
        finish(begin(&whole));
        let seconds = started.elapsed().as_secs_f64();
        let expected = result_at(&whole, FEW);
        // Once as soon as the plan stands, while the method looks; then at moments that the dice say.
        let mut child = begin(&out);
        while !out.join("plan.toml").is_file() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for fraction in fractions.by_ref().take(4) {
            let mut child = begin(&out);
            std::thread::sleep(Duration::from_secs_f64(seconds * fraction));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        finish(begin(&out));
        assert!(result_at(&out, FEW) == expected, "{method}");
    }
}

#[test]
fn what_is_stopped_before_its_first_step_looks_again() {
    let dir = tempfile::tempdir().unwrap();
    let (dir_of_data, base) = (golden().join("trajectories/llama__lora"), golden().join("models/llama"));
    let train_table = format!("steps = {FEW}\nbatch_size = 2\n");
    let text = recipe_of(PREPARED[2], &dir_of_data, &base, &train_table, "");
    let outs = ["whole", "run"].map(|name| dir.path().join(name));
    let options = |out: &Path, resume| RunOptions { out: out.to_owned(), resume, ..RunOptions::default() };
    let [whole, out] = &outs;
    train(&session(&text).unwrap(), &options(whole, false), &mut ()).unwrap();
    let stopped = options(out, false);
    let mut looks = Looks { stop: stopped.stop.clone(), seen: Vec::new() };
    let error = train(&session(&text).unwrap(), &stopped, &mut looks).unwrap_err();
    assert!(matches!(error, engraft_train::Error::Interrupted), "{error}");
    // One epoch has eight micro-batches, and says all there is.
    assert_eq!(looks.seen, [(1, Some(8)), (2, Some(8)), (3, Some(8))]);
    train(&session(&text).unwrap(), &options(out, true), &mut ()).unwrap();
    assert!(result_at(out, FEW) == result_at(whole, FEW));
}

/// Stops a run after its method's third look.
struct Looks {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    seen: Vec<(u64, Option<u64>)>,
}

impl engraft_train::Observer for Looks {
    fn event(&mut self, _event: &engraft_train::Event) {}

    fn preparing(&mut self, _method: &str, done: u64, total: Option<u64>) {
        self.seen.push((done, total));
        self.stop.store(done == 3, std::sync::atomic::Ordering::Relaxed);
    }
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
