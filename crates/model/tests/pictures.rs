//! Models that read pictures: both forms of their files, and inputs that do not fit.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use common::*;
use engraft_nn::{
    Adapter, Base, Builder, Init, Inputs, Layout, Model, Names, Pass, Patch, Route, Sites, Value,
    WeightPatch, merged_tensors,
};
use engraft_store::{Entry, write_safetensors};
use engraft_tensor::testing::sample;
use engraft_tensor::{Param, Tensor, no_grad};

/// What `transformers` 5 calls the modules, by what the files call them.
const CURRENT: &[(&str, &str)] = &[
    ("vit.encoder.layer.", "vit.layers."),
    ("deit.encoder.layer.", "deit.layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("mlp.weights_out", "mlp.down_proj"),
];

/// A copy of a model whose tensors have the current names; `bare` leaves the trunk's prefix out.
fn current(of: &str, bare: Option<&str>) -> PathBuf {
    let from = golden().join("models").join(of);
    let weights = tensors(&from.join("model.safetensors"));
    let dir = std::env::temp_dir().join(format!("engraft-pictures-{of}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    fs::copy(from.join("config.json"), dir.join("config.json")).unwrap();
    let rename = |name: &str| {
        let name = CURRENT.iter().fold(name.to_owned(), |n, (old, new)| n.replace(old, new));
        bare.and_then(|prefix| name.strip_prefix(prefix)).map_or(name.clone(), str::to_owned)
    };
    let mut entries = Vec::new();
    for (name, t) in weights.iter() {
        if !name.contains("weights_in") {
            entries.push(Entry::new(rename(name), t.dtype, &t.shape, t.bytes().to_vec()));
            continue;
        }
        let half = t.shape[0] / 2;
        for (part, rows) in [("gate_proj", 0..half), ("up_proj", half..2 * half)] {
            let part_name = rename(&name.replace("weights_in", part));
            let rows = t.rows(rows).unwrap();
            entries.push(Entry::new(part_name, t.dtype, &rows.shape, rows.bytes().to_vec()));
        }
    }
    write_safetensors(&dir.join("model.safetensors"), &entries, &BTreeMap::new()).unwrap();
    dir
}

#[test]
fn files_have_the_names_of_either_version() {
    for (name, bare) in [
        ("vit", None),
        ("vit_grey", Some("vit.")),
        ("deit", None),
        ("deit_teacher", None),
        ("dinov2", Some("dinov2.")),
        ("dinov2_swiglu", None),
    ] {
        let dir = current(name, bare);
        let (found, expected) = (model(&dir), model(&golden().join("models").join(name)));
        fs::remove_dir_all(dir).unwrap();
        let inputs = read_batch(&golden().join("inputs").join(name).join("inputs.safetensors")).inputs;
        let logits = run(expected.model.as_ref(), &inputs, None);
        assert_eq!(run(found.model.as_ref(), &inputs, None), logits, "{name}");
        let paths = |m: &engraft_model::Loaded, names| -> Vec<String> {
            m.model.sites().named(names).iter().map(|s| s.path.clone()).collect()
        };
        for names in [Names::Current, Names::Older] {
            assert_eq!(paths(&found, names), paths(&expected, names), "{name}");
        }
        assert_ne!(paths(&found, Names::Current), paths(&found, Names::Older), "{name}");
    }
}

#[test]
fn one_matrix_of_a_file_is_two_sites_or_one() {
    let loaded = model(&golden().join("models/dinov2_swiglu"));
    let sites = loaded.model.sites();
    let named = |names, end: &str| sites.named(names).iter().find(|s| s.path.ends_with(end)).cloned();
    let up = named(Names::Current, "layer.1.mlp.up_proj").unwrap();
    let tensor = "dinov2.encoder.layer.1.mlp.weights_in.weight";
    assert_eq!((up.tensor.as_deref(), up.rows.clone()), (Some(tensor), Some(32..64)));
    assert!(
        named(Names::Current, "mlp.weights_in").is_none() && named(Names::Older, "mlp.up_proj").is_none()
    );
    let whole = named(Names::Older, "layer.1.mlp.weights_in").unwrap();
    assert_eq!(whole.kind.rows(), 64);
    assert!(named(Names::Older, "layer.1.mlp.weights_in.bias").is_some());
    assert!(named(Names::Older, "layer.1.attention.output.dense.bias").is_some());
}

/// W + P.
struct Added(Param);

impl WeightPatch for Added {
    fn weight(&self, base: &dyn Base) -> engraft_nn::Result<Tensor> {
        Ok(base.dense()?.add(&self.0.get())?)
    }
}

/// A matrix added at the site of `sites` whose path ends so.
fn added(model: &dyn Model, sites: &Arc<Sites>, end: &str, inn: usize) -> Arc<Adapter> {
    let mut b = Builder::new(sites, model.info(), 3);
    let site = sites.iter().find(|s| s.path.ends_with(end)).unwrap();
    let param = b.param("probe", &[site.kind.rows(), inn], Init::Normal(0.3)).unwrap();
    b.patch(site.id, Patch::Weight(Box::new(Added(param)))).unwrap();
    Arc::new(b.finish())
}

#[test]
fn adapters_under_either_names_share_a_batch() {
    let loaded = model(&golden().join("models/dinov2_swiglu"));
    let (model, sites) = (loaded.model.as_ref(), loaded.model.sites());
    let whole = added(model, sites.older().unwrap(), "layer.0.mlp.weights_in", 24);
    let adapters = [Some(whole.clone()), Some(added(model, sites, "layer.0.mlp.gate_proj", 24)), None];
    let all = sample(&[3, 3, 12, 12], 4);
    let alone = |i: usize| {
        run(model, &Inputs::pixels(all.rows_between(i, i + 1).unwrap()).unwrap(), adapters[i].clone())
    };
    let inputs = Inputs::pixels(all.clone()).unwrap();
    let route = |i: usize| Route { sequences: i..i + 1, adapter: adapters[i].clone() };
    let cx = Pass::with_routes(inputs.layout.clone(), (0..3).map(route).collect()).unwrap();
    let together = no_grad(|| model.forward(&inputs, &cx)).unwrap().to_vec().unwrap();
    assert!(distance(&together, &(0..3).flat_map(alone).collect::<Vec<_>>()) < 2e-6);
    let plain = run(model, &inputs, None);
    assert!(distance(&together[..8], &plain[..8]) > 1e-4 && distance(&together[8..], &plain[8..]) < 2e-6);

    // Merging follows the current names: the two parts, in their order.
    let merged = merged_tensors(sites, &whole).unwrap();
    let paths: Vec<&str> = merged.iter().filter_map(|m| m.site.path.rsplit('.').next()).collect();
    assert_eq!(paths, ["gate_proj", "up_proj"]);
    let change = whole.params()[0].param.value();
    for (m, rows) in merged.iter().zip([0..32, 32..64]) {
        let Value::Weight(weight) = &m.site.value else { panic!() };
        let own = weight.dense().unwrap();
        let expected = own.add(&change.rows_between(rows.start, rows.end).unwrap()).unwrap();
        assert_eq!(m.value.to_vec().unwrap(), expected.to_vec().unwrap());
    }
}

#[test]
fn inputs_that_do_not_fit_are_errors() {
    let loaded = model(&golden().join("models/vit"));
    let text = |inputs: &Inputs| {
        let cx = Pass::new(inputs.layout.clone(), None);
        no_grad(|| loaded.model.forward(inputs, &cx)).unwrap_err().to_string()
    };
    let pixels = |shape: &[usize]| Inputs::pixels(sample(shape, 1)).unwrap();
    let size = text(&pixels(&[2, 3, 12, 16]));
    assert!(size.contains("12 × 12") && size.contains("12 × 16"), "{size}");
    let channels = text(&pixels(&[2, 1, 12, 12]));
    assert!(channels.contains("3 channels") && channels.contains("found 1"), "{channels}");
    assert!(text(&pixels(&[2, 3, 3, 12])).contains("at least 4 × 4"));
    assert!(text(&pixels(&[2, 3, 12])).contains("[n, channels, height, width]"));
    assert!(text(&Inputs::pixels(Tensor::zeros([0, 3, 12, 12])).unwrap()).contains("empty"));
    assert!(text(&batch(&[&[5, 6]])).contains("pictures"));
    let words = model(&golden().join("models/bert"));
    let inputs = pixels(&[2, 3, 12, 12]);
    let cx = Pass::new(inputs.layout.clone(), None);
    assert!(no_grad(|| words.model.forward(&inputs, &cx)).unwrap_err().to_string().contains("tokens"));
    let mut other = pixels(&[2, 3, 12, 12]);
    other.layout = Layout::counted(&[1]).unwrap();
    assert!(text(&other).contains("expected rows of 1 sequences, found 2"), "{}", text(&other));
}

#[test]
fn pictures_of_other_sizes_agree_with_themselves_in_any_batch() {
    for name in ["dinov2", "dinov2_swiglu"] {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        let all = sample(&[3, 3, 25, 13], 4);
        let one = |i: usize| run(model, &Inputs::pixels(all.rows_between(i, i + 1).unwrap()).unwrap(), None);
        let together = run(model, &Inputs::pixels(all.clone()).unwrap(), None);
        let alone: Vec<f32> = (0..3).flat_map(one).collect();
        assert!(distance(&together, &alone) < 1e-6, "{name}");
    }
}
