//! One forward: which rows use which adapter, the mode, the caches, what patches pass on to each other.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use engraft_tensor::{Tensor, checkpoint, ops::cat};

use crate::{Adapter, Error, KvCache, Layout, Norm, Patch, Result, Site, SiteId, Sites, Sublayer};

/// Whether dropout is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Evaluation: no dropout.
    Eval,
    /// Training: dropout drawn from (seed, step, micro-batch, site, element).
    Train {
        /// Seed of the run.
        seed: u64,
        /// Optimizer step.
        step: u64,
        /// Micro-batch within the step.
        micro: u64,
    },
}

/// Sequences that use the same adapter.
#[derive(Clone)]
pub struct Route {
    /// Which sequences of the batch.
    pub sequences: Range<usize>,
    /// Their adapter, or none for the base alone.
    pub adapter: Option<Arc<Adapter>>,
}

/// One forward pass. Cheap to clone; a clone shares the cache and the board.
#[derive(Clone)]
pub struct Pass {
    layout: Layout,
    routes: Arc<[Route]>,
    mode: Mode,
    checkpointing: bool,
    /// Share of the step's labels.
    share: f32,
    cache: Option<Arc<Mutex<KvCache>>>,
    /// Whether the cache held tokens before this pass.
    continues: bool,
    /// Number, in the whole batch, of the first sequence of this pass.
    first_sequence: usize,
    /// Number, in the whole batch, of the first token of this pass, rows of prompts not counted.
    first_token: usize,
    /// The route this pass is cut to, by its first sequence; none for the whole batch.
    scope: Option<usize>,
    board: Arc<Mutex<Board>>,
    /// Task of each sequence of the whole batch; empty where none was named.
    tasks: Arc<[usize]>,
    /// Last tokens of each sequence of the whole batch that are asked for; empty where all are given.
    asked: Arc<[usize]>,
    /// Where this pass has selected rows of another: how those lie, and which they are.
    selected: Option<(Layout, Arc<[i64]>)>,
}

/// What patches pass on, by route and key.
type Board = HashMap<(Option<usize>, String), Tensor>;

impl Pass {
    /// All sequences with one adapter, or none.
    pub fn new(layout: Layout, adapter: Option<Arc<Adapter>>) -> Self {
        let route = Route { sequences: 0..layout.sequences().len(), adapter };
        let (tasks, asked) = (layout.tasks().into(), layout.asked().into());
        Pass {
            layout,
            routes: Arc::new([route]),
            mode: Mode::Eval,
            checkpointing: false,
            share: 1.0,
            cache: None,
            continues: false,
            first_sequence: 0,
            first_token: 0,
            scope: None,
            board: Arc::default(),
            tasks,
            asked,
            selected: None,
        }
    }

    /// Rows with adapters of their own; the routes must cover the sequences in order.
    pub fn with_routes(layout: Layout, routes: Vec<Route>) -> Result<Self> {
        let mut next = 0;
        for route in &routes {
            if route.sequences.start != next {
                let message = format!(
                    "routes must cover the sequences in order: expected {next}, found {}",
                    route.sequences.start
                );
                return Err(Error::Unsupported(message));
            }
            next = route.sequences.end;
        }
        if next != layout.sequences().len() {
            return Err(Error::Unsupported(format!(
                "routes cover {next} of {} sequences",
                layout.sequences().len()
            )));
        }
        Ok(Pass { routes: routes.into(), ..Pass::new(layout, None) })
    }

    /// The same pass in training mode.
    pub fn training(self, mode: Mode) -> Self {
        Pass { mode, ..self }
    }

    /// The same pass keeping only the inputs of blocks, which backward then runs again.
    pub fn checkpointing(self, on: bool) -> Self {
        Pass { checkpointing: on, ..self }
    }

    /// The same pass as one of a step's micro-batches, with this share of the step's labels.
    pub fn sharing(self, share: f32) -> Self {
        Pass { share, ..self }
    }

    /// What a loss of this pass counts in its step, beside those of the other micro-batches.
    pub fn share(&self) -> f32 {
        self.share
    }

    /// The same pass reading and extending a cache of keys and values.
    pub fn cached(self, cache: Arc<Mutex<KvCache>>) -> Self {
        let continues = !cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).is_empty();
        Pass { cache: Some(cache), continues, ..self }
    }

    /// The pass of the same rows without adapters and, under a cache, with one of its own beside it: what the model alone says
    /// of a text that is gone on with.
    pub fn beside(&self) -> Self {
        let bare = Pass::new(self.layout.clone(), None);
        let cache = self.cache().map(|mut cache| cache.beside());
        match cache {
            Some(cache) => bare.cached(cache),
            None => bare,
        }
    }

    /// The same pass without its cache: what is computed once and not continued (an encoder).
    pub fn uncached(self) -> Self {
        Pass { cache: None, continues: false, ..self }
    }

    /// Whether its cache held earlier tokens when the pass began.
    pub fn continues(&self) -> bool {
        self.continues
    }

    /// The same sequences and routes over other rows: a picture's patches, a decoder's tokens.
    pub fn over(&self, layout: Layout) -> Result<Pass> {
        let (found, expected) = (layout.sequences().len(), self.layout.sequences().len());
        if found != expected {
            return Err(Error::Unsupported(format!("expected rows of {expected} sequences, found {found}")));
        }
        let asked = layout.asked().into();
        Ok(Pass { layout, asked, selected: None, ..self.clone() })
    }

    /// The same pass over rows that lie so.
    pub(crate) fn laid_out(&self, layout: Layout) -> Pass {
        Pass { layout, selected: None, ..self.clone() }
    }

    /// The rows of the batch.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Which sequences use which adapter.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// Evaluation or training.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    pub(crate) fn cache(&self) -> Option<MutexGuard<'_, KvCache>> {
        self.cache.as_ref().map(|c| c.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    pub(crate) fn first_sequence(&self) -> usize {
        self.first_sequence
    }

    /// Leaves a tensor for patches that run later in this pass. What a route leaves, other routes do not see.
    ///
    /// A checkpointed block runs again in backward, when the board holds what was left last: patches inside blocks may
    /// read what was left before the first block, or in the same block; block patches run once and may read anything.
    pub fn put(&self, key: impl Into<String>, value: Tensor) {
        let key = (self.scope, key.into());
        self.board.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(key, value);
    }

    /// A tensor that an earlier patch of this route left, or its method, before the pass, for the whole batch.
    pub fn find(&self, key: &str) -> Option<Tensor> {
        let board = self.board.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let own = board.get(&(self.scope, key.to_owned()));
        own.or_else(|| board.get(&(None, key.to_owned()))).cloned()
    }

    /// The rows of this pass of a tensor with one row for every token of the whole batch, left by [`Pass::put`] before the
    /// pass: rows of prompts have none.
    pub fn find_rows(&self, key: &str) -> Result<Option<Tensor>> {
        match self.find(key) {
            Some(all) => {
                Ok(Some(all.rows_between(self.first_token, self.first_token + self.layout.tokens())?))
            }
            None => Ok(None),
        }
    }

    /// The rows of this pass of a tensor with one row for every sequence of the whole batch, left by [`Pass::put`] before
    /// the pass.
    pub fn find_sequences(&self, key: &str) -> Result<Option<Tensor>> {
        let last = self.first_sequence + self.layout.sequences().len();
        match self.find(key) {
            Some(all) => Ok(Some(all.rows_between(self.first_sequence, last)?)),
            None => Ok(None),
        }
    }

    /// The task of each sequence of this pass, from 0; `None` where the data named none.
    pub fn tasks(&self) -> Option<&[usize]> {
        let own = self.first_sequence..self.first_sequence + self.layout.sequences().len();
        self.tasks.get(own).filter(|tasks| !tasks.is_empty())
    }

    /// The rows of each sequence's tokens that are given: neither virtual nor asked for, one of them at least. What a patch
    /// makes of its input (gates, routes, generated prompts) may look at these alone, unless its adapter reads answers.
    pub fn given(&self) -> Vec<Range<usize>> {
        let rows = self.layout.sequences().iter().zip(self.layout.virtual_counts()).enumerate();
        let given = |(i, (s, &virtual_count)): (usize, (&Range<usize>, &usize))| {
            let first = (s.start + virtual_count).min(s.end);
            let number = self.first_sequence + i;
            let mut own = self.routes.iter().filter(|route| route.sequences.contains(&number));
            let reads_all = own.any(|route| route.adapter.as_ref().is_some_and(|a| a.reads_answers()));
            let asked = self.asked.get(number).copied().filter(|_| !reads_all).unwrap_or(0);
            first..s.end.saturating_sub(asked).max(first + 1).min(s.end)
        };
        rows.map(given).collect()
    }

    /// What `make` gives, a row for each sequence; under a cache that of the first pass is kept for the later ones, so that
    /// what was found in the whole text (a gate, a choice) stays while it is continued.
    pub fn once(&self, key: &str, make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let key = (self.scope, key.to_owned());
        if let Some(kept) = self.cache().and_then(|cache| cache.kept(&key)) {
            return Ok(kept);
        }
        let made = make()?;
        if let Some(mut cache) = self.cache() {
            cache.keep(key, self.first_sequence, made.clone());
        }
        Ok(made)
    }

    /// x with dropout while training; `salt` tells apart several dropouts at one site.
    pub fn dropout(&self, x: &Tensor, p: f32, site: SiteId, salt: u8) -> Result<Tensor> {
        match self.mode {
            Mode::Eval => Ok(x.clone()),
            Mode::Train { .. } if p == 0.0 => Ok(x.clone()),
            Mode::Train { seed, step, micro } => {
                let stream = step << 40 ^ micro << 28 ^ (site.0 as u64) << 8 ^ u64::from(salt);
                Ok(x.dropout(p, seed, stream)?)
            }
        }
    }

    /// The same pass over selected rows, given in ascending order (labelled tokens, first tokens).
    pub fn select(&self, rows: &[i64]) -> Result<Pass> {
        let count = |s: &Range<usize>| {
            let below = |end: usize| rows.partition_point(|&r| (r as usize) < end);
            below(s.end) - below(s.start)
        };
        let lengths: Vec<usize> = self.layout.sequences().iter().map(count).collect();
        let positions = rows.iter().map(|&r| self.layout.positions()[r as usize]).collect();
        let selected = match &self.selected {
            Some((of, own)) => (of.clone(), rows.iter().map(|&r| own[r as usize]).collect()),
            None => (self.layout.clone(), rows.into()),
        };
        Ok(Pass { layout: Layout::new(&lengths, positions)?, selected: Some(selected), ..self.clone() })
    }

    /// The rows of this pass of a tensor with a row for every row of the pass that they were selected from; `None` where it has
    /// other rows.
    pub fn selected(&self, all: &Tensor) -> Result<Option<Tensor>> {
        let (of, rows) = match &self.selected {
            None => return Ok((all.dim(0) == self.layout.tokens()).then(|| all.clone())),
            Some(selected) => selected,
        };
        let rows = (all.dim(0) == of.tokens()).then(|| Tensor::from_i64(rows.to_vec(), [rows.len()]));
        rows.map(|rows| Ok(all.gather(&rows?)?)).transpose()
    }

    /// Whether any route has a patch at `site`.
    pub fn patched(&self, site: SiteId) -> bool {
        self.routes.iter().any(|r| r.adapter.as_ref().is_some_and(|a| !a.at(site).is_empty()))
    }

    /// Runs `f` on the rows of each route (with its patches at `site` and the pass of those rows) and joins the results.
    pub(crate) fn by_route(
        &self,
        site: SiteId,
        x: &Tensor,
        f: impl Fn(&Tensor, &[Patch], &Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if let [only] = &self.routes[..] {
            return f(x, only.adapter.as_ref().map_or(&[], |a| a.at(site)), self);
        }
        let mut parts = Vec::with_capacity(self.routes.len());
        for route in self.routes.iter() {
            let rows = self.layout.rows_of(&route.sequences);
            if rows.is_empty() {
                continue;
            }
            let part = x.rows_between(rows.start, rows.end)?;
            let patches = route.adapter.as_ref().map_or(&[][..], |a| a.at(site));
            parts.push(f(&part, patches, &self.only(route)?)?);
        }
        Ok(cat(&parts.iter().collect::<Vec<_>>(), 0)?)
    }

    /// The patches at `site` of a pass that has one route.
    pub(crate) fn patches_of_only_route(&self, site: SiteId) -> &[Patch] {
        match &self.routes[..] {
            [only] => only.adapter.as_ref().map_or(&[], |a| a.at(site)),
            _ => &[],
        }
    }

    /// The pass of one route's rows.
    pub(crate) fn only(&self, route: &Route) -> Result<Pass> {
        let whole = Route { sequences: 0..route.sequences.len(), adapter: route.adapter.clone() };
        let selected = match &self.selected {
            None => None,
            Some((of, rows)) => {
                let own = of.rows_of(&route.sequences);
                let inside = rows[self.layout.rows_of(&route.sequences)].iter();
                Some((of.slice(route.sequences.clone())?, inside.map(|r| r - own.start as i64).collect()))
            }
        };
        let before = self.layout.rows_of(&(0..route.sequences.start)).len();
        let virtual_before: usize = self.layout.virtual_counts()[..route.sequences.start].iter().sum();
        Ok(Pass {
            layout: self.layout.slice(route.sequences.clone())?,
            selected,
            routes: Arc::new([whole]),
            first_sequence: self.first_sequence + route.sequences.start,
            first_token: (self.first_token + before).saturating_sub(virtual_before),
            scope: Some(self.first_sequence + route.sequences.start),
            ..self.clone()
        })
    }

    /// What a sublayer puts on the stream, after the patches of its site, in models whose norms precede their sublayers.
    pub fn sublayer(&self, sites: &Sites, id: SiteId, s: Sublayer<'_>) -> Result<Tensor> {
        if !self.patched(id) {
            return Ok(s.output);
        }
        let site = sites.get(id);
        self.by_route(id, &s.output, |output, patches, cx| {
            let (residual, input) = (cx.rows_in(self, s.residual)?, cx.rows_in(self, s.input)?);
            let view = Sublayer { residual: &residual, input: &input, output: output.clone(), norm: s.norm };
            Ok(under_patches(view, patches, site, cx)?.0)
        })
    }

    /// The stream after a sublayer of a post-norm model: norm(residual + output), the output after the patches of its site.
    pub fn post_norm(&self, sites: &Sites, id: SiteId, s: Sublayer<'_>, norm: &Norm) -> Result<Tensor> {
        if !self.patched(id) {
            return norm.forward(&s.output.plus(s.residual)?, self);
        }
        let site = sites.get(id);
        self.by_route(id, &s.output, |output, patches, cx| {
            let (residual, input) = (cx.rows_in(self, s.residual)?, cx.rows_in(self, s.input)?);
            // The norm of this route: its gain may be patched too.
            let own = |x: &Tensor| norm.forward(x, cx);
            let view =
                Sublayer { residual: &residual, input: &input, output: output.clone(), norm: Some(&own) };
            match under_patches(view, patches, site, cx)? {
                (stream, true) => Ok(stream),
                (output, false) => own(&output.plus(&residual)?),
            }
        })
    }

    /// The rows of t [tokens of `whole`, …] that are those of this pass, one of the routes of `whole`.
    pub(crate) fn rows_in(&self, whole: &Pass, t: &Tensor) -> Result<Tensor> {
        let sequence = self.first_sequence - whole.first_sequence;
        let start = whole.layout.sequences().get(sequence).map_or(0, |s| s.start);
        Ok(t.rows_between(start, start + self.layout.tokens())?)
    }

    /// Runs a block, checkpointed if asked for, inside the patches of its site, which may run it on other rows.
    pub fn block(
        &self,
        sites: &Arc<Sites>,
        id: SiteId,
        h: &Tensor,
        run: impl Fn(&Tensor, &Pass) -> Result<Tensor> + Clone + Send + 'static,
    ) -> Result<Tensor> {
        let run = |h: &Tensor, cx: &Pass| -> Result<Tensor> {
            if !cx.checkpointing {
                return run(h, cx);
            }
            let (run, cx) = (run.clone(), cx.clone());
            // The tape speaks tensor errors only; the block's own comes back unchanged through the slot.
            let slot: Arc<Mutex<Option<Error>>> = Arc::default();
            let inner = slot.clone();
            let out = checkpoint(&[h], move |v| {
                run(&v[0], &cx).map_err(|e| match e {
                    Error::Tensor(e) => e,
                    other => {
                        let message = other.to_string();
                        *inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(other);
                        engraft_tensor::Error::Backward(message)
                    }
                })
            });
            let own = slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            match own {
                Some(error) => Err(error),
                None => Ok(out?),
            }
        };
        if !self.patched(id) {
            return run(h, self);
        }
        let site = sites.get(id);
        self.by_route(id, h, |h, patches, cx| {
            nested(h, cx, patches, &run, &|patch, h, inner, cx| match patch {
                Patch::Block(p) => Some(p.around(h, inner, site, cx)),
                _ => None,
            })
        })
    }
}

impl Pass {
    /// features [rows, in] → logits by `run`, the model's own head, inside the patches of its site.
    pub fn head(
        &self,
        sites: &Sites,
        id: SiteId,
        features: &Tensor,
        run: impl Fn(&Tensor, &Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !self.patched(id) {
            return run(features, self);
        }
        let site = sites.get(id);
        self.by_route(id, features, |x, patches, cx| {
            nested(x, cx, patches, &run, &|patch, x, inner, cx| match patch {
                Patch::Head(p) => Some(p.logits(x, &|x| inner(x, cx), site, cx)),
                _ => None,
            })
        })
    }
}

/// What the sublayer patches make of an output, and whether it is the next stream already.
fn under_patches(s: Sublayer<'_>, patches: &[Patch], site: &Site, cx: &Pass) -> Result<(Tensor, bool)> {
    let (mut output, mut is_stream) = (s.output, false);
    for patch in patches {
        let Patch::Sublayer(p) = patch else { continue };
        if is_stream {
            let message = "an adapter that drops the model's norm must be the last of its methods".into();
            return Err(Error::Site { path: site.path.clone(), message });
        }
        let view = Sublayer { residual: s.residual, input: s.input, output, norm: s.norm };
        output = p.output(&view, site, cx)?;
        is_stream = s.norm.is_some() && p.replaces_norm();
    }
    Ok((output, is_stream))
}

/// A function on the rows of a pass.
type Run<'a> = dyn Fn(&Tensor, &Pass) -> Result<Tensor> + 'a;

/// Runs a patch around a function on rows, if it is of the kind that is entered.
type Enter<'a> = dyn Fn(&Patch, &Tensor, &Run<'_>, &Pass) -> Option<Result<Tensor>> + 'a;

/// `run` inside the patches that `enter` takes, the first patch outermost.
fn nested(x: &Tensor, cx: &Pass, patches: &[Patch], run: &Run<'_>, enter: &Enter<'_>) -> Result<Tensor> {
    let Some((first, rest)) = patches.split_first() else { return run(x, cx) };
    let inner = |x: &Tensor, cx: &Pass| nested(x, cx, rest, run, enter);
    enter(first, x, &inner, cx).unwrap_or_else(|| inner(x, cx))
}
