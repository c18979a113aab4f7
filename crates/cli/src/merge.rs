//! The tensors of a model directory with an adapter folded in.
//!
//! Every tensor of the files is written again in its own type or in one that was asked for, changed ones as W′ rounded to
//! that type, one at a time.
//! Two things need more. A head that shares its tensor with the embedding gets one of its own when the two change
//! differently. A head that the files do not have (a classifier that was trained from random) is added; then the other
//! tensors get the prefix of the class that has such a head, as `transformers` expects.

use std::cell::RefCell;
use std::collections::BTreeMap;

use engraft_model::{Architecture, ties_by_values};
use engraft_nn::{Adapter, Base, Kind, Site, Sites, Value as Frozen, mergeable_sites, merged_tensor};
use engraft_store::{Dtype, Entry, RawTensor, Weights};
use engraft_tensor::Tensor;
use serde_json::{Map, Value, json};

use crate::engine::Engine;
use crate::failure::{Failure, Outcome};

/// Where a tensor of the merged model comes from.
#[derive(Clone)]
enum Source<'a> {
    /// The file, unchanged.
    File(&'a RawTensor),
    /// A site's value with the adapter folded in, in the type of the file.
    Merged(&'a Site, Dtype, Vec<usize>),
    /// The values of sites that the file holds in one tensor, one after another, with the adapter folded in.
    Pieces(Vec<&'a Site>, Dtype, Vec<usize>),
    /// A site's own value, where the files have none.
    Own(&'a Site),
}

/// What the merged model consists of.
pub struct Merge<'a> {
    sites: &'a Sites,
    adapter: &'a Adapter,
    /// What numbers are written in, instead of the type that each has in the files.
    dtype: Option<Dtype>,
    /// By name in the merged files.
    tensors: BTreeMap<String, Source<'a>>,
    /// Number of tensors that changed.
    pub changed: usize,
    /// A head that no longer shares the embedding's tensor.
    pub untied: Option<String>,
    /// Tensors that the files did not have.
    pub added: Vec<String>,
    /// The first tensor that could not be made while writing.
    failed: RefCell<Option<String>>,
}

impl<'a> Merge<'a> {
    /// Looks at every tensor.
    ///
    /// # Errors
    /// Sites that cannot be folded into weights; all of them are listed.
    pub fn new(
        engine: &'a Engine,
        adapter: &'a Adapter,
        weights: &'a Weights,
        dtype: Option<Dtype>,
    ) -> Outcome<Merge<'a>> {
        let sites = engine.model.sites();
        let patched = mergeable_sites(sites, adapter).map_err(|error| {
            Failure::before_work(format!(
                "the adapter cannot be merged; load it beside the base instead\n{error}"
            ))
        })?;
        let mut merge = Merge {
            sites,
            adapter,
            dtype,
            tensors: weights.iter().map(|(name, raw)| (name.to_owned(), Source::File(raw))).collect(),
            changed: patched.len(),
            untied: None,
            added: Vec::new(),
            failed: RefCell::new(None),
        };
        let own_name = |site: &Site| match site.kind {
            Kind::Vector { .. } => site.path.clone(),
            _ => format!("{}.weight", site.path),
        };
        for site in &patched {
            let Some(name) = site.tensor.as_deref() else { continue };
            let sharing: Vec<&Site> = sites.iter().filter(|s| s.tensor.as_deref() == Some(name)).collect();
            // A head of another size than the files' is new.
            let Some(raw) = weights.get(name).filter(|_| !is_new(engine, name)) else { continue };
            if site.rows.is_some() {
                merge.tensors.insert(name.to_owned(), Source::Pieces(sharing, raw.dtype, raw.shape.clone()));
                continue;
            }
            let is_first = sharing.first().is_some_and(|first| first.id == site.id);
            let same = merge.same_change(&sharing)?;
            if is_first || same {
                let source = Source::Merged(site, raw.dtype, raw.shape.clone());
                // Files may hold the shared tensor again under the names of those that share it.
                let follow = sharing.iter().filter(|s| same || s.id == site.id).map(|s| own_name(s));
                for copy in follow.filter(|copy| weights.get(copy).is_some()) {
                    merge.tensors.insert(copy, source.clone());
                }
                merge.tensors.insert(name.to_owned(), source);
            } else {
                merge.tensors.insert(own_name(site), Source::Merged(site, raw.dtype, raw.shape.clone()));
                merge.untied = Some(own_name(site));
            }
        }
        merge.untie_unchanged_heads(engine, &patched, weights, &own_name);
        merge.give_untied_decoder_its_bias(engine);
        merge.add_new(engine, weights);
        Ok(merge)
    }

    /// Heads and tables that stay as they were while the tensor that they share has changed get one of their own.
    fn untie_unchanged_heads(
        &mut self,
        engine: &'a Engine,
        patched: &[&Site],
        weights: &'a Weights,
        own_name: &dyn Fn(&Site) -> String,
    ) {
        let sites = engine.model.sites();
        let changes = |site: &Site| patched.iter().any(|p| p.id == site.id);
        for site in sites.iter().filter(|s| s.rows.is_none() && !changes(s)) {
            let sharing = |s: &&Site| s.tensor.is_some() && s.tensor == site.tensor;
            let Some(changed) = patched.iter().copied().find(sharing) else { continue };
            let Some(raw) = site.tensor.as_deref().and_then(|name| weights.get(name)) else { continue };
            match sites.iter().find(sharing) {
                // `new` has written the first one's change under the shared name.
                Some(first) if changes(first) => {
                    self.tensors.insert(own_name(site), Source::File(raw));
                    self.untied = Some(own_name(site));
                }
                // The shared tensor stays, and what has changed was given a name of its own.
                _ => self.untied = Some(own_name(changed)),
            }
        }
    }

    /// The bias of a masked-word head lies beside its decoder; once untied, the decoder has one of that value in itself.
    fn give_untied_decoder_its_bias(&mut self, engine: &Engine) {
        let Some(decoder) = self.untied.as_deref().and_then(|name| name.strip_suffix(".decoder.weight"))
        else {
            return;
        };
        let (outer, inner) = (format!("{decoder}.bias"), format!("{decoder}.decoder.bias"));
        let bias = engine.model.sites().iter().find(|site| site.path == outer);
        let source = bias.and_then(|site| self.tensors.get(site.tensor.as_deref()?)).cloned();
        if let Some(source) = source {
            self.tensors.insert(inner, source);
        }
    }

    /// Whether sites that share a tensor all change, and to the same values.
    fn same_change(&self, sharing: &[&Site]) -> Outcome<bool> {
        if sharing.iter().any(|site| self.adapter.at(site.id).is_empty()) {
            return Ok(false);
        }
        let mut first: Option<Vec<f32>> = None;
        for site in sharing {
            let values = merged_tensor(self.sites, site, self.adapter)?.value.to_vec()?;
            match &first {
                Some(first) if *first != values => return Ok(false),
                Some(_) => {}
                None => first = Some(values),
            }
        }
        Ok(true)
    }

    /// Adds the tensors of sites that the files do not have, and the prefix that goes with them.
    fn add_new(&mut self, engine: &'a Engine, weights: &Weights) {
        let sites = engine.model.sites();
        let absent = |site: &&Site| {
            site.tensor.as_deref().is_some_and(|name| weights.get(name).is_none() || is_new(engine, name))
        };
        for site in sites.iter().filter(absent) {
            let name = site.tensor.clone().unwrap_or_default();
            let source = match self.adapter.at(site.id).is_empty() {
                true => Source::Own(site),
                false => Source::Merged(site, Dtype::F32, Vec::new()),
            };
            self.added.push(name.clone());
            self.tensors.insert(name, source);
        }
        let prefix = sites.iter().filter(|s| s.is_weight()).find_map(|site| {
            let name = site.tensor.as_deref()?.strip_suffix(".weight")?;
            weights.get(site.tensor.as_deref()?)?;
            site.path.strip_suffix(name).filter(|prefix| !prefix.is_empty()).map(str::to_owned)
        });
        if let (false, Some(prefix)) = (self.added.is_empty(), prefix) {
            let all = std::mem::take(&mut self.tensors).into_iter();
            let added = &self.added;
            let renamed = |name: String| if added.contains(&name) { name } else { format!("{prefix}{name}") };
            self.tensors = all.map(|(name, source)| (renamed(name), source)).collect();
        }
    }

    /// The tensors to write, each made when its turn comes; ask [`Merge::finish`] afterwards.
    pub fn entries(&self) -> Outcome<Vec<Entry<'_>>> {
        self.tensors.iter().map(|(name, source)| self.entry(name, source)).collect()
    }

    fn entry<'s>(&'s self, name: &str, source: &'s Source<'a>) -> Outcome<Entry<'s>> {
        Ok(match source {
            Source::File(raw) if self.written(raw.dtype) == raw.dtype => {
                Entry::new(name, raw.dtype, &raw.shape, raw.bytes())
            }
            Source::File(raw) => {
                let dtype = self.written(raw.dtype);
                let make =
                    move || raw.to_f32().map_err(|e| e.to_string()).and_then(|v| self.rounded(&v, dtype));
                self.made(name, name, dtype, &raw.shape, make)
            }
            Source::Own(site) => {
                let (value, dtype) = (own_value(site)?, self.written(Dtype::F32));
                Entry::new(name, dtype, value.shape(), bytes(&value.to_vec()?, dtype)?)
            }
            Source::Merged(site, dtype, shape) if shape.is_empty() => {
                let (value, dtype) =
                    (merged_tensor(self.sites, site, self.adapter)?.value, self.written(*dtype));
                Entry::new(name, dtype, value.shape(), bytes(&value.to_vec()?, dtype)?)
            }
            Source::Merged(site, dtype, shape) => {
                self.lazy(name, std::slice::from_ref(site), self.written(*dtype), shape)
            }
            Source::Pieces(sites, dtype, shape) => self.lazy(name, sites, self.written(*dtype), shape),
        })
    }

    /// The type that a tensor of the files is written in.
    fn written(&self, dtype: Dtype) -> Dtype {
        let is_float = matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::BF16 | Dtype::F16);
        self.dtype.filter(|_| is_float).unwrap_or(dtype)
    }

    /// A tensor that `make` gives when it is written; what goes wrong then is kept for [`Merge::finish`].
    fn made<'s>(
        &'s self,
        name: &str,
        place: &str,
        dtype: Dtype,
        shape: &[usize],
        make: impl Fn() -> Result<Vec<u8>, String> + 's,
    ) -> Entry<'s> {
        let place = place.to_owned();
        Entry::lazy(name, dtype, shape, move || {
            make().unwrap_or_else(|message| {
                self.failed.borrow_mut().get_or_insert(format!("{place}: {message}"));
                Vec::new()
            })
        })
    }

    /// Finite values in a type.
    fn rounded(&self, values: &[f32], dtype: Dtype) -> Result<Vec<u8>, String> {
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(format!("element {at} of the merged tensor is {}", values[at]));
        }
        bytes(values, dtype).map_err(|failure| failure.text())
    }

    /// The merged values of `sites`, one after another, made when they are written.
    fn lazy<'s>(&'s self, name: &str, sites: &'s [&'a Site], dtype: Dtype, shape: &[usize]) -> Entry<'s> {
        let place = sites.first().map_or("", |site| site.path.as_str());
        self.made(name, place, dtype, shape, move || {
            let parts = sites.iter().map(|site| self.merged_bytes(site, dtype));
            Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
        })
    }

    fn merged_bytes(&self, site: &Site, dtype: Dtype) -> Result<Vec<u8>, String> {
        let value = merged_tensor(self.sites, site, self.adapter).map_err(|e| e.to_string())?.value;
        self.rounded(&value.to_vec().map_err(|e| e.to_string())?, dtype)
    }

    /// Fails if a tensor could not be made while the entries were written.
    pub fn finish(&self, written: engraft_store::Result<()>) -> Outcome {
        match self.failed.borrow_mut().take() {
            // The files hold what cannot be merged, or not in the type that was asked for.
            Some(message) => Err(Failure::before_work(message)),
            None => Ok(written?),
        }
    }

    /// `config.json` of the merged model.
    pub fn config(&self, engine: &Engine) -> Value {
        let mut config = engine.config.as_object().cloned().unwrap_or_default();
        if self.untied.is_some() && !ties_by_values(&engine.config) {
            config.insert("tie_word_embeddings".into(), false.into());
        }
        if let Some(dtype) = self.dtype {
            // `transformers` 5 calls it dtype, 4 torch_dtype.
            let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            config.insert(key.into(), torch_name(dtype).into());
        }
        if !self.added.is_empty() {
            describe_head(&mut config, engine);
        }
        Value::Object(config)
    }
}

/// PyTorch's name of a type.
fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// Whether the files hold `name` for a head of another size, or not at all.
fn is_new(engine: &Engine, name: &str) -> bool {
    engine.new_tensors.iter().any(|new| new == name)
}

/// Names the class with the head that was added, and its labels.
fn describe_head(config: &mut Map<String, Value>, engine: &Engine) {
    let info = engine.model.info();
    // The trunk's class, or that of another head; a configuration that names none stays so.
    let present = config.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let class = Architecture::of(&engine.config).and_then(|a| a.class_for(info.task, present));
    if let (Some(_), Some(class)) = (present, class) {
        config.insert("architectures".into(), json!([class]));
    }
    if info.task.is_classification() {
        if config.contains_key("num_labels") {
            config.insert("num_labels".into(), info.outputs.into());
        }
        let has =
            config.get("id2label").and_then(Value::as_object).is_some_and(|map| map.len() == info.outputs);
        let known = engine.labels.as_ref().filter(|names| names.len() == info.outputs);
        if !has || known.is_some() {
            let name = |i: usize| known.map_or_else(|| format!("LABEL_{i}"), |names| names[i].clone());
            let names: Vec<(String, String)> = (0..info.outputs).map(|i| (i.to_string(), name(i))).collect();
            let id2label: Map<String, Value> =
                names.iter().map(|(i, n)| (i.clone(), n.as_str().into())).collect();
            let label2id: Map<String, Value> =
                names.iter().enumerate().map(|(i, (_, n))| (n.clone(), i.into())).collect();
            config.insert("id2label".into(), id2label.into());
            config.insert("label2id".into(), label2id.into());
        }
    }
}

fn own_value(site: &Site) -> Outcome<Tensor> {
    match &site.value {
        Frozen::Weight(weight) => Ok(weight.dense()?),
        Frozen::Vector(vector) => Ok(vector.clone()),
        Frozen::None => Err(Failure::running(format!("{}: holds no tensor to write", site.path))),
    }
}

/// Values in a file's type, rounded to nearest even.
fn bytes(values: &[f32], dtype: Dtype) -> Outcome<Vec<u8>> {
    match dtype {
        Dtype::F32 => Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Dtype::F64 => Ok(values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect()),
        Dtype::BF16 => Ok(values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()),
        Dtype::F16 => {
            let halves: Vec<half::f16> = values.iter().map(|v| half::f16::from_f32(*v)).collect();
            // A finite value beyond 65504 would become infinite.
            match halves.iter().position(|v| !v.is_finite()) {
                Some(at) => Err(Failure::running(format!("{} does not fit into f16", values[at]))),
                None => Ok(halves.iter().flat_map(|v| v.to_le_bytes()).collect()),
            }
        }
        other => {
            Err(Failure::running(format!("the file's type {other} holds no weights that can be merged")))
        }
    }
}
