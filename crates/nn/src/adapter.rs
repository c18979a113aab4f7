//! An adapter: patches by site and trainable tensors by name. A value, handed to `forward`.

use std::collections::HashMap;

use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value};

use crate::{Error, Names, Patch, Result, SiteId, Sites};

/// A parameter with the name it is saved under.
#[derive(Clone)]
pub struct NamedParam {
    /// Name in the adapter file, without the file format's own prefix.
    pub name: String,
    /// The tensor.
    pub param: Param,
    /// Parameter group, for methods that train some of their tensors differently (LoRA+); usually "".
    pub group: &'static str,
    /// Whether it belongs in the adapter file.
    pub saved: bool,
}

/// What the file that an adapter was read from calls its task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TaskName {
    /// There was no file: the task is the model's.
    #[default]
    OfModel,
    /// The file names none.
    None,
    /// The file's name for it.
    Is(String),
}

/// Patches by site and parameters by name.
#[derive(Default)]
pub struct Adapter {
    patches: HashMap<SiteId, Vec<Patch>>,
    params: Vec<NamedParam>,
    names: Names,
    task: TaskName,
    idle: Map<String, Value>,
    reads_answers: bool,
}

impl Adapter {
    /// An empty adapter whose parameters are named as `names` calls the modules.
    pub(crate) fn named(names: Names) -> Adapter {
        Adapter { names, ..Adapter::default() }
    }

    /// How its parameters call the model's modules.
    pub fn names(&self) -> Names {
        self.names
    }

    /// What the file that it was read from calls its task.
    pub fn task(&self) -> &TaskName {
        &self.task
    }

    /// Says what its file calls its task.
    pub fn set_task(&mut self, task: TaskName) {
        self.task = task;
    }

    /// Keys that its file gives and that say nothing here, each with what stands there (an empty list, table or text): as good as
    /// none, and written as they were.
    pub fn idle_keys(&self) -> &Map<String, Value> {
        &self.idle
    }

    /// Says which keys of its file say nothing here.
    pub fn set_idle_keys(&mut self, idle: Map<String, Value>) {
        self.idle = idle;
    }

    /// Whether what it makes of a text (gates, generated rows) is made of the tokens that are to be predicted too, in training.
    pub fn reads_answers(&self) -> bool {
        self.reads_answers
    }

    /// Says so.
    pub fn set_reads_answers(&mut self, reads: bool) {
        self.reads_answers = reads;
    }

    /// The patches at a site, in the order they were attached.
    pub fn at(&self, site: SiteId) -> &[Patch] {
        self.patches.get(&site).map_or(&[], Vec::as_slice)
    }

    /// Sites that have patches, in model order.
    pub fn sites(&self) -> Vec<SiteId> {
        let mut ids: Vec<SiteId> = self.patches.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// All parameters, in the order they were made.
    pub fn params(&self) -> &[NamedParam] {
        &self.params
    }

    /// The parameters that training changes.
    pub fn trainable(&self) -> impl Iterator<Item = &NamedParam> {
        self.params.iter().filter(|p| p.param.trainable())
    }

    /// Number of trained numbers.
    pub fn trained_count(&self) -> usize {
        self.trainable().map(|p| p.param.value().len()).sum()
    }

    /// Positions that its prompts and prefixes take before every sequence.
    pub fn prompt_rows(&self) -> usize {
        let prompt = |patch: &Patch| if let Patch::Prompt(prompt) = patch { prompt.count() } else { 0 };
        let prefix = |patch: &Patch| match patch {
            Patch::KeyValue(prefix) if prefix.gate().is_none() => prefix.count().max(prefix.moved()),
            _ => 0,
        };
        let prompts: usize = self.patches.values().flatten().map(prompt).sum();
        // Every attention has the same prefix, or the first of them says how far tokens move.
        let prefixes = self.patches.values().map(|site| site.iter().map(prefix).sum::<usize>());
        prompts + prefixes.max().unwrap_or(0)
    }

    /// Rows that a cache needs beside the tokens of a sequence, in its fullest layer.
    pub fn cache_rows(&self) -> usize {
        let late = |patch: &Patch| if let Patch::Block(block) = patch { block.rows_before() } else { 0 };
        let late = self.patches.values().map(|site| site.iter().map(late).sum::<usize>());
        self.prompt_rows() + late.max().unwrap_or(0)
    }

    /// The adapter without its patches in the first `count` blocks of the model, an encoder's before a decoder's
    /// (AdapterDrop): these blocks compute what the base does. Its tensors stay.
    ///
    /// # Errors
    /// Extra keys and values in some of the blocks, which move the positions of tokens in all of them.
    pub fn without_first_blocks(mut self, sites: &Sites, count: usize) -> Result<Adapter> {
        let inside = |id: &SiteId| sites.number(sites.get(*id)).is_some_and(|number| number < count);
        let prefixed = |patches: &Vec<Patch>| patches.iter().any(|p| matches!(p, Patch::KeyValue(_)));
        let cut = |(id, patches): (&SiteId, &Vec<Patch>)| inside(id) && prefixed(patches);
        if self.patches.iter().any(cut) {
            return Err(Error::Unsupported(
                "layers of a prefix cannot be dropped, since its rows move the positions of all tokens; drop none".into(),
            ));
        }
        self.patches.retain(|id, _| !inside(id));
        Ok(self)
    }

    /// The adapter with further patches behind its own: probes that look at what passes.
    pub fn with_patches(mut self, patches: Vec<(SiteId, Patch)>) -> Adapter {
        patches.into_iter().for_each(|(site, patch)| self.push_patch(site, patch));
        self
    }

    pub(crate) fn push_patch(&mut self, site: SiteId, patch: Patch) {
        self.patches.entry(site).or_default().push(patch);
    }

    pub(crate) fn push_param(&mut self, param: NamedParam) {
        self.params.push(param);
    }

    /// Sets the saved parameters from `tensors` (name, values); every missing, extra or mis-shaped one is reported.
    pub fn load(&self, tensors: Vec<(String, Tensor)>) -> Result<()> {
        assign(&self.params, tensors)
    }
}

/// Sets those of `params` that are saved; every missing, extra or mis-shaped tensor is reported.
pub(crate) fn assign(params: &[NamedParam], tensors: Vec<(String, Tensor)>) -> Result<()> {
    let mut given: HashMap<String, Tensor> = tensors.into_iter().collect();
    let mut problems = Vec::new();
    let mut accepted = Vec::new();
    for p in params.iter().filter(|p| p.saved) {
        let own = p.param.value();
        let (expected, dtype) = (own.shape().to_vec(), own.dtype());
        match given.remove(&p.name) {
            None => problems.push(format!("{}: expected {expected:?}, absent", p.name)),
            Some(t) if t.shape() != expected => {
                problems.push(format!("{}: expected {expected:?}, found {:?}", p.name, t.shape()));
            }
            Some(t) if t.dtype() != dtype => {
                problems.push(format!("{}: expected {dtype:?}, found {:?}", p.name, t.dtype()));
            }
            Some(t) => accepted.push((p, t)),
        }
    }
    let mut extra: Vec<_> =
        given.into_iter().map(|(n, t)| format!("{n}: not expected, found {:?}", t.shape())).collect();
    extra.sort();
    problems.extend(extra);
    if !problems.is_empty() {
        return Err(Error::Mismatch(problems));
    }
    for (p, t) in accepted {
        p.param.set(t)?;
    }
    Ok(())
}
