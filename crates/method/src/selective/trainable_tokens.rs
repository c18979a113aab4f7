//! Trainable tokens: chosen rows of the embedding table are trained, the others stay.
//!
//! W′ = W with rows `token_indices` replaced by P, P starting as these rows. What shares the tensor of the model's table (a tied
//! head, the tables of T5's encoder and decoder) has the same rows replaced, and so has, as in `peft`, a head that the
//! configuration ties to the table and that has other values (T5 1.1, FLAN-T5): its rows are those of the table from the start
//! on. A head or one of T5's tables that is named alone has rows of its own. A head whose rows are replaced adds no bias. The forward looks up, or puts x·Pᵀ in place of the logits of
//! these rows; W′ is never formed.
//!
//! `peft`'s TRAINABLE_TOKENS; no paper. As in `peft` the values are the rows themselves and not differences, so that a table
//! whose new rows are random may be drawn anew.
//!
//! `trainable_tokens_delta` [rows, width], in the order of `token_indices`; a tied head or table has a copy of its own in the file.

use engraft_nn::{Adapter, Builder, Error, Matcher, Resolution, Result, Role, Site, SiteId, Sites, Targets};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::token_rows;
use crate::tied::{chosen_by_own_name, own_name, with_rows};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

struct TrainableTokens {
    rows: Vec<usize>,
    /// `init_weights` of a file, which says how the rows started.
    as_they_are: bool,
}

static INFO: Info = Info {
    name: "trainable_tokens",
    title: "Trainable tokens",
    class: "selective",
    sites: "weight",
    paper: "",
    summary: "trains chosen rows of the embedding table",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "TRAINABLE_TOKENS",
    fields: &[Field {
        name: "token_indices",
        kind: FieldKind::IntList,
        default: None,
        doc: "Numbers of the tokens whose rows are trained.",
    }],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| TrainableTokens { rows: read_rows(r), as_they_are: true })
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| TrainableTokens {
        rows: read_rows(r),
        as_they_are: r.flag("init_weights", true),
    })
}

fn read_rows(r: &mut Reader<'_>) -> Vec<usize> {
    let rows = r.counts("token_indices").unwrap_or_default();
    let mut sorted = rows.clone();
    sorted.sort_unstable();
    // In a file the last of them counts.
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1] && !r.is_file()) {
        r.problem(format!("`token_indices`: {} is there twice", twice[0]));
    }
    if rows.is_empty() {
        r.problem("`token_indices`: expected the numbers of the tokens to train, found none");
    }
    rows
}

fn example() -> Box<dyn Method> {
    Box::new(TrainableTokens { rows: (5..25).rev().collect(), as_they_are: true })
}

impl Method for TrainableTokens {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let sites = b.sites();
        if b.targets().is_empty() {
            let message =
                "this model reads no tokens, so that there are no rows to train; choose another method";
            return Err(Error::Unsupported(message.into()));
        }
        let mut done: Vec<SiteId> = Vec::new();
        for site in b.targets() {
            if done.contains(&site.id) {
                continue;
            }
            let module = match own_name(sites, site) {
                Some(_) => chosen_by_own_name(b, site),
                None => (site.role == Role::Embed).then(|| site.path.clone()),
            };
            let leads = module.is_some();
            let mut followers: Vec<&Site> = match leads {
                true => with_rows(sites, site).collect(),
                false => vec![site],
            };
            // The rows start as those of the table that was chosen.
            followers.sort_by_key(|s| s.id != site.id);
            done.extend(followers.iter().map(|tied| tied.id));
            let name = format!("{}.trainable_tokens_delta", module.as_ref().unwrap_or(&site.path));
            token_rows::train(b, &self.rows, &name, &followers)?;
        }
        Ok(())
    }

    /// The table of tokens, as `peft` finds it.
    fn default_targets(&self, sites: &Sites) -> Option<Targets> {
        let table = sites.iter().find(|s| s.role == Role::Embed && s.is_weight())?;
        Some(Matcher::Regex(own_name(sites, table).unwrap_or_else(|| table.path.clone())).into())
    }

    /// A table whose module is not among the sites (T5's `shared`) is named by its tensor.
    fn resolve(&self, targets: &Targets, sites: &Sites) -> Result<Resolution> {
        let (mut modules, mut ids) = (Sites::default(), Vec::new());
        let mut add = |path: String, site: &Site| {
            modules.add(path, site.role, site.layer, site.kind.clone());
            ids.push(site.id);
        };
        for site in sites.iter().filter(|s| s.is_weight()) {
            if let Some(name) = own_name(sites, site) {
                add(name, site);
            }
            add(site.path.clone(), site);
        }
        let found = targets.resolve(&modules)?;
        let mut chosen: Vec<SiteId> = found.sites.into_iter().map(|id| ids[id.0]).collect();
        chosen.dedup();
        Ok(Resolution { sites: chosen, dead: found.dead })
    }

    fn followed(&self, adapter: &Adapter, sites: &Sites) -> Vec<String> {
        let leads = |site: &&Site| {
            let key =
                format!("{}.trainable_tokens_delta", own_name(sites, site).unwrap_or(site.path.clone()));
            site.role == Role::Embed && adapter.params().iter().any(|p| p.name == key)
        };
        sites.iter().find(leads).map_or_else(Vec::new, |table| token_rows::doubts(table, sites))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "init_weights": self.as_they_are, "token_indices": self.rows });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::testing::*;
    use engraft_nn::{Base, Embedding, Linear, Pass};
    use engraft_tensor::Tensor;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn only_the_rows_change() {
        let a = attached(&[chosen("trainable_tokens", json!({ "token_indices": [7, 2] }))], &[]);
        assert_eq!((names(&a), a.adapter.trained_count()), (vec!["tok.trainable_tokens_delta"], 2 * 6));
        let ids = Tensor::from_i64(vec![2, 0, 7, 10, 2], [5]).unwrap();
        close(&both_ways(&a, "tok", &ids).0, &frozen("tok").gather(&ids).unwrap(), 0.0);
        stir(&a, 0.5);
        let (fast, defined) = both_ways(&a, "tok", &ids);
        close(&fast, &defined, 0.0);
        let own = param(&a.adapter, "tok.trainable_tokens_delta").value();
        close(&fast.rows_between(2, 3).unwrap(), &own.rows_between(0, 1).unwrap(), 0.0);
        close(&fast.rows_between(4, 5).unwrap(), &own.rows_between(1, 2).unwrap(), 0.0);
        let others = Tensor::from_i64(vec![0, 1, 3], [3]).unwrap();
        close(&both_ways(&a, "tok", &others).0, &frozen("tok").gather(&others).unwrap(), 0.0);
    }

    #[test]
    fn a_tied_head_follows_and_the_file_has_both() {
        let (sites, info) = toy();
        let mut sites = Arc::try_unwrap(sites).ok().unwrap();
        let table = sample(&[11, 6], 8);
        let precision = Some(engraft_tensor::frozen::Precision::F32);
        let weight = Arc::new(engraft_nn::Weight::table(rows_of(&table), precision));
        Embedding::declare(&mut sites, ("decoder.words", "shared"), Role::Embed, weight.clone());
        Linear::declare_named(
            &mut sites,
            ("lm_head", "shared.weight"),
            Role::Head,
            None,
            weight.clone(),
            None,
        );
        let sites = Arc::new(sites);
        let methods = [(
            chosen("trainable_tokens", json!({ "token_indices": [9, 4] })).0,
            Some(Targets::names(["shared"])),
        )];
        let a = crate::attach(&methods, &[], &sites, &info, 1).unwrap();
        stir(&a, 0.4);
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        let keys: Vec<&str> = tensors.iter().map(|(key, _)| key.as_str()).collect();
        let key = |path: &str| format!("base_model.model.{path}.trainable_tokens_delta");
        assert_eq!(keys, [key("decoder.words"), key("lm_head"), key("shared")]);
        let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
        let merged = engraft_nn::merged_tensors(&sites, &loaded.adapter).unwrap();
        assert_eq!(merged.len(), 2);
        close(&merged[0].value, &merged[1].value, 0.0);
        let head = sites.iter().find(|s| s.path == "lm_head").unwrap();
        let cx = Pass::new(engraft_nn::Layout::counted(&[3]).unwrap(), None);
        let patched = engraft_nn::Patched::new(weight.as_ref(), loaded.adapter.at(head.id), head, &cx);
        let x = sample(&[3, 6], 5);
        close(&patched.forward(&x).unwrap(), &x.matmul_t(&patched.dense().unwrap()).unwrap(), 1e-5);
        let mut other = tensors;
        other[1].1 = other[1].1.scale(2.0).unwrap();
        assert!(crate::load_adapter(&config, other, &sites, &info).is_err(), "copies that differ");
    }

    #[test]
    fn a_head_that_the_configuration_ties_has_the_rows_and_adds_no_bias() {
        let (sites, info) = toy();
        let mut sites = Arc::try_unwrap(sites).ok().unwrap();
        let head = sample(&[11, 6], 8);
        let weight = engraft_nn::Weight::table(rows_of(&head), Some(engraft_tensor::frozen::Precision::F32));
        let bias = Some(sample(&[11], 9));
        Linear::declare(&mut sites, ("lm_head", "lm_head"), Role::Head, None, Arc::new(weight), bias);
        let of = |sites: Sites| {
            let methods = [chosen("trainable_tokens", json!({ "token_indices": [9, 4] }))];
            let sites = Arc::new(sites);
            let a = crate::attach(&methods, &[], &sites, &info, 1).unwrap();
            stir(&a, 0.4);
            let told = methods[0].0.followed(&a.adapter, &sites).join("\n");
            let (_, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
            let keys: Vec<String> = tensors.into_iter().map(|(key, _)| key).collect();
            let merged = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
            let merged: Vec<_> = merged.into_iter().map(|m| (m.site.path.clone(), m.value)).collect();
            (keys, merged, told)
        };
        let key = |path: &str| format!("base_model.model.{path}.trainable_tokens_delta");
        let (keys, merged, told) = of(sites.clone());
        assert_eq!((keys, merged.len(), told.as_str()), (vec![key("tok")], 1, ""));

        sites.set_ties_words(true);
        let (keys, merged, told) = of(sites);
        assert_eq!(keys, [key("lm_head"), key("tok")]);
        assert!(told.contains("`lm_head` has values of its own") && told.contains("adds no bias"), "{told}");
        let of = |path: &str| merged.iter().find(|(own, _)| own == path).unwrap().1.clone();
        assert_eq!(merged.len(), 3);
        for row in [9, 4] {
            let rows = |t: &Tensor| t.rows_between(row, row + 1).unwrap();
            close(&rows(&of("lm_head")), &rows(&of("tok")), 0.0);
        }
        close(&of("lm_head").rows_between(0, 4).unwrap(), &head.rows_between(0, 4).unwrap(), 0.0);
        close(&of("lm_head.bias"), &Tensor::zeros([11]), 0.0);
    }

    #[test]
    fn of_a_row_that_a_file_has_twice_the_last_counts() {
        let written = config(&[chosen("trainable_tokens", json!({ "token_indices": [3, 1, 5] }))], &[]);
        let (sites, info) = toy();
        let twice = with(written, json!({ "token_indices": [3, 1, 3] }));
        let rows = sample(&[3, 6], 4);
        let tensors = vec![("base_model.model.tok.trainable_tokens_delta".to_string(), rows.clone())];
        let loaded = crate::load_adapter(&twice, tensors, &sites, &info).unwrap();
        let merged = engraft_nn::merged_tensors(&sites, &loaded.adapter).unwrap()[0].value.clone();
        close(&merged.rows_between(3, 4).unwrap(), &rows.rows_between(2, 3).unwrap(), 0.0);
        close(&merged.rows_between(1, 2).unwrap(), &rows.rows_between(1, 2).unwrap(), 0.0);
        close(&merged.rows_between(4, 11).unwrap(), &frozen("tok").rows_between(4, 11).unwrap(), 0.0);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("trainable_tokens", json!({ "token_indices": [3, 1] }))], &["head"]);
        let written = config(&[chosen("trainable_tokens", json!({ "token_indices": [3, 1] }))], &[]);
        assert_eq!(written["target_modules"], json!("tok"));
        assert!(written.get("exclude_modules").is_none());
        assert!(from_settings(json!({ "token_indices": [1, 1] }).as_object().unwrap()).is_err());
        for bad in [json!({ "token_indices": [] }), json!({ "token_indices": [-1] })] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
        let (sites, info) = toy();
        let outside = [chosen("trainable_tokens", json!({ "token_indices": [11] }))];
        assert!(crate::attach(&outside, &[], &sites, &info, 0).is_err());
    }
}
