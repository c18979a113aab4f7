//! How A and B start, from random numbers and from the weight itself.
//!
//! - `kaiming` (A uniform in ±1/√in, B zero), `gaussian` (A normal with deviation 1/r), `random` (both uniform).
//! - `orthogonal`: A and B random, each in one half of an orthonormal basis of the ranks, so that B·A = 0.
//! - `pissa`: the r largest singular triples of W = U·Σ·Vᵀ, A₀ = √(Σ/s)·Vᵀ and B₀ = U·√(Σ/s); W keeps the rest. Meng, Wang
//!   and Zhang 2024, arXiv:2404.02948; with `pissa_niter` by random projections, as its section 4 proposes.
//! - `olora`: from W = Q·R, A₀ = the first rows of R, B₀ = the first columns of Q. Büyükakyüz 2024, arXiv:2406.01775.
//! - `mica`: B = the r left singular vectors of the smallest singular values, not trained, A zero; arXiv:2604.01694.
//! - `eva`, `corda`, `lora-ga`: from what the base makes of the training data (`prepare`).
//!
//! Where B₀·A₀ is not zero it is taken off the weight, so that W′ = W at the start. `peft` changes the base for that; a file
//! that it wrote without conversion is read by making A₀ and B₀ again, where they follow from the base alone. On a base in bf16
//! `peft` rounds what is left; here nothing is rounded, as in its own conversion (docs/tutorial.md has the difference in numbers).

use engraft_nn::{Builder, Error, Init, Kind, Result, Site};
use engraft_tensor::cpu::random::Key;
use engraft_tensor::linalg::{qr, svd, svd_lowrank};
use engraft_tensor::ops::{Unary, cat};
use engraft_tensor::{Tensor, no_grad};

use super::Lora;
use super::dora::site_weight;

/// How A and B start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Start {
    Kaiming,
    Gaussian,
    Random,
    Orthogonal,
    /// By random projections with so many rounds where a number is given.
    Pissa(Option<usize>),
    Olora,
    Mica,
    Eva,
    Corda,
    LoraGa,
}

pub(super) const STARTS: &[(&str, Start)] = &[
    ("kaiming", Start::Kaiming),
    ("gaussian", Start::Gaussian),
    ("random", Start::Random),
    ("orthogonal", Start::Orthogonal),
    ("pissa", Start::Pissa(None)),
    ("olora", Start::Olora),
    ("mica", Start::Mica),
    ("eva", Start::Eva),
    ("corda", Start::Corda),
    ("lora-ga", Start::LoraGa),
];

impl Start {
    /// Whether its product is taken off the weight.
    pub fn is_taken_off(self) -> bool {
        matches!(self, Start::Pissa(_) | Start::Olora | Start::Corda | Start::LoraGa)
    }
}

/// The start of one matrix: A [rank, in], B [out, rank], and A₀ and B₀ where they are taken off the weight.
pub(super) struct Pair {
    pub rank: usize,
    pub a: Init,
    pub b: Init,
    pub taken: Option<(Init, Init)>,
}

impl Start {
    /// An error where a matrix [out, in] has not so many directions as this start takes from it, or from its data.
    fn has_ranks(&self, site: &Site, [out, inn]: [usize; 2], rank: usize) -> Result<()> {
        let most = match self {
            Start::Pissa(_) | Start::Olora | Start::Mica | Start::Corda => out.min(inn),
            // B takes the second half of the directions.
            Start::LoraGa => out.min(inn) / 2,
            Start::Eva => inn,
            Start::Kaiming | Start::Gaussian | Start::Random | Start::Orthogonal => return Ok(()),
        };
        if rank <= most {
            return Ok(());
        }
        let message = format!("this `init` has at most {most} ranks here, not {rank}");
        Err(Error::Site { path: site.path.clone(), message })
    }
}

impl Lora {
    /// The start at a matrix [out, in] with scale `s`.
    pub(super) fn pair(
        &self,
        b: &Builder<'_>,
        site: &Site,
        [out, inn]: [usize; 2],
        rank: usize,
        s: f32,
    ) -> Result<Pair> {
        let plain = |a: Init, b: Init| Ok(Pair { rank, a, b, taken: None });
        if self.kasa.is_some() {
            return self.noise(site, rank, s, plain(Init::kaiming(inn), Init::Zeros)?);
        }
        // Values of a file come later.
        if self.from_file && !self.start.is_taken_off() {
            return plain(
                Init::kaiming(inn),
                if self.start == Start::Random { Init::kaiming(rank) } else { Init::Zeros },
            );
        }
        // What is named by itself is taken as it is stored.
        let weight = || match self.is_turned(site) {
            true => Ok::<_, Error>(site_weight(site)?.t()?),
            false => site_weight(site),
        };
        self.start.has_ranks(site, [out, inn], rank)?;
        match self.start {
            Start::Kaiming => plain(Init::kaiming(inn), Init::Zeros),
            Start::Gaussian => plain(Init::Normal(1.0 / rank as f32), Init::Zeros),
            Start::Random => plain(Init::kaiming(inn), Init::kaiming(rank)),
            Start::Orthogonal => {
                let (a, b) = halves(out, inn, rank, b.seed(), &site.path)?;
                plain(Init::Values(a), Init::Values(b))
            }
            Start::Mica => no_grad(|| {
                let u = svd(&weight()?)?.u;
                plain(Init::Zeros, Init::Values(u.narrow(1, u.dim(1) - rank, rank)?))
            }),
            Start::Pissa(rounds) => {
                let key = Key { seed: b.seed(), stream: site.id.0 as u64 };
                taken_off(rank, no_grad(|| largest(&weight()?, rank, s, rounds, key))?)
            }
            Start::Olora => {
                let transposed = matches!(site.kind, Kind::Linear { transposed: true, .. });
                if self.from_file && transposed && !self.is_parameter(site) {
                    let message = "peft starts `olora` of a transposed matrix from the matrix as it is stored, which is no \
                                   LoRA of it; use `pissa` there"
                        .into();
                    return Err(Error::Site { path: site.path.clone(), message });
                }
                let (q, r) = no_grad(|| Ok::<_, Error>(qr(&weight()?)?))?;
                taken_off(rank, (r.rows_between(0, rank)?, q.narrow(1, 0, rank)?))
            }
            Start::Eva => {
                // Ranks that others may lend; at zero they stay zero.
                let most = self.search.most_ranks(rank, inn);
                let own =
                    Init::kaiming(inn).tensor(&[rank, inn], b.seed(), &format!("{}.lora_A", site.path))?;
                let a = cat(&[&own, &Tensor::zeros([most - rank, inn])], 0)?;
                Ok(Pair { rank: most, a: Init::Values(a), b: Init::Zeros, taken: None })
            }
            Start::Corda | Start::LoraGa => {
                let taken = Some((Init::Zeros, Init::Zeros));
                Ok(Pair { rank, a: Init::kaiming(inn), b: Init::Zeros, taken })
            }
        }
    }
}

fn taken_off(rank: usize, (a, b): (Tensor, Tensor)) -> Result<Pair> {
    let init = || (Init::Values(a.clone()), Init::Values(b.clone()));
    let ((a, b), taken) = (init(), Some(init()));
    Ok(Pair { rank, a, b, taken })
}

/// √(Σ/s)·Vᵀ and U·√(Σ/s) of the `rank` largest singular values of W.
fn largest(w: &Tensor, rank: usize, s: f32, rounds: Option<usize>, key: Key) -> Result<(Tensor, Tensor)> {
    let svd = match rounds {
        None => svd(w)?,
        Some(rounds) => svd_lowrank(w, rank, rounds, key)?,
    };
    let (u, vt) = (svd.u.narrow(1, 0, rank)?, svd.vt.rows_between(0, rank)?);
    roots(&u, &svd.s[..rank], &vt, s)
}

/// √(σ/s)·Vᵀ and U·√(σ/s).
pub(super) fn roots(u: &Tensor, sigma: &[f32], vt: &Tensor, s: f32) -> Result<(Tensor, Tensor)> {
    let root = Tensor::from_vec(sigma.to_vec(), [sigma.len()])?.scale(1.0 / s)?.unary(Unary::Sqrt)?;
    Ok((vt.mul(&root.reshape([sigma.len(), 1])?)?, u.mul(&root)?))
}

/// An orthonormal matrix [n, n], drawn from (seed, name).
pub(super) fn orthogonal(n: usize, seed: u64, name: &str) -> Result<Tensor> {
    Ok(qr(&Init::Normal(1.0).tensor(&[n, n], seed, &format!("{name}.orthogonal"))?)?.0)
}

/// A [rank, in] and B [out, rank] with B·A = 0: normal numbers over the odd rows of an orthonormal basis of the ranks and
/// over the even ones, divided by 10.
fn halves(out: usize, inn: usize, rank: usize, seed: u64, path: &str) -> Result<(Tensor, Tensor)> {
    let q = orthogonal(rank, seed, path)?;
    let rows = |first: usize| -> Result<Tensor> {
        let ids: Vec<i64> = (first..rank).step_by(2).map(|i| i as i64).collect();
        let count = ids.len();
        Ok(q.gather(&Tensor::from_i64(ids, [count])?)?)
    };
    let noise = |width: usize, name: &str| {
        Init::Normal(0.1).tensor(&[width, rank / 2], seed, &format!("{path}.{name}.orthogonal"))
    };
    Ok((noise(inn, "lora_A")?.matmul(&rows(0)?)?.t()?, noise(out, "lora_B")?.matmul(&rows(1)?)?))
}
