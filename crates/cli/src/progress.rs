//! The course of a run on the terminal: one line that is redrawn, or, where there is none, a plain line now and then.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use engraft_report::human;
use engraft_train::{EvalEvent, Event, Observer, StepEvent};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::ui::Ui;

/// Between two plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);
/// Redraws a second.
const REDRAWS: u8 = 10;
/// Steps over which speed and loss are averaged.
const WINDOW: usize = 20;
/// Columns of the bar.
const BAR: usize = 16;

/// Shows a run while it goes on.
pub struct Progress<'a> {
    ui: &'a Ui,
    /// Said before each line, of one among several runs.
    name: String,
    bar: Option<ProgressBar>,
    arrows: [char; 2],
    total: u64,
    recent: VecDeque<StepEvent>,
    shown_loss: Option<f64>,
    eval: Option<EvalEvent>,
    begun: Option<(Instant, u64)>,
    /// Since when a method looks at the data before the first step, and which.
    looking: Option<(Instant, String)>,
    last_line: Instant,
}

impl<'a> Progress<'a> {
    /// For a run of `total` steps. `utf8` allows arrows beyond ASCII.
    pub fn new(ui: &'a Ui, total: u64, utf8: bool) -> Progress<'a> {
        let bar = ui.is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(REDRAWS));
            let style = ProgressStyle::with_template(&format!("{{bar:{BAR}}} {{msg}}"));
            let chars = if utf8 { "━╸─" } else { "=>-" };
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars(chars));
            bar
        });
        Progress {
            ui,
            name: String::new(),
            bar,
            arrows: if utf8 { ['▼', '▲'] } else { ['v', '^'] },
            total,
            recent: VecDeque::with_capacity(WINDOW),
            shown_loss: None,
            eval: None,
            begun: None,
            looking: None,
            last_line: Instant::now(),
        }
    }

    /// One of several runs that go on together, each with a line in `lines`.
    pub fn among(self, name: &str, lines: &MultiProgress) -> Self {
        let bar = self.bar.map(|bar| lines.add(bar));
        Progress { name: format!("{name}  "), bar, ..self }
    }

    /// Takes the line away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// A line that stays.
    fn say(&self, line: &str) {
        let line = format!("{}{line}", self.name);
        match &self.bar {
            Some(bar) => bar.suspend(|| self.ui.say(&line)),
            None => self.ui.say(&line),
        }
    }

    fn step(&mut self, step: &StepEvent) {
        let (since, first) = *self.begun.get_or_insert_with(|| (Instant::now(), step.step));
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(step.clone());
        let done = step.step.saturating_sub(first);
        let left = (done > 0).then(|| {
            since.elapsed().as_secs_f64() / done as f64 * self.total.saturating_sub(step.step) as f64
        });
        let is_last = step.step == self.total;
        let is_due = self.last_line.elapsed() >= PLAIN_EVERY || is_last;
        if self.bar.is_none() && !is_due {
            return;
        }
        let fields = self.fields(left);
        match &self.bar {
            Some(bar) => {
                bar.set_position(step.step);
                let width = self.ui.width().saturating_sub(BAR + 2 + self.name.chars().count());
                bar.set_message(format!("{}{}", self.name, fitting(fields, width)));
            }
            None => {
                self.last_line = Instant::now();
                self.say(&fields.join("  "));
            }
        }
    }

    /// What there is to say of the last step, the most important first.
    fn fields(&mut self, left: Option<f64>) -> Vec<String> {
        let Some(step) = self.recent.back().cloned() else { return Vec::new() };
        let count = self.recent.len() as f64;
        let loss = self.recent.iter().map(|s| s.loss).sum::<f64>() / count;
        let arrow = match self.shown_loss {
            Some(before) if loss < before => self.arrows[0].to_string(),
            Some(before) if loss > before => self.arrows[1].to_string(),
            _ => String::new(),
        };
        self.shown_loss = Some(loss);
        let mut fields = vec![
            format!("step {}/{}", step.step, self.total),
            format!("loss {}{arrow}", human::number(loss, 4)),
        ];
        if let Some(eval) = &self.eval {
            fields.push(format!("eval {}", human::number(eval.loss, 3)));
        }
        fields.push(format!("lr {}", human::number(step.learning_rate, 2)));
        let seconds: f64 = self.recent.iter().map(|s| s.seconds).sum();
        let tokens: u64 = self.recent.iter().map(|s| s.tokens).sum();
        if seconds > 0.0 {
            fields.push(format!("{} tok/s", human::count(tokens as f64 / seconds)));
        }
        fields.extend(step.memory_bytes.map(human::bytes));
        fields.extend(left.map(|seconds| format!("{} left", human::duration(seconds))));
        fields
    }

    fn evaluated(&mut self, eval: &EvalEvent) {
        let of_all =
            |name: &str| name != "token_accuracy" && !name.contains('.') && !name.starts_with("mean_");
        let metrics = eval.metrics.iter().filter(|(name, _)| of_all(name));
        let shown: Vec<String> =
            metrics.map(|(name, value)| format!("{name} {}", human::number(*value, 3))).collect();
        let best = if eval.best && eval.step > 0 { "  best" } else { "" };
        let when = if eval.step == 0 { "before".to_owned() } else { format!("step {}", eval.step) };
        self.say(&format!("{when}  eval loss {}  {}{best}", human::number(eval.loss, 3), shown.join("  ")));
        if let Some(line) = by_task(eval) {
            self.say(&line);
        }
        self.eval = Some(eval.clone());
    }
}

/// Each task's own score, where the data have several: its accuracy, of a language model its loss.
fn by_task(eval: &EvalEvent) -> Option<String> {
    let score = if eval.metrics.contains_key("perplexity") { "loss" } else { "accuracy" };
    let own = eval.metrics.iter().filter_map(|(name, value)| {
        let task = name.strip_suffix(score)?.strip_suffix('.')?;
        Some(format!("{task} {}", human::number(*value, 3)))
    });
    let own: Vec<String> = own.collect();
    let mean = eval.metrics.get(&format!("mean_{score}"))?;
    Some(format!("  {score} by task  {}  mean {}", own.join("  "), human::number(*mean, 3)))
}

impl Observer for Progress<'_> {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Step(step) => self.step(step),
            Event::Eval(eval) => self.evaluated(eval),
            Event::Warning { step, message } => self.say(&format!("warning: step {step}: {message}")),
            Event::Resume { step, exact } => {
                let bits = if *exact { "" } else { "; another machine or program, so the bits may differ" };
                self.say(&format!("resumed at step {step}{bits}"));
            }
            // On a terminal the line itself shows that the run goes on.
            Event::Checkpoint { step } if self.bar.is_none() && *step > 0 => {
                self.say(&format!("checkpoint at step {step}"))
            }
            Event::Checkpoint { .. } | Event::Data(_) | Event::End(_) => {}
        }
    }

    fn preparing(&mut self, method: &str, done: u64, total: Option<u64>) {
        if self.looking.as_ref().is_none_or(|(_, before)| before != method) {
            self.looking = Some((Instant::now(), method.to_owned()));
        }
        let Some((since, _)) = &self.looking else { return };
        let text = looked(method, done, total, since.elapsed());
        match &self.bar {
            Some(bar) => {
                bar.set_length(total.unwrap_or(0).max(done));
                bar.set_position(done);
                bar.set_message(format!("{}{text}", self.name));
            }
            None if self.last_line.elapsed() >= PLAIN_EVERY => {
                self.last_line = Instant::now();
                self.say(&text);
            }
            None => {}
        }
    }

    fn prepared(&mut self) {
        self.looking = None;
        if let Some(bar) = &self.bar {
            bar.set_length(self.total);
            bar.set_position(0);
            bar.set_message(String::new());
        }
    }

    fn evaluating(&mut self, done: usize, total: usize) {
        if let Some(bar) = &self.bar {
            bar.set_message(if done < total { format!("evaluating {done}/{total}") } else { String::new() });
        }
    }
}

/// What a method that looks at the data before the first step has behind it, and the time that is left.
fn looked(method: &str, done: u64, total: Option<u64>, since: Duration) -> String {
    match total {
        Some(total) => {
            let left = since.as_secs_f64() / done.max(1) as f64 * total.saturating_sub(done) as f64;
            format!("{method} looks at the data  batch {done}/{total}  {} left", human::duration(left))
        }
        None => format!("{method} looks at the data  batch {done}"),
    }
}

/// As many fields, from the left, as fit into `width`; at least one.
fn fitting(mut fields: Vec<String>, width: usize) -> String {
    while fields.len() > 1 && fields.iter().map(|f| f.chars().count() + 2).sum::<usize>() > width + 2 {
        fields.pop();
    }
    fields.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_looked_at_before_the_first_step_is_told() {
        let since = Duration::from_secs(30);
        assert_eq!(
            looked("SAM", 100, Some(500), since),
            format!("SAM looks at the data  batch 100/500  {} left", human::duration(120.0))
        );
        assert_eq!(looked("FISH mask", 7, None, since), "FISH mask looks at the data  batch 7");
    }

    #[test]
    fn fields_go_from_the_right() {
        let fields = || vec!["step 1/9".to_owned(), "loss 1.8".to_owned(), "lr 1e-3".to_owned()];
        assert_eq!(fitting(fields(), 80), "step 1/9  loss 1.8  lr 1e-3");
        assert_eq!(fitting(fields(), 27), "step 1/9  loss 1.8  lr 1e-3");
        assert_eq!(fitting(fields(), 26), "step 1/9  loss 1.8");
        assert_eq!(fitting(fields(), 1), "step 1/9");
    }
}
