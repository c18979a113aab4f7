use super::*;
use crate::testing::*;
use engraft_nn::{Layout, Patched, Value as Frozen};
use engraft_tensor::testing::{close, sample};

fn small(form: &str) -> Value {
    json!({ "form": form, "reduction": 2, "rank": 2, "alpha": 4, "tokens": 3, "keep": 0.3 })
}

#[test]
fn a_layer_keeps_its_share_of_the_prototype() {
    let a = attached(&[crate::testing::chosen("propetl", small("lora"))], &[]);
    // Prototypes of q and v once, scores in each of two layers: r·(6 + 6) and r·(6 + 4).
    assert_eq!(a.adapter.trained_count(), 3 * 2 * (12 + 10));
    stir(&a, 0.5);
    for end in ["A", "B"] {
        let scores = value_of(&a, &format!("layers.0.attn.q.lora_{end}{SCORES}"));
        // 12 − ⌊0.7·12⌋.
        let ones = super::chosen(&scores, 4).unwrap().to_vec().unwrap();
        assert_eq!(ones.iter().sum::<f32>(), 4.0);
        let least = |of: f32| {
            let sizes = scores.to_vec().unwrap().into_iter().map(f32::abs);
            let own: Vec<f32> = sizes.zip(&ones).filter(|(_, one)| **one == of).map(|(s, _)| s).collect();
            own
        };
        let smallest = least(1.0).into_iter().fold(f32::MAX, f32::min);
        assert!(least(0.0).into_iter().all(|s| s <= smallest));
    }
    let x = sample(&[5, 6], 3);
    let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
    close(&fast, &defined, 1e-5);
    let other = both_ways(&a, "layers.1.attn.q", &x).0;
    let plain = |path: &str| x.matmul_t(&frozen(path)).unwrap();
    let change = |y: &Tensor, path: &str| y.sub(&plain(path)).unwrap().to_vec().unwrap();
    assert_ne!(
        change(&fast, "layers.0.attn.q"),
        change(&other, "layers.1.attn.q"),
        "masks are a layer's own"
    );
}

#[test]
fn the_prototype_has_the_gradients_of_all_layers_under_their_masks() {
    let prototype = Param::new(sample(&[3, 4], 1));
    let masks: Vec<Masked> = (0..2)
        .map(|i| {
            let layer = Mask::trained(Param::new(sample(&[3, 4], 10 + i)), 5);
            Masked { layer, prototype: Prototype { values: prototype.clone(), tasks: Vec::new() } }
        })
        .collect();
    let weights = [sample(&[3, 4], 20), sample(&[3, 4], 21)];
    let mut loss = Tensor::scalar(0.0);
    for (mask, w) in masks.iter().zip(&weights) {
        loss = loss.add(&mask.of(0).unwrap().mul(w).unwrap().sum().unwrap()).unwrap();
    }
    let gradients = loss.backward().unwrap();
    let mut expected = Tensor::zeros([3, 4]);
    for (mask, w) in masks.iter().zip(&weights) {
        let Mask::Trained { scores, kept, .. } = &mask.layer else { panic!() };
        let own = super::chosen(&scores.value(), *kept).unwrap().mul(w).unwrap();
        expected = expected.add(&own).unwrap();
        // Straight through: Φ·w, by the sign of the score.
        let signs: Vec<f32> = scores.value().to_vec().unwrap().into_iter().map(f32::signum).collect();
        let through = prototype.value().mul(w).unwrap();
        let through = through.mul(&Tensor::from_vec(signs, [3, 4]).unwrap()).unwrap();
        close(gradients.get(scores).unwrap(), &through, 1e-6);
    }
    close(gradients.get(&prototype).unwrap(), &expected, 1e-6);
}

#[test]
fn a_row_keeps_what_its_layer_or_its_task_keeps() {
    let of = |more: Value| {
        let a = attached(&[crate::testing::chosen("propetl", with(small("lora"), more))], &[]);
        stir(&a, 0.5);
        a
    };
    let a = of(json!({ "tasks": 3 }));
    // Beside the masks of two layers those of three tasks.
    assert_eq!(a.adapter.trained_count(), (1 + 2 + 3) * 2 * (12 + 10));
    let (sites, _) = toy();
    let site = sites.get(site_id(&sites, "layers.0.attn.q"));
    let Frozen::Weight(weight) = &site.value else { panic!() };
    let x = sample(&[5, 6], 3);
    let layout = Layout::counted(&[2, 3]).unwrap().with_tasks(vec![2, 0]);
    let found = Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &Pass::new(layout, None))
        .forward(&x)
        .unwrap();
    let own = |task: usize| {
        let factor = |end: &str, shape: &[usize]| {
            let prototype = a
                .adapter
                .params()
                .iter()
                .find(|p| p.name.starts_with("prototype.q_") && p.name.ends_with(&format!("lora_{end}")));
            let prototype = prototype.unwrap();
            let scores = [
                value_of(&a, &format!("layers.0.attn.q.lora_{end}{SCORES}")),
                value_of(&a, &format!("{}.task_{task}{SCORES}", prototype.name)),
            ];
            let kept = scores.map(|scores| super::chosen(&scores, 4).unwrap().to_vec().unwrap());
            let either = kept[0].iter().zip(&kept[1]).map(|(a, b)| a.max(*b)).collect();
            prototype.param.value().mul(&Tensor::from_vec(either, shape).unwrap()).unwrap()
        };
        let (down, up) = (factor("A", &[2, 6]), factor("B", &[6, 2]));
        let change = x.matmul_t(&down).unwrap().matmul_t(&up).unwrap().scale(2.0).unwrap();
        x.matmul_t(&frozen("layers.0.attn.q")).unwrap().add(&change).unwrap()
    };
    let part = |t: &Tensor, from, to| t.rows_between(from, to).unwrap();
    close(&part(&found, 0, 2), &part(&own(2), 0, 2), 1e-5);
    close(&part(&found, 2, 5), &part(&own(0), 2, 5), 1e-5);
    // A weight has the mask of the adapter's own task.
    let (fast, defined) = both_ways(&of(json!({ "tasks": 3, "task": 2 })), "layers.0.attn.q", &x);
    close(&fast, &defined, 1e-5);
    close(&fast, &own(2), 1e-5);
}

#[test]
fn configurations() {
    for form in ["adapter", "lora", "prefix"] {
        survives_saving(&[crate::testing::chosen("propetl", small(form))], &["head"]);
        let several = with(small(form), json!({ "tasks": 2, "task": 1 }));
        survives_saving(&[crate::testing::chosen("propetl", several)], &["head"]);
    }
    let methods = [crate::testing::chosen("propetl", small("adapter"))];
    assert_eq!(
        (methods[0].0.learning_rate_factor(GROUP), methods[0].0.learning_rate_factor("")),
        (30.0, 1.0)
    );
    let good = config(&methods, &[]);
    for bad in [
        json!({ "form": "ia3" }),
        json!({ "keep": 0.0 }),
        json!({ "tasks": 0 }),
        json!({ "task": 1 }),
        json!({ "odd": 1 }),
    ] {
        assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
    }
}
