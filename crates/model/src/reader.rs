//! Takes tensors out of a model's files by module path, declares their sites, and collects everything that does not fit.
//!
//! A model is built twice: first *dry*, when shapes are compared and nothing is read, then, if all fits, for real. So a
//! model's file says once which tensors it has, and a mismatch costs no time and no memory.
//!
//! Paths are those of the task's class in `transformers` (`bert.encoder.layer.0…`); files saved from another class have the
//! trunk under another prefix (`encoder.layer.0…`), norms of old files are called `gamma` and `beta`, and of models whose
//! modules `transformers` has renamed, the files have the older names or the current ones.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engraft_nn::weight::{FileRows, Storage, TransposedRows};
use engraft_nn::{Convolution, Embedding, Init, Joined, Linear, Norm, Parameter, Role, Sites, Weight};
use engraft_store::{Dtype, RawTensor, Weights};
use engraft_tensor::Tensor;
use engraft_tensor::frozen::Precision;

use crate::error::MismatchRow;
use crate::packed::{Key, place};
use crate::sources::{Absent, Fresh};
use crate::{Bytes, LoadOptions, Result};

/// Which share of the memory a tensor is counted in.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Part {
    Block,
    Embedding,
    Head,
}

/// Where the trunk's tensors are called how.
#[derive(Clone)]
pub(crate) struct Prefixes {
    /// Prefix of the trunk's module paths: `bert.`, or none where the class is the trunk itself.
    pub path: &'static str,
    /// Prefix of the trunk's tensors in the files.
    pub file: &'static str,
}

/// Parts of paths with what older versions of `transformers` have in their place.
pub(crate) type Renamed = &'static [(&'static str, &'static str)];

/// See the module.
pub(crate) struct Reader<'a> {
    dir: PathBuf,
    weights: &'a Weights,
    options: &'a LoadOptions,
    prefixes: Prefixes,
    renamed: Renamed,
    /// Whether the files have the older names.
    older: bool,
    dry: bool,
    /// Standard deviation of new matrices.
    pub initializer_range: f32,
    /// Declared so far.
    pub sites: Sites,
    pub used: BTreeSet<String>,
    pub rows: Vec<MismatchRow>,
    pub new_tensors: Vec<String>,
    pub bytes: Bytes,
}

impl<'a> Reader<'a> {
    pub fn new(
        dir: &Path,
        weights: &'a Weights,
        options: &'a LoadOptions,
        prefixes: Prefixes,
        dry: bool,
    ) -> Self {
        Reader {
            dir: place(dir),
            weights,
            options,
            prefixes,
            renamed: &[],
            older: false,
            dry,
            initializer_range: 0.02,
            sites: Sites::default(),
            used: BTreeSet::new(),
            rows: Vec::new(),
            new_tensors: Vec::new(),
            bytes: Bytes::default(),
        }
    }

    /// Number of tensors in the files.
    pub fn tensors(&self) -> usize {
        self.weights.len()
    }

    /// Says how `transformers` has renamed the modules; to be called before anything is read.
    pub fn rename(&mut self, renamed: Renamed) {
        let current = |name: &str| renamed.iter().any(|(current, _)| name.contains(current));
        self.renamed = renamed;
        self.older = !self.weights.names().any(current);
    }

    /// All that was declared.
    pub fn finish(&mut self) -> Arc<Sites> {
        let (sites, renamed) = (std::mem::take(&mut self.sites), self.renamed);
        Arc::new(if renamed.is_empty() { sites } else { sites.with_older(|path| older(path, renamed)) })
    }

    /// How the files call what lies at a module path.
    pub fn name(&self, path: &str) -> String {
        let path = if self.older { &older(path, self.renamed) } else { path };
        match path.strip_prefix(self.prefixes.path) {
            Some(rest) => format!("{}{rest}", self.prefixes.file),
            None => path.to_owned(),
        }
    }

    /// Whether the files hold a tensor called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.weights.get(name).is_some()
    }

    /// Says that the tensor at `path`, if the files have it, is for something that is not there (pretraining).
    pub fn pass_over(&mut self, path: &str) {
        let name = self.name(path);
        self.used.insert(name);
    }

    /// Whether both tensors are there with the same bytes.
    pub fn same(&self, a: &str, b: &str) -> bool {
        match (self.weights.get(a), self.weights.get(b)) {
            (Some(a), Some(b)) => a.dtype == b.dtype && a.shape == b.shape && a.bytes() == b.bytes(),
            _ => false,
        }
    }

    /// The tensor `name` if it has this shape and is to be read now; what does not fit is noted.
    fn take(&mut self, name: &str, shape: &[usize]) -> Option<RawTensor> {
        self.used.insert(name.to_owned());
        let found = self.weights.get(name);
        let problem = match found {
            None => Some("absent".to_owned()),
            Some(t) if t.shape != shape => Some(format!("{:?}", t.shape)),
            Some(t) if !matches!(t.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                Some(format!("{:?} of type {}", t.shape, t.dtype))
            }
            Some(_) => None,
        };
        if let Some(found) = problem {
            self.rows.push(MismatchRow { tensor: name.to_owned(), expected: format!("{shape:?}"), found });
            return None;
        }
        found.filter(|_| !self.dry).cloned()
    }

    fn count(&mut self, part: Part, bytes: usize) {
        *match part {
            Part::Block => &mut self.bytes.blocks,
            Part::Embedding => &mut self.bytes.embeddings,
            Part::Head => &mut self.bytes.head,
        } += bytes;
    }

    /// The matrix `name` [out, in]; matrices of blocks are kept in the storage that was asked for.
    fn matrix(&mut self, name: &str, (out, inn): (usize, usize), part: Part) -> Result<Arc<Weight>> {
        let raw = self.take(name, &[out, inn]);
        self.packed(name, raw, 0, (out, inn), part)
    }

    /// What rows of a tensor are when they are packed so.
    fn key(
        &self,
        tensor: &str,
        (first, rows): (usize, usize),
        storage: Option<Storage>,
        precision: Option<Precision>,
    ) -> Key {
        Key { dir: self.dir.clone(), tensor: tensor.to_owned(), first, rows, storage, precision }
    }

    /// The matrix [out, in] of a tensor that was taken, whose rows are those of `name` from `first` on.
    fn packed(
        &mut self,
        name: &str,
        raw: Option<RawTensor>,
        first: usize,
        shape: (usize, usize),
        part: Part,
    ) -> Result<Arc<Weight>> {
        let Some(raw) = raw else {
            return Ok(Arc::new(Weight::table(Arc::new(Absent(shape)), None)));
        };
        let storage = if part == Part::Block { self.options.storage } else { Storage::Dense };
        let precision = self.options.precision;
        let key = self.key(name, (first, shape.0), Some(storage), Some(precision));
        let weight = self
            .options
            .packed
            .get(key, || Ok(Weight::matrix(&FileRows::new(name, &raw)?, storage, precision)?))?;
        self.count(part, weight.bytes());
        Ok(weight)
    }

    /// A linear layer whose matrix the file holds as [in, out] (GPT-2's `Conv1D`), with bias.
    pub fn linear_transposed(
        &mut self,
        path: &str,
        role: Role,
        layer: Option<usize>,
        (out, inn): (usize, usize),
    ) -> Result<Linear> {
        let name = self.name(path);
        let tensor = format!("{name}.weight");
        let (storage, precision) = (self.options.storage, self.options.precision);
        let weight = match self.take(&tensor, &[inn, out]) {
            None => Arc::new(Weight::table(Arc::new(Absent((out, inn))), None).stored_transposed()),
            Some(raw) => {
                let key = self.key(&tensor, (0, out), Some(storage), Some(precision));
                self.options.packed.get(key, || {
                    let rows = TransposedRows::new(&tensor, &raw)?;
                    Ok(Weight::matrix(&rows, storage, precision)?.stored_transposed())
                })?
            }
        };
        self.count(Part::Block, weight.bytes());
        let bias = self.vector(&format!("{name}.bias"), out)?;
        Ok(Linear::declare(&mut self.sites, (path, &name), role, layer, weight, Some(bias)))
    }

    /// A linear layer [out, in] whose tensors are called `path_weight` and `path_bias` (`torch.nn.MultiheadAttention`).
    pub fn linear_underscored(
        &mut self,
        path: &str,
        role: Role,
        layer: Option<usize>,
        shape: (usize, usize),
    ) -> Result<Linear> {
        let name = self.name(path);
        let (weight_name, bias_name) = (format!("{name}_weight"), format!("{name}_bias"));
        let weight = self.matrix(&weight_name, shape, Part::Block)?;
        let bias = self.vector(&bias_name, shape.0)?;
        let bias = (bias, (&*format!("{path}_bias"), &*bias_name));
        Ok(Linear::declare_named(&mut self.sites, (path, &weight_name), role, layer, weight, Some(bias)))
    }

    /// A convolution with bias over windows [channels, height, width] that do not overlap; the file may hold its kernels
    /// flat, [out, channels · height · width].
    pub fn convolution(
        &mut self,
        path: &str,
        out: usize,
        window: [usize; 3],
        flat: bool,
    ) -> Result<Convolution> {
        let (name, [channels, height, width]) = (self.name(path), window);
        let (tensor, shape) = (format!("{name}.weight"), (out, channels * height * width));
        let stored = if flat { vec![shape.0, shape.1] } else { vec![out, channels, height, width] };
        let weight = match self.take(&tensor, &stored) {
            None => Arc::new(Weight::table(Arc::new(Absent(shape)), None)),
            Some(raw) => {
                let precision = self.options.precision;
                let key = self.key(&tensor, (0, out), Some(Storage::Dense), Some(precision));
                self.options.packed.get(key, || {
                    let rows = FileRows::flattened(&tensor, &raw, shape)?;
                    Ok(Weight::matrix(&rows, Storage::Dense, precision)?)
                })?
            }
        };
        self.count(Part::Embedding, weight.bytes());
        let bias = self.vector(&format!("{name}.bias"), out)?;
        Ok(Convolution::declare(&mut self.sites, (path, &name), window, flat, weight, Some(bias)))
    }

    /// A bare parameter of the file's `shape` (a class token, learned positions, a layer scale), seen as a vector.
    pub fn parameter(
        &mut self,
        path: &str,
        role: Role,
        layer: Option<usize>,
        shape: &[usize],
    ) -> Result<Parameter> {
        let name = self.name(path);
        let len = shape.iter().product();
        let raw = self.take(&name, shape);
        let value = self.unpacked(raw, len)?;
        Ok(Parameter::declare(&mut self.sites, (path, &name), role, layer, value))
    }

    /// The vector `name` `[len]`.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        let raw = self.take(name, &[len]);
        self.unpacked(raw, len)
    }

    /// The vector `[len]` of a tensor that was taken.
    fn unpacked(&mut self, raw: Option<RawTensor>, len: usize) -> Result<Tensor> {
        let Some(raw) = raw else { return Ok(Tensor::zeros([0])) };
        self.bytes.vectors += 4 * len;
        Ok(Tensor::from_vec(raw.to_f32()?, [len])?)
    }

    /// A linear layer [out, in] with or without bias.
    pub fn linear(
        &mut self,
        path: &str,
        role: Role,
        layer: Option<usize>,
        shape: (usize, usize),
        bias: bool,
    ) -> Result<Linear> {
        let name = self.name(path);
        let part = if layer.is_some() { Part::Block } else { Part::Head };
        let weight = self.matrix(&format!("{name}.weight"), shape, part)?;
        let bias = if bias { Some(self.vector(&format!("{name}.bias"), shape.0)?) } else { None };
        Ok(Linear::declare(&mut self.sites, (path, &name), role, layer, weight, bias))
    }

    /// Linear layers [out, in] with biases at `paths`, which older names have as one at `whole`.
    pub fn joined(
        &mut self,
        whole: &str,
        paths: [(String, Role); 2],
        layer: Option<usize>,
        (out, inn): (usize, usize),
    ) -> Result<Joined> {
        let name = self.name(whole);
        let taken = if self.older {
            let all = paths.len() * out;
            let matrix = self.take(&format!("{name}.weight"), &[all, inn]);
            Some((matrix, self.take(&format!("{name}.bias"), &[all])))
        } else {
            None
        };
        let mut parts = Vec::with_capacity(paths.len());
        for (number, (path, role)) in paths.iter().enumerate() {
            let Some((matrix, bias)) = &taken else {
                parts.push(self.linear(path, *role, layer, (out, inn), true)?);
                continue;
            };
            let rows = number * out..(number + 1) * out;
            let cut = |t: &Option<RawTensor>| t.as_ref().map(|t| t.rows(rows.clone())).transpose();
            let matrix = cut(matrix)?;
            let weight =
                self.packed(&format!("{name}.weight"), matrix, rows.start, (out, inn), Part::Block)?;
            let bias = self.unpacked(cut(bias)?, out)?;
            parts.push(Linear::declare(&mut self.sites, (path, &name), *role, layer, weight, Some(bias)));
            self.sites.set_rows(path, rows.clone());
            self.sites.set_rows(&format!("{path}.bias"), rows);
        }
        Ok(Joined::declare(&mut self.sites, (whole, &name), Role::Up, layer, parts)?)
    }

    /// A linear layer of a new task's head: the file's if it fits, else, where the caller asked for a head, a new one:
    /// weight N(0, initializer_range), bias 0.
    pub fn head(&mut self, path: &str, role: Role, shape: (usize, usize), bias: bool) -> Result<Linear> {
        let name = self.name(path);
        let (weight_name, bias_name) = (format!("{name}.weight"), format!("{name}.bias"));
        let fits = |name: &str, shape: &[usize]| self.weights.get(name).is_some_and(|t| t.shape == shape);
        let whole = fits(&weight_name, &[shape.0, shape.1]) && (!bias || fits(&bias_name, &[shape.0]));
        let asked = self.options.task.is_some() || self.options.labels.is_some();
        if whole || !asked {
            return self.linear(path, role, None, shape, bias);
        }
        self.used.extend([weight_name.clone(), bias_name.clone()]);
        self.new_tensors.push(weight_name.clone());
        if bias {
            self.new_tensors.push(bias_name);
        }
        let bias = bias.then(|| Tensor::zeros([if self.dry { 0 } else { shape.0 }]));
        let weight = if self.dry {
            Weight::table(Arc::new(Absent(shape)), None)
        } else {
            let init = Init::Normal(self.initializer_range);
            let values = init.tensor(&[shape.0, shape.1], self.options.seed, &weight_name)?;
            let source = Fresh { values: values.to_vec()?, shape };
            Weight::matrix(&source, Storage::Dense, self.options.precision)?
        };
        self.count(Part::Head, weight.bytes());
        Ok(Linear::declare(&mut self.sites, (path, &name), role, None, Arc::new(weight), bias))
    }

    /// A norm: layer norm with bias, RMS norm without.
    pub fn norm(
        &mut self,
        path: &str,
        layer: Option<usize>,
        width: usize,
        eps: f64,
        bias: bool,
    ) -> Result<Norm> {
        let name = self.name(path);
        let current = |new: &str, old: &str| {
            let (new, old) = (format!("{name}.{new}"), format!("{name}.{old}"));
            if !self.has(&new) && self.has(&old) { old } else { new }
        };
        let (gain_name, bias_name) = (current("weight", "gamma"), current("bias", "beta"));
        let gain = self.vector(&gain_name, width)?;
        let shift = if bias { Some(self.vector(&bias_name, width)?) } else { None };
        let norm = Norm::declare(&mut self.sites, (path, &name), layer, gain, shift, eps as f32);
        self.sites.set_tensor(&format!("{path}.weight"), gain_name);
        self.sites.set_tensor(&format!("{path}.bias"), bias_name);
        Ok(norm)
    }

    /// A table that is looked up; `tied` also makes it a matrix to multiply by.
    pub fn embedding(
        &mut self,
        path: &str,
        role: Role,
        shape: (usize, usize),
        tied: bool,
    ) -> Result<Embedding> {
        let module = self.name(path);
        self.table((path, &module), role, shape, tied)
    }

    /// The table `module` of the files as the site `path`.
    fn table(
        &mut self,
        (path, module): (&str, &str),
        role: Role,
        (rows, width): (usize, usize),
        tied: bool,
    ) -> Result<Embedding> {
        let name = format!("{module}.weight");
        let weight = match self.take(&name, &[rows, width]) {
            None => Arc::new(Weight::table(Arc::new(Absent((rows, width))), None)),
            Some(raw) => {
                let precision = tied.then_some(self.options.precision);
                let key = self.key(&name, (0, rows), None, precision);
                self.options
                    .packed
                    .get(key, || Ok(Weight::table(Arc::new(FileRows::new(&name, &raw)?), precision)))?
            }
        };
        self.count(Part::Embedding, weight.bytes());
        Ok(Embedding::declare(&mut self.sites, (path, module), role, weight))
    }

    /// The table at `path` that several modules share: the files call it `shared`, or hold one under each path. Where they
    /// hold both, with different values, the module has its own, as in `transformers`.
    pub fn shared_embedding(
        &mut self,
        path: &str,
        shared: &str,
        role: Role,
        shape: (usize, usize),
        tied: bool,
    ) -> Result<Embedding> {
        let common = self.shares(path, shared);
        let module = self.name(if common { shared } else { path });
        let own = format!("{}.weight", self.name(path));
        self.used.insert(own);
        self.table((path, &module), role, shape, tied)
    }

    /// Whether the table at `path` is the one called `shared`: the files hold no other values under its own name.
    pub fn shares(&self, path: &str, shared: &str) -> bool {
        let [own, common] = [path, shared].map(|path| format!("{}.weight", self.name(path)));
        !self.has(&own) || self.has(&common) && self.same(&own, &common)
    }

    /// The weight of a language-model head: the embedding's where `tied`, else one of its own.
    pub fn decoder(
        &mut self,
        path: &str,
        embedding: Option<(&Embedding, &str)>,
        shape: (usize, usize),
    ) -> Result<(Arc<Weight>, String)> {
        match embedding {
            Some((embedding, embedding_path)) => {
                self.used.insert(format!("{path}.weight"));
                Ok((embedding.weight().clone(), format!("{}.weight", self.name(embedding_path))))
            }
            None => {
                let name = format!("{}.weight", self.name(path));
                Ok((self.matrix(&name, shape, Part::Head)?, name))
            }
        }
    }

    /// Whether the head at `path` shares the embedding: the config says so, and the file holds no other values for it.
    pub fn tied(&self, flag: bool, path: &str, embedding_path: &str) -> bool {
        let (own, shared) =
            (format!("{}.weight", self.name(path)), format!("{}.weight", self.name(embedding_path)));
        flag && (!self.has(&own) || self.same(&own, &shared))
    }
}

/// The path that older names have for `path`.
fn older(path: &str, renamed: Renamed) -> String {
    renamed.iter().fold(path.to_owned(), |path, (current, older)| path.replace(current, older))
}
