//! FRoD's kinds of targets, the basis that one has in common, and a weight in it.

use std::collections::BTreeMap;

use engraft_nn::weight::Weight;
use engraft_nn::{Base, Error, Result, Site};
use engraft_tensor::ops::cat;
use engraft_tensor::{Tensor, linalg};

use super::INFO;
use crate::shared::{matrices, orthogonal};

/// Targets with a basis in common.
pub(super) struct Kind<'s> {
    pub sites: Vec<&'s Site>,
    /// Those that the basis is made of, by block: of several with one number, the last.
    pub makers: BTreeMap<usize, &'s Site>,
    pub width: usize,
}

/// The kinds of the targets by name, in the order in which `peft` draws for them.
pub(super) fn kinds(targets: Vec<&Site>) -> Result<BTreeMap<String, Kind<'_>>> {
    let mut kinds: BTreeMap<String, Kind<'_>> = BTreeMap::new();
    for (number, site) in targets.into_iter().enumerate() {
        let (_, width) = matrices::linear(site, INFO.title)?;
        let name = kind_of(&site.path);
        let new = Kind { sites: Vec::new(), makers: BTreeMap::new(), width };
        let kind = kinds.entry(name.clone()).or_insert(new);
        if kind.width != width {
            let message = format!(
                "its inputs are {width} numbers, those of other targets of the kind {name} {}; leave one of them out of the targets",
                kind.width
            );
            return Err(Error::Site { path: site.path.clone(), message });
        }
        kind.sites.push(site);
        kind.makers.insert(block_of(&site.path).unwrap_or(number), site);
    }
    Ok(kinds)
}

/// `peft`'s name of a target's kind: the last two parts of its path, one of them where a number precedes it.
pub(super) fn kind_of(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    match parts[..] {
        [.., "attention", "output", "dense"] => "attention_output".into(),
        [.., before, last] if !is_number(before) => format!("{before}_{last}"),
        [.., last] => last.into(),
        [] => String::new(),
    }
}

/// The number of a target's block, as `peft` finds it: what follows `layers`, else the first number in the path.
fn block_of(path: &str) -> Option<usize> {
    let mut parts = path.split('.').skip_while(|part| *part != "layers").skip(1);
    let after = parts.next().and_then(|part| part.parse().ok());
    after.or_else(|| path.split('.').find(|part| is_number(part)).and_then(|part| part.parse().ok()))
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
}

/// V [n, n] of weights with n columns.
pub(super) fn common_basis(weights: &[Tensor], ridge: f64) -> Result<Tensor> {
    let n = weights[0].width();
    let stacked = cat(&weights.iter().collect::<Vec<_>>(), 0)?;
    if stacked.dim(0) < n {
        return Ok(linalg::completed(&linalg::svd(&stacked)?.vt.t()?)?);
    }
    let (q, r) = linalg::qr(&stacked)?;
    let one = |value: f32| -> Result<Tensor> { Ok(orthogonal::identity(n)?.reshape([n, n])?.scale(value)?) };
    let (mut mean, mut from) = (Tensor::zeros([n, n]), 0);
    for w in weights {
        let slice = q.rows_between(from, from + w.dim(0))?;
        from += w.dim(0);
        let kept = slice.t_matmul(&slice)?.add(&one(ridge as f32)?)?;
        mean = mean.add(&linalg::solve_positive(&kept, &one(1.0)?)?.scale(1.0 / weights.len() as f32)?)?;
    }
    let (_, vectors) = linalg::symmetric_eigen(&mean)?;
    Ok(r.t_matmul(&vectors)?)
}

/// What follows from W and V: Uᵀ [in, out] with unit rows, and the diagonal of Λ₀.
pub(super) struct Parts {
    pub u: Tensor,
    pub start: Tensor,
}

impl Parts {
    pub fn new(weight: &Weight, v: &Tensor) -> Result<Parts> {
        let wt = weight.dense()?.t()?;
        let mut u = match linalg::solve(v, &wt) {
            Ok(u) => u,
            // Weights that leave out a direction: the pseudo-inverse, as `peft` has it.
            Err(_) => {
                let svd = linalg::svd(v)?;
                let least = 1e-6 * svd.s[0];
                let inverse = svd.s.iter().map(|&s| if s > least { 1.0 / s } else { 0.0 }).collect();
                let inverse = Tensor::from_vec(inverse, [svd.s.len(), 1])?;
                svd.vt.t_matmul(&svd.u.t_matmul(&wt)?.mul(&inverse)?)?
            }
        }
        .to_vec()?;
        let (n, out) = (wt.dim(0), wt.width());
        let mut start = Vec::with_capacity(n);
        for row in u.chunks_mut(out) {
            let norm = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            let by = if norm > 1e-12 { 1.0 / norm } else { 0.0 };
            row.iter_mut().for_each(|x| *x = (f64::from(*x) * by) as f32);
            start.push(norm as f32);
        }
        Ok(Parts { u: Tensor::from_vec(u, [n, out])?, start: Tensor::from_vec(start, [n])? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn kinds_and_blocks_are_those_of_paths() {
        for (path, kind, block) in [
            ("model.layers.3.self_attn.q_proj", "self_attn_q_proj", Some(3)),
            ("bert.encoder.layer.11.attention.output.dense", "attention_output", Some(11)),
            ("bert.encoder.layer.1.output.dense", "output_dense", Some(1)),
            ("decoder.block.2.layer.1.EncDecAttention.q", "EncDecAttention_q", Some(2)),
            ("heads.4.score", "score", Some(4)),
            ("heads.4", "heads_4", Some(4)),
            ("classifier", "classifier", None),
        ] {
            assert_eq!((kind_of(path).as_str(), block_of(path)), (kind, block));
        }
    }

    #[test]
    fn bases_are_those_of_peft_but_for_signs() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/random/frod.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let matrix = |v: &Value| {
            let rows: Vec<Vec<f32>> = serde_json::from_value(v.clone()).unwrap();
            Tensor::from_vec(rows.concat(), [rows.len(), rows[0].len()]).unwrap()
        };
        for case in file["bases"].as_array().unwrap() {
            let weights: Vec<Tensor> = case["weights"].as_array().unwrap().iter().map(matrix).collect();
            let expected = matrix(&case["basis"]);
            let found = common_basis(&weights, file["regularization_alpha"].as_f64().unwrap()).unwrap();
            let columns = |m: &Tensor| -> Vec<Vec<f32>> {
                m.t().unwrap().to_vec().unwrap().chunks(m.dim(0)).map(<[f32]>::to_vec).collect()
            };
            for (a, b) in columns(&found).iter().zip(columns(&expected)) {
                let sign = a.iter().zip(&b).map(|(a, b)| a * b).sum::<f32>().signum();
                let off = a.iter().zip(&b).map(|(a, b)| (a - sign * b).abs()).fold(0.0, f32::max);
                // `peft` takes them apart in single precision.
                let largest = b.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
                assert!(off < 2e-3 * largest, "{a:?} and {b:?}");
            }
        }
    }
}
