//! A prompt that starts from saved ones (SPoT): one, the mean of several, or those most like a first prompt of the task.
//!
//! The prompt of a task, trained for a while, stands for the task (`target_prompt`). Its similarity to a source is the cosine
//! of the two means over rows, or the mean of the cosines of all pairs of rows. The start is the best source, the mean of the
//! `top` best, or their mean weighted by similarity. Without a prompt to compare with it is the mean of all sources. What neurons
//! say of it needs the model: `neurons.rs`, `engraft compare`. Sources of models of another width pass `projector.rs`.
//!
//! Vu et al. 2022, arXiv:2110.07904, section 3; Su et al. 2022 (TPT), arXiv:2111.06719, sections 4 and 5.

use engraft_nn::{Error, Init, Result};
use engraft_tensor::Tensor;
use serde_json::Value;

use crate::read::Reader;
use crate::shared::fields::{choice, int};
use crate::{Field, FieldKind};

pub(super) const FROM: Field = Field {
    name: "from_prompts",
    kind: FieldKind::Prompts,
    default: None,
    doc: "Start from these saved prompts, repeated or cut to fit.",
};
pub(super) const TARGET: Field = Field {
    name: "target_prompt",
    kind: FieldKind::Prompts,
    default: None,
    doc: "A first prompt of the same task, one, that says which of from_prompts are like it.",
};
pub(super) const SELECT: Field = choice(
    "select",
    &["best", "average", "weighted"],
    "\"best\"",
    "With target_prompt: the most similar source, the mean of the most similar, or that mean weighted by similarity.",
);
pub(super) const SIMILARITY: Field = choice(
    "similarity",
    &["average", "pairs"],
    "\"average\"",
    "Cosine of the means over rows, or the mean of the cosines of all pairs of rows.",
);
pub(super) const TOP: Field =
    int("top", (1, 1 << 20), None, "How many sources are averaged, the most similar first; all if absent.");

#[derive(Clone)]
pub(crate) struct Transfer {
    sources: Vec<Saved>,
    target: Option<Saved>,
    select: Select,
    pairs: bool,
    top: Option<usize>,
    /// Width inside the layers that make the rows of it.
    pub projector: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Select {
    Best,
    Average,
    Weighted,
}

/// A saved prompt.
#[derive(Clone, Debug)]
struct Saved {
    path: String,
    rows: Vec<Vec<f32>>,
}

impl Transfer {
    /// What a recipe says of it; nothing where it names no sources.
    pub fn read(r: &mut Reader<'_>) -> Option<Transfer> {
        let sources = saved(r, "from_prompts");
        let targets = saved(r, "target_prompt").unwrap_or_default();
        let select = r.one_of(
            "select",
            &[("best", Select::Best), ("average", Select::Average), ("weighted", Select::Weighted)],
        );
        let pairs = r.one_of("similarity", &[("average", false), ("pairs", true)]);
        let compares = select != Select::Best || pairs;
        let given = r.value("top").is_some();
        let top = Some(r.count("top", 1, usize::MAX)).filter(|_| given);
        let projects = r.value("projector").is_some();
        let projector = Some(r.count("projector", 768, usize::MAX)).filter(|_| projects);
        if targets.len() > 1 {
            r.problem(format!("`target_prompt`: expected one prompt, found {}", targets.len()));
        }
        let Some(sources) = sources else {
            if !targets.is_empty() || given || compares {
                r.problem("`target_prompt`, `select`, `similarity` and `top` choose among `from_prompts`, which is absent");
            }
            if projects {
                r.problem("`projector` makes rows of saved ones: name them in `from_prompts`");
            }
            return None;
        };
        if sources.is_empty() {
            r.problem("`from_prompts`: expected at least one saved prompt");
        }
        if (given || compares) && targets.is_empty() {
            r.problem("`select`, `similarity` and `top` need `target_prompt`: nothing else says which sources are like the task");
        }
        if let Some(top) = top.filter(|top| *top > sources.len()) {
            r.problem(format!(
                "`top`: expected at most the {} of `from_prompts`, found {top}",
                sources.len()
            ));
        }
        Some(Transfer { sources, target: targets.into_iter().next(), select, pairs, top, projector })
    }

    /// `count` rows of `width`.
    pub fn of(&self, count: usize, width: usize) -> Result<Init> {
        for Saved { path, rows } in self.saved() {
            if let Some(row) = rows.iter().find(|row| row.len() != width) {
                return Err(Error::Unsupported(format!(
                    "{path} holds rows of {} numbers, and this model reads {width}; start from prompts of models of the same width, \
                     or write `projector = 768` to train layers that make rows of that width of them",
                    row.len()
                )));
            }
        }
        Ok(Init::Values(self.mixed(count, width)?))
    }

    /// `count` rows as wide as they were saved.
    pub fn source(&self, count: usize) -> Result<Tensor> {
        let width = |rows: &[Vec<f32>]| rows.first().map_or(0, Vec::len);
        let first = &self.sources[0];
        let wanted = width(&first.rows);
        for Saved { path, rows } in self.saved() {
            if let Some(row) = rows.iter().find(|row| row.len() != wanted) {
                return Err(Error::Unsupported(format!(
                    "{path} holds rows of {} numbers, and {} of {wanted}; what one projector reads is of one width",
                    row.len(),
                    first.path
                )));
            }
        }
        self.mixed(count, wanted)
    }

    fn saved(&self) -> impl Iterator<Item = &Saved> {
        self.sources.iter().chain(&self.target)
    }

    fn mixed(&self, count: usize, width: usize) -> Result<Tensor> {
        let mut sum = vec![0.0f64; count * width];
        for (source, weight) in self.weights()? {
            let rows = source.rows.iter().cycle().take(count).flatten();
            sum.iter_mut().zip(rows).for_each(|(sum, v)| *sum += weight * f64::from(*v));
        }
        Ok(Tensor::from_vec(sum.into_iter().map(|v| v as f32).collect(), [count, width])?)
    }

    /// The sources that count, with their shares.
    fn weights(&self) -> Result<Vec<(&Saved, f64)>> {
        let Some(target) = &self.target else {
            let count = self.sources.len() as f64;
            return Ok(self.sources.iter().map(|source| (source, 1.0 / count)).collect());
        };
        let alike = |source: &Saved| prompt_similarity(&source.rows, &target.rows, self.pairs);
        let mut ranked: Vec<(&Saved, f64)> = self.sources.iter().map(|s| (s, alike(s))).collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        ranked.truncate(if self.select == Select::Best { 1 } else { self.top.unwrap_or(usize::MAX) });
        let count = ranked.len() as f64;
        if self.select != Select::Weighted {
            return Ok(ranked.into_iter().map(|(source, _)| (source, 1.0 / count)).collect());
        }
        let total: f64 = ranked.iter().map(|(_, alike)| alike.max(0.0)).sum();
        if total <= 0.0 {
            let message = "none of `from_prompts` is like `target_prompt`: no cosine is above 0; choose `select = \"average\"` or other sources";
            return Err(Error::Unsupported(message.into()));
        }
        Ok(ranked.into_iter().map(|(source, alike)| (source, alike.max(0.0) / total)).collect())
    }
}

/// The prompts of a setting, as the caller read them.
fn saved(r: &mut Reader<'_>, key: &'static str) -> Option<Vec<Saved>> {
    let value = r.value(key)?.clone();
    let one = |v: &Value| -> Option<Saved> {
        let number = |v: &Value| v.as_f64().map(|v| v as f32);
        let row = |row: &Value| row.as_array()?.iter().map(number).collect::<Option<Vec<f32>>>();
        let rows = v.get("rows")?.as_array()?.iter().map(row).collect::<Option<Vec<_>>>()?;
        Some(Saved { path: v.get("path")?.as_str()?.to_owned(), rows }).filter(|s| !s.rows.is_empty())
    };
    let all = value.as_array().and_then(|list| list.iter().map(one).collect::<Option<Vec<_>>>());
    if all.is_none() {
        r.problem(format!("`{key}`: expected saved prompts, read by the caller"));
    }
    all
}

/// How alike two prompts [rows, width] are, −1 to 1: the cosine of their means, or the mean of the cosines of all `pairs` of rows.
pub fn prompt_similarity(a: &[Vec<f32>], b: &[Vec<f32>], pairs: bool) -> f64 {
    if !pairs {
        return cosine(&mean(a), &mean(b));
    }
    let wide = |rows: &[Vec<f32>]| -> Vec<Vec<f64>> {
        rows.iter().map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect()
    };
    let (a, b) = (wide(a), wide(b));
    let all = a.iter().flat_map(|x| b.iter().map(|y| cosine(x, y)));
    all.sum::<f64>() / (a.len() * b.len()) as f64
}

fn mean(rows: &[Vec<f32>]) -> Vec<f64> {
    let width = rows.first().map_or(0, Vec::len);
    (0..width).map(|c| rows.iter().map(|row| f64::from(row[c])).sum::<f64>() / rows.len() as f64).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use crate::testing::*;
    use serde_json::{Value, json};

    fn prompt(path: &str, rows: &[[f32; 2]]) -> Value {
        let wide: Vec<Vec<f32>> = rows.iter().map(|r| [&r[..], &[0.0; 4]].concat()).collect();
        json!({ "path": path, "rows": wide })
    }

    /// The first two columns of the rows that these settings start with.
    fn start(settings: Value) -> Vec<f32> {
        let a = attached(&[chosen("prompt", settings)], &[]);
        value_of(&a, "prompt_embeddings").narrow(1, 0, 2).unwrap().to_vec().unwrap()
    }

    #[test]
    fn one_source_is_reproduced_and_several_are_averaged() {
        let (a, b) = (prompt("a", &[[1.0, 2.0], [3.0, 4.0]]), prompt("b", &[[3.0, 0.0]]));
        assert_eq!(start(json!({ "tokens": 2, "from_prompts": [a] })), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(start(json!({ "tokens": 3, "from_prompts": [a] })), [1.0, 2.0, 3.0, 4.0, 1.0, 2.0]);
        assert_eq!(start(json!({ "tokens": 2, "from_prompts": [a, b] })), [2.0, 1.0, 3.0, 2.0]);
    }

    #[test]
    fn sources_like_the_task_are_chosen() {
        let (right, up) = (prompt("right", &[[2.0, 0.0]]), prompt("up", &[[0.0, 5.0]]));
        // Cosines 0.8 and 0.6 to the task.
        let task = prompt("task", &[[4.0, 3.0]]);
        let with = |more: Value| {
            let all = json!({ "tokens": 1, "from_prompts": [up, right], "target_prompt": [task] });
            start(crate::testing::with(all, more))
        };
        assert_eq!(with(json!({})), [2.0, 0.0]);
        assert_eq!(with(json!({ "select": "average" })), [1.0, 2.5]);
        assert_eq!(with(json!({ "select": "average", "top": 1 })), [2.0, 0.0]);
        let weighted = with(json!({ "select": "weighted" }));
        assert!((weighted[0] - 2.0 * 0.8 / 1.4).abs() < 1e-6 && (weighted[1] - 5.0 * 0.6 / 1.4).abs() < 1e-6);
        // Rows that cancel have no mean direction, and are like themselves by pairs as much as not.
        let rows = |r: &[[f32; 2]]| r.iter().map(|r| r.to_vec()).collect::<Vec<_>>();
        let one = rows(&[[1.0, 0.0]]);
        assert!((super::prompt_similarity(&one, &one, false) - 1.0).abs() < 1e-12);
        assert!((super::prompt_similarity(&one, &rows(&[[0.0, 1.0], [3.0, 0.0]]), true) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let read =
            |settings: Value| (crate::find("prompt").unwrap().from_settings)(settings.as_object().unwrap());
        let a = prompt("a", &[[1.0, 2.0]]);
        for bad in [
            json!({ "from_prompts": [] }),
            json!({ "from_prompts": ["a/path"] }),
            json!({ "from_prompts": [a], "top": 2 }),
            json!({ "from_prompts": [a], "init_ids": [1] }),
            json!({ "from_prompts": [a], "target_prompt": [a, a] }),
            json!({ "target_prompt": [a] }),
            json!({ "select": "weighted" }),
            json!({ "from_prompts": [a], "similarity": "pairs" }),
            json!({ "from_prompts": [a], "target_prompt": [a], "top": 2 }),
        ] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
        let (sites, info) = toy();
        let narrow = json!({ "from_prompts": [{ "path": "narrow", "rows": [[1.0, 2.0]] }] });
        let error =
            crate::attach(&[chosen("prompt", narrow)], &[], &sites, &info, 0).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("narrow holds rows of 2 numbers"), "{error}");
        let apart = json!({ "from_prompts": [a], "target_prompt": [prompt("b", &[[-1.0, -2.0]])], "select": "weighted" });
        assert!(crate::attach(&[chosen("prompt", apart)], &[], &sites, &info, 0).is_err());
    }
}
