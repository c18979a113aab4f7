use engraft_tensor::Tensor;
use engraft_tensor::ops::Unary;
use engraft_tensor::testing::{close, sample};
use serde_json::{Value, json};

use super::dora::row_norms;
use super::file::from_file;
use crate::testing::*;

#[test]
fn starts_as_the_base_and_trains_what_it_says() {
    let a = attached(&[chosen("lora", json!({ "rank": 2 }))], &[]);
    let expected =
        ["layers.0.attn.q.lora_A.weight", "layers.0.attn.q.lora_B.weight", "layers.0.attn.v.lora_A.weight"];
    assert_eq!(names(&a)[..3], expected);
    assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 2 * (6 + 4)));
    let x = sample(&[5, 6], 3);
    close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(), 1e-6);
}

#[test]
fn forward_is_the_changed_weight_scaled_as_the_patterns_say() {
    let settings =
        json!({ "rank": 2, "alpha": 6, "rank_pattern": { "v": 3 }, "alpha_pattern": { "0.attn.v": 12.0 } });
    for (rslora, scales) in
        [(false, [3.0, 4.0, 2.0]), (true, [6.0 / 2f32.sqrt(), 12.0 / 3f32.sqrt(), 6.0 / 3f32.sqrt()])]
    {
        let a = attached(&[chosen("lora", with(settings.clone(), json!({ "rslora": rslora })))], &[]);
        stir(&a, 0.5);
        let x = sample(&[5, 6], 3);
        for (path, scale) in ["layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.v"].into_iter().zip(scales)
        {
            let (fast, defined) = both_ways(&a, path, &x);
            close(&fast, &defined, 1e-5);
            let get = |end: &str| {
                a.adapter.params().iter().find(|p| p.name == format!("{path}.{end}")).unwrap().param.value()
            };
            let product = get("lora_B.weight").matmul(&get("lora_A.weight")).unwrap().scale(scale).unwrap();
            close(&defined, &x.matmul_t(&frozen(path).add(&product).unwrap()).unwrap(), 1e-5);
        }
    }
}

#[test]
fn tables_and_magnitudes() {
    let targets = Some(engraft_nn::Targets::names(["tok"]));
    let a = attached(&[(chosen("lora", json!({ "rank": 2 })).0, targets)], &[]);
    stir(&a, 0.5);
    let ids = Tensor::from_i64(vec![3, 0, 10, 3], [4]).unwrap();
    let (fast, defined) = both_ways(&a, "tok", &ids);
    close(&fast, &defined, 1e-5);

    let a = attached(&[chosen("lora", json!({ "rank": 2, "dora": true }))], &[]);
    let x = sample(&[5, 6], 3);
    close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&frozen("layers.0.attn.q")).unwrap(), 1e-5);
    stir(&a, 0.5);
    let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
    close(&fast, &defined, 1e-5);
    let magnitude = a.adapter.params().iter().find(|p| p.name.ends_with("q.lora_magnitude_vector")).unwrap();
    let (sites, _) = toy();
    let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
    let q = merged.iter().find(|m| m.site.path == "layers.0.attn.q").unwrap();
    close(&row_norms(&q.value).unwrap(), &magnitude.param.value().unary(Unary::Abs).unwrap(), 1e-5);
}

#[test]
fn biases_are_named_as_peft_names_them() {
    let a = attached(&[chosen("lora", json!({ "bias": "all" }))], &["head"]);
    let all: Vec<&str> = names(&a).into_iter().filter(|n| n.ends_with(".bias")).collect();
    assert!(all.contains(&"layers.0.attn.q.base_layer.bias") && all.contains(&"layers.1.attn.k.bias"));
    assert!(all.contains(&"layers.1.norm.bias") && all.contains(&"head.bias"), "{all:?}");
    let a = attached(&[chosen("lora", json!({ "bias": "lora_only" }))], &[]);
    let own: Vec<&str> = names(&a).into_iter().filter(|n| n.ends_with(".bias")).collect();
    assert_eq!(own, ["layers.0.attn.q.base_layer.bias", "layers.1.attn.q.base_layer.bias"]);
    // The product's own bias moves the layer's.
    let a = attached(&[chosen("lora", json!({ "lora_bias": true, "rank": 2, "alpha": 6 }))], &[]);
    stir(&a, 0.5);
    let own =
        a.adapter.params().iter().find(|p| p.name == "layers.0.attn.q.lora_B.bias").unwrap().param.value();
    let expected = frozen("layers.0.attn.q.bias").add(&own.scale(3.0).unwrap()).unwrap();
    close(&vector(&a, "layers.0.attn.q.bias"), &expected, 1e-6);
}

#[test]
fn configurations() {
    for settings in [
        json!({}),
        json!({ "dora": true, "rank": 3 }),
        json!({ "bias": "all", "rslora": true, "dropout": 0.1 }),
    ] {
        survives_saving(&[chosen("lora", settings)], &["head"]);
    }
    let good = config(&[chosen("lora", json!({ "alpha": 12, "dropout": 0.1 }))], &[]);
    assert_eq!(good["lora_alpha"], json!(12));
    assert_eq!(good["lora_dropout"], json!(0.1));
    assert_eq!(good["target_modules"], json!(["q", "v"]));
    for bad in [
        json!({ "use_qalora": true }),
        json!({ "layer_replication": [[0, 1]] }),
        json!({ "r": 0 }),
        json!({ "r": "eight" }),
        json!({ "init_lora_weights": "pissa" }),
        json!({ "rank_pattern": { "(": 3 } }),
        json!({ "lora_dropout": 1.5 }),
        json!({ "target_modules": [3] }),
        json!({ "brand_new": [1] }),
    ] {
        let key = bad.as_object().unwrap().keys().next().unwrap().clone();
        let Err(error) = from_file(&with(good.clone(), bad)) else { panic!("{key} passed") };
        assert!(error.to_string().contains(&key), "{error}");
    }
    assert!(from_file(&with(good, json!({ "brand_new": null, "use_rslora": false }))).is_ok());
}

#[test]
fn keys_are_those_of_peft() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/golden/cases/llama__lora/adapter/adapter_config.json"
    );
    let theirs: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let ours = config(&[chosen("lora", json!({}))], &[]);
    let mut keys = [&ours, &theirs].map(|c| c.as_object().unwrap().keys().cloned().collect::<Vec<_>>());
    keys.iter_mut().for_each(|k| k.sort());
    assert_eq!(keys[0], keys[1]);
    for (key, value) in theirs.as_object().unwrap() {
        let own = ["target_modules", "base_model_name_or_path", "r", "lora_alpha"].contains(&key.as_str());
        assert!(own || ours[key] == *value, "{key}: {} is not {value}", ours[key]);
    }
}
