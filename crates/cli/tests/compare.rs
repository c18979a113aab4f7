//! `engraft compare`: an adapter is wholly like itself, and prompts have similarities of their rows too.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

#[test]
fn an_adapter_is_like_itself() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let path = |part: &str| golden.join(part).to_str().unwrap().to_owned();
    for name in ["llama", "bert", "t5"] {
        let prompt = path(&format!("cases/{name}__prompt/adapter"));
        let lora = path(&format!("cases/{name}__lora/adapter"));
        let model = path(&format!("models/{name}"));
        let args = ["compare", "--model", &model, &prompt, &prompt, &lora, "--json"];
        let output = Command::new(env!("CARGO_BIN_EXE_engraft")).args(args).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let pair = |i: usize, key: &str| found["pairs"][i][key].as_f64();
        assert!(found["neurons"].as_u64().unwrap() > 50, "{found}");
        assert!((pair(0, "neurons").unwrap() - 1.0).abs() < 1e-12, "{found}");
        assert!((pair(0, "average").unwrap() - 1.0).abs() < 1e-9, "{found}");
        assert!(pair(0, "pairs").unwrap() < 1.0, "rows differ among themselves: {found}");
        // Other adapters have neurons alone, and change some of them.
        let other = pair(1, "neurons").unwrap();
        assert!(other > 0.0 && other < 1.0 && pair(1, "average").is_none(), "{found}");
        assert_eq!(pair(2, "neurons"), Some(other), "the prompt is the same");
    }
}
