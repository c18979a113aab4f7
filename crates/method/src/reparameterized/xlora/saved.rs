//! Saved LoRAs that X-LoRA scales, packed one after another.
//!
//! All have the largest rank among them, the others with zeros behind their own. Where their scales α/r differ, each has its own in B.

use std::collections::BTreeMap;

use engraft_nn::{Error, Init, Result, Site, Targets, few};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;
use serde_json::Value;

use crate::SavedAdapter;
use crate::algebra::Scales;

const ENDS: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
/// Keys that say more of an adapter than its factors, or that its base was changed.
const MORE: [&str; 11] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
];
/// `init_lora_weights` that leave the base as it is.
const STARTS: [&str; 4] = ["gaussian", "eva", "orthogonal", "random"];

/// The factors of several adapters.
#[derive(Debug)]
pub(super) struct Packed {
    pub rank: usize,
    pub alpha: f64,
    paths: Vec<String>,
    /// A [rank, in] and B [out, rank] of each module, by adapter; `None` where it leaves the module alone.
    modules: BTreeMap<String, Vec<Option<[Tensor; 2]>>>,
}

impl Packed {
    /// # Errors
    /// What is no plain LoRA of linear layers.
    pub fn of(adapters: Vec<SavedAdapter>) -> Result<Packed> {
        let (mut problems, mut modules, mut scales) = (vec![], BTreeMap::new(), vec![]);
        let paths: Vec<String> = adapters.iter().map(|adapter| adapter.path.clone()).collect();
        for (number, adapter) in adapters.iter().enumerate() {
            match factors(adapter) {
                Ok(found) => {
                    let of = Scales::of(&adapter.config)?;
                    for (path, pair) in found {
                        scales.push((path.clone(), number, of.at(&path, pair[0].dim(0))));
                        modules.entry(path).or_insert_with(|| vec![None; paths.len()])[number] = Some(pair);
                    }
                }
                Err(what) => problems.push(format!("`adapters`: {} {what}", adapter.path)),
            }
        }
        if !problems.is_empty() {
            return Err(Error::Mismatch(problems));
        }
        let pairs = modules.values().flatten().flatten();
        let rank = pairs.map(|pair| pair[0].dim(0)).max().unwrap_or(1);
        let first = scales.first().map_or(1.0, |(.., scale)| *scale);
        let alike = scales.iter().all(|(.., scale)| *scale == first);
        for (path, number, scale) in scales.iter().filter(|_| !alike) {
            if let Some(Some([_, b])) = modules.get_mut(path).and_then(|own| own.get_mut(*number)) {
                *b = b.scale(*scale as f32)?;
            }
        }
        Ok(Packed { rank, alpha: if alike { first } else { 1.0 } * rank as f64, paths, modules })
    }

    /// The modules that any of them changes.
    pub fn targets(&self) -> Targets {
        Targets::names(self.modules.keys().cloned())
    }

    /// An error where one changes a module that is no target.
    pub fn check(&self, targets: &[&Site]) -> Result<()> {
        let is_target = |path: &&String| targets.iter().any(|site| site.path == **path);
        let left: Vec<String> = self.modules.keys().filter(|path| !is_target(path)).cloned().collect();
        match left.is_empty() {
            true => Ok(()),
            false => Err(Error::Unsupported(format!(
                "`adapters` change modules that are no targets: {}; leave `targets` out, so that all of them are",
                few(&left)
            ))),
        }
    }

    /// A [experts·rank, in] and B [out, experts·rank] of a site.
    pub fn at(&self, site: &Site, [out, inn]: [usize; 2]) -> Result<[Init; 2]> {
        let wrong = |message: String| Error::Site { path: site.path.clone(), message };
        let Some(own) = self.modules.get(&site.path) else {
            return Err(wrong("none of `adapters` changes it; leave it out of the targets".into()));
        };
        let (mut downs, mut ups) = (vec![], vec![]);
        for (pair, from) in own.iter().zip(&self.paths) {
            let rank = pair.as_ref().map_or(0, |[a, _]| a.dim(0));
            if let Some([a, b]) = pair {
                if (a.shape(), b.shape()) != (&[rank, inn], &[out, rank]) {
                    let found = (a.shape(), b.shape());
                    return Err(wrong(format!(
                        "expected factors [rank, {inn}] and [{out}, rank] in {from}, found {found:?}"
                    )));
                }
                downs.push(a.clone());
                ups.push(b.clone());
            }
            if rank < self.rank {
                downs.push(Tensor::zeros([self.rank - rank, inn]));
                ups.push(Tensor::zeros([out, self.rank - rank]));
            }
        }
        let all = |parts: &[Tensor], dim| cat(&parts.iter().collect::<Vec<_>>(), dim);
        Ok([Init::Values(all(&downs, 0)?), Init::Values(all(&ups, 1)?)])
    }
}

/// A and B of each module, or what stands against it.
fn factors(adapter: &SavedAdapter) -> std::result::Result<BTreeMap<String, [Tensor; 2]>, String> {
    let said = |key: &str| adapter.config.get(key).filter(|v| !v.is_null() && **v != Value::Bool(false));
    let kind = adapter.config.get("peft_type").and_then(Value::as_str).unwrap_or("none");
    if kind != "LORA" {
        return Err(format!("is no LoRA (its peft_type is {kind}); train it with `lora`"));
    }
    let filled = |v: &&Value| v.as_array().is_none_or(|list| !list.is_empty());
    if let Some(key) = MORE.iter().find(|key| said(key).filter(filled).is_some()) {
        return Err(format!("is more than a plain LoRA (`{key}`); train it without"));
    }
    if let Some(start) = said("init_lora_weights").and_then(Value::as_str).filter(|s| !STARTS.contains(s)) {
        return Err(format!("changes the base (`init_lora_weights` is {start}); convert it in peft first"));
    }
    let mut found: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
    for (key, tensor) in &adapter.tensors {
        let own = key.strip_prefix("base_model.model.").unwrap_or(key);
        let part = ENDS.iter().enumerate().find_map(|(at, end)| Some((at, own.strip_suffix(end)?)));
        let Some((at, path)) = part.filter(|_| tensor.shape().len() == 2) else {
            return Err(format!("holds {key}, and factors of linear layers alone can be scaled"));
        };
        found.entry(path.to_owned()).or_default()[at] = Some(tensor.clone());
    }
    let whole = |(path, [a, b]): (String, [Option<Tensor>; 2])| match (a, b) {
        (Some(a), Some(b)) if a.dim(0) > 0 => Ok((path, [a, b])),
        _ => Err(format!("holds one factor of {path} alone")),
    };
    found.into_iter().map(whole).collect()
}
