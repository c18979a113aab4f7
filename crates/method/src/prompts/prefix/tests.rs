//! Columns, files, dropout, places.

use super::*;
use crate::testing::*;
use engraft_tensor::testing::close;

#[test]
fn columns_are_key_and_value_of_each_layer_in_turn() {
    let a = attached(&[chosen("prefix", json!({ "tokens": 3 }))], &[]);
    let all = a.adapter.params()[0].param.value();
    assert_eq!(all.shape(), [3, 2 * 2 * 4]);
    let (sites, _) = toy();
    for (layer, first) in [(0, 0), (1, 8)] {
        let [Patch::KeyValue(p)] = a.adapter.at(site_id(&sites, &format!("layers.{layer}.attn"))) else {
            panic!()
        };
        let cx = Pass::new(engraft_nn::Layout::counted(&[1]).unwrap(), None);
        let rows = p.rows(&a.adapter.params()[0].param.value(), &cx).unwrap();
        assert_eq!((p.count(), rows.keys.shape()), (3, [3, 2, 2].as_slice()));
        close(&rows.keys.reshape([3, 4]).unwrap(), &all.narrow(1, first, 4).unwrap(), 0.0);
        close(&rows.values.reshape([3, 4]).unwrap(), &all.narrow(1, first + 4, 4).unwrap(), 0.0);
    }
}

#[test]
fn configurations() {
    survives_saving(&[chosen("prefix", json!({ "init": "zero" }))], &["head"]);
    let written = config(&[chosen("prefix", json!({}))], &[]);
    assert_eq!((&written["token_dim"], &written["num_layers"]), (&json!(4), &json!(2)));
    let inner = json!({ "projection": 5, "init": "zero" });
    let zero = attached(&[chosen("prefix", inner)], &[]);
    assert_eq!(zero.adapter.params().iter().filter(|p| p.saved).count(), 0);
    let one = |projected: bool| {
        let changed = with(written.clone(), json!({ "prefix_projection": projected }));
        from_file(&changed).unwrap().unwrap().method
    };
    assert!(one(false).trains_on().is_ok());
    assert!(one(true).trains_on().is_err(), "the projection is not in the file");
    let wrong = json!({ "at": ["decoder", "head"] });
    assert!(from_settings(wrong.as_object().unwrap()).is_err());
    let places = json!({ "at": ["cross", "encoder"] });
    assert!(from_settings(places.as_object().unwrap()).is_ok());
}

/// `peft` cuts the rows by what the file says, whatever the model is, and fails in the first attention.
#[test]
fn a_file_of_another_model_is_refused_by_its_sizes() {
    let (sites, info) = toy();
    for name in ["prefix", "cartridge"] {
        let methods = [chosen(name, json!({ "tokens": 3 }))];
        let a = attached(&methods, &[]);
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        let load = |change: Value| {
            let config = with(config.clone(), change);
            crate::load_adapter(&config, tensors.clone(), &sites, &info)
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        for (key, found) in [("num_layers", 4), ("token_dim", 8), ("num_attention_heads", 1)] {
            let error = load(json!({ key: found })).unwrap_err();
            assert!(error.contains(&format!("`{key}` is {found}, and this model has")), "{name}: {error}");
            assert!(load(json!({ key: null })).is_ok(), "{name}: `peft` takes it from the model");
        }
        let error = load(json!({ "num_layers": 1, "token_dim": 8 })).unwrap_err();
        assert!(error.contains("`num_layers` is 1") && error.contains("`token_dim` is 8"), "{error}");
    }
}

#[test]
fn the_file_of_a_projection_holds_what_it_makes() {
    let (l, m) = (3, 5);
    let methods = [chosen("prefix", json!({ "tokens": l, "projection": m }))];
    let a = attached(&methods, &[]);
    // l·d + d·m + m + m·2Ld + 2Ld.
    assert_eq!(a.adapter.trained_count(), l * 4 + 4 * m + m + m * 16 + 16);
    let (sites, info) = toy();
    let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
    let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
    assert!(loaded.methods[0].0.trains_on().is_err());
    let cx = Pass::new(engraft_nn::Layout::counted(&[2]).unwrap(), None);
    let rows = |adapter: &engraft_nn::Adapter, layer: usize| {
        let [Patch::KeyValue(p)] = adapter.at(site_id(&sites, &format!("layers.{layer}.attn"))) else {
            panic!("no prefix")
        };
        p.rows(&Tensor::zeros([2, 6]), &cx).unwrap()
    };
    for layer in [0, 1] {
        let (made, read) = (rows(&a.adapter, layer), rows(&loaded.adapter, layer));
        close(&read.keys, &made.keys, 1e-6);
        close(&read.values, &made.values, 1e-6);
    }
}

#[test]
fn dropout_is_drawn_for_each_sequence() {
    let a = attached(&[chosen("prefix", json!({ "tokens": 3, "dropout": 0.5 }))], &[]);
    let (sites, _) = toy();
    let [Patch::KeyValue(p)] = a.adapter.at(site_id(&sites, "layers.0.attn")) else { panic!("no prefix") };
    let cx = Pass::new(engraft_nn::Layout::counted(&[2, 1]).unwrap(), None);
    let input = Tensor::zeros([3, 6]);
    assert_eq!(p.rows(&input, &cx).unwrap().keys.dim(0), 3);
    let drawn = p.rows(&input, &cx.training(Mode::Train { seed: 1, step: 1, micro: 0 })).unwrap().keys;
    let (one, other) = (drawn.rows_between(0, 3).unwrap(), drawn.rows_between(3, 6).unwrap());
    assert_ne!(one.to_vec().unwrap(), other.to_vec().unwrap());
    assert!(drawn.to_vec().unwrap().contains(&0.0));
}

#[test]
fn attentions_that_a_model_does_not_have_are_refused() {
    let (one_stack, info) = toy();
    for place in ["encoder", "decoder", "cross"] {
        let wanted = [chosen("prefix", json!({ "at": [place] }))];
        let error = crate::attach(&wanted, &[], &one_stack, &info, 7).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(place) && error.contains("leave `at` out"), "{error}");
    }
    let mut both = Sites::default();
    let kind = || Kind::KeyValue { heads: 2, dim: 2 };
    both.set_stack(Stack::Encoder);
    both.add("encoder", Role::Attention, Some(0), kind());
    assert!(absent(&[Place::Encoder], &both).is_ok());
    let error = absent(&[Place::Encoder, Place::Cross], &both).unwrap_err().to_string();
    assert!(error.contains("`at` names cross,") && error.contains("it has encoder"), "{error}");
}

#[test]
fn a_prefix_in_the_form_of_adapter_hub() {
    for (settings, flat) in [(json!({}), true), (json!({ "projection": 5, "dropout": 0.5 }), false)] {
        let methods = [chosen("prefix", with(settings, json!({ "tokens": 3, "form": "adapterhub" })))];
        survives_saving(&methods, &["head"]);
        let written = config(&methods, &[]);
        let inner = &written["config"];
        assert_eq!((&inner["flat"], &inner["prefix_length"]), (&json!(flat), &json!(3)), "{written}");
        let a = attached(&methods, &[]);
        let [Patch::KeyValue(p)] = a.adapter.at(site_id(&toy().0, "layers.1.attn")) else {
            panic!("no prefix")
        };
        assert!(!p.moves() && p.stays_in_view());
    }
    let of = |settings: Value| {
        let settings = with(settings, json!({ "form": "adapterhub" }));
        from_settings(settings.as_object().unwrap()).map(|_| ()).map_err(|e| e.to_string())
    };
    assert!(of(json!({ "init": "zero" })).unwrap_err().contains("starts as noise"));
    assert!(of(json!({ "at": ["encoder"] })).unwrap_err().contains("name decoder"));
    assert!(of(json!({ "at": ["encoder", "decoder"] })).is_ok());
    assert!(of(json!({ "sharpness": 2 })).is_err());
}
