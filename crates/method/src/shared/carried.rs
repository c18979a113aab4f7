//! Rows that stand before every sequence from one block to a later one, and are no rows of the model outside of these.

use engraft_nn::{Error, Pass, Result, Site};
use engraft_tensor::{Tensor, ops::cat};

/// One of the blocks.
pub(crate) struct Carried {
    /// Under which it leaves the rows for the next one.
    pub key: String,
    /// How many there are before a sequence.
    pub count: usize,
    /// Whether it is the first of the blocks, which makes them, or the last.
    pub begins: bool,
    pub ends: bool,
}

/// What a block runs.
type Run<'a> = dyn Fn(&Tensor, &Pass) -> Result<Tensor> + 'a;

impl Carried {
    /// What the block makes of h [tokens, width], and of the rows [sequences · count, width] where they are not in a cache;
    /// `make` gives those that the first block reads, [count, width] or [sequences · count, width].
    pub fn through(
        &self,
        h: &Tensor,
        run: &Run<'_>,
        site: &Site,
        cx: &Pass,
        make: impl FnOnce() -> Result<Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let layout = cx.layout();
        if (0..layout.sequences().len()).any(|i| layout.is_padded(i)) {
            let message = "a classifier that reads the first column reads padding here, which prompts between blocks have no place beside; pad on the right";
            return Err(Error::Site { path: site.path.clone(), message: message.into() });
        }
        let rows = || match cx.find(&self.key).filter(|_| !self.begins) {
            Some(rows) => Ok(rows),
            None => make(),
        };
        let (joined, inner) = cx.with_rows_before(self.count, rows, h)?;
        let out = run(&joined, &inner)?;
        let Some(real) = inner.layout().real_rows() else { return Ok((out, None)) };
        let inserted = inner.layout().sequences().iter().zip(inner.layout().virtual_counts());
        let first: Vec<i64> =
            inserted.flat_map(|(s, &n)| (s.start..s.start + n).map(|row| row as i64)).collect();
        let of = |rows: Vec<i64>| {
            let count = rows.len();
            out.gather(&Tensor::from_i64(rows, [count])?)
        };
        let rows = of(first)?;
        if !self.ends {
            cx.put(self.key.clone(), rows.clone());
        }
        Ok((of(real)?, Some(rows)))
    }
}

/// h [tokens, width] with the first row of each sequence replaced by the first of its `count` rows.
pub(crate) fn first_of(h: &Tensor, rows: &Tensor, count: usize, cx: &Pass) -> Result<Tensor> {
    let mut index: Vec<i64> = (0..h.dim(0) as i64).collect();
    for (i, s) in cx.layout().sequences().iter().enumerate() {
        index[s.start] = (h.dim(0) + i * count) as i64;
    }
    let all = index.len();
    Ok(cat(&[h, rows], 0)?.gather(&Tensor::from_i64(index, [all])?)?)
}
