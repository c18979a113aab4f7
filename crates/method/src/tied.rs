//! `ensure_weight_tying`: what an adapter does to the table of tokens it does to the head that shares its tensor.
//!
//! `peft` keeps one pair of factors (or one copy of the table) for both and writes it twice: at the table, and at the head,
//! the factors changed over and transposed, since the head's ΔW = (B·A)ᵀ = Aᵀ·Bᵀ.

use engraft_nn::{
    Builder, Error, Patch, Replacement, Resolution, Result, Role, Site, SiteId, Sites, TargetError, Targets,
};
use engraft_tensor::Tensor;
use serde_json::{Map, Value};

use crate::{Method, Named};

/// The heads that share the tensor of the table `site`. `peft` ties what hangs on a table of this name and no other.
pub(crate) fn heads<'s>(sites: &'s Sites, table: &'s Site) -> impl Iterator<Item = &'s Site> {
    let named = tied_to(table);
    sites.iter().filter(move |s| named && s.role == Role::Head && s.is_weight() && s.tensor == table.tensor)
}

/// Whether a head could share the tensor of the table `site`.
pub(crate) fn tied_to(site: &Site) -> bool {
    site.role == Role::Embed && site.module() == "embed_tokens" && site.tensor.is_some()
}

/// The heads that follow the tables among `targets`, and so have no patch of their own. Those of a table that is trained whole
/// are given its values here.
pub(crate) fn follow(b: &mut Builder<'_>, targets: &[SiteId]) -> Result<Vec<SiteId>> {
    let mut tied = Vec::new();
    let sites = b.sites();
    for table in sites.iter() {
        let trained = b.trained(&format!("{}.weight", table.path));
        for head in heads(sites, table) {
            if let (Some(trained), false) = (&trained, b.replaced(head.id)) {
                b.patch(head.id, Patch::Weight(Box::new(Replacement(trained.clone()))))?;
            }
            if trained.is_some() || targets.contains(&table.id) {
                tied.push(head.id);
            }
        }
    }
    Ok(tied)
}

/// The weights that are the same tensor of the model as `site`, itself among them.
pub(crate) fn sharing<'s>(sites: &'s Sites, site: &'s Site) -> impl Iterator<Item = &'s Site> {
    let same = move |s: &&Site| s.id == site.id || site.tensor.is_some() && s.tensor == site.tensor;
    sites.iter().filter(|s| s.is_weight()).filter(same)
}

/// The weights that have the trained rows of the table `site`, itself among them: those that are the same tensor and, where
/// the configuration ties tables and heads of words, all of these, though they have other values in the files. `peft` goes by
/// the configuration and by names; so does `transformers`, which ties what is equal.
pub(crate) fn with_rows<'s>(sites: &'s Sites, site: &'s Site) -> impl Iterator<Item = &'s Site> {
    let words = |s: &Site| match s.role {
        Role::Embed => true,
        Role::Head => matches!(s.module(), "lm_head" | "decoder") && s.kind.rows() == site.kind.rows(),
        _ => false,
    };
    let tied = move |s: &Site| sites.ties_words() && words(site) && words(s);
    let same = move |s: &Site| s.id == site.id || site.tensor.is_some() && s.tensor == site.tensor;
    sites.iter().filter(move |s| s.is_weight() && (same(s) || tied(s)))
}

/// The module that has the table's tensor, where it is none of the sites (T5's `shared`).
pub(crate) fn own_name(sites: &Sites, table: &Site) -> Option<String> {
    let stem = table.tensor.as_deref()?.strip_suffix(".weight")?;
    // Files may leave the first parts of a path out.
    let known = sites.iter().any(|s| s.path == stem || s.path.ends_with(&format!(".{stem}")));
    (table.role == Role::Embed && !known).then(|| stem.to_owned())
}

/// The [`own_name`] of a table where the targets choose it.
pub(crate) fn chosen_by_own_name(b: &Builder<'_>, table: &Site) -> Option<String> {
    let name = own_name(b.sites(), table)?;
    let mut modules = Sites::default();
    modules.add(name.clone(), table.role, table.layer, table.kind.clone());
    b.choice()?.resolve(&modules).is_ok().then_some(name)
}

/// The sites that `targets` choose: none where they name nothing but modules that the model does not read, as `peft` lets them.
pub(crate) fn resolve(method: &dyn Method, targets: &Targets, sites: &Sites) -> Result<Resolution> {
    let mut unread = Sites::default();
    for table in sites.iter() {
        let name = own_name(sites, table).filter(|name| unread.iter().all(|known| known.path != *name));
        name.into_iter().for_each(|name| _ = unread.add(name, table.role, table.layer, table.kind.clone()));
    }
    match method.resolve(targets, sites) {
        Err(Error::Targets(TargetError::Dead { names, .. })) if method.resolve(targets, &unread).is_ok() => {
            Ok(Resolution { sites: vec![], dead: names })
        }
        found => found,
    }
}

/// Takes out of the tensors of a file those at a module that is none of the sites because the model does not read it (LoRA on
/// T5's `shared`, whose tensor the tables of both sides have): `peft` loads and saves them, and they change nothing.
pub(crate) fn of_unread_modules(tensors: Named, sites: &Sites) -> (Named, Named) {
    let modules: Vec<String> = sites.iter().filter_map(|site| own_name(sites, site)).collect();
    let (mut read, mut unread) = (Named::new(), Named::new());
    for (key, value) in tensors {
        let name = key.strip_prefix("base_model.model.").unwrap_or("");
        let inside =
            |module: &String| name.strip_prefix(module.as_str()).is_some_and(|rest| rest.starts_with('.'));
        match modules.iter().any(inside) {
            true => unread.push((name.to_owned(), value)),
            false => read.push((key, value)),
        }
    }
    (read, unread)
}

/// Copies of trained rows: `peft` writes them at the module of the table and at everything that shares its tensor. A table
/// whose module is another (one of T5's) has rows of its own where it is named alone.
fn copies_of_rows(tensors: &Named, sites: &Sites) -> Named {
    let key = |path: &str| format!("base_model.model.{path}.trainable_tokens_delta");
    let (mut copies, mut done) = (Vec::new(), Vec::new());
    for table in sites.iter().filter(|s| s.role == Role::Embed && s.is_weight()) {
        let own = key(&own_name(sites, table).unwrap_or_else(|| table.path.clone()));
        let found = tensors.iter().find(|(other, _)| *other == own);
        let Some((_, rows)) = found.filter(|_| !done.contains(&table.id)) else { continue };
        done.extend(with_rows(sites, table).map(|s| s.id));
        let others = with_rows(sites, table).map(|s| key(&s.path)).filter(|other| *other != own);
        copies.extend(others.map(|other| (other, rows.clone())));
    }
    copies
}

/// The second copies that a file with this configuration holds of `tensors`.
pub(crate) fn copies(config: &Map<String, Value>, tensors: &Named, sites: &Sites) -> Result<Named> {
    let mut copies = Vec::new();
    if config.get("peft_type").and_then(Value::as_str) == Some("TRAINABLE_TOKENS") {
        return Ok(copies_of_rows(tensors, sites));
    }
    if config.get("ensure_weight_tying").and_then(Value::as_bool) != Some(true) {
        return Ok(copies);
    }
    for table in sites.iter() {
        for head in heads(sites, table) {
            for (name, copy, turned) in [
                ("weight", "weight", false),
                ("lora_embedding_A", "lora_B.weight", true),
                ("lora_embedding_B", "lora_A.weight", true),
            ] {
                let key = format!("base_model.model.{}.{name}", table.path);
                let Some((_, value)) = tensors.iter().find(|(other, _)| *other == key) else { continue };
                let value = if turned { value.t()? } else { value.clone() };
                copies.push((format!("base_model.model.{}.{copy}", head.path), value));
            }
        }
    }
    Ok(copies)
}

/// Takes the second copies out of the tensors of a file.
///
/// # Errors
/// One that is not equal to the first: which of the two is meant cannot be told.
pub(crate) fn without_copies(mut tensors: Named, config: &Value, sites: &Sites) -> Result<Named> {
    let Some(config) = config.as_object() else { return Ok(tensors) };
    let mut wrong = Vec::new();
    for (key, expected) in copies(config, &tensors, sites)? {
        let Some(at) = tensors.iter().position(|(name, _)| *name == key) else { continue };
        let (_, found) = tensors.remove(at);
        if !equal(&found, &expected)? {
            wrong.push(format!(
                "{key}: expected what the table has (`ensure_weight_tying`: the head's factors are the table's, \
                 transposed), found other values; set it to false if the two are meant to differ"
            ));
        }
    }
    if wrong.is_empty() { Ok(tensors) } else { Err(Error::Mismatch(wrong)) }
}

fn equal(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.shape() == b.shape() && a.to_vec()? == b.to_vec()?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use engraft_nn::{Embedding, Linear, Targets};
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    use super::*;
    use crate::testing::{chosen, rows_of, toy};
    use crate::{attach, load_adapter, save_adapter};

    #[test]
    fn a_tied_head_follows_its_table_and_other_values_are_refused() {
        let (sites, info) = toy();
        let mut sites = Arc::try_unwrap(sites).ok().unwrap();
        let table = sample(&[11, 6], 8);
        let precision = Some(engraft_tensor::frozen::Precision::F32);
        let weight = Arc::new(engraft_nn::Weight::table(rows_of(&table), precision));
        let names = ("model.embed_tokens", "model.embed_tokens");
        Embedding::declare(&mut sites, names, Role::Embed, weight.clone());
        let head = ("lm_head", "model.embed_tokens.weight");
        Linear::declare_named(&mut sites, head, Role::Head, None, weight, None);
        let sites = Arc::new(sites);
        let methods =
            [(chosen("lora", json!({ "init": "random" })).0, Some(Targets::names(["embed_tokens"])))];
        let a = attach(&methods, &[], &sites, &info, 1).unwrap();
        let (mut config, mut tensors) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        config["ensure_weight_tying"] = true.into();
        let of = |tensors: &Named, end: &str| {
            tensors.iter().find(|(key, _)| key.ends_with(end)).map(|(_, value)| value.clone()).unwrap()
        };
        let turned = of(&tensors, "lora_embedding_B").t().unwrap();
        tensors.push(("base_model.model.lm_head.lora_A.weight".into(), turned.clone()));
        let loaded = load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
        let (found, saved) = save_adapter(&loaded.adapter, &loaded.methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(found["ensure_weight_tying"], true);
        close(&of(&saved, "lm_head.lora_A.weight"), &turned, 0.0);
        close(&of(&saved, "lm_head.lora_B.weight"), &of(&saved, "lora_embedding_A").t().unwrap(), 0.0);
        let last = tensors.len() - 1;
        tensors[last].1 = turned.scale(2.0).unwrap();
        let error = load_adapter(&config, tensors, &sites, &info).err().unwrap().to_string();
        assert!(error.starts_with("base_model.model.lm_head.lora_A.weight: expected"), "{error}");
    }
}
