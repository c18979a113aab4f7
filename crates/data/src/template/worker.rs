//! Templates in a process of their own, with what steps and output do not bound: memory and time.
//!
//! A template whose values double within one expression asks for any memory in a few steps. A process that limits its
//! memory dies of that alone, and the program that waits for it says so. The process is told the source once, and then
//! for each conversation which beginnings of it to render; every rendering is answered by itself, so that the time
//! limit is one rendering's. It ends when its input does, and is killed with the template that it renders.

use std::ffi::OsString;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::wire::{self, Answer, REQUEST_LIMIT, Setup};
use super::{Beginning, Compiled, fail};
use crate::error::{Error, Result};
use crate::read::Message;

/// The memory that the process may ask for beyond what it starts with, in bytes. Who starts [`serve`] sets it.
pub const MEMORY_LIMIT: u64 = 256 << 20;
/// The time limit of one rendering, in ticks: a pause of the whole program (Ctrl-Z, a laptop's sleep) counts as one.
const TICKS: u32 = 20;
const TICK: Duration = Duration::from_millis(100);
/// The clock of a process that is not waited for.
const IDLE: u32 = u32::MAX;

/// How a process is started that runs [`serve`] on its standard input and output, within [`MEMORY_LIMIT`].
#[derive(Clone, Debug)]
pub struct Worker {
    /// The executable.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// Renders for the program at the other end of `input` and `output`, until `input` ends.
///
/// # Errors
/// Input that is not the program's; output that cannot be written, which is how the end of the program may show.
pub fn serve(input: &mut impl Read, output: &mut impl Write) -> io::Result<()> {
    let mut output = BufWriter::new(output);
    let Some(setup) = wire::read_request(input)? else { return Ok(()) };
    let template = match Compiled::new(Setup::from_bytes(&setup)?) {
        Ok(template) => template,
        Err(error) => return wire::write_answer(&mut output, &refused(error)),
    };
    wire::write_answer(&mut output, &Answer::Text(String::new()))?;
    while let Some(request) = wire::read_request(input)? {
        let (messages, beginnings) = wire::conversation_from_bytes(&request)?;
        drop(request);
        let messages = Compiled::values(&messages);
        for beginning in beginnings {
            let answer = template.render(&messages, beginning).map_or_else(refused, Answer::Text);
            wire::write_answer(&mut output, &answer)?;
            // Whoever asked takes no more after this one.
            if matches!(answer, Answer::Refused(_)) {
                break;
            }
        }
    }
    Ok(())
}

fn refused(error: Error) -> Answer {
    match error {
        Error::Template { message } => Answer::Refused(message),
        other => Answer::Refused(other.to_string()),
    }
}

/// A template that a process renders. A process that died is replaced at the next use.
pub(super) struct Apart {
    worker: Worker,
    setup: Vec<u8>,
    idle: Mutex<Option<Process>>,
}

impl Apart {
    /// Starts the process and has it compile the template.
    pub fn new(worker: &Worker, setup: &Setup) -> Result<Apart> {
        let (worker, setup) = (worker.clone(), setup.to_bytes());
        let apart = Apart { worker, setup, idle: Mutex::new(None) };
        *apart.idle() = Some(apart.start()?);
        Ok(apart)
    }

    /// Asks for renderings.
    pub fn renderings(&self, messages: &[Message], beginnings: &[Beginning]) -> Result<Answers<'_>> {
        // Taken out while it works: who renders at the same time has a process of its own.
        let idle = self.idle().take();
        let mut process = idle.map_or_else(|| self.start(), Ok)?;
        process.send(&wire::conversation_to_bytes(messages, beginnings))?;
        Ok(Answers { apart: self, process: Some(process), left: beginnings.len() })
    }

    fn start(&self) -> Result<Process> {
        let mut process = Process::start(&self.worker).map_err(|error| {
            fail(format!(
                "cannot start the process that renders it ({}): {error}; see that this file may be run and that more \
                 processes are allowed",
                self.worker.program.display()
            ))
        })?;
        process.send(&self.setup)?;
        match process.receive()? {
            Answer::Text(_) => Ok(process),
            Answer::Refused(message) => Err(fail(message)),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Option<Process>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The renderings of one conversation, in the order they were asked for. A process whose answers are not all taken ends.
pub(crate) struct Answers<'a> {
    apart: &'a Apart,
    process: Option<Process>,
    left: usize,
}

impl Answers<'_> {
    /// The next one; none after the last and after an error.
    pub fn next(&mut self) -> Option<Result<String>> {
        let mut process = self.process.take()?;
        self.left = self.left.checked_sub(1)?;
        let answer = match process.receive() {
            Ok(answer) => answer,
            Err(error) => return Some(Err(error)),
        };
        let refused = matches!(answer, Answer::Refused(_));
        if refused || self.left == 0 {
            *self.apart.idle() = Some(process);
        } else {
            self.process = Some(process);
        }
        Some(match answer {
            Answer::Text(text) => Ok(text),
            Answer::Refused(message) => Err(fail(message)),
        })
    }
}

/// A running process.
struct Process {
    child: Arc<Mutex<Child>>,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Ticks until the process is killed; 0 once it was.
    clock: Arc<AtomicU32>,
    /// The watch ends when this goes.
    _watched: Sender<()>,
}

impl Process {
    fn start(worker: &Worker) -> io::Result<Process> {
        let mut command = Command::new(&worker.program);
        // It needs no variable of the environment, and some are secrets.
        command.args(&worker.arguments).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        // Out of the terminal's reach: at Ctrl-C the program finishes what it does, and that may be a rendering.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn()?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or_else(|| io::Error::other("it has no pipes"))?;
        let (child, clock) = (Arc::new(Mutex::new(child)), Arc::new(AtomicU32::new(IDLE)));
        let (watched, gone) = channel();
        let process = Process {
            child: child.clone(),
            input,
            output: BufReader::new(output),
            clock: clock.clone(),
            _watched: watched,
        };
        let name = "template-watch".to_owned();
        std::thread::Builder::new().name(name).spawn(move || watch(&child, &clock, &gone))?;
        Ok(process)
    }

    fn send(&mut self, request: &[u8]) -> Result<()> {
        if request.len() > REQUEST_LIMIT {
            let (what, help) = ("a conversation".into(), "shorten its messages");
            return Err(Error::TooLarge {
                what,
                found: request.len() as u64,
                limit: REQUEST_LIMIT as u64,
                help,
            });
        }
        self.clock.store(TICKS, Ordering::Relaxed);
        wire::write_request(&mut self.input, request).map_err(|error| self.died(&error))?;
        self.clock.store(IDLE, Ordering::Relaxed);
        Ok(())
    }

    fn receive(&mut self) -> Result<Answer> {
        self.clock.store(TICKS, Ordering::Relaxed);
        let answer = wire::read_answer(&mut self.output).map_err(|error| self.died(&error))?;
        self.clock.store(IDLE, Ordering::Relaxed);
        Ok(answer)
    }

    /// Why there is no answer.
    fn died(&self, error: &io::Error) -> Error {
        let advice = "take the template that the model's authors publish, or set data.template to another";
        if self.clock.load(Ordering::Relaxed) == 0 {
            let seconds = (TICK * TICKS).as_secs_f64();
            return fail(format!("it ran longer than {seconds} s and was stopped; {advice}"));
        }
        let status = end(&self.child);
        let ended = status.map_or_else(|| error.to_string(), |status| status.to_string());
        fail(format!(
            "it asked for more than {} MiB of memory or nests too deeply, so that the process that renders it ended \
             ({ended}); {advice}",
            MEMORY_LIMIT >> 20
        ))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        end(&self.child);
    }
}

/// Ends the process, if it has not ended by itself, and tells how it did.
fn end(child: &Mutex<Child>) -> Option<std::process::ExitStatus> {
    let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
    // An error says that it has ended, which the next line finds out.
    let _ = child.kill();
    child.wait().ok()
}

/// Counts the clock down and kills the process when it has run out.
fn watch(child: &Mutex<Child>, clock: &AtomicU32, gone: &Receiver<()>) {
    while gone.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
        let ticks = clock.load(Ordering::Relaxed);
        if ticks == IDLE || ticks == 0 {
            continue;
        }
        // Where an answer came in between, its time counts from then.
        let counted = clock.compare_exchange(ticks, ticks - 1, Ordering::Relaxed, Ordering::Relaxed);
        if counted.is_ok() && ticks == 1 {
            end(child);
        }
    }
}
