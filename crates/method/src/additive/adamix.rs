//! AdaMix: several bottlenecks in the place of one, drawn anew in every pass, averaged into one at the end.
//!
//! With g the output of an MLP: g + W_u^j·σ(W_d^i·g + b_d^i) + b_u^j. In training every layer draws i and j, evenly and
//! independently of each other; otherwise the means of the experts' tensors stand in their place. Two passes over each batch
//! draw apart, and what they disagree on is a part of the loss:
//!   CE(p₁) + λ·½·[KL(sg p₂ ‖ p₁) + KL(sg p₁ ‖ p₂)].
//! Weights are N(0, 0.02), drawn for each expert, and biases zero.
//!
//! Wang et al. 2022, arXiv:2205.12410, equations 1 to 7; by default, as there, W_u and b_u are common to the experts.
//!
//! The first expert has the names of a bottleneck adapter: of each MLP's site, adapters.engraft.adapter_down.0.weight
//! [r, width], adapter_down.0.bias `[r]`, adapter_up.weight [width, r], adapter_up.bias `[width]`, r = width/reduction. The
//! others lie in adapters.engraft.experts.N. A finished adapter is a bottleneck adapter in AdapterHub's form.

use engraft_nn::{
    Adapter, Builder, Error, Init, Kind, Mode, Pass, Patch, Result, Role, Site, Sublayer, SublayerPatch,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::additive::bottleneck::{self, Bottleneck, Form, add_blocks, around};
use crate::read::{Reader, number};
use crate::shared::activations::{ACTIVATIONS, Activation, NAMES};
use crate::shared::fields::{choice, flag, float, int};
use crate::{Described, Entry, Info, Loaded, Method, Named, SavedAdapter, peft};

const EXPERTS_MAX: usize = 1024;
/// What the experts but the first have in their names.
const OTHERS: &str = ".adapters.engraft.experts.";

#[derive(Clone)]
struct AdaMix {
    experts: usize,
    share_down: bool,
    share_up: bool,
    reduction: f64,
    activation: Activation,
    consistency: f64,
    leave_out: Vec<usize>,
}

static INFO: Info = Info {
    name: "adamix",
    title: "AdaMix",
    class: "additive",
    sites: "sublayer",
    paper: "arXiv:2205.12410",
    summary: "bottlenecks after the MLP, drawn by chance in every pass while training, averaged into one afterwards",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_ADAMIX",
    fields: &[
        int("experts", (1, EXPERTS_MAX as i64), Some("4"), "Number of bottlenecks that are drawn from."),
        flag("share_down", "false", "One W_d for all experts."),
        flag("share_up", "true", "One W_u for all experts."),
        float("reduction", (0.01, 1e6), "16", "Width of the model over width of a bottleneck."),
        choice("activation", NAMES, "\"gelu\"", "Function in the middle."),
        float(
            "consistency",
            (0.0, 1e6),
            "1",
            "Weight λ of the divergence between two passes that draw apart; 0 takes one pass.",
        ),
        bottleneck::LEAVE_OUT,
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> AdaMix {
    let activation =
        if r.value("activation").is_some() { r.one_of("activation", ACTIVATIONS) } else { Activation::GELU };
    let reduction = r.reduction("reduction", 16.0);
    AdaMix {
        experts: r.count("experts", 4, EXPERTS_MAX),
        share_down: r.flag("share_down", false),
        share_up: r.flag("share_up", true),
        reduction,
        activation,
        consistency: r.float("consistency", 1.0),
        leave_out: r.counts("leave_out").unwrap_or_default(),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    Box::new(AdaMix {
        experts: 3,
        share_down: false,
        share_up: false,
        reduction: 4.0,
        activation: Activation::GELU,
        consistency: 1.0,
        leave_out: vec![],
    })
}

impl AdaMix {
    /// What it is when it has been averaged.
    fn plain(&self) -> Bottleneck {
        Bottleneck {
            original_ln_before: false,
            activation: self.activation,
            reduction: self.reduction,
            leave_out: self.leave_out.clone(),
            ..Bottleneck::of(Form::Pfeiffer)
        }
    }

    fn build(&self, b: &mut Builder<'_>, site: &Site) -> Result<Routed> {
        let Kind::Sublayer { width } = site.kind else {
            return Err(Error::Site { path: site.path.clone(), message: "expected a sublayer".into() });
        };
        let size = self.plain().size_at(None, width);
        let count = |shared: bool| if shared { 1 } else { self.experts };
        Ok(Routed {
            down: Experts::build(b, site, "adapter_down.0", count(self.share_down), [size, width])?,
            up: Experts::build(b, site, "adapter_up", count(self.share_up), [width, size])?,
            activation: self.activation,
        })
    }
}

impl Method for AdaMix {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("L·(experts·(d·r + r) + d·r + d), r = ⌊d/reduction⌋")
    }

    fn by_layers(&self) -> bool {
        true
    }

    /// As what it becomes does, which says so in AdapterHub's form.
    fn leave_out(&mut self, blocks: &[usize]) -> bool {
        add_blocks(&mut self.leave_out, blocks);
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let sublayers = b.sites().of_kind(|k| matches!(k, Kind::Sublayer { .. }));
        let is_left = |site: &Site| b.sites().number(site).is_some_and(|n| self.leave_out.contains(&n));
        let mlps: Vec<_> = sublayers.filter(|site| site.role == Role::Mlp && !is_left(site)).collect();
        if mlps.is_empty() && !self.leave_out.is_empty() {
            return Err(Error::Unsupported(
                "`layers` and `leave_out` leave no layer that has an adapter".into(),
            ));
        }
        if mlps.is_empty() {
            return Err(Error::Unsupported("AdaMix needs a model with sublayers; use lora".into()));
        }
        for site in mlps {
            let routed = self.build(b, site)?;
            b.patch(site.id, Patch::Sublayer(Box::new(routed)))?;
        }
        Ok(())
    }

    /// Most experts are not drawn in a step.
    fn rests(&self) -> bool {
        true
    }

    fn consistency(&self) -> Option<f32> {
        Some(self.consistency as f32).filter(|weight| *weight > 0.0)
    }

    /// The mean of the experts becomes the first of them, the others go.
    fn finish(&self, adapter: &Adapter) -> Result<()> {
        if is_finished(adapter) {
            return Ok(());
        }
        for first in adapter.params() {
            let others = adapter.params().iter().filter(|p| is_expert_of(&p.name, &first.name));
            let others: Vec<&Param> = others.map(|p| &p.param).collect();
            if !others.is_empty() {
                let all: Vec<Tensor> =
                    others.iter().copied().chain([&first.param]).map(Param::value).collect();
                first.param.set(mean(&all)?)?;
                others.iter().for_each(|other| other.replace(Tensor::zeros([0])));
            }
        }
        Ok(())
    }

    fn file_type(&self, adapter: &Adapter) -> &'static str {
        if is_finished(adapter) { bottleneck::INFO.peft_type } else { INFO.peft_type }
    }

    fn keeps(&self, adapter: &Adapter, name: &str) -> bool {
        !(name.contains(OTHERS) && is_finished(adapter))
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        if is_finished(model.adapter) {
            let plain = self.plain();
            return around(model, &plain.name, plain.to_config());
        }
        let own = json!({
            "activation": self.activation.name(), "consistency": number(self.consistency), "experts": self.experts,
            "leave_out": self.leave_out, "reduction": number(self.reduction), "share_down": self.share_down, "share_up": self.share_up,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        if name.contains(".adapters.engraft.") { name.into() } else { format!("base_model.model.{name}") }
    }
}

/// A saved AdaMix whose experts are still apart as the bottleneck adapter that their mean is; any other adapter as it is.
pub(crate) fn averaged(saved: SavedAdapter) -> Result<SavedAdapter> {
    let SavedAdapter { path, config, tensors } = saved;
    let Some(map) = config.as_object().filter(|_| peft::is_type(&config, INFO.peft_type)) else {
        return Ok(SavedAdapter { path, config, tensors });
    };
    let plain = read(&mut Reader::file(map)).plain();
    let mut means = Named::new();
    for (name, first) in tensors.iter().filter(|(name, _)| !name.contains(OTHERS)) {
        let others = tensors.iter().filter(|(other, _)| is_expert_of(other, name)).map(|(_, t)| t.clone());
        means.push((name.clone(), mean(&others.chain([first.clone()]).collect::<Vec<_>>())?));
    }
    let mut file = map.clone();
    file.retain(|key, _| ["hidden_size", "model_type", "base_model_name_or_path"].contains(&key.as_str()));
    file.insert("peft_type".into(), bottleneck::INFO.peft_type.into());
    file.insert("config".into(), plain.to_config());
    file.insert("name".into(), plain.name.into());
    Ok(SavedAdapter { path, config: Value::Object(file), tensors: means })
}

/// Whether `name` is a tensor of a further expert in the place of the first one's `first`.
fn is_expert_of(name: &str, first: &str) -> bool {
    let Some((stem, part)) = first.split_once(".adapters.engraft.") else { return false };
    let further = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix(OTHERS));
    further.and_then(|rest| rest.split_once('.')).is_some_and(|(_, of)| of == part)
}

/// Whether the experts have become one. One that never had several is one from the start.
fn is_finished(adapter: &Adapter) -> bool {
    adapter.params().iter().filter(|p| p.name.contains(OTHERS)).all(|p| p.param.value().is_empty())
}

/// The mean of tensors of one shape.
fn mean(all: &[Tensor]) -> Result<Tensor> {
    let (first, rest) = all.split_first().ok_or_else(|| Error::Unsupported("no experts".into()))?;
    let sum = rest.iter().try_fold(first.clone(), |sum, t| sum.plus(t))?;
    Ok(sum.scale(1.0 / all.len() as f32)?)
}

/// x·Wᵀ + b of several experts.
struct Experts(Vec<[Param; 2]>);

impl Experts {
    fn build(
        b: &mut Builder<'_>,
        site: &Site,
        part: &str,
        count: usize,
        shape: [usize; 2],
    ) -> Result<Experts> {
        let expert = |number: usize| {
            let stem = match number {
                0 => format!("{}.adapters.engraft.{part}", site.path),
                _ => format!("{}{OTHERS}{number}.{part}", site.path),
            };
            let weight = b.param(&format!("{stem}.weight"), &shape, Init::Normal(0.02))?;
            Ok([weight, b.param(&format!("{stem}.bias"), &shape[..1], Init::Zeros)?])
        };
        Ok(Experts((0..count).map(expert).collect::<Result<_>>()?))
    }

    /// W and b of the expert that `bits` draw, or of their mean.
    fn drawn(&self, bits: Option<u32>) -> Result<[Tensor; 2]> {
        // Those that have become part of the first are empty.
        let there: Vec<_> = self.0.iter().filter(|expert| !expert[0].value().is_empty()).collect();
        if let Some(bits) = bits {
            let chosen = there[bits as usize % there.len()];
            return Ok([chosen[0].get(), chosen[1].get()]);
        }
        let all = |part: usize| mean(&there.iter().map(|expert| expert[part].get()).collect::<Vec<_>>());
        Ok([all(0)?, all(1)?])
    }
}

/// The experts after one MLP.
struct Routed {
    down: Experts,
    up: Experts,
    activation: Activation,
}

/// What the two draws at a site begin from in a pass.
fn bits(site: &Site, cx: &Pass) -> [Option<u32>; 2] {
    match cx.mode() {
        Mode::Eval => [None; 2],
        Mode::Train { seed, step, micro } => {
            let key = Init::key(seed, &format!("{}.{step}.{micro}", site.path));
            [Some(key.bits(0)), Some(key.bits(1))]
        }
    }
}

impl SublayerPatch for Routed {
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        let [for_down, for_up] = bits(site, cx);
        let ([wd, bd], [wu, bu]) = (self.down.drawn(for_down)?, self.up.drawn(for_up)?);
        let middle = self.activation.apply(s.output.matmul_t(&wd)?.plus(&bd)?)?;
        Ok(middle.matmul_t(&wu)?.plus(&bu)?.plus(&s.output)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    const SITE: &str = "layers.1.output_adapters";

    /// g and what the patch makes of it in a training pass.
    fn trained(a: &crate::Attached, step: u64, micro: u64) -> (Tensor, Tensor) {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, SITE));
        let [Patch::Sublayer(p)] = a.adapter.at(site.id) else { panic!("no adapter") };
        let (u, g) = (sample(&[4, 6], 1), sample(&[4, 6], 2));
        let cx =
            Pass::new(Layout::counted(&[4]).unwrap(), None).training(Mode::Train { seed: 5, step, micro });
        let s = Sublayer { residual: &u, input: &u, output: g.clone(), norm: None };
        let y = p.output(&s, site, &cx).unwrap();
        (g, y)
    }

    /// The tensor of an expert.
    fn of(a: &crate::Attached, expert: usize, end: &str) -> Tensor {
        let between = if expert == 0 { String::new() } else { format!("experts.{expert}.") };
        value_of(a, &format!("{SITE}.adapters.engraft.{between}{end}"))
    }

    fn by_hand(a: &crate::Attached, g: &Tensor, down: usize, up: usize) -> Tensor {
        let middle = g.matmul_t(&of(a, down, "adapter_down.0.weight")).unwrap();
        let middle = middle.add(&of(a, down, "adapter_down.0.bias")).unwrap();
        let middle = middle.unary(engraft_tensor::ops::Unary::Gelu).unwrap();
        let added = middle.matmul_t(&of(a, up, "adapter_up.weight")).unwrap();
        g.add(&added.add(&of(a, up, "adapter_up.bias")).unwrap()).unwrap()
    }

    #[test]
    fn every_pass_draws_both_experts_evenly_and_apart() {
        let settings = json!({ "experts": 3, "share_up": false, "reduction": 2 });
        let a = attached(&[chosen("adamix", settings)], &[]);
        // M(dr + r) + M(rd + d).
        assert_eq!(a.adapter.trained_count(), 2 * 3 * (2 * 6 * 3 + 3 + 6));
        assert_ne!(
            of(&a, 0, "adapter_up.weight").to_vec().unwrap(),
            of(&a, 1, "adapter_up.weight").to_vec().unwrap()
        );
        stir(&a, 0.5);
        let mut seen = [[0; 3]; 3];
        for pass in 0..270 {
            let (g, y) = trained(&a, 1 + pass / 2, pass % 2);
            let y = y.to_vec().unwrap();
            let is = |i: usize, j: usize| {
                let expected = by_hand(&a, &g, i, j).to_vec().unwrap();
                y.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5)
            };
            let pairs: Vec<_> = (0..9).map(|n| (n / 3, n % 3)).filter(|&(i, j)| is(i, j)).collect();
            let [(i, j)] = pairs[..] else { panic!("{pairs:?}") };
            seen[i][j] += 1;
        }
        assert!(seen.iter().flatten().all(|&n| n > 15), "{seen:?}");
    }

    #[test]
    fn what_is_left_is_a_bottleneck_of_the_means() {
        let (sites, info) = toy();
        let methods = [chosen("adamix", json!({ "experts": 3, "reduction": 2 }))];
        let a = attached(&methods, &[]);
        // M(dr + r) + rd + d, the second pair being common.
        assert_eq!(a.adapter.trained_count(), 2 * (3 * (6 * 3 + 3) + 6 * 3 + 6));
        stir(&a, 0.5);
        let before = at_sublayer(&a, SITE, true).unwrap().2;
        let downs: Vec<Tensor> = (0..3).map(|i| of(&a, i, "adapter_down.0.weight")).collect();
        let unfinished = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(unfinished.0["peft_type"], "ENGRAFT_ADAMIX");
        methods[0].0.finish(&a.adapter).unwrap();
        methods[0].0.finish(&a.adapter).unwrap();
        close(&of(&a, 0, "adapter_down.0.weight"), &mean(&downs).unwrap(), 1e-6);
        close(&at_sublayer(&a, SITE, true).unwrap().2, &before, 1e-5);
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!((&config["peft_type"], tensors.len()), (&json!("ENGRAFT_BOTTLENECK"), 8));
        let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
        assert_eq!(loaded.methods[0].0.info().name, "bottleneck");
        let loaded = crate::Attached {
            adapter: loaded.adapter,
            dead_targets: vec![],
            dead_modules: vec![],
            without_targets: vec![],
        };
        close(&at_sublayer(&loaded, SITE, true).unwrap().2, &before, 1e-5);
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({ "experts": 2, "share_up": false, "activation": "relu" }),
            json!({ "share_down": true, "share_up": false, "reduction": 3.5, "consistency": 0 }),
        ] {
            survives_saving(&[chosen("adamix", settings)], &["head"]);
        }
        assert_eq!(chosen("adamix", json!({})).0.consistency(), Some(1.0));
        assert_eq!(chosen("adamix", json!({ "consistency": 0 })).0.consistency(), None);
        let good = config(&[chosen("adamix", json!({ "experts": 2 }))], &[]);
        for bad in [json!({ "experts": 0 }), json!({ "reduction": 0 }), json!({ "activation": "odd" })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
