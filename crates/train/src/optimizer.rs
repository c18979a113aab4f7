//! AdamW over the parameters of an adapter: one rule, moments a parameter, a rate factor a group.
//!
//! As `transformers` does for adapters, weight decay reaches every trained tensor, unless its method says otherwise; a
//! tensor without a gradient in a step stays as it is.

use engraft_method::{Forget, Method, Update};
use engraft_nn::{Adapter, NamedParam, Site, Sites};
use engraft_recipe::Train;
use engraft_tensor::optim::{AdamW, Moments, clip};
use engraft_tensor::{Gradients, Param, Tensor};

use crate::Result;

/// A trained parameter with its state.
pub struct Slot {
    /// Name in the adapter.
    pub name: String,
    /// The tensor.
    pub param: Param,
    /// What its group multiplies the learning rate by.
    pub factor: f64,
    /// Whether weight decay reaches it.
    decays: bool,
    /// Whether it may be without a gradient in some steps.
    pub rests: bool,
    /// First and second moments, shape of the parameter.
    pub moments: Moments,
    /// Updates that the moments are made of: a tensor that had no gradient, or whose moments were forgotten, is behind the run.
    pub updates: u64,
}

/// AdamW with its state.
pub struct Optimizer {
    rule: AdamW,
    max_grad_norm: f32,
    /// The trained parameters, in the adapter's order.
    pub slots: Vec<Slot>,
}

impl Optimizer {
    /// Fresh moments for every trained parameter of `adapter`, made for a model of `sites`.
    pub fn new(adapter: &Adapter, methods: &[&dyn Method], sites: &Sites, train: &Train) -> Self {
        let rule = AdamW {
            learning_rate: train.learning_rate,
            beta1: train.adam_beta1,
            beta2: train.adam_beta2,
            eps: train.adam_epsilon,
            weight_decay: train.weight_decay,
        };
        // Of several methods each has groups of its own, and its number precedes the names of its parameters.
        let of = |name: &str| match methods {
            [only] => Some(*only),
            several => name.split_once('.').and_then(|(n, _)| several.get(n.parse::<usize>().ok()?).copied()),
        };
        let head = head(adapter, sites);
        let of_head = train.head_learning_rate.map_or(1.0, |rate| rate / train.learning_rate);
        let factor = |p: &NamedParam| match of(&p.name) {
            _ if head.contains(&p.name.as_str()) => of_head,
            method => method.map_or(1.0, |m| f64::from(m.learning_rate_factor(p.group))),
        };
        let slot = |p: &NamedParam| Slot {
            name: p.name.clone(),
            param: p.param.clone(),
            factor: factor(p),
            decays: of(&p.name).is_none_or(|m| m.decays(p.group)),
            rests: of(&p.name).is_some_and(|m| m.rests()),
            moments: Moments::zeros(&p.param),
            updates: 0,
        };
        Optimizer {
            rule,
            max_grad_norm: train.max_grad_norm as f32,
            slots: adapter.trainable().map(slot).collect(),
        }
    }

    /// The norm of all gradients, and the factor that brings it under the limit; both on the device.
    pub fn clip(&self, gradients: &Gradients) -> (Tensor, Tensor) {
        let params: Vec<Param> = self.slots.iter().map(|s| s.param.clone()).collect();
        clip(&params, gradients, self.max_grad_norm)
    }

    /// An update with gradients·`scale`; nothing changes where `scale` is not finite.
    pub fn update(&mut self, gradients: &Gradients, scale: &Tensor, learning_rate: f64) -> Result<()> {
        for slot in &mut self.slots {
            if let Some(gradient) = gradients.get(&slot.param) {
                let weight_decay = if slot.decays { self.rule.weight_decay } else { 0.0 };
                let rule = AdamW { learning_rate: learning_rate * slot.factor, weight_decay, ..self.rule };
                slot.updates += 1;
                rule.update(&slot.param, gradient, scale, slot.updates, &mut slot.moments)?;
            }
        }
        Ok(())
    }
}

/// The names of the trained parameters of `adapter` that are a head's own tensors.
pub(crate) fn head<'a>(adapter: &'a Adapter, sites: &Sites) -> Vec<&'a str> {
    let sites = sites.named(adapter.names());
    let own: Vec<String> = sites.head().map(Site::tensor_name).collect();
    let names = adapter.trainable().map(|p| p.name.as_str());
    // Where there are several methods, a number may come first.
    let bare = |name: &'a str| match name.split_once('.') {
        Some((number, rest)) if number.parse::<usize>().is_ok() => rest,
        _ => name,
    };
    names.filter(|name| own.iter().any(|own| own == bare(name))).collect()
}

impl Forget for Optimizer {
    fn forget(&mut self, param: &Param) {
        for slot in self.slots.iter_mut().filter(|slot| slot.param.same(param)) {
            slot.moments = Moments::zeros(param);
            slot.updates = 0;
        }
    }
}

/// The optimizer right after an update, as methods see it.
pub struct Updated<'a> {
    /// The optimizer.
    pub optimizer: &'a mut Optimizer,
    /// The step's gradients.
    pub gradients: &'a Gradients,
    /// The factor of clipping.
    pub scale: &'a Tensor,
    /// The step's learning rate.
    pub learning_rate: f64,
}

impl Forget for Updated<'_> {
    fn forget(&mut self, param: &Param) {
        self.optimizer.forget(param);
    }

    fn last(&self) -> Option<Update<'_>> {
        let Updated { gradients, scale, learning_rate, .. } = *self;
        Some(Update { gradients, scale, learning_rate })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use engraft_method::{Chosen, attach, find};
    use engraft_nn::weight::Storage;
    use engraft_nn::{Linear, ModelInfo, Role, Targets, Task, Weight};
    use engraft_tensor::frozen::{Precision, RowSource};
    use serde_json::json;

    use super::*;

    #[test]
    fn moments_that_were_forgotten_begin_like_those_of_a_first_step() {
        let param = Param::new(Tensor::zeros([1]));
        let slot = Slot {
            name: "w".into(),
            param: param.clone(),
            factor: 1.0,
            decays: true,
            rests: false,
            moments: Moments::zeros(&param),
            updates: 0,
        };
        let rule = AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        let mut optimizer = Optimizer { rule, max_grad_norm: 0.0, slots: vec![slot] };
        let mut gradients = Gradients::default();
        gradients.set(&param, Tensor::full(0.5, [1]));
        let step = |optimizer: &mut Optimizer, gradients: &Gradients| {
            let before = param.value().to_vec().unwrap()[0];
            optimizer.update(gradients, &Tensor::scalar(1.0), 0.1).unwrap();
            before - param.value().to_vec().unwrap()[0]
        };
        let first = step(&mut optimizer, &gradients);
        (0..4).for_each(|_| _ = step(&mut optimizer, &gradients));
        assert_eq!(step(&mut optimizer, &Gradients::default()), 0.0);
        assert_eq!(optimizer.slots[0].updates, 5, "a step without a gradient is none");
        optimizer.forget(&param);
        assert!((step(&mut optimizer, &gradients) - first).abs() < 1e-6);
        assert_eq!(optimizer.slots[0].updates, 1);
    }

    struct Ones;

    impl RowSource for Ones {
        fn shape(&self) -> (usize, usize) {
            (4, 4)
        }
        fn rows(&self, _: std::ops::Range<usize>, out: &mut [f32]) {
            out.fill(1.0);
        }
    }

    #[test]
    fn each_method_sets_the_rates_of_its_own_parameters() {
        let mut sites = Sites::default();
        let weight = Arc::new(Weight::matrix(&Ones, Storage::Dense, Precision::F32).unwrap());
        Linear::declare(&mut sites, ("q", "q"), Role::Q, Some(0), weight, None);
        let bias = Some(Tensor::zeros([4]));
        let weight = Arc::new(Weight::matrix(&Ones, Storage::Dense, Precision::F32).unwrap());
        Linear::declare(&mut sites, ("classifier", "classifier"), Role::Head, None, weight, bias);
        let info = ModelInfo {
            architecture: "toy".into(),
            class: None,
            task: Task::CausalLm,
            width: 4,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 4,
            vocabulary: 4,
            outputs: 4,
            max_positions: 4,
            picture: None,
            any_size: None,
        };
        let lora = |settings: serde_json::Value| -> Chosen {
            let method = (find("lora").unwrap().from_settings)(settings.as_object().unwrap()).unwrap();
            (method, Some(Targets::names(["q"])))
        };
        let text = "model = \"m\"\n[method]\nfrom = \"a\"\n[data]\nformat = \"jsonl\"\npath = \"d.jsonl\"\n[train]\nsteps = 1\n";
        let mut train = engraft_recipe::Recipe::parse(text, "recipe.toml", &[], &[]).unwrap().train;
        let rates = |methods: &[Chosen], train_also: &[String], train: &Train| -> Vec<(f64, bool)> {
            let adapter = attach(methods, train_also, &Arc::new(sites.clone()), &info, 0).unwrap().adapter;
            let all: Vec<&dyn Method> = methods.iter().map(|(m, _)| m.as_ref()).collect();
            let optimizer = Optimizer::new(&adapter, &all, &sites, train);
            optimizer.slots.iter().map(|slot| (slot.factor, slot.decays)).collect()
        };
        let (fast, faster) = (json!({ "lr_ratio": 4, "lora_bias": true }), json!({ "lr_ratio": 16 }));
        let alone = [(1.0, true), (4.0, true), (4.0, false)];
        let both = [lora(fast.clone()), lora(faster)];
        let of_both = [&alone[..], &[(1.0, true), (16.0, true)]].concat();
        assert_eq!(rates(&[lora(fast)], &[], &train), alone);
        assert_eq!(rates(&both, &[], &train), of_both);
        // A head that is trained whole has its own, matrix and bias, be it a method's or beside the methods.
        train.head_learning_rate = Some(5.0 * train.learning_rate);
        let with_head = [&[(5.0, true), (5.0, true)], &of_both[..]].concat();
        assert_eq!(rates(&both, &["classifier".into()], &train), with_head);
        let full = || (find("full").unwrap().from_settings)(json!({}).as_object().unwrap()).unwrap();
        let both = [(full(), Some(Targets::names(["q"]))), (full(), Some(Targets::names(["classifier"])))];
        assert_eq!(rates(&both, &[], &train), [(1.0, true), (5.0, true), (5.0, true)]);
    }
}
