//! Compacter's layers: y = x·Σᵢ Rᵢ⊗Wᵢ + b with small Rᵢ, and Wᵢ of low rank or whole, either of which all layers may share.

use engraft_nn::{Builder, Error, Init, Kind, Result, Role, Site};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::settings::Bottleneck;
use crate::read::{Reader, number};
use crate::shared::kronecker;

/// Most products in a sum.
pub(crate) const COUNT_MAX: usize = 1 << 10;

/// The settings, in the words of `adapters`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Phm {
    /// Number of products, and size of their left factors.
    pub dim: usize,
    /// Rank of the right factors, and whether they are of low rank at all.
    pub rank: usize,
    pub thin_factors: bool,
    pub shared_factors: bool,
    pub shared_rule: bool,
    pub thin_rule: bool,
    pub learned_rule: bool,
    pub uniform_rule: bool,
    /// Deviation of a shared rule at the start.
    pub range: f64,
    pub bias: bool,
}

impl Default for Phm {
    fn default() -> Self {
        Phm {
            dim: 4,
            rank: 1,
            thin_factors: true,
            shared_factors: false,
            shared_rule: true,
            thin_rule: false,
            learned_rule: true,
            uniform_rule: false,
            range: 1e-4,
            bias: true,
        }
    }
}

/// Rᵢ or Wᵢ.
#[derive(Clone)]
pub(super) enum Factors {
    /// [n, rows, columns].
    Whole(Param),
    /// [n, rows, rank] and [n, rank, columns].
    Thin(Param, Param),
}

impl Factors {
    fn whole(&self) -> Result<Tensor> {
        match self {
            Factors::Whole(whole) => Ok(whole.get()),
            Factors::Thin(left, right) => Ok(left.get().matmul(&right.get())?),
        }
    }
}

/// What all layers share.
#[derive(Default)]
pub(super) struct Shared {
    rule: Option<Factors>,
    pub down: Option<Factors>,
    pub up: Option<Factors>,
}

/// One layer.
pub(super) struct Sum {
    rule: Factors,
    factors: Factors,
    bias: Option<Param>,
}

impl Sum {
    /// x [tokens, in] → [tokens, out].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rule = self.rule.whole()?;
        let turned = |t: Tensor| t.permute(&[0, 2, 1]);
        let y = match &self.factors {
            Factors::Thin(left, right) => {
                kronecker::multiply_sum(x, &turned(rule)?, &turned(right.get())?, &turned(left.get())?)?
            }
            Factors::Whole(whole) => x.matmul(&sum_of_products(&rule, &whole.get())?)?,
        };
        match &self.bias {
            Some(bias) => Ok(y.plus(&bias.get())?),
            None => Ok(y),
        }
    }
}

/// Σᵢ Rᵢ⊗Wᵢ, formed: R [n, a, b], W [n, c, d] → [a·c, b·d].
fn sum_of_products(rule: &Tensor, whole: &Tensor) -> Result<Tensor> {
    let (n, a, b, c, d) = (rule.dim(0), rule.dim(1), rule.dim(2), whole.dim(1), whole.dim(2));
    let all = rule.reshape([n, a * b])?.t_matmul(&whole.reshape([n, c * d])?)?;
    Ok(all.reshape([a, b, c, d])?.permute(&[0, 2, 1, 3])?.reshape([a * c, b * d])?)
}

impl Bottleneck {
    /// The tensors that all adapters share; none without Compacter's layers.
    pub(super) fn shared(&self, b: &mut Builder<'_>) -> Result<Shared> {
        let Some(phm) = &self.phm else { return Ok(Shared::default()) };
        let stem = format!("{}shared_parameters.{}", base_of(b), self.name);
        if self.reduction_by_layer.is_empty() {
            // Before anything of n³ numbers is made.
            phm.cut((b.info().width, self.size_at(None, b.info().width)))?;
        }
        let rule = match phm.shared_rule {
            true => {
                let start =
                    if phm.uniform_rule { Init::Uniform(1.0) } else { Init::Normal(phm.range as f32) };
                Some(phm.rule(b, &format!("{stem}.phm_rule"), start)?)
            }
            false => None,
        };
        let (mut down, mut up) = (None, None);
        if phm.shared_factors {
            let width = b.info().width;
            if !self.reduction_by_layer.is_empty() {
                let message = "adapters that share their factors need one `reduction_factor` for all layers";
                return Err(Error::Unsupported(message.into()));
            }
            let size = phm.cut((width, self.size_at(None, width)))?;
            down = Some(phm.factors(b, &format!("{stem}.W_down"), size)?);
            up = Some(phm.factors(b, &format!("{stem}.W_up"), (size.1, size.0))?);
        }
        Ok(Shared { rule, down, up })
    }
}

/// What precedes the names of modules in the model below its head: `bert.`, or nothing where there is no head around it.
fn base_of(b: &Builder<'_>) -> String {
    let places = b.sites().iter().filter(|s| match s.role {
        Role::Embed | Role::PatchEmbed => s.is_weight(),
        _ => matches!(s.kind, Kind::Sublayer { .. }),
    });
    let mut firsts: Vec<&str> = places.filter_map(|s| Some(s.path.split_once('.')?.0)).collect();
    firsts.dedup();
    match firsts[..] {
        [only] => format!("{only}."),
        _ => String::new(),
    }
}

impl Phm {
    /// The tensors of one layer [in, out]; `factors` are those that all layers share.
    pub(super) fn build(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        stem: &str,
        sizes: (usize, usize),
        factors: &Option<Factors>,
        shared: &Shared,
    ) -> Result<Sum> {
        let cut = self.cut(sizes).map_err(|e| match e {
            Error::Unsupported(message) => Error::Site { path: site.path.clone(), message },
            other => other,
        })?;
        let rule = match &shared.rule {
            Some(rule) => rule.clone(),
            None => {
                let start = if self.uniform_rule { Init::Uniform(0.01) } else { Init::Normal(0.01) };
                self.rule(b, &format!("{stem}.phm_rule"), start)?
            }
        };
        let factors = match factors {
            Some(factors) => factors.clone(),
            None => self.factors(b, &format!("{stem}.W"), cut)?,
        };
        let bias = match self.bias {
            true => Some(b.param(&format!("{stem}.b"), &[sizes.1], Init::Zeros)?),
            false => None,
        };
        Ok(Sum { rule, factors, bias })
    }

    /// Sizes of the right factors of a layer [in, out].
    fn cut(&self, (inn, out): (usize, usize)) -> Result<(usize, usize)> {
        let n = self.dim;
        if inn.is_multiple_of(n) && out.is_multiple_of(n) {
            return Ok((inn / n, out / n));
        }
        Err(Error::Unsupported(format!(
            "[{inn}, {out}] cannot be cut into {n}×{n} blocks; choose a `reduction` and an `n` such that `n` divides both"
        )))
    }

    fn rule(&self, b: &mut Builder<'_>, name: &str, start: Init) -> Result<Factors> {
        let n = self.dim;
        let mut tensor = |name: &str, shape: [usize; 3]| match self.learned_rule {
            true => b.param(name, &shape, start.clone()),
            false => b.fixed(name, &shape, start.clone()),
        };
        Ok(match self.thin_rule {
            true => Factors::Thin(
                tensor(&format!("{name}_left"), [n, n, 1])?,
                tensor(&format!("{name}_right"), [n, 1, n])?,
            ),
            false => Factors::Whole(tensor(name, [n, n, n])?),
        })
    }

    /// W, each product Glorot-uniform.
    fn factors(&self, b: &mut Builder<'_>, name: &str, (rows, columns): (usize, usize)) -> Result<Factors> {
        let (n, r) = (self.dim, self.rank);
        let glorot = |a: usize, b: usize| Init::Uniform((6.0 / (a + b) as f32).sqrt());
        Ok(match self.thin_factors {
            true => Factors::Thin(
                b.param(&format!("{name}_left"), &[n, rows, r], glorot(rows, r))?,
                b.param(&format!("{name}_right"), &[n, r, columns], glorot(r, columns))?,
            ),
            false => Factors::Whole(b.param(name, &[n, rows, columns], glorot(rows, columns))?),
        })
    }

    /// The keys of a file about these layers.
    pub(super) fn from_file(r: &mut Reader<'_>) -> Phm {
        let usual = Phm::default();
        Phm {
            dim: r.count("phm_dim", usual.dim, COUNT_MAX),
            rank: r.count("phm_rank", usual.rank, COUNT_MAX),
            thin_factors: r.flag("factorized_phm_W", true),
            shared_factors: r.flag("shared_W_phm", false),
            shared_rule: r.flag("shared_phm_rule", true),
            thin_rule: r.flag("factorized_phm_rule", false),
            learned_rule: r.flag("learn_phm", true),
            uniform_rule: r.one_of("phm_c_init", &[("normal", false), ("uniform", true)]),
            range: r.float("phm_init_range", usual.range),
            bias: r.flag("phm_bias", true),
        }
    }

    pub(super) fn to_file(&self) -> Value {
        json!({
            "factorized_phm_W": self.thin_factors, "factorized_phm_rule": self.thin_rule, "learn_phm": self.learned_rule,
            "phm_bias": self.bias, "phm_c_init": if self.uniform_rule { "uniform" } else { "normal" }, "phm_dim": self.dim,
            "phm_init_range": number(self.range), "phm_rank": self.rank, "shared_W_phm": self.shared_factors,
            "shared_phm_rule": self.shared_rule,
        })
    }

    /// The keys of a file, as `adapters` has them where there are no such layers.
    pub(super) fn silent(r: &mut Reader<'_>) -> Map<String, Value> {
        let usual = Phm::default().to_file();
        let keys = [
            "factorized_phm_W",
            "factorized_phm_rule",
            "learn_phm",
            "phm_bias",
            "phm_c_init",
            "phm_dim",
            "phm_init_range",
            "phm_rank",
            "shared_W_phm",
            "shared_phm_rule",
        ];
        keys.iter()
            .map(|key| ((*key).to_owned(), r.value(key).cloned().unwrap_or(usual[*key].clone())))
            .collect()
    }
}
