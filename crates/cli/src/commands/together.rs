//! `engraft train` with several recipes: their runs go on together, and what they share of their bases is in memory once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use engraft_model::Packed;
use engraft_report::human;
use engraft_store::run::RunDir;
use engraft_train::{Member, RunOptions, Session, Status, estimate, train_together};
use indicatif::MultiProgress;
use serde_json::json;

use super::train::{
    Args, CHECKED, before, check, check_pictures, command, failed, introduce, object, open_to_train, passed,
    summary,
};
use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome};
use crate::machine;
use crate::progress::Progress;
use crate::recipes::{default_out, file_of, read};
use crate::stop::Stop;

/// A recipe with its run directory.
struct Job {
    name: String,
    out: PathBuf,
    /// Whether its run was begun before.
    resume: bool,
}

/// Trains several recipes together. One that fails leaves the others going; the first failure is the command's.
pub fn run(args: &Args, recipes: &[PathBuf], cx: &Context) -> Outcome {
    let started = Instant::now();
    let stop = Stop::listen()?;
    let above = args.out.clone().unwrap_or_else(|| PathBuf::from("runs"));
    let jobs = jobs(args, recipes, &above)?;
    if args.resume {
        tell_unbegun(&jobs, &above, cx)?;
    }
    let read = recipes.iter().map(|path| read(&file_of(path), &args.set)).collect::<Outcome<Vec<_>>>()?;
    if !args.check {
        jobs.iter().try_for_each(|job| RunDir::look(&job.out, job.resume).before_work())?;
    }
    let packed = Packed::default();
    let mut sessions = Vec::new();
    for (recipe, job) in read.iter().zip(&jobs) {
        cx.ui.say(&job.name);
        let session = open_to_train(recipe, &packed, cx)?;
        introduce(&session, cx);
        check_pictures(&session, cx)?;
        sessions.push(session);
    }
    if let Some(room) = machine::room().filter(|_| !args.overcommit) {
        refuse_too_large(&sessions, room)?;
    }
    if args.check {
        return check_all(args, sessions, &jobs, cx);
    }
    let options: Vec<RunOptions> = jobs
        .iter()
        .map(|job| RunOptions {
            out: job.out.clone(),
            resume: job.resume,
            exact: args.exact,
            stop: stop.flag(),
            command: Some(command(args, &above, false)),
            load_seconds: started.elapsed().as_secs_f64(),
        })
        .collect();
    let lines = MultiProgress::new();
    let bar = |(session, job): (&Session, &Job)| {
        Progress::new(&cx.ui, session.plan.steps, cx.environment.utf8).among(&job.name, &lines)
    };
    let mut progress: Vec<Progress<'_>> = sessions.iter().zip(&jobs).map(bar).collect();
    let members = sessions.iter().zip(&options).zip(&mut progress);
    let members =
        members.map(|((session, options), observer)| Member { session, options, observer }).collect();
    let outcomes = train_together(members);
    progress.iter().for_each(Progress::clear);
    tell(args, &sessions, &jobs, outcomes, (&above, &stop), cx)
}

/// Checks one run after another; what is said of each begins with its name.
fn check_all(args: &Args, sessions: Vec<Session>, jobs: &[Job], cx: &Context) -> Outcome {
    let width = width(jobs);
    let mut objects = Vec::new();
    for (session, job) in sessions.into_iter().zip(jobs) {
        let seconds =
            check(session, &job.out, Some(&job.name), cx).map_err(|failure| failure.of(&job.name))?;
        match args.json {
            true => objects.push(json!({ "name": job.name, "status": CHECKED, "seconds": seconds })),
            false => cx.ui.print(&format!("{:width$}  {}", job.name, passed(seconds))),
        }
    }
    if args.json {
        cx.ui.json(json!({ "runs": objects }));
    }
    Ok(())
}

/// Columns of the longest name.
fn width(jobs: &[Job]) -> usize {
    jobs.iter().map(|job| job.name.chars().count()).max().unwrap_or(0)
}

/// Says which of the runs that should go on were never begun.
fn tell_unbegun(jobs: &[Job], above: &Path, cx: &Context) -> Outcome {
    let unbegun: Vec<&str> = jobs.iter().filter(|job| !job.resume).map(|job| job.name.as_str()).collect();
    if unbegun.len() == jobs.len() {
        return Err(Failure::before_work(format!(
            "{}: holds none of these runs ({}), so there is nothing to resume; leave --resume out to begin them",
            above.display(),
            unbegun.join(", ")
        )));
    }
    for name in unbegun {
        cx.ui.note(&format!("{name} was not begun in {}: it starts from its first step", above.display()));
    }
    Ok(())
}

/// The run directories, below `above`; names must differ.
fn jobs(args: &Args, recipes: &[PathBuf], above: &Path) -> Outcome<Vec<Job>> {
    let mut seen: BTreeMap<String, &Path> = BTreeMap::new();
    let mut jobs = Vec::new();
    for path in recipes {
        let place = default_out(path);
        let name = place.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        if let Some(other) = seen.insert(name.clone(), path) {
            return Err(Failure::before_work(format!(
                "{} and {} would both run in {}; give their recipes different names",
                other.display(),
                path.display(),
                above.join(&name).display()
            )));
        }
        let out = above.join(&name);
        jobs.push(Job { resume: args.resume && out.exists(), name, out });
    }
    Ok(jobs)
}

/// Runs that cannot fit end before they begin.
fn refuse_too_large(sessions: &[Session], room: u64) -> Outcome {
    let (mut bases, mut adapters, mut activations) = (BTreeMap::new(), 0, 0);
    for session in sessions {
        let sizes = estimate(session);
        let plan = &session.plan;
        let base = format!("{:?} {:?} {:?}", session.model_dir, plan.train.dtype, plan.base);
        bases.insert(base, sizes.base_bytes);
        adapters += sizes.adapter_bytes;
        activations = activations.max(sizes.activation_bytes);
    }
    let total = bases.values().sum::<u64>() + adapters + activations;
    if total <= room {
        return Ok(());
    }
    Err(Failure::before_work(format!(
        "the {} runs need about {} of memory together, {} are there: {} of bases ({} different), {} of adapters, {} of activations\ntry   fewer recipes at once, or a smaller train.batch_size\nor    --overcommit, to run all the same",
        sessions.len(),
        human::bytes(total),
        human::bytes(room),
        human::bytes(bases.values().sum::<u64>()),
        bases.len(),
        human::bytes(adapters),
        human::bytes(activations)
    )))
}

/// How each run ended. The first that failed makes the command fail; the others are told of.
fn tell(
    args: &Args,
    sessions: &[Session],
    jobs: &[Job],
    outcomes: Vec<engraft_train::Result<engraft_train::Outcome>>,
    (above, stop): (&Path, &Stop),
    cx: &Context,
) -> Outcome {
    let (mut failures, mut interrupted, mut objects) = (Vec::new(), false, Vec::new());
    let width = width(jobs);
    for ((session, job), outcome) in sessions.iter().zip(jobs).zip(outcomes) {
        match outcome {
            Ok(outcome) if args.json => {
                interrupted |= outcome.status == Status::Interrupted;
                let mut object = object(&outcome);
                object["name"] = json!(job.name);
                objects.push(object);
            }
            Ok(mut outcome) => {
                if outcome.before.is_none() && job.resume {
                    outcome.before = before(&job.out);
                }
                interrupted |= outcome.status == Status::Interrupted;
                cx.ui.print(&format!("{:width$}  {}\n", job.name, summary(session, &outcome)));
                if let Some(adapter) = &outcome.adapter {
                    cx.ui.print(&format!("{:width$}  adapter  {}\n", "", adapter.display()));
                }
            }
            Err(engraft_train::Error::Interrupted) => {
                interrupted = true;
                match args.json {
                    true => objects.push(json!({ "name": job.name, "status": Status::Interrupted.name() })),
                    false => {
                        cx.ui.print(&format!("{:width$}  {}\n", job.name, engraft_train::Error::Interrupted))
                    }
                }
            }
            Err(error) => {
                objects.push(json!({ "name": job.name, "status": "failed", "error": error.to_string() }));
                let failure = failed(error, args, above, session);
                failures.push(failure.of(&job.name));
            }
        }
    }
    if args.json {
        cx.ui.json(json!({ "runs": objects }));
    }
    let mut failures = failures.into_iter();
    if let Some(first) = failures.next() {
        failures.for_each(|other| other.show(&cx.ui));
        return Err(first);
    }
    if interrupted {
        cx.ui.raw(&format!("resume  {}\n", command(args, above, true)));
        return Err(Failure::said(stop.code()));
    }
    Ok(())
}
