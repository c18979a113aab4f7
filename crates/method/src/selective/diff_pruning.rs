//! Diff pruning: a change behind learned gates, pruned to a target and tuned on.
//!
//! First stage: W′ = W + z ⊙ w. A gate z is hard-concrete: u ~ U(1e-4, 1 − 1e-4), s = σ(ln u − ln(1 − u) + a),
//! z = min(1, max(0, s·(r − l) + l)) with l = −1.5, r = 1.5; without noise (in evaluation) s = σ(a). To the loss is added
//! λ·Σ P(z > 0) = λ·Σ σ(a − ln(−l/r)) = λ·Σ σ(a). Structured: z = z_g·z_i with a gate for each matrix, and λ·Σ σ(a_g)·σ(a_i), or
//! as in the authors' code λ·Σ (σ(a_g) + σ(a_i)). u is drawn anew in every step and is the same in its micro-batches.
//! Then the k = ⌊density·P⌋ entries of all targets together with the largest |z·w| stay, and in the second stage W′ = W + S
//! with values at these places, from z·w on. w starts as zeros, a as 5; a learns at `gate_rate` times the rate of w.
//!
//! Guo, Rush and Kim 2021, arXiv:2012.07463, equations 4 to 10.
//!
//! `sparse_values` `[k]`, `sparse_indices` `I64` `[k]`, numbered through the targets.

use std::sync::Arc;

use engraft_nn::{Adapter, Builder, Init, Matcher, Mode, Pass, Result, Site, Sites, Targets};
use engraft_tensor::cpu::random::Key;
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, no_grad};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{choice, float};
use crate::shared::sparse::{Budget, Mask, shape};
use crate::shared::staged::{self, Change, DENSE};
use crate::{Described, Entry, Forget, Info, Method, Step, peft};

/// Ends of the stretched gate.
const LOW: f32 = -1.5;
const HIGH: f32 = 1.5;
/// Start of a, at which nearly every gate is open.
const OPEN: f32 = 5.0;
/// Parameters of gates: a_i, and a_g of a matrix.
const GATE: &str = "gate";
const GROUP_GATE: &str = "group gate";

struct DiffPruning {
    density: f64,
    /// Share of the steps in the first stage; `None` where there is none.
    gated: Option<f64>,
    penalty: f64,
    gate_rate: f64,
    structure: Structure,
}

/// Gates of whole matrices, and how they count.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Structure {
    None,
    Product,
    Sum,
}

const STRUCTURES: &[(&str, Structure)] =
    &[("none", Structure::None), ("product", Structure::Product), ("sum", Structure::Sum)];

static INFO: Info = Info {
    name: "diff_pruning",
    title: "Diff pruning",
    class: "selective",
    sites: "weight",
    paper: "arXiv:2012.07463",
    summary: "W′ = W + z ⊙ w with gates z under an L0 penalty, pruned to a target density",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_DIFF_PRUNING",
    fields: &[
        float("density", (0.0, 1.0), "0.005", "Share of the targets that is changed in the end."),
        float("gated_share", (0.0, 1.0), "0.5", "Share of the steps in which the gates are trained."),
        float(
            "penalty",
            (0.0, 1e9),
            "1.25e-7",
            "Factor λ of the expected number of open gates; it belongs to the size of the model.",
        ),
        float(
            "gate_rate",
            (0.0, 1e9),
            "10000",
            "What multiplies the learning rate for the gates; the authors take 0.1 for gates and 1e-5 for w.",
        ),
        choice(
            "structured",
            &["none", "product", "sum"],
            "\"none\"",
            "Whether each matrix has a gate too, counted as the paper says (product) or as the authors' code does (sum).",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| {
        peft::own_settings(&INFO, settings, |r| DiffPruning {
            gated: Some(r.share("gated_share", 0.5)),
            ..DiffPruning::read(r)
        })
    },
    from_file: |config| peft::own_file(&INFO, config, DiffPruning::read),
    example: || {
        let structure = Structure::Product;
        Box::new(DiffPruning { density: 0.05, gated: None, penalty: 1e-3, gate_rate: 10.0, structure })
    },
};

impl DiffPruning {
    fn read(r: &mut Reader<'_>) -> Self {
        DiffPruning {
            density: r.share("density", 0.005),
            gated: None,
            penalty: r.float("penalty", 1.25e-7),
            gate_rate: r.float("gate_rate", 1e4),
            structure: r.one_of("structured", STRUCTURES),
        }
    }

    fn mask(&self) -> Mask {
        Mask::own(Budget::Global(self.density))
    }

    fn settle(&self, adapter: &Adapter) -> Result<()> {
        let of = |stem: &str| {
            let own = |part: &str| staged::own(adapter, &format!("{stem}.{part}"));
            let group = if self.structure == Structure::None { None } else { Some(own("group_gate")?) };
            no_grad(|| Gated { w: own("dense")?, gate: own("gate")?, group, name: stem.into() }.change(None))
        };
        staged::settle_largest(&self.mask(), adapter, false, &of)
    }
}

/// z ⊙ w at one matrix.
struct Gated {
    w: Param,
    gate: Param,
    /// The gate of the matrix.
    group: Option<Param>,
    name: String,
}

/// z from a, and the noise ln u − ln(1 − u) if there is any.
fn gate(a: &Tensor, noise: Option<Tensor>) -> Result<Tensor> {
    let s = match noise {
        Some(noise) => a.add(&noise)?.unary(Unary::Sigmoid)?,
        None => a.unary(Unary::Sigmoid)?,
    };
    let stretched = s.scale(HIGH - LOW)?.unary(Unary::Shift(LOW))?;
    let above = stretched.unary(Unary::Shift(-1.0))?.unary(Unary::Relu)?;
    Ok(stretched.unary(Unary::Relu)?.sub(&above)?)
}

/// ln u − ln(1 − u) with u ~ U(1e-4, 1 − 1e-4).
fn noise(shape: &[usize], key: Key) -> Result<Tensor> {
    let mut u = vec![0.0; shape.iter().product()];
    key.fill_uniform(&mut u);
    u.iter_mut().for_each(|u| {
        let inside = 1e-4 + (1.0 - 2e-4) * *u;
        *u = inside.ln() - (1.0 - inside).ln();
    });
    Ok(Tensor::from_vec(u, shape)?)
}

impl Change for Gated {
    fn change(&self, at: Option<(&Site, &Pass)>) -> Result<Tensor> {
        let drawn = |a: &Tensor, of: &str| match at.map(|(_, cx)| cx.mode()) {
            Some(Mode::Train { seed, step, .. }) => {
                let key = Init::key(seed, &format!("{}.{of}", self.name));
                noise(a.shape(), Key { stream: key.stream ^ step, ..key }).map(Some)
            }
            _ => Ok(None),
        };
        let a = self.gate.get();
        let mut z = gate(&a, drawn(&a, "gate")?)?;
        if let Some(group) = &self.group {
            let a = group.get();
            z = z.mul(&gate(&a, drawn(&a, "group_gate")?)?)?;
        }
        Ok(z.mul(&self.w.get())?)
    }
}

impl Method for DiffPruning {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let make = |b: &mut Builder<'_>, site: &Site| -> Result<Arc<dyn Change>> {
            let (out, inn) = shape(site)?;
            let name = |part: &str| format!("{}.{part}", site.path);
            let open = |shape: &[usize]| Init::Values(Tensor::full(OPEN, shape));
            Ok(Arc::new(Gated {
                w: b.working(&name("dense"), &[out, inn], Init::Zeros, DENSE)?,
                gate: b.working(&name("gate"), &[out, inn], open(&[out, inn]), GATE)?,
                group: match self.structure {
                    Structure::None => None,
                    _ => Some(b.working(&name("group_gate"), &[1], open(&[1]), GROUP_GATE)?),
                },
                name: site.path.clone(),
            }))
        };
        let make: Option<&staged::Make<'_>> = if self.gated.is_some() { Some(&make) } else { None };
        staged::attach(&self.mask(), b, make).map(|_| ())
    }

    fn default_targets(&self, _sites: &Sites) -> Option<Targets> {
        Some(Matcher::AllLinear.into())
    }

    fn learning_rate_factor(&self, group: &str) -> f32 {
        if group == GATE || group == GROUP_GATE { self.gate_rate as f32 } else { 1.0 }
    }

    fn decays(&self, group: &str) -> bool {
        group != GATE && group != GROUP_GATE
    }

    fn penalty(&self, adapter: &Adapter, _step: Step) -> Result<Option<Tensor>> {
        if !staged::is_dense(adapter)? {
            return Ok(None);
        }
        let mut sum = Tensor::scalar(0.0);
        for (stem, w) in staged::matrices(adapter) {
            let open = |part: &str| -> Result<Tensor> {
                let a = staged::own(adapter, &format!("{stem}.{part}"))?.get();
                Ok(a.unary(Unary::Sigmoid)?.sum()?)
            };
            let own = open("gate")?;
            let all = match self.structure {
                Structure::None => own,
                Structure::Product => own.mul(&open("group_gate")?)?,
                Structure::Sum => own.add(&open("group_gate")?.scale(w.value().len() as f32)?)?,
            };
            sum = sum.add(&all)?;
        }
        Ok(Some(sum.scale(self.penalty as f32)?))
    }

    fn after_step(&self, adapter: &Adapter, _moments: &mut dyn Forget, step: Step) -> Result<()> {
        match self.gated {
            Some(share) if step.number == staged::last_dense(share, step) => self.settle(adapter),
            _ => Ok(()),
        }
    }

    fn finish(&self, adapter: &Adapter) -> Result<()> {
        if staged::is_dense(adapter)? { self.settle(adapter) } else { Ok(()) }
    }

    fn rests(&self) -> bool {
        self.gated.is_some()
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let structured = STRUCTURES.iter().find(|s| s.1 == self.structure).map_or("none", |s| s.0);
        let own = json!({ "density": self.density, "penalty": self.penalty, "gate_rate": self.gate_rate, "structured": structured });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Calibration;
    use crate::testing::*;
    use engraft_tensor::testing::{check_gradients, close, sample};

    struct Nothing;
    impl Forget for Nothing {
        fn forget(&mut self, _param: &Param) {}
    }

    #[test]
    fn trained_numbers() {
        // w and its gates of all matrices in the first stage, one more gate each where structured, ⌊0.1·264⌋ values in the second.
        let count = |structured| trained("diff_pruning", json!({ "density": 0.1, "structured": structured }));
        assert_eq!([count("none"), count("product")], [2 * 264 + 26, 2 * 264 + 8 + 26]);
    }

    #[test]
    fn gates_lie_between_zero_and_one_and_open_as_often_as_is_said() {
        for a in [-1.0f32, 0.0, 1.0, 3.0] {
            let shape = [200, 200];
            let z = gate(&Tensor::full(a, shape), Some(noise(&shape, Key { seed: 1, stream: 2 }).unwrap()))
                .unwrap();
            let z = z.to_vec().unwrap();
            assert!(z.iter().all(|z| (0.0..=1.0).contains(z)));
            let open = z.iter().filter(|z| **z > 0.0).count() as f64 / 40_000.0;
            let expected = 1.0 / (1.0 + f64::from(-a).exp());
            let deviation = (expected * (1.0 - expected) / 40_000.0).sqrt();
            // u stays 1e-4 away from both ends.
            assert!((open - expected).abs() < 3.0 * deviation + 2e-4, "{a}: {open}, expected {expected}");
        }
        // The gradient is zero where the gate is clamped, and that of the middle elsewhere.
        let a = Tensor::from_vec(vec![-0.3, 0.2, 0.4, 4.0, -4.0], [5]).unwrap();
        check_gradients(std::slice::from_ref(&a), |v| match gate(&v[0], None) {
            Ok(z) => Ok(z),
            Err(e) => panic!("{e}"),
        })
        .unwrap();
        let p = Param::new(a);
        let gradients = gate(&p.get(), None).unwrap().sum().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&p).unwrap().to_vec().unwrap()[3..], [0.0, 0.0]);
    }

    fn moved(settings: Value) -> (Box<dyn Method>, Linears, Arc<Adapter>) {
        let method = chosen("diff_pruning", settings).0;
        let (base, adapter) = prepared(method.as_ref(), &["layers.0.attn.q", "layers.0.attn.v"]);
        for (number, p) in adapter.trainable().filter(|p| !p.saved).enumerate() {
            let value = p.param.value();
            p.param.set(sample(value.shape(), number as u64)).unwrap();
        }
        (method, base, adapter)
    }

    #[test]
    fn the_target_is_met_exactly_with_the_largest_changes() {
        for structured in ["none", "product"] {
            let (method, base, adapter) = moved(json!({ "density": 0.1, "structured": structured }));
            let before = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap();
            let mut all = Vec::new();
            for m in &before {
                all.extend(m.value.sub(&frozen(&m.site.path)).unwrap().to_vec().unwrap());
            }
            method.after_step(&adapter, &mut Nothing, Step { number: 4, total: 8, seed: 1 }).unwrap();
            let mut order: Vec<usize> = (0..60).collect();
            order.sort_by(|&a, &b| all[b].abs().total_cmp(&all[a].abs()));
            let kept = &order[..6];
            let mut found = Vec::new();
            for m in engraft_nn::merged_tensors(base.sites(), &adapter).unwrap() {
                found.extend(m.value.sub(&frozen(&m.site.path)).unwrap().to_vec().unwrap());
            }
            for (i, value) in found.iter().enumerate() {
                let expected = if kept.contains(&i) { all[i] } else { 0.0 };
                assert!((value - expected).abs() < 1e-6, "{i}: {value}, expected {expected}");
            }
        }
    }

    #[test]
    fn closing_the_gate_of_a_matrix_closes_it_whole() {
        let (_, base, adapter) = moved(json!({ "density": 0.1, "structured": "product" }));
        param(&adapter, "layers.0.attn.q.group_gate").set(Tensor::full(-9.0, [1])).unwrap();
        let merged = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap();
        close(&merged[0].value, &frozen("layers.0.attn.q"), 0.0);
        assert!(merged[1].value.to_vec().unwrap() != frozen("layers.0.attn.v").to_vec().unwrap());
    }

    #[test]
    fn the_penalty_counts_open_gates() {
        let sigma = |v: f32| 1.0 / (1.0 + (-v).exp());
        for structured in ["none", "product", "sum"] {
            let (method, _, adapter) =
                moved(json!({ "density": 0.1, "penalty": 0.01, "structured": structured }));
            let step = Step { number: 1, total: 8, seed: 1 };
            let found = method.penalty(&adapter, step).unwrap().unwrap().item().unwrap();
            let mut expected = 0.0;
            for path in ["layers.0.attn.q", "layers.0.attn.v"] {
                let values =
                    |part: &str| param(&adapter, &format!("{path}.{part}")).value().to_vec().unwrap();
                let group = if structured == "none" { 0.0 } else { sigma(values("group_gate")[0]) };
                for a in values("gate") {
                    expected += match structured {
                        "none" => sigma(a),
                        "product" => sigma(a) * group,
                        _ => sigma(a) + group,
                    };
                }
            }
            assert!((found - 0.01 * expected).abs() < 1e-5, "{structured}: {found}, {}", 0.01 * expected);
        }
    }

    #[test]
    fn starts_as_the_base_with_open_gates_and_draws_by_step() {
        let method = chosen("diff_pruning", json!({ "density": 0.1, "gate_rate": 100 })).0;
        let (base, adapter) = prepared(method.as_ref(), &["layers.0.attn.q"]);
        let merged = engraft_nn::merged_tensors(base.sites(), &adapter).unwrap();
        close(&merged[0].value, &frozen("layers.0.attn.q"), 0.0);
        assert_eq!(method.learning_rate_factor(GATE), 100.0);
        assert!(!method.decays(GATE) && method.decays(DENSE));
        let key = |step: u64| Key { stream: Init::key(1, "w").stream ^ step, seed: 1 };
        let draw = |step: u64| noise(&[3], key(step)).unwrap().to_vec().unwrap();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn configurations() {
        survives_saving(&[((ENTRY.example)(), None)], &["head"]);
        let written = config(&[chosen("diff_pruning", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "structured": "rows" }))).is_err());
    }
}
