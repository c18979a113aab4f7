//! Adapters → adapter: sums of low-rank products and means of equal ones. No model, no forward.
//!
//! A LoRA changes a module by s·B·A. The exact sum Σ w·s·B·A of several is `cat`, whose rank is the sum of ranks; every other
//! rule trades exactness for a smaller rank or for fewer conflicts, and says how far it is from that sum.
//!
//! The rules are those of `peft`'s `add_weighted_adapter`: on the factors (`linear`, `ties`, …) each of A and B is combined by
//! itself, with the root of its weight, so that products of different adapters come in; on the products (`svd`, `ties_svd`, …)
//! the changes are combined and cut to a rank by singular values. Of (IA)³ `linear` is the sum of the scales themselves. `average` is the mean of every tensor of adapters that are
//! configured alike (AdapterSoup, Chronopoulou et al. 2023, arXiv:2302.07027), `mera` that of bottlenecks whose units are
//! brought to meet first (MerA, He et al. 2023, arXiv:2308.15982), `lorahub` (Σ w·B)·(Σ w·A), with weights that a search finds
//! on a few examples (Huang et al. 2023, arXiv:2307.13269). TIES: Yadav et al. 2023, arXiv:2306.01708; DARE:
//! Yu et al. 2024, arXiv:2311.03099; task arithmetic: Ilharco et al. 2023, arXiv:2212.04089.

mod alike;
mod assignment;
mod cma;
mod config;
mod factors;
mod hub;
mod mean;
mod rules;
mod tokens;

use std::collections::BTreeMap;

use engraft_nn::{Error, Result};
use engraft_tensor::linalg::svd;
use engraft_tensor::{DType, Tensor, no_grad};
use serde_json::Value;

use crate::{Chosen, Named};
pub use alike::{one_base, same_base};
pub(crate) use factors::{Scales, modules as products};

use config::{lora_config, whole_or_product};
use factors::{Factors, Module, modules};
pub use hub::{Found, Search, search};
use mean::{average, means, mera, scales};
pub use rules::Sign;
use rules::{Recipe, Stack};

/// An adapter that takes part, as its file has it.
#[derive(Clone)]
pub struct Term {
    /// What it is called in messages.
    pub name: String,
    /// `adapter_config.json`.
    pub config: Value,
    /// Its tensors.
    pub tensors: Named,
    /// Its weight; negative takes it away.
    pub weight: f64,
}

/// How adapters are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The exact sum: factors one after another.
    Cat,
    /// The mean of every tensor, of adapters configured alike.
    Average,
    /// The mean of bottlenecks whose units are brought to meet first.
    Mera,
    /// Sums of A's and of B's, each with the whole weight.
    LoraHub,
    /// Sum of A's and sum of B's.
    Linear,
    /// The sum, cut to a rank.
    Svd,
    /// TIES on the factors.
    Ties,
    /// TIES on the changes, cut to a rank.
    TiesSvd,
    /// DARE on the factors.
    DareLinear,
    /// DARE on the changes, cut to a rank.
    DareLinearSvd,
    /// DARE, then the election of signs of TIES, on the factors.
    DareTies,
    /// The same on the changes, cut to a rank.
    DareTiesSvd,
    /// The largest of each, on the factors.
    MagnitudePrune,
    /// The largest of each change, cut to a rank.
    MagnitudePruneSvd,
}

impl Rule {
    /// All of them by name.
    pub const ALL: &'static [(&'static str, Rule)] = &[
        ("cat", Rule::Cat),
        ("average", Rule::Average),
        ("mera", Rule::Mera),
        ("lorahub", Rule::LoraHub),
        ("linear", Rule::Linear),
        ("svd", Rule::Svd),
        ("ties", Rule::Ties),
        ("ties_svd", Rule::TiesSvd),
        ("dare_linear", Rule::DareLinear),
        ("dare_linear_svd", Rule::DareLinearSvd),
        ("dare_ties", Rule::DareTies),
        ("dare_ties_svd", Rule::DareTiesSvd),
        ("magnitude_prune", Rule::MagnitudePrune),
        ("magnitude_prune_svd", Rule::MagnitudePruneSvd),
    ];

    /// Whether it keeps only a share of the numbers.
    pub fn prunes(self) -> bool {
        !matches!(self, Rule::Cat | Rule::Average | Rule::Mera | Rule::LoraHub | Rule::Linear | Rule::Svd)
    }

    /// Whether the result is cut to a rank.
    pub fn cuts(self) -> bool {
        use Rule::{DareLinearSvd, DareTiesSvd, MagnitudePruneSvd, Svd, TiesSvd};
        matches!(self, Svd | TiesSvd | DareLinearSvd | DareTiesSvd | MagnitudePruneSvd)
    }

    /// Whether signs are elected.
    pub fn elects(self) -> bool {
        self.recipe().elect
    }

    /// Whether something is drawn.
    pub fn draws(self) -> bool {
        self.recipe().keep_random
    }

    fn recipe(self) -> Recipe {
        use Rule::{
            DareLinear, DareLinearSvd, DareTies, DareTiesSvd, MagnitudePrune, MagnitudePruneSvd, Ties,
            TiesSvd,
        };
        match self {
            Ties | TiesSvd => Recipe { keep_largest: true, keep_random: false, elect: true },
            DareLinear | DareLinearSvd => Recipe { keep_largest: false, keep_random: true, elect: false },
            DareTies | DareTiesSvd => Recipe { keep_largest: false, keep_random: true, elect: true },
            MagnitudePrune | MagnitudePruneSvd => {
                Recipe { keep_largest: true, keep_random: false, elect: false }
            }
            Rule::Cat | Rule::Average | Rule::Mera | Rule::LoraHub | Rule::Linear | Rule::Svd => {
                Recipe::default()
            }
        }
    }
}

/// What a rule may be told.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The rule.
    pub rule: Rule,
    /// Rank of a result that is cut; the largest of the terms' if absent.
    pub rank: Option<usize>,
    /// Share of the numbers that a pruning rule keeps, above 0 and at most 1.
    pub density: f64,
    /// How TIES elects signs.
    pub sign: Sign,
    /// Seed of what DARE drops.
    pub seed: u64,
}

impl Options {
    /// A rule with nothing said of it: all numbers are kept, signs are those of the sum.
    pub fn of(rule: Rule) -> Options {
        Options { rule, rank: None, density: 1.0, sign: Sign::Total, seed: 0 }
    }
}

/// A combined adapter.
pub struct Combined {
    /// `adapter_config.json`.
    pub config: Value,
    /// Its tensors.
    pub tensors: Named,
    /// Its method.
    pub methods: Vec<Chosen>,
    /// ‖result − exact sum‖ / ‖exact sum‖ over all modules; `None` where the adapters are no low-rank products.
    pub error: Option<f64>,
    /// The module that is farthest from its sum, and how far.
    pub worst: Option<(String, f64)>,
    /// Facts worth telling.
    pub notes: Vec<String>,
}

/// Combines adapters.
///
/// # Errors
/// Adapters that the rule cannot combine: of other methods or shapes, of different ranks where factors are added.
pub fn combine(terms: &[Term], options: &Options) -> Result<Combined> {
    check(terms, options)?;
    combine_checked(terms, options, true)
}

/// An error where the adapters cannot be read, or hold what is no number.
fn check(terms: &[Term], options: &Options) -> Result<()> {
    for term in terms {
        methods_of(&term.config).map_err(|e| Error::Unsupported(format!("{}: {e}", term.name)))?;
    }
    for term in terms {
        for (name, tensor) in term.tensors.iter().filter(|(_, tensor)| tensor.dtype() == DType::F32) {
            if let Some(value) = tensor.to_vec()?.iter().find(|value| !value.is_finite()) {
                let message = format!("{}: {name}: expected finite numbers, found {value}", term.name);
                return Err(Error::Unsupported(message));
            }
        }
    }
    if options.rule.prunes() && !(options.density > 0.0 && options.density <= 1.0) {
        let message = format!("density: expected a share above 0 and at most 1, found {}", options.density);
        return Err(Error::Unsupported(message));
    }
    Ok(())
}

/// What [`check`] has passed; how far it is from the exact sum is found where it is `measured`.
fn combine_checked(terms: &[Term], options: &Options, measured: bool) -> Result<Combined> {
    let Some(first) = terms.first() else {
        return Err(Error::Unsupported("there is no adapter to combine".into()));
    };
    let combined = no_grad(|| match options.rule {
        Rule::Average => average(terms),
        Rule::Mera => mera(terms),
        Rule::Linear if terms.iter().all(|t| crate::peft::is_type(&t.config, "IA3")) => scales(terms),
        _ => {
            if let Some(other) = terms.iter().find(|t| !crate::peft::is_type(&t.config, "LORA")) {
                let found = other.config.get("peft_type").and_then(Value::as_str).unwrap_or("none");
                return Err(Error::Unsupported(format!(
                    "{}: only low-rank products can be added so, and (IA)³ by the rule linear, and this is {found}; adapters configured alike can be averaged with the rule average",
                    other.name
                )));
            }
            terms.iter().try_for_each(alike::fits_itself)?;
            low_rank(first, terms, options, measured)
        }
    })?;
    // A weight that is finite may still be too large for the numbers of a file.
    for (name, tensor) in combined.tensors.iter().filter(|(_, tensor)| tensor.dtype() == DType::F32) {
        if tensor.to_vec()?.iter().any(|value| !value.is_finite()) {
            let message = format!("{name}: the combination is not finite; choose smaller weights");
            return Err(Error::Unsupported(message));
        }
    }
    if combined.error.is_some_and(|error| !error.is_finite()) {
        return Err(Error::Unsupported(
            "the exact sum is too large for 32 bits; choose smaller weights".into(),
        ));
    }
    Ok(combined)
}

fn low_rank(first: &Term, terms: &[Term], options: &Options, measured: bool) -> Result<Combined> {
    let found = modules(terms)?;
    whole_or_product(&found, terms)?;
    let carried = match options.rule {
        Rule::LoraHub => Some(hub::carried(&found, terms)?),
        _ => None,
    };
    let mut tensors = Named::new();
    let (mut off, mut whole, mut worst) = (0.0f64, 0.0f64, None::<(String, f64)>);
    let mut ranks = BTreeMap::new();
    // As in `peft`, one rank for all modules, be some adapter of less there.
    let named = terms.iter().filter_map(|term| term.config.get("r")?.as_u64()).map(|rank| rank as usize);
    let held = found.modules.iter().flat_map(|module| module.factors.iter().flatten().map(|f| f.a.dim(0)));
    let largest = named.chain(held).max().unwrap_or(1);
    for module in &found.modules {
        let exact = if measured { Some(module.sum(terms)?) } else { None };
        let rank = options.rank.unwrap_or(largest);
        let (a, b) = combined(module, terms, options, rank, exact.as_ref())?;
        if let Some(exact) = exact {
            let (difference, size) = (norm(&b.matmul(&a)?.sub(&exact)?)?, norm(&exact)?);
            off += difference * difference;
            whole += size * size;
            let relative = if size > 0.0 { difference / size } else { difference };
            if worst.as_ref().is_none_or(|(_, most)| relative > *most) {
                worst = Some((module.path.clone(), relative));
            }
        }
        ranks.insert(module.path.clone(), a.dim(0));
        tensors.extend(module.written(a, b)?);
    }
    tensors.extend(found.biases);
    let mut notes = Vec::new();
    if let Some(carried) = &carried
        && let Some((name, _)) = carried.first()
    {
        let count = carried.len();
        notes.push(format!(
            "{count} tensors that are trained as a whole ({name}…) are the same in all and kept"
        ));
    }
    let is_mean = carried.is_none();
    let others = carried.map_or_else(|| means(&found.others), Ok)?;
    if !is_mean {
        tensors.extend(others);
    } else if !others.is_empty() {
        let modules: Vec<&str> = others.iter().map(|(name, _)| name.as_str()).take(3).collect();
        notes.push(format!(
            "{} tensors that are trained as a whole ({}…) are averaged by weight: they do not add",
            others.len(),
            modules.join(", ")
        ));
        tensors.extend(others);
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let error = measured.then(|| if whole > 0.0 { (off / whole).sqrt() } else { off.sqrt() });
    let config = lora_config(first, terms, &ranks)?;
    Ok(Combined { methods: methods_of(&config)?, config, tensors, error, worst, notes })
}

/// A [rank, in] and B [out, rank] of the result, whose scale is 1; a rule that cuts cuts to `rank`.
fn combined(
    module: &Module,
    terms: &[Term],
    options: &Options,
    rank: usize,
    exact: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let parts: Vec<(&Factors, f64, usize)> = module
        .factors
        .iter()
        .zip(terms)
        .enumerate()
        .filter_map(|(number, (factors, term))| Some((factors.as_ref()?, term.weight, number)))
        .collect();
    let stack = |tensors: Vec<Tensor>, weights: Vec<f64>, which: &str| {
        let numbers = parts.iter().map(|p| p.2).collect();
        let name = format!("{}.{which}", module.path);
        Stack { tensors, weights, numbers, name }.combine(options.rule.recipe(), options)
    };
    if options.rule == Rule::Cat {
        let a = parts.iter().map(|(f, w, _)| f.a.scale((w * f.scale) as f32));
        let a = a.collect::<engraft_tensor::Result<Vec<_>>>()?;
        let cat = engraft_tensor::ops::cat;
        let (a, b): (Vec<&Tensor>, Vec<&Tensor>) =
            (a.iter().collect(), parts.iter().map(|(f, ..)| &f.b).collect());
        return Ok((cat(&a, 0)?, cat(&b, 1)?));
    }
    if options.rule.cuts() {
        let delta = match options.rule {
            Rule::Svd => exact.map_or_else(|| module.sum(terms), |exact| Ok(exact.clone()))?,
            _ => {
                let changes = parts.iter().map(|(f, ..)| f.change()).collect::<Result<Vec<_>>>()?;
                stack(changes, parts.iter().map(|p| p.1).collect(), "change")?
            }
        };
        return cut(&delta, rank);
    }
    let rank = parts.first().map_or(0, |(f, ..)| f.a.dim(0));
    if let Some((other, ..)) = parts.iter().find(|(f, ..)| f.a.dim(0) != rank) {
        let name = Rule::ALL.iter().find(|(_, rule)| *rule == options.rule).map_or("", |(name, _)| *name);
        return Err(Error::Site {
            path: module.path.clone(),
            message: format!(
                "the rule {name} adds factors of equal rank, found ranks {rank} and {}; use cat (exact), or svd with a rank",
                other.a.dim(0)
            ),
        });
    }
    if options.rule == Rule::LoraHub {
        return hub::factors(&parts);
    }
    // A weight is shared between both factors; its sign goes to A.
    let roots: Vec<f64> = parts.iter().map(|(f, w, _)| (w * f.scale).abs().sqrt()).collect();
    let signed =
        roots.iter().zip(&parts).map(|(root, (_, w, _))| if *w > 0.0 { *root } else { -root }).collect();
    let a = stack(parts.iter().map(|(f, ..)| f.a.clone()).collect(), signed, "A")?;
    let b = stack(parts.iter().map(|(f, ..)| f.b.clone()).collect(), roots, "B")?;
    Ok((a, b))
}

/// The nearest product of rank `rank`, or of the matrix's own where that is smaller: A [rank, in] and B [out, rank].
pub fn cut(change: &Tensor, rank: usize) -> Result<(Tensor, Tensor)> {
    let found = svd(change)?;
    let rank = rank.min(found.s.len());
    let s = Tensor::from_vec(found.s[..rank].to_vec(), [1, rank])?;
    let (out, all) = (found.u.dim(0), found.s.len());
    let u = found.u.to_vec()?;
    let left: Vec<f32> = (0..out).flat_map(|row| u[row * all..row * all + rank].to_vec()).collect();
    Ok((found.vt.rows_between(0, rank)?, Tensor::from_vec(left, [out, rank])?.mul(&s)?))
}

/// The methods of a configuration; of a union, all of them.
fn methods_of(config: &Value) -> Result<Vec<Chosen>> {
    let list = config.get("methods").and_then(Value::as_array);
    let configs = list.map_or(std::slice::from_ref(config), Vec::as_slice);
    let method = |config| crate::from_file(config).map(|loaded| (loaded.method, loaded.targets));
    configs.iter().map(method).collect()
}

/// Frobenius norm, in f64.
fn norm(t: &Tensor) -> Result<f64> {
    Ok(t.to_vec()?.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt())
}

#[cfg(test)]
mod tests;
