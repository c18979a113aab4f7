//! What is saved in `peft`'s form as AdapterHub's library has it, where both compute the same: LoRA and (IA)³ at queries, keys,
//! values and the matrices of the MLP, and the prefix of a model whose tokens no prefix moves.
//!
//! LoRA: one rank and one α/r for all matrices there. Smaller ranks are filled up with zeros, and where scales differ, B takes the
//! difference. Where queries, keys and values are one matrix, `peft`'s A is that of each of them. (IA)³ there scales outputs alone:
//! what goes into the last matrix of a gated MLP is, but for its gate, the output of the matrix beside the gate.
//!
//! The adapter is made anew as one of AdapterHub's and given these values, so that names and shapes are checked.

use std::collections::BTreeMap;
use std::sync::Arc;

use engraft_nn::{Error, Kind, ModelInfo, Result, Role, Site, SiteId, Sites};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;
use serde_json::{Value, json};

use super::lora::Lora;
use super::prefix::Prefix;
use super::prompt;
use super::union::Union;
use crate::adapter_hub::hub_name;
use crate::algebra::{Term, products};
use crate::foreign::PREFIX;
use crate::layers::left_out;
use crate::transposed::stands_for;
use crate::{Chosen, Named, joined_start};

/// Keys of a LoRA that compute what AdapterHub's does not, and what they are.
const OTHERWISE: [(&str, &str); 6] = [
    ("use_dora", "the magnitudes of DoRA"),
    ("alora_invocation_tokens", "tokens from which it begins to change anything"),
    ("target_parameters", "matrices that belong to no module"),
    ("trainable_token_indices", "rows of a table"),
    ("use_bdlora", "factors in blocks"),
    ("kasa_config", "singular values of its own"),
];

/// An adapter as AdapterHub's, and what its tensors are to hold.
struct Converted {
    union: Union,
    values: Named,
    /// What was trained whole beside it.
    rest: Named,
}

/// Configuration and tensors in AdapterHub's form; `None` where the type of the file is none of those that can have it.
///
/// # Errors
/// What the library computes otherwise or has no place for, by name.
pub(crate) fn from_peft(
    config: &Value,
    tensors: &Named,
    sites: &Arc<Sites>,
    info: &ModelInfo,
) -> Result<Option<(Value, Named)>> {
    let kind = config.get("peft_type").and_then(Value::as_str).unwrap_or_default();
    let converted = match stands_for(kind).unwrap_or(kind) {
        "LORA" => lora(config, tensors, sites)?,
        "IA3" => ia3(tensors, sites)?,
        "PREFIX_TUNING" | "ENGRAFT_PREFIX" => prefix(config, tensors, sites)?,
        "PROMPT_TUNING" => return Err(Error::Unsupported(prompt_is_another(sites))),
        _ => return Ok(None),
    };
    let methods: [Chosen; 1] = [(Box::new(converted.union), None)];
    let attached = crate::attach(&methods, &[], sites, info, 0)?;
    attached.adapter.load(converted.values)?;
    let (config, mut tensors) = crate::save_adapter(&attached.adapter, &methods, &[], "", sites, info)?;
    tensors.extend(converted.rest);
    Ok(Some((config, tensors)))
}

/// What an error says of everything that `paths` are of.
fn no_place(paths: &[&str], what: &str) -> Error {
    Error::Unsupported(format!(
        "AdapterHub's library has {what} at queries, keys, values and the matrices of an MLP but its gate, and none at {}; train without it",
        paths.join(", ")
    ))
}

/// The site of a module, under its present or older name.
fn site_of<'s>(sites: &'s Sites, path: &str) -> Option<&'s Site> {
    let named = |sites: &'s Sites| sites.iter().find(|s| s.is_weight() && s.path == path);
    let older = || named(sites.older()?);
    named(sites).or_else(|| older().map(|site| sites.get(site.id)))
}

fn lora(config: &Value, tensors: &Named, sites: &Sites) -> Result<Converted> {
    let is_set = |key: &str| {
        let value = config.get(key).unwrap_or(&Value::Null);
        !(value.is_null() || *value == json!(false) || value.as_array().is_some_and(Vec::is_empty))
    };
    let refused = |what: &str| {
        Err(Error::Unsupported(format!("this LoRA has {what}, which AdapterHub's library has no form for")))
    };
    if let Some((key, what)) = OTHERWISE.iter().find(|(key, _)| is_set(key)) {
        return refused(&format!("{what} (`{key}`)"));
    }
    if config.get("bias").and_then(Value::as_str).is_some_and(|bias| bias != "none") {
        return refused("trained biases (`bias`)");
    }
    if joined_start(config)?.is_some() {
        return Err(Error::Unsupported(
            "this LoRA fits only a base without its start (`init_lora_weights`); let `engraft convert` make a plain one of it first".into(),
        ));
    }
    let term =
        Term { name: "the adapter".into(), config: config.clone(), tensors: tensors.clone(), weight: 1.0 };
    let found = products(&[term])?;
    if let Some((name, _)) = found.biases.first() {
        return refused(&format!("a bias beside its product ({name}, `lora_bias`)"));
    }
    let mut changed = BTreeMap::new();
    for module in &found.modules {
        let (Some(site), [Some(factors)]) = (site_of(sites, &module.path), &module.factors[..]) else {
            return Err(no_place(&[&module.path], "LoRA"));
        };
        changed.insert(site.id, factors);
    }
    let rank = changed.values().map(|f| f.a.dim(0)).max().unwrap_or(1);
    let scale = changed
        .values()
        .map(|f| f.scale)
        .fold(0.0, |most: f64, s| if s.abs() > most.abs() { s } else { most });
    let dropout = config.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0) as f32;
    let plain = Lora { alpha: near_whole(scale * rank as f64), dropout, ..Lora::new(rank, false) };
    let lora = over(plain, &ids(&changed), sites, "LoRA")?;
    let mut values = Named::new();
    for site in lora.places(sites) {
        let (count, [out, inn]) = lora.parts(site, sites)?;
        let (a, b) = match changed.get(&site.id) {
            None => (Tensor::zeros([rank, inn]), Tensor::zeros([out, rank])),
            Some(f) => {
                let by = if scale == 0.0 { 1.0 } else { f.scale / scale };
                (filled(&f.a, 0, rank)?, filled(&f.b, 1, rank)?.scale(by as f32)?)
            }
        };
        let stem = format!("{}.loras.engraft", hub_name(sites, site));
        values.push((format!("{stem}.lora_A"), cat(&vec![&a; count], 0)?));
        values.push((format!("{stem}.lora_B"), b));
    }
    let union = alone("lora", |union| union.lora = Some(lora))?;
    Ok(Converted {
        union,
        values,
        rest: trained_whole(found.others.into_iter().map(|(name, all)| (name, all[0].1.clone())), sites)?,
    })
}

fn ids<T>(changed: &BTreeMap<SiteId, T>) -> Vec<SiteId> {
    changed.keys().copied().collect()
}

/// The number that is meant, where a quotient and a product made it a little more or less.
fn near_whole(x: f64) -> f64 {
    if (x - x.round()).abs() < 1e-9 { x.round() } else { x }
}

/// `t` with rows or columns of zeros behind its own, `count` in all.
fn filled(t: &Tensor, dim: usize, count: usize) -> Result<Tensor> {
    let mut shape = [t.dim(0), t.dim(1)];
    shape[dim] = count - shape[dim];
    if shape[dim] == 0 { Ok(t.clone()) } else { Ok(cat(&[t, &Tensor::zeros(shape)], dim)?) }
}

/// `plain` at the matrices `changed`. Those that it has beside them in the same layers are to be given values that change nothing.
fn over(plain: Lora, changed: &[SiteId], sites: &Sites, what: &str) -> Result<Lora> {
    let mut lora = Lora { at: [false; 3], matrices: vec![], ..plain };
    let changed: Vec<&Site> = changed.iter().map(|id| sites.get(*id)).collect();
    let is_nowhere = |site: &&&Site| !lora.has_place(site, sites);
    let nowhere: Vec<&str> = changed.iter().filter(is_nowhere).map(|site| site.path.as_str()).collect();
    if !nowhere.is_empty() {
        return Err(no_place(&nowhere, what));
    }
    changed.iter().for_each(|site| lora.add_place(site, sites));
    let here = |site: &Site| changed.iter().any(|other| sites.number(other) == sites.number(site));
    let mut left_out: Vec<usize> = lora
        .places(sites)
        .into_iter()
        .filter(|site| !here(site))
        .filter_map(|site| sites.number(site))
        .collect();
    left_out.dedup();
    Ok(Lora { leave_out: left_out, ..lora })
}

/// The method `name` as one part of AdapterHub's.
fn alone(name: &str, set: impl FnOnce(&mut Union)) -> Result<Union> {
    let unknown = || Error::Unsupported(format!("there is no method {name}"));
    let mut union = Union::alone(crate::find(name).ok_or_else(unknown)?.info);
    set(&mut union);
    Ok(union)
}

/// What lies beside the adapter, by the names that LoRA's files have for it.
fn trained_whole(others: impl Iterator<Item = (String, Tensor)>, sites: &Sites) -> Result<Named> {
    let is_own = |sites: &Sites, name: &str| sites.iter().any(|site| site.tensor_name() == name);
    let mut rest = Named::new();
    for (name, tensor) in others {
        let own = name.strip_prefix(PREFIX).or_else(|| name.strip_prefix("base_model.")).unwrap_or(&name);
        if !is_own(sites, own) && !sites.older().is_some_and(|older| is_own(older, own)) {
            return Err(Error::Unsupported(format!("{name} has no place in AdapterHub's form")));
        }
        rest.push((format!("{PREFIX}{own}"), tensor));
    }
    Ok(rest)
}

fn ia3(tensors: &Named, sites: &Sites) -> Result<Converted> {
    let mut scales: BTreeMap<SiteId, Tensor> = BTreeMap::new();
    let mut others = Named::new();
    for (key, tensor) in tensors {
        let Some(path) = key.strip_suffix(".ia3_l").and_then(|key| key.strip_prefix(PREFIX)) else {
            others.push((key.clone(), tensor.clone()));
            continue;
        };
        let site = site_of(sites, path)
            .filter(|site| tensor.shape().len() == 2 && matches!(site.kind, Kind::Linear { .. }));
        let site = site.ok_or_else(|| no_place(&[path], "(IA)³"))?;
        let own = tensor.reshape([tensor.len(), 1])?;
        let site = if tensor.dim(0) == 1 { whose_output(site, sites)? } else { site };
        let both = match scales.remove(&site.id) {
            Some(other) => other.mul(&own)?,
            None => own,
        };
        scales.insert(site.id, both);
    }
    let plain = Lora { alpha: 1.0, scales: true, start: "ia3".into(), ..Lora::new(1, false) };
    let lora = over(plain, &ids(&scales), sites, "(IA)³")?;
    let mut values = Named::new();
    for site in lora.places(sites) {
        let (_, [out, _]) = lora.parts(site, sites)?;
        let own = scales.get(&site.id).cloned().unwrap_or_else(|| Tensor::full(1.0, [out, 1]));
        values.push((format!("{}.loras.engraft.lora_B", hub_name(sites, site)), own));
    }
    let union = alone("ia3", |union| union.lora = Some(lora))?;
    Ok(Converted { union, values, rest: trained_whole(others.into_iter(), sites)? })
}

/// The matrix whose output goes into `site`, but for a gate that it is multiplied by.
fn whose_output<'s>(site: &Site, sites: &'s Sites) -> Result<&'s Site> {
    let beside = |role: Role| {
        sites
            .iter()
            .find(|s| s.role == role && s.is_weight() && (s.layer, s.stack) == (site.layer, site.stack))
    };
    match (site.role, beside(Role::Gate), beside(Role::Up)) {
        (Role::Down, Some(_), Some(up)) => Ok(up),
        _ => Err(Error::Unsupported(format!(
            "this (IA)³ scales what goes into {}, and AdapterHub's library what comes out of a matrix, before the MLP's function; \
             train it with `feedforward = []`, and the MLP's first matrix (`up`) among the targets",
            site.path
        ))),
    }
}

/// A prefix where no position is counted from its rows: before the patches of a picture.
fn prefix(config: &Value, tensors: &Named, sites: &Sites) -> Result<Converted> {
    if !sites.iter().any(|site| site.role == Role::PatchEmbed) {
        return Err(Error::Unsupported(
            "this prefix is in peft's form, in which tokens are counted from the first row of the prefix; AdapterHub's library counts \
             them from the first token: train it with `form = \"adapterhub\"`"
                .into(),
        ));
    }
    let (own, others): (Named, Named) =
        tensors.iter().cloned().partition(|(name, _)| name == "prompt_embeddings");
    let [(_, rows)] = &own[..] else {
        return Err(Error::Mismatch(vec!["prompt_embeddings: expected once".into()]));
    };
    let values = vec![(Prefix::flat_name(sites, "engraft")?, rows.reshape([rows.len()])?)];
    let plain = Prefix { leave_out: left_out(config, sites), ..Prefix::new(rows.dim(0), 0, false) };
    let union = alone("prefix", |union| union.prefix = Some(plain))?;
    Ok(Converted { union, values, rest: trained_whole(others.into_iter(), sites)? })
}

/// Why no prompt in `peft`'s form is one of AdapterHub's.
fn prompt_is_another(sites: &Sites) -> String {
    let first = "this prompt is in peft's form, whose rows are embedded as tokens are and move these";
    match prompt::fits(sites) {
        true => format!(
            "{first}; AdapterHub's library puts rows behind the embeddings, and tokens stay where they are: train it with \
             `form = \"adapterhub\"`"
        ),
        false => format!(
            "{first}; AdapterHub's library has prompts in encoders whose embeddings know positions alone"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use crate::{Attached, load_adapter, save_adapter};
    use engraft_nn::Targets;
    use engraft_tensor::testing::{close, sample};

    /// What a stirred adapter is in AdapterHub's form, read again.
    fn converted(methods: &[Chosen], train_also: &[&str]) -> Result<(Attached, Attached, Value)> {
        let (sites, info) = toy();
        let a = attached(methods, train_also);
        stir(&a, 0.5);
        let also: Vec<String> = train_also.iter().map(|s| (*s).to_owned()).collect();
        let (config, tensors) = save_adapter(&a.adapter, methods, &also, "b", &sites, &info)?;
        let Some((config, tensors)) = from_peft(&config, &tensors, &sites, &info)? else {
            return Err(Error::Unsupported("not converted".into()));
        };
        let theirs = with(config, json!({ "peft_type": null, "modules_to_save": train_also }));
        let read = load_adapter(&theirs, tensors, &sites, &info)?;
        let again = Attached {
            adapter: read.adapter,
            dead_targets: vec![],
            dead_modules: vec![],
            without_targets: vec![],
        };
        Ok((a, again, theirs["config"].clone()))
    }

    fn at(name: &str, settings: Value, targets: &[&str]) -> [Chosen; 1] {
        [(chosen(name, settings).0, Some(Targets::names(targets.iter().copied())))]
    }

    /// Both compute the same at every matrix of both layers.
    fn same(a: &Attached, b: &Attached) {
        for path in ["attn.q", "attn.k", "attn.v", "mlp.down"] {
            for layer in [0, 1] {
                let path = format!("layers.{layer}.{path}");
                let x = sample(&[5, if path.ends_with("down") { 8 } else { 6 }], 3);
                close(&both_ways(b, &path, &x).0, &both_ways(a, &path, &x).0, 1e-5);
            }
        }
    }

    #[test]
    fn a_lora_keeps_what_it_computes() {
        let (a, b, config) =
            converted(&at("lora", json!({ "rank": 3, "alpha": 5 }), &["attn.q", "attn.v"]), &["head"])
                .unwrap();
        same(&a, &b);
        assert_eq!(
            (&config["r"], &config["alpha"], &config["attn_matrices"]),
            (&json!(3), &json!(5), &json!(["q", "v"]))
        );
        assert_eq!((&config["leave_out"], &config["output_lora"]), (&json!([]), &json!(false)));
        close(&value_of(&b, "head.weight"), &value_of(&a, "head.weight"), 0.0);
        // One layer without, a matrix of the other alone, ranks and scales of their own.
        let targets = ["layers.1.attn.q", "layers.1.mlp.down"];
        let own = json!({ "rank": 2, "rank_pattern": { "down": 4 }, "alpha_pattern": { "attn.q": 3 }, "rslora": true });
        let (a, b, config) = converted(&at("lora", own, &targets), &[]).unwrap();
        same(&a, &b);
        assert_eq!(
            (&config["r"], &config["leave_out"], &config["output_lora"]),
            (&json!(4), &json!([0]), &json!(true))
        );
    }

    #[test]
    fn scales_of_outputs_keep_what_they_compute() {
        let (a, b, config) =
            converted(&at("ia3", json!({ "feedforward": [] }), &["attn.k", "layers.0.attn.v"]), &[]).unwrap();
        same(&a, &b);
        close(&vector(&b, "layers.1.attn.k.bias"), &vector(&a, "layers.1.attn.k.bias"), 1e-6);
        assert_eq!(
            (&config["composition_mode"], &config["attn_matrices"]),
            (&json!("scale"), &json!(["k", "v"]))
        );
    }

    #[test]
    fn what_the_library_computes_otherwise_is_refused_by_name() {
        let error = |methods: &[Chosen]| converted(methods, &[]).map(|_| ()).unwrap_err().to_string();
        let lora = |settings: Value| error(&at("lora", settings, &["attn.q"]));
        assert!(lora(json!({ "dora": true })).contains("use_dora"));
        assert!(lora(json!({ "bias": "all" })).contains("`bias`"));
        assert!(error(&at("lora", json!({}), &["tok"])).contains("none at tok"));
        assert!(error(&at("ia3", json!({}), &["mlp.down"])).contains("feedforward = []"));
        assert!(error(&[chosen("prefix", json!({}))]).contains("counted from the first row"));
        assert!(error(&[chosen("prompt", json!({}))]).contains("encoders whose embeddings know positions"));
    }
}
