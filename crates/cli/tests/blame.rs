//! Recipes and arguments that cannot be meant so: told before any work, with what is nearest.

#[path = "common/offline.rs"]
mod offline;

use std::fs;
use std::path::{Path, PathBuf};

use offline::engraft;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(path).canonicalize().unwrap()
}

/// What is said of a command that ends before any work.
fn refused(dir: &Path, args: &[&str]) -> String {
    let output = engraft(dir, args);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    text
}

/// What is said of a recipe whose method is `method`, on the batches of a trajectory; nothing may be written.
fn said(method: &str, trajectory: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let model = trajectory.split("__").next().unwrap();
    let recipe = format!(
        "model = {:?}\n[method]\n{method}\n[data]\nformat = \"tensors\"\npath = {:?}\n[train]\nsteps = 4\nbatch_size = 2\n",
        golden(&format!("models/{model}")),
        golden(&format!("trajectories/{trajectory}/batches.safetensors")),
    );
    fs::write(dir.path().join("r.toml"), recipe).unwrap();
    let said = refused(dir.path(), &["train", "r.toml", "--out", "run"]);
    assert!(!dir.path().join("run").exists(), "{said}");
    said
}

#[test]
fn targets_that_match_nothing_name_the_nearest() {
    let of = |method: &str| said(&format!("name = \"lora\"\n{method}"), "llama__lora");
    for (method, expected) in [
        ("targets = [\"q_porj\"]", "did you mean `q_proj`?"),
        ("targets = [\"q_porj\", \"v_proj\"]", "did you mean `q_proj`?"),
        (
            "targets = [\"self_atn.q_proj\", \"v_prj\"]",
            "did you mean `self_attn.q_proj` for `self_atn.q_proj`, `v_proj` for `v_prj`?",
        ),
        (
            "targets = [\"q_proj\", \"k_prj\", \"gate\"]",
            "did you mean `k_proj` for `k_prj`, `gate_proj` for `gate`?",
        ),
        ("targets = [\"query\"]", "or `roles = [\"q\", \"v\"]` for any model"),
        ("roles = [\"cross_q\"]", "did you mean `cross.q`?"),
        ("roles = [\"qq\"]", "roles are q, k"),
    ] {
        let text = of(method);
        assert!(text.contains(expected) && text.contains("r.toml:4"), "{method}: {text}");
    }
    let norms = said("name = \"ln_tuning\"\ntargets = [\"post_attention_layernom\"]", "llama__lora");
    assert!(norms.contains("norms") && norms.contains("did you mean `post_attention_layernorm`?"), "{norms}");
    let partly = said("name = \"ln_tuning\"\ntargets = [\"norm\", \"input_layernrom\"]", "llama__lora");
    assert!(
        partly.contains("0 of 7 norms") && partly.contains("did you mean `input_layernorm`?"),
        "{partly}"
    );
    let wrong = said("name = \"ln_tuning\"\ntargets = [\"query\"]", "llama__lora");
    assert!(wrong.contains("role norm is `input_layernorm` (3)") && !wrong.contains("linear"), "{wrong}");
}

#[test]
fn what_narrows_targets_and_means_nothing_is_told_at_its_place() {
    let of =
        |method: &str| said(&format!("name = \"lora\"\ntargets = [\"q_proj\"]\n{method}"), "llama__lora");
    for (method, expected) in [
        ("layers = [99]", &["names 99, where no target lies", "layers 0 to 2"][..]),
        ("layers = [0, 3]", &["names 3, where", "r.toml:5:14"]),
        ("layers = [0]\nlayers_pattern = \"blocks\"", &["`blocks`, which is no list of layers", "`layers`"]),
        ("exclude = [\"dropped\"]", &["`dropped`, which", "leaves nothing out", "r.toml:5:12"]),
        ("exclude = [\"k_porj\"]", &["did you mean `k_proj`?"]),
        ("exclude = [\"q_proj\"]", &["`exclude` leaves none of the 3 targets"]),
    ] {
        let text = of(method);
        for words in expected {
            assert!(text.contains(words), "{method}: {text}");
        }
    }
    let two = |more: &str| {
        let method =
            format!("name = \"lora\"\ntargets = [\"layers.0.self_attn.q_proj\", \"v_proj\"]\n{more}");
        said(&method, "llama__lora")
    };
    let text = two("layers = [1]");
    assert!(text.contains("`layers.0.self_attn.q_proj` is no target any more: `layers`"), "{text}");
    let text = two("exclude = [\"v_proj\"]");
    assert!(
        text.contains("`v_proj` is no target any more: `exclude`") && text.contains("r.toml:4:41"),
        "{text}"
    );
    // What the model has may be left out, be it no target.
    let text = of("exclude = [\"lm_head\", \"norm\"]\ntrain_also = [\"nope\"]");
    assert!(text.contains("`train_also` names `nope`") && !text.contains("exclude`"), "{text}");
}

#[test]
fn a_run_that_the_settings_do_not_fit_does_not_begin() {
    for (method, trajectory, expected) in [
        ("name = \"adalora\"\ntfinal = 90", "llama__lora", "leave no step of 4 to cut ranks in"),
        ("name = \"gps\"", "llama__lora", "set `loss = \"task\"`"),
        ("name = \"hyperformer\"\ntasks = 1", "bert__hyperformer", "set `tasks = "),
        ("name = \"mpt\"\ntasks = 1", "bert__mpt", "set `tasks = "),
        ("name = \"mpt\"\ntasks = 3", "llama__lora", "the data name none"),
        ("name = \"fish\"\ndensity = 1e-12", "llama__lora", "is none of them"),
        ("name = \"rosa\"\nwarmup = 20", "llama__lora", "`warmup`: 20 steps"),
        ("name = \"prompt\"\nlayers = [0]", "llama__lora", "`layers` says nothing to Prompt tuning"),
        ("name = \"prefix\"\nlayers = [0, 3]", "llama__lora", "names 3, and the model's layers are 0 to 2"),
        ("name = \"apt\"\nlayers = [0]\nlayers_pattern = \"h\"", "llama__lora", "`layers_pattern"),
        ("name = \"reft\"\nlayers = [0]", "bert__lora", "a setting of its own for layers: `blocks`"),
        ("name = \"mam\"\nlayers = [0]", "t5__lora", "needs a model of one stack"),
        ("name = \"prefix\"\nprojection = 1048576", "llama__lora", "must be at most 16384"),
        ("name = \"propetl\"\ntasks = 65536", "llama__lora", "must be at most 1024"),
        (
            "name = \"prompt\"\ninit = \"random\"\ninit_ids = [3]",
            "llama__lora",
            "`init` says that rows start as noise",
        ),
        (
            "name = \"prompt\"\ntokens = 60",
            "llama__lora",
            "the prompt 60 rows, and the model has 64 positions",
        ),
        ("name = \"bottleneck\"\ntargets = [\"q_proj\"]", "llama__lora", "`targets` says nothing"),
        ("name = \"s4\"\nbudget = 1e-9", "llama__lora", "less than one trained number"),
    ] {
        let text = said(method, trajectory);
        assert!(text.contains(expected) && text.contains("r.toml:"), "{method}: {text}");
    }
}

#[test]
fn arguments_name_the_nearest_and_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let text = refused(dir.path(), &["methods", "lorra"]);
    assert!(text.contains("did you mean `lora`?"), "{text}");
    let pickle = dir.path().join("lora.pt");
    fs::write(&pickle, [&b"PK\x03\x04\0\0\x08\x08"[..], &[0; 64]].concat()).unwrap();
    let model = golden("models/llama");
    let args = ["convert", "lora.pt", "--model", model.to_str().unwrap(), "--out", "a"];
    let text = refused(dir.path(), &args);
    assert!(text.contains("a pickle") && text.contains("'lora.safetensors'"), "{text}");
    for (name, expected) in [
        ("magnitude", "`name = \"supertuning\"` for the entries of largest magnitude, and `name = \"pafi\"`"),
        ("cross_attention", "`name = \"full\"` with `roles = [\"cross.q\","),
    ] {
        let text = refused(dir.path(), &["methods", name]);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_directory_of_tensors_alone_is_told_with_its_files() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("files")).unwrap();
    let text = refused(dir.path(), &["inspect", "files"]);
    assert!(text.contains("expected a model") && !text.contains("tensors"), "{text}");
    for name in ["b.safetensors", "a.safetensors"] {
        fs::copy(golden("models/vit/model.safetensors"), dir.path().join("files").join(name)).unwrap();
    }
    let text = refused(dir.path(), &["inspect", "files"]);
    assert!(text.contains("`engraft inspect files/a.safetensors`, `engraft inspect files/b.s"), "{text}");
    assert!(engraft(dir.path(), &["inspect", "files/a.safetensors"]).status.success());
}

#[test]
fn sizes_that_the_model_cannot_have_are_told_at_their_key() {
    for (method, key) in [
        ("trainable_tokens\"\ntoken_indices = [3, 9999]", "token_indices"),
        ("boft\"\nblock_size = 7", "block_size"),
        ("c3a\"\nblock_size = 7", "block_size"),
        ("vblora\"\nvector_length = 7", "vector_length"),
        ("psoft\"\nrank = 500", "rank"),
        ("road\"\ngroup_size = 10", "group_size"),
        ("fourierft\"\nn_frequency = 99999", "n_frequency"),
        ("miss\"\nrank = 99", "rank"),
        ("miss\"\nrank = 7\nform = \"bat\"", "rank"),
        ("miss\"\nmini_r = 7\nform = \"mini\"\nrank = 4", "mini_r"),
        ("osf\"\neffective_rank = 48", "effective_rank"),
    ] {
        let text = said(&format!("name = \"{method}"), "llama__lora");
        let line = method.lines().nth(1).unwrap();
        let shown = text.contains("r.toml:4:") && text.contains(&format!("`{key}`")) && text.contains(line);
        assert!(shown, "{text}");
    }
}

#[test]
fn texts_to_compare_on_are_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("texts.txt"), "Once upon a time\n").unwrap();
    let (model, adapter) = (golden("models/llama"), golden("cases/llama__lora/adapter"));
    let [model, adapter] = [&model, &adapter].map(|path| path.to_str().unwrap());
    let vit = golden("models/vit");
    let of_vit = golden("cases/vit__lora/adapter");
    let commands = [
        vec!["merge", "--model", model, "--adapter", adapter, "--out", "o"],
        vec!["combine", adapter, adapter, "--model", model, "--out", "o"],
        vec!["extract", "--model", model, "--tuned", model, "--out", "o"],
        vec!["merge", "--model", vit.to_str().unwrap(), "--adapter", of_vit.to_str().unwrap(), "--out", "o"],
    ];
    for command in &commands {
        for (file, expected) in [("absent.txt", "absent.txt"), ("texts.txt", "no tokenizer.json")] {
            let text = refused(dir.path(), &[&command[..], &["--probe", file]].concat());
            assert!(text.contains(expected), "{command:?}: {text}");
            assert!(!dir.path().join("o").exists(), "{command:?}");
        }
    }
    let merged = engraft(dir.path(), &commands[0]);
    let [said, noted] = [merged.stdout, merged.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(merged.status.success() && !said.contains("perplexity"), "{said}{noted}");
    assert_eq!(noted.matches("has no tokenizer.json: compared on random ids").count(), 1, "{noted}");
}

#[test]
fn sizes_that_are_moved_or_idle_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let notes = |method: &str| {
        let recipe = format!(
            "model = {:?}\n[method]\n{method}\n[data]\nformat = \"tensors\"\npath = {:?}\n[train]\nsteps = 1\nbatch_size = 2\n",
            golden("models/llama"),
            golden("trajectories/llama__lora/batches.safetensors"),
        );
        fs::write(dir.path().join("r.toml"), recipe).unwrap();
        let output = engraft(dir.path(), &["train", "r.toml", "--out", "run"]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{text}");
        fs::remove_dir_all(dir.path().join("run")).unwrap();
        text
    };
    let text = notes("name = \"oft\"\nblock_size = 7");
    assert!(text.contains("`block_size` is 7, which does not divide"), "{text}");
    let text = notes("name = \"hra\"\nrank = 50");
    assert!(text.contains("reflections make every rotation"), "{text}");
    for (method, expected) in [
        (
            "lora\"\nrank = 50",
            "`rank` is 50, more than the 48 that model.layers.0.self_attn.q_proj, [48, 48], can have",
        ),
        ("loha\"\nrank = 50", "`rank` is 50, more than the"),
        ("deft\"\nrank = 50", "it is cut to that there"),
        ("oft\"\nblock_size = 50", "blocks there have the nearest size, 48"),
        ("gps\"\nloss = \"task\"\ninputs = 99", "every one is trained there"),
        ("lisa\"\nactive_blocks = 9", "`active_blocks` is 9, and the model has 3"),
    ] {
        let text = notes(&format!("name = \"{method}"));
        assert!(text.contains(expected), "{text}");
        let plan = engraft(dir.path(), &["plan", "r.toml", "--no-trial"]);
        assert!(String::from_utf8_lossy(&plan.stderr).contains(expected), "plan: {method}");
    }
}
