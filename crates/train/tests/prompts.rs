//! Prompts that start as a text or from saved prompts, and prompts that leave no room.

mod common;

use std::path::Path;

use common::{golden, recipe_of, session};
use engraft_data::Tokenizer;
use engraft_nn::{Base, Role, Value};
use engraft_tensor::Tensor;

fn trajectory() -> std::path::PathBuf {
    golden().join("trajectories/llama__prompt")
}

fn open(method: &str) -> engraft_train::Result<engraft_train::Session> {
    session(&recipe_of(method, &trajectory(), &golden().join("models/llama"), "steps = 1", ""))
}

fn message(method: &str) -> String {
    open(method).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_text_is_read_by_the_model_s_tokenizer() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/all-minilm-l6-v2");
    let method = "name = \"prompt\"\ntokens = 7\ninit_text = \"good or bad\"";
    let trajectory = golden().join("trajectories/bert__prompt");
    let labels = "task = \"sequence-classification\"\n";
    let text = format!("{labels}{}", recipe_of(method, &trajectory, &model, "steps = 1", ""));
    let session = session(&text).unwrap();
    let ids = Tokenizer::open(&model).unwrap().encode("good or bad", true).unwrap().ids;
    assert!(ids.len() == 5, "three words and the special tokens: {ids:?}");
    let table = session.model.sites().iter().find(|s| s.role == Role::Embed).unwrap();
    let Value::Weight(table) = &table.value else { panic!("no table") };
    let ids: Vec<i64> = ids.iter().cycle().take(7).map(|id| i64::from(*id)).collect();
    let expected = table.lookup(&Tensor::from_i64(ids, [7]).unwrap()).unwrap();
    let found = session.adapter.params().iter().find(|p| p.name == "prompt_embeddings").unwrap();
    assert_eq!(found.param.value().to_vec().unwrap(), expected.to_vec().unwrap());
    // No tokenizer lies beside this model.
    assert!(message("name = \"prompt\"\ninit_text = \"good\"").contains("tokenizer"));
}

#[test]
fn rows_come_from_saved_prompts() {
    let source = trajectory().join("final_adapter").canonicalize().unwrap();
    let method = format!("name = \"prompt\"\ntokens = 5\nfrom_prompts = [{:?}]", source.to_string_lossy());
    let session = open(&method).unwrap();
    let files = engraft_store::read_adapter(&source, &engraft_store::Limits::default()).unwrap();
    let expected = files.weights.get("prompt_embeddings").unwrap().to_f32().unwrap();
    assert_eq!(session.adapter.params()[0].param.value().to_vec().unwrap(), expected);
    let other = golden().join("cases/llama__lora/adapter").canonicalize().unwrap();
    let method = format!("name = \"prompt\"\nfrom_prompts = [{:?}]", other.to_string_lossy());
    assert!(message(&method).contains("peft_type is LORA"), "{}", message(&method));
    assert!(message("name = \"prompt\"\nfrom_prompts = [\"not/there\"]").contains("not/there"));
}

#[test]
fn a_prompt_must_leave_room() {
    for method in ["prompt", "prefix", "p_tuning", "mpt", "dept", "lpt"] {
        let text = message(&format!("name = \"{method}\"\ntokens = 4000"));
        assert!(text.contains("positions, and the model has"), "{method}: {text}");
        assert!(message(&format!("name = \"{method}\"\ntokens = 0")).contains("tokens"), "{method}");
    }
}
