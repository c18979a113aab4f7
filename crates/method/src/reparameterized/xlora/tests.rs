//! What X-LoRA trains, and which adapters it is given.

use super::*;
use crate::testing::*;
use engraft_tensor::testing::close;

#[test]
fn trained_numbers() {
    let count = |more: Value| trained("xlora", with(json!({ "experts": 3, "rank": 2 }), more));
    // A and B of every expert at q [6, 6] and v [4, 6] of two layers, and the router.
    let factors = 2 * 3 * 2 * ((6 + 6) + (4 + 6));
    assert_eq!(count(json!({})), factors + 3 * (6 + 1));
    assert_eq!(count(json!({ "layerwise_scalings": true })), factors + 4 * 3 * (6 + 1));
    let deep = json!({ "xlora_depth": 3, "xlora_size": 5 });
    assert_eq!(count(deep), factors + 5 * (6 + 1) + 5 * (5 + 1) + 3 * (5 + 1));
}

#[test]
fn adapters_rest_where_a_file_says_so() {
    let saved = config(&[chosen("xlora", json!({ "experts": 3, "rank": 2 }))], &[]);
    assert_eq!(saved["use_trainable_adapters"], true);
    let loaded = from_file(&with(saved, json!({ "use_trainable_adapters": false }))).unwrap().unwrap();
    let methods = [(loaded.method, loaded.targets)];
    assert_eq!(attached(&methods, &[]).adapter.trained_count(), 3 * (6 + 1));
    survives_saving(&methods, &[]);
}

fn saved(path: &str, settings: Value, seed: f32) -> SavedAdapter {
    let methods = [chosen("lora", settings)];
    let a = attached(&methods, &[]);
    stir(&a, seed);
    let (sites, info) = toy();
    let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
    SavedAdapter { path: path.into(), config, tensors }
}

fn over(adapters: Vec<SavedAdapter>, more: Value) -> Result<crate::Chosen> {
    let paths: Vec<&str> = adapters.iter().map(|a| a.path.as_str()).collect();
    let (mut method, targets) = chosen("xlora", with(json!({ "adapters": paths }), more));
    method.take_adapters("adapters", adapters)?;
    Ok((method, targets))
}

#[test]
fn given_adapters_are_scaled_and_rest() {
    let settings = [json!({ "rank": 2, "alpha": 6 }), json!({ "rank": 3, "alpha": 3, "rslora": true })];
    let adapters = || vec![saved("a", settings[0].clone(), 0.4), saved("b", settings[1].clone(), 0.5)];
    let methods = [over(adapters(), json!({ "enable_softmax": false })).unwrap()];
    let a = attached(&methods, &[]);
    assert_eq!(a.adapter.trained_count(), 2 * (6 + 1), "the router alone");
    // Of scalings that are all 1 the change is the sum of the adapters' own.
    let path = "layers.0.attn.q";
    let pair = |a: &crate::Attached| {
        let of = |end: &str| value_of(a, &format!("{path}.{end}"));
        of("lora_B.weight").matmul(&of("lora_A.weight")).unwrap()
    };
    let scale = (config(&methods, &[])["lora_alpha"].as_f64().unwrap() / 3.0) as f32;
    let mut sum = Tensor::zeros([6, 6]);
    for (settings, by) in settings.iter().zip([0.4, 0.5]) {
        let own = attached(&[chosen("lora", settings.clone())], &[]);
        stir(&own, by);
        sum = sum.add(&merged(&own, path).sub(&frozen(path)).unwrap()).unwrap();
    }
    close(&pair(&a).scale(scale).unwrap(), &sum, 1e-5);
    survives_saving(&methods, &[]);
    let trained = attached(&[over(adapters(), json!({ "use_trainable_adapters": true })).unwrap()], &[]);
    assert_eq!(trained.adapter.trained_count(), 2 * (6 + 1) + 2 * (2 * 3) * ((6 + 6) + (4 + 6)));
}

#[test]
fn what_cannot_be_given_is_told() {
    let error = |adapters, more| over(adapters, more).err().unwrap().to_string();
    let dora = saved("d", json!({ "dora": true }), 0.1);
    let message = error(vec![saved("a", json!({}), 0.1), dora], json!({}));
    assert!(message.contains("`adapters`: d is more than a plain LoRA (`use_dora`)"), "{message}");
    let mut ia3 = saved("i", json!({}), 0.1);
    ia3.config["peft_type"] = json!("IA3");
    assert!(error(vec![ia3], json!({})).contains("i is no LoRA (its peft_type is IA3)"));
    let mut pissa = saved("p", json!({}), 0.1);
    pissa.config["init_lora_weights"] = json!("pissa");
    assert!(error(vec![pissa], json!({})).contains("changes the base"));
    for (settings, word) in [
        (json!({ "use_trainable_adapters": false }), "expected `adapters` that rest"),
        (json!({ "adapters": ["a", "b"], "experts": 3 }), "there are 2 `adapters`"),
        (json!({ "adapters": ["a", "b"], "top_k_lora": 3 }), "2 adapters to choose from"),
    ] {
        let error = from_settings(settings.as_object().unwrap()).err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
    let (sites, info) = toy();
    let mut methods = [over(vec![saved("a", json!({}), 0.1)], json!({})).unwrap()];
    methods[0].1 = Some(Targets::names(["attn.q"]));
    let error = crate::attach(&methods, &[], &sites, &info, 0).err().unwrap().to_string();
    assert!(error.contains("no targets: layers.0.attn.v, layers.1.attn.v"), "{error}");
}
