//! LoRA: a frozen weight plus a trained product of two thin matrices.
//!
//! W′ = W + s·B·A with s = α/r, or α/√r (rsLoRA); A starts as Kaiming-uniform noise, B as zero, so W′ = W.
//! DoRA: W′ = m ⊙ (W + s·B·A)/‖W + s·B·A‖, norms of rows, not differentiated; m starts as the rows' norms of W.
//! The forward never forms W′: y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ.
//!
//! Hu et al. 2022, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; DoRA: Liu et al. 2024, arXiv:2402.09353.
//!
//! A [rank, in], B [out, rank], m `[out]`; of a table with `rows` rows: A [rank, rows], B [width, rank], W′ = W + s·(B·A)ᵀ;
//! of a head tied to it (`ensure_weight_tying`): the same A and B, y = x·Wᵀ + s·(drop(x)·B)·A;
//! of a convolution with windows [channels, height, width]: A [rank, channels, height, width], B [out, rank, 1, 1],
//! m [1, out, 1, 1].

mod bias;
mod dora;
mod factors;
mod file;
mod settings;
#[cfg(test)]
mod tests;

use engraft_nn::{Builder, Error, Init, Kind, Patch, Result, Site};
use engraft_tensor::no_grad;
use serde_json::{Map, Value};

use crate::read::Pattern;
use crate::{Described, Entry, Info, Method, tied};
use dora::{Dora, row_norms, site_weight};
use factors::{Factors, Table};
use settings::INFO;

/// What is trained, and how it starts.
#[derive(Clone, Debug)]
struct Lora {
    rank: usize,
    alpha: f64,
    root_scaling: bool,
    dropout: f32,
    rank_pattern: Vec<Pattern>,
    alpha_pattern: Vec<Pattern>,
    bias: Biases,
    product_bias: bool,
    start: Start,
    dora: bool,
    /// A head that shares the tensor of an adapted table is changed as the table is.
    tied: bool,
}

/// Which biases of the model are trained along.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Biases {
    None,
    All,
    OfTargets,
}

/// How A and B start.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Start {
    /// A Kaiming-uniform, B zero.
    Kaiming,
    /// A normal with deviation 1/r, B zero.
    Gaussian,
    /// Both random: the adapter changes the model from the start.
    Random,
}

/// In the registry.
pub static ENTRY: Entry =
    Entry { info: &INFO, from_settings: settings::from_settings, from_file: file::from_file, example };

fn example() -> Box<dyn Method> {
    Box::new(Lora {
        rank: 3,
        alpha: 6.0,
        root_scaling: true,
        dropout: 0.0,
        rank_pattern: vec![],
        alpha_pattern: vec![],
        bias: Biases::All,
        product_bias: false,
        start: Start::Kaiming,
        dora: false,
        tied: false,
    })
}

impl Method for Lora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        // Before the product's own bias, which is added to what stands in the layer's.
        self.attach_biases(b)?;
        let tied = if self.tied { tied::follow(b)? } else { vec![] };
        for site in b.targets().into_iter().filter(|site| !tied.contains(&site.id)) {
            match site.kind {
                Kind::Linear { out, inn, .. } => {
                    self.attach_matrix(b, site, Shapes { a: &[inn], ones: &[] }, out)?;
                }
                Kind::Convolution { out, shape: [_, window @ ..], .. } => {
                    self.attach_matrix(b, site, Shapes { a: &window, ones: &[1, 1] }, out)?;
                }
                Kind::Embedding { rows, width } => self.attach_table(b, site, rows, width)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        Lora::config(self)
    }
}

impl Lora {
    /// (rank, s) at a site.
    fn scale_at(&self, path: &str) -> (usize, f32) {
        let rank = Pattern::find(&self.rank_pattern, path).map_or(self.rank, |r| r as usize);
        let alpha = Pattern::find(&self.alpha_pattern, path).unwrap_or(self.alpha);
        let divisor = if self.root_scaling { (rank as f64).sqrt() } else { rank as f64 };
        (rank, (alpha / divisor) as f32)
    }

    fn attach_matrix(&self, b: &mut Builder<'_>, site: &Site, shapes: Shapes<'_>, out: usize) -> Result<()> {
        let (path, inn) = (&site.path, shapes.a.iter().product());
        let (rank, scale) = self.scale_at(path);
        let (init_a, init_b) = match self.start {
            Start::Kaiming => (Init::kaiming(inn), Init::Zeros),
            Start::Gaussian => (Init::Normal(1.0 / rank as f32), Init::Zeros),
            Start::Random => (Init::kaiming(inn), Init::kaiming(rank)),
        };
        let factors = Factors {
            a: b.param(&format!("{path}.lora_A.weight"), &[&[rank], shapes.a].concat(), init_a)?,
            b: b.param(&format!("{path}.lora_B.weight"), &[&[out, rank], shapes.ones].concat(), init_b)?,
            scale,
            dropout: self.dropout,
        };
        if self.dora {
            let product = no_grad(|| factors.product())?;
            let norms = no_grad(|| row_norms(&site_weight(site)?.add(&product)?))?;
            let shape = match shapes.ones {
                [] => vec![out],
                ones => [&[1, out], ones].concat(),
            };
            let magnitude = b.param(&format!("{path}.lora_magnitude_vector"), &shape, Init::Values(norms))?;
            return b.patch(site.id, Patch::Weight(Box::new(Dora { factors, magnitude })));
        }
        if self.product_bias {
            self.attach_product_bias(b, site, out, scale)?;
        }
        b.patch(site.id, Patch::Weight(Box::new(factors)))
    }

    fn attach_table(&self, b: &mut Builder<'_>, site: &Site, rows: usize, width: usize) -> Result<()> {
        if self.dora {
            let message = "DoRA on an embedding is not supported; leave it out of the targets".into();
            return Err(Error::Site { path: site.path.clone(), message });
        }
        let (rank, scale) = self.scale_at(&site.path);
        let init_a = if self.start == Start::Random { Init::Normal(1.0) } else { Init::Zeros };
        let factors = Factors {
            a: b.param(&format!("{}.lora_embedding_A", site.path), &[rank, rows], init_a)?,
            b: b.param(&format!("{}.lora_embedding_B", site.path), &[width, rank], Init::Normal(1.0))?,
            scale,
            dropout: 0.0,
        };
        for head in tied::heads(b.sites(), site).filter(|_| self.tied) {
            let factors =
                Factors { scale: self.scale_at(&head.path).1, dropout: self.dropout, ..factors.clone() };
            b.patch(head.id, Patch::Weight(Box::new(Table(factors))))?;
        }
        b.patch(site.id, Patch::Weight(Box::new(Table(factors))))
    }
}

/// What `peft` has beyond matrices: the window of A and the ones that follow B's two sizes, at a convolution.
struct Shapes<'a> {
    a: &'a [usize],
    ones: &'a [usize],
}
