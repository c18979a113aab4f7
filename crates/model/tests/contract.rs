//! One trivial patch of each kind on each model: its effect by hand or from outside, mates in a batch, gradients,
//! checkpointing.

mod common;
#[path = "common/patches.rs"]
mod patches;

use std::sync::Arc;

use common::*;
use engraft_nn::{Adapter, Base, Inputs, Kind, Layout, Model, Pass, Route, Stack, Task, Value};
use engraft_tensor::testing::sample;
use engraft_tensor::{Gradients, Tensor, no_grad};
use patches::*;

const MODELS: &[&str] = &[
    "llama",
    "llama_bias",
    "llama_tied",
    "mistral",
    "qwen2_sliding",
    "qwen3",
    "gpt2",
    "gpt2_cls",
    "gpt2_token",
    "t5",
    "t5_flan",
    "t5_encoder",
    "bert",
    "bert_token",
    "bert_mlm",
    "bert_encoder",
    "roberta",
    "roberta_token",
    "roberta_mlm",
    "vit",
    "vit_grey",
    "vit_oblong",
    "deit",
    "deit_teacher",
    "dinov2",
    "dinov2_swiglu",
    "post_vit",
    "post_vit_grey",
];

/// Every kind of site that a model has.
fn each(mut check: impl FnMut(&str, &dyn Model, &dyn Fn(u64, usize) -> Arc<Adapter>)) {
    let mut count = 0;
    for name in MODELS {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        for &(kind, choose, gated) in KINDS.iter().filter(|k| model.sites().iter().any(k.1)) {
            // One linear or vector at a time: those of a kind need not agree in shape.
            let first = model.sites().iter().find(|s| choose(s)).map(|s| s.id);
            let chosen = |s: &engraft_nn::Site| match s.kind {
                Kind::KeyValue { .. } => choose(s),
                _ => Some(s.id) == first,
            };
            check(&format!("{name}, {kind}"), model, &|seed, rows| probe(model, seed, rows, gated, chosen));
            count += 1;
        }
    }
    assert!(count > 220, "{count}");
}

/// Those of three sequences that `which` names, or as many pictures.
fn some(model: &dyn Model, which: std::ops::Range<usize>) -> Inputs {
    if let Some(p) = model.info().picture {
        let all = sample(&[3, p.channels, p.height, p.width], 11);
        return Inputs::pixels(all.rows_between(which.start, which.end).unwrap()).unwrap();
    }
    // Ids that every model has.
    let rows = [&[5i64, 9, 17, 33, 60, 8][..], &[12, 4, 71, 6], &[30, 31, 8, 21, 50]];
    let source = batch(&rows[which.clone()]);
    if model.info().task != Task::Seq2Seq {
        return source;
    }
    let targets = [&[7i64, 41, 3][..], &[66, 20, 9, 52, 14], &[8]];
    let target = batch(&targets[which]);
    source.with_target(target.ids().unwrap().clone(), target.layout)
}

fn three(model: &dyn Model) -> Inputs {
    some(model, 0..3)
}

fn forward(model: &dyn Model, inputs: &Inputs, cx: &Pass) -> Tensor {
    model.forward(inputs, cx).unwrap()
}

#[test]
fn every_patch_acts_on_its_own_route_only() {
    each(|what, model, make| {
        let adapters = [Some(make(1, 2)), Some(make(2, 3)), None];
        let route =
            |(i, a): (usize, &Option<Arc<Adapter>>)| Route { sequences: i..i + 1, adapter: a.clone() };
        let inputs = three(model);
        let routes = adapters.iter().enumerate().map(route).collect();
        let cx = Pass::with_routes(inputs.layout.clone(), routes).unwrap();
        let together = no_grad(|| forward(model, &inputs, &cx)).to_vec().unwrap();
        let alone = |i: usize| run(model, &some(model, i..i + 1), adapters[i].clone());
        let alone: Vec<Vec<f32>> = (0..3).map(alone).collect();
        // Rounding may differ with the number of rows; another route's influence would not be that small.
        let apart = distance(&together, &alone.concat());
        assert!(apart < 2e-6, "{what}: {apart:e}");
        for (i, solo) in alone.iter().enumerate() {
            let changed = distance(solo, &run(model, &some(model, i..i + 1), None));
            assert!(if i == 2 { changed == 0.0 } else { changed > 1e-4 }, "{what}, route {i}: {changed:e}");
        }
    });
}

/// The sum of logits times fixed numbers, on the tape.
fn loss(model: &dyn Model, inputs: &Inputs, cx: &Pass) -> Tensor {
    let logits = forward(model, inputs, cx);
    logits.mul(&sample(logits.shape(), 7)).unwrap().sum().unwrap()
}

#[test]
fn gradients_reach_every_patch_and_equal_differences() {
    each(|what, model, make| {
        let (inputs, adapter) = (three(model), make(3, 2));
        let param = param(&adapter).clone();
        let cx = Pass::new(inputs.layout.clone(), Some(adapter));
        let gradients = loss(model, &inputs, &cx).backward().unwrap();
        let gradient =
            gradients.get(&param).unwrap_or_else(|| panic!("{what}: no gradient")).to_vec().unwrap();
        let start = param.value();
        let values = start.to_vec().unwrap();
        let at = |i: usize, delta: f32| -> f64 {
            let mut moved = values.clone();
            moved[i] += delta;
            param.set(Tensor::from_vec(moved, start.shape()).unwrap()).unwrap();
            let logits = no_grad(|| forward(model, &inputs, &cx));
            let (a, w) = (logits.to_vec().unwrap(), sample(logits.shape(), 7).to_vec().unwrap());
            a.iter().zip(w).map(|(&a, w)| f64::from(a) * f64::from(w)).sum()
        };
        let largest = gradient.iter().fold(0.3f32, |m, g| m.max(g.abs())) as f64;
        // The coordinates with the largest gradients, and some others.
        let mut order: Vec<usize> = (0..gradient.len()).collect();
        order.sort_by(|&a, &b| gradient[b].abs().total_cmp(&gradient[a].abs()));
        for &i in order.iter().take(2).chain([&0, &(gradient.len() / 2)]) {
            let h = 4e-3f32;
            let (a, b) = (at(i, h) - at(i, -h), at(i, 2.0 * h) - at(i, -2.0 * h));
            let expected = (8.0 * a - b) / (12.0 * f64::from(h));
            let found = f64::from(gradient[i]);
            assert!(
                (found - expected).abs() < 1e-2 * largest,
                "{what}, element {i}: {found} against {expected}"
            );
        }
        param.set(start).unwrap();
    });
}

#[test]
fn checkpointing_changes_no_bit() {
    each(|what, model, make| {
        let (inputs, adapter) = (three(model), make(4, 2));
        let param = param(&adapter).clone();
        let go = |on: bool| -> (f32, Vec<f32>) {
            let cx = Pass::new(inputs.layout.clone(), Some(adapter.clone())).checkpointing(on);
            let loss = loss(model, &inputs, &cx);
            let gradients: Gradients = loss.backward().unwrap();
            (loss.item().unwrap(), gradients.get(&param).unwrap().to_vec().unwrap())
        };
        let (plain, kept) = (go(false), go(true));
        assert_eq!(plain.0.to_bits(), kept.0.to_bits(), "{what}");
        assert!(plain.1 == kept.1, "{what}: gradients differ");
    });
}

/// Features of real rows without an adapter, and their pass.
fn features(model: &dyn Model, inputs: &Inputs, adapter: Option<Arc<Adapter>>) -> (Tensor, Pass) {
    let cx = Pass::new(inputs.layout.clone(), adapter);
    let out = no_grad(|| model.features(inputs, &cx)).unwrap();
    (out.features, out.pass)
}

#[test]
fn head_patches_by_hand() {
    for name in ["llama", "llama_tied", "bert", "bert_token", "vit", "dinov2"] {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        let inputs = three(model);
        let plain = run(model, &inputs, None);
        let shape = [plain.len() / model.info().outputs, model.info().outputs];
        let plain = Tensor::from_vec(plain, shape).unwrap();
        let (x, _) = features(model, &inputs, None);
        let is_matrix = |s: &engraft_nn::Site| s.role.name() == "head" && s.is_weight();
        let adapter = probe(model, 5, 1, false, is_matrix);
        let by_hand = plain.add(&x.matmul_t(&param(&adapter).value()).unwrap()).unwrap().to_vec().unwrap();
        assert!(distance(&run(model, &inputs, Some(adapter)), &by_hand) < 1e-5, "{name}, matrix");
        let adapter = probe(model, 5, 1, false, |s| matches!(s.kind, Kind::Head { .. }));
        let by_hand = plain.add(&param(&adapter).value()).unwrap().to_vec().unwrap();
        assert!(distance(&run(model, &inputs, Some(adapter)), &by_hand) < 1e-6, "{name}, head");
    }
}

/// The value of the vector site `path`.
fn vector(model: &dyn Model, path: &str) -> Vec<f32> {
    match &model.sites().iter().find(|s| s.path == path).unwrap().value {
        Value::Vector(v) => v.to_vec().unwrap(),
        _ => panic!("{path} is no vector"),
    }
}

/// norm(x) row by row, in f64.
fn norm(x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f64) -> Vec<f32> {
    let width = gain.len();
    let row = |row: &[f32]| -> Vec<f32> {
        let row: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
        let mean = if bias.is_some() { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
        let square = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
        let scaled = |i: usize| (row[i] - mean) / (square + eps).sqrt() * f64::from(gain[i]);
        (0..width).map(|i| (scaled(i) + bias.map_or(0.0, |b| f64::from(b[i]))) as f32).collect()
    };
    x.chunks(width).flat_map(row).collect()
}

#[test]
fn sublayer_block_and_vector_patches_by_hand() {
    for (name, last, bert) in [("llama", 2, false), ("qwen3", 1, false), ("bert_token", 1, true)] {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        let inputs = three(model);
        let eps = loaded.config[if bert { "layer_norm_eps" } else { "rms_norm_eps" }].as_f64().unwrap();
        let path =
            if bert { format!("bert.encoder.layer.{last}.output.LayerNorm") } else { "model.norm".into() };
        let gain = vector(model, &format!("{path}.weight"));
        let bias = bert.then(|| vector(model, &format!("{path}.bias")));
        let at = |role: &'static str| {
            move |s: &engraft_nn::Site| {
                s.role.name() == role && s.layer == Some(last) && !matches!(s.kind, Kind::KeyValue { .. })
            }
        };
        let adapter = probe(model, 6, 1, false, at("mlp"));
        let (found, cx) = features(model, &inputs, Some(adapter.clone()));
        let (residual, output) = (cx.find("residual").unwrap(), cx.find("output").unwrap());
        let sum = residual.add(&output).unwrap().add(&param(&adapter).value()).unwrap().to_vec().unwrap();
        let by_hand = norm(&sum, &gain, bias.as_deref(), eps);
        assert!(distance(&found.to_vec().unwrap(), &by_hand) < 1e-5, "{name}, sublayer");

        let adapter = probe(model, 6, 1, false, at("block"));
        let (found, cx) = features(model, &inputs, Some(adapter.clone()));
        let sum = cx.find("block").unwrap().add(&param(&adapter).value()).unwrap().to_vec().unwrap();
        let by_hand = if bert { sum } else { norm(&sum, &gain, None, eps) };
        assert!(distance(&found.to_vec().unwrap(), &by_hand) < 1e-5, "{name}, block");

        // A gain multiplies: features grow by (g + p)/g, before the bias.
        let adapter = probe(model, 6, 1, false, |s| s.path == format!("{path}.weight"));
        let (found, plain) =
            (features(model, &inputs, Some(adapter.clone())).0, features(model, &inputs, None).0);
        let p = param(&adapter).value().to_vec().unwrap();
        let grown = |(i, x): (usize, f32)| {
            let (i, b) = (i % gain.len(), bias.as_ref().map_or(0.0, |b| b[i % gain.len()]));
            (x - b) * (gain[i] + p[i]) / gain[i] + b
        };
        let by_hand: Vec<f32> = plain.to_vec().unwrap().into_iter().enumerate().map(grown).collect();
        assert!(distance(&found.to_vec().unwrap(), &by_hand) < 1e-5, "{name}, gain");
    }
}

#[test]
fn a_gated_row_adds_its_value_through_the_output_projection() {
    for name in ["llama", "llama_mha", "bert_token", "vit"] {
        let loaded = model(&golden().join("models").join(name));
        let (model, info) = (loaded.model.as_ref(), loaded.model.info());
        let inputs = three(model);
        let adapter =
            probe(model, 8, 1, true, |s| matches!(s.kind, Kind::KeyValue { .. }) && s.layer == Some(0));
        let gate = engraft_nn::Init::Normal(1.0).tensor(&[info.heads], 8, "gate").unwrap().to_vec().unwrap();
        let row = param(&adapter).value().to_vec().unwrap();
        let values = &row[info.kv_heads * info.head_dim..];
        // A softmax over one key is 1: head h gets gate[h]·v of its key head.
        let y = |i: usize| {
            gate[i / info.head_dim]
                * values[i / info.head_dim * info.kv_heads / info.heads * info.head_dim + i % info.head_dim]
        };
        let added = Tensor::from_vec(
            (0..info.heads * info.head_dim).map(y).collect(),
            [1, info.heads * info.head_dim],
        )
        .unwrap();
        let o = model.sites().iter().find(|s| s.role.name() == "o" && s.layer == Some(0)).unwrap();
        let Value::Weight(o) = &o.value else { panic!("no weight") };
        let expected = added.matmul_t(&o.dense().unwrap()).unwrap().to_vec().unwrap();
        let output = |adapter: Option<Arc<Adapter>>| {
            let here = |s: &engraft_nn::Site| {
                s.role.name() == "attention" && s.layer == Some(0) && matches!(s.kind, Kind::Sublayer { .. })
            };
            let capture = probe(model, 8, 1, false, here);
            let both = merged(&[adapter, Some(capture)], model);
            features(model, &inputs, Some(both)).1.find("output").unwrap().to_vec().unwrap()
        };
        let (with, without) = (output(Some(adapter)), output(None));
        for ((a, b), e) in with.iter().zip(&without).zip(expected.iter().cycle()) {
            assert!((a - b - e).abs() < 1e-5, "{name}: {} {e}", a - b);
        }
    }
}

/// One adapter of several probes: gated keys and values at layer 0, a capturing sublayer patch.
fn merged(parts: &[Option<Arc<Adapter>>], model: &dyn Model) -> Arc<Adapter> {
    let mut b = engraft_nn::Builder::new(model.sites(), model.info(), 0);
    for part in parts.iter().flatten() {
        let (id, info) = (part.sites()[0], model.info());
        let gate = engraft_nn::Init::Normal(1.0).tensor(&[info.heads], 8, "gate").unwrap();
        let p = Box::new(Probe {
            param: param(part).clone(),
            heads: info.kv_heads,
            dim: info.head_dim,
            gate: Some(gate),
        });
        let patch = match model.sites().get(id).kind {
            Kind::KeyValue { .. } => engraft_nn::Patch::KeyValue(p),
            _ => engraft_nn::Patch::Sublayer(p),
        };
        b.patch(id, patch).unwrap();
    }
    Arc::new(b.finish())
}

#[test]
fn a_prompt_of_token_embeddings_is_those_tokens() {
    for name in ["llama", "mistral", "llama_rope_yarn", "bert_token", "bert_encoder", "roberta_token"] {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        let (prompt, tokens) = ([40i64, 3, 71], [5i64, 9, 17, 33]);
        let adapter = probe(model, 9, 3, false, |s| matches!(s.kind, Kind::Prompt { .. }));
        let embed = model.sites().iter().find(|s| s.role.name() == "embed").unwrap();
        let Value::Weight(table) = &embed.value else { panic!("no table") };
        let rows = table.lookup(&Tensor::from_i64(prompt.to_vec(), [3]).unwrap()).unwrap();
        param(&adapter).set(rows).unwrap();
        let found = run(model, &batch(&[&tokens]), Some(adapter.clone()));
        let joined = [&prompt[..], &tokens].concat();
        let (whole, _) = features(model, &batch(&[&joined]), None);
        if model.info().task.per_sequence() {
            // The mean is over real tokens: prompt rows do not count.
            assert!(distance(&found, &whole.to_vec().unwrap()) > 1e-3, "{name}");
            continue;
        }
        let all = run(model, &batch(&[&joined]), None);
        assert!(distance(&found, &all[3 * model.info().outputs..]) < 1e-5, "{name}");
    }
}

#[test]
fn prompts_and_prefixes_equal_the_reference() {
    let mut count = 0;
    for entry in std::fs::read_dir(golden().join("cases")).unwrap() {
        let dir = entry.unwrap().path();
        let case: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap()).unwrap();
        let (method, name) = (case["method"].as_str().unwrap_or(""), case["model"].as_str().unwrap());
        if method != "prompt" && method != "prefix" {
            continue;
        }
        let loaded = model(&golden().join("models").join(name));
        let (model, info) = (loaded.model.as_ref(), loaded.model.info());
        if model.sites().iter().any(|s| s.stack == Stack::Decoder) {
            // Which half of the model reads which rows is the methods' affair; their own tests see to it.
            continue;
        }
        let path = dir.join("adapter/adapter_model.safetensors");
        if !path.exists() {
            // AdapterHub's files name other tensors.
            continue;
        }
        let file = tensors(&path);
        let raw = file.get("prompt_embeddings").unwrap();
        let all = Tensor::from_vec(raw.to_f32().unwrap(), raw.shape.clone()).unwrap();
        let mut b = engraft_nn::Builder::new(model.sites(), info, 0);
        let wanted: Vec<_> = model
            .sites()
            .iter()
            .filter(|s| match s.kind {
                Kind::KeyValue { .. } => method == "prefix",
                Kind::Prompt { .. } => method == "prompt",
                _ => false,
            })
            .collect();
        let width = 2 * info.kv_heads * info.head_dim;
        for (i, site) in wanted.iter().enumerate() {
            let rows =
                if method == "prefix" { all.narrow(1, i * width, width).unwrap() } else { all.clone() };
            let p = Probe {
                param: engraft_tensor::Param::new(rows),
                heads: info.kv_heads,
                dim: info.head_dim,
                gate: None,
            };
            let patch = match method {
                "prefix" => engraft_nn::Patch::KeyValue(Box::new(p)),
                _ => engraft_nn::Patch::Prompt(Box::new(p)),
            };
            b.patch(site.id, patch).unwrap();
        }
        // Classifiers are saved with the adapter, values of their own included.
        for (key, raw) in file.iter().filter(|(key, _)| *key != "prompt_embeddings") {
            let path = key.trim_start_matches("base_model.").trim_end_matches(".weight");
            let site =
                model.sites().iter().find(|s| s.path == path).unwrap_or_else(|| panic!("no site {path}"));
            let value = Tensor::from_vec(raw.to_f32().unwrap(), raw.shape.clone()).unwrap();
            let replacement = engraft_nn::Replacement(engraft_tensor::Param::new(value));
            let patch = match site.kind {
                Kind::Vector { .. } => engraft_nn::Patch::Vector(Box::new(replacement)),
                _ => engraft_nn::Patch::Weight(Box::new(replacement)),
            };
            b.patch(site.id, patch).unwrap();
        }
        let inputs = case["inputs"]
            .as_str()
            .map_or(golden().join("inputs").join(name).join("inputs.safetensors"), |p| dir.join(p));
        let batch = read_batch(&inputs);
        let expected = read_logits(&dir.join("logits.safetensors"), &batch.places);
        let apart = distance(&run(model, &batch.inputs, Some(Arc::new(b.finish()))), &expected);
        assert!(apart < 2e-4, "{}: {apart:e}", dir.display());
        count += 1;
    }
    assert!(count >= 18, "{count}");
}

#[test]
fn rows_padded_on_the_left_keep_to_themselves() {
    for name in ["bert", "roberta", "llama"] {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        let rows = [(&[5i64, 9, 17, 33, 60, 8][..], 0), (&[12, 4, 77, 6], 2), (&[90, 31, 8], 3)];
        let padded = |which: &[usize]| {
            let mut inputs = batch(&which.iter().map(|&i| rows[i].0).collect::<Vec<_>>());
            let lengths: Vec<usize> = which.iter().map(|&i| rows[i].0.len()).collect();
            let columns =
                which.iter().flat_map(|&i| (0..rows[i].0.len() as i32).map(move |c| c + rows[i].1)).collect();
            inputs.layout = Layout::new(&lengths, columns).unwrap();
            inputs
        };
        for (kind, choose, gated) in [KINDS[0], KINDS[5], KINDS[8], KINDS[9], KINDS[10]] {
            let make = |seed, count| Some(probe(model, seed, count, gated, choose));
            let adapters = [make(1, 2), make(2, 3), None];
            let inputs = padded(&[0, 1, 2]);
            let route =
                |(i, a): (usize, &Option<Arc<Adapter>>)| Route { sequences: i..i + 1, adapter: a.clone() };
            let routes = adapters.iter().enumerate().map(route).collect();
            let cx = Pass::with_routes(inputs.layout.clone(), routes).unwrap();
            let together = no_grad(|| forward(model, &inputs, &cx)).to_vec().unwrap();
            let alone: Vec<f32> =
                (0..3).flat_map(|i| run(model, &padded(&[i]), adapters[i].clone())).collect();
            assert!(distance(&together, &alone) < 2e-6, "{name}, {kind}");
        }
    }
}
