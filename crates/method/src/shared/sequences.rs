//! What a sequence says, in one row, and rows that each sequence has of its own.
//!
//! Only tokens that are given are looked at ([`Pass::given`]): in training, a language model's answer is not.

use engraft_nn::{Pass, Result, Task};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;

use crate::read::Reader;
use crate::{Field, FieldKind};

/// What stands for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Summary {
    /// Its first token.
    First,
    /// Its last token.
    Last,
    /// The mean of its tokens.
    Mean,
}

const NAMES: &[(&str, Summary)] =
    &[("first", Summary::First), ("last", Summary::Last), ("mean", Summary::Mean)];

/// The setting.
pub(crate) const fn field(default: Option<&'static str>, doc: &'static str) -> Field {
    Field { name: "summary", kind: FieldKind::OneOf(&["first", "last", "mean"]), default, doc }
}

impl Summary {
    /// The setting, where it is given.
    pub fn read(r: &mut Reader<'_>) -> Option<Summary> {
        r.value("summary").is_some().then(|| r.one_of("summary", NAMES))
    }

    /// The name of the setting's value.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, of)| *of == self).map_or("", |(name, _)| name)
    }

    /// The last token where later tokens see earlier ones alone, else the first.
    pub fn usual(task: Task) -> Summary {
        if task == Task::CausalLm { Summary::Last } else { Summary::First }
    }

    /// x [tokens, width] → [sequences, width].
    pub fn of(self, x: &Tensor, cx: &Pass) -> Result<Tensor> {
        let given = cx.given();
        let rows: Vec<i64> = match self {
            Summary::Mean => return means(x, cx),
            Summary::First => given.iter().map(|s| s.start as i64).collect(),
            Summary::Last => given.iter().map(|s| s.end as i64 - 1).collect(),
        };
        Ok(x.gather(&Tensor::from_i64(rows, [given.len()])?)?)
    }
}

/// The mean of each sequence's given rows: x [tokens, …] → [sequences, …].
pub(crate) fn means(x: &Tensor, cx: &Pass) -> Result<Tensor> {
    let given = cx.given();
    let (mut rows, mut owners) = (vec![], vec![]);
    for (i, own) in given.iter().enumerate() {
        owners.extend(std::iter::repeat_n(i as i64, own.len()));
        rows.extend(own.clone().map(|row| row as i64));
    }
    let count = rows.len();
    let all = if count == x.dim(0) { x.clone() } else { x.gather(&Tensor::from_i64(rows, [count])?)? };
    let sums = all.scatter_add(&Tensor::from_i64(owners, [count])?, given.len())?;
    let mut shape = vec![1; x.shape().len()];
    shape[0] = given.len();
    let shares = given.iter().map(|own| 1.0 / own.len().max(1) as f32).collect();
    Ok(sums.mul(&Tensor::from_vec(shares, shape)?)?)
}

/// The number of its sequence for every row of the pass, `I64` `[tokens]`.
pub(crate) fn owners(cx: &Pass) -> Result<Tensor> {
    let sequences = cx.layout().sequences().iter().enumerate();
    let owners: Vec<i64> =
        sequences.flat_map(|(i, rows)| std::iter::repeat_n(i as i64, rows.len())).collect();
    let count = owners.len();
    Ok(Tensor::from_i64(owners, [count])?)
}

/// h with other first rows in the sequences that have so many virtual ones: `rows` [count, width] in each, or
/// [sequences · count, width]. Under a cache, later steps have none.
pub(crate) fn with_first_rows(h: &Tensor, rows: &Tensor, count: usize, cx: &Pass) -> Result<Tensor> {
    let layout = cx.layout();
    let (total, step) = (rows.dim(0), if rows.dim(0) == count { 0 } else { count });
    let mut index = Vec::with_capacity(layout.tokens());
    for (i, s) in layout.sequences().iter().enumerate() {
        let own = if is_prompted(cx, i, count) { count } else { 0 };
        index.extend((i * step..i * step + own).map(|row| row as i64));
        index.extend((s.start + own..s.end).map(|row| (total + row) as i64));
    }
    let index = Tensor::from_i64(index, [layout.tokens()])?;
    Ok(cat(&[rows, h], 0)?.gather(&index)?)
}

/// Whether sequence `i` begins with `count` rows of a prompt.
pub(crate) fn is_prompted(cx: &Pass, i: usize, count: usize) -> bool {
    let layout = cx.layout();
    layout.virtual_counts()[i] >= count && !layout.is_padded(i)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn answers_and_prompts_are_not_looked_at() {
        let x = sample(&[7, 3], 1);
        let row = |i: usize| x.rows_between(i, i + 1).unwrap();
        let mean = |from: usize, to: usize| {
            let own = x.rows_between(from, to).unwrap();
            own.sum_dim(0).unwrap().scale(1.0 / (to - from) as f32).unwrap()
        };
        let layout = Layout::counted(&[4, 3]).unwrap();
        let all = Pass::new(layout.clone(), None);
        close(&Summary::Mean.of(&x, &all).unwrap(), &cat(&[&mean(0, 4), &mean(4, 7)], 0).unwrap(), 1e-6);
        close(&Summary::Last.of(&x, &all).unwrap(), &cat(&[&row(3), &row(6)], 0).unwrap(), 0.0);
        let some = Pass::new(layout.with_asked(vec![2, 0]), None);
        close(&Summary::Mean.of(&x, &some).unwrap(), &cat(&[&mean(0, 2), &mean(4, 7)], 0).unwrap(), 1e-6);
        close(&Summary::Last.of(&x, &some).unwrap(), &cat(&[&row(1), &row(6)], 0).unwrap(), 0.0);
        close(&Summary::First.of(&x, &some).unwrap(), &cat(&[&row(0), &row(4)], 0).unwrap(), 0.0);
        let (rows, inner) = some.with_rows_before(1, || Ok(Tensor::zeros([2, 3])), &x).unwrap();
        close(&Summary::Mean.of(&rows, &inner).unwrap(), &cat(&[&mean(0, 2), &mean(4, 7)], 0).unwrap(), 1e-6);
    }

    #[test]
    fn first_rows_are_put_in_their_sequences() {
        let (h, own) = (sample(&[3, 2], 1), sample(&[2, 2], 2));
        let plain = Pass::new(Layout::counted(&[1, 2]).unwrap(), None);
        close(&with_first_rows(&h, &own, 1, &plain).unwrap(), &h, 0.0);
        let (longer, cx) = plain.with_rows_before(1, || Ok(Tensor::zeros([2, 2])), &h).unwrap();
        let expected = plain.with_rows_before(1, || Ok(own.clone()), &h).unwrap().0;
        close(&with_first_rows(&longer, &own, 1, &cx).unwrap(), &expected, 0.0);
    }
}
