//! What every command is given: the terminal, the limits on files, the environment.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use engraft_data::TemplateOptions;
use engraft_report::human;
use engraft_store::Limits;
use engraft_store::hub::Progress;
use indicatif::ProgressStyle;

use crate::commands::template_worker;
use crate::environment::Environment;
use crate::failure::{BeforeWork, Failure, Outcome};
use crate::ui::Ui;

/// The surroundings of a command.
pub struct Context {
    /// The terminal.
    pub ui: Ui,
    /// Limits on files.
    pub limits: Limits,
    /// The environment.
    pub environment: Environment,
}

impl Context {
    /// The directory of a model or adapter given as a path or Hub id, downloaded if it is not in the cache.
    pub fn resolve(&self, name: &str) -> Outcome<PathBuf> {
        self.resolve_from(name, Path::new(name))
    }

    /// [`Context::resolve`] where the directory that `name` may be is `path`, such as one relative to a recipe.
    pub fn resolve_from(&self, name: &str, path: &Path) -> Outcome<PathBuf> {
        if name.is_empty() {
            let message = "expected a directory or a Hub id, found an empty name";
            return Err(Failure::before_work(message));
        }
        let bar = self.ui.bar();
        let style = ProgressStyle::with_template("{msg} {bytes}/{total_bytes} {bytes_per_sec} {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        let mut file = String::new();
        let mut report = |progress: Progress| {
            if file != progress.file {
                file = progress.file.to_owned();
                let size = human::bytes(progress.total);
                if bar.is_hidden() {
                    self.ui.say(&format!("downloading {name}: {file}, {size}"));
                }
                bar.reset();
                bar.set_length(progress.total);
                bar.set_message(file.clone());
            }
            bar.set_position(progress.done);
        };
        let resolved = self.environment.hub().resolve_from(name, path, None, &mut report);
        bar.finish_and_clear();
        resolved.before_work()
    }

    /// What chat templates are given: the time, and a process of this program that renders them.
    pub fn templates(&self) -> Outcome<TemplateOptions> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        let now = now.and_then(|time| i64::try_from(time.as_secs()).ok());
        Ok(TemplateOptions { now, worker: Some(template_worker::worker()?) })
    }
}
