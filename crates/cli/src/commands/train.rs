//! `engraft train`: a recipe to a run directory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use engraft_method::Settings;
use engraft_model::Packed;
use engraft_recipe::{Dtype, Recipe};
use engraft_report::human;
use engraft_store::run::RunDir;
use engraft_train::{
    Estimate, Evaluation, NotFinite, RunOptions, Session, SessionOptions, Smaller, Status, estimate, smaller,
};
use serde_json::{Value, json};

use super::plan::parts;
use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome, code};
use crate::machine;
use crate::progress::Progress;
use crate::recipes::{default_out, file_of, read, shell};
use crate::stop::Stop;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft train recipe.toml
  engraft train recipe.toml --set method.rank=16 --out runs/b
  engraft train recipe.toml --check        two steps of everything
  engraft train recipe.toml --resume        goes on where the run was cut off
  engraft train a.toml b.toml c.toml        several adapters, one base in memory

Several recipes are trained together, a step each in turn: every run has a directory of its own (OUT/NAME), its own data and
settings, and the bits it has alone.

The first Ctrl-C finishes the step, saves and prints how to go on; the second leaves at once.")]
pub struct Args {
    /// A recipe, `-` for standard input, or a run directory to take its plan; several are trained together
    #[arg(required = true, value_name = "RECIPE")]
    pub(super) recipes: Vec<PathBuf>,
    /// Sets a value of the recipe, such as train.epochs=1; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// The run directory, of several recipes the one that holds theirs; runs/NAME if left out
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Goes on with the run in the run directory
    #[arg(long)]
    pub(super) resume: bool,
    /// With --resume, refuses where the bits could differ from an uninterrupted run
    #[arg(long, requires = "resume")]
    pub(super) exact: bool,
    /// Takes two steps of everything (data, training, saving, resuming, evaluation) and leaves nothing
    #[arg(long, conflicts_with = "resume")]
    pub(super) check: bool,
    /// Runs even where the run is estimated to need more memory than there is
    #[arg(long)]
    pub(super) overcommit: bool,
    /// Prints a JSON object at the end
    #[arg(long)]
    pub(super) json: bool,
}

/// Trains.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    match &args.recipes[..] {
        [only] => one(args, only, cx),
        several => super::together::run(args, several, cx),
    }
}

/// Trains one recipe.
fn one(args: &Args, path: &Path, cx: &Context) -> Outcome {
    let started = Instant::now();
    let stop = Stop::listen()?;
    let recipe = read(&file_of(path), &args.set)?;
    let out = args.out.clone().unwrap_or_else(|| match args.resume && path.is_dir() {
        true => path.to_owned(),
        false => default_out(path),
    });
    if !args.check {
        // Before the model is read: that may take minutes.
        RunDir::look(&out, args.resume).before_work()?;
    }
    let session = open_to_train(&recipe, &Packed::default(), cx)?;
    introduce(&session, cx);
    if let Some(room) = machine::room().filter(|_| !args.overcommit) {
        refuse_too_large(&session, room)?;
    }
    check_pictures(&session, cx)?;
    if args.check {
        let seconds = check(session, &out, None, cx)?;
        match args.json {
            true => cx.ui.json(json!({ "status": CHECKED, "seconds": seconds })),
            false => cx.ui.print(&passed(seconds)),
        }
        return Ok(());
    }
    let mut progress = Progress::new(&cx.ui, session.plan.steps, cx.environment.utf8);
    let options = RunOptions {
        out: out.clone(),
        resume: args.resume,
        exact: args.exact,
        stop: stop.flag(),
        command: Some(command(args, &out, false)),
        load_seconds: started.elapsed().as_secs_f64(),
    };
    let outcome = engraft_train::train(&session, &options, &mut progress);
    progress.clear();
    if matches!(outcome, Err(engraft_train::Error::Interrupted)) {
        cx.ui.raw(&format!("{}\nresume  {}\n", engraft_train::Error::Interrupted, command(args, &out, true)));
        return Err(Failure::said(stop.code()));
    }
    let outcome = outcome.map_err(|error| failed(error, args, &out, &session))?;
    if outcome.status == Status::Interrupted {
        let saved =
            outcome.checkpoint.as_ref().map_or_else(String::new, |p| format!("; saved {}", p.display()));
        cx.ui.raw(&format!("interrupted after step {}{saved}\n", outcome.step));
        cx.ui.raw(&format!("resume  {}\n", command(args, &out, true)));
        return Err(Failure::said(stop.code()));
    }
    let mut outcome = outcome;
    if outcome.before.is_none() && args.resume {
        outcome.before = before(&out);
    }
    finish(args, &session, &outcome, cx);
    Ok(())
}

/// Loads what the recipe names; the weights of its base are taken from `packed` where they are there. Every mistake is one
/// before any work.
pub fn open(recipe: &Recipe, packed: &Packed, cx: &Context) -> Outcome<Session> {
    open_choosing(recipe, packed, &Settings::new(), cx)
}

/// As [`open`], with `choices` made of what the saved adapter that the recipe names leaves open until it is used.
pub fn open_choosing(recipe: &Recipe, packed: &Packed, choices: &Settings, cx: &Context) -> Outcome<Session> {
    if cx.environment.threads.is_none() && recipe.train.threads > 0 {
        crate::set_threads(recipe.train.threads);
    }
    if !recipe.model_path.is_dir() {
        // Downloads with a progress bar; the session finds it in the cache, or shows at its place why it is not there.
        let _ = cx.resolve_from(&recipe.model.value, &recipe.model_path);
    }
    let hub = cx.environment.hub();
    let mut options = SessionOptions {
        hub: &hub,
        progress: &mut |_| {},
        working_dir: std::env::current_dir().before_work()?,
        limits: cx.limits.clone(),
        packed: packed.clone(),
        templates: cx.templates()?,
        choices: choices.clone(),
    };
    Session::open(recipe, &mut options).before_work()
}

/// [`open`], and an error where the adapter that it starts from cannot be trained on.
pub fn open_to_train(recipe: &Recipe, packed: &Packed, cx: &Context) -> Outcome<Session> {
    let session = open(recipe, packed, cx)?;
    let problem =
        |e: engraft_train::Error| recipe.problems(vec![recipe.problem_at("method.from", e.to_string())]);
    session.expect_training().map_err(|e| Failure::problems(problem(e)))?;
    Ok(session)
}

/// What is about to be trained, in a few lines.
pub(super) fn introduce(session: &Session, cx: &Context) {
    let info = session.model.info();
    let titles: Vec<&str> = session.methods.iter().map(|(method, _)| method.info().title).collect();
    cx.ui.say(&format!(
        "{}  {} {}, {}: {} trained numbers",
        titles.join(" + "),
        info.architecture,
        info.task.name(),
        session.plan.model,
        session.trained_count()
    ));
    let report = &session.train.report;
    let cut = match report.truncated_rows {
        0 => String::new(),
        n => {
            format!("; {n} rows cut at {}, {} tokens lost", session.plan.max_length, report.truncated_tokens)
        }
    };
    let eval = session
        .eval
        .as_ref()
        .map_or_else(String::new, |eval| format!(", {} for evaluation", eval.examples.len()));
    // Pictures have no length in tokens.
    let length = match session.train.images {
        None => format!(", median {} tokens", report.median_length),
        Some(_) => String::new(),
    };
    cx.ui.say(&format!("data  {} examples{eval}{length}{cut}", report.examples));
    session.notes.iter().for_each(|note| cx.ui.note(note));
    for name in &session.new_tensors {
        cx.ui.reason(&format!("note: {name} is not in the model's files and starts at random"));
    }
}

/// A run that cannot fit ends before it begins, with the settings under which it would.
fn refuse_too_large(session: &Session, room: u64) -> Outcome {
    let sizes = estimate(session);
    if sizes.total_bytes() <= room {
        return Ok(());
    }
    let mut message = format!(
        "the run needs about {} of memory, {} are there: {}",
        human::bytes(sizes.total_bytes()),
        human::bytes(room),
        parts(&sizes)
    );
    message.push_str(&smaller_runs(session, &sizes, room));
    Err(Failure::before_work(message + "\nor    --overcommit, to run all the same"))
}

/// Settings that need less memory, a line each.
fn smaller_runs(session: &Session, sizes: &Estimate, room: u64) -> String {
    let line = |option: &Smaller| {
        let total = human::bytes(option.total_bytes);
        let fits = if option.total_bytes <= room { "fits" } else { "still too large" };
        format!("\ntry   --set {}: {total}, {fits}", option.settings.join(" --set "))
    };
    smaller(session, sizes, room).iter().map(line).collect()
}

/// Decodes every picture file once, so that a damaged one does not end the run hours later.
pub(super) fn check_pictures(session: &Session, cx: &Context) -> Outcome {
    let train = session.train.images.as_ref();
    let eval = session.eval.as_ref().and_then(|eval| eval.images.as_ref());
    // A part that was held out shares the pictures of the whole.
    let other = eval.filter(|eval| train.is_none_or(|train| !Arc::ptr_eq(train, eval)));
    let bar = cx.ui.bar();
    let checked = train.into_iter().chain(other).try_for_each(|images| {
        images.check(&mut |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        })
    });
    bar.finish_and_clear();
    checked.before_work()
}

/// How a run that was only checked ended.
pub(super) const CHECKED: &str = "check passed";

/// Two steps of everything, in a directory that goes away again, where the run itself would be written. `among` is the name
/// of one of several runs, in as many columns as the longest has. Gives the seconds it took.
pub(super) fn check(session: Session, out: &Path, among: Option<&str>, cx: &Context) -> Outcome<f64> {
    let parent = out.ancestors().skip(1).find(|dir| dir.is_dir()).unwrap_or(Path::new("."));
    let mut progress = Progress::new(&cx.ui, 2, cx.environment.utf8);
    if let Some(name) = among {
        progress = progress.among(name, &indicatif::MultiProgress::new());
    }
    let checked = engraft_train::check(session, parent, &mut progress);
    progress.clear();
    Ok(checked?.seconds)
}

/// What a check that passed has done.
pub(super) fn passed(seconds: f64) -> String {
    let seconds = human::duration(seconds);
    format!(
        "{CHECKED} in {seconds}: data, two steps, checkpoint, resume, evaluation, adapter; nothing is left behind\n"
    )
}

/// The command that repeats or resumes what was asked for.
pub(super) fn command(args: &Args, out: &Path, resume: bool) -> String {
    let mut words = vec!["engraft".to_owned(), "train".to_owned()];
    words.extend(args.recipes.iter().map(|recipe| shell(&recipe.to_string_lossy())));
    for set in &args.set {
        words.extend(["--set".to_owned(), shell(set)]);
    }
    words.extend(["--out".to_owned(), shell(&out.to_string_lossy())]);
    if resume {
        words.push("--resume".to_owned());
    }
    words.join(" ")
}

/// How to go on after a run that did not come to its end.
pub(super) fn failed(error: engraft_train::Error, args: &Args, out: &Path, session: &Session) -> Failure {
    use engraft_train::Error::{Checkpoint, NotFinite, Resume, Store};
    match error {
        NotFinite(found) => not_finite(&found, args, session),
        // A run that another process holds or that is not that of the recipe was refused before any work.
        Resume(_) | Store(engraft_store::Error::Locked { .. }) => {
            let mut failure = Failure::from(error);
            failure.code = code::BEFORE_WORK;
            failure
        }
        // A write that failed: on a full disk, in a directory that is gone.
        Store(_) | Checkpoint { .. } => {
            let next = match out.join("plan.toml").is_file() {
                true => format!("resume  {}", command(args, out, true)),
                false => format!("again   {}", command(args, out, false)),
            };
            Failure::from(error).ending(&next)
        }
        other => match engraft_tensor::device::exhausted() {
            // The estimate is of a processor's run, which keeps about as much.
            Some(room) => {
                let runs = smaller_runs(session, &estimate(session), room);
                Failure::from(other).ending(runs.trim_start())
            }
            None => other.into(),
        },
    }
}

/// Says what to try after a loss that is not finite: a tenth of the learning rate, where anything was learned at all.
fn not_finite(found: &NotFinite, args: &Args, session: &Session) -> Failure {
    let failure = Failure::running(found.to_string());
    if found.untrained {
        return match (&found.cause, session.plan.train.dtype) {
            (Some(_), _) => failure.ending("try   the files again from where they came from"),
            (None, Dtype::Bf16) => failure.ending("try   train.dtype = \"f32\""),
            (None, Dtype::F32) => failure.ending("try   the run without these rows"),
        };
    }
    let rate = human::number(session.plan.train.learning_rate / 10.0, 2);
    let sets = args.set.iter().filter(|set| !set.starts_with("train.learning_rate"));
    let sets: String = sets.map(|set| format!(" --set {}", shell(set))).collect();
    let [recipe] = &args.recipes[..] else {
        return failure.ending(&format!("try   train.learning_rate = {rate} in its recipe"));
    };
    let recipe = shell(&recipe.to_string_lossy());
    let next = format!("engraft train {recipe} --out NEW{sets} --set train.learning_rate={rate}");
    failure.ending(&format!("try   {next}"))
}

/// The metric that says most about the task, before and after.
fn headline(before: Option<&Evaluation>, after: Option<&Evaluation>, per_row: bool) -> Vec<String> {
    let (Some(before), Some(after)) = (before, after) else { return Vec::new() };
    let change =
        |name: &str, a: f64, b: f64| format!("{name} {} → {}", human::number(a, 3), human::number(b, 3));
    let names: &[&str] = if per_row { &["accuracy"] } else { &["perplexity"] };
    let metric = |name: &&str| Some(change(name, before.metric(name)?, after.metric(name)?));
    names.iter().filter_map(metric).chain([change("eval loss", before.loss, after.loss)]).collect()
}

/// The evaluation before training, which an earlier part of the run logged.
pub(super) fn before(run: &Path) -> Option<Evaluation> {
    // Only a line of the summary is lost where the log cannot be read; the run itself has read and written it.
    let events = engraft_train::run_data(run).ok()?.events?;
    let eval = events.evals.into_iter().find(|eval| eval.step == 0)?;
    Some(Evaluation { loss: eval.loss?, labels: 0, metrics: eval.metrics })
}

/// How a run ended, in one line.
pub(super) fn summary(session: &Session, outcome: &engraft_train::Outcome) -> String {
    let task = session.model.info().task;
    let mut parts = vec![outcome.status.name().to_owned(), human::duration(outcome.seconds)];
    parts.extend(headline(outcome.before.as_ref(), outcome.after.as_ref(), task.is_classification()));
    if outcome.before.is_none() {
        parts.push(format!("mean loss {}", human::number(outcome.mean_loss, 4)));
    }
    parts.join("  ")
}

fn finish(args: &Args, session: &Session, outcome: &engraft_train::Outcome, cx: &Context) {
    let ui = &cx.ui;
    if args.json {
        ui.json(object(outcome));
        return;
    }
    let task = session.model.info().task;
    ui.print(&format!("{}\n", summary(session, outcome)));
    if ui.quiet() {
        return;
    }
    if let Some((step, value)) = outcome.best {
        ui.reason(&format!(
            "best {} {} at step {step}",
            engraft_train::metric_name(session.plan.train.best_metric),
            value
        ));
    }
    let Some(adapter) = &outcome.adapter else { return };
    ui.print(&format!("adapter  {}\n", adapter.display()));
    if let Some(plot) = &outcome.plot {
        ui.print(&format!("plot     {}\n", plot.display()));
    }
    let run = adapter.parent().unwrap_or(adapter);
    let next = match task.name() {
        "causal-lm" | "seq2seq" => format!(
            "engraft generate --model {} --adapter {} --prompt '…'",
            shell(&session.plan.model),
            shell(&adapter.to_string_lossy())
        ),
        _ => format!("engraft report {}", shell(&run.to_string_lossy())),
    };
    ui.print(&format!("next  {next}\n"));
}

pub(super) fn object(outcome: &engraft_train::Outcome) -> Value {
    let eval =
        |eval: &Option<Evaluation>| eval.as_ref().map(|e| json!({ "loss": e.loss, "metrics": e.metrics }));
    let path = |path: &Option<PathBuf>| path.as_ref().map(|p| p.display().to_string());
    json!({
        "status": outcome.status.name(), "step": outcome.step, "seconds": outcome.seconds,
        "mean_loss": outcome.mean_loss, "before": eval(&outcome.before), "after": eval(&outcome.after),
        "adapter": path(&outcome.adapter), "plot": path(&outcome.plot),
    })
}
