//! One adapter alone, the attention by hand, what is not trained, the penalty, files and refusals.

use super::*;
use crate::testing::*;
use crate::{Attached, Chosen};
use engraft_tensor::ops::cat;
use engraft_tensor::testing::{close, sample};

const SITE: &str = "layers.1.output_adapters";

/// A bottleneck adapter of the toy model, moved off its start, and what its directory would hold.
fn source(settings: Value, by: f32) -> (Attached, SavedAdapter) {
    source_of("bottleneck", settings, by)
}

/// The same of another method.
fn source_of(method: &str, settings: Value, by: f32) -> (Attached, SavedAdapter) {
    let methods = [chosen(method, settings)];
    let a = attached(&methods, &[]);
    stir(&a, by);
    let (sites, info) = toy();
    let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
    (a, SavedAdapter { path: format!("saved-{by}"), config, tensors })
}

fn fusion(settings: Value, sources: Vec<SavedAdapter>) -> Result<Chosen> {
    let mut method = chosen("adapter_fusion", with(settings, json!({ "adapters": ["x"] })));
    method.0.take_adapters("adapters", sources)?;
    Ok(method)
}

fn two() -> Vec<SavedAdapter> {
    let sources = [json!({ "reduction": 2 }), json!({ "reduction": 3, "activation": "gelu", "scaling": 2 })];
    sources.into_iter().zip([0.5, 0.4]).map(|(settings, by)| source(settings, by).1).collect()
}

#[test]
fn one_adapter_with_the_identity_as_values_is_that_adapter() {
    for form in ["pfeiffer", "houlsby"] {
        let (single, saved) = source(json!({ "form": form, "reduction": 2 }), 0.5);
        for kind in ["static", "dynamic"] {
            let a = attached(&[fusion(json!({ "form": kind }), vec![saved.clone()]).unwrap()], &[]);
            for post_norm in [true, false] {
                let expected = at_sublayer(&single, SITE, post_norm).unwrap().2;
                close(&at_sublayer(&a, SITE, post_norm).unwrap().2, &expected, 1e-4);
            }
        }
    }
}

/// What can be fused beside plain bottleneck adapters.
fn kinds() -> [(&'static str, Value); 6] {
    [
        ("compacter", json!({ "reduction": 3, "n": 2 })),
        (
            "compacter",
            json!({ "form": "compacter++", "reduction": 3, "n": 2, "rank": 2, "share_factors": true }),
        ),
        ("krona_b", json!({ "a1": 3, "a2": 2, "scale": 2.0, "residual": true })),
        ("adaptformer", json!({ "size": 3, "scale": 0.5, "norm": "in" })),
        ("sparse_adapter", json!({ "reduction": 2, "score": "random" })),
        ("bottleneck", json!({ "form": "parallel" })),
    ]
}

#[test]
fn whatever_adds_something_at_a_sublayer_is_fused() {
    for (method, settings) in kinds() {
        let (single, saved) = source_of(method, settings.clone(), 0.5);
        for kind in ["static", "dynamic"] {
            let a = attached(&[fusion(json!({ "form": kind }), vec![saved.clone()]).unwrap()], &[]);
            for post_norm in [true, false] {
                let expected = at_sublayer(&single, SITE, post_norm).unwrap().2;
                close(&at_sublayer(&a, SITE, post_norm).unwrap().2, &expected, 1e-4);
            }
        }
        // Two that are alike, apart in their numbers: both are in the file.
        let second = source_of(method, settings, 0.3).1;
        let pair = || fusion(json!({}), vec![saved.clone(), second.clone()]).unwrap();
        survives_saving(&[pair()], &["head"]);
        let a = attached(&[pair()], &[]);
        assert!(a.adapter.trainable().all(|p| p.name.contains(LAYER)), "{method}");
        let (first, both) =
            (at_sublayer(&single, SITE, false).unwrap().2, at_sublayer(&a, SITE, false).unwrap().2);
        assert_ne!(first.to_vec().unwrap(), both.to_vec().unwrap(), "{method}");
    }
}

#[test]
fn compacter_is_fused_with_plain_matrices() {
    let plain = source(json!({ "form": "houlsby", "reduction": 2, "activation": "gelu" }), 0.5).1;
    let phm = source_of("compacter", json!({ "reduction": 3, "n": 2 }), 0.4).1;
    survives_saving(&[fusion(json!({}), vec![plain, phm]).unwrap()], &[]);
}

#[test]
fn a_sublayer_mixes_those_that_sit_there() {
    let pfeiffer = source(json!({ "reduction": 2 }), 0.5).1;
    let (houlsby, saved) = source(json!({ "form": "houlsby", "reduction": 3 }), 0.4);
    let pair = || fusion(json!({ "form": "static" }), vec![pfeiffer.clone(), saved.clone()]).unwrap();
    let a = attached(&[pair()], &[]);
    survives_saving(&[pair()], &[]);
    // After attention there is the second alone.
    let alone = "layers.0.attention_adapters";
    close(&at_sublayer(&a, alone, true).unwrap().2, &at_sublayer(&houlsby, alone, true).unwrap().2, 1e-5);
    let both = at_sublayer(&a, SITE, true).unwrap().2;
    assert_ne!(both.to_vec().unwrap(), at_sublayer(&houlsby, SITE, true).unwrap().2.to_vec().unwrap());
    // A layer that one of them leaves out.
    let without = source(json!({ "reduction": 2, "leave_out": [1] }), 0.3).1;
    let (full, second) = source(json!({ "reduction": 3 }), 0.2);
    for order in [[without.clone(), second.clone()], [second, without]] {
        let a = attached(&[fusion(json!({ "form": "static" }), order.to_vec()).unwrap()], &[]);
        close(&at_sublayer(&a, SITE, true).unwrap().2, &at_sublayer(&full, SITE, true).unwrap().2, 1e-5);
    }
}

/// Weights are even where queries are zero: then each output is that of the adapter alone, whatever the other reads.
#[test]
fn each_reads_what_it_was_trained_on() {
    let saved = [
        source(json!({ "reduction": 2 }), 0.5),
        source(json!({ "form": "houlsby", "reduction": 3 }), 0.4),
        source(json!({ "form": "parallel" }), 0.3),
    ];
    let all: Vec<SavedAdapter> = saved.iter().map(|(_, saved)| saved.clone()).collect();
    let a = attached(&[fusion(json!({ "form": "static" }), all).unwrap()], &[]);
    for p in a.adapter.trainable().filter(|p| p.name.contains(".query.")) {
        p.param.set(Tensor::zeros(p.param.value().shape())).unwrap();
    }
    for post_norm in [true, false] {
        let (_, g, y) = at_sublayer(&a, SITE, post_norm).unwrap();
        let mut mean = g.clone();
        for (single, _) in &saved {
            let added = at_sublayer(single, SITE, post_norm).unwrap().2.sub(&g).unwrap();
            mean = mean.add(&added.scale(1.0 / 3.0).unwrap()).unwrap();
        }
        close(&y, &mean, 1e-5);
    }
}

#[test]
fn an_adamix_is_fused_as_the_mean_of_its_experts() {
    let methods = [chosen("adamix", json!({ "experts": 3, "reduction": 2, "share_up": false }))];
    let a = attached(&methods, &[]);
    stir(&a, 0.5);
    let (sites, info) = toy();
    let saved = |path: &str| {
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        SavedAdapter { path: path.into(), config, tensors }
    };
    let apart = saved("apart");
    methods[0].0.finish(&a.adapter).unwrap();
    let finished = saved("finished");
    assert_eq!(
        (&apart.config["peft_type"], &finished.config["peft_type"]),
        (&json!("ENGRAFT_ADAMIX"), &json!("ENGRAFT_BOTTLENECK"))
    );
    let expected = at_sublayer(&a, SITE, true).unwrap().2;
    for saved in [apart, finished.clone()] {
        let fused = attached(&[fusion(json!({ "form": "static" }), vec![saved]).unwrap()], &[]);
        close(&at_sublayer(&fused, SITE, true).unwrap().2, &expected, 1e-5);
    }
    let pfeiffer = source(json!({ "reduction": 2 }), 0.5).1;
    survives_saving(&[fusion(json!({}), vec![finished, pfeiffer]).unwrap()], &[]);
}

#[test]
fn the_attention_is_its_formula() {
    let a = attached(&[fusion(json!({}), two()).unwrap()], &[]);
    // 3d² + 2d; the adapters are in the file and not trained.
    assert_eq!(a.adapter.trained_count(), 2 * (3 * 36 + 2 * 6));
    assert_eq!(a.adapter.params().len(), 2 * (2 * 4 + 5));
    stir(&a, 0.7);
    let get = |end: &str| value_of(&a, &format!("{SITE}.adapter_fusion_layer.engraft,engraft_2.{end}"));
    let (u, g, y) = at_sublayer(&a, SITE, true).unwrap();
    let x = u.add(&g).unwrap().scale(2.0).unwrap();
    let q = x.matmul_t(&get("query.weight")).unwrap().add(&get("query.bias")).unwrap();
    let singles = [source(json!({ "reduction": 2 }), 0.5).0];
    let second = source(json!({ "reduction": 3, "activation": "gelu", "scaling": 2 }), 0.4).0;
    let z: Vec<Tensor> = singles
        .iter()
        .chain([&second])
        .map(|single| at_sublayer(single, SITE, true).unwrap().2.sub(&g).unwrap())
        .collect();
    let scores: Vec<Tensor> = z
        .iter()
        .map(|z| {
            let k = z.matmul_t(&get("key.weight")).unwrap().add(&get("key.bias")).unwrap();
            q.mul(&k).unwrap().sum_dim(1).unwrap()
        })
        .collect();
    let shares = cat(&[&scores[0], &scores[1]], 1).unwrap().softmax().unwrap();
    let values = z.iter().enumerate().map(|(m, z)| {
        z.matmul_t(&get("value.weight")).unwrap().mul(&shares.narrow(1, m, 1).unwrap()).unwrap()
    });
    let expected = values.fold(g.clone(), |sum, v| sum.add(&v).unwrap());
    close(&y, &expected, 1e-5);
}

#[test]
fn values_are_kept_near_the_identity() {
    let at = Step { number: 1, total: 1, seed: 0 };
    let penalty = |settings: Value, by: f32| {
        let methods = [fusion(settings, two()).unwrap()];
        let a = attached(&methods, &[]);
        for p in a.adapter.params().iter().filter(|p| p.name.ends_with("value.weight")) {
            p.param.set(identity(6).unwrap().reshape([6, 6]).unwrap().scale(by).unwrap()).unwrap();
        }
        methods[0].0.penalty(&a.adapter, at).unwrap().map(|t| t.item().unwrap())
    };
    assert_eq!(penalty(json!({}), 1.0), Some(0.0));
    assert!((penalty(json!({}), 3.0).unwrap() - 0.01 * 2.0 * 6.0 * 4.0).abs() < 1e-6);
    assert_eq!(penalty(json!({ "regularization": 0 }), 3.0), None);
    assert_eq!(penalty(json!({ "form": "static" }), 3.0), None);
}

#[test]
fn a_saved_fusion_holds_its_adapters() {
    survives_saving(&[fusion(json!({}), two()).unwrap()], &["head"]);
    let normed = source(json!({ "form": "residual", "reduction": 2, "drop": 1 }), 0.3).1;
    let learned = source(json!({ "form": "residual", "learned_scaling": true, "robust_drop": true }), 0.2).1;
    survives_saving(
        &[fusion(json!({ "form": "static", "dropout": 0.1 }), vec![normed, learned]).unwrap()],
        &[],
    );
    let (sites, info) = toy();
    let methods = [fusion(json!({}), two()).unwrap()];
    let a = attached(&methods, &[]);
    let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
    for bad in [json!({ "temperature": true }), json!({ "residual_before": true }), json!({ "sharpness": 2 })]
    {
        let inner = with(config["fusion_config"].clone(), bad.clone());
        let bad = with(config.clone(), json!({ "fusion_config": inner }));
        assert!(crate::load_adapter(&bad, tensors.clone(), &sites, &info).is_err(), "{bad}");
    }
    assert!(from_file(&with(config, json!({ "adapters": [] }))).is_err());
}

#[test]
fn what_cannot_be_fused_is_refused_by_name() {
    let message = |sources: Vec<SavedAdapter>| match fusion(json!({}), sources) {
        Err(e) => e.to_string(),
        Ok(method) => {
            let (sites, info) = toy();
            crate::attach(&[method], &[], &sites, &info, 0).map(|_| ()).unwrap_err().to_string()
        }
    };
    let plain = source(json!({ "reduction": 2 }), 0.5).1;
    let other = |settings: Value| vec![plain.clone(), source(settings, 0.25).1];
    assert!(message(other(json!({ "form": "residual" }))).contains("add to different things"));
    assert!(message(other(json!({ "gating": true }))).contains("gate"));
    let union = [chosen("bottleneck", json!({})), chosen("lora", json!({}))];
    let text = message(vec![SavedAdapter { config: config(&union, &[]), ..plain.clone() }]);
    assert!(text.contains("is a union of several methods (Bottleneck adapter, LoRA)"), "{text}");
    let mam = source_of("mam", json!({ "tokens": 2, "projection": 2 }), 0.5).1;
    let text = message(vec![mam]);
    assert!(
        text.contains("is of MAM adapter, which is a union of parts at keys and values, sublayer"),
        "{text}"
    );
    assert!(message(vec![]).contains("needs saved adapters"));
    let mut lora = plain.clone();
    lora.config = json!({ "peft_type": "LORA", "r": 2 });
    assert!(message(vec![plain.clone(), lora]).contains("is of LoRA, which adds nothing"));
    let prefix = source_of("prefix", json!({ "tokens": 2 }), 0.5).1;
    let text = message(vec![plain.clone(), prefix]);
    assert!(text.contains("adaptformer") && text.contains("compacter") && text.contains("krona_b"), "{text}");
    let ciat = source_of("ciat", json!({}), 0.5).1;
    assert!(message(vec![ciat]).contains("is of CIAT"));
    let mut wide = plain.clone();
    wide.config["hidden_size"] = json!(8);
    assert!(message(vec![plain.clone(), wide]).contains("width 8, and this one has 6"));
    let mut elsewhere = plain.clone();
    elsewhere.config["model_type"] = json!("mamba");
    assert!(message(vec![elsewhere]).contains("trained on a mamba"));
    let mut short = plain.clone();
    short.tensors[0].1 = sample(&[9], 1);
    short.tensors.remove(1);
    let text = message(vec![plain, short]);
    assert!(text.contains("saved-0.5 does not fit this model") && text.contains("absent"), "{text}");
    assert!((ENTRY.from_settings)(&Map::new()).is_err());
    assert!((crate::find("lora").unwrap().example)().take_adapters("x", vec![]).is_err());
}
