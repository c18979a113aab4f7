//! `trained_share`: how large a method is made so that it trains this share of the model's numbers. In a union every table has its
//! own, so that a budget is dealt out to methods and to groups of layers.
//!
//! One setting is chosen, the first of [`SIZES`] that the method has, by counting what is trained with it; the size nearest to the
//! budget is taken. A reduction is that of a whole width k inside: width/(k + ½), whose quotient rounds down to k.

use engraft_method::{Entry, FieldKind, Settings, attach, settle};
use engraft_nn::{Model, Targets};
use engraft_recipe::{MethodTable, Problem, Recipe};
use serde_json::{Value, json};

/// The settings that say how much a method trains.
const SIZES: [&str; 8] =
    ["reduction", "size", "bottleneck", "rank", "tokens", "n_frequency", "hidden", "prompts"];

/// A size for a method, of a share of the model's numbers.
struct Search<'a> {
    entry: &'static Entry,
    settings: Settings,
    targets: Option<Targets>,
    model: &'a dyn Model,
    setting: &'static str,
    /// The largest that the setting may be.
    most: usize,
}

impl Search<'_> {
    fn value(&self, size: usize) -> Value {
        match self.setting {
            "reduction" if self.is_whole() => json!((self.model.info().width / size).max(1)),
            "reduction" => json!(self.model.info().width as f64 / (size as f64 + 0.5)),
            _ => json!(size),
        }
    }

    fn is_whole(&self) -> bool {
        let its = self.entry.info.fields.iter().find(|field| field.name == self.setting);
        its.is_some_and(|field| matches!(field.kind, FieldKind::Int { .. }))
    }

    /// How many numbers are trained at a size.
    fn count(&self, size: usize) -> Result<usize, String> {
        let mut settings = self.settings.clone();
        settings.insert(self.setting.into(), self.value(size));
        let made = (self.entry.from_settings)(&settings).map_err(|e| e.to_string());
        let mut method = made?;
        let targets = settle(method.as_mut(), self.targets.clone(), self.model.sites());
        let (sites, info) = (self.model.sites(), self.model.info());
        let attached = attach(&[(method, targets)], &[], sites, info, 0).map_err(|e| e.to_string())?;
        Ok(attached.adapter.trained_count())
    }

    /// The size whose count is nearest to `wanted`, and that count.
    fn nearest(&self, wanted: usize) -> Result<(usize, usize), String> {
        // The smallest sizes cannot always be had: those that are cut in parts have a least one.
        let doubled = |size: &usize| size.checked_mul(2).filter(|size| *size <= self.most);
        let mut sizes = std::iter::successors(Some(1), doubled);
        let Some(mut below) = sizes.find_map(|size| Some((size, self.count(size).ok()?))) else {
            return self.count(1).map(|count| (1, count));
        };
        let mut above = below;
        while above.1 < wanted && above.0 < self.most {
            below = above;
            let next = (2 * above.0).min(self.most);
            above = match self.count(next) {
                Ok(count) => (next, count),
                // Some sizes cannot be had (divisors, ranks of a matrix): the last that could is the largest.
                Err(_) => break,
            };
        }
        while above.0 > below.0 + 1 {
            let middle = below.0 + (above.0 - below.0) / 2;
            let Ok(count) = self.count(middle) else { break };
            if count < wanted {
                below = (middle, count);
            } else {
                above = (middle, count);
            }
        }
        Ok(if above.1.abs_diff(wanted) < below.1.abs_diff(wanted) { above } else { below })
    }
}

/// The settings of a table that has a share, with the size that follows; and what to tell of it.
pub(crate) fn sized(
    recipe: &Recipe,
    table: &MethodTable,
    (entry, settings, targets): (&'static Entry, &Settings, Option<&Targets>),
    model: &dyn Model,
) -> Result<Option<(Settings, String)>, Problem> {
    let Some(share) = table.trained_share else { return Ok(None) };
    let problem = |title: String| recipe.problem_at(&format!("{}.trained_share", table.at), title);
    let named = |name: &str| entry.info.fields.iter().find(|field| field.name == name);
    // A method with a budget of its own is as large as that says, whatever else it has.
    let has_own = named("budget").is_some();
    let field = SIZES.iter().find_map(|name| named(name)).filter(|_| !has_own);
    let Some(field) = field else {
        let title = format!("{} has no size that `trained_share` could set", entry.info.title);
        return Err(problem(title).help("leave it out; its settings say what is trained"));
    };
    let written = recipe.methods.iter().find(|own| own.at == table.at);
    if written.is_some_and(|own| own.settings.contains_key(field.name)) {
        return Err(problem(format!(
            "`trained_share` sets `{}`, which is given too; keep one of them",
            field.name
        )));
    }
    let most = match field.kind {
        FieldKind::Int { max, .. } if field.name != "reduction" => usize::try_from(max).unwrap_or(usize::MAX),
        _ => 4 * model.info().width,
    };
    let (settings, targets) = (settings.clone(), targets.cloned());
    let search = Search { entry, settings, targets, model, setting: field.name, most };
    let total = model.sites().parameters();
    let wanted = ((share * total as f64).round() as usize).max(1);
    let (size, count) = search.nearest(wanted).map_err(&problem)?;
    // Sizes are whole: about the share is what can be had, within a factor of two what was meant.
    if count > 2 * wanted || 2 * count < wanted {
        let title = format!(
            "{} trains {count} numbers of the model's {total} with the nearest `{}`, and `trained_share` asks for {wanted}",
            entry.info.title, field.name
        );
        return Err(problem(title).help(format!("a share of {:.1e} can be had", count as f64 / total as f64)));
    }
    let value = search.value(size);
    let note = format!(
        "`trained_share` {share} makes `{}` {value}: {} trains {count} numbers of the model's {total}",
        field.name, entry.info.title
    );
    let mut settings = search.settings;
    settings.insert(field.name.into(), value);
    Ok(Some((settings, note)))
}
