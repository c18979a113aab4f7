//! XPrompt: a prompt that loses the rows and the parts of rows that matter least, and is trained again from where it was.
//!
//! The first `prompt_share` of the steps is prompt tuning. Then, the prompt held as it is, I_i = Σ|⟨∂L/∂p_i, p_i⟩| of each row
//! (which is |∂L/∂γ_i| of a factor γ_i = 1 on it) is summed over `score_steps` batches, and the lowest rows leave the
//! sequence. The same is done with `pieces` parts of each row that is left, which become zero. The rest is trained from the
//! values before with the optimizer's memory lost.
//!
//! Ma et al. 2022, arXiv:2210.04457, section 3 and equations 4 to 6.
//!
//! P [tokens, width] and in checkpoints `kept` `[tokens]`, `pieces` [tokens, pieces], `scores` [tokens, pieces]. What is saved is
//! prompt tuning of the rows that are left, in `peft`'s form, of one half in an encoder–decoder model. A file of the type
//! `ENGRAFT_XPROMPT` holds the settings and P to begin with.

use engraft_nn::{Adapter, Builder, Error, Init, Kind, Pass, Patch, PromptPatch, Result};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Gradients, Param, Tensor};
use serde_json::{Map, Value};

use super::prompt::{
    INIT, INIT_BELOW, INIT_IDS, INIT_TEXT, Prompt, Start, TOKENS_MAX, kept_start, prompt_file_name,
    read_start,
};
use crate::read::Reader;
use crate::shared::fields::{float, int};
use crate::shared::network::named;
use crate::{Ahead, Described, Entry, Forget, Info, Loaded, Method, Named, Step, peft};

const PIECES_MAX: usize = 1 << 12;
const STEPS_MAX: usize = 1 << 20;

struct XPrompt {
    tokens: usize,
    pieces: usize,
    /// Shares of rows, and of the parts of those that are left, that go.
    prune_tokens: f64,
    prune_pieces: f64,
    prompt_share: f64,
    score_steps: u64,
    start: Start,
}

static INFO: Info = Info {
    name: "xprompt",
    title: "XPrompt",
    class: "prompt",
    sites: "prompt",
    paper: "arXiv:2210.04457",
    summary: "prompt tuning; then the rows, and parts of rows, of least importance go and the rest is trained again",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_XPROMPT",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("20"), "Number of rows at first."),
        int("pieces", (1, PIECES_MAX as i64), Some("16"), "Parts of a row that stay or go."),
        float("prune_tokens", (0.0, 0.999), "0.5", "Share of the rows that go."),
        float("prune_pieces", (0.0, 0.999), "0.5", "Share of the parts of the rows that are left that go."),
        float("prompt_share", (0.0, 1.0), "0.5", "Share of the steps before anything goes."),
        int(
            "score_steps",
            (1, STEPS_MAX as i64),
            Some("8"),
            "Batches over which the importance is summed, twice.",
        ),
        INIT,
        INIT_TEXT,
        INIT_IDS,
        INIT_BELOW,
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, tokens: &'static str, start: fn(&mut Reader<'_>) -> Start) -> XPrompt {
    XPrompt {
        tokens: r.count(tokens, 20, TOKENS_MAX),
        pieces: r.count("pieces", 16, PIECES_MAX),
        prune_tokens: pruned(r, "prune_tokens"),
        prune_pieces: pruned(r, "prune_pieces"),
        prompt_share: r.share("prompt_share", 0.5),
        score_steps: r.count("score_steps", 8, STEPS_MAX) as u64,
        start: start(r),
    }
}

/// A share below one.
fn pruned(r: &mut Reader<'_>, key: &'static str) -> f64 {
    let share = r.float(key, 0.5);
    if !(0.0..1.0).contains(&share) {
        r.problem(format!("`{key}`: expected a number of at least 0 and less than 1, found {share}"));
    }
    share
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, "tokens", read_start))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::file_without_targets(INFO.peft_type, config, |r| read(r, "num_virtual_tokens", kept_start))
}

fn example() -> Box<dyn Method> {
    Box::new(XPrompt {
        tokens: 4,
        pieces: 3,
        prune_tokens: 0.5,
        prune_pieces: 0.5,
        prompt_share: 0.5,
        score_steps: 1,
        start: Start::Noise,
    })
}

/// What a step is for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Train,
    /// Importance of rows; whether this is its last step.
    Rows(bool),
    /// Importance of parts.
    Pieces(bool),
}

const KEPT: &str = "kept";
const PIECES: &str = "pieces";
const SCORES: &str = "scores";
const ROWS: &str = "prompt_embeddings";

impl Method for XPrompt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("tokens·d; of which pruning leaves a part")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let found = b.sites().of_kind(|k| matches!(k, Kind::Prompt { .. })).next();
        let Some((site, Kind::Prompt { width })) = found.map(|s| (s, s.kind.clone())) else {
            return Err(Error::Unsupported("XPrompt needs a model with an embedded input".into()));
        };
        if self.pieces > width {
            return Err(Error::Unsupported(format!(
                "`pieces`: expected at most {width}, the width of a row; found {}",
                self.pieces
            )));
        }
        let start = self.start.of(b, self.tokens, self.tokens)?;
        let rows = b.param(ROWS, &[self.tokens, width], start)?;
        let all = Tensor::from_i64(vec![1; self.tokens], [self.tokens])?;
        let kept = b.state(KEPT, &[self.tokens], Init::Values(all))?;
        let pieces = b.state(PIECES, &[self.tokens, self.pieces], Init::Ones)?;
        b.state(SCORES, &[self.tokens, self.pieces], Init::Zeros)?;
        b.patch(site.id, Patch::Prompt(Box::new(Rows { rows, kept, pieces })))
    }

    fn rests(&self) -> bool {
        true
    }

    /// While importance is found, the prompt rests.
    fn after_backward(&self, adapter: &Adapter, gradients: &mut Gradients, step: Step) -> Result<()> {
        let phase = self.phase(step);
        let (rows, scores) = (own(adapter, ROWS)?, own(adapter, SCORES)?);
        let (Some(gradient), true) = (gradients.get(&rows), phase != Phase::Train) else { return Ok(()) };
        let mut products = summed(&gradient.mul(&rows.value())?, self.pieces)?;
        if matches!(phase, Phase::Rows(_)) {
            // One number a row, in the place of its first part.
            let whole = products.sum_dim(1)?;
            let first = Tensor::from_vec(
                (0..self.pieces).map(|piece| if piece == 0 { 1.0 } else { 0.0 }).collect(),
                [1, self.pieces],
            )?;
            products = whole.mul(&first)?;
        }
        scores.set(scores.value().add(&products.unary(Unary::Abs)?)?)?;
        gradients.remove(&rows);
        Ok(())
    }

    fn suits(&self, run: &Ahead) -> Result<()> {
        let [_, _, last] = self.stages(run.steps);
        if last >= run.steps && self.prune_tokens + self.prune_pieces > 0.0 {
            let message = format!(
                "`prompt_share`, `score_steps`: what is left after pruning would be trained from step {} on, and the run has {}; choose \
                 fewer `score_steps` or a smaller `prompt_share`",
                last + 1,
                run.steps
            );
            return Err(Error::Mismatch(vec![message]));
        }
        Ok(())
    }

    fn after_step(&self, adapter: &Adapter, moments: &mut dyn Forget, step: Step) -> Result<()> {
        let phase = self.phase(step);
        if !matches!(phase, Phase::Rows(true) | Phase::Pieces(true)) {
            return Ok(());
        }
        let scores = own(adapter, SCORES)?;
        let found = scores.value().to_vec()?;
        let kept = own(adapter, KEPT)?;
        let there: Vec<usize> = (0..self.tokens).filter(|row| flags(&kept)[*row]).collect();
        match phase {
            Phase::Rows(_) => {
                let of = there.iter().map(|row| (found[row * self.pieces], *row)).collect();
                let left = highest(of, self.prune_tokens);
                let flags = (0..self.tokens).map(|row| i64::from(left.contains(&row))).collect();
                kept.set(Tensor::from_i64(flags, [self.tokens])?)?;
            }
            _ => {
                let cells = there.iter().flat_map(|row| row * self.pieces..(row + 1) * self.pieces);
                let left = highest(cells.map(|cell| (found[cell], cell)).collect(), self.prune_pieces);
                let mut mask = vec![0.0; found.len()];
                left.into_iter().for_each(|cell| mask[cell] = 1.0);
                own(adapter, PIECES)?.set(Tensor::from_vec(mask, [self.tokens, self.pieces])?)?;
                moments.forget(&own(adapter, ROWS)?);
            }
        }
        Ok(scores.set(Tensor::zeros([self.tokens, self.pieces]))?)
    }

    /// What is left is a prompt of its own.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        let (rows, kept, pieces) = (own(adapter, ROWS)?, own(adapter, KEPT)?, own(adapter, PIECES)?);
        rows.replace(left(&rows.value(), &kept.value(), &pieces.value())?);
        kept.replace(Tensor::from_i64(vec![], [0])?);
        Ok(())
    }

    fn file_type(&self, _adapter: &Adapter) -> &'static str {
        "PROMPT_TUNING"
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let there = |name: &str| own(model.adapter, &format!("{}{name}", model.prefix)).ok();
        let tokens = match (there(KEPT), there(ROWS)) {
            (Some(kept), _) if !kept.value().is_empty() => flags(&kept).iter().filter(|f| **f).count(),
            (_, Some(rows)) => rows.value().dim(0),
            _ => self.tokens,
        };
        Prompt { tokens, submodules: Some(1), start: self.start.clone(), context: false }.config(model)
    }

    fn file_name(&self, name: &str) -> String {
        prompt_file_name(name)
    }

    fn file_tensors(&self, tensors: Named, state: &Named) -> Result<Named> {
        let state = named(state);
        let saved = |(name, value): (String, Tensor)| {
            let value = if name == ROWS { left(&value, &state(KEPT)?, &state(PIECES)?)? } else { value };
            Ok((name, value))
        };
        tensors.into_iter().map(saved).collect()
    }
}

impl XPrompt {
    /// The last steps before anything is scored, of scoring rows, and of scoring their parts.
    fn stages(&self, total: u64) -> [u64; 3] {
        let before = ((self.prompt_share * total as f64).floor() as u64).max(1);
        [before, before + self.score_steps, before + 2 * self.score_steps]
    }

    fn phase(&self, step: Step) -> Phase {
        let [before, rows, pieces] = self.stages(step.total);
        match step.number {
            n if n <= before || n > pieces => Phase::Train,
            n if n <= rows => Phase::Rows(n == rows),
            n => Phase::Pieces(n == pieces),
        }
    }
}

/// The parameter of the prompt that is called so, where the method's own name may follow others.
fn own(adapter: &Adapter, name: &str) -> Result<Param> {
    let found = adapter.params().iter().find(|p| p.name == name || p.name.ends_with(&format!(".{name}")));
    found
        .map(|p| p.param.clone())
        .ok_or_else(|| Error::Unsupported(format!("the adapter has no tensor `{name}`")))
}

/// Which rows are left; these numbers came from the host.
fn flags(kept: &Param) -> Vec<bool> {
    kept.value().to_i64().unwrap_or_default().iter().map(|flag| *flag != 0).collect()
}

/// What is left when this share of the lowest scores goes: one at least.
fn highest(mut scores: Vec<(f32, usize)>, pruned: f64) -> Vec<usize> {
    // A share that means a whole number means that number.
    let gone = (scores.len() as f64 * pruned + 1e-9).floor() as usize;
    let count = scores.len().saturating_sub(gone).max(1);
    scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    scores.into_iter().take(count).map(|(_, place)| place).collect()
}

/// The part of a row that each of its columns belongs to.
fn pieces_of(width: usize, pieces: usize) -> Result<Tensor> {
    Ok(Tensor::from_i64((0..width).map(|column| (column * pieces / width) as i64).collect(), [width])?)
}

/// x [rows, width] → sums over the parts of each row [rows, pieces].
fn summed(x: &Tensor, pieces: usize) -> Result<Tensor> {
    Ok(x.t()?.scatter_add(&pieces_of(x.width(), pieces)?, pieces)?.t()?)
}

/// P without the rows and the parts that have gone.
fn left(rows: &Tensor, kept: &Tensor, pieces: &Tensor) -> Result<Tensor> {
    if kept.is_empty() {
        return Ok(rows.clone());
    }
    let mask = pieces.t()?.gather(&pieces_of(rows.width(), pieces.width())?)?.t()?;
    let flags = kept.to_i64()?;
    let index: Vec<i64> = (0..flags.len()).filter(|row| flags[*row] != 0).map(|row| row as i64).collect();
    let masked = rows.mul(&mask)?;
    if index.len() == flags.len() {
        return Ok(masked);
    }
    Ok(masked.gather(&Tensor::from_i64(index.clone(), [index.len()])?)?)
}

struct Rows {
    rows: Param,
    kept: Param,
    pieces: Param,
}

impl PromptPatch for Rows {
    fn count(&self) -> usize {
        match self.kept.value().is_empty() {
            true => self.rows.value().dim(0),
            false => flags(&self.kept).iter().filter(|flag| **flag).count(),
        }
    }

    fn rows(&self, _embedded: &Tensor, _cx: &Pass) -> Result<Tensor> {
        left(&self.rows.get(), &self.kept.value(), &self.pieces.value())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    /// How often something was forgotten.
    #[derive(Default)]
    struct Forgotten(std::cell::Cell<usize>);

    impl Forget for &Forgotten {
        fn forget(&mut self, _param: &Param) {
            self.0.set(self.0.get() + 1);
        }
    }

    /// A loss whose gradient is known: the sum of what is left times fixed numbers.
    fn backward(a: &crate::Attached, seed: u64) -> Gradients {
        let (sites, _) = toy();
        let [Patch::Prompt(p)] = a.adapter.at(site_id(&sites, "tok.prompt")) else { panic!("no prompt") };
        let cx = Pass::new(engraft_nn::Layout::counted(&[1]).unwrap(), None);
        let rows = p.rows(&Tensor::zeros([1, 6]), &cx).unwrap();
        rows.mul(&sample(rows.shape(), seed)).unwrap().sum().unwrap().backward().unwrap()
    }

    #[test]
    fn a_run_that_ends_before_what_is_left_is_trained_is_refused() {
        let run = |settings: Value, steps| {
            let method = from_settings(settings.as_object().unwrap()).unwrap();
            method.suits(&Ahead { steps, task: toy().1.task, tasks: None }).map_err(|e| e.to_string())
        };
        // Half of 40 steps, then twice 8.
        assert!(run(json!({}), 40).is_ok());
        assert!(run(json!({}), 32).unwrap_err().contains("from step 33 on, and the run has 32"));
        assert!(run(json!({ "score_steps": 2, "prompt_share": 0.2 }), 10).is_ok());
        assert!(run(json!({ "prune_tokens": 0.0, "prune_pieces": 0.0 }), 2).is_ok());
    }

    #[test]
    fn trained_numbers() {
        assert_eq!(trained("xprompt", json!({ "tokens": 4, "pieces": 3 })), 4 * 6);
    }

    #[test]
    fn rows_then_parts_of_least_importance_go() {
        let settings = json!({
            "tokens": 4, "pieces": 3, "prune_tokens": 0.25, "prune_pieces": 0.34, "prompt_share": 0.25,
            "score_steps": 1, "init": "random",
        });
        let methods = [chosen("xprompt", settings)];
        let a = attached(&methods, &[]);
        let method = &methods[0].0;
        let start = value_of(&a, ROWS);
        let products = |seed: u64, shape: &[usize]| sample(shape, seed).to_vec().unwrap();
        let forgotten = Forgotten::default();
        let at = |number| Step { number, total: 8, seed: 0 };
        let run = |number: u64| -> bool {
            let mut gradients = backward(&a, number);
            method.after_backward(&a.adapter, &mut gradients, at(number)).unwrap();
            method.after_step(&a.adapter, &mut &forgotten, at(number)).unwrap();
            gradients.get(&param(&a.adapter, ROWS)).is_some()
        };
        assert_eq!([run(1), run(2)], [true, true], "prompt tuning first");
        assert!(!run(3), "a prompt that is scored rests");
        // I_i is how the loss changes with a factor on row i.
        let (p, w) = (start.to_vec().unwrap(), products(3, &[4, 6]));
        let importance = |row: usize| (0..6).map(|c| p[row * 6 + c] * w[row * 6 + c]).sum::<f32>().abs();
        let lowest = (0..4).min_by(|a, b| importance(*a).total_cmp(&importance(*b))).unwrap();
        let expected: Vec<i64> = (0..4).map(|row| i64::from(row != lowest)).collect();
        assert_eq!(value_of(&a, KEPT).to_i64().unwrap(), expected);
        assert!(!run(4));
        let mask = value_of(&a, PIECES).to_vec().unwrap();
        assert_eq!(mask.iter().filter(|v| **v == 1.0).count(), 6, "a third of nine");
        assert!(mask[3 * lowest..3 * lowest + 3].iter().all(|v| *v == 0.0));
        assert_eq!(forgotten.0.get(), 1);
        assert!(run(5), "and is trained again");
        close(&value_of(&a, ROWS), &start, 0.0);

        let before = left(&start, &value_of(&a, KEPT), &value_of(&a, PIECES)).unwrap();
        assert_eq!(before.shape(), [3, 6]);
        method.finish(&a.adapter).unwrap();
        close(&value_of(&a, ROWS), &before, 0.0);
        let (sites, info) = toy();
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(
            (&config["peft_type"], &config["num_virtual_tokens"]),
            (&json!("PROMPT_TUNING"), &json!(3))
        );
        crate::load_adapter(&config, tensors, &sites, &info).unwrap();
    }

    #[test]
    fn what_has_gone_stays_away() {
        let a = attached(&[chosen("xprompt", json!({ "tokens": 2, "pieces": 2, "init": "random" }))], &[]);
        let mask = Tensor::from_vec(vec![1.0, 0.0, 1.0, 1.0], [2, 2]).unwrap();
        param(&a.adapter, PIECES).set(mask).unwrap();
        let gradient = backward(&a, 3).get(&param(&a.adapter, ROWS)).unwrap().to_vec().unwrap();
        assert!(gradient[3..6].iter().all(|g| *g == 0.0) && gradient[..3].iter().all(|g| *g != 0.0));
        stir(&a, 0.7);
        let rows = left(&value_of(&a, ROWS), &value_of(&a, KEPT), &value_of(&a, PIECES)).unwrap();
        assert!(rows.to_vec().unwrap()[3..6].iter().all(|v| *v == 0.0));
    }

    #[test]
    fn configurations() {
        for bad in [json!({ "tokens": 0 }), json!({ "prune_tokens": 1.0 }), json!({ "prompt_share": 0 })] {
            assert!(from_settings(bad.as_object().unwrap()).is_err(), "{bad}");
        }
        let (sites, info) = toy();
        let many = [chosen("xprompt", json!({ "pieces": 7 }))];
        assert!(crate::attach(&many, &[], &sites, &info, 0).is_err());
    }
}
