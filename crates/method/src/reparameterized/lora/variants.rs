//! KaSA and BD-LoRA: two forms that `peft` gives the product, with settings and tensors of their own.
//!
//! KaSA (Wang et al. 2024, arXiv:2412.06071): the r smallest singular values of W = U·Σ·Vᵀ are taken off it as noise, and the
//! product has singular values of its own, W′ = W − Uᵣ·Σᵣ·Vᵣᵀ + s·B·diag(d)·A. d `[rank]` starts normal, B zero, so the model
//! changes at the start. Added to the loss are β·‖d‖² and γ·(‖BᵀB − 1‖ + ‖AAᵀ − 1‖) of every matrix (equations 9 to 11).
//! What is taken off follows from W and is made again when a file is read.
//!
//! BD-LoRA (arXiv:2510.23346): A, or B, is block-diagonal, so that each part of a matrix that is served in n parts has factors
//! of its own. Saved are the blocks alone, below one another: A [rank, in/n], or B [out, rank/n].

use engraft_nn::{Adapter, Builder, Error, Init, Kind, Result, Site, few};
use engraft_tensor::linalg::svd;
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Param, Tensor, no_grad};
use serde_json::{Value, json};

use super::dora::site_weight;
use super::start::Pair;
use super::{Lora, factors::matrix};
use crate::read::{Reader, texts};

/// KaSA's weights of what is added to the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Kasa {
    pub beta: f64,
    pub gamma: f64,
}

/// Which matrices have blocks, and how many.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Blocks {
    /// Parts of the names of modules whose A has blocks.
    pub of_a: Vec<String>,
    /// The same of B.
    pub of_b: Vec<String>,
    pub count: usize,
    /// Whether every matrix must be one of the two.
    pub strict: bool,
}

impl Kasa {
    pub fn config(kasa: Option<Kasa>) -> Value {
        kasa.map_or(Value::Null, |k| json!({ "beta": k.beta, "gamma": k.gamma }))
    }

    /// `kasa_config` of a file.
    pub fn read(r: &mut Reader<'_>) -> Option<Kasa> {
        let found = r.value("kasa_config").cloned()?;
        let of = |key: &str, default: f64| match found.get(key) {
            None => Some(default),
            Some(value) => value.as_f64().filter(|v| *v >= 0.0),
        };
        let kasa = of("beta", 1e-4).zip(of("gamma", 1e-3)).map(|(beta, gamma)| Kasa { beta, gamma });
        if kasa.is_none() || !found.is_object() {
            r.problem(format!(
                "`kasa_config`: expected `beta` and `gamma`, numbers of at least 0, found {found}"
            ));
        }
        kasa
    }
}

impl Blocks {
    pub fn config(blocks: Option<&Blocks>) -> Value {
        blocks.map_or(Value::Null, |b| {
            let names = |names: &[String]| if names.is_empty() { Value::Null } else { json!(names) };
            json!({ "match_strict": b.strict, "nblocks": b.count, "target_modules_bd_a": names(&b.of_a),
                "target_modules_bd_b": names(&b.of_b) })
        })
    }

    /// `use_bdlora` of a file.
    pub fn read(r: &mut Reader<'_>) -> Option<Blocks> {
        let found = r.value("use_bdlora").cloned().filter(|v| *v != Value::Bool(false))?;
        let names = |key: &str| match found.get(key) {
            None | Some(Value::Null) => Some(vec![]),
            Some(list) => texts(list),
        };
        let count = found.get("nblocks").map_or(Some(1), Value::as_u64).filter(|n| (1..=1 << 16).contains(n));
        let strict = found.get("match_strict").map_or(Some(true), Value::as_bool);
        match (names("target_modules_bd_a"), names("target_modules_bd_b"), count, strict) {
            (Some(of_a), Some(of_b), Some(count), Some(strict)) if found.is_object() => {
                Some(Blocks { of_a, of_b, count: count as usize, strict })
            }
            _ => {
                r.problem(format!(
                    "`use_bdlora`: expected names, `nblocks` and `match_strict`, found {found}"
                ));
                None
            }
        }
    }

    /// An error where a part of a name is that of no module.
    pub fn check(&self, targets: &[&Site]) -> Result<()> {
        for (key, names) in [("blocks_of_a", &self.of_a), ("blocks_of_b", &self.of_b)] {
            let dead = |name: &&String| !targets.iter().any(|site| site.module().contains(name.as_str()));
            let Some(name) = names.iter().find(dead) else { continue };
            let mut modules: Vec<String> = targets.iter().map(|site| site.module().to_owned()).collect();
            modules.sort();
            modules.dedup();
            return Err(Error::Unsupported(format!(
                "`{key}`: `{name}` is part of the name of no target; these are {}",
                few(&modules)
            )));
        }
        Ok(())
    }

    /// Blocks of A and of B at a module; one is a whole matrix.
    pub fn at(&self, site: &Site, [out, inn]: [usize; 2], rank: usize) -> Result<[usize; 2]> {
        let named = |names: &[String]| names.iter().any(|name| site.module().contains(name.as_str()));
        let n = self.count;
        let message = match (named(&self.of_a), named(&self.of_b)) {
            (true, true) => "its A and its B are both to have blocks; name it in one list".to_owned(),
            (false, false) if self.strict => {
                "neither its A nor its B is to have blocks; name it in a list, or leave it out of the targets"
                    .to_owned()
            }
            (true, false) if inn.is_multiple_of(n) && rank.is_multiple_of(n) => return Ok([n, 1]),
            (false, true) if out.is_multiple_of(n) && rank.is_multiple_of(n) => return Ok([1, n]),
            (false, false) => return Ok([1, 1]),
            (of_a, _) => {
                let width = if of_a { inn } else { out };
                format!("{n} blocks do not divide its {width} numbers and {rank} ranks")
            }
        };
        Err(Error::Site { path: site.path.clone(), message })
    }
}

/// Blocks [rows, width] below one another as a block-diagonal matrix [rows, count·width].
pub(super) fn spread(blocks: Tensor, count: usize) -> Result<Tensor> {
    if count == 1 {
        return Ok(blocks);
    }
    let (rows, width) = (blocks.dim(0), blocks.dim(1));
    let own = |i: usize| i % (count * width) / width == i / (count * width) / (rows / count);
    let mask = (0..rows * width * count).map(|i| if own(i) { 1.0 } else { 0.0 }).collect();
    Ok(cat(&vec![&blocks; count], 1)?.mul(&Tensor::from_vec(mask, [rows, count * width])?)?)
}

impl Lora {
    /// What KaSA takes off W, as A₀ = Vᵣᵀ and B₀ = Uᵣ·Σᵣ/s.
    pub(super) fn noise(&self, site: &Site, rank: usize, s: f32, plain: Pair) -> Result<Pair> {
        let refuse = |message: String| Err(Error::Site { path: site.path.clone(), message });
        if !matches!(site.kind, Kind::Linear { transposed: false, .. }) {
            return refuse(
                "KaSA is for linear layers that are not stored transposed; choose `init = \"pissa\"`".into(),
            );
        }
        let svd = no_grad(|| Ok::<_, Error>(svd(&site_weight(site)?)?))?;
        let all = svd.s.len();
        if rank >= all {
            return refuse(format!("KaSA needs a rank below {all} here, not {rank}"));
        }
        let values = Tensor::from_vec(svd.s[all - rank..].to_vec(), [1, rank])?.scale(1.0 / s)?;
        let a = svd.vt.rows_between(all - rank, all)?;
        let b = svd.u.narrow(1, all - rank, rank)?.mul(&values)?;
        Ok(Pair { taken: Some((Init::Values(a), Init::Values(b))), ..plain })
    }

    pub(super) fn attach_diagonal(&self, b: &mut Builder<'_>, path: &str, rank: usize) -> Result<Param> {
        b.param_in_group(&format!("{path}.lora_diag"), &[rank], Init::Normal(1.0), self.group(false))
    }

    /// β·‖d‖² + γ·(‖BᵀB − 1‖ + ‖AAᵀ − 1‖), summed over the matrices.
    pub(super) fn kasa_penalty(&self, adapter: &Adapter) -> Result<Option<Tensor>> {
        let Some(Kasa { beta, gamma }) = self.kasa else { return Ok(None) };
        let mut sum: Option<Tensor> = None;
        for p in adapter.params() {
            let Some(path) = p.name.strip_suffix(".lora_diag") else { continue };
            let of = |end: &str| {
                adapter.params().iter().find(|p| p.name == format!("{path}.{end}")).map(|p| &p.param)
            };
            let (Some(a), Some(b)) = (of("lora_A.weight"), of("lora_B.weight")) else { continue };
            let (a, b) = (matrix(a)?, matrix(b)?);
            let squares = |t: Tensor| t.unary(Unary::Square)?.sum();
            let n = a.dim(0);
            let one = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
            let one = Tensor::from_vec(one, [n, n])?;
            let off = |gram: Tensor| squares(gram.sub(&one)?)?.unary(Unary::Sqrt);
            let apart = off(b.t_matmul(&b)?)?.add(&off(a.matmul_t(&a)?)?)?.scale(gamma as f32)?;
            let own = squares(p.param.get())?.scale(beta as f32)?.add(&apart)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&own)?,
                None => own,
            });
        }
        Ok(sum)
    }
}
