use super::*;
use crate::testing::*;
use engraft_tensor::Gradients;
use engraft_tensor::testing::{close, sample};

/// An optimizer that only shows gradients.
struct Shown(Gradients, Tensor);

impl Forget for Shown {
    fn forget(&mut self, _param: &Param) {}

    fn last(&self) -> Option<crate::Update<'_>> {
        Some(crate::Update { gradients: &self.0, scale: &self.1, learning_rate: 0.1 })
    }
}

#[test]
fn counts_starts_and_products() {
    let a = attached(&[chosen("adalora", json!({ "init_rank": 3, "target_rank": 2, "alpha": 6 }))], &[]);
    // r(m + n + 1) at q [6, 6] and v [4, 6] of two layers.
    assert_eq!(a.adapter.trained_count(), 2 * 3 * (6 + 6 + 1 + 4 + 6 + 1));
    let x = sample(&[5, 6], 3);
    close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(), 1e-6);
    stir(&a, 0.5);
    let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
    close(&fast, &defined, 1e-5);
}

#[test]
fn budgets_fall_with_the_cube_of_what_is_left() {
    let s = Schedule { tinit: 2, tfinal: 2, delta_t: 2, total: None };
    let at = |t| s.at(t, 12, 48, 16);
    assert_eq!([1, 2, 3].map(at), [Cut::Not, Cut::Not, Cut::Not]);
    let mut last = 48;
    for t in [4, 6, 8] {
        let Cut::To(budget) = at(t) else { panic!("{t}") };
        let left = 1.0 - (t as f64 - 2.0) / 8.0;
        assert_eq!(budget, (32.0 * left * left * left + 16.0) as usize);
        assert!(budget <= last);
        last = budget;
    }
    assert_eq!((at(10), at(11), at(12)), (Cut::Last(16), Cut::Keep, Cut::Keep));
    assert!(s.check(4).is_err() && s.check(5).is_ok());
}

#[test]
fn ranks_reach_the_budget_and_are_dropped_at_the_end() {
    let (sites, info) = toy();
    let settings = json!({ "init_rank": 4, "target_rank": 2, "tfinal": 1 });
    let methods = [chosen("adalora", settings)];
    let a = attached(&methods, &[]);
    stir(&a, 0.5);
    let method = &methods[0].0;
    five_steps(method.as_ref(), &a, 5, |number| number < 4);
    let on = |a: &crate::Attached| -> usize {
        let es = a.adapter.params().iter().filter(|p| p.name.ends_with(".lora_E"));
        es.map(|p| p.param.value().to_vec().unwrap().iter().filter(|v| **v != 0.0).count()).sum()
    };
    // Four matrices.
    assert_eq!(on(&a), 4 * 2);
    let x = sample(&[5, 6], 3);
    let before = both_ways(&a, "layers.1.attn.v", &x).0;
    method.finish(&a.adapter).unwrap();
    close(&both_ways(&a, "layers.1.attn.v", &x).0, &before, 1e-6);
    let ranks: usize = a
        .adapter
        .params()
        .iter()
        .filter(|p| p.name.ends_with(".lora_A"))
        .map(|p| p.param.value().dim(0))
        .sum();
    assert_eq!(ranks, 8);
    let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
    let marks = config["rank_pattern"]["layers.1.attn.v.lora_E"].as_array().unwrap();
    assert_eq!(marks.len(), 4);
    assert_eq!(config["total_step"], json!(5));
    let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
    let again = crate::save_adapter(&loaded.adapter, &loaded.methods, &loaded.train_also, "b", &sites, &info);
    assert_eq!(again.unwrap().0, config);
}

#[test]
fn what_has_come_back_when_a_run_stops_between_cuts_is_in_the_file() {
    let settings =
        json!({ "target_rank": 1, "init_rank": 4, "tinit": 1, "tfinal": 1, "delta_t": 2, "total_step": 9 });
    let methods = [chosen("adalora", settings)];
    let (sites, info) = toy();
    let a = crate::attach(&methods, &[], &sites, &info, 0).unwrap();
    stir(&a, 0.5);
    let method = &methods[0].0;
    five_steps(method.as_ref(), &a, 9, |_| true);
    method.finish(&a.adapter).unwrap();
    let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
    let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
    assert_eq!(loaded.adapter.trained_count(), a.adapter.trained_count());
}

/// The first five of `total` steps; after those that `moves` names, values have moved.
fn five_steps(method: &dyn Method, a: &crate::Attached, total: u64, moves: impl Fn(u64) -> bool) {
    for number in 1..=5 {
        let mut gradients = Gradients::default();
        for (i, p) in a.adapter.trainable().enumerate() {
            gradients.set(&p.param, sample(p.param.value().shape(), 50 * number + i as u64));
        }
        let step = Step { number, total, seed: 0 };
        method.after_step(&a.adapter, &mut Shown(gradients, Tensor::scalar(1.0)), step).unwrap();
        stir_values(a, moves(number));
    }
}

/// Between cuts training moves what was zeroed.
fn stir_values(a: &crate::Attached, moves: bool) {
    for p in a.adapter.params().iter().filter(|p| moves && p.name.ends_with(".lora_E")) {
        p.param.set(p.param.value().unary(Unary::Shift(0.3)).unwrap()).unwrap();
    }
}

#[test]
fn the_penalty_falls_to_nothing_where_rows_are_orthonormal() {
    let methods = [chosen("adalora", json!({ "init_rank": 2, "target_rank": 2, "tfinal": 0 }))];
    let a = attached(&methods, &[]);
    let step = Step { number: 1, total: 9, seed: 0 };
    let penalty = || methods[0].0.penalty(&a.adapter, step).unwrap().unwrap();
    // Nearly zero factors: ‖−I‖ = √2 for each.
    assert!((penalty().item().unwrap() - 0.5 * 2f32.sqrt()).abs() < 0.02);
    for p in a.adapter.trainable().filter(|p| !p.name.ends_with("lora_E")) {
        let shape = p.param.value().shape().to_vec();
        let (rows, columns) = (shape[0], shape[1]);
        let unit = (0..rows * columns).map(|i| f32::from(u8::from(i / columns == i % columns))).collect();
        p.param.set(Tensor::from_vec(unit, shape).unwrap()).unwrap();
    }
    assert!(penalty().item().unwrap() < 1e-6);
    let gradients = penalty().backward().unwrap();
    for p in a.adapter.trainable().filter(|p| !p.name.ends_with("lora_E")) {
        let g = gradients.get(&p.param).unwrap().to_vec().unwrap();
        assert!(g.iter().all(|g| g.abs() < 1e-6), "{}", p.name);
    }
}

#[test]
fn configurations() {
    survives_saving(&[chosen("adalora", json!({ "bias": "all", "dropout": 0.1 }))], &["head"]);
    let good = config(&[chosen("adalora", json!({ "tinit": 3 }))], &[]);
    assert_eq!((&good["total_step"], &good["rank_pattern"]), (&json!(4), &Value::Null));
    for bad in [
        json!({ "use_dora": true }),
        json!({ "init_r": 0 }),
        json!({ "beta1": 1.0 }),
        json!({ "tfinal": 9 }),
        json!({ "deltaT": 0 }),
        json!({ "rank_pattern": { "a.lora_E": [1] } }),
    ] {
        let key = bad.as_object().unwrap().keys().next().unwrap().clone();
        let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
        assert!(error.to_string().contains(&key), "{error}");
    }
    let (sites, info) = toy();
    let table = [(chosen("adalora", json!({})).0, Some(engraft_nn::Targets::names(["tok"])))];
    assert!(crate::attach(&table, &[], &sites, &info, 0).is_err(), "a table has no triplets");
    let twice = [chosen("adalora", json!({})), chosen("adalora", json!({}))];
    let a = attached(&twice, &[]);
    assert!(twice[0].0.penalty(&a.adapter, Step { number: 1, total: 9, seed: 0 }).is_err());
}
