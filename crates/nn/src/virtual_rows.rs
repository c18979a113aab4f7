//! Rows that are no tokens: prompts before the sequences, padding, the room that prefixes take.

use std::ops::Range;

use engraft_tensor::{Tensor, ops::cat};

use crate::{Layout, Pass, Patch, PromptPatch, Result, Route, SiteId};

/// Rows for each route: how many before a sequence, and those rows unless they are there already.
type Before = Vec<(usize, Option<Tensor>)>;

impl Pass {
    /// Puts the prompt rows of each route before its sequences' embedded tokens h [tokens, width].
    ///
    /// While a cache already holds the prompts, only positions move. Gives the new rows and the pass that describes them.
    pub fn with_prompts(&self, site: SiteId, h: &Tensor) -> Result<(Tensor, Pass)> {
        if !self.patched(site) {
            return Ok((h.clone(), self.clone()));
        }
        let of_route = |route: &Route| {
            let prompts = prompts(route, site);
            let count = prompts.iter().map(|p| p.count()).sum();
            if count == 0 || self.continues() {
                return Ok((count, None));
            }
            let (embedded, cx) = self.rows_of_route(route, h)?;
            let rows = prompts.iter().map(|p| Ok((p.count(), p.rows(&embedded, &cx)?)));
            Ok((count, Some(joined(&rows.collect::<Result<Vec<_>>>()?, route.sequences.len())?)))
        };
        self.with_before(&self.routes().iter().map(of_route).collect::<Result<_>>()?, h)
    }

    /// Puts `count` rows before each sequence of h [tokens, width], where no cache holds them already; `rows` gives them,
    /// [count, width] for all sequences or [sequences · count, width]. For patches around blocks, which see one route.
    pub fn with_rows_before(
        &self,
        count: usize,
        rows: impl FnOnce() -> Result<Tensor>,
        h: &Tensor,
    ) -> Result<(Tensor, Pass)> {
        let rows = if self.continues() { None } else { Some(rows()?) };
        self.with_before(&vec![(count, rows)], h)
    }

    /// The rows of h [tokens, width] that belong to a route, and their pass.
    pub(crate) fn rows_of_route(&self, route: &Route, h: &Tensor) -> Result<(Tensor, Pass)> {
        if let [_] = self.routes() {
            return Ok((h.clone(), self.clone()));
        }
        let rows = self.layout().rows_of(&route.sequences);
        Ok((h.rows_between(rows.start, rows.end)?, self.only(route)?))
    }

    fn with_before(&self, before: &Before, h: &Tensor) -> Result<(Tensor, Pass)> {
        if before.iter().all(|(count, _)| *count == 0) {
            return Ok((h.clone(), self.clone()));
        }
        let (mut index, mut positions, mut lengths, mut virtual_counts) = (vec![], vec![], vec![], vec![]);
        let (mut parts, mut at) = (vec![], 0);
        let total: usize = before.iter().filter_map(|(_, rows)| rows.as_ref()).map(|rows| rows.dim(0)).sum();
        for (route, (count, rows)) in self.routes().iter().zip(before) {
            let inserted = if rows.is_some() { *count } else { 0 };
            let step = rows.as_ref().map_or(0, |rows| step(rows, *count));
            for (i, number) in route.sequences.clone().enumerate() {
                let (s, begin) = (&self.layout().sequences()[number], self.layout().begins(number));
                let first = at + i * step;
                index.extend((first..first + inserted).map(|row| row as i64));
                positions.extend(begin..begin + inserted as i32);
                index.extend((total + s.start..total + s.end).map(|row| row as i64));
                positions.extend(self.layout().positions()[s.clone()].iter().map(|p| p + *count as i32));
                lengths.push(s.len() + inserted);
                virtual_counts.push(inserted);
            }
            if let Some(rows) = rows {
                at += rows.dim(0);
                parts.push(rows.clone());
            }
        }
        parts.push(h.clone());
        let index = Tensor::from_i64(index.clone(), [index.len()])?;
        let rows = cat(&parts.iter().collect::<Vec<_>>(), 0)?.gather(&index)?;
        let layout = Layout::with_virtual(&lengths, virtual_counts, positions)?;
        Ok((rows, self.laid_out(layout.beginning_at(self.layout().all_begins()))))
    }

    /// The pass with one row of padding before each sequence that `which` names: the row sees the sequence, which does not
    /// see it (encoders that read the first column of rows padded on the left). Gives, for every row of the new pass, the
    /// row of this one that it is, `None` for padding.
    pub fn with_padding(&self, which: &[bool]) -> Result<(Vec<Option<usize>>, Pass)> {
        let (mut rows, mut positions, mut lengths, mut counts) = (vec![], vec![], vec![], vec![]);
        let before = self.layout().virtual_counts();
        for ((s, &count), &padded) in self.layout().sequences().iter().zip(before).zip(which) {
            if padded {
                rows.push(None);
                positions.push(0);
            }
            rows.extend(s.clone().map(Some));
            positions.extend_from_slice(&self.layout().positions()[s.clone()]);
            lengths.push(s.len() + usize::from(padded));
            counts.push(if padded { 1 } else { count });
        }
        let layout = Layout::with_virtual(&lengths, counts, positions)?.padded(which.to_vec());
        let layout = layout.beginning_at(self.layout().all_begins());
        Ok((rows, self.laid_out(layout)))
    }

    /// The pass with tokens moved by the prefixes that their adapters have at `first`, the keys and values of the first
    /// self-attention (see [`crate::KeyValuePatch::gate`]).
    pub fn with_prefixes(&self, first: SiteId) -> Result<Pass> {
        let counts = self.prefix_counts(first);
        if counts.iter().all(|&n| n == 0) {
            return Ok(self.clone());
        }
        let moved = self
            .layout()
            .sequences()
            .iter()
            .zip(&counts)
            .flat_map(|(s, n)| self.layout().positions()[s.clone()].iter().map(|p| p + *n as i32));
        let lengths: Vec<usize> = self.layout().sequences().iter().map(Range::len).collect();
        let layout =
            Layout::with_virtual(&lengths, self.layout().virtual_counts().to_vec(), moved.collect())?;
        let begins = counts.iter().enumerate().map(|(i, n)| self.layout().begins(i) + *n as i32);
        Ok(self.laid_out(layout.beginning_at(begins.collect())))
    }
}

/// Distance between the rows of one sequence and of the next: none where all share them.
pub(crate) fn step(rows: &Tensor, count: usize) -> usize {
    if rows.dim(0) == count { 0 } else { count }
}

/// The rows of several patches as those of one: [count, …] where all sequences share all of them, else
/// [sequences · count, …].
pub(crate) fn joined(parts: &[(usize, Tensor)], sequences: usize) -> Result<Tensor> {
    if let [(_, only)] = parts {
        return Ok(only.clone());
    }
    if parts.iter().all(|(count, rows)| step(rows, *count) == 0) {
        return Ok(cat(&parts.iter().map(|(_, rows)| rows).collect::<Vec<_>>(), 0)?);
    }
    let mut index = Vec::new();
    for i in 0..sequences {
        let mut first = 0;
        for (count, rows) in parts {
            let own = first + i * step(rows, *count);
            index.extend((own..own + count).map(|row| row as i64));
            first += rows.dim(0);
        }
    }
    let index = Tensor::from_i64(index.clone(), [index.len()])?;
    Ok(cat(&parts.iter().map(|(_, rows)| rows).collect::<Vec<_>>(), 0)?.gather(&index)?)
}

/// The prompts of a route.
fn prompts(route: &Route, site: SiteId) -> Vec<&dyn PromptPatch> {
    let patches = route.adapter.as_ref().map_or(&[][..], |a| a.at(site));
    let found = patches.iter().filter_map(|patch| match patch {
        Patch::Prompt(prompt) => Some(prompt.as_ref()),
        _ => None,
    });
    found.collect()
}
