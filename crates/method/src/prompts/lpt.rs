//! LPT, late prompt tuning: a prompt that enters in the middle of the model, made for each sequence from its states there.
//!
//! H ← [P(x); H] before block `layer`; the rows go through that block and those after it and leave before the head. The
//! blocks below keep no activations and get no gradient. P of a sequence with states H:
//!   naive:    W₂·ReLU(W₁·h + b₁) + b₂, read as [tokens, width], h the state of one token;
//!   average:  W₂·ReLU(pool(W₁·H + b₁)) + b₂, pool the means of `tokens` equal stretches (of n states, stretch i is
//!   max       ⌊i·n/tokens⌋ to ⌈(i+1)·n/tokens⌉), or their greatest numbers;
//!   none:     trained rows, the same for all.
//! Dropout on the rows. Tokens are counted from the first row of P from there on.
//!
//! Liu et al. 2022, arXiv:2210.11292; generators as in the authors' code.
//!
//! lpt_down.weight [bottleneck, width], lpt_up.weight [tokens·width or width, bottleneck], lpt_down.bias, lpt_up.bias, or
//! prompt_embeddings [tokens, width]; PyTorch's start of linear layers, N(0, 1) without generator.

use std::ops::Range;
use std::sync::Arc;

use engraft_nn::{BlockPatch, Builder, Error, Init, Kind, Pass, Patch, Result, Site, Task};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::{TOKENS_MAX, prompt_site};
use crate::read::{Reader, as_written};
use crate::shared::carried::Carried;
use crate::shared::fields::{choice, float, int};
use crate::shared::sequences::{self, Summary};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const SIZE_MAX: usize = 1 << 20;

#[derive(Clone, Debug)]
struct Lpt {
    tokens: usize,
    /// The first block that reads the prompt; half of them where nothing is said.
    layer: Option<usize>,
    generator: Generator,
    bottleneck: usize,
    from: Option<Summary>,
    dropout: f32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Generator {
    Naive,
    Average,
    Max,
    None,
}

const GENERATORS: &[(&str, Generator)] = &[
    ("naive", Generator::Naive),
    ("average", Generator::Average),
    ("max", Generator::Max),
    ("none", Generator::None),
];

static INFO: Info = Info {
    name: "lpt",
    title: "Late prompt tuning",
    class: "prompt",
    sites: "block",
    paper: "arXiv:2210.11292",
    summary: "a prompt that enters in the middle of the model, made for each sequence from its states there",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_LPT",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("5"), "Number of rows."),
        int("layer", (1, 4096), None, "The first block that reads the prompt; half of them if absent."),
        choice(
            "generator",
            &["naive", "average", "max", "none"],
            "\"naive\"",
            "Made of one token's state, of pooled states, or not made but trained.",
        ),
        int("bottleneck", (1, SIZE_MAX as i64), Some("256"), "Inner size of the generator."),
        sequences::field(
            None,
            "What the naive generator reads; last for causal language models, else first. Tokens that are to be predicted are not read.",
        ),
        float("dropout", (0.0, 0.999), "0.1", "Dropout on the rows, while training."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Lpt {
    Lpt {
        tokens: r.count("tokens", 5, TOKENS_MAX),
        layer: r.value("layer").is_some().then(|| r.count("layer", 1, 4096)),
        generator: r.one_of("generator", GENERATORS),
        bottleneck: r.count("bottleneck", 256, SIZE_MAX),
        from: Summary::read(r),
        dropout: r.dropout("dropout"),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    let (generator, dropout) = (Generator::Average, 0.0);
    Box::new(Lpt { tokens: 3, layer: None, generator, bottleneck: 4, from: None, dropout })
}

impl Method for Lpt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("bottleneck·(d + 1) + (bottleneck + 1)·tokens·d")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (prompt, width) = prompt_site(b.sites(), INFO.title)?;
        let own = b.sites().of_kind(|k| matches!(k, Kind::Block { .. })).filter(|s| s.stack == prompt.stack);
        let blocks: Vec<&Site> = own.collect();
        let first = self.first(blocks.len());
        if first == 0 || first >= blocks.len() {
            return Err(Error::Unsupported(format!(
                "`layer` of LPT must lie from 1 to {}, the last block; a prompt before all of them is the method `prompt`",
                blocks.len().saturating_sub(1)
            )));
        }
        let late = Arc::new(Late {
            rows: self.rows(b, width)?,
            method: self.clone(),
            summary: self.summary(b.info().task),
        });
        for (i, site) in blocks.iter().enumerate().skip(first) {
            let carried = Carried {
                key: format!("{}lpt.rows", b.prefix()),
                count: self.tokens,
                begins: i == first,
                ends: i + 1 == blocks.len(),
            };
            let patch = At { late: late.clone(), carried };
            b.patch(site.id, Patch::Block(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let generator = GENERATORS.iter().find(|g| g.1 == self.generator).map_or("naive", |g| g.0);
        let mut own = json!({
            "bottleneck": self.bottleneck, "dropout": as_written(self.dropout),
            "summary": self.summary(model.info.task).name(), "generator": generator, "tokens": self.tokens,
        });
        if let Some(layer) = self.layer {
            own["layer"] = layer.into();
        }
        own.as_object().cloned().unwrap_or_default()
    }
}

impl Lpt {
    fn first(&self, blocks: usize) -> usize {
        self.layer.unwrap_or(blocks / 2)
    }

    fn summary(&self, task: Task) -> Summary {
        self.from.unwrap_or(Summary::usual(task))
    }

    fn rows(&self, b: &mut Builder<'_>, width: usize) -> Result<Rows> {
        let out = match self.generator {
            Generator::None => {
                let shape = [self.tokens, width];
                return Ok(Rows::Trained(b.param("prompt_embeddings", &shape, Init::Normal(1.0))?));
            }
            Generator::Naive => self.tokens * width,
            Generator::Average | Generator::Max => width,
        };
        let inner = self.bottleneck;
        let mut linear = |name: &str, (out, inn): (usize, usize)| -> Result<(Param, Param)> {
            let weight = b.param(&format!("{name}.weight"), &[out, inn], Init::kaiming(inn))?;
            Ok((weight, b.param(&format!("{name}.bias"), &[out], Init::kaiming(inn))?))
        };
        Ok(Rows::Made { down: linear("lpt_down", (inner, width))?, up: linear("lpt_up", (out, inner))? })
    }
}

/// Where the rows come from.
enum Rows {
    Trained(Param),
    /// W and b of two linear layers.
    Made {
        down: (Param, Param),
        up: (Param, Param),
    },
}

struct Late {
    rows: Rows,
    method: Lpt,
    summary: Summary,
}

fn linear(x: &Tensor, (weight, bias): &(Param, Param)) -> Result<Tensor> {
    Ok(x.matmul_t(&weight.get())?.plus(&bias.get())?)
}

impl Late {
    /// P [tokens, width] or [sequences · tokens, width], from the states h [tokens, width].
    fn make(&self, h: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let (down, up) = match &self.rows {
            Rows::Trained(rows) => return Ok(rows.get()),
            Rows::Made { down, up } => (down, up),
        };
        let tokens = self.method.tokens;
        let inner = match self.method.generator {
            Generator::Average => averages(&linear(h, down)?, &cx.given(), tokens)?,
            Generator::Max => greatest(&linear(h, down)?, &cx.given(), tokens)?,
            _ => linear(&self.summary.of(h, cx)?, down)?,
        };
        let rows = linear(&inner.unary(Unary::Relu)?, up)?;
        let count = cx.layout().sequences().len() * tokens;
        cx.dropout(&rows.reshape([count, h.width()])?, self.method.dropout, site.id, 0)
    }
}

/// The rows that each of `parts` equal stretches of a sequence covers, as PyTorch's adaptive pooling cuts them.
fn stretches(own: &Range<usize>, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let (start, n) = (own.start, own.len());
    (0..parts).map(move |i| start + i * n / parts..start + ((i + 1) * n).div_ceil(parts))
}

/// Means of stretches: x [tokens, width] → [sequences · parts, width].
fn averages(x: &Tensor, given: &[Range<usize>], parts: usize) -> Result<Tensor> {
    let (mut rows, mut owners, mut shares) = (vec![], vec![], vec![]);
    for stretch in given.iter().flat_map(|own| stretches(own, parts)) {
        owners.extend(std::iter::repeat_n(shares.len() as i64, stretch.len()));
        shares.push(1.0 / stretch.len().max(1) as f32);
        rows.extend(stretch.map(|row| row as i64));
    }
    let (count, bins) = (rows.len(), shares.len());
    let all = x.gather(&Tensor::from_i64(rows, [count])?)?;
    let sums = all.scatter_add(&Tensor::from_i64(owners, [count])?, bins)?;
    Ok(sums.mul(&Tensor::from_vec(shares, [bins, 1])?)?)
}

/// The greatest numbers of stretches: x [tokens, width] → [sequences · parts, width].
fn greatest(x: &Tensor, given: &[Range<usize>], parts: usize) -> Result<Tensor> {
    let all: Vec<Range<usize>> = given.iter().flat_map(|own| stretches(own, parts)).collect();
    let longest = all.iter().map(Range::len).max().unwrap_or(1);
    // Shorter stretches have their first row several times, which changes no greatest number.
    let row = |s: &Range<usize>, i: usize| if i < s.len() { s.start + i } else { s.start } as i64;
    let rows: Vec<i64> = all.iter().flat_map(|s| (0..longest).map(move |i| row(s, i))).collect();
    let count = rows.len();
    let rows = x.gather(&Tensor::from_i64(rows, [count])?)?.reshape([all.len(), longest, x.width()])?;
    Ok(rows.permute(&[0, 2, 1])?.top_k(1)?.0.reshape([all.len(), x.width()])?)
}

/// One block at which the rows are there.
struct At {
    late: Arc<Late>,
    carried: Carried,
}

impl BlockPatch for At {
    fn rows_before(&self) -> usize {
        self.late.method.tokens
    }

    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        Ok(self.carried.through(h, run, site, cx, || self.late.make(h, site, cx))?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{check_gradients, close, sample};

    fn small(more: Value) -> crate::Chosen {
        chosen("lpt", with(json!({ "tokens": 2, "bottleneck": 3, "dropout": 0.0 }), more))
    }

    /// What the block sees, of sequences of 2 and 3 rows, and what comes out behind it where the block doubles its rows.
    fn run(a: &crate::Attached, h: &Tensor) -> (Tensor, Tensor) {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "layers.1"));
        let [Patch::Block(p)] = a.adapter.at(site.id) else { panic!("no prompt at the second block") };
        let cx = Pass::new(Layout::counted(&[2, 3]).unwrap(), None);
        let seen = std::cell::RefCell::new(None);
        let block = |h: &Tensor, _: &Pass| -> Result<Tensor> {
            *seen.borrow_mut() = Some(h.clone());
            Ok(h.scale(2.0)?)
        };
        let out = p.around(h, &block, site, &cx).unwrap();
        (seen.into_inner().unwrap(), out)
    }

    #[test]
    fn rows_enter_before_the_block_and_leave_after_the_last() {
        let a = attached(&[small(json!({}))], &[]);
        // m·d + m + (m + 1)·l·d.
        assert_eq!(a.adapter.trained_count(), 3 * 6 + 3 + 4 * 12);
        let (sites, _) = toy();
        assert!(a.adapter.at(site_id(&sites, "layers.0")).is_empty(), "blocks below have nothing");
        let h = sample(&[5, 6], 1);
        let (seen, out) = run(&a, &h);
        assert_eq!(seen.dim(0), 9);
        close(&out, &h.scale(2.0).unwrap(), 0.0);
        close(&seen.rows_between(2, 4).unwrap(), &h.rows_between(0, 2).unwrap(), 0.0);
        // The prompt of a causal model is made of its last token.
        let get = |name: &str| value_of(&a, name);
        let z = h.rows_between(4, 5).unwrap();
        let inner = z.matmul_t(&get("lpt_down.weight")).unwrap().add(&get("lpt_down.bias")).unwrap();
        let own = inner.unary(Unary::Relu).unwrap().matmul_t(&get("lpt_up.weight")).unwrap();
        let own = own.add(&get("lpt_up.bias")).unwrap().reshape([2, 6]).unwrap();
        close(&seen.rows_between(4, 6).unwrap(), &own, 1e-6);
    }

    #[test]
    fn pooling_cuts_a_sequence_into_equal_stretches() {
        let x = sample(&[7, 2], 3);
        let v = x.to_vec().unwrap();
        let given = [0..1, 1..7];
        let cut: Vec<Range<usize>> = given.iter().flat_map(|own| stretches(own, 4)).collect();
        assert_eq!(cut, [0..1, 0..1, 0..1, 0..1, 1..3, 2..4, 4..6, 5..7]);
        let (mean, most) = (averages(&x, &given, 4).unwrap(), greatest(&x, &given, 4).unwrap());
        let (mean, most) = (mean.to_vec().unwrap(), most.to_vec().unwrap());
        for (bin, rows) in cut.into_iter().enumerate() {
            for c in 0..2 {
                let own: Vec<f32> = rows.clone().map(|r| v[2 * r + c]).collect();
                assert!((mean[2 * bin + c] - own.iter().sum::<f32>() / own.len() as f32).abs() < 1e-6);
                assert_eq!(most[2 * bin + c], own.iter().copied().fold(f32::MIN, f32::max));
            }
        }
        let lift = |r: Result<Tensor>| r.map_err(|e| panic!("{e}"));
        check_gradients(std::slice::from_ref(&x), |x| lift(averages(&x[0], &given, 4))).unwrap();
        check_gradients(&[x], |x| lift(greatest(&x[0], &given, 4))).unwrap();
    }

    #[test]
    fn configurations() {
        for more in [
            json!({}),
            json!({ "generator": "average", "layer": 1 }),
            json!({ "generator": "max", "summary": "mean" }),
            json!({ "generator": "none" }),
        ] {
            survives_saving(&[small(more)], &["head"]);
        }
        let (sites, info) = toy();
        let outside = crate::attach(&[small(json!({ "layer": 2 }))], &[], &sites, &info, 1);
        let error = outside.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("`layer`") && error.contains("`prompt`"), "{error}");
        let good = config(&[small(json!({}))], &[]);
        for bad in [json!({ "generator": "rnn" }), json!({ "layer": 0 }), json!({ "odd": 1 })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
