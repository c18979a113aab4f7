//! A run, from a loaded session to a finished directory; exact when it is killed and goes on.
//!
//! Order on disk: `plan.toml`, the checkpoint of step 0, then `events.jsonl`: whatever moment a kill hits, the run can be
//! resumed, and steps that were not saved are taken again with the same bits.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use engraft_nn::Adapter;
use engraft_recipe::Metric;
use engraft_store::checkpoint::{self as saved, Retention};
use engraft_store::disk::RealDisk;
use engraft_store::run::{Events, RunDir};
use engraft_store::{Limits, json};
use sha2::{Digest, Sha256};

use crate::checkpoint::{self, Best, State};
use crate::evaluate::{Evaluation, evaluate};
use crate::events::{DataEvent, EndEvent, EvalEvent, Event, Observer};
use crate::fingerprint::hex;
use crate::session::Session;
use crate::trainer::Trainer;
use crate::{Error, Result, finish};

/// Saves in a row that may fail.
const SAVES: u32 = 3;
/// Largest `plan.toml`.
const PLAN_BYTES_MAX: u64 = 4 << 20;
/// Bytes beside the checkpoints that a run writes: events, plot, report.
const SMALL_FILES_BYTES: u64 = 16 << 20;

/// How a run is to be made.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// The run directory.
    pub out: PathBuf,
    /// Goes on with the run that is there.
    pub resume: bool,
    /// Refuses to resume where the bits could differ.
    pub exact: bool,
    /// Set from outside to stop after the step under way.
    pub stop: Arc<AtomicBool>,
    /// The command that repeats the run, for the report.
    pub command: Option<String>,
    /// Seconds it took to load everything, for the report.
    pub load_seconds: f64,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// All steps were taken.
    Done,
    /// The metric got no better.
    EarlyStop,
    /// Stopped from outside; a checkpoint was saved.
    Interrupted,
}

impl Status {
    /// The word of the `end` event.
    pub fn name(self) -> &'static str {
        match self {
            Status::Done => "done",
            Status::EarlyStop => "early stop",
            Status::Interrupted => "interrupted",
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: Status,
    /// Steps done.
    pub step: u64,
    /// Seconds, earlier parts included.
    pub seconds: f64,
    /// Mean loss over all steps.
    pub mean_loss: f64,
    /// The evaluation before training and the last one.
    pub before: Option<Evaluation>,
    /// The evaluation of the adapter that was written.
    pub after: Option<Evaluation>,
    /// The best evaluation: step and value of `train.best_metric`.
    pub best: Option<(u64, f64)>,
    /// `adapter/`; absent when interrupted.
    pub adapter: Option<PathBuf>,
    /// The plot; absent when interrupted.
    pub plot: Option<PathBuf>,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
}

/// Trains.
///
/// # Errors
/// A directory that cannot be written or holds another run, a step without a finite loss, checkpoints that cannot be
/// saved; the newest checkpoint stands whatever happens.
pub fn train(session: &Session, options: &RunOptions, observer: &mut dyn Observer) -> Result<Outcome> {
    session.expect_training()?;
    let mut run = Run::open(session, options, observer)?;
    let status = run.steps()?;
    run.end(status)
}

/// Bytes that a run writes at least: two checkpoints and the small files.
fn bytes_written(adapter: &Adapter) -> u64 {
    2 * checkpoint::bytes(adapter) + SMALL_FILES_BYTES
}

/// Bytes that must be free for a run to begin.
pub(crate) fn bytes_to_begin(adapter: &Adapter) -> u64 {
    bytes_written(adapter) + saved::MARGIN_BYTES
}

/// A run in progress.
pub(crate) struct Run<'a> {
    pub session: &'a Session,
    pub options: &'a RunOptions,
    pub dir: RunDir,
    observer: &'a mut dyn Observer,
    events: Events,
    trainer: Trainer<'a>,
    pub state: State,
    plan_hash: String,
    id: String,
    pub before: Option<Evaluation>,
    pub after: Option<Evaluation>,
    saved: Option<u64>,
    failed_saves: u32,
    clock: Instant,
}

impl<'a> Run<'a> {
    /// Makes or opens the directory, and the state to go on from.
    pub(crate) fn open(
        session: &'a Session,
        options: &'a RunOptions,
        observer: &'a mut dyn Observer,
    ) -> Result<Self> {
        let bytes = bytes_written(&session.adapter);
        let plan = session.plan.to_toml();
        // A run that was killed before its plan stood has only its lock: it begins again.
        let unborn = options.out.join("run.lock").is_file() && !options.out.join("plan.toml").exists();
        let dir = match options.resume && !unborn {
            true => RunDir::open(&options.out, bytes)?,
            false => RunDir::create(&options.out, bytes)?,
        };
        if options.resume && !unborn {
            same_plan(&dir.plan(), &plan)?;
        } else {
            dir.write_plan(&plan)?;
        }
        let plan_hash = hex(&Sha256::digest(essence(&plan).as_bytes()));
        let mut trainer = Trainer::new(session)?;
        let checkpoints = dir.checkpoints();
        let mut resumed = None;
        let (state, id) = if saved::steps(&RealDisk, &checkpoints)?.is_empty() {
            if !session.goes_on {
                crate::calibrate::prepare(session, &options.stop, observer)?;
            }
            let state = State { fingerprint: session.fingerprint.clone(), ..State::default() };
            let id = new_id(&plan_hash);
            checkpoint::write(&checkpoints, &id, &plan_hash, &state, &session.adapter, &trainer.optimizer)?;
            (state, id)
        } else {
            let (found, state) =
                checkpoint::resume(&checkpoints, &plan_hash, &session.adapter, &mut trainer.optimizer)?;
            resumed = Some(found.skipped.clone());
            (state, found.manifest.stamp.run)
        };
        let events = dir.open_events(&Limits::default())?;
        let saved = Some(state.step);
        let mut run = Run {
            session,
            options,
            dir,
            observer,
            events,
            trainer,
            state,
            plan_hash,
            id,
            before: None,
            after: None,
            saved,
            failed_saves: 0,
            clock: Instant::now(),
        };
        run.begin(resumed)?;
        Ok(run)
    }

    /// The first events: what the data are, or from where the run goes on.
    fn begin(&mut self, resumed: Option<Vec<String>>) -> Result<()> {
        let Some(skipped) = resumed else { return self.tell(Event::Data(self.data_event())) };
        let differences = self.state.fingerprint.differences(&self.session.fingerprint);
        let exact = differences.is_empty();
        if !exact && self.options.exact {
            return Err(Error::Resume(format!(
                "the resumed run would not have the same bits: {}; leave --exact out to go on all the same",
                differences.join("; ")
            )));
        }
        self.state.fingerprint = self.session.fingerprint.clone();
        self.tell(Event::Resume { step: self.state.step, exact })?;
        if !exact {
            self.warn(format!(
                "resumed under other conditions, the bits may differ: {}",
                differences.join("; ")
            ))?;
        }
        for reason in skipped {
            self.warn(format!("a checkpoint was passed over: {reason}"))?;
        }
        Ok(())
    }

    fn data_event(&self) -> DataEvent {
        let report = &self.session.train.report;
        DataEvent {
            rows: report.rows,
            examples: report.examples,
            tokens: report.tokens,
            median_length: report.median_length,
            length_99: report.length_99,
            max_length: report.max_length,
            truncated_rows: report.truncated_rows,
            truncated_tokens: report.truncated_tokens,
            untrained_rows: report.untrained_rows.len(),
            duplicates: report.duplicates,
            trained_share: report.trained_share,
            padding_share: self.trainer.padding_share(),
            eval_examples: self.session.eval.as_ref().map_or(0, |e| e.examples.len()),
        }
    }

    /// The steps that are left.
    fn steps(&mut self) -> Result<Status> {
        loop {
            if let Some(status) = self.advance()? {
                return Ok(status);
            }
        }
    }

    /// One step and what is due after it; the status where there are no more.
    pub(crate) fn advance(&mut self) -> Result<Option<Status>> {
        // Time between two steps belongs to another run.
        self.clock = Instant::now();
        let plan = &self.session.plan;
        if self.state.step == 0 && self.before.is_none() {
            self.before = self.evaluate()?;
        }
        if self.is_early() {
            return Ok(Some(Status::EarlyStop));
        }
        if self.state.step >= plan.steps {
            return Ok(Some(Status::Done));
        }
        let number = self.state.step + 1;
        let stepped = self.trainer.step(number).map_err(|e| self.with_kept(e))?;
        self.state.step = number;
        self.state.loss_sum += stepped.event.loss;
        self.state.tokens += stepped.event.tokens;
        self.log(Event::Step(stepped.event))?;
        for warning in stepped.warnings {
            self.warn(warning)?;
        }
        let mut due = plan.train.checkpoint_every > 0 && number.is_multiple_of(plan.train.checkpoint_every);
        if plan.eval_every > 0 && number.is_multiple_of(plan.eval_every) && self.session.eval.is_some() {
            self.evaluate()?;
            due |= self.state.best.as_ref().is_some_and(|best| best.step == number);
        }
        let stop = self.options.stop.load(Ordering::Relaxed);
        if due || stop || number == plan.steps || self.failed_saves > 0 {
            self.save(stop || number == plan.steps)?;
        }
        self.count_time();
        Ok((stop && number < plan.steps).then_some(Status::Interrupted))
    }

    /// Adds what the clock shows to the seconds of the run.
    fn count_time(&mut self) {
        self.state.seconds += self.clock.elapsed().as_secs_f64();
        self.clock = Instant::now();
    }

    fn is_early(&self) -> bool {
        let patience = self.session.plan.train.early_stopping_patience;
        patience > 0 && self.state.evals_without_better >= patience
    }

    /// Evaluates where there is something to evaluate on, and keeps count of the best.
    fn evaluate(&mut self) -> Result<Option<Evaluation>> {
        let Some(data) = &self.session.eval else { return Ok(None) };
        let started = Instant::now();
        let observer = &mut *self.observer;
        let found =
            evaluate(&self.session.evaluated(true)?, data, &mut |done, all| observer.evaluating(done, all))?;
        let metric = self.session.plan.train.best_metric;
        let value = found.metric(metric_name(metric)).unwrap_or(found.loss);
        let better = self.state.best.as_ref().is_none_or(|best| match metric.greater_is_better() {
            true => value > best.value,
            false => value < best.value,
        });
        if better {
            self.state.best = Some(Best { step: self.state.step, value });
            self.state.evals_without_better = 0;
        } else {
            self.state.evals_without_better += 1;
        }
        self.tell(Event::Eval(EvalEvent {
            step: self.state.step,
            loss: found.loss,
            metrics: found.metrics.clone(),
            best: better,
            seconds: started.elapsed().as_secs_f64(),
        }))?;
        self.after = Some(found.clone());
        Ok(Some(found))
    }

    /// Saves the state; a failure is told and tried again after the next step, three times. `must` allows none.
    fn save(&mut self, must: bool) -> Result<()> {
        if self.saved == Some(self.state.step) {
            return Ok(());
        }
        self.count_time();
        let dir = self.dir.checkpoints();
        let optimizer = &self.trainer.optimizer;
        match checkpoint::write(
            &dir,
            &self.id,
            &self.plan_hash,
            &self.state,
            &self.session.adapter,
            optimizer,
        ) {
            Ok(_) => {}
            Err(Error::Store(source)) => {
                self.failed_saves += 1;
                if must || self.failed_saves >= SAVES {
                    return Err(Error::Checkpoint {
                        attempts: self.failed_saves,
                        step: self.state.step,
                        source,
                    });
                }
                return self
                    .warn(format!("this checkpoint could not be written, the earlier ones stand: {source}"));
            }
            Err(other) => return Err(other),
        }
        self.failed_saves = 0;
        self.saved = Some(self.state.step);
        self.tell(Event::Checkpoint { step: self.state.step })?;
        let keep_every = Some(self.session.plan.train.keep_every).filter(|every| *every > 0);
        let best = self.state.best.as_ref().map(|best| best.step);
        Ok(saved::retain(&RealDisk, &dir, &Retention { newest: 2, best, keep_every })?)
    }

    /// The last evaluation, the adapter, the plot and the report.
    pub(crate) fn end(mut self, status: Status) -> Result<Outcome> {
        let mut written = None;
        let mut adapter_step = None;
        if status != Status::Interrupted {
            let best = self.state.best.as_ref().map(|best| best.step);
            let step = best.filter(|_| self.session.plan.train.early_stopping_patience > 0);
            match step.filter(|step| *step != self.state.step) {
                Some(step) => self.restore(step)?,
                None => self.final_evaluation()?,
            }
            adapter_step = Some(step.unwrap_or(self.state.step));
            for (method, _) in &self.session.methods {
                method.finish(&self.session.adapter)?;
            }
            finish::write_adapter(self.session, &self.dir.adapter())?;
            written = Some(self.dir.adapter());
        }
        let seconds = self.state.seconds + self.clock.elapsed().as_secs_f64();
        let end = EndEvent { reason: status.name().into(), step: self.state.step, seconds, adapter_step };
        self.tell(Event::End(end))?;
        let plot = match status {
            Status::Interrupted => None,
            _ => Some(finish::write_report(&mut self, seconds)?),
        };
        Ok(Outcome {
            status,
            step: self.state.step,
            seconds,
            mean_loss: self.state.loss_sum / self.state.step.max(1) as f64,
            before: self.before,
            after: self.after,
            best: self.state.best.map(|best| (best.step, best.value)),
            adapter: written,
            plot,
            checkpoint: self.saved.map(|step| self.dir.checkpoints().join(saved::directory_name(step))),
        })
    }

    /// Evaluates the final adapter unless the last step just did.
    fn final_evaluation(&mut self) -> Result<()> {
        let every = self.session.plan.eval_every;
        let just = self.after.is_some() && every > 0 && self.state.step.is_multiple_of(every);
        if !just && self.state.step > 0 {
            let state = (self.state.best.clone(), self.state.evals_without_better);
            self.evaluate()?;
            // The count decided already; a last look must not change it for a run that is resumed from here.
            (self.state.best, self.state.evals_without_better) = state;
        }
        Ok(())
    }

    /// Takes the adapter back to the best step and evaluates it.
    fn restore(&mut self, step: u64) -> Result<()> {
        let path = self.dir.checkpoints().join(saved::directory_name(step));
        checkpoint::restore_params(&path, &self.session.adapter)?;
        if let Some(data) = &self.session.eval {
            self.after = Some(evaluate(&self.session.evaluated(true)?, data, &mut |_, _| {})?);
        }
        Ok(())
    }

    /// Names the newest checkpoint in the error of a step.
    fn with_kept(&self, error: Error) -> Error {
        match error {
            Error::NotFinite(mut e) => {
                e.kept = self.saved.map(|step| self.dir.checkpoints().join(saved::directory_name(step)));
                Error::NotFinite(e)
            }
            other => other,
        }
    }

    fn warn(&mut self, message: String) -> Result<()> {
        self.tell(Event::Warning { step: self.state.step, message })
    }

    /// Logs an event of every step: durable with the next one that matters.
    fn log(&mut self, event: Event) -> Result<()> {
        self.events.append(&serde_json::to_value(&event).map_err(|e| Error::Setup(e.to_string()))?)?;
        self.observer.event(&event);
        Ok(())
    }

    /// Logs an event and makes the log durable.
    fn tell(&mut self, event: Event) -> Result<()> {
        self.log(event)?;
        Ok(self.events.sync()?)
    }
}

/// The name of a metric in [`Evaluation::metrics`].
pub fn metric_name(metric: Metric) -> &'static str {
    match metric {
        Metric::Loss => "loss",
        Metric::Accuracy => "accuracy",
        Metric::F1 => "f1",
        Metric::Perplexity => "perplexity",
    }
}

/// A plan without comments: where a value came from does not matter.
fn essence(plan: &str) -> String {
    let lines = plan.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| line.rsplit_once("  # ").map_or(line, |(value, _)| value).to_owned() + "\n").collect()
}

/// An error naming the lines that differ between the run's plan and this one.
fn same_plan(path: &Path, plan: &str) -> Result<()> {
    let old = json::read_capped(path, "plan", PLAN_BYTES_MAX)?;
    let (old, new) = (essence(&String::from_utf8_lossy(&old)), essence(plan));
    let lacks = |text: &str, line: &str| !text.lines().any(|other| other == line);
    let was: Vec<&str> = old.lines().filter(|line| lacks(&new, line)).collect();
    let is: Vec<&str> = new.lines().filter(|line| lacks(&old, line)).collect();
    if was.is_empty() && is.is_empty() {
        return Ok(());
    }
    let mut text = format!("the recipe is not the one that {} was started with", path.display());
    was.iter().for_each(|line| text.push_str(&format!("\n  was  {line}")));
    is.iter().for_each(|line| text.push_str(&format!("\n  is   {line}")));
    text.push_str("\nresume with the same settings, or start a new run with another --out");
    Err(Error::Resume(text))
}

/// A name that no other run has.
fn new_id(plan_hash: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    hex(&Sha256::digest(format!("{plan_hash} {now} {}", std::process::id()).as_bytes()))[..16].to_owned()
}
