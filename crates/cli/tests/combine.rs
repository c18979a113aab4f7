//! `engraft combine` and `engraft extract`: sums as `peft` makes them, and what differs between two models.

#[path = "common/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use engraft_store::{Entry, Limits, Weights, write_safetensors};
use serde_json::Value;

use program::{engraft, refused, succeeds};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn tensor(file: &Path, name: &str) -> Vec<f32> {
    Weights::open_file(file, &Limits::default()).unwrap().get(name).unwrap().numbers().unwrap()
}

/// Logits of a model with or without an adapter.
fn logits(model: &Path, adapter: Option<&Path>, dir: &Path) -> Vec<f32> {
    let (inputs, out) = (golden().join("inputs/llama/inputs.safetensors"), dir.join("logits.safetensors"));
    let mut args = vec!["logits", "--model", text(model), "--inputs", text(&inputs), "--out", text(&out)];
    if let Some(adapter) = adapter {
        args.extend(["--adapter", text(adapter)]);
    }
    succeeds(&args);
    tensor(&out, "logits")
}

fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |most, v| f64::max(most, f64::from(v.abs())))
}

#[test]
fn sums_are_those_of_peft() {
    let (root, dir) = (golden().join("combine"), tempfile::tempdir().unwrap());
    let cases: Value = serde_json::from_slice(&fs::read(root.join("cases.json")).unwrap()).unwrap();
    let model = golden().join("models/llama");
    let weights = cases["weights"].as_object().unwrap();
    let terms: Vec<String> =
        weights.iter().map(|(name, weight)| format!("{}={weight}", text(&root.join(name)))).collect();
    for (name, case) in cases["cases"].as_object().unwrap() {
        let out = dir.path().join(name);
        let mut args =
            vec!["combine", "--out", text(&out), "--json", "--rule", case["rule"].as_str().unwrap()];
        args.extend(terms.iter().map(String::as_str));
        let numbers = [("svd_rank", "--rank"), ("density", "--density")];
        let given: Vec<(&str, String)> =
            numbers.iter().filter_map(|(key, flag)| Some((*flag, case.get(*key)?.to_string()))).collect();
        given.iter().for_each(|(flag, value)| args.extend([*flag, value.as_str()]));
        if let Some(sign) = case.get("majority_sign_method").and_then(Value::as_str) {
            args.extend(["--sign", sign]);
        }
        let said: Value = serde_json::from_str(&succeeds(&args)).unwrap();
        let exact = case["rule"] == "cat";
        assert!((said["error"].as_f64().unwrap() < 1e-5) == exact, "{name}: {said}");
        let (found, file) =
            (logits(&model, Some(&out), dir.path()), root.join(format!("{name}.safetensors")));
        let (expected, mask) = (tensor(&file, "logits"), tensor(&file, "mask"));
        let width = expected.len() / mask.len();
        let off = found.iter().zip(&expected).enumerate().filter(|(at, _)| mask[at / width] != 0.0);
        let off = off.fold(0.0, |most, (_, (a, b))| f64::max(most, f64::from((a - b).abs())));
        assert!(off < cases["tolerance"].as_f64().unwrap() * largest(&expected), "{name}: off by {off}");
    }
}

#[test]
fn what_cannot_be_combined_is_said() {
    let (root, dir) = (golden(), tempfile::tempdir().unwrap());
    let out = dir.path().join("out");
    let (a, ia3) = (root.join("combine/a"), root.join("cases/llama__ia3/adapter"));
    let combine = |args: &[&str]| refused(&[&["combine", "--out", text(&out)], args].concat());
    assert!(combine(&[text(&a), text(&ia3)]).contains("IA3"));
    assert!(combine(&[text(&a), "--rule", "ties"]).contains("--density"));
    assert!(combine(&[text(&a), "--rank", "3"]).contains("svd"));
    assert!(combine(&[text(&a), "--seed", "3"]).contains("dare_linear"));
    assert!(combine(&[text(&a), "--rule", "ties", "--density", "0.5", "--seed", "3"]).contains("--seed"));
    assert!(combine(&[text(&a), "--sign", "frequency"]).contains("ties"));
    assert!(combine(&[text(&a), "--rule", "sum"]).contains("expected one of cat"));
    assert!(combine(&[&format!("{}=x", text(&a))]).contains("found `x`"));
    let ia3_of_none = format!("{}=0", text(&ia3));
    assert!(combine(&[&ia3_of_none, "--rule", "average"]).contains("add up to zero"));
    assert!(combine(&[&format!("{}=1e-60", text(&a))]).contains("32 bits"));
    assert!(!out.exists());
    // Adapters that are no products can be averaged, where they are alike.
    succeeds(&["combine", text(&ia3), text(&ia3), "--rule", "average", "--out", text(&out)]);
    let same = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(same(&out) == same(&ia3));
}

/// How far logits are from a file's, as a share of the largest.
fn off(found: &[f32], file: &Path) -> f64 {
    let (expected, mask) = (tensor(file, "logits"), tensor(file, "mask"));
    let width = expected.len() / mask.len();
    let off = found.iter().zip(&expected).enumerate().filter(|(at, _)| mask[at / width] != 0.0);
    off.fold(0.0, |most, (_, (a, b))| f64::max(most, f64::from((a - b).abs()))) / largest(&expected)
}

#[test]
fn products_of_sums_are_those_of_the_transcription() {
    let (root, dir) = (golden(), tempfile::tempdir().unwrap());
    let (combine, compose, model) = (root.join("combine"), root.join("compose"), root.join("models/llama"));
    let cases: Value = serde_json::from_slice(&fs::read(compose.join("cases.json")).unwrap()).unwrap();
    for (name, weights) in cases["weights"].as_object().unwrap() {
        let out = dir.path().join(name);
        let weights = weights.as_object().unwrap();
        let terms: Vec<String> =
            weights.iter().map(|(term, weight)| format!("{}={weight}", text(&combine.join(term)))).collect();
        let terms: Vec<&str> = terms.iter().map(String::as_str).collect();
        succeeds(&[&["combine", "--rule", "lorahub", "--out", text(&out)], &terms[..]].concat());
        let found =
            off(&logits(&model, Some(&out), dir.path()), &compose.join(format!("{name}.safetensors")));
        assert!(found < cases["tolerance"].as_f64().unwrap(), "{name}: off by {found}");
    }
}

#[test]
fn a_search_finds_the_weight_of_the_adapter_that_knows_the_data() {
    let (root, dir) = (golden(), tempfile::tempdir().unwrap());
    let (a, b, model) = (root.join("combine/a"), root.join("combine/b"), root.join("models/llama"));
    let data = root.join("trajectories/llama__lora/batches.safetensors");
    let search = |out: &Path, more: &[&str]| {
        let args = [
            "combine",
            text(&a),
            text(&b),
            "--rule",
            "lorahub",
            "--model",
            text(&model),
            "--data",
            text(&data),
            "--format",
            "tensors",
            "--json",
            "--out",
            text(out),
        ];
        let said: Value = serde_json::from_str(&succeeds(&[&args[..], more].concat())).unwrap();
        (said["search"].clone(), fs::read(out.join("adapter_model.safetensors")).unwrap())
    };
    let (found, bytes) = search(&dir.path().join("one"), &["--evaluations", "60"]);
    let number = |key: &str| found[key].as_f64().unwrap();
    assert!(number("objective") < number("objective_of_base"), "{found}");
    let weights: Vec<f64> =
        found["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap()).collect();
    assert!(weights.len() == 2 && weights.iter().all(|w| w.abs() <= 1.5), "{found}");
    // The objective is what `eval` says of the result, and the penalty.
    let out = dir.path().join("one");
    let said: Value = serde_json::from_str(&succeeds(&[
        "eval",
        "--model",
        text(&model),
        "--adapter",
        text(&out),
        "--data",
        text(&data),
        "--format",
        "tensors",
        "--json",
    ]))
    .unwrap();
    let expected =
        said["metrics"]["loss"].as_f64().unwrap() + 0.05 * weights.iter().map(|w| w.abs()).sum::<f64>();
    assert!((number("objective") - expected).abs() < 1e-5 * expected, "{found} {expected}");
    assert!(
        search(&dir.path().join("two"), &["--evaluations", "60"]) == (found.clone(), bytes),
        "the seed decides"
    );
    assert!(search(&dir.path().join("three"), &["--seed", "5"]).0 != found);
    let out = dir.path().join("none");
    let refuse = |args: &[&str]| refused(&[&["combine", "--out", text(&out), text(&a)], args].concat());
    let given = ["--model", text(&model), "--data", text(&data)];
    assert!(
        refuse(&[&[&*format!("{}=2", text(&b)), "--rule", "lorahub"], &given[..]].concat())
            .contains("leave yours out")
    );
    assert!(refuse(&given).contains("belongs to the rule lorahub"));
    assert!(refuse(&[&["--rule", "lorahub", "--penalty=-1"], &given[..]].concat()).contains("--penalty"));
    assert!(!out.exists());
}

#[test]
fn bottlenecks_meet_before_they_are_averaged() {
    let (root, dir) = (golden(), tempfile::tempdir().unwrap());
    let first = root.join("cases/bert__seq_bn_gelu/adapter");
    let (moved, out) = (dir.path().join("moved"), dir.path().join("out"));
    // Under a name of its own, which the names of its tensors have in them.
    fs::create_dir(&moved).unwrap();
    let config = fs::read_to_string(first.join("adapter_config.json")).unwrap();
    let config = config.replace("\"name\": \"probe\"", "\"name\": \"other\"");
    fs::write(moved.join("adapter_config.json"), config).unwrap();
    let weights = Weights::open_file(&root.join("compose/moved.safetensors"), &Limits::default()).unwrap();
    let named: Vec<(String, Vec<usize>, Vec<f32>)> = weights
        .iter()
        .map(|(name, raw)| (name.replace(".probe.", ".other."), raw.shape.clone(), raw.to_f32().unwrap()))
        .collect();
    let entries: Vec<Entry> =
        named.iter().map(|(name, shape, values)| Entry::f32(name.clone(), shape, values)).collect();
    write_safetensors(&moved.join("adapter.safetensors"), &entries, &BTreeMap::new()).unwrap();
    let said =
        succeeds(&["combine", text(&first), text(&moved), "--rule", "mera", "--out", text(&out), "--json"]);
    assert!(said.contains("of 16 units were moved"), "{said}");
    let (found, expected) = (out.join("adapter_model.safetensors"), root.join("compose/mera.safetensors"));
    let names = Weights::open_file(&expected, &Limits::default()).unwrap();
    for (name, _) in names.iter() {
        let (a, b) = (tensor(&found, name), tensor(&expected, name));
        let off = a.iter().zip(&b).fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(a.len() == b.len() && off < 1e-6, "{name}: off by {off}");
    }
    // The plain mean of the same is another, and other adapters have no units.
    let plain = dir.path().join("plain");
    succeeds(&["combine", text(&first), text(&moved), "--rule", "average", "--out", text(&plain)]);
    let up = "bert.encoder.layer.0.output.adapters.probe.adapter_up.weight";
    assert!(tensor(&plain.join("adapter_model.safetensors"), up) != tensor(&expected, up));
    let (a, none) = (root.join("combine/a"), dir.path().join("none"));
    let said = refused(&["combine", text(&a), text(&a), "--rule", "mera", "--out", text(&none)]);
    assert!(said.contains("rule average"), "{said}");
    // What was made is an adapter like others.
    let inputs = root.join("inputs/bert/inputs.safetensors");
    let logits = dir.path().join("l.safetensors");
    succeeds(&[
        "logits",
        "--model",
        text(&root.join("models/bert")),
        "--adapter",
        text(&out),
        "--inputs",
        text(&inputs),
        "--out",
        text(&logits),
    ]);
}

/// A copy of an adapter whose configuration `change` has changed.
fn changed(of: &Path, to: &Path, change: impl Fn(&mut Value)) -> String {
    fs::create_dir_all(to).unwrap();
    fs::copy(of.join("adapter_model.safetensors"), to.join("adapter_model.safetensors")).unwrap();
    let mut config: Value =
        serde_json::from_slice(&fs::read(of.join("adapter_config.json")).unwrap()).unwrap();
    change(&mut config);
    fs::write(to.join("adapter_config.json"), config.to_string()).unwrap();
    text(to).to_owned()
}

#[test]
fn adapters_that_do_not_belong_together_are_refused() {
    let (a, dir) = (golden().join("combine/a"), tempfile::tempdir().unwrap());
    let out = dir.path().join("out");
    let with = |name: &str, change: &dyn Fn(&mut Value)| changed(&a, &dir.path().join(name), change);
    let combine = |other: &str| refused(&["combine", "--out", text(&out), text(&a), other]);
    let other = with("base", &|c| c["base_model_name_or_path"] = "hub/another-7b".into());
    let said = combine(&other);
    assert!(
        said.contains("hub/another-7b") && said.contains("models/llama") && said.contains("--any-base"),
        "{said}"
    );
    succeeds(&["combine", "--out", text(&out), "--any-base", text(&a), &other]);
    fs::remove_dir_all(&out).unwrap();
    let moved = with("moved", &|c| c["base_model_name_or_path"] = "/elsewhere/Llama/".into());
    succeeds(&["combine", "--out", text(&out), text(&a), &moved]);
    fs::remove_dir_all(&out).unwrap();
    let said = combine(&with("rank", &|c| c["r"] = 8.into()));
    assert!(said.contains("has rank 4") && said.contains("says 8"), "{said}");
    assert!(combine(&with("zero", &|c| c["r"] = 0.into())).contains("found 0"));
    assert!(
        combine(&with("few", &|c| c["target_modules"] = serde_json::json!(["q_proj"])))
            .contains("does not name")
    );
    assert!(
        combine(&with("none", &|c| c["target_modules"] = serde_json::json!(["x"]))).contains("names none")
    );
    assert!(combine(&with("odd", &|c| c["target_modules"] = "(".into())).contains("not a valid pattern"));
    assert!(combine(&with("alpha", &|c| c["lora_alpha"] = "8".into())).contains("expected a number"));
    assert!(
        combine(&with("ranks", &|c| c["rank_pattern"] = serde_json::json!({ "(": 4 })))
            .contains("not a valid pattern")
    );
    let kasa = serde_json::json!({ "beta": 0.1, "gamma": 0.1 });
    assert!(combine(&with("kasa", &|c| c["kasa_config"] = kasa.clone())).contains("KaSA"));
    assert!(!out.exists());
}

#[test]
fn directories_above_the_result_are_made_and_none_is_where_it_cannot_be() {
    let (root, dir) = (golden(), tempfile::tempdir().unwrap());
    let (a, deep) = (root.join("combine/a"), dir.path().join("new/deep/out"));
    succeeds(&["combine", "--out", text(&deep), text(&a), text(&a)]);
    assert!(deep.join("adapter_config.json").is_file());
    fs::write(dir.path().join("file"), "").unwrap();
    let beneath = dir.path().join("file/out");
    assert!(
        refused(&["combine", "--out", text(&beneath), text(&a)]).contains("expected a directory to write to")
    );
    assert!(refused(&["combine", "--out", "/proc/engraft/out", text(&a)]).contains("cannot write to /proc"));
}

/// A copy of the model of the tests, one of whose numbers is no number.
fn broken(dir: &Path, tensor: &str, value: f32) -> PathBuf {
    let (model, to) = (golden().join("models/llama"), dir.join(tensor));
    fs::create_dir_all(&to).unwrap();
    for entry in fs::read_dir(&model).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    let file = to.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let weights = Weights::open_file(&file, &Limits::default()).unwrap();
    let raw = weights.get(tensor).unwrap().bytes().to_vec();
    let at = bytes.windows(raw.len()).position(|window| window == raw).unwrap();
    bytes[at..at + 16].copy_from_slice(&[value; 4].map(f32::to_le_bytes).concat());
    drop(weights);
    fs::write(&file, bytes).unwrap();
    to
}

#[test]
fn weights_beyond_32_bits_and_units_that_are_none_are_refused() {
    let (cases, dir) = (golden().join("cases"), tempfile::tempdir().unwrap());
    let (lora, out) = (cases.join("llama__lora/adapter"), dir.path().join("out"));
    let huge = format!("{}=1e39", text(&lora));
    let error = refused(&["combine", &huge, text(&lora), "--out", text(&out)]);
    assert!(error.contains("the weight 1e39 is out of the range of 32 bits"), "{error}");
    let compacter = golden().join("trajectories/bert__compacter/init_adapter");
    let (a, rule) = (text(&compacter), "--rule");
    let error = refused(&["combine", a, a, rule, "mera", "--out", text(&out)]);
    assert!(error.contains("MerA brings the units of bottleneck adapters together"), "{error}");
    assert!(!out.exists());
}

#[test]
fn numbers_that_are_none_are_bad_input() {
    let (root, dir) = (golden(), tempfile::tempdir().unwrap());
    let (model, out) = (root.join("models/llama"), dir.path().join("out"));
    let huge = broken(dir.path(), "model.norm.weight", 3e38);
    let broken = broken(dir.path(), "model.layers.0.self_attn.q_proj.weight", f32::NAN);
    for (before, after) in [(&model, &broken), (&broken, &model)] {
        let said =
            refused(&["extract", "--model", text(before), "--tuned", text(after), "--out", text(&out)]);
        assert!(said.contains("self_attn.q_proj: expected finite numbers, found NaN"), "{said}");
        assert!(said.contains(text(&broken)), "{said}");
    }
    let a = root.join("combine/a");
    let said = refused(&["merge", "--model", text(&broken), "--adapter", text(&a), "--out", text(&out)]);
    assert!(said.contains("is NaN"), "{said}");
    assert!(!out.exists());
    // Weights of which every one is a number, and logits that are none.
    let args = ["merge", "--model", text(&huge), "--adapter", text(&a), "--out", text(&out)];
    let done = engraft(&args);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(
        said.contains("are not finite; those of the base with the adapter beside it are not either"),
        "{said}"
    );
}

#[test]
fn a_rank_beyond_the_weights_is_said_as_what_it_became() {
    let (root, dir) = (golden(), tempfile::tempdir().unwrap());
    let (model, tuned, out) = (root.join("models/llama"), dir.path().join("tuned"), dir.path().join("out"));
    let a = root.join("combine/a");
    succeeds(&["merge", "--model", text(&model), "--adapter", text(&a), "--out", text(&tuned)]);
    let args = [
        "extract",
        "--model",
        text(&model),
        "--tuned",
        text(&tuned),
        "--out",
        text(&out),
        "--rank",
        "1000",
        "--json",
    ];
    let said: Value = serde_json::from_str(&succeeds(&args)).unwrap();
    let rank = said["rank"].as_u64().unwrap();
    assert!(rank < 1000 && said["form"].as_str().unwrap().contains("of 1000"), "{said}");
    let config: Value = serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["r"], rank);
}

#[test]
fn a_tuned_model_is_its_base_with_what_was_extracted() {
    let (root, dir) = (golden(), tempfile::tempdir().unwrap());
    let (model, tuned) = (root.join("models/llama"), dir.path().join("tuned"));
    succeeds(&[
        "merge",
        "--model",
        text(&model),
        "--adapter",
        text(&root.join("combine/a")),
        "--out",
        text(&tuned),
    ]);
    let expected = logits(&tuned, None, dir.path());
    for (rank, near) in [("4", true), ("1", false)] {
        let out = dir.path().join(rank);
        let args = [
            "extract",
            "--model",
            text(&model),
            "--tuned",
            text(&tuned),
            "--out",
            text(&out),
            "--rank",
            rank,
            "--json",
        ];
        let said: Value = serde_json::from_str(&succeeds(&args)).unwrap();
        assert!((said["error"].as_f64().unwrap() < 1e-4) == near, "{said}");
        let found = logits(&model, Some(&out), dir.path());
        let off =
            found.iter().zip(&expected).fold(0.0, |most, (a, b)| f64::max(most, f64::from((a - b).abs())));
        assert!((off < 2e-4 * largest(&expected)) == near, "rank {rank}: off by {off}");
        assert!(
            (said["largest_logit_change"].as_f64().unwrap() < 2e-4 * largest(&expected)) == near,
            "{said}"
        );
    }
    // All entries are the whole change; a few are near it.
    for (density, near) in [("1", true), ("0.1", false)] {
        let out = dir.path().join(format!("share {density}"));
        let args = [
            "extract",
            "--model",
            text(&model),
            "--tuned",
            text(&tuned),
            "--out",
            text(&out),
            "--density",
            density,
        ];
        let said = succeeds(&args);
        let found = logits(&model, Some(&out), dir.path());
        let off =
            found.iter().zip(&expected).fold(0.0, |most, (a, b)| f64::max(most, f64::from((a - b).abs())));
        assert!((off < 2e-4 * largest(&expected)) == near, "density {density}: off by {off}\n{said}");
        assert!(
            text(&out.join("adapter_config.json")).len() > 1 && said.contains(" entries, leaves out"),
            "{said}"
        );
    }
    assert!(
        refused(&[
            "extract",
            "--model",
            text(&model),
            "--tuned",
            text(&tuned),
            "--out",
            "x",
            "--density",
            "2"
        ])
        .contains("share")
    );
    let out = dir.path().join("none");
    let error = refused(&["extract", "--model", text(&model), "--tuned", text(&model), "--out", text(&out)]);
    assert!(error.contains("nothing to extract"), "{error}");
}

#[test]
fn names_of_classes_go_along_and_must_be_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = |name: &str, labels: &str| {
        let to = dir.path().join(name);
        fs::create_dir(&to).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(golden().join("combine/a").join(file), to.join(file)).unwrap();
        }
        fs::write(to.join("label_names.json"), labels).unwrap();
        to
    };
    let (a, b, c) = (
        adapter("a", "[\"no\", \"yes\"]"),
        adapter("b", "[\"no\", \"yes\"]"),
        adapter("c", "[\"yes\", \"no\"]"),
    );
    let out = dir.path().join("out");
    let error = refused(&["combine", text(&a), text(&c), "--rule", "average", "--out", text(&out)]);
    assert!(error.contains("tell other classes apart") && !out.exists(), "{error}");
    succeeds(&["combine", text(&a), text(&b), "--rule", "average", "--out", text(&out)]);
    let names: Vec<String> =
        serde_json::from_slice(&fs::read(out.join("label_names.json")).unwrap()).unwrap();
    assert_eq!(names, ["no", "yes"]);
}
