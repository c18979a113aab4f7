//! C3A: a change of the weight made of circulant blocks.
//!
//! W′[m·b + j, n·b + p] = W[·] + w[m, n, (p − j) mod b]/in: a block b×b is one vector, turned by one place a row. A transform of
//! the blocks of x turns the product into one of (out/b)×(in/b) matrices for each frequency, so ΔW is not formed where blocks
//! are long. The vectors start as Xavier-uniform noise, which changes the model, or otherwise, as `init` says.
//!
//! Chen et al. 2024, arXiv:2407.19342. As `peft` has it, the division by `in` included, but for training: the input's gradient that
//! `peft` 0.21 writes by hand is not that of its forward, and here it is.
//!
//! c3a_kernel (w) [out/b, in/b, b].

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Pattern, Reader};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, int};
use crate::shared::{divisors, places};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const SIZE_MAX: usize = 1 << 20;
const OF_TARGETS: &str = "c3a_only";
/// Blocks shorter than this are multiplied as a formed matrix: the transforms would cost more.
const SHORT: usize = 8;

struct C3a {
    block_size: usize,
    start: Start,
    bias: Biases,
    block_size_pattern: Vec<Pattern>,
}

/// How the vectors start.
#[derive(Clone, Copy, PartialEq)]
enum Start {
    Xavier,
    Kaiming,
    Gaussian,
    Zeros,
}

const STARTS: &[(&str, Start)] = &[
    ("xavier_uniform", Start::Xavier),
    ("kaiming_uniform", Start::Kaiming),
    ("gaussian", Start::Gaussian),
    ("zeros", Start::Zeros),
];

static INFO: Info = Info {
    name: "c3a",
    title: "C3A",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2407.19342",
    summary: "W′ = W + a matrix of circulant blocks, each one vector",
    mergeable: true,
    identity_at_init: false,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "C3A",
    fields: &[
        int(
            "block_size",
            (1, SIZE_MAX as i64),
            Some("256"),
            "Size b of the blocks, a divisor of the targets' inputs and outputs; they train in·out/b numbers.",
        ),
        choice(
            "init",
            &["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"],
            "\"xavier_uniform\"",
            "How the vectors start; all but zeros change the model from the start.",
        ),
        choice(
            "bias",
            &["none", "all", OF_TARGETS],
            "\"none\"",
            "Which biases of the model are trained too.",
        ),
        Field {
            name: "block_size_pattern",
            kind: FieldKind::IntMap,
            default: Some("{}"),
            doc: "Other block sizes for modules that a pattern matches.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| C3a { start: r.one_of("init", STARTS), ..read(r) })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let start = match r.value("init_weights").cloned() {
        Some(Value::Bool(true)) => Start::Zeros,
        // `false` is the default start too.
        None | Some(Value::Bool(false)) => Start::Xavier,
        Some(_) => r.one_of("init_weights", &STARTS[..3]),
    };
    let c3a = C3a { start, ..read(&mut r) };
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(c3a), targets, train_also }))
}

fn read(r: &mut Reader<'_>) -> C3a {
    let c3a = C3a {
        block_size: r.count("block_size", 256, SIZE_MAX),
        start: Start::Xavier,
        bias: Biases::read(r, OF_TARGETS),
        block_size_pattern: r.patterns("block_size_pattern"),
    };
    for p in c3a.block_size_pattern.iter().filter_map(|p| p.not_a_count(SIZE_MAX)) {
        r.problem(format!("`block_size_pattern`: expected a whole number from 1 to {SIZE_MAX}, found {p}"));
    }
    c3a
}

fn example() -> Box<dyn Method> {
    let (bias, block_size_pattern) = (Biases::None, vec![]);
    Box::new(C3a { block_size: 2, start: Start::Gaussian, bias, block_size_pattern })
}

impl Method for C3a {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            let found = Pattern::find(&self.block_size_pattern, &site.path);
            let size = found.map_or(self.block_size, |n| n as usize);
            if !out.is_multiple_of(size) || !inn.is_multiple_of(size) {
                let message = format!(
                    "[{out}, {inn}] cannot be cut into blocks of {size}; choose a `block_size` that divides both, such as {}",
                    divisors::near(size, &[out, inn])
                );
                return places::unfit(site, message);
            }
            let init = match self.start {
                Start::Xavier => Init::Uniform((6.0 / (out + inn) as f32).sqrt()),
                Start::Kaiming => Init::kaiming(inn),
                Start::Gaussian => Init::Normal(1.0),
                Start::Zeros => Init::Zeros,
            };
            let kernel =
                b.param(&format!("{}.c3a_kernel", site.path), &[out / size, inn / size, size], init)?;
            b.patch(site.id, Patch::Weight(Box::new(Circulant(kernel))))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let start = match self.start {
            Start::Zeros => json!(true),
            start => json!(STARTS.iter().find(|(_, s)| *s == start).map(|(name, _)| name)),
        };
        let own = json!({
            "bias": self.bias.name(OF_TARGETS), "block_size": self.block_size,
            "block_size_pattern": Pattern::table(&self.block_size_pattern), "init_weights": start,
            "layers_pattern": null, "layers_to_transform": null,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// Blocks that are circulant.
struct Circulant(Param);

impl Circulant {
    /// The vectors [out/b, in/b, b], divided by the number of inputs.
    fn kernel(&self) -> Result<Tensor> {
        let kernel = self.0.get();
        let inn = kernel.dim(1) * kernel.dim(2);
        Ok(kernel.scale(1.0 / inn as f32)?)
    }

    /// ΔW.
    fn formed(&self) -> Result<Tensor> {
        let kernel = self.kernel()?;
        let (down, across, b) = (kernel.dim(0), kernel.dim(1), kernel.dim(2));
        let mut index = Vec::with_capacity(down * across * b * b);
        for row in 0..down * b {
            let (m, j) = (row / b, row % b);
            for n in 0..across {
                index.extend((0..b).map(|p| ((m * across + n) * b + (p + b - j) % b) as i64));
            }
        }
        let index = Tensor::from_i64(index.clone(), [index.len()])?;
        Ok(kernel.reshape([kernel.len(), 1])?.gather(&index)?.reshape([down * b, across * b])?)
    }

    /// x·ΔWᵀ by frequencies: the transform of a block of the result is Σₙ of those of x, times the conjugates of those of w.
    fn by_frequencies(&self, x: &Tensor) -> Result<Tensor> {
        let kernel = self.kernel()?;
        let (down, across, b) = (kernel.dim(0), kernel.dim(1), kernel.dim(2));
        let (rows, half) = (x.rows(), b / 2 + 1);
        let x = x.reshape([rows, across, b])?.rfft()?.permute(&[2, 0, 1, 3])?;
        let x = x.reshape([half, rows, 2 * across])?;
        // (re, im)·turn = (−im, re), which gives the imaginary part of the product with the conjugate.
        let turn = Tensor::from_vec(vec![0.0, 1.0, -1.0, 0.0], [2, 2])?;
        let w = kernel.rfft()?;
        let both = [&w, &w.matmul(&turn)?].map(|w| w.reshape([down, 1, across, half, 2]));
        let [real, imaginary] = both;
        let w = cat(&[&real?, &imaginary?], 1)?.permute(&[3, 0, 1, 2, 4])?;
        let y = x.matmul_t(&w.reshape([half, 2 * down, 2 * across])?)?;
        let y = y.reshape([half, rows, down, 2])?.permute(&[1, 2, 0, 3])?.irfft(b)?;
        Ok(y.reshape([rows, down * b])?)
    }
}

impl WeightPatch for Circulant {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        Ok(base.dense()?.add(&self.formed()?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let moved = match self.0.value().dim(2) < SHORT {
            true => x.matmul_t(&self.formed()?)?,
            false => self.by_frequencies(x)?,
        };
        Ok(base.forward(x)?.plus(&moved)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn both_forms_are_the_circulant_matrix() {
        for (down, across, b) in [(2, 3, 4), (1, 2, 5), (3, 1, 8), (2, 2, 1)] {
            let w = sample(&[down, across, b], 1);
            let patch = Circulant(Param::new(w.clone()));
            let (values, formed) = (w.to_vec().unwrap(), patch.formed().unwrap().to_vec().unwrap());
            let inn = across * b;
            for (at, found) in formed.iter().enumerate() {
                let (row, column) = (at / inn, at % inn);
                let place = ((row / b) * across + column / b) * b + (column % b + b - row % b) % b;
                assert!((found - values[place] / inn as f32).abs() < 1e-6);
            }
            let x = sample(&[5, inn], 2);
            let expected = x.matmul_t(&patch.formed().unwrap()).unwrap();
            close(&patch.by_frequencies(&x).unwrap(), &expected, 1e-5);
            // The gradients of both forms, at the input and at the vectors.
            let dy = sample(expected.shape(), 3);
            let gradients = |forward: &dyn Fn(&Circulant, &Tensor) -> Result<Tensor>| {
                let (x, patch) = (Param::new(x.clone()), Circulant(Param::new(w.clone())));
                let g = forward(&patch, &x.get()).unwrap().backward_from(dy.clone()).unwrap();
                [g.get(&x).unwrap().clone(), g.get(&patch.0).unwrap().clone()]
            };
            let by_matrix = gradients(&|patch, x| Ok(x.matmul_t(&patch.formed()?)?));
            let by_frequencies = gradients(&|patch, x| patch.by_frequencies(x));
            by_frequencies.iter().zip(&by_matrix).for_each(|(a, b)| close(a, b, 1e-5));
        }
    }

    #[test]
    fn configurations() {
        let a = attached(&[chosen("c3a", json!({ "block_size": 2 }))], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (6 * 6 + 4 * 6) / 2);
        let settings = json!({ "block_size": 2, "bias": "c3a_only", "block_size_pattern": { "q": 3 } });
        survives_saving(&[chosen("c3a", settings)], &["head"]);
        let written = config(&[chosen("c3a", json!({ "block_size": 2, "init": "zeros" }))], &[]);
        assert_eq!(written["init_weights"], json!(true));
        for bad in [json!({ "init_weights": "orthogonal" }), json!({ "block_size": 0 })] {
            assert!(from_file(&with(written.clone(), bad)).is_err());
        }
        let (sites, info) = toy();
        assert!(crate::attach(&[chosen("c3a", json!({ "block_size": 4 }))], &[], &sites, &info, 0).is_err());
    }
}
