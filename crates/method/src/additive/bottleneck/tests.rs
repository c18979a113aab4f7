//! The forms by hand, Compacter's layers, what is left out, and files.

use engraft_nn::{Layout, Mode, Pass, Patch, Sublayer};
use engraft_tensor::Tensor;
use engraft_tensor::ops::Unary;

use super::settings::{Residual, Scaling};
use super::*;
use crate::testing::*;
use engraft_tensor::testing::{close, sample};
use serde_json::json;

/// A(x) of layer 1 from its parameters.
fn adapter(a: &crate::Attached, x: &Tensor, f: Unary, scale: f32) -> Tensor {
    let get = |end: &str| {
        let name = format!("layers.1.output_adapters.adapters.engraft.{end}");
        a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value()
    };
    let middle = x.matmul_t(&get("adapter_down.0.weight")).unwrap().add(&get("adapter_down.0.bias")).unwrap();
    let up = middle.unary(f).unwrap().matmul_t(&get("adapter_up.weight")).unwrap();
    up.add(&get("adapter_up.bias")).unwrap().scale(scale).unwrap()
}

#[test]
fn the_three_forms_by_hand() {
    let path = "layers.1.output_adapters";
    let made = |settings: serde_json::Value| {
        let a = attached(&[chosen("bottleneck", with(settings, json!({ "reduction": 2 })))], &[]);
        stir(&a, 0.5);
        a
    };
    let a = made(json!({}));
    assert_eq!(names(&a).len(), 8, "after the MLPs alone");
    for post_norm in [true, false] {
        let (u, g, y) = at_sublayer(&a, path, post_norm).unwrap();
        let read = u.add(&g).unwrap().scale(if post_norm { 2.0 } else { 1.0 }).unwrap();
        close(&y, &g.add(&adapter(&a, &read, Unary::Relu, 1.0)).unwrap(), 1e-5);
    }
    let a = made(json!({ "form": "houlsby" }));
    assert_eq!(names(&a).len(), 16);
    let (_, g, y) = at_sublayer(&a, path, true).unwrap();
    close(&y, &g.add(&adapter(&a, &g, Unary::Silu, 1.0)).unwrap(), 1e-5);
    let a = made(json!({ "form": "parallel", "activation": "gelu" }));
    let (u, g, y) = at_sublayer(&a, path, true).unwrap();
    close(&y, &g.add(&adapter(&a, &u, Unary::Gelu, 4.0)).unwrap(), 1e-5);
    let zero = attached(&[chosen("bottleneck", json!({ "zero_init": true }))], &[]);
    let (_, g, y) = at_sublayer(&zero, path, true).unwrap();
    close(&y, &g, 0.0);
}

#[test]
fn without_the_models_norm() {
    let free = Bottleneck { original_ln_after: false, reduction: 2.0, ..Bottleneck::of(Form::Houlsby) };
    let a = attached(&[(Box::new(free), None)], &[]);
    stir(&a, 0.5);
    let path = "layers.1.output_adapters";
    let (u, g, y) = at_sublayer(&a, path, false).unwrap();
    close(&y.add(&u).unwrap(), &g.add(&adapter(&a, &g, Unary::Silu, 1.0)).unwrap(), 1e-5);
    // After a post-norm sublayer the stream is what the adapter makes, without residual or norm.
    let (_, g, y) = at_sublayer(&a, path, true).unwrap();
    close(&y, &g.add(&adapter(&a, &g, Unary::Silu, 1.0)).unwrap(), 1e-5);
    let [Patch::Sublayer(p)] = a.adapter.at(site_id(&toy().0, path)) else { panic!() };
    assert!(p.replaces_norm());
}

#[test]
fn configurations() {
    for settings in [
        json!({}),
        json!({ "form": "houlsby", "dropout": 0.1 }),
        json!({ "form": "parallel", "learned_scaling": true }),
        json!({ "form": "residual", "gating": true, "drop": 1 }),
        json!({ "robust_drop": true }),
    ] {
        survives_saving(&[chosen("bottleneck", settings)], &["head"]);
    }
    let odd = Bottleneck {
        ln_before: true,
        ln_after: true,
        scaling: Scaling::Channel,
        reduction_by_layer: vec![(1, 3.0)],
        residual: Residual::Sum,
        ..Bottleneck::of(Form::Pfeiffer)
    };
    survives_saving(&[(Box::new(odd), None)], &[]);
    let written = config(&[chosen("bottleneck", json!({}))], &[]);
    let read = |inner: serde_json::Value| {
        let config = with(written["config"].clone(), inner);
        from_file(&with(written.clone(), json!({ "config": config })))
    };
    for bad in [
        json!({ "phm_layer": true }),
        json!({ "non_linearity": "prelu" }),
        json!({ "scaling": "odd" }),
        json!({ "reduction_factor": { "x": 2 } }),
    ] {
        assert!(read(bad.clone()).is_err(), "{bad}");
    }
    let theirs = with(written.clone(), json!({ "peft_type": null }));
    assert!(from_file(&theirs).unwrap().is_some(), "AdapterHub's files have no peft_type");
}

#[test]
fn a_residual_adapter_reads_the_layer_through_a_norm_of_its_own() {
    let settings = json!({ "form": "residual", "reduction": 2 });
    let a = attached(&[chosen("bottleneck", settings.clone())], &[]);
    let path = "layers.1.output_adapters";
    let (u, g, y) = at_sublayer(&a, path, false).unwrap();
    close(&y.add(&u).unwrap(), &u.add(&g).unwrap(), 1e-6);
    stir(&a, 0.5);
    for post_norm in [true, false] {
        let (u, g, y) = at_sublayer(&a, path, post_norm).unwrap();
        let read = u.add(&g).unwrap().scale(if post_norm { 2.0 } else { 1.0 }).unwrap();
        let get = |end: &str| value_of(&a, &format!("{path}.adapters.engraft.{end}"));
        let (gain, bias) = (get("adapter_norm_before.weight"), get("adapter_norm_before.bias"));
        let normed = engraft_tensor::ops::layer_norm(&read, &gain, &bias, 1e-5).unwrap();
        let middle = normed.matmul_t(&get("adapter_down.1.weight")).unwrap();
        let middle = middle.add(&get("adapter_down.1.bias")).unwrap().unary(Unary::Relu).unwrap();
        let up = middle.matmul_t(&get("adapter_up.weight")).unwrap().add(&get("adapter_up.bias")).unwrap();
        let stream = if post_norm { y } else { y.add(&u).unwrap() };
        close(&stream, &read.add(&up).unwrap(), 1e-5);
    }
    // Two matrices, their biases and the norm: P(d, r) + 2d.
    assert_eq!(a.adapter.trained_count(), 2 * (2 * 6 * 3 + 3 + 6 + 2 * 6));
}

#[test]
fn a_gate_is_the_mean_over_its_sequence() {
    let a = attached(&[chosen("bottleneck", json!({ "reduction": 2, "gating": true }))], &[]);
    stir(&a, 0.5);
    let path = "layers.1.output_adapters";
    let (u, g, y) = at_sublayer(&a, path, false).unwrap();
    let read = u.add(&g).unwrap();
    let get = |end: &str| value_of(&a, &format!("{path}.adapters.engraft.gate.{end}"));
    let gate = read.matmul_t(&get("weight")).unwrap().add(&get("bias")).unwrap();
    let gate = gate.unary(Unary::Sigmoid).unwrap().mean().unwrap();
    close(&y.sub(&g).unwrap(), &adapter(&a, &read, Unary::Relu, 1.0).mul(&gate).unwrap(), 1e-5);
}

#[test]
fn first_layers_go_without() {
    let a = attached(&[chosen("bottleneck", json!({ "drop": 1 }))], &[]);
    assert!(names(&a).iter().all(|name| name.starts_with("layers.1.")), "{:?}", names(&a));
    let all = attached(&[chosen("bottleneck", json!({}))], &[]);
    let (sites, _) = toy();
    assert_eq!(all.adapter.without_first_blocks(&sites, 1).unwrap().sites(), a.adapter.sites());

    let named = attached(&[chosen("bottleneck", json!({ "leave_out": [0, 2] }))], &[]);
    assert_eq!(names(&named), names(&a));
    let method = chosen("bottleneck", json!({ "leave_out": [0, 2] })).0;
    let doubts = method.doubts(&sites.iter().collect::<Vec<_>>());
    assert!(matches!(&doubts[..], [one] if one.contains("name layer 2, and there are 0 to 1")), "{doubts:?}");

    let (_, info) = toy();
    let none = [chosen("bottleneck", json!({ "drop": 2 }))];
    let error = crate::attach(&none, &[], &sites, &info, 0).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("`leave_out` and `drop` leave no layer"), "{error}");

    let prefix = attached(&[chosen("prefix", json!({ "tokens": 2 }))], &[]);
    assert!(prefix.adapter.without_first_blocks(&sites, 1).is_err(), "positions would not fit");

    let robust = attached(&[chosen("bottleneck", json!({ "robust_drop": true, "reduction": 2 }))], &[]);
    stir(&robust, 0.5);
    let mut seen = [0, 0];
    for step in 0..40 {
        let m = layer::dropped(5, step, 0, 2);
        seen[m] += 1;
        for number in 0..2 {
            let site = sites.get(site_id(&sites, &format!("layers.{number}.output_adapters")));
            let [Patch::Sublayer(p)] = robust.adapter.at(site.id) else { panic!() };
            let (u, g) = (sample(&[4, 6], 1), sample(&[4, 6], 2));
            let mode = Mode::Train { seed: 5, step, micro: 0 };
            let cx = Pass::new(Layout::counted(&[4]).unwrap(), None).training(mode);
            let y = p.output(&Sublayer { residual: &u, input: &u, output: g.clone(), norm: None }, site, &cx);
            let y = y.unwrap();
            let gradients = y.needs_grad().then(|| y.sum().unwrap().backward().unwrap());
            let reached =
                robust.adapter.trainable().filter(|p| p.name.starts_with(&format!("layers.{number}.")));
            let reached = reached.filter(|p| gradients.as_ref().is_some_and(|g| g.get(&p.param).is_some()));
            assert_eq!(reached.count() > 0, number >= m, "step {step}, layer {number}");
            if number < m {
                close(&y, &g, 0.0);
            }
        }
    }
    assert!(seen.iter().all(|&n| n > 8), "{seen:?}");
}
