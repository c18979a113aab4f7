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
        json!({ "arrow_config": { "top_k": 2 } }),
        json!({ "layer_replication": [[0, 1]] }),
        json!({ "r": 0 }),
        json!({ "r": "eight" }),
        json!({ "init_lora_weights": "pissa_niter_4" }),
        json!({ "init_lora_weights": "corda" }),
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

/// Over layers that are no GPTQ layers `peft` makes a plain LoRA whatever `use_qalora` says, and keeps the keys.
#[test]
fn qalora_is_a_lora_unless_a_reads_means() {
    let methods = [chosen("lora", json!({ "rank": 2 }))];
    let keys = json!({ "use_qalora": true, "qalora_group_size": 3, "loftq_config": {} });
    let good = with(config(&methods, &[]), keys);
    let a = attached(&methods, &[]);
    let (sites, info) = toy();
    let (_, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "some/base", &sites, &info).unwrap();
    let loaded = crate::load_adapter(&good, tensors.clone(), &sites, &info).unwrap();
    let again =
        crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "some/base", &sites, &info).unwrap();
    assert_eq!(again.0, good);
    let pooled = tensors.into_iter().map(|(name, t)| match name.ends_with("lora_A.weight") {
        true => (name, t.narrow(1, 0, 2).unwrap()),
        false => (name, t),
    });
    let error = crate::load_adapter(&good, pooled.collect(), &sites, &info).err().unwrap().to_string();
    assert!(error.contains("GPTQ"), "{error}");
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

/// The value of the parameter whose name ends so.
fn value(a: &crate::Attached, end: &str) -> Tensor {
    a.adapter.params().iter().find(|p| p.name.ends_with(end)).unwrap().param.value()
}

fn saved(settings: &Value, a: &crate::Attached) -> (Value, crate::Named) {
    let (sites, info) = toy();
    crate::save_adapter(&a.adapter, &[chosen("lora", settings.clone())], &[], "b", &sites, &info).unwrap()
}

const Q: &str = "layers.0.attn.q";

/// Every start changes nothing; those that are taken off the weight are saved as a plain LoRA of twice the rank, which does
/// what the adapter does, with and without magnitudes.
#[test]
fn starts_change_nothing_and_are_saved_as_plain_lora() {
    let (sites, info) = toy();
    for init in ["gaussian", "orthogonal", "pissa", "olora", "mica", "eva", "corda", "lora-ga"] {
        for dora in [false, true] {
            // LoRA-GA takes twice as many directions as ranks.
            let of_v = if init == "lora-ga" { 2 } else { 4 };
            let settings = json!({ "rank": 2, "alpha": 3, "init": init, "dora": dora, "rank_pattern": { "1.attn.v": of_v },
                "alpha_pattern": { "0.attn.q": 5.0 } });
            let a = attached(&[chosen("lora", settings.clone())], &[]);
            let x = sample(&[5, 6], 3);
            let (fast, defined) = both_ways(&a, Q, &x);
            close(&fast, &x.matmul_t(&frozen(Q)).unwrap(), 1e-5);
            close(&defined, &fast, 1e-5);
            stir(&a, 0.4);
            let (fast, defined) = both_ways(&a, Q, &x);
            close(&fast, &defined, 1e-5);
            let (config, tensors) = saved(&settings, &a);
            let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
            let again = crate::Attached {
                adapter: loaded.adapter,
                dead_targets: vec![],
                dead_modules: vec![],
                without_targets: vec![],
            };
            close(&both_ways(&again, Q, &x).0, &fast, 1e-5);
            let rank = |name: &str| {
                let find = |(n, _): &&(String, Tensor)| n.ends_with(&format!("{name}.lora_A.weight"));
                tensors.iter().find(find).unwrap().1.dim(0)
            };
            let by = if ["gaussian", "orthogonal", "mica"].contains(&init) { 1 } else { 2 };
            assert_eq!(
                (rank(Q), rank("layers.1.attn.v")),
                (2 * by, (of_v * by).min(if init == "eva" { 6 } else { 8 }))
            );
            if init == "pissa" {
                assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(6)));
                assert_eq!(config["rank_pattern"], json!({ "1.attn.v": 8 }));
                assert_eq!(config["alpha_pattern"], json!({ "0.attn.q": 10 }));
                assert_eq!(config["init_lora_weights"], json!(true));
            }
        }
    }
}

#[test]
fn pissa_takes_the_largest_singular_values_off() {
    let w = frozen(Q);
    let values = engraft_tensor::linalg::svd(&w).unwrap().s;
    for settings in
        [json!({ "rank": 2, "init": "pissa" }), json!({ "rank": 2, "init": "pissa", "pissa_niter": 8 })]
    {
        let a = attached(&[chosen("lora", settings)], &[]);
        let (first, second) = (value(&a, "0.attn.q.lora_A.start"), value(&a, "0.attn.q.lora_B.start"));
        let rest = w.sub(&second.matmul(&first).unwrap().scale(8.0).unwrap()).unwrap();
        let squares: f32 = rest.to_vec().unwrap().iter().map(|v| v * v).sum();
        let expected: f32 = values[2..].iter().map(|v| v * v).sum();
        assert!((squares - expected).abs() < 1e-2 * expected, "{squares} {expected}");
    }
    // A file of peft's that was not converted holds A and B for the base without the start.
    let settings = json!({ "rank": 2, "init": "pissa" });
    let a = attached(&[chosen("lora", settings)], &[]);
    let config =
        with(config(&[chosen("lora", json!({ "rank": 2 }))], &[]), json!({ "init_lora_weights": "pissa" }));
    let tensor = |end: &str| (format!("base_model.model.{end}"), value(&a, end));
    let names = ["layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v"];
    let tensors: crate::Named = names
        .iter()
        .flat_map(|n| [tensor(&format!("{n}.lora_A.weight")), tensor(&format!("{n}.lora_B.weight"))])
        .collect();
    let (sites, info) = toy();
    let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
    let read = crate::Attached {
        adapter: loaded.adapter,
        dead_targets: vec![],
        dead_modules: vec![],
        without_targets: vec![],
    };
    let x = sample(&[5, 6], 3);
    close(&both_ways(&read, Q, &x).0, &x.matmul_t(&w).unwrap(), 1e-5);
    let again = crate::save_adapter(&read.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
    assert_eq!((&again.0["init_lora_weights"], &again.0["r"]), (&json!("pissa"), &json!(2)));
}

#[test]
fn what_is_trained_and_how_fast() {
    let of = |settings: Value| attached(&[chosen("lora", settings)], &[]);
    let trained = |a: &crate::Attached| -> Vec<String> {
        a.adapter.trainable().map(|p| p.name.clone()).filter(|n| n.starts_with(Q)).collect()
    };
    // LoRA-FA: B alone, A is saved; MiCA: A alone, B is saved.
    let a = of(json!({ "rank": 2, "freeze_a": true }));
    assert_eq!(
        (trained(&a), a.adapter.trained_count()),
        (vec![format!("{Q}.lora_B.weight")], 2 * 2 * (6 + 4))
    );
    assert!(names(&a).contains(&"layers.0.attn.q.lora_A.weight"));
    assert_eq!(trained(&of(json!({ "rank": 2, "init": "mica" }))), [format!("{Q}.lora_A.weight")]);
    // LoRA+: B and vectors are faster, biases do not decay; equal rates are LoRA.
    let (plus, settings) =
        (chosen("lora", json!({ "lr_ratio": 16 })).0, json!({ "lr_ratio": 16, "dora": true }));
    let groups: Vec<(f32, bool)> = of(settings)
        .adapter
        .trainable()
        .take(3)
        .map(|p| (plus.learning_rate_factor(p.group), plus.decays(p.group)))
        .collect();
    assert_eq!(groups, [(1.0, true), (16.0, true), (16.0, true)]);
    let a = of(json!({ "lr_ratio": 16, "lora_bias": true }));
    let bias = a.adapter.trainable().find(|p| p.name.ends_with("lora_B.bias")).unwrap();
    assert_eq!((plus.learning_rate_factor(bias.group), plus.decays(bias.group)), (16.0, false));
    assert!(of(json!({ "dora": true })).adapter.trainable().all(|p| p.group.is_empty()));
    // MoSLoRA: r² more numbers a matrix; with M = 1 it is LoRA.
    let settings = json!({ "rank": 2, "mixer": "orthogonal" });
    let a = of(settings.clone());
    assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 2 * (6 + 4)) + 4 * 4);
    let m = value(&a, "0.attn.q.lora_mixer");
    let one = Tensor::from_vec(vec![1.0, 0.0, 0.0, 1.0], [2, 2]).unwrap();
    close(&m.matmul_t(&m).unwrap(), &one, 1e-6);
    stir(&a, 0.5);
    let (fast, defined) = both_ways(&a, Q, &sample(&[5, 6], 3));
    close(&fast, &defined, 1e-5);
    let (_, tensors) = saved(&settings, &a);
    assert!(tensors.iter().all(|(name, _)| !name.contains("mixer")));
    let mixed = value(&a, "0.attn.q.lora_mixer").matmul(&value(&a, "0.attn.q.lora_A.weight")).unwrap();
    close(&tensors.iter().find(|(n, _)| n.ends_with("0.attn.q.lora_A.weight")).unwrap().1, &mixed, 0.0);
}

/// Whole columns of A and rows of B are left out, the same for all rows of a sequence.
#[test]
fn structured_dropout_leaves_out_columns_of_a_and_rows_of_b() {
    let forward = |settings: Value| {
        let a = attached(&[chosen("lora", settings)], &[]);
        stir(&a, 0.5);
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, Q));
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!("no weight") };
        let mode = engraft_nn::Mode::Train { seed: 1, step: 2, micro: 0 };
        let cx = engraft_nn::Pass::new(engraft_nn::Layout::counted(&[3, 4]).unwrap(), None).training(mode);
        let x = sample(&[7, 6], 3);
        let patched = engraft_nn::Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx);
        let added =
            engraft_nn::Base::forward(&patched, &x).unwrap().sub(&x.matmul_t(&frozen(Q)).unwrap()).unwrap();
        added.to_vec().unwrap()
    };
    let zero = |y: &[f32], rows: std::ops::Range<usize>, column: usize| {
        rows.into_iter().all(|row| y[row * 6 + column].abs() < 1e-6)
    };
    let y = forward(json!({ "rank": 2, "structured_dropout": 0.5, "dropout_masks": 2 }));
    let dead: Vec<[bool; 2]> = (0..6).map(|c| [zero(&y, 0..3, c), zero(&y, 3..7, c)]).collect();
    assert!(dead.iter().any(|d| d[0] != d[1]), "two masks for two sequences: {dead:?}");
    for (row, column) in (0..7).flat_map(|row| (0..6).map(move |column| (row, column))) {
        let all = dead[column][usize::from(row >= 3)];
        assert_eq!(y[row * 6 + column].abs() < 1e-6, all, "row {row}, column {column}");
    }
    assert_eq!(forward(json!({ "rank": 2, "structured_dropout": 0.0 })), forward(json!({ "rank": 2 })));
}

#[test]
fn a_table_s_columns_have_magnitudes() {
    let settings = json!({ "rank": 2, "dora": true });
    let a = attached(&[(chosen("lora", settings).0, Some(engraft_nn::Targets::names(["tok"])))], &[]);
    let ids = Tensor::from_i64(vec![3, 0, 10, 3], [4]).unwrap();
    close(&both_ways(&a, "tok", &ids).0, &frozen("tok").gather(&ids).unwrap(), 1e-5);
    stir(&a, 0.3);
    let (fast, defined) = both_ways(&a, "tok", &ids);
    close(&fast, &defined, 1e-5);
    let (sites, _) = toy();
    let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
    let norms = row_norms(&merged[0].value.t().unwrap()).unwrap();
    close(&norms, &value(&a, "tok.lora_magnitude_vector").unary(Unary::Abs).unwrap(), 1e-5);
}

/// Ranks that got nothing are left out, and the file says at which scale the others stand.
#[test]
fn ranks_that_were_dealt_out_are_written() {
    let settings = json!({ "rank": 2, "alpha": 6, "init": "eva", "eva_rho": 2 });
    let a = attached(&[chosen("lora", settings.clone())], &[]);
    for (path, rank) in [("layers.0.attn.q", 3), ("layers.0.attn.v", 0), ("layers.1.attn.q", 2)] {
        let param =
            &a.adapter.params().iter().find(|p| p.name == format!("{path}.lora_A.weight")).unwrap().param;
        assert_eq!(param.value().shape(), [4, 6]);
        let rows = (0..4 * 6).map(|i| if i < rank * 6 { 0.1 + i as f32 } else { 0.0 }).collect();
        param.set(Tensor::from_vec(rows, [4, 6]).unwrap()).unwrap();
    }
    let (config, tensors) = saved(&settings, &a);
    assert_eq!(config["rank_pattern"], json!({ "layers.0.attn.q": 3, "layers.0.attn.v": 1 }));
    assert_eq!(config["alpha_pattern"], json!({ "layers.0.attn.q": 9, "layers.0.attn.v": 3 }));
    assert_eq!(config["eva_config"]["rho"], 2.0);
    let shape = |end: &str| tensors.iter().find(|(n, _)| n.ends_with(end)).unwrap().1.shape().to_vec();
    assert_eq!((shape("0.attn.q.lora_A.weight"), shape("0.attn.v.lora_B.weight")), (vec![3, 6], vec![4, 1]));
    let (sites, info) = toy();
    let loaded = crate::load_adapter(&config, tensors, &sites, &info).unwrap();
    let again = crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
    assert_eq!(again.0, config);
}

#[test]
fn what_cannot_be_is_said() {
    for (settings, says) in [
        (json!({ "mixer": "kaiming", "init": "pissa" }), "`mixer`"),
        (json!({ "freeze_a": true, "init": "mica" }), "`freeze_a`"),
        (json!({ "alpha": 0.0, "init": "olora" }), "`alpha`"),
        (json!({ "rank": 3, "init": "orthogonal" }), "`rank`"),
        (json!({ "structured_dropout": 0.5, "dora": true }), "`structured_dropout`"),
        (json!({ "pissa_niter": 4 }), "`pissa_niter`"),
    ] {
        let error =
            (crate::find("lora").unwrap().from_settings)(settings.as_object().unwrap()).err().unwrap();
        assert!(error.to_string().contains(says), "{error}");
    }
    let (sites, info) = toy();
    for (settings, target) in [
        (json!({ "rank": 6, "init": "pissa" }), "attn.v"),
        (json!({ "init": "olora", "rank": 2 }), "tok"),
        (json!({ "mixer": "kaiming" }), "tok"),
        (json!({ "freeze_a": true }), "tok"),
        (json!({ "structured_dropout": 0.1 }), "tok"),
    ] {
        let methods = [(chosen("lora", settings).0, Some(engraft_nn::Targets::names([target])))];
        let error = crate::attach(&methods, &[], &sites, &info, 0).err().unwrap().to_string();
        assert!(error.contains(target), "{error}");
    }
}

#[test]
fn kasa_takes_the_smallest_singular_values_off_and_has_its_own() {
    let settings = json!({ "rank": 2, "alpha": 3, "kasa": true, "kasa_beta": 0.5, "kasa_gamma": 0.25 });
    let methods = [chosen("lora", settings)];
    let a = attached(&methods, &[]);
    assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 2 * (6 + 4)) + 4 * 2);
    let (sites, _) = toy();
    let left = |a: &crate::Attached| {
        let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
        merged.iter().find(|m| m.site.path == Q).unwrap().value.clone()
    };
    let values = |w: &Tensor| engraft_tensor::linalg::svd(w).unwrap().s;
    let (before, after) = (values(&frozen(Q)), values(&left(&a)));
    for i in 0..6 {
        let expected = if i < 4 { before[i] } else { 0.0 };
        assert!((after[i] - expected).abs() < 1e-5 * before[0], "{before:?} {after:?}");
    }
    stir(&a, 0.5);
    let x = sample(&[5, 6], 3);
    let (fast, defined) = both_ways(&a, Q, &x);
    close(&fast, &defined, 1e-5);
    let [d, f, g] =
        ["lora_diag", "lora_A.weight", "lora_B.weight"].map(|end| value(&a, &format!("0.attn.q.{end}")));
    let product = g.mul(&d.reshape([1, 2]).unwrap()).unwrap().matmul(&f).unwrap().scale(1.5).unwrap();
    let rest = left(&a).sub(&product).unwrap();
    assert!(values(&rest)[4] < 1e-5 * before[0]);
    survives_saving(&methods, &["head"]);
    // ‖d‖² of four matrices, and how far their factors are from orthonormal.
    let step = crate::Step { number: 1, total: 1, seed: 0 };
    let found = methods[0].0.penalty(&a.adapter, step).unwrap().unwrap().item().unwrap();
    let mut expected = 0.0;
    for path in ["layers.0.attn.q", "layers.0.attn.v", "layers.1.attn.q", "layers.1.attn.v"] {
        let [d, f, g] =
            ["lora_diag", "lora_A.weight", "lora_B.weight"].map(|end| value(&a, &format!("{path}.{end}")));
        let squares = |t: Tensor| t.to_vec().unwrap().iter().map(|v| v * v).sum::<f32>();
        let one = Tensor::from_vec(vec![1.0, 0.0, 0.0, 1.0], [2, 2]).unwrap();
        let off = |gram: Tensor| squares(gram.sub(&one).unwrap()).sqrt();
        expected += 0.5 * squares(d) + 0.25 * (off(g.t_matmul(&g).unwrap()) + off(f.matmul_t(&f).unwrap()));
    }
    assert!((found - expected).abs() < 1e-4 * expected, "{found} {expected}");
    assert!(chosen("lora", json!({})).0.penalty(&a.adapter, step).unwrap().is_none());
}

#[test]
fn blocks_are_saved_alone_and_multiply_their_own_part() {
    let settings = json!({ "rank": 4, "alpha": 4, "blocks": 2, "blocks_of_a": ["q"], "blocks_of_b": ["v"] });
    let methods = [chosen("lora", settings)];
    let a = attached(&methods, &[]);
    assert_eq!(a.adapter.trained_count(), 2 * (4 * 3 + 6 * 4 + 4 * 6 + 4 * 2));
    stir(&a, 0.5);
    let x = sample(&[5, 6], 3);
    for path in [Q, "layers.0.attn.v"] {
        let (fast, defined) = both_ways(&a, path, &x);
        close(&fast, &defined, 1e-5);
    }
    // The first half of the inputs meets the first half of the ranks.
    let [f, g] = ["lora_A.weight", "lora_B.weight"].map(|end| value(&a, &format!("0.attn.q.{end}")));
    let halves: Vec<Tensor> = (0..2)
        .map(|i| {
            let x = x.narrow(1, 3 * i, 3).unwrap();
            x.matmul_t(&f.rows_between(2 * i, 2 * i + 2).unwrap()).unwrap()
        })
        .collect();
    let added = engraft_tensor::ops::cat(&[&halves[0], &halves[1]], 1).unwrap().matmul_t(&g).unwrap();
    close(&both_ways(&a, Q, &x).0, &x.matmul_t(&frozen(Q)).unwrap().add(&added).unwrap(), 1e-5);
    survives_saving(&methods, &[]);
    for bad in [
        json!({ "blocks": 2 }),
        json!({ "blocks_of_a": ["q"] }),
        json!({ "blocks": 2, "blocks_of_a": ["q"], "dora": true }),
    ] {
        assert!((crate::find("lora").unwrap().from_settings)(bad.as_object().unwrap()).is_err(), "{bad}");
    }
    let (sites, info) = toy();
    for bad in [
        json!({ "rank": 3, "blocks": 2, "blocks_of_a": ["q"] }),
        json!({ "blocks": 4, "blocks_of_a": ["q"] }),
    ] {
        let error = crate::attach(&[chosen("lora", bad)], &[], &sites, &info, 0).err().unwrap();
        assert!(error.to_string().contains("do not divide"), "{error}");
    }
    let dead = json!({ "rank": 4, "blocks": 2, "blocks_of_a": ["q", "query"] });
    let error = crate::attach(&[chosen("lora", dead)], &[], &sites, &info, 0).err().unwrap().to_string();
    assert!(
        error.contains("`blocks_of_a`: `query` is part of the name of no target; these are q, v"),
        "{error}"
    );
}

#[test]
fn a_start_has_no_more_ranks_than_directions() {
    let (sites, info) = toy();
    for (init, most) in [("pissa", 4), ("corda", 4), ("eva", 6), ("lora-ga", 2)] {
        let of = |rank: usize| {
            let methods = [chosen("lora", json!({ "rank": rank, "init": init }))];
            crate::attach(&methods, &[], &sites, &info, 7).map(|_| ()).map_err(|e| e.to_string())
        };
        assert_eq!(of(most), Ok(()), "{init}");
        assert!(of(most + 1).unwrap_err().contains(&format!("at most {most} ranks here, not {}", most + 1)));
    }
}
