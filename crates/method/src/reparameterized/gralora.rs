//! GraLoRA: the weight cut into k × k blocks with a low-rank change each, at the cost of one LoRA of rank r.
//!
//! The block of outputs j and inputs n gets s·B_jn·A_nj of rank r/k, s = α/(r + r_hybrid); all blocks of one strip of inputs
//! share their A, cut by outputs, and those of one strip of outputs their B, cut by inputs. So ΔW may have rank k·r.
//! `hybrid_rank` adds a usual LoRA of that rank under the same s. A starts as Kaiming-uniform noise, B as zero, so W′ = W.
//! The forward makes k products of thin factors, exchanges the pieces between strips, and makes k more.
//!
//! Jung et al. 2025, arXiv:2505.20355.
//!
//! `gralora_A` [k, in/k, rank], `gralora_B` [k, rank, out/k]; `gralora_A_general.weight` [r_hybrid, in],
//! `gralora_B_general.weight` [out, r_hybrid].

use engraft_nn::{Base, Builder, Error, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::matrices;
use crate::shared::sizes;
use crate::{Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
/// What stands for the biases of the targets.
const OWN: &str = "gralora_only";

#[derive(Clone, Copy)]
struct Gralora {
    rank: usize,
    hybrid: usize,
    alpha: f64,
    strips: usize,
    dropout: f32,
    bias: Biases,
    init_weights: bool,
}

static INFO: Info = Info {
    name: "gralora",
    title: "GraLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2505.20355",
    summary: "k × k blocks of W, each with a low-rank change of its own",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "GRALORA",
    fields: &[
        int("rank", (1, 1024), Some("32"), "Rank r of a strip, a multiple of `k`; each block has rank r/k."),
        int("hybrid_rank", (0, 1024), Some("0"), "Rank of a usual LoRA beside the blocks."),
        float("alpha", (0.0, 1e9), "64", "The change is scaled by alpha/(rank + hybrid_rank)."),
        int(
            "k",
            (1, 64),
            Some("2"),
            "Strips that inputs and outputs are cut into; 2 up to rank 32, 4 from 64 on.",
        ),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of A while training."),
        choice("bias", &["none", "all", OWN], "\"none\"", "Which biases of the model are trained too."),
        flag("init_weights", "true", "Start B as zero; otherwise B is drawn too."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, ["rank", "hybrid_rank", "k", "dropout"]))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    r.ignore(&["fan_in_fan_out"]);
    let gralora = read(&mut r, ["r", "hybrid_r", "gralora_k", "gralora_dropout"]);
    r.finish()?;
    Ok(Some(Loaded { method: Box::new(gralora), targets, train_also }))
}

/// Recipes and files differ in four names.
fn read(r: &mut Reader<'_>, [rank, hybrid, strips, dropout]: [&'static str; 4]) -> Gralora {
    let found = Gralora {
        rank: r.count(rank, 32, RANK_MAX),
        hybrid: r.whole(hybrid, 0, RANK_MAX),
        alpha: r.float("alpha", 64.0),
        strips: r.count(strips, 2, 1 << 10),
        dropout: r.dropout(dropout),
        bias: Biases::read(r, OWN),
        init_weights: r.flag("init_weights", true),
    };
    if !found.rank.is_multiple_of(found.strips) {
        let text = format!(
            "`{rank}` is {}, expected a multiple of `{strips}`, which is {}",
            found.rank, found.strips
        );
        r.problem(text);
    }
    found
}

fn example() -> Box<dyn Method> {
    Box::new(Gralora {
        rank: 4,
        hybrid: 2,
        alpha: 6.0,
        strips: 2,
        dropout: 0.0,
        bias: Biases::None,
        init_weights: true,
    })
}

impl Method for Gralora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let least = |(out, inn): (usize, usize)| out.min(inn);
        let hybrid = sizes::beyond(targets, "hybrid_rank", |_| self.hybrid, least, sizes::IDLE);
        [sizes::beyond_rank(targets, |_| self.rank), hybrid].concat()
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        let (k, rank) = (self.strips, self.rank);
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            if !out.is_multiple_of(k) || !inn.is_multiple_of(k) {
                let message = format!(
                    "its {inn} inputs and {out} outputs cannot both be cut into {k} strips; choose another `k`"
                );
                return Err(Error::Site { path: site.path.clone(), message });
            }
            let name = |end: &str| format!("{}.gralora_{end}", site.path);
            let start = |fan_in: usize| if self.init_weights { Init::Zeros } else { Init::kaiming(fan_in) };
            let blocks = Blocks {
                a: b.param(&name("A"), &[k, inn / k, rank], Init::kaiming(inn / k))?,
                b: b.param(&name("B"), &[k, rank, out / k], start(rank))?,
                hybrid: match self.hybrid {
                    0 => None,
                    r => Some((
                        b.param(&name("A_general.weight"), &[r, inn], Init::kaiming(inn))?,
                        b.param(&name("B_general.weight"), &[out, r], start(r))?,
                    )),
                },
                scale: (self.alpha / (rank + self.hybrid) as f64) as f32,
                dropout: self.dropout,
            };
            b.patch(site.id, Patch::Weight(Box::new(blocks)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "alpha": number(self.alpha), "bias": self.bias.name(OWN), "fan_in_fan_out": false,
            "gralora_dropout": as_written(self.dropout), "gralora_k": self.strips, "hybrid_r": self.hybrid,
            "init_weights": self.init_weights, "layers_pattern": null, "layers_to_transform": null, "r": self.rank,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

struct Blocks {
    a: Param,
    b: Param,
    hybrid: Option<(Param, Param)>,
    scale: f32,
    dropout: f32,
}

impl Blocks {
    /// What the blocks add to the output of rows x [rows, in], without the scale.
    fn branch(&self, x: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.a.get(), self.b.get());
        let (rows, k, rank) = (x.rows(), a.dim(0), a.dim(2));
        let strips = x.reshape([rows, k, x.width() / k])?.permute(&[1, 0, 2])?;
        // [inputs' strip, rows, outputs' strip, rank/k]: the two kinds of strip change places.
        let pieces = strips.matmul(&a)?.reshape([k, rows, k, rank / k])?;
        let pieces = pieces.permute(&[2, 1, 0, 3])?.reshape([k, rows, rank])?;
        let y = pieces.matmul(&b)?; // [outputs' strip, rows, out/k]
        let out = k * y.width();
        Ok(y.permute(&[1, 0, 2])?.reshape([rows, out])?)
    }
}

impl WeightPatch for Blocks {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let (a, b) = (self.a.get(), self.b.get());
        let (k, part) = (a.dim(0), a.dim(2) / a.dim(0));
        let matrix = |t: &Tensor, strip: usize| t.rows_between(strip, strip + 1)?.reshape(&t.shape()[1..]);
        let mut rows = Vec::with_capacity(k);
        for j in 0..k {
            let mut blocks = Vec::with_capacity(k);
            for n in 0..k {
                let a = matrix(&a, n)?.narrow(1, j * part, part)?; // [in/k, rank/k]
                let b = matrix(&b, j)?.rows_between(n * part, (n + 1) * part)?; // [rank/k, out/k]
                blocks.push(b.t()?.matmul_t(&a)?);
            }
            rows.push(cat(&blocks.iter().collect::<Vec<_>>(), 1)?);
        }
        let mut change = cat(&rows.iter().collect::<Vec<_>>(), 0)?;
        if let Some((a, b)) = &self.hybrid {
            change = change.add(&b.get().matmul(&a.get())?)?;
        }
        Ok(base.dense()?.add(&change.scale(self.scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let branch = self.branch(&cx.dropout(x, self.dropout, site.id, 0)?)?;
        let y = base.forward(x)?.plus(&branch.scale(self.scale)?)?;
        let Some((a, b)) = &self.hybrid else { return Ok(y) };
        Ok(y.add_low_rank(&cx.dropout(x, self.dropout, site.id, 1)?, &a.get(), &b.get(), self.scale)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn blocks_exchange_their_pieces() {
        let x = sample(&[5, 6], 3);
        for (settings, count) in [
            (json!({ "rank": 4, "k": 2 }), 4),
            (json!({ "rank": 2, "k": 1, "hybrid_rank": 3 }), 2 + 3),
            (json!({ "rank": 2, "k": 2, "hybrid_rank": 1, "alpha": 5 }), 2 + 1),
        ] {
            let a = attached(&[chosen("gralora", settings)], &[]);
            assert_eq!(names(&a)[..2], ["layers.0.attn.q.gralora_A", "layers.0.attn.q.gralora_B"]);
            assert_eq!(a.adapter.trained_count(), 2 * count * (6 + 6 + 6 + 4));
            close(
                &both_ways(&a, "layers.0.attn.q", &x).0,
                &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(),
                1e-6,
            );
            stir(&a, 0.5);
            for path in ["layers.0.attn.q", "layers.1.attn.v"] {
                let (fast, defined) = both_ways(&a, path, &x);
                close(&fast, &defined, 1e-5);
            }
        }
    }

    #[test]
    fn one_strip_is_lora() {
        let a = attached(&[chosen("gralora", json!({ "rank": 2, "k": 1, "alpha": 6 }))], &[]);
        stir(&a, 0.5);
        let get = |end: &str| {
            let name = format!("layers.0.attn.q.gralora_{end}");
            a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value()
        };
        let change = get("A").reshape([6, 2]).unwrap().matmul(&get("B").reshape([2, 6]).unwrap()).unwrap();
        let expected = frozen("layers.0.attn.q").add(&change.t().unwrap().scale(3.0).unwrap()).unwrap();
        let x = sample(&[5, 6], 3);
        close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&expected).unwrap(), 1e-5);
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "rank": 6, "k": 2, "hybrid_rank": 2, "dropout": 0.1, "bias": "all" }),
            json!({ "rank": 2, "init_weights": false, "bias": "gralora_only" }),
        ] {
            survives_saving(&[chosen("gralora", settings)], &["head"]);
        }
        let bad = json!({ "rank": 3, "k": 2 });
        assert!(from_settings(bad.as_object().unwrap()).is_err());
        let (sites, info) = toy();
        let error = crate::attach(&[chosen("gralora", json!({ "rank": 3, "k": 3 }))], &[], &sites, &info, 0)
            .map(|_| ());
        assert!(error.unwrap_err().to_string().contains("into 3 strips"), "v has 4 outputs");
    }
}
