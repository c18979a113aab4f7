//! The state of a run at an optimizer boundary, to and from a checkpoint directory.
//!
//! `params.safetensors`: every parameter by name. `optim.safetensors`: `NAME.m`, `NAME.v`, and the
//! number of updates they are made of, `NAME.t`. `state.json`: the rest. The
//! schedule and the order of the data are functions of the step, random numbers of (seed, step, place): no state.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engraft_nn::Adapter;
use engraft_store::checkpoint::{Found, Manifest, Stamp, newest_valid, save};
use engraft_store::disk::RealDisk;
use engraft_store::{Body, Entry, Limits, Weights, read_json};
use engraft_tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprint;
use crate::optimizer::Optimizer;
use crate::{Error, Result};

const PARAMS: &str = "params.safetensors";
const OPTIM: &str = "optim.safetensors";
const STATE: &str = "state.json";
const STATE_BYTES_MAX: u64 = 1 << 20;

/// What a run knows beside its tensors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps done.
    pub step: u64,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Evaluations since then.
    pub evals_without_better: u64,
    /// Sum of the losses of all steps.
    pub loss_sum: f64,
    /// Tokens read.
    pub tokens: u64,
    /// Seconds of training and evaluation.
    pub seconds: f64,
    /// What fixes the bits.
    pub fingerprint: Fingerprint,
}

/// An evaluation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps done.
    pub step: u64,
    /// The metric. As text, since JSON readers may round a number, and equal values decide.
    #[serde(with = "exact")]
    pub value: f64,
}

mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{value:?}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// Writes the checkpoint `state.step`. Returns its directory.
pub fn write(
    dir: &Path,
    run: &str,
    plan: &str,
    state: &State,
    adapter: &Adapter,
    optimizer: &Optimizer,
) -> Result<PathBuf> {
    let params = entries(adapter.params().iter().map(|p| (p.name.clone(), p.param.value())))?;
    let mut moments = Vec::new();
    for slot in &optimizer.slots {
        let updates = Tensor::from_i64(vec![slot.updates as i64], [1])?;
        let of = |kind: &str| format!("{}.{kind}", slot.name);
        moments.extend([
            (of("m"), slot.moments.m.clone()),
            (of("v"), slot.moments.v.clone()),
            (of("t"), updates),
        ]);
    }
    let moments = entries(moments.into_iter())?;
    let text = serde_json::to_string_pretty(state).map_err(|e| Error::Resume(e.to_string()))?;
    let none = BTreeMap::new();
    let files = [
        (PARAMS, Body::safetensors(&params, &none)?),
        (OPTIM, Body::safetensors(&moments, &none)?),
        (STATE, Body::bytes(text.into_bytes())),
    ];
    let stamp =
        Stamp { run: run.into(), step: state.step, plan: plan.into(), fingerprint: state.fingerprint.hash() };
    Ok(save(&RealDisk, dir, &stamp, &files)?)
}

/// Bytes that [`write()`] takes, about.
pub fn bytes(adapter: &Adapter) -> u64 {
    let all: usize = adapter.params().iter().map(|p| p.param.value().len()).sum();
    (4 * all + 8 * adapter.trained_count() + 4096) as u64
}

fn entries(tensors: impl Iterator<Item = (String, Tensor)>) -> Result<Vec<Entry<'static>>> {
    tensors.map(|(name, tensor)| crate::tensors::entry(name, &tensor)).collect()
}

/// The newest checkpoint that is whole and fits: sets adapter and optimizer, gives the state.
///
/// # Errors
/// None verifies; each is listed with the reason.
pub fn resume(
    dir: &Path,
    plan: &str,
    adapter: &Adapter,
    optimizer: &mut Optimizer,
) -> Result<(Found, State)> {
    let found = newest_valid(&RealDisk, dir, |path, manifest| {
        read(path, manifest, plan, adapter, optimizer).map(|_| ()).map_err(|e| e.to_string())
    })?;
    let read = read(&found.path, &found.manifest, plan, adapter, optimizer)?;
    for (p, value) in adapter.params().iter().zip(read.params) {
        p.param.set(value)?;
    }
    for (slot, (m, v, updates)) in optimizer.slots.iter_mut().zip(read.moments) {
        (slot.moments.m, slot.moments.v, slot.updates) = (m, v, updates);
    }
    Ok((found, read.state))
}

/// Sets the parameters of `adapter` from the checkpoint in `path`, verified before by its hashes.
pub fn restore_params(path: &Path, adapter: &Adapter) -> Result<()> {
    engraft_store::checkpoint::verify(&RealDisk, path)?;
    let file = path.join(PARAMS);
    let weights = Weights::open_file(&file, &Limits::default())?;
    for p in adapter.params() {
        p.param.set(tensor(&file, &weights, &p.name, p.param.value().shape())?)?;
    }
    Ok(())
}

struct Read {
    params: Vec<Tensor>,
    moments: Vec<(Tensor, Tensor, u64)>,
    state: State,
}

fn read(
    path: &Path,
    manifest: &Manifest,
    plan: &str,
    adapter: &Adapter,
    optimizer: &Optimizer,
) -> Result<Read> {
    let limits = Limits::default();
    if manifest.stamp.plan != plan {
        return Err(Error::Resume("it belongs to another recipe".into()));
    }
    let (params_file, optim_file) = (path.join(PARAMS), path.join(OPTIM));
    let state = read_json(&path.join(STATE), "checkpoint_state", STATE_BYTES_MAX, 16)?;
    let state: State = serde_json::from_value(state).map_err(|e| Error::Resume(format!("{STATE}: {e}")))?;
    if state.step != manifest.stamp.step {
        return Err(Error::Resume(format!("{STATE} is of step {}", state.step)));
    }
    let params = Weights::open_file(&params_file, &limits)?;
    let optim = Weights::open_file(&optim_file, &limits)?;
    if params.len() != adapter.params().len() || optim.len() != 3 * optimizer.slots.len() {
        let text = format!("expected {} parameters, found {}", adapter.params().len(), params.len());
        return Err(Error::Resume(text));
    }
    let of = |p: &engraft_nn::NamedParam| tensor(&params_file, &params, &p.name, p.param.value().shape());
    let moments = optimizer.slots.iter().map(|s| {
        let shape = s.moments.m.shape();
        let moment =
            |kind, shape: &[usize]| tensor(&optim_file, &optim, &format!("{}.{kind}", s.name), shape);
        let updates = moment("t", &[1])?.to_i64()?;
        Ok((moment("m", shape)?, moment("v", shape)?, updates.first().map_or(0, |&t| t as u64)))
    });
    Ok(Read {
        params: adapter.params().iter().map(of).collect::<Result<_>>()?,
        moments: moments.collect::<Result<_>>()?,
        state,
    })
}

fn tensor(file: &Path, weights: &Weights, name: &str, shape: &[usize]) -> Result<Tensor> {
    match weights.get(name) {
        Some(raw) if raw.shape == shape => crate::tensors::tensor(raw),
        other => {
            let found = other.map_or("absent".into(), |raw| format!("{:?}", raw.shape));
            Err(Error::Resume(format!("{}: {name}: expected {shape:?}, found {found}", file.display())))
        }
    }
}
