//! ReFT: low-rank interventions on what blocks give out, at the first and last positions of a sequence.
//!
//! LoReFT: h′ = h + Pᵀ·(W·h + b − P·h), P [r, width] with orthonormal rows; NoReFT: the same with a free P; DiReFT: h′ = h +
//! Pᵀ·(W·h + b). The first `prefix` and the last `suffix` positions of each sequence have interventions of their own (where
//! both meet the last ones hold), or one for both with `tied`. Positions are those of what is read: while a text is generated, what
//! is written is left as it is, and an answer that is trained on likewise; a text without a prompt is read as a whole.
//!
//! P's rows are the first r columns of base·H₁…H_r, Householder reflections under a fixed orthogonal base, as PyTorch's
//! parametrisation has it, so that any step keeps them orthonormal. W starts Kaiming-uniform.
//!
//! Wu et al. 2024, arXiv:2404.03592, equations 2 to 4; the file form is that of AdapterHub's `adapters` 1.3, whose files do not
//! say that P·h is not taken off (DiReFT): ours do.
//!
//! BLOCK.reft_layer.refts.NAME.units.U: learned_source.weight (W) [r, width], learned_source.bias (b) `[r]`, projection.weight (P)
//! [r, width] or projection.parametrizations.weight.original [r, width] and weight.0.base [width, width].

use engraft_nn::{BlockPatch, Builder, Error, Init, Kind, Pass, Patch, Result, Site};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, linalg};
use serde_json::{Map, Value, json};

use super::bottleneck::{around, from_adapter_hub};
use crate::adapter_hub::hub_name;
use crate::read::{Reader, as_written};
use crate::shared::activations::{ACTIVATIONS, Activation, NAMES};
use crate::shared::fields::{choice, flag, float, int};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1024;
const POSITIONS_MAX: usize = 1 << 20;

#[derive(Clone)]
struct Reft {
    name: String,
    /// Numbers of the blocks; all if absent.
    layers: Option<Vec<usize>>,
    prefix: usize,
    suffix: usize,
    rank: usize,
    orthogonal: bool,
    subtracts: bool,
    tied: bool,
    activation: Option<Activation>,
    dropout: f32,
    seed: Value,
}

static INFO: Info = Info {
    name: "reft",
    title: "ReFT",
    class: "additive",
    sites: "block",
    paper: "arXiv:2404.03592",
    summary: "low-rank interventions on the outputs of blocks at the first and last positions (LoReFT, NoReFT, DiReFT)",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_REFT",
    fields: &[
        choice(
            "form",
            &["loreft", "noreft", "direft"],
            "\"loreft\"",
            "An orthonormal P, a free one, or a free one whose part of h stays.",
        ),
        int("rank", (1, RANK_MAX as i64), Some("1"), "Rows r of P."),
        int("prefix", (0, POSITIONS_MAX as i64), Some("3"), "How many of the first positions are changed."),
        int("suffix", (0, POSITIONS_MAX as i64), Some("0"), "How many of the last positions are changed."),
        Field {
            name: "blocks",
            kind: FieldKind::IntList,
            default: None,
            doc: "Numbers of the blocks, an encoder's before a decoder's; all by default.",
        },
        flag("tied", "false", "One intervention for first and last positions."),
        Field {
            name: "activation",
            kind: FieldKind::OneOf(NAMES),
            default: None,
            doc: "Function of W·h + b; none by default.",
        },
        float(
            "dropout",
            (0.0, 0.999),
            "0.05",
            "Dropout on what the changed positions become, while training.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let forms = [("loreft", (true, true)), ("noreft", (false, true)), ("direft", (false, false))];
    let (orthogonal, subtracts) = r.one_of("form", &forms);
    let named = r.value("activation").is_some();
    let method = Reft {
        name: "engraft".into(),
        layers: r.counts("blocks"),
        prefix: r.whole("prefix", 3, POSITIONS_MAX),
        suffix: r.whole("suffix", 0, POSITIONS_MAX),
        rank: r.count("rank", 1, RANK_MAX),
        orthogonal,
        subtracts,
        tied: r.flag("tied", false),
        activation: named.then(|| r.one_of("activation", ACTIVATIONS)),
        dropout: r.dropout("dropout"),
        seed: Value::Null,
    };
    if method.prefix + method.suffix == 0 {
        r.problem("`prefix` and `suffix` are both 0, so that nothing would be changed; set one of them");
    }
    r.finish()?;
    Ok(Box::new(method))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some((inner, name)) = from_adapter_hub(config, &INFO) else { return Ok(None) };
    let ours = peft::is_type(config, INFO.peft_type);
    if !ours && inner.get("architecture").and_then(Value::as_str) != Some("reft") {
        return Ok(None);
    }
    let mut r = Reader::file(inner);
    r.ignore(&["architecture", "dtype"]);
    if !r.flag("output_reft", true) {
        r.problem("`output_reft` is false, so that nothing would be changed");
    }
    let layers = match r.value("layers").cloned() {
        None => None,
        Some(Value::String(all)) if all == "all" => None,
        Some(_) => r.counts("layers"),
    };
    let named = r.value("non_linearity").is_some();
    let method = Reft {
        name: name.into(),
        layers,
        prefix: r.whole("prefix_positions", 3, POSITIONS_MAX),
        suffix: r.whole("suffix_positions", 0, POSITIONS_MAX),
        rank: r.count("r", 1, RANK_MAX),
        orthogonal: r.flag("orthogonality", true),
        subtracts: r.flag("subtract_projection", true),
        tied: r.flag("tied_weights", false),
        activation: named.then(|| r.one_of("non_linearity", ACTIVATIONS)),
        dropout: r.dropout("dropout"),
        seed: r.value("init_weights_seed").cloned().unwrap_or(Value::Null),
    };
    r.finish()?;
    let train_also = config.get("modules_to_save").and_then(crate::read::texts).unwrap_or_default();
    Ok(Some(Loaded { method: Box::new(method), targets: None, train_also }))
}

fn example() -> Box<dyn Method> {
    Box::new(Reft {
        name: "engraft".into(),
        layers: None,
        prefix: 2,
        suffix: 1,
        rank: 2,
        orthogonal: true,
        subtracts: true,
        tied: false,
        activation: None,
        dropout: 0.0,
        seed: Value::Null,
    })
}

impl Reft {
    /// The intervention for `positions` positions; for none its tensors are saved, as their form wants them, and not trained.
    fn unit(&self, b: &mut Builder<'_>, stem: &str, width: usize, positions: usize) -> Result<Unit> {
        let r = self.rank;
        let mut own = |name: &str, shape: &[usize], init: Init| match positions {
            0 => b.fixed(&format!("{stem}.{name}"), shape, init),
            _ => b.param(&format!("{stem}.{name}"), shape, init),
        };
        let source = own("learned_source.weight", &[r, width], Init::kaiming(width))?;
        let bias = own("learned_source.bias", &[r], Init::kaiming(width))?;
        let projection = match self.orthogonal {
            false => Projection::Free(own("projection.weight", &[r, width], Init::kaiming(width))?),
            true => {
                if r >= width {
                    let message = format!(
                        "{r} orthonormal rows of {width} numbers leave nothing to choose; lower `rank`"
                    );
                    return Err(Error::Unsupported(message));
                }
                let start = Init::Values(diagonal(r, width, -1.0)?);
                let original = own("projection.parametrizations.weight.original", &[r, width], start)?;
                let base = format!("{stem}.projection.parametrizations.weight.0.base");
                let noise = Init::Normal(1.0).tensor(&[width, width], b.seed(), &base)?;
                let (turned, _) = linalg::qr(&noise)?;
                Projection::Orthogonal(original, b.fixed(&base, &[width, width], Init::Values(turned))?)
            }
        };
        Ok(Unit { source, bias, projection })
    }
}

/// [rows, columns] with `value` on the diagonal.
fn diagonal(rows: usize, columns: usize, value: f32) -> Result<Tensor> {
    let at = |i: usize| if i % columns == i / columns { value } else { 0.0 };
    Ok(Tensor::from_vec((0..rows * columns).map(at).collect(), [rows, columns])?)
}

impl Method for Reft {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("L·(2·rank·d + rank)")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let mut found = 0;
        let there = b.sites().iter().filter(|site| matches!(site.kind, Kind::Block { .. }));
        let there: Vec<usize> = there.filter_map(|site| b.sites().number(site)).collect();
        if let Some(far) = self.layers.iter().flatten().find(|layer| !there.contains(layer)) {
            let last = there.iter().max().copied().unwrap_or(0);
            let message = format!("`blocks` names {far}, and this model has the blocks 0 to {last}");
            return Err(Error::Unsupported(message));
        }
        for site in b.sites().iter() {
            let Kind::Block { width } = site.kind else { continue };
            let number = b.sites().number(site);
            if self.layers.as_ref().is_some_and(|layers| number.is_none_or(|n| !layers.contains(&n))) {
                continue;
            }
            found += 1;
            let stem = format!("{}.reft_layer.refts.{}.units", hub_name(b.sites(), site), self.name);
            let (first, last) = match self.tied {
                true => (self.unit(b, &format!("{stem}.0"), width, self.prefix + self.suffix)?, None),
                false => {
                    let first = self.unit(b, &format!("{stem}.0"), width, self.prefix)?;
                    (first, Some(self.unit(b, &format!("{stem}.1"), width, self.suffix)?))
                }
            };
            b.patch(site.id, Patch::Block(Box::new(Intervention { first, last, config: self.clone() })))?;
        }
        match found {
            0 => Err(Error::Unsupported(
                "ReFT found none of its blocks in this model; choose other `blocks`".into(),
            )),
            _ => Ok(()),
        }
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let mut own = json!({
            "architecture": "reft", "dropout": as_written(self.dropout), "dtype": null, "init_weights_seed": self.seed,
            "layers": self.layers.as_ref().map_or(json!("all"), |layers| json!(layers)),
            "non_linearity": self.activation.map(Activation::name), "orthogonality": self.orthogonal, "output_reft": true,
            "prefix_positions": self.prefix, "r": self.rank, "suffix_positions": self.suffix, "tied_weights": self.tied,
        });
        if !self.subtracts {
            own["subtract_projection"] = json!(false);
        }
        around(model, &self.name, own)
    }

    fn file_name(&self, name: &str) -> String {
        if name.contains(".refts.") { name.into() } else { format!("base_model.model.{name}") }
    }
}

enum Projection {
    Free(Param),
    /// What the reflections are made of, and their base.
    Orthogonal(Param, Param),
}

impl Projection {
    /// P [r, width].
    fn rows(&self) -> Result<Tensor> {
        match self {
            Projection::Free(rows) => Ok(rows.get()),
            Projection::Orthogonal(original, base) => orthonormal(&original.get(), &base.get()),
        }
    }
}

/// The first columns of base·H₁…H_r as rows: Hᵢ = I − τ·v·vᵀ, v the i-th row of `original` behind its diagonal, with one on it;
/// numbers on the diagonal are only signs.
fn orthonormal(original: &Tensor, base: &Tensor) -> Result<Tensor> {
    let (r, width) = (original.dim(0), original.dim(1));
    let behind = |i: usize| if i % width > i / width { 1.0 } else { 0.0 };
    let behind = Tensor::from_vec((0..r * width).map(behind).collect(), [r, width])?;
    let unit = diagonal(r, width, 1.0)?;
    let a = original.mul(&behind)?;
    let tau =
        a.unary(Unary::Square)?.sum_dim(1)?.unary(Unary::Shift(1.0))?.unary(Unary::Recip)?.scale(2.0)?;
    let v = a.add(&unit)?;
    let mut q = unit.clone();
    for i in (0..r).rev() {
        let (one, tau) = (v.rows_between(i, i + 1)?, tau.reshape([r, 1])?.rows_between(i, i + 1)?);
        // Rows of q are columns of the product.
        q = q.sub(&q.matmul_t(&one)?.mul(&tau)?.matmul(&one)?)?;
    }
    let signs = original.detach().mul(&unit)?.sum_dim(1)?.reshape([r, 1])?;
    let signs = signs.div(&signs.unary(Unary::Abs)?)?;
    Ok(q.mul(&signs)?.matmul_t(base)?)
}

/// One intervention.
struct Unit {
    source: Param,
    bias: Param,
    projection: Projection,
}

struct Intervention {
    first: Unit,
    /// That of the last positions, where they have their own.
    last: Option<Unit>,
    config: Reft,
}

impl Intervention {
    /// `h` with the rows `which` changed by `unit`.
    fn change(
        &self,
        h: &Tensor,
        unit: &Unit,
        which: Vec<i64>,
        site: &Site,
        cx: &Pass,
        salt: u8,
    ) -> Result<Tensor> {
        if which.is_empty() {
            return Ok(h.clone());
        }
        let index = Tensor::from_i64(which.clone(), [which.len()])?;
        let x = h.gather(&index)?;
        let p = unit.projection.rows()?;
        let mut source = x.matmul_t(&unit.source.get())?.plus(&unit.bias.get())?;
        if let Some(activation) = self.config.activation {
            source = activation.apply(source)?;
        }
        if self.config.subtracts {
            source = source.sub(&x.matmul_t(&p)?)?;
        }
        let new = cx.dropout(&x.add(&source.matmul(&p)?)?, self.config.dropout, site.id, salt)?;
        Ok(h.add(&new.sub(&x)?.scatter_add(&index, h.rows())?)?)
    }
}

impl BlockPatch for Intervention {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let h = run(h, cx)?;
        if cx.continues() {
            return Ok(h);
        }
        let (mut firsts, mut lasts) = (Vec::new(), Vec::new());
        let rows = cx.layout().sequences().iter().zip(cx.layout().virtual_counts());
        for (given, (s, &before)) in cx.given().into_iter().zip(rows) {
            // An answer is not there yet when its prompt is read. A text that is asked for from its first token on has no prompt.
            let real = if given.len() > 1 { given } else { s.start + before..s.end };
            let last = real.end.saturating_sub(self.config.suffix).max(real.start);
            let first = (real.start + self.config.prefix).min(last);
            firsts.extend((real.start..first).map(|row| row as i64));
            lasts.extend((last..real.end).map(|row| row as i64));
        }
        let h = self.change(&h, &self.first, firsts, site, cx, 1)?;
        self.change(&h, self.last.as_ref().unwrap_or(&self.first), lasts, site, cx, 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engraft_tensor::testing::{check_gradients, close, sample};

    #[test]
    fn trained_numbers() {
        let count = |more: Value| crate::testing::trained("reft", more);
        // W, b and P of each unit in two blocks; one for the first positions and one for the last, or one for both.
        let unit = |rank: usize| rank * (6 + 1 + 6);
        assert_eq!(count(json!({ "rank": 2, "prefix": 2, "suffix": 1 })), 2 * 2 * unit(2));
        assert_eq!(count(json!({ "rank": 3, "prefix": 2, "suffix": 1, "tied": true })), 2 * unit(3));
        // What no position has is saved and not trained.
        assert_eq!(count(json!({ "rank": 2, "prefix": 2, "suffix": 0 })), 2 * unit(2));
        assert_eq!(count(json!({ "rank": 2, "prefix": 0, "suffix": 1 })), 2 * unit(2));
    }

    #[test]
    fn reflections_keep_rows_orthonormal() {
        let (base, _) = linalg::qr(&sample(&[6, 6], 3)).unwrap();
        let start = orthonormal(&diagonal(2, 6, -1.0).unwrap(), &base).unwrap();
        close(&start, &base.narrow(1, 0, 2).unwrap().t().unwrap(), 1e-6);
        let moved =
            diagonal(2, 6, -1.0).unwrap().add(&sample(&[2, 6], 4).mul(&behind(2, 6)).unwrap()).unwrap();
        let p = orthonormal(&moved, &base).unwrap();
        close(&p.matmul_t(&p).unwrap(), &diagonal(2, 2, 1.0).unwrap(), 1e-5);
        let parts = behind(2, 6);
        let lift = |r: Result<Tensor>| r.map_err(|e| panic!("{e}"));
        let signed = diagonal(2, 6, -1.0).unwrap();
        check_gradients(&[sample(&[2, 6], 5)], |v| {
            lift(orthonormal(&v[0].mul(&parts)?.add(&signed)?, &base))
        })
        .unwrap();
    }

    fn behind(rows: usize, columns: usize) -> Tensor {
        let at = |i: usize| if i % columns > i / columns { 1.0 } else { 0.0 };
        Tensor::from_vec((0..rows * columns).map(at).collect(), [rows, columns]).unwrap()
    }

    #[test]
    fn settings_are_checked() {
        let bad = |settings: serde_json::Value| from_settings(settings.as_object().unwrap()).is_err();
        assert!(
            bad(json!({ "prefix": 0 })) && bad(json!({ "form": "diloreft" })) && bad(json!({ "rank": 0 }))
        );
        assert!(!bad(json!({ "suffix": 2, "prefix": 0, "tied": true, "activation": "relu" })));
    }
}
