//! The pictures of a run: its training plot, and the course of gradient norm, learning rate, speed and memory.

use crate::axis::Axis;
use crate::chart::{Chart, Series};
use crate::events::{Eval, Events};
use crate::human;
use crate::series::{half_window, smooth};
use crate::svg::{Anchor, Svg, fit};

const WIDTH: f64 = 900.0;
const HEADER: f64 = 64.0;
const PANEL_HEIGHT: f64 = 290.0;
const MARGIN: f64 = 18.0;
/// A metric beyond this number is still in the tables, only not in the picture.
const METRIC_PANELS_MAX: usize = 4;

const TRAIN: usize = 0;
const EVAL: usize = 1;

/// The training plot as an SVG file: the loss, raw and smoothed, with the evaluations and their best marked, and beside
/// it the evaluation metrics. This is the picture that a run directory holds and a README shows.
pub fn training_plot(events: &Events) -> String {
    training_card(events).file(&headline(events))
}

pub(crate) fn training_card(events: &Events) -> Svg {
    let panels: Vec<Chart> = std::iter::once(loss_chart(events)).chain(metric_charts(events)).collect();
    let rows = panels.len().div_ceil(2);
    let height = HEADER + rows as f64 * (PANEL_HEIGHT + MARGIN);
    let mut svg = Svg::new(WIDTH, height);
    svg.text("ink h1", (MARGIN, 31.0), Anchor::Start, &fit(&headline(events), 0.72 * WIDTH));
    svg.text("soft", (MARGIN, 50.0), Anchor::Start, &fit(&subtitle(events), WIDTH - 2.0 * MARGIN));
    let inner = WIDTH - 2.0 * MARGIN;
    // An odd number of panels gives the loss, which comes first, a row of its own.
    let odd = panels.len() % 2 == 1;
    for (index, panel) in panels.iter().enumerate() {
        let place = if odd && index > 0 { index + 1 } else { index };
        let top = HEADER + (place / 2) as f64 * (PANEL_HEIGHT + MARGIN);
        let (left, width) = if odd && index == 0 {
            (MARGIN, inner)
        } else {
            // The loss has more to show than a metric beside it.
            let first = if odd { 0.5 } else { 0.56 } * (inner - 24.0);
            if place % 2 == 0 { (MARGIN, first) } else { (MARGIN + first + 24.0, inner - first - 24.0) }
        };
        panel.draw(&mut svg, (left, top, width, PANEL_HEIGHT));
    }
    svg
}

/// What came of the run in one line: `eval loss 2.48 → 0.21, accuracy 0.083 → 0.94`.
pub(crate) fn headline(events: &Events) -> String {
    let mut parts = Vec::new();
    let losses: Vec<f64> = events.evals.iter().filter_map(|eval| eval.loss).collect();
    if let [first, .., last] = losses[..] {
        parts.push(change("eval loss", first, last));
    } else if let [first, .., last] = &events.steps[..] {
        parts.push(change("loss", first.loss, last.loss));
    }
    for name in events.metric_names().into_iter().take(2) {
        let values: Vec<f64> = metric_points(events, name).into_iter().map(|point| point.1).collect();
        match values[..] {
            [first, .., last] => parts.push(change(name, first, last)),
            [only] => parts.push(format!("{name} {}", human::number(only, 3))),
            [] => {}
        }
    }
    if parts.is_empty() { "No step was recorded".to_string() } else { parts.join(", ") }
}

fn change(name: &str, first: f64, last: f64) -> String {
    format!("{name} {} → {}", human::number(first, 3), human::number(last, 3))
}

fn subtitle(events: &Events) -> String {
    let mut parts = Vec::new();
    if let Some(last) = events.steps.last() {
        parts.push(format!("{} steps", last.step));
        if let Some(epoch) = last.epoch {
            parts.push(format!("{} epochs", human::number(epoch, 3)));
        }
    }
    parts.extend(events.seconds().map(human::duration));
    parts.extend(speed(events).map(|speed| format!("{} tokens/s", human::count(speed))));
    parts.extend(events.peak_memory_bytes().map(|bytes| format!("{} peak", human::bytes(bytes))));
    parts.join("  ·  ")
}

/// Tokens per second over all steps that say both.
pub(crate) fn speed(events: &Events) -> Option<f64> {
    let timed = events.steps.iter().filter_map(|step| Some((step.tokens?, step.seconds?)));
    let (tokens, seconds) =
        timed.fold((0.0, 0.0), |sum, (tokens, seconds)| (sum.0 + tokens as f64, sum.1 + seconds));
    (seconds > 0.0).then(|| tokens / seconds)
}

fn loss_chart(events: &Events) -> Chart {
    let raw: Vec<(f64, f64)> = events.steps.iter().map(|step| (step.step as f64, step.loss)).collect();
    let half = half_window(raw.len());
    let mut chart = Chart::new("Loss", step_axis(events), Axis::new("loss")).trim_outliers();
    if !raw.is_empty() && half > 0 {
        let values: Vec<f64> = raw.iter().map(|point| point.1).collect();
        let mean = raw.iter().zip(smooth(&values, half)).map(|(point, mean)| (point.0, mean)).collect();
        chart = chart
            .with(Series::raw("training", raw).color(TRAIN))
            .with(Series::line(&format!("mean over {} steps", 2 * half + 1), mean).color(TRAIN));
    } else if !raw.is_empty() {
        chart = chart.with(Series::line("training", raw).color(TRAIN));
    }
    let evals: Vec<(f64, f64)> =
        events.evals.iter().filter_map(|eval| Some((eval.step as f64, eval.loss?))).collect();
    chart = with_rules(chart, events);
    if evals.is_empty() {
        return chart;
    }
    let best = best(&evals, true);
    chart = chart.with(Series::dots("evaluation", evals).color(EVAL));
    match best {
        Some(best) => chart.mark(best, &format!("best {}", human::number(best.1, 3)), EVAL),
        None => chart,
    }
}

/// Metrics between 0 and 1 share a panel; every other one has its own.
fn metric_charts(events: &Events) -> Vec<Chart> {
    let all: Vec<(&str, Vec<(f64, f64)>)> =
        events.metric_names().into_iter().map(|name| (name, metric_points(events, name))).collect();
    let is_share = |points: &[(f64, f64)]| points.iter().all(|point| (0.0..=1.0).contains(&point.1));
    let (shares, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, points)| is_share(points));
    let mut charts = Vec::new();
    for group in shares.chunks(3) {
        let names: Vec<&str> = group.iter().map(|(name, _)| *name).collect();
        let axis = Axis::new(if names.len() == 1 { names[0] } else { "share" }).limits(0.0, 1.0);
        charts.push(metric_chart(events, &names.join(", "), axis, group));
    }
    for metric in others {
        charts.push(metric_chart(events, metric.0, Axis::new(metric.0), std::slice::from_ref(&metric)));
    }
    charts.truncate(METRIC_PANELS_MAX);
    charts
}

fn metric_chart(events: &Events, names: &str, axis: Axis, metrics: &[(&str, Vec<(f64, f64)>)]) -> Chart {
    let title = format!("Evaluation: {names}");
    let mut chart = with_rules(Chart::new(&title, step_axis(events), axis), events);
    for (index, (name, points)) in metrics.iter().enumerate() {
        let color = EVAL + 1 + index;
        chart = chart.with(Series::dots(name, points.clone()).color(color));
        if let Some(best) = best(points, lower_is_better(name)) {
            chart = chart.mark(best, &format!("best {}", human::number(best.1, 3)), color);
        }
    }
    chart
}

/// Resumed runs show where they went on.
fn with_rules(chart: Chart, events: &Events) -> Chart {
    let mut resumes = events.resumes.clone();
    resumes.sort_unstable();
    resumes.dedup();
    // More than a few would hide the data.
    if resumes.len() > 6 {
        return chart;
    }
    resumes.into_iter().fold(chart, |chart, step| chart.rule(step as f64, "resumed"))
}

/// All panels of a run share their x-axis, from before the first step to the last.
fn step_axis(events: &Events) -> Axis {
    let steps = events.steps.iter().map(|step| step.step);
    let last = steps.chain(events.evals.iter().map(|eval| eval.step)).max().unwrap_or(0);
    let first = events.steps.first().map_or(0, |step| step.step);
    // A run whose first part is not recorded does not start at an empty stretch.
    let from = if first > last / 4 { first.saturating_sub(1) } else { 0 };
    let from = events.evals.first().map_or(from, |eval| from.min(eval.step));
    Axis::new("step").limits(from as f64, last.max(from + 1) as f64)
}

pub(crate) fn metric_points(events: &Events, name: &str) -> Vec<(f64, f64)> {
    let value = |eval: &Eval| Some((eval.step as f64, *eval.metrics.get(name)?));
    events.evals.iter().filter_map(value).collect()
}

/// The best finite value, the earliest of equals; none where there is nothing to choose from.
pub(crate) fn best(points: &[(f64, f64)], lower: bool) -> Option<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    if finite.len() < 2 {
        return None;
    }
    finite.into_iter().reduce(|best, point| {
        let better = if lower { point.1 < best.1 } else { point.1 > best.1 };
        if better { point } else { best }
    })
}

/// Whether a smaller value of this metric is the better one.
pub(crate) fn lower_is_better(name: &str) -> bool {
    const LOWER: [&str; 10] =
        ["loss", "perplexity", "ppl", "error", "wer", "cer", "mae", "mse", "rmse", "bits"];
    name.to_lowercase().split(|c: char| !c.is_alphanumeric()).any(|word| LOWER.contains(&word))
}

/// Gradient norm, learning rate, speed and memory, one below the other on one x-axis; `None` if none was recorded.
pub(crate) fn course_card(events: &Events) -> Option<Svg> {
    const HEIGHT: f64 = 180.0;
    let charts = course_charts(events);
    if charts.is_empty() {
        return None;
    }
    let mut svg = Svg::new(WIDTH, MARGIN + charts.len() as f64 * (HEIGHT + MARGIN));
    for (index, chart) in charts.iter().enumerate() {
        let top = MARGIN + index as f64 * (HEIGHT + MARGIN);
        chart.draw(&mut svg, (MARGIN, top, WIDTH - 2.0 * MARGIN, HEIGHT));
    }
    Some(svg)
}

fn course_charts(events: &Events) -> Vec<Chart> {
    let points = |value: &dyn Fn(&crate::events::Step) -> Option<f64>| -> Vec<(f64, f64)> {
        events.steps.iter().filter_map(|step| Some((step.step as f64, value(step)?))).collect()
    };
    let mut charts = Vec::new();
    let mut add = |title: &str, y: Axis, points: Vec<(f64, f64)>, faint: bool, color: usize| {
        if points.is_empty() {
            return;
        }
        let chart = Chart::new(title, step_axis(events), y).gutter(76.0);
        let half = half_window(points.len());
        charts.push(if faint && half > 0 {
            let values: Vec<f64> = points.iter().map(|point| point.1).collect();
            let mean =
                points.iter().zip(smooth(&values, half)).map(|(point, mean)| (point.0, mean)).collect();
            let label = format!("mean over {} steps", 2 * half + 1);
            chart
                .trim_outliers()
                .with(Series::raw("each step", points).color(color))
                .with(Series::line(&label, mean).color(color))
        } else {
            chart.with(Series::line("", points).color(color))
        });
    };
    add("Gradient norm before clipping", Axis::new("norm"), points(&|step| step.grad_norm), true, 3);
    add("Learning rate", Axis::new("rate"), points(&|step| step.learning_rate), false, 1);
    let speed = points(&|step| Some(step.tokens? as f64 / step.seconds.filter(|seconds| *seconds > 0.0)?));
    add("Speed", Axis::new("tokens/s"), speed, true, 2);
    let memory = points(&|step| Some(step.memory_bytes? as f64 / (1u64 << 30) as f64));
    add("Peak memory", Axis::new("memory").unit("GiB"), memory, false, 4);
    charts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Step;

    fn run(steps: u64) -> Events {
        let loss = |step: u64| {
            2.5 * (-(step as f64) * 4.0 / steps as f64).exp() + 0.1 * ((step * 7919) % 101) as f64 / 101.0
        };
        let step =
            |step| Step { step, loss: loss(step), seconds: Some(0.1), tokens: Some(64), ..Step::default() };
        let eval = |step: u64, accuracy: f64| Eval {
            step,
            loss: Some(2.6 - accuracy),
            metrics: [("accuracy".to_string(), accuracy)].into(),
        };
        Events {
            steps: (1..=steps).map(step).collect(),
            evals: vec![eval(0, 0.1), eval(steps / 2, 0.9), eval(steps, 0.8)],
            ..Events::default()
        }
    }

    #[test]
    fn the_best_evaluation_is_marked_in_the_direction_of_its_metric() {
        let text = training_plot(&run(200));
        roxmltree::Document::parse(&text).unwrap();
        assert!(text.contains("best 0.9<") && text.contains("best 1.7<"), "{text}");
        assert!(text.contains("accuracy 0.1 → 0.8") && text.contains("200 steps"));
        assert!(
            lower_is_better("eval_perplexity")
                && lower_is_better("WER")
                && !lower_is_better("answer accuracy")
        );
    }

    #[test]
    fn empty_short_and_failed_runs_are_drawn() {
        let failed = |events: &mut Events| events.steps.iter_mut().for_each(|step| step.loss = f64::NAN);
        let mut all_nan = run(50);
        failed(&mut all_nan);
        let mut one = run(1);
        one.evals.clear();
        for events in [Events::default(), run(1), one, all_nan.clone()] {
            let text = training_plot(&events);
            roxmltree::Document::parse(&text).unwrap();
        }
        assert!(training_plot(&all_nan).contains("not finite (50)"));
        assert!(training_plot(&Events::default()).contains("No step was recorded"));
        assert!(course_card(&Events::default()).is_none());
    }

    #[test]
    fn a_long_run_is_a_small_picture() {
        let text = training_plot(&run(100_000));
        assert!(text.len() < 200_000, "{} bytes", text.len());
    }

    #[test]
    fn speed_counts_only_steps_that_say_both() {
        let mut events = run(10);
        events.steps[0].tokens = None;
        assert!((speed(&events).unwrap() - 640.0).abs() < 1e-9);
        assert!(speed(&Events::default()).is_none());
    }
}
