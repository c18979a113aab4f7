//! Multitask prompt tuning: one prompt for all tasks, multiplied for each by a matrix of low rank.
//!
//! H₀ = [P ⊙ (U_t·V_t); E] for a sequence of task t, tokens counted from the first row. Data names the tasks (`task_ids`);
//! with one task all rows are of it.
//!
//! Wang et al. 2023, arXiv:2303.02861, equation 1; start and defaults are `peft`'s.
//!
//! P [tokens, width], U [tasks, tokens, rank] and V [tasks, rank, width], saved as `prompt_embeddings`, `prefix_task_cols` and
//! `prefix_task_rows`. P starts as in prompt tuning, U and V N(0, 0.02). In an encoder–decoder model there are twice the rows: the
//! second half stands before the decoder's input.

use engraft_nn::{Builder, Error, Init, Kind, Pass, Patch, PromptPatch, Result, Site};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::{
    Start, TOKENS_MAX, prompt_file_name, read_origin, read_prompt_keys, read_start, submodules,
};
use crate::shared::fields::int;
use crate::shared::tasks::enough;
use crate::{Ahead, Described, Entry, Info, Loaded, Method, peft};

const TASKS_MAX: usize = 1 << 20;
const RANK_MAX: usize = 1 << 16;
/// Where rows may come from, in `peft`.
const ORIGINS: &[&str] =
    &["RANDOM", "TEXT", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"];

struct Mpt {
    tokens: usize,
    submodules: Option<usize>,
    tasks: usize,
    rank: usize,
    start: Start,
    /// What a file says about an adapter that its rows came from.
    source: (Value, Value),
}

static INFO: Info = Info {
    name: "mpt",
    title: "Multitask prompt tuning",
    class: "prompt",
    sites: "prompt",
    paper: "arXiv:2303.02861",
    summary: "rows before the embedded input that all tasks share, times a matrix of low rank for each task",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "MULTITASK_PROMPT_TUNING",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("20"), "Number of rows."),
        int(
            "tasks",
            (1, TASKS_MAX as i64),
            Some("1"),
            "Number of tasks; `task_ids` of the data name one for each row.",
        ),
        int("rank", (1, RANK_MAX as i64), Some("1"), "Rank of a task's matrix."),
        super::prompt::INIT,
        super::prompt::INIT_TEXT,
        super::prompt::INIT_IDS,
        super::prompt::INIT_BELOW,
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| Mpt {
        tokens: r.count("tokens", 20, TOKENS_MAX),
        submodules: None,
        tasks: r.count("tasks", 1, TASKS_MAX),
        rank: r.count("rank", 1, RANK_MAX),
        start: read_start(r),
        source: (Value::Null, json!(0)),
    })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::file_without_targets(INFO.peft_type, config, |r| {
        let (tokens, submodules) = read_prompt_keys(r);
        let start = Start::Kept(read_origin(r, ORIGINS));
        let mut kept = |key| r.value(key).cloned().unwrap_or(Value::Null);
        let source = (kept("prompt_tuning_init_state_dict_path"), kept("prompt_tuning_init_task"));
        let (tasks, rank) = (r.count("num_tasks", 1, TASKS_MAX), r.count("num_ranks", 1, RANK_MAX));
        Mpt { tokens, submodules, tasks, rank, start, source }
    })
}

fn example() -> Box<dyn Method> {
    Box::new(Mpt {
        tokens: 3,
        submodules: None,
        tasks: 1,
        rank: 2,
        start: Start::Noise,
        source: (Value::Null, json!(0)),
    })
}

impl Method for Mpt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("tokens·d + tasks·rank·(tokens + d)")
    }

    fn tasks(&self) -> Option<usize> {
        Some(self.tasks)
    }

    fn suits(&self, run: &Ahead) -> Result<()> {
        enough(self.tasks, run)?;
        match run.tasks {
            None if self.tasks > 1 => Err(Error::Unsupported(nameless(self.tasks))),
            _ => Ok(()),
        }
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let places: Vec<&Site> = b.sites().of_kind(|k| matches!(k, Kind::Prompt { .. })).collect();
        let Some(Kind::Prompt { width }) = places.first().map(|s| s.kind.clone()) else {
            return Err(Error::Unsupported(
                "multitask prompt tuning needs a model with an embedded input".into(),
            ));
        };
        let halves = self.submodules.unwrap_or_else(|| submodules(b.sites()));
        let count = self.tokens * halves;
        let start = self.start.of(b, self.tokens, count)?;
        let shared = b.param("prompt_embeddings", &[count, width], start)?;
        let columns = b.param("prefix_task_cols", &[self.tasks, count, self.rank], Init::Normal(0.02))?;
        let rows = b.param("prefix_task_rows", &[self.tasks, self.rank, width], Init::Normal(0.02))?;
        for (half, place) in places.into_iter().take(halves).enumerate() {
            let (shared, columns, rows) = (shared.clone(), columns.clone(), rows.clone());
            let first = half * self.tokens;
            let rows = Rows { shared, columns, rows, first, count: self.tokens, tasks: self.tasks };
            b.patch(place.id, Patch::Prompt(Box::new(rows)))?;
        }
        Ok(())
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let (path, task) = &self.source;
        let own = json!({
            "num_attention_heads": model.info.heads, "num_layers": model.info.layers, "num_ranks": self.rank,
            "num_tasks": self.tasks,
            "num_transformer_submodules": self.submodules.unwrap_or_else(|| submodules(model.sites)),
            "num_virtual_tokens": self.tokens, "prompt_tuning_init_state_dict_path": path,
            "prompt_tuning_init_task": task, "token_dim": model.info.width,
        });
        let mut map = own.as_object().cloned().unwrap_or_default();
        map.extend(self.start.origin(model.base_model));
        // Its configuration in `peft` has no word for drawn tokens.
        if map.get("prompt_tuning_init").is_some_and(|v| v == "SAMPLE_VOCAB") {
            map.insert("prompt_tuning_init".into(), json!("RANDOM"));
        }
        map
    }

    fn file_name(&self, name: &str) -> String {
        match name {
            "prefix_task_cols" | "prefix_task_rows" => name.into(),
            _ => prompt_file_name(name),
        }
    }
}

/// The rows before one half of the model.
struct Rows {
    shared: Param,
    columns: Param,
    rows: Param,
    first: usize,
    count: usize,
    tasks: usize,
}

impl Rows {
    /// The rows of one task, [count, width].
    fn of(&self, task: usize) -> Result<Tensor> {
        let part = |param: &Param| -> Result<Tensor> {
            let all = param.get();
            let (rows, width) = (all.dim(1), all.width());
            Ok(all.rows_between(task, task + 1)?.reshape([rows, width])?)
        };
        let columns = part(&self.columns)?.rows_between(self.first, self.first + self.count)?;
        let shared = self.shared.get().rows_between(self.first, self.first + self.count)?;
        Ok(shared.mul(&columns.matmul(&part(&self.rows)?)?)?)
    }
}

/// What rows of no task are told where there are several.
fn nameless(tasks: usize) -> String {
    format!(
        "`tasks` is {tasks}, and the data name none; give `[[data.tasks]]`, or `task_ids`, a number from 0 for each row"
    )
}

impl PromptPatch for Rows {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self, _embedded: &Tensor, cx: &Pass) -> Result<Tensor> {
        let tasks = match cx.tasks() {
            None if self.tasks == 1 => return self.of(0),
            Some(tasks) => tasks.to_vec(),
            None => return Err(Error::Unsupported(nameless(self.tasks))),
        };
        if let Some(task) = tasks.iter().find(|task| **task >= self.tasks) {
            let message = format!("`task_ids`: expected tasks below {}, found {task}", self.tasks);
            return Err(Error::Unsupported(message));
        }
        // Each task that is there once, then the rows of every sequence.
        let mut there = tasks.clone();
        there.sort_unstable();
        there.dedup();
        let made = there.iter().map(|task| self.of(*task)).collect::<Result<Vec<_>>>()?;
        let all = engraft_tensor::ops::cat(&made.iter().collect::<Vec<_>>(), 0)?;
        let first = |task: &usize| there.partition_point(|own| own < task) * self.count;
        let index: Vec<i64> = tasks
            .iter()
            .map(first)
            .flat_map(|first| (first..first + self.count).map(|row| row as i64))
            .collect();
        Ok(all.gather(&Tensor::from_i64(index, [tasks.len() * self.count])?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::close;

    fn rows(a: &crate::Attached, tasks: Option<Vec<usize>>) -> Result<Tensor> {
        let (sites, _) = toy();
        let [Patch::Prompt(p)] = a.adapter.at(site_id(&sites, "tok.prompt")) else { panic!("no prompt") };
        let layout = Layout::counted(&[1, 2, 1]).unwrap();
        let layout = tasks.map_or(layout.clone(), |tasks| layout.with_tasks(tasks));
        p.rows(&Tensor::zeros([4, 6]), &Pass::new(layout, None))
    }

    #[test]
    fn every_sequence_has_the_prompt_of_its_task() {
        let a =
            attached(&[chosen("mpt", json!({ "tokens": 2, "tasks": 3, "rank": 2, "init": "random" }))], &[]);
        // l·d + tasks·rank·(l + d).
        assert_eq!(a.adapter.trained_count(), 2 * 6 + 3 * 2 * (2 + 6));
        stir(&a, 0.8);
        let part = |name: &str, task: usize, shape: [usize; 2]| {
            value_of(&a, name).rows_between(task, task + 1).unwrap().reshape(shape).unwrap()
        };
        let of = |task: usize| {
            let product =
                part("prefix_task_cols", task, [2, 2]).matmul(&part("prefix_task_rows", task, [2, 6]));
            value_of(&a, "prompt_embeddings").mul(&product.unwrap()).unwrap()
        };
        let found = rows(&a, Some(vec![2, 0, 2])).unwrap();
        assert_eq!(found.shape(), [6, 6]);
        for (i, task) in [2, 0, 2].into_iter().enumerate() {
            close(&found.rows_between(2 * i, 2 * i + 2).unwrap(), &of(task), 1e-6);
        }
        assert!(rows(&a, None).unwrap_err().to_string().contains("task_ids"));
        assert!(rows(&a, Some(vec![0, 3, 1])).unwrap_err().to_string().contains("below 3"));
        let one = attached(&[chosen("mpt", json!({ "tokens": 2 }))], &[]);
        assert_eq!(rows(&one, None).unwrap().shape(), [2, 6]);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("mpt", json!({ "tasks": 2, "rank": 3 }))], &["head"]);
        let text = json!({ "init_text": { "text": "good or bad", "ids": [4, 9] } });
        survives_saving(&[chosen("mpt", text)], &[]);
        let written = config(&[chosen("mpt", json!({}))], &[]);
        assert_eq!((&written["prompt_tuning_init"], &written["num_tasks"]), (&json!("RANDOM"), &json!(1)));
        for bad in [json!({ "num_ranks": 0 }), json!({ "prompt_tuning_init": "SAMPLE_VOCAB" })] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
