//! LoRA: a frozen weight plus a trained product of two thin matrices.
//!
//! W′ = W + s·B·A with s = α/r, or α/√r (rsLoRA); A starts as Kaiming-uniform noise, B as zero, so W′ = W.
//! The forward never forms W′: y = x·Wᵀ + s·(drop(x)·Aᵀ)·Bᵀ.
//!
//! Hu et al. 2022, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. Its variants have files of their own:
//! `dora` magnitudes, `start` and `prepare` other starts (PiSSA, OLoRA, EVA, CorDA, LoRA-GA, …), `factors` what may stand
//! between B and A (MoSLoRA) and dropout of rows and columns, `variants` KaSA and BD-LoRA, `form` those that are another product
//! in training or on some tokens (`velora`, `monteclora`, `alora`). LoRA+ (Hayou, Ghosh and Yu 2024, arXiv:2402.12354) is a
//! learning rate of B that is `lr_ratio` times that of A; LoRA-FA (Zhang et al. 2023, arXiv:2308.03303) an A that is not
//! trained, so that a layer's input need not be kept for backward.
//!
//! A [rank, in], B [out, rank]; of a table with `rows` rows: A [rank, rows], B [width, rank], W′ = W + s·(B·A)ᵀ;
//! of a head tied to it (`ensure_weight_tying`): the same A and B, y = x·Wᵀ + s·(drop(x)·B)·A;
//! of a convolution with windows [channels, height, width]: A [rank, channels, height, width], B [out, rank, 1, 1].

mod alora;
mod bias;
mod dora;
mod factors;
mod file;
mod form;
mod monteclora;
mod parameters;
mod prepare;
mod settings;
mod start;
#[cfg(test)]
mod tests;
mod variants;
mod velora;

use std::sync::Arc;

use engraft_nn::{
    Adapter, Builder, Error, Init, Kind, Patch, Resolution, Result, Site, SiteId, Sites, Targets,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value};

use crate::read::Pattern;
use crate::shared::biases::Biases;
use crate::shared::parameters::pattern_name;
use crate::shared::sizes;
use crate::shared::token_indices::Tokens;
use crate::{Calibration, Described, Entry, Info, Method, Named, Step, tied};
use factors::{Dropout, Factors, Inner, Table};
use file::Found;
pub use file::joined_start;
use form::{At, Form};
use prepare::Search;
use settings::INFO;
use start::{Pair, Start};
use variants::{Blocks, Kasa};

/// What is trained, and how it starts.
#[derive(Clone, Debug)]
struct Lora {
    rank: usize,
    alpha: f64,
    root_scaling: bool,
    dropout: Dropout,
    rank_pattern: Vec<Pattern>,
    alpha_pattern: Vec<Pattern>,
    bias: Biases,
    product_bias: bool,
    start: Start,
    /// How a start looks for what the data say.
    search: Search,
    dora: bool,
    mixer: Mixer,
    kasa: Option<Kasa>,
    blocks: Option<Blocks>,
    form: Form,
    /// A stays as it starts.
    freeze_a: bool,
    /// Learning rate of B over that of A.
    lr_ratio: f64,
    /// A head that shares the tensor of an adapted table is changed as the table is.
    tied: bool,
    /// Rows of tables that are trained beside the factors.
    tokens: Tokens,
    /// `target_parameters` of a file (`parameters`).
    parameters: Vec<String>,
    /// Whether it was read from a file: what such a file leaves out is made again as `peft` does.
    from_file: bool,
    /// Keys of such a file that say nothing of its tensors.
    kept: Map<String, Value>,
    found: Found,
}

/// What stands between B and A, and how it starts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mixer {
    None,
    Kaiming,
    Orthogonal,
}

/// The group of what LoRA+ trains faster, and of biases in it, which do not decay.
const FAST: &str = "lora_B";
const FAST_BIASES: &str = "lora_B, biases";

/// In the registry.
pub static ENTRY: Entry =
    Entry { info: &INFO, from_settings: settings::from_settings, from_file: file::from_file, example };

fn example() -> Box<dyn Method> {
    Box::new(Lora { rank: 3, alpha: 6.0, root_scaling: true, bias: Biases::All, ..Lora::default() })
}

impl Method for Lora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        sizes::beyond_rank(targets, |path| self.scale_at(path).0)
    }

    fn spare(&self, adapter: &Adapter, prefix: &str) -> usize {
        self.spare_ranks(adapter, prefix)
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        // Before the product's own bias, which is added to what stands in the layer's.
        self.bias.attach(b)?;
        self.tokens.attach(b)?;
        self.form.begin(b)?;
        // `peft` passes over them.
        if let Some(blocks) = self.blocks.as_ref().filter(|_| !self.from_file) {
            blocks.check(&b.targets())?;
        }
        let modules: Vec<SiteId> =
            b.targets().iter().filter(|site| !self.is_parameter(site)).map(|site| site.id).collect();
        let tied = if self.tied { tied::follow(b, &modules)? } else { vec![] };
        self.check_places(b, &tied)?;
        for site in b.targets().into_iter().filter(|site| !tied.contains(&site.id)) {
            match site.kind {
                Kind::Linear { out, inn, .. } if self.is_turned(site) => {
                    self.attach_matrix(b, site, Shapes { a: &[out], ones: &[] }, inn)?;
                }
                Kind::Linear { out, inn, .. } => {
                    self.attach_matrix(b, site, Shapes { a: &[inn], ones: &[] }, out)?;
                }
                Kind::Convolution { out, shape: [_, window @ ..], .. } => {
                    self.attach_matrix(b, site, Shapes { a: &window, ones: &[1, 1] }, out)?;
                }
                Kind::Embedding { rows, width } if self.is_parameter(site) => {
                    self.attach_matrix(b, site, Shapes { a: &[width], ones: &[] }, rows)?;
                }
                Kind::Embedding { rows, width } => self.attach_table(b, site, rows, width)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn learning_rate_factor(&self, group: &str) -> f32 {
        if [FAST, FAST_BIASES].contains(&group) { self.lr_ratio as f32 } else { 1.0 }
    }

    fn decays(&self, group: &str) -> bool {
        group != FAST_BIASES
    }

    fn prepare(&self, adapter: &Arc<Adapter>, base: &dyn Calibration) -> Result<()> {
        self.search_start(adapter, base)
    }

    fn penalty(&self, adapter: &Adapter, _step: Step) -> Result<Option<Tensor>> {
        self.kasa_penalty(adapter)
    }

    fn read_shapes(&mut self, tensors: &Named) {
        self.look_at(tensors);
    }

    fn in_type_of_model(&self, key: &str) -> bool {
        self.found.in_type_of_model(key)
    }

    fn resolve(&self, targets: &Targets, sites: &Sites) -> Result<Resolution> {
        self.chosen(targets, sites)
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        self.written(model)
    }

    fn file_tensors(&self, tensors: Named, state: &Named) -> Result<Named> {
        self.plain(tensors, state)
    }
}

impl Lora {
    /// (rank, s) at a site.
    fn scale_at(&self, path: &str) -> (usize, f32) {
        let path = &*pattern_name(&self.parameters, path);
        let rank = Pattern::find(&self.rank_pattern, path).map_or(self.rank, |r| r as usize);
        let alpha = Pattern::find(&self.alpha_pattern, path).unwrap_or(self.alpha);
        let divisor = if self.root_scaling { (rank as f64).sqrt() } else { rank as f64 };
        (rank, (alpha / divisor) as f32)
    }

    /// The group of B and of vectors, of biases where `bias` is set; with equal rates there is one group.
    fn group(&self, bias: bool) -> &'static str {
        match (self.lr_ratio == 1.0, bias) {
            (true, _) => "",
            (false, false) => FAST,
            (false, true) => FAST_BIASES,
        }
    }

    fn attach_matrix(&self, b: &mut Builder<'_>, site: &Site, shapes: Shapes<'_>, out: usize) -> Result<()> {
        let (path, inn) = (&site.path, shapes.a.iter().product());
        self.refuse_pooled(site, inn)?;
        let (rank, scale) = self.scale_at(path);
        let Pair { rank, a, b: init_b, taken } = self.pair(b, site, [out, inn], rank, scale)?;
        let blocks = match &self.blocks {
            Some(blocks) => blocks.at(site, [out, inn], rank)?,
            None => [1, 1],
        };
        let (shape_a, shape_b) = ([&[rank], shapes.a].concat(), [&[out, rank], shapes.ones].concat());
        let (shape_a, shape_b, a) = match blocks {
            [1, 1] => (shape_a, shape_b, a),
            // `kaiming_uniform_` of torch with its own a = 0, as peft draws blocks.
            [n, 1] => (vec![rank, inn / n], shape_b, Init::Uniform((6.0 / (inn / n) as f32).sqrt())),
            [_, n] => (shape_a, vec![out, rank / n], a),
        };
        let (name_a, name_b) = (format!("{path}.lora_A.weight"), format!("{path}.lora_B.weight"));
        let factors = Factors {
            a: if self.freeze_a { b.fixed(&name_a, &shape_a, a)? } else { b.param(&name_a, &shape_a, a)? },
            b: match self.start {
                Start::Mica => b.fixed(&name_b, &shape_b, init_b)?,
                _ => b.param_in_group(&name_b, &shape_b, init_b, self.group(false))?,
            },
            inner: self.attach_inner(b, path, rank)?,
            blocks,
            taken: match taken {
                None => None,
                Some((a, b0)) => Some((
                    b.state(&format!("{path}.lora_A.start"), &shape_a, a)?,
                    b.state(&format!("{path}.lora_B.start"), &shape_b, b0)?,
                )),
            },
            form: self.form.at(b, site, rank)?,
            scale,
            dropout: self.dropout,
        };
        if self.dora {
            return self.attach_magnitude(b, site, factors, &shapes);
        }
        if self.product_bias {
            self.attach_product_bias(b, site, out, &factors)?;
        }
        b.patch(
            site.id,
            Patch::Weight(if self.is_turned(site) { Box::new(Table(factors)) } else { Box::new(factors) }),
        )
    }

    /// What stands between B and A: nothing, KaSA's diagonal, or M [rank, rank], drawn as Wu et al. 2024 (arXiv:2406.11909) draw it: started at zero, nothing would ever be learned.
    fn attach_inner(&self, b: &mut Builder<'_>, path: &str, rank: usize) -> Result<Inner> {
        let init = match self.mixer {
            Mixer::None if self.kasa.is_some() => {
                return Ok(Inner::Diagonal(self.attach_diagonal(b, path, rank)?));
            }
            Mixer::None => return Ok(Inner::Nothing),
            Mixer::Kaiming => Init::kaiming(rank),
            Mixer::Orthogonal => Init::Values(start::orthogonal(rank, b.seed(), path)?),
        };
        Ok(Inner::Mixer(b.param(&format!("{path}.lora_mixer"), &[rank, rank], init)?))
    }

    fn attach_table(&self, b: &mut Builder<'_>, site: &Site, rows: usize, width: usize) -> Result<()> {
        self.fits_a_table(site)?;
        let (rank, scale) = self.scale_at(&site.path);
        let init_a = if self.start == Start::Random { Init::Normal(1.0) } else { Init::Zeros };
        let factors = Factors {
            a: b.param(&format!("{}.lora_embedding_A", site.path), &[rank, rows], init_a)?,
            b: b.param(&format!("{}.lora_embedding_B", site.path), &[width, rank], Init::Normal(1.0))?,
            inner: Inner::Nothing,
            blocks: [1, 1],
            taken: None,
            form: At::Plain,
            scale,
            dropout: Dropout::default(),
        };
        if self.dora {
            return self.attach_table_magnitude(b, site, factors);
        }
        for head in tied::heads(b.sites(), site).filter(|_| self.tied) {
            let factors =
                Factors { scale: self.scale_at(&head.path).1, dropout: self.dropout, ..factors.clone() };
            b.patch(head.id, Patch::Weight(Box::new(Table(factors))))?;
        }
        b.patch(site.id, Patch::Weight(Box::new(Table(factors))))
    }

    /// What is made for matrices is refused at a table; files in which `peft` started it as usual are read.
    fn fits_a_table(&self, site: &Site) -> Result<()> {
        let starts = matches!(self.start, Start::Kaiming | Start::Gaussian | Start::Random);
        let form = self
            .form
            .name()
            .map(|name| format!("{name} is for matrices; leave the table out of the targets"));
        let message = if let Some(message) = &form {
            message
        } else if !starts && !self.from_file {
            "this `init` starts matrices; leave the table out of the targets, or set `init = \"kaiming\"`"
        } else if self.mixer != Mixer::None || self.kasa.is_some() || self.blocks.is_some() {
            "mixers, KaSA and blocks are for matrices; leave the table out of the targets"
        } else if self.freeze_a {
            "at a table A starts at zero and must be trained; leave the table out of the targets"
        } else if self.dropout.structured > 0.0 {
            "`structured_dropout` is for matrices; leave the table out of the targets"
        } else if self.dora && self.tied && tied::tied_to(site) {
            "magnitudes of a table with a tied head are not supported; set `ensure_weight_tying` to false"
        } else {
            return Ok(());
        };
        Err(Error::Site { path: site.path.clone(), message: message.into() })
    }
}

/// What `peft` has beyond matrices: the window of A and the ones that follow B's two sizes, at a convolution.
struct Shapes<'a> {
    a: &'a [usize],
    ones: &'a [usize],
}

/// The parameter of this adapter that is called `name`, whatever the place of its method among several.
///
/// # Errors
/// Several are called so: two methods have product at one weight.
fn named<'a>(adapter: &'a Adapter, name: &str) -> Result<Option<&'a Param>> {
    let is = |own: &str| {
        own == name || own.split_once('.').is_some_and(|(n, rest)| rest == name && n.parse::<usize>().is_ok())
    };
    let mut found = adapter.params().iter().filter(|p| is(&p.name));
    match (found.next(), found.next()) {
        (Some(_), Some(_)) => Err(Error::Unsupported(format!(
            "two methods have a tensor `{name}`; a start from data can be that of one LoRA at a weight alone: set \
             `init = \"kaiming\"` at the other"
        ))),
        (found, _) => Ok(found.map(|p| &p.param)),
    }
}
