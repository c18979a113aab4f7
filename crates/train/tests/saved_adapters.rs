//! Methods that build on saved adapters, named in a recipe.

mod common;

use common::{Log, golden, recipe_of, session};
use engraft_store::{Limits, read_adapter};
use engraft_train::{RunOptions, open_adapter, train};

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
    assert!(other.contains("trained on a llama"), "{other}");
    let lora = message(&["bert__lora"]);
    assert!(lora.contains("is no bottleneck adapter") && lora.contains("LORA"), "{lora}");
    assert!(message(&["bert__seq_bn", "not_there"]).contains("not_there"));
    assert!(message(&["bert__seq_bn", "bert__double_seq_bn"]).contains("sits elsewhere"));
    assert!(message(&[]).contains("adapters"));
}
