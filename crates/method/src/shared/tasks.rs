//! Tensors of several tasks in one adapter: each sequence is of a task, or all are of the adapter's own.

use engraft_nn::{Error, Pass, Result};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;

use crate::read::Reader;
use crate::shared::fields::int;
use crate::{Ahead, Field};

/// Most tasks.
const MAX: usize = 1 << 10;

/// How many tasks an adapter knows, and which one sequences are of where the data do not say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tasks {
    pub count: usize,
    pub usual: usize,
}

/// The setting `tasks`.
pub(crate) const fn tasks_field(default: &'static str) -> Field {
    int("tasks", (1, MAX as i64), Some(default), "Tasks that the adapter knows.")
}

/// The setting `task`.
pub(crate) const fn task_field() -> Field {
    int("task", (0, MAX as i64), Some("0"), "The task of rows that name none, from 0.")
}

/// An error where the data have more than `tasks` tasks.
pub(crate) fn enough(tasks: usize, run: &Ahead) -> Result<()> {
    match run.tasks.filter(|there| *there > tasks) {
        None => Ok(()),
        Some(there) => Err(Error::Unsupported(format!(
            "`tasks` is {tasks}, and the data have rows of {there} tasks; set `tasks = {there}`"
        ))),
    }
}

impl Tasks {
    /// Reads the settings under these names.
    pub fn read(r: &mut Reader<'_>, [tasks, task]: [&'static str; 2], usual: usize) -> Tasks {
        let found = Tasks { count: r.count(tasks, usual, MAX), usual: r.at_least(task, 0, 0) as usize };
        if found.usual >= found.count {
            let (count, task_found) = (found.count, found.usual);
            r.problem(format!("`{task}`: expected one of {count} tasks, from 0, found {task_found}"));
        }
        found
    }

    /// An error where the data have more tasks.
    pub fn suit(&self, run: &Ahead) -> Result<()> {
        enough(self.count, run)
    }

    /// The task of each sequence of a pass.
    pub fn of(&self, cx: &Pass) -> Result<Vec<usize>> {
        let tasks =
            cx.tasks().map_or_else(|| vec![self.usual; cx.layout().sequences().len()], <[usize]>::to_vec);
        match tasks.iter().find(|&&task| task >= self.count) {
            Some(task) => Err(Error::Unsupported(format!(
                "a row is of task {task}; the adapter knows {} tasks, from 0 (`tasks`)",
                self.count
            ))),
            None => Ok(tasks),
        }
    }

    /// Runs `f` on the rows of x [tokens, width] of each task that the pass has; the results lie as x does.
    pub fn each(
        &self,
        x: &Tensor,
        cx: &Pass,
        f: impl Fn(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let tasks = self.of(cx)?;
        let mut known = tasks.clone();
        known.sort_unstable();
        known.dedup();
        if let [only] = known[..] {
            return f(only, x);
        }
        let (mut parts, mut places, mut at) = (Vec::new(), vec![0i64; x.dim(0)], 0);
        for task in known {
            let own = cx.layout().sequences().iter().zip(&tasks).filter(|(_, t)| **t == task);
            let rows: Vec<i64> = own.flat_map(|(s, _)| s.clone().map(|row| row as i64)).collect();
            for row in &rows {
                places[*row as usize] = at;
                at += 1;
            }
            parts.push(f(task, &x.gather(&Tensor::from_i64(rows.clone(), [rows.len()])?)?)?);
        }
        let places = Tensor::from_i64(places, [x.dim(0)])?;
        Ok(cat(&parts.iter().collect::<Vec<_>>(), 0)?.gather(&places)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn rows_of_a_task_are_seen_together_and_come_back_to_their_places() {
        let tasks = Tasks { count: 3, usual: 1 };
        let layout = Layout::counted(&[2, 1, 3]).unwrap();
        let x = sample(&[6, 2], 1);
        let scaled = |task: usize, rows: &Tensor| Ok(rows.scale(task as f32)?);
        let cx = Pass::new(layout.clone().with_tasks(vec![2, 0, 2]), None);
        let found = tasks.each(&x, &cx, scaled).unwrap();
        let factors = Tensor::from_vec(vec![2.0, 2.0, 0.0, 2.0, 2.0, 2.0], [6, 1]).unwrap();
        close(&found, &x.mul(&factors).unwrap(), 0.0);
        close(&tasks.each(&x, &Pass::new(layout.clone(), None), scaled).unwrap(), &x, 0.0);
        let unknown = Pass::new(layout.with_tasks(vec![0, 3, 0]), None);
        let error = tasks.each(&x, &unknown, scaled).unwrap_err().to_string();
        assert!(error.contains("task 3") && error.contains("knows 3 tasks"), "{error}");
    }
}
