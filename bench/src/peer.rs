//! A peer: a Python program that answers a line of JSON with a line of JSON.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write, stdout};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A pause before each turn: threads of the one before may spin for work for a while.
const REST: Duration = Duration::from_millis(100);

/// One answer, from the other side.
pub fn say(value: &Value) -> Result<()> {
    println!("{value}");
    Ok(stdout().flush()?)
}

/// A running peer; it ends when dropped.
pub struct Peer {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts `bench/peers/<script>` and returns it with its first line, which names its version.
    pub fn start(python: &Path, script: &str) -> Result<(Peer, Value)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers").join(script);
        Self::spawn(python, &[path.as_os_str()])
    }

    /// Starts `program` and returns it with its first line.
    pub fn spawn(program: &Path, args: &[&OsStr]) -> Result<(Peer, Value)> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("the peer has no output")?);
        let mut peer = Peer { child, requests, answers };
        let hello = peer.answer()?;
        Ok((peer, hello))
    }

    /// Sends `request` and waits for the answer.
    pub fn ask(&mut self, request: &Value) -> Result<Value> {
        let pipe = self.requests.as_mut().context("the peer has no input")?;
        std::thread::sleep(REST);
        writeln!(pipe, "{request}").context("the peer no longer reads")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the peer ended without an answer; its own message is above");
        }
        serde_json::from_str(&line).with_context(|| format!("the peer answered {line:?}"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Closing its input ends the peer; an error at the end of a bench changes nothing.
        drop(self.requests.take());
        let _ = self.child.wait();
    }
}
