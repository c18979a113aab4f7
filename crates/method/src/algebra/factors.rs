//! The low-rank products of adapter files, module by module.

use std::borrow::Cow;
use std::collections::BTreeMap;

use engraft_nn::{Error, Result};
use engraft_tensor::Tensor;
use serde_json::Value;

use super::Term;
use super::tokens::{ROWS, Rows, aligned, of_rows};
use crate::Named;
use crate::read::{Pattern, Reader};
use crate::shared::parameters::pattern_name;

/// Largest rank that a file may name.
const RANK_MAX: usize = 65536;
/// What ends the keys of a matrix's factors, and of a table's.
pub(super) const ENDS: [(&str, &str); 2] =
    [(".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")];

/// Forms of a LoRA in training, by their keys, and what the names of tensors that these alone need hold.
pub(super) const FORMS: [(&str, &str); 2] =
    [("velora_config", ".lora_velora_embed"), ("monteclora_config", ".lora_monteclora_sampler.")];

/// s·B·A of one adapter at one module, windows of a convolution laid flat.
pub(crate) struct Factors {
    /// A [rank, in].
    pub a: Tensor,
    /// B [out, rank].
    pub b: Tensor,
    /// s.
    pub scale: f64,
}

impl Factors {
    /// s·B·A [out, in].
    pub fn change(&self) -> Result<Tensor> {
        Ok(self.b.matmul(&self.a)?.scale(self.scale as f32)?)
    }
}

/// A module and what each adapter does to it.
pub(crate) struct Module {
    /// Path of the module.
    pub path: String,
    /// What the names of its tensors begin with.
    pub key: String,
    ends: (&'static str, &'static str),
    /// Dimensions of A after the rank, of B after out and rank.
    tails: (Vec<usize>, Vec<usize>),
    /// By adapter; `None` where it leaves the module alone.
    pub factors: Vec<Option<Factors>>,
}

impl Module {
    /// Σ w·s·B·A [out, in].
    pub fn sum(&self, terms: &[Term]) -> Result<Tensor> {
        let mut sum: Option<Tensor> = None;
        for (factors, term) in self.factors.iter().zip(terms) {
            let Some(factors) = factors else { continue };
            let part = factors.change()?.scale(term.weight as f32)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&part)?,
                None => part,
            });
        }
        sum.ok_or_else(|| Error::Site { path: self.path.clone(), message: "no adapter changes it".into() })
    }

    /// The tensors of a file that holds A [rank, in] and B [out, rank].
    pub fn written(&self, a: Tensor, b: Tensor) -> Result<Named> {
        let (rank, out) = (a.dim(0), b.dim(0));
        let a = a.reshape([&[rank], &self.tails.0[..]].concat())?;
        let b = b.reshape([&[out, rank], &self.tails.1[..]].concat())?;
        Ok(vec![(format!("{}{}", self.key, self.ends.0), a), (format!("{}{}", self.key, self.ends.1), b)])
    }
}

/// What adapter files hold.
pub(crate) struct Found {
    pub modules: Vec<Module>,
    /// Biases of products, already added: s·c of each adapter times its weight.
    pub biases: Named,
    /// All else, by name, with the weights of the adapters that have it.
    pub others: BTreeMap<String, Vec<(f64, Tensor)>>,
}

/// Ranks, and alpha over rank, as each configuration counts them.
pub(crate) struct Scales {
    rank: usize,
    ranks: Vec<Pattern>,
    alpha: f64,
    alphas: Vec<Pattern>,
    root: bool,
    parameters: Vec<String>,
}

impl Scales {
    /// # Errors
    /// Settings that are no numbers, patterns that are none.
    pub fn of(config: &Value) -> Result<Scales> {
        let own = ["r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "target_parameters"];
        let own = own.iter().filter_map(|key| Some(((*key).to_owned(), config.get(*key)?.clone()))).collect();
        let mut r = Reader::file(&own);
        let scales = Scales {
            rank: r.count("r", 8, RANK_MAX),
            ranks: r.patterns("rank_pattern"),
            alpha: r.float("lora_alpha", 8.0),
            alphas: r.scales("alpha_pattern"),
            root: r.flag("use_rslora", false),
            parameters: r.texts("target_parameters").unwrap_or_default(),
        };
        r.finish()?;
        Ok(scales)
    }

    /// The rank that a module is said to have.
    pub fn rank_at(&self, path: &str) -> usize {
        Pattern::find(&self.ranks, &self.name(path)).map_or(self.rank, |rank| rank as usize)
    }

    /// What patterns are held against.
    pub fn name<'a>(&self, path: &'a str) -> Cow<'a, str> {
        pattern_name(&self.parameters, path)
    }

    /// What the product of a module with so many ranks is multiplied by.
    pub fn at(&self, path: &str, rank: usize) -> f64 {
        let alpha = Pattern::find(&self.alphas, &self.name(path)).unwrap_or(self.alpha);
        alpha / if self.root { (rank as f64).sqrt() } else { rank as f64 }
    }
}

/// The modules of `terms` in the order of their names.
///
/// # Errors
/// Magnitudes, halves of products, shapes that differ.
pub(crate) fn modules(terms: &[Term]) -> Result<Found> {
    let mut found: BTreeMap<String, Module> = BTreeMap::new();
    let mut biases: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut others: BTreeMap<String, Vec<(f64, Tensor)>> = BTreeMap::new();
    let mut rows: BTreeMap<String, Rows> = BTreeMap::new();
    for (number, term) in terms.iter().enumerate() {
        let scales = Scales::of(&term.config)?;
        let of = |name: &str| term.tensors.iter().find(|(n, _)| n == name).map(|(_, t)| t);
        for (name, tensor) in &term.tensors {
            if name.contains(".lora_magnitude_vector") {
                return Err(Error::Unsupported(format!(
                    "{}: {name}: magnitudes of DoRA do not add; average adapters configured alike, or merge one after another",
                    term.name
                )));
            }
            if let Some(key) = name.strip_suffix(".lora_B.bias") {
                let rank = of(&format!("{key}.lora_B.weight")).map_or(1, |b| b.dim(1));
                let part = tensor.scale((term.weight * scales.at(path_of(key), rank)) as f32)?;
                let sum = match biases.remove(name) {
                    Some(sum) => sum.add(&part)?,
                    None => part,
                };
                biases.insert(name.clone(), sum);
                continue;
            }
            if ENDS.iter().any(|ends| name.ends_with(ends.1)) || FORMS.iter().any(|of| name.contains(of.1)) {
                continue;
            }
            if name.ends_with(ROWS) {
                let tokens = of_rows(term, name, tensor)?;
                rows.entry(name.clone()).or_default().push((term.weight, tokens, tensor.clone()));
                continue;
            }
            let Some(ends) = ENDS.iter().find(|ends| name.ends_with(ends.0)) else {
                others.entry(name.clone()).or_default().push((term.weight, tensor.clone()));
                continue;
            };
            put(&mut found, (number, terms), &scales, (name, tensor), *ends)?;
        }
    }
    for (name, rows) in rows {
        let same = rows.iter().all(|(_, tokens, _)| *tokens == rows[0].1);
        let of_all = match same {
            true => rows.into_iter().map(|(weight, _, tensor)| (weight, tensor)).collect(),
            false => vec![(1.0, aligned(&name, &rows)?)],
        };
        others.insert(name, of_all);
    }
    let modules: Vec<Module> = found.into_values().collect();
    // The bias of a module with a product lies one level down, be it that another adapter leaves the module alone.
    for module in &modules {
        if let Some(own) = others.remove(&format!("{}.bias", module.key)) {
            others.entry(format!("{}.base_layer.bias", module.key)).or_default().extend(own);
        }
    }
    if !biases.is_empty() {
        fill_biases(&mut biases, &modules)?;
    }
    Ok(Found { modules, biases: biases.into_iter().collect(), others })
}

/// Puts the product of one of `terms`, by its A, to those of others at its module.
fn put(
    found: &mut BTreeMap<String, Module>,
    (number, terms): (usize, &[Term]),
    scales: &Scales,
    (name, a): (&str, &Tensor),
    ends: (&'static str, &'static str),
) -> Result<()> {
    let term = &terms[number];
    let key = &name[..name.len() - ends.0.len()];
    let name_b = format!("{key}{}", ends.1);
    let b = term.tensors.iter().find(|(other, _)| *other == name_b).map(|(_, tensor)| tensor);
    let b = b.ok_or_else(|| Error::Mismatch(vec![format!("{}: {name_b} is missing", term.name)]))?;
    let (rank, out) = (a.dim(0), b.dim(0));
    let module = found.entry(key.to_owned()).or_insert_with(|| Module {
        path: path_of(key).to_owned(),
        key: key.to_owned(),
        ends,
        tails: (a.shape()[1..].to_vec(), b.shape()[2..].to_vec()),
        factors: terms.iter().map(|_| None).collect(),
    });
    let same = module.tails.0 == a.shape()[1..] && module.factors.iter().flatten().all(|f| f.b.dim(0) == out);
    if !same {
        let (own, others) = (a.shape(), &module.tails.0);
        let message = format!("{}: {name} is {own:?}, another adapter's {others:?} wide", term.name);
        return Err(Error::Mismatch(vec![message]));
    }
    let inn = a.shape()[1..].iter().product::<usize>();
    module.factors[number] = Some(Factors {
        a: a.reshape([rank, inn])?,
        b: b.reshape([out, rank])?,
        scale: scales.at(path_of(key), rank),
    });
    Ok(())
}

/// A bias of zero for every product that has none: a file says of all its products whether they have one.
fn fill_biases(biases: &mut BTreeMap<String, Tensor>, modules: &[Module]) -> Result<()> {
    for module in modules {
        let name = format!("{}.lora_B.bias", module.key);
        let Some(out) = module.factors.iter().flatten().next().map(|f| f.b.dim(0)) else { continue };
        if module.ends != ENDS[0] {
            return Err(Error::Site {
                path: module.path.clone(),
                message: "a table's product has no bias, and one adapter says that all its products have one (`lora_bias`); merge one after another"
                    .into(),
            });
        }
        biases.entry(name).or_insert_with(|| Tensor::zeros([out]));
    }
    Ok(())
}

/// The path of a module as patterns see it.
pub(super) fn path_of(key: &str) -> &str {
    key.strip_prefix("base_model.model.").unwrap_or(key)
}
