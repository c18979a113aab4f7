//! Pairs of thin matrices at linear layers: A [rank, in] and B [out, rank], named and saved as LoRA's, for methods that
//! choose ranks or put several pairs together.

use engraft_nn::{Adapter, Base, Builder, Error, Init, Kind, Result, Site};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{as_written, number};

/// The largest rank that a recipe or a file may ask for.
pub(crate) const RANK_MAX: usize = 1 << 16;

/// (out, in) of a linear layer; elsewhere an error that says what to choose instead.
pub(crate) fn linear(site: &Site, title: &str) -> Result<(usize, usize)> {
    match site.kind {
        Kind::Linear { out, inn, .. } => Ok((out, inn)),
        _ => {
            let message = format!(
                "{title} changes linear layers; leave this one out of the targets, or choose `lora` for it"
            );
            Err(Error::Site { path: site.path.clone(), message })
        }
    }
}

/// A and B.
#[derive(Clone)]
pub(crate) struct Pair {
    /// [rank, in].
    pub a: Param,
    /// [out, rank].
    pub b: Param,
}

impl Pair {
    /// A Kaiming-uniform, B zero.
    pub fn new(b: &mut Builder<'_>, path: &str, (out, inn): (usize, usize), rank: usize) -> Result<Pair> {
        let a = b.param(&format!("{path}.lora_A.weight"), &[rank, inn], Init::kaiming(inn))?;
        Ok(Pair { a, b: b.param(&format!("{path}.lora_B.weight"), &[out, rank], Init::Zeros)? })
    }
}

/// W + s·B·A.
pub(crate) fn changed(base: &dyn Base, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    if a.is_empty() || b.is_empty() {
        return base.dense();
    }
    Ok(base.dense()?.add(&b.matmul(a)?.scale(scale)?)?)
}

/// y + s·(x·Aᵀ)·Bᵀ.
pub(crate) fn added(y: Tensor, x: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> Result<Tensor> {
    if a.is_empty() || b.is_empty() {
        return Ok(y);
    }
    Ok(y.add_low_rank(x, a, b, scale)?)
}

/// The parameter called `name`.
pub(crate) fn named<'a>(adapter: &'a Adapter, name: &str) -> Result<&'a Param> {
    let found = adapter.params().iter().find(|p| p.name == name);
    found.map(|p| &p.param).ok_or_else(|| Error::Unsupported(format!("the adapter has no `{name}`")))
}

/// The parameters whose names end in `end`, each with what comes before it. An error where they belong to two methods of
/// one adapter: each would take the other's for its own.
pub(crate) fn ending<'a>(adapter: &'a Adapter, end: &str) -> Result<Vec<(&'a str, &'a Param)>> {
    let found: Vec<(&str, &Param)> =
        adapter.params().iter().filter_map(|p| Some((p.name.strip_suffix(end)?, &p.param))).collect();
    let owner = |stem: &str| number_of(stem).map(|(n, _)| n);
    if found.iter().any(|(stem, _)| owner(stem) != owner(found[0].0)) {
        let text = format!("two methods of this adapter train tensors called `{end}`; use one of them");
        return Err(Error::Unsupported(text));
    }
    Ok(found)
}

/// The number that precedes a name in an adapter of several methods, and the rest.
fn number_of(name: &str) -> Option<(usize, &str)> {
    let (number, rest) = name.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// The path of a module in a name of an adapter that may hold several methods.
pub(crate) fn own_path(stem: &str) -> &str {
    number_of(stem).map_or(stem, |(_, rest)| rest)
}

/// The rows of t that `keep` marks.
pub(crate) fn kept_rows(t: &Tensor, keep: &[bool]) -> Result<Tensor> {
    let index: Vec<i64> = (0i64..).zip(keep).filter(|(_, keep)| **keep).map(|(i, _)| i).collect();
    let count = index.len();
    Ok(t.gather(&Tensor::from_i64(index, [count])?)?)
}

/// The columns of a matrix that `keep` marks.
pub(crate) fn kept_columns(t: &Tensor, keep: &[bool]) -> Result<Tensor> {
    let rows = kept_rows(&t.t()?, keep)?;
    if rows.is_empty() { Ok(Tensor::zeros([t.dim(0), 0])) } else { Ok(rows.t()?) }
}

/// Makes the numbers `gates` part of the rows of A at `stem`, and drops the ranks where they are zero. One rank stays in any
/// case, as a LoRA must have one: where all are zero, one that does nothing.
pub(crate) fn fold_gates(adapter: &Adapter, stem: &str, gates: &Tensor) -> Result<()> {
    let mut keep: Vec<bool> = gates.to_vec()?.iter().map(|g| *g != 0.0).collect();
    if let (false, Some(first)) = (keep.contains(&true), keep.first_mut()) {
        *first = true;
    }
    let a = named(adapter, &format!("{stem}.lora_A.weight"))?;
    let b = named(adapter, &format!("{stem}.lora_B.weight"))?;
    a.replace(kept_rows(&rows_times(&a.value(), gates)?, &keep)?);
    b.replace(kept_columns(&b.value(), &keep)?);
    Ok(())
}

/// ‖gram − I‖, whose gradient is zero where it is.
pub(crate) fn off_identity(gram: &Tensor) -> Result<Tensor> {
    let rank = gram.dim(0);
    if rank == 0 {
        return Ok(Tensor::scalar(0.0));
    }
    let ones = (0..rank * rank).map(|i| if i % (rank + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let off = gram.sub(&Tensor::from_vec(ones, [rank, rank])?)?;
    Ok(off.unary(Unary::Square)?.sum()?.unary(Unary::Shift(1e-30))?.unary(Unary::Sqrt)?)
}

/// g ⊙ A: each row times its number.
pub(crate) fn rows_times(a: &Tensor, g: &Tensor) -> Result<Tensor> {
    Ok(a.mul(&g.reshape([g.len(), 1])?)?)
}

/// The ranks of the matrices, those that have a parameter ending in `end`, whose rank is not `rank`.
pub(crate) fn other_ranks(adapter: &Adapter, end: &str, rank: usize) -> Vec<(String, usize)> {
    let mut ranks = Vec::new();
    for (stem, _) in ending(adapter, end).unwrap_or_default() {
        let a = named(adapter, &format!("{stem}.lora_A.weight"));
        let own = a.map_or(rank, |a| a.value().dim(0));
        ranks.extend((own != rank).then(|| (own_path(stem).to_owned(), own)));
    }
    ranks
}

/// Keys of `peft`'s LoRA that hold nothing unless a variant is on.
pub(crate) const UNUSED: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
];

/// A plain LoRA's own keys of `adapter_config.json`. `ranks` are those of modules that have another than `rank`; the scale
/// alpha/rank holds for all of them.
pub(crate) fn plain_lora(
    rank: usize,
    alpha: f64,
    dropout: f32,
    ranks: &[(String, usize)],
) -> Map<String, Value> {
    let mut map: Map<String, Value> = UNUSED.iter().map(|k| (k.to_string(), Value::Null)).collect();
    let rank_pattern: Map<String, Value> = ranks.iter().map(|(path, r)| (path.clone(), json!(r))).collect();
    let scaled = |r: usize| number(alpha * r as f64 / rank as f64);
    let alpha_pattern: Map<String, Value> =
        ranks.iter().map(|(path, r)| (path.clone(), scaled(*r))).collect();
    let own = json!({
        "alpha_pattern": alpha_pattern, "bias": "none", "ensure_weight_tying": false, "fan_in_fan_out": false,
        "init_lora_weights": true, "loftq_config": {}, "lora_alpha": number(alpha), "lora_bias": false,
        "lora_dropout": as_written(dropout), "megatron_core": "megatron.core", "qalora_group_size": 16, "r": rank,
        "rank_pattern": rank_pattern, "use_dora": false, "use_qalora": false, "use_rslora": false,
    });
    map.extend(own.as_object().cloned().unwrap_or_default());
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn keys_of_a_plain_lora_are_those_of_peft() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/cases/llama__lora/adapter/adapter_config.json"
        );
        let theirs: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let ours = plain_lora(4, 8.0, 0.0, &[]);
        for (key, value) in &ours {
            assert_eq!(theirs.get(key), Some(value), "{key}");
        }
        // What is left is the header and the targets.
        assert_eq!(theirs.as_object().unwrap().len() - ours.len(), 10);
        let pruned = plain_lora(8, 16.0, 0.0, &[("a.q".into(), 3)]);
        assert_eq!((&pruned["rank_pattern"]["a.q"], &pruned["alpha_pattern"]["a.q"]), (&json!(3), &json!(6)));
    }

    #[test]
    fn rows_and_columns_are_kept() {
        let t = sample(&[3, 2], 1);
        let keep = [true, false, true];
        let rows = kept_rows(&t, &keep).unwrap();
        close(&rows.rows_between(1, 2).unwrap(), &t.rows_between(2, 3).unwrap(), 0.0);
        close(&kept_columns(&t.t().unwrap(), &keep).unwrap(), &rows.t().unwrap(), 0.0);
        assert_eq!(kept_columns(&t.t().unwrap(), &[false; 3]).unwrap().shape(), [2, 0]);
        assert_eq!(kept_rows(&t, &[false; 3]).unwrap().shape(), [0, 2]);
        assert_eq!((own_path("0.model.q"), own_path("model.q")), ("model.q", "model.q"));
    }
}
