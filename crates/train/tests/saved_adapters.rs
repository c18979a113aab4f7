//! Saved adapters: methods that build on them, and what is said of one that names what its model does not have.

mod common;

use std::fs;

use common::{Log, golden, recipe_of, session};
use engraft_store::{Limits, read_adapter};
use engraft_train::{RunOptions, open_adapter, train};
use serde_json::{Value, json};

fn recipe(cases: &[&str]) -> String {
    let path =
        |case: &&str| format!("{:?}", golden().join("cases").join(case).join("adapter").to_string_lossy());
    let adapters = cases.iter().map(path).collect::<Vec<_>>().join(", ");
    let method = format!("name = \"adapter_fusion\"\nadapters = [{adapters}]");
    let trajectory = golden().join("trajectories/bert__adapter_fusion");
    recipe_of(&method, &trajectory, &golden().join("models/bert"), "steps = 2\nbatch_size = 2", "")
}

#[test]
fn a_fusion_of_saved_adapters_leaves_them_as_they_were_and_holds_them() {
    let session = session(&recipe(&["bert__seq_bn", "bert__seq_bn_gelu"])).unwrap();
    let run = tempfile::tempdir().unwrap();
    let options = RunOptions { out: run.path().join("run"), ..RunOptions::default() };
    train(&session, &options, &mut Log::default()).unwrap();
    let limits = Limits::default();
    let found = read_adapter(&options.out.join("adapter"), &limits).unwrap();
    for (case, name) in [("bert__seq_bn", "probe"), ("bert__seq_bn_gelu", "probe_2")] {
        let source = read_adapter(&golden().join("cases").join(case).join("adapter"), &limits).unwrap();
        for (key, tensor) in source.weights.iter() {
            let own = found.weights.get(&key.replace(".probe.", &format!(".{name}."))).unwrap();
            assert_eq!(own.to_f32().unwrap(), tensor.to_f32().unwrap(), "{key}");
        }
    }
    let key = "bert.encoder.layer.1.output.adapter_fusion_layer.probe,probe_2.value.weight";
    let value = found.weights.get(key).unwrap().to_f32().unwrap();
    assert!(value[0] != 1.0 && (value[0] - 1.0).abs() < 0.1, "trained from the identity");
    // Nothing but its own directory is needed to use it.
    let again = open_adapter(session.model.as_ref(), &options.out.join("adapter"), &limits).unwrap();
    assert_eq!(again.adapter.trained_count(), session.adapter.trained_count());
}

#[test]
fn what_cannot_be_fused_is_told_before_the_start() {
    let message = |cases: &[&str]| session(&recipe(cases)).map(|_| ()).unwrap_err().to_string();
    let other = message(&["bert__seq_bn", "llama__seq_bn"]);
    assert!(other.contains("of different bases") && other.contains("any_base"), "{other}");
    let text = recipe(&["bert__seq_bn", "llama__seq_bn"]);
    let allowed =
        session(&text.replace("adapters =", "any_base = true\nadapters =")).map(|_| ()).unwrap_err();
    assert!(allowed.to_string().contains("trained on a llama"), "{allowed}");
    let lora = message(&["bert__lora"]);
    assert!(lora.contains("is of LoRA, which adds nothing at sublayers"), "{lora}");
    assert!(message(&["bert__seq_bn", "not_there"]).contains("not_there"));
    assert!(message(&["bert__mam"]).contains("is a union of parts"));
    assert!(message(&[]).contains("adapters"));
}

#[test]
fn saved_loras_are_scaled_by_a_router_and_rest() {
    let cases = ["llama__lora", "llama__lora_rslora_patterns"];
    let place = |case: &str| golden().join("cases").join(case).join("adapter");
    let paths: Vec<String> =
        cases.iter().map(|case| format!("{:?}", place(case).to_string_lossy())).collect();
    let method = format!("name = \"xlora\"\nadapters = [{}]", paths.join(", "));
    let trajectory = golden().join("trajectories/llama__xlora");
    let recipe = |method: &str| {
        recipe_of(method, &trajectory, &golden().join("models/llama"), "steps = 2\nbatch_size = 2", "")
    };
    let session = session(&recipe(&method)).unwrap();
    let run = tempfile::tempdir().unwrap();
    let options = RunOptions { out: run.path().join("run"), ..RunOptions::default() };
    train(&session, &options, &mut Log::default()).unwrap();
    let limits = Limits::default();
    let found = read_adapter(&options.out.join("adapter"), &limits).unwrap();
    assert_eq!(
        [&found.config["r"], &found.config["experts"], &found.config["use_trainable_adapters"]],
        [&serde_json::json!(9), &serde_json::json!(2), &serde_json::json!(false)]
    );
    // A of the first has four rows, and nine of the larger rank are kept for it; so has B columns, times its scale over the common one.
    let sources = cases.map(|case| read_adapter(&place(case), &limits).unwrap());
    let scales = [8.0 / 4.0, 8.0 / 9.0f32.sqrt()];
    let common = found.config["lora_alpha"].as_f64().unwrap() as f32 / 9.0;
    for (number, (source, scale)) in sources.iter().zip(scales).enumerate() {
        let key = |end: &str| format!("base_model.model.model.layers.1.self_attn.q_proj.lora_{end}.weight");
        let of = |files: &engraft_store::AdapterFiles, end: &str| {
            let raw = files.weights.get(&key(end)).unwrap();
            (raw.to_f32().unwrap(), raw.shape.clone())
        };
        let ((own, _), (packed, shape)) = (of(source, "A"), of(&found, "A"));
        assert_eq!(shape[0], 18);
        assert_eq!(packed[9 * number * shape[1]..][..own.len()], own[..]);
        let ((own, ranks), (packed, shape)) = (of(source, "B"), of(&found, "B"));
        for (row, own) in own.chunks(ranks[1]).enumerate() {
            let packed = &packed[row * shape[1] + 9 * number..][..own.len()];
            assert!(own.iter().zip(packed).all(|(own, found)| (own * scale - found * common).abs() < 1e-5));
        }
    }
    assert_eq!(session.adapter.trained_count(), 48 * 2 + 2, "the router of two adapters");
    open_adapter(session.model.as_ref(), &options.out.join("adapter"), &limits).unwrap();
    let refused = common::session(&recipe(&method.replace("llama__lora_rslora_patterns", "llama__ia3")));
    let error = refused.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("is no LoRA (its peft_type is IA3)"), "{error}");
}

#[test]
fn what_a_file_leaves_out_or_sizes_that_is_not_there_is_noted() {
    let case = golden().join("cases/llama__lora/adapter");
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&case).unwrap().map(Result::unwrap) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["exclude_modules"] = json!(["o_proj", "nowhere"]);
    config["layers_to_transform"] = json!([0, 1, 2, 7]);
    config["rank_pattern"] = json!({ "layers.0.self_attn.q_proj": 4, "layers.9.self_attn.q_proj": 2 });
    config["alpha_pattern"] = json!({ "o_proj": 2 });
    fs::write(&path, config.to_string()).unwrap();
    let session = session(&recipe_of(
        &format!("from = {:?}", dir.path().to_string_lossy()),
        &golden().join("trajectories/llama__lora_plus_dora"),
        &golden().join("models/llama"),
        "steps = 1\nbatch_size = 2",
        "",
    ))
    .unwrap();
    let expected = [
        "`exclude_modules` names `nowhere`, which matches nothing in this model",
        "`layers_to_transform` names 7, and the model's blocks are 0 to 2",
        "`rank_pattern` names `layers.9.self_attn.q_proj`, which is no adapted module of this model",
        "`alpha_pattern` names `o_proj`, which is no adapted module of this model",
    ];
    let notes: Vec<&str> =
        session.notes.iter().filter_map(|note| note.split_once(": ")).map(|n| n.1).collect();
    assert_eq!(notes, expected);
}
