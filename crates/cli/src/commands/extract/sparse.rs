//! Changes as the entries that differ most, in the form that LT-SFT leaves.

use engraft_method::{attach, from_file};
use engraft_nn::{Kind, Targets};
use engraft_tensor::Tensor;
use serde_json::json;

use super::Extracted;
use crate::engine::Engine;
use crate::failure::{BeforeWork, Failure, Outcome};

/// The entries of the linear weights that differ, so many as `density` is of all of these, the largest changes first. The modules
/// of `head` are trained as a whole.
pub fn extract(
    engine: &Engine,
    changes: &[(String, bool, Tensor)],
    head: &[String],
    density: f64,
) -> Outcome<Extracted> {
    let sites = engine.model.sites();
    let linear = |path: &str| sites.iter().any(|s| s.path == path && matches!(s.kind, Kind::Linear { .. }));
    let chosen: Vec<&str> =
        changes.iter().map(|(path, ..)| path.as_str()).filter(|path| linear(path)).collect();
    if chosen.is_empty() {
        return Err(Failure::before_work(
            "no linear weight differs; a table is extracted as products, by --rank",
        ));
    }
    let config =
        json!({ "peft_type": "ENGRAFT_LT_SFT", "density": density, "l1": 0.0, "target_modules": chosen });
    let method = from_file(&config).before_work()?.method;
    let methods = vec![(method, Some(Targets::names(chosen.iter().map(|path| (*path).to_owned()))))];
    let adapter = attach(&methods, head, sites, engine.model.info(), 0).before_work()?.adapter;
    let of = |name: &str| {
        let found = adapter.params().iter().find(|p| p.name == name);
        found.map(|p| p.param.clone()).ok_or_else(|| Failure::running(format!("the mask has no `{name}`")))
    };
    let (values, places) = (of("sparse_values")?, of("sparse_indices")?);
    // Places are numbered through the targets, in the order of the model.
    let (mut entries, mut first, mut lost) = (Vec::new(), 0u64, 0.0f64);
    for (path, is_table, change) in changes {
        let change = change.to_vec()?;
        let size = |v: f32| f64::from(v) * f64::from(v);
        if *is_table || !chosen.contains(&path.as_str()) {
            lost += change.iter().map(|&v| size(v)).sum::<f64>();
            continue;
        }
        entries.extend(change.iter().enumerate().map(|(at, &v)| (first + at as u64, v)));
        first += change.len() as u64;
    }
    let left_out = changes
        .iter()
        .map(|change| change.0.clone())
        .filter(|path| !chosen.contains(&path.as_str()))
        .collect();
    let count = values.value().len().min(entries.len());
    if count < entries.len() {
        // Of equals the first stay.
        let order = |a: &(u64, f32), b: &(u64, f32)| b.1.abs().total_cmp(&a.1.abs()).then(a.0.cmp(&b.0));
        entries.select_nth_unstable_by(count, order);
        lost += entries[count..].iter().map(|&(_, v)| f64::from(v) * f64::from(v)).sum::<f64>();
        entries.truncate(count);
    }
    entries.sort_unstable_by_key(|entry| entry.0);
    values.set(Tensor::from_vec(entries.iter().map(|e| e.1).collect(), [count])?)?;
    places.set(Tensor::from_i64(entries.iter().map(|e| e.0 as i64).collect(), [count])?)?;
    Ok(Extracted {
        adapter,
        methods,
        lost,
        form: format!("a share of {density}, {count} entries,"),
        rank: None,
        left_out,
    })
}
