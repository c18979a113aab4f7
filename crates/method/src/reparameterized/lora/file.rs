//! `adapter_config.json` as `peft` has it, and the plain LoRA that every variant is saved as.

use std::collections::HashMap;

use engraft_nn::{Error, Result, Site, Targets};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;
use serde_json::{Map, Value, json};

use super::form::Form;
use super::parameters;
use super::prepare::Search;
use super::settings::{INFO, RANK_MAX, check};
use super::start::Start;
use super::variants::{Blocks, Kasa};
use super::{Lora, Mixer};
use crate::hybrid::{Alone, alone};
use crate::read::{Pattern, Reader, as_written, number};
use crate::shared::biases::Biases;
use crate::shared::token_indices::Tokens;
use crate::{Chosen, Described, Loaded, Method, Named, peft};

/// Keys of variants that are not here.
const OFF: &[&str] = &["megatron_config"];
/// Keys of forms, null where there is none.
const FORMS: &[&str] = &["alora_invocation_tokens", "monteclora_config", "velora_config"];
/// Ends of the names of what MonteCLoRA drew last.
const DRAWN: [&str; 2] = [".gaussian_var_prior", ".expert_weights"];
/// Keys about places that no model here has, and about other files.
const PLACES: &[&str] = &["arrow_config", "layer_replication"];
/// Keys that only say how the tensors started, or hold a default that matters only to a variant that is off. `use_qalora` is
/// heeded by `peft` over GPTQ layers alone.
const SILENT: &[&str] = &[
    "corda_config",
    "fan_in_fan_out",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "use_qalora",
];

pub(super) fn from_file(config: &Value) -> Result<Option<Loaded>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return alone(config, &INFO, Alone::Lora);
    };
    let (lora, targets, train_also) = read(map)?;
    Ok(Some(Loaded { method: Box::new(lora), targets, train_also }))
}

/// The LoRA of `config` where its file fits only a base without the start, as a method that saves what it is loaded with as a
/// plain LoRA of twice the rank, which is what `peft` converts such files to. `None` where the file is plain, or none of a LoRA.
///
/// # Errors
/// A configuration that cannot be read.
pub fn joined_start(config: &Value) -> Result<Option<Chosen>> {
    let Some(map) = config.as_object().filter(|_| peft::is_type(config, INFO.peft_type)) else {
        return Ok(None);
    };
    let (lora, targets, _) = read(map)?;
    let taken_off = lora.start.is_taken_off();
    Ok(taken_off.then(|| (Box::new(Lora { from_file: false, ..lora }) as Box<dyn Method>, targets)))
}

fn read(map: &Map<String, Value>) -> Result<(Lora, Option<Targets>, Vec<String>)> {
    let mut r = Reader::file(map);
    let train_also = peft::read_header(&mut r);
    let targets = peft::read_targets(&mut r);
    let parameters = parameters::read(&mut r);
    r.must_be_off(OFF);
    refuse_other_places(&mut r);
    r.ignore(SILENT);
    let start = read_start(&mut r);
    let mut lora = Lora {
        rank: r.count("r", 8, RANK_MAX),
        alpha: r.float("lora_alpha", 8.0),
        root_scaling: r.flag("use_rslora", false),
        rank_pattern: r.patterns("rank_pattern"),
        alpha_pattern: r.scales("alpha_pattern"),
        bias: Biases::read(&mut r, "lora_only"),
        product_bias: r.flag("lora_bias", false),
        start,
        search: read_eva(&mut r),
        kasa: Kasa::read(&mut r),
        blocks: Blocks::read(&mut r),
        form: Form::read(&mut r),
        dora: r.flag("use_dora", false),
        tied: r.flag("ensure_weight_tying", false),
        tokens: Tokens::read(&mut r),
        parameters,
        from_file: true,
        kept: SILENT.iter().filter_map(|key| Some((key.to_string(), map.get(*key)?.clone()))).collect(),
        ..Lora::default()
    };
    lora.dropout.elements = r.dropout("lora_dropout");
    check(&lora, &mut r);
    r.finish()?;
    Ok((lora, targets, train_also))
}

/// Variants that adapt what no model here has, or what this file does not hold.
fn refuse_other_places(r: &mut Reader<'_>) {
    for (key, reason) in [
        (
            "layer_replication",
            "it adapts a model whose layers are there several times, and layers are not copied here: write out the model with its \
             layers copied, and train on that",
        ),
        (
            "arrow_config",
            "it routes tokens among LoRAs that lie in other files, and this file holds none of them (peft itself cannot read it again): \
             use those LoRAs one by one, or add them with `engraft combine`",
        ),
    ] {
        let given = r.value(key).is_some_and(|v| v.as_array().is_none_or(|list| !list.is_empty()));
        if given {
            r.problem(format!("`{key}`: {reason}"));
        }
    }
}

/// `init_lora_weights`. Files of starts that are taken off the base fit only a base without them: where these follow from
/// the base alone they are made again, as `peft` does.
fn read_start(r: &mut Reader<'_>) -> Start {
    match r.value("init_lora_weights").cloned() {
        None | Some(Value::Bool(true)) => Start::Kaiming,
        Some(Value::Bool(false)) => Start::Random,
        Some(Value::String(name)) if name == "gaussian" => Start::Gaussian,
        Some(Value::String(name)) if name == "orthogonal" => Start::Orthogonal,
        Some(Value::String(name)) if name == "pissa" => Start::Pissa(None),
        Some(Value::String(name)) if name == "olora" => Start::Olora,
        Some(Value::String(name)) if name == "mica" => Start::Mica,
        Some(Value::String(name)) if name == "eva" => Start::Eva,
        Some(other) => {
            r.problem(format!(
                "`init_lora_weights` is {other}: such adapters fit only a base that was changed with them; save it in peft with `path_initial_model_for_weight_conversion` first"
            ));
            Start::Kaiming
        }
    }
}

/// `eva_config`, which says how a start was found and changes nothing any more.
fn read_eva(r: &mut Reader<'_>) -> Search {
    let found = r.value("eva_config").cloned().unwrap_or(Value::Null);
    Search { eva_config: found.is_object().then_some(found), ..Search::default() }
}

impl Lora {
    /// The keys that are this method's own.
    pub(super) fn written(&self, model: &Described<'_>) -> Map<String, Value> {
        // How factors began says nothing about what they are, and `peft` takes a bias of the product with the usual start or with
        // none alone, and MiCA without DoRA.
        let is_refused =
            self.product_bias && self.start != Start::Random || self.dora && self.start == Start::Mica;
        let start = match self.start {
            _ if is_refused => json!(true),
            Start::Gaussian => json!("gaussian"),
            Start::Random => json!(false),
            Start::Orthogonal => json!("orthogonal"),
            Start::Mica => json!("mica"),
            Start::Eva => json!("eva"),
            Start::Pissa(_) if self.from_file => json!("pissa"),
            Start::Olora if self.from_file => json!("olora"),
            Start::Kaiming | Start::Pissa(_) | Start::Olora | Start::Corda | Start::LoraGa => json!(true),
        };
        let eva =
            if self.start == Start::Eva && !is_refused { self.search.eva_config() } else { Value::Null };
        let (rank, alpha, ranks, alphas) = self.written_ranks(model);
        let mut map: Map<String, Value> = OFF
            .iter()
            .chain(FORMS)
            .chain(SILENT)
            .chain(PLACES)
            .map(|k| (k.to_string(), Value::Null))
            .collect();
        let own = json!({
            "alpha_pattern": alphas, "bias": self.bias.name("lora_only"), "ensure_weight_tying": self.tied, "eva_config": eva,
            "fan_in_fan_out": false, "init_lora_weights": start, "loftq_config": {}, "lora_alpha": number(alpha),
            "layers_pattern": null, "layers_to_transform": null, "lora_bias": self.product_bias,
            "trainable_token_indices": self.tokens.written(), "lora_dropout": as_written(self.dropout.elements), "megatron_core": "megatron.core", "qalora_group_size": 16,
            "kasa_config": Kasa::config(self.kasa), "use_bdlora": Blocks::config(self.blocks.as_ref()), "r": rank, "rank_pattern": ranks, "use_dora": self.dora, "use_qalora": false, "use_rslora": self.root_scaling,
        });
        map.extend(own.as_object().cloned().unwrap_or_default());
        let parameters = Some(&self.parameters).filter(|names| !names.is_empty());
        map.insert("target_parameters".into(), json!(parameters));
        map.extend(self.kept.clone());
        self.form.write(&mut map);
        map
    }

    /// `r`, `lora_alpha`, `rank_pattern` and `alpha_pattern` of what is saved: twice the ranks at the same scale where a
    /// start is joined to the factors, what was dealt out where ranks were.
    fn written_ranks(&self, model: &Described<'_>) -> (usize, f64, Value, Value) {
        let (ranks, alphas) = (Pattern::table(&self.rank_pattern), Pattern::table(&self.alpha_pattern));
        if self.from_file || !(self.start.is_taken_off() || self.start == Start::Eva) {
            return (self.rank, self.alpha, ranks, alphas);
        }
        if self.start == Start::Eva {
            let (ranks, alphas) = self.dealt_ranks(model);
            return (self.rank, self.alpha, ranks, alphas);
        }
        // s = α/r stays as r doubles; so does α/√r.
        let by = if self.root_scaling { 2f64.sqrt() } else { 2.0 };
        let times = |patterns: &[Pattern], by: f64| {
            let of = |p: &Pattern| (p.text().to_owned(), number(p.value() * by));
            Value::Object(patterns.iter().map(of).collect())
        };
        (2 * self.rank, self.alpha * by, times(&self.rank_pattern, 2.0), times(&self.alpha_pattern, by))
    }

    /// `rank_pattern` and `alpha_pattern` after ranks were dealt out: modules by their paths, at the scale that they train with.
    fn dealt_ranks(&self, model: &Described<'_>) -> (Value, Value) {
        let (mut ranks, mut alphas) = (Map::new(), Map::new());
        for &id in model.chosen {
            let path = &model.sites.get(id).path;
            let of = |end: &str| {
                let name = format!("{}{path}.{end}", model.prefix);
                model.adapter.params().iter().find(|p| p.name == name).map(|p| p.param.value())
            };
            let (Some(a), Some(b)) = (of("lora_A.weight"), of("lora_B.weight")) else { continue };
            let rank = used_ranks(&a, &b);
            let by = rank as f64 / self.scale_at(path).0 as f64;
            let alpha = Pattern::find(&self.alpha_pattern, path).unwrap_or(self.alpha);
            let alpha = if self.root_scaling { alpha * by.sqrt() } else { alpha * by };
            if rank != self.rank {
                ranks.insert(path.clone(), json!(rank));
            }
            if alpha != self.alpha {
                alphas.insert(path.clone(), number(alpha));
            }
        }
        (Value::Object(ranks), Value::Object(alphas))
    }

    /// The tensors of the file: a mixer folded into A, a start that was taken off joined to the factors, ranks that got
    /// nothing left out.
    pub(super) fn plain(&self, tensors: Named, state: &Named) -> Result<Named> {
        // KaSA's part of the weight is made again from the weight.
        if self.from_file || self.kasa.is_some() {
            return Ok(tensors);
        }
        let find = |named: &Named, name: &str| named.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone());
        let taken_off = self.start.is_taken_off();
        let mut file = Named::new();
        for (name, value) in &tensors {
            let value = match (name.strip_suffix(".lora_A.weight"), name.strip_suffix(".lora_B.weight")) {
                (Some(path), _) => {
                    let mixed = match find(&tensors, &format!("{path}.lora_mixer")) {
                        Some(m) => m.matmul(&flat(value)?)?.reshape(value.shape())?,
                        None => value.clone(),
                    };
                    match find(state, &format!("{path}.lora_A.start")) {
                        Some(start) => cat(&[&mixed, &start], 0)?,
                        None => mixed,
                    }
                }
                (None, Some(path)) => match find(state, &format!("{path}.lora_B.start")) {
                    Some(start) => cat(&[value, &start.scale(-1.0)?], 1)?,
                    None => value.clone(),
                },
                _ if self.mixer != Mixer::None && name.ends_with(".lora_mixer") => continue,
                // A table's start is not taken off: ranks of zero, for the file says one rank of all.
                _ if taken_off && name.ends_with(".lora_embedding_A") => {
                    cat(&[value, &Tensor::zeros(value.shape())], 0)?
                }
                _ if taken_off && name.ends_with(".lora_embedding_B") => {
                    cat(&[value, &Tensor::zeros(value.shape())], 1)?
                }
                _ => value.clone(),
            };
            file.push((name.clone(), value));
        }
        if self.start == Start::Eva {
            leave_out_unused(&mut file)?;
        }
        Ok(file)
    }
}

/// What only the tensors of a file say.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    /// Inputs of each module's A, where the file says `use_qalora`.
    widths: HashMap<String, usize>,
    /// Whether MonteCLoRA has drawn nothing yet.
    undrawn: bool,
}

impl Found {
    /// `peft` starts what is drawn in the type of the model, and draws it in F32.
    pub fn in_type_of_model(&self, key: &str) -> bool {
        self.undrawn && DRAWN.iter().any(|end| key.ends_with(end))
    }
}

impl Lora {
    pub(super) fn look_at(&mut self, tensors: &Named) {
        // Variances are those of the start, each one.
        let start = |t: &Tensor| {
            t.to_vec().is_ok_and(|v| {
                v.iter().enumerate().all(|(i, v)| *v == f32::from(u8::from(i % (t.dim(0) + 1) == 0)))
            })
        };
        let mut variances = tensors.iter().filter(|(name, _)| name.ends_with(DRAWN[0])).peekable();
        self.found.undrawn = variances.peek().is_some() && variances.all(|(_, t)| start(t));
        if self.kept.get("use_qalora") == Some(&Value::Bool(true)) {
            let of = |(name, t): &(String, Tensor)| {
                let path = name.strip_prefix("base_model.model.")?.strip_suffix(".lora_A.weight")?;
                Some((path.to_owned(), t.width()))
            };
            self.found.widths = tensors.iter().filter_map(of).collect();
        }
    }

    /// Over GPTQ layers `peft` gives A the mean of each group of inputs; elsewhere it leaves a LoRA as it is.
    pub(super) fn refuse_pooled(&self, site: &Site, inn: usize) -> Result<()> {
        match self.found.widths.get(&site.path) {
            Some(&width) if width < inn => {
                let message = format!(
                    "its A reads {width} means of {inn} inputs: peft makes QALoRA over GPTQ layers alone, and such a base is not \
                     read here; train a LoRA over a base in NF4 (`quantize = \"nf4\"`) instead"
                );
                Err(Error::Site { path: site.path.clone(), message })
            }
            _ => Ok(()),
        }
    }
}

/// Cuts A and B to the ranks that got something.
fn leave_out_unused(file: &mut Named) -> Result<()> {
    for at in 0..file.len() {
        let Some(path) = file[at].0.strip_suffix(".lora_A.weight") else { continue };
        let b_name = format!("{path}.lora_B.weight");
        let Some(b_at) = file.iter().position(|(name, _)| *name == b_name) else { continue };
        let rank = used_ranks(&file[at].1, &file[b_at].1);
        file[at].1 = file[at].1.narrow(0, 0, rank)?;
        file[b_at].1 = file[b_at].1.narrow(1, 0, rank)?;
    }
    Ok(())
}

/// The number of the last rank whose row of A or column of B is not all zero; one where there is none, since `peft` knows no
/// rank of zero.
fn used_ranks(a: &Tensor, b: &Tensor) -> usize {
    let (Ok(rows), Ok(columns)) = (a.to_vec(), flat(b).and_then(|b| Ok(b.t()?.to_vec()?))) else {
        return a.dim(0);
    };
    let rank = a.dim(0);
    let zero = |values: &[f32], i: usize| {
        let width = values.len() / rank.max(1);
        values[i * width..(i + 1) * width].iter().all(|v| *v == 0.0)
    };
    (1..rank).rev().find(|&i| !zero(&rows, i) || !zero(&columns, i)).map_or(1, |last| last + 1)
}

/// What follows the first size made one.
fn flat(t: &Tensor) -> Result<Tensor> {
    Ok(t.reshape([t.dim(0), t.len() / t.dim(0).max(1)])?)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::testing::{chosen, config};

    #[test]
    fn starts_that_peft_refuses_beside_another_setting_are_not_named() {
        let start = |settings: Value| config(&[chosen("lora", settings)], &[])["init_lora_weights"].clone();
        assert_eq!(start(json!({ "init": "gaussian" })), "gaussian");
        for init in ["gaussian", "orthogonal", "mica", "kaiming"] {
            assert_eq!(start(json!({ "init": init, "rank": 2, "lora_bias": true })), true, "{init}");
        }
        assert_eq!(start(json!({ "init": "random", "lora_bias": true })), false);
        assert_eq!(start(json!({ "init": "mica", "rank": 2 })), "mica");
        assert_eq!(start(json!({ "init": "mica", "rank": 2, "dora": true })), true);
    }
}
