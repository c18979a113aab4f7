//! How rows start, and files.

use super::*;
use crate::testing::*;
use engraft_tensor::testing::close;

/// As `peft` makes them: such an adapter is the base.
#[test]
fn no_rows_change_nothing() {
    let (sites, info) = toy();
    for name in ["prompt", "prefix", "p_tuning"] {
        let methods = [chosen(name, json!({ "tokens": 1 }))];
        let a = attached(&methods, &[]);
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        let none = |(key, t): &(String, Tensor)| (key.clone(), t.rows_between(0, 0).unwrap());
        let config = with(config, json!({ "num_virtual_tokens": 0 }));
        let none: crate::Named = tensors.iter().map(none).collect();
        let loaded = crate::load_adapter(&config, none.clone(), &sites, &info).unwrap();
        assert_eq!((loaded.adapter.prompt_rows(), loaded.adapter.sites().len()), (0, 0), "{name}");
        let again = crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
        assert_eq!((&again.0, again.1[0].1.shape()), (&config, none[0].1.shape()), "{name}");
    }
}

#[test]
fn trained_numbers() {
    assert_eq!(trained("prompt", json!({ "tokens": 3 })), 3 * 6);
}

#[test]
fn rows_start_as_the_tokens_they_are_given() {
    let a = attached(&[chosen("prompt", json!({ "tokens": 3, "init_ids": [5, 7] }))], &[]);
    let ids = Tensor::from_i64(vec![5, 7, 5], [3]).unwrap();
    close(&a.adapter.params()[0].param.value(), &frozen("tok").gather(&ids).unwrap(), 0.0);
    let drawn = attached(&[chosen("prompt", json!({ "tokens": 4 }))], &[]).adapter.params()[0].param.value();
    let table = frozen("tok").to_vec().unwrap();
    let known = |row: &[f32]| table.chunks(6).any(|r| r == row);
    assert!(drawn.to_vec().unwrap().chunks(6).all(known));
    let (sites, info) = toy();
    let outside = chosen("prompt", json!({ "init_ids": [11] }));
    assert!(crate::attach(&[outside], &[], &sites, &info, 0).is_err());
    let common = attached(&[chosen("prompt", json!({ "tokens": 30, "init_below": 2 }))], &[]);
    let first = &table[..2 * 6];
    let common = common.adapter.params()[0].param.value().to_vec().unwrap();
    assert!(common.chunks(6).all(|row| first.chunks(6).any(|r| r == row)));
    let uniform = attached(&[chosen("prompt", json!({ "init": "uniform" }))], &[]);
    assert!(uniform.adapter.params()[0].param.value().to_vec().unwrap().iter().all(|v| v.abs() <= 0.5));
}

#[test]
fn rows_start_as_a_text_whose_ids_the_caller_gives() {
    let text = json!({ "tokens": 3, "init_text": { "text": "good or bad", "ids": [4, 9] } });
    let a = attached(&[chosen("prompt", text.clone())], &[]);
    let ids = Tensor::from_i64(vec![4, 9, 4], [3]).unwrap();
    close(&a.adapter.params()[0].param.value(), &frozen("tok").gather(&ids).unwrap(), 0.0);
    let written = config(&[chosen("prompt", text.clone())], &[]);
    assert_eq!(
        [
            &written["prompt_tuning_init"],
            &written["prompt_tuning_init_text"],
            &written["tokenizer_name_or_path"]
        ],
        [&json!("TEXT"), &json!("good or bad"), &json!("some/base")]
    );
    survives_saving(&[chosen("prompt", text)], &[]);
    for bad in [
        json!({ "init_text": "no ids" }),
        json!({ "init_text": { "text": "", "ids": [] } }),
        json!({ "init_text": { "text": "a", "ids": [1] }, "init_ids": [1] }),
        json!({ "init_ids": [1], "init_below": 3 }),
        json!({ "init_ids": [1], "init": "random" }),
        json!({ "init_text": { "text": "a", "ids": [1] }, "init": "uniform" }),
        json!({ "init_ids": [] }),
    ] {
        assert!(from_settings(bad.as_object().unwrap()).is_err(), "{bad}");
    }
}

#[test]
fn a_prompt_of_cpt_is_used_and_not_trained_on() {
    let (sites, info) = toy();
    let methods = [chosen("prompt", json!({ "tokens": 2, "init": "random" }))];
    let a = attached(&methods, &[]);
    let (plain, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
    let mut cpt = with(
        plain,
        json!({ "peft_type": "CPT", "task_type": "CAUSAL_LM", "cpt_token_ids": [3, 4], "cpt_mask": [1, 1],
            "cpt_tokens_type_mask": [1, 4], "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.9,
            "opt_projection_epsilon": 0.2, "opt_projection_format_epsilon": 0.1 }),
    );
    for key in ["prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"] {
        cpt.as_object_mut().unwrap().remove(key);
    }
    let loaded = crate::load_adapter(&cpt, tensors.clone(), &sites, &info).unwrap();
    assert!(loaded.methods[0].0.trains_on().is_err());
    let (written, again) =
        crate::save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
    assert_eq!((written, again.len()), (cpt.clone(), 1));
    assert!(from_file(&with(cpt, json!({ "task_type": null }))).is_err());
}

#[test]
fn configurations() {
    survives_saving(&[chosen("prompt", json!({}))], &["head"]);
    let written = config(&[chosen("prompt", json!({ "init": "random" }))], &[]);
    assert_eq!((&written["token_dim"], &written["num_virtual_tokens"]), (&json!(6), &json!(20)));
    assert_eq!(prompt_file_name("classifier.weight"), "base_model.classifier.weight");
    for bad in [
        json!({ "num_transformer_submodules": 3 }),
        json!({ "num_virtual_tokens": null }),
        json!({ "prompt_tuning_init": "AVERAGE_SOURCE_TASKS" }),
        json!({ "odd": 1 }),
    ] {
        assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
    }
}

#[test]
fn a_prompt_in_the_form_of_adapter_hub_starts_as_noise() {
    let of = |settings: Value| {
        let settings = with(settings, json!({ "form": "adapterhub" }));
        from_settings(settings.as_object().unwrap()).map_err(|e| e.to_string())
    };
    let own = of(json!({ "tokens": 4 })).unwrap();
    assert_eq!((own.info().name, own.peft_type()), ("prompt", "ENGRAFT_ADAPTER_HUB"));
    assert!(of(json!({ "init": "random" })).map(|_| ()).unwrap_err().contains("leave out init"));
    assert!(of(json!({ "sharpness": 2 })).is_err());
    let (sites, info) = toy();
    let error = crate::attach(&[(own, None)], &[], &sites, &info, 7).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("embeddings know positions"), "{error}");
}
