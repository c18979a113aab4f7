//! LoRA files of other programs, recognised by the names of their tensors.
//!
//! `loralib` has `PATH.lora_A` and `PATH.lora_B` beside tensors trained whole; kohya's scripts `PATH_WITH_UNDERSCORES.lora_down.weight`,
//! `lora_up` and a scalar `alpha`; diffusers `PATH.to_q_lora.down.weight`, then `PATH.to_q.lora.down.weight` and in a text encoder
//! `PATH.q_proj.lora_linear_layer.down.weight`, and since it uses `peft` `PATH.lora_A.weight`; the first LoRA for diffusion models
//! (cloneofsimo) `unet:NUMBER:down`. Only forms that name modules of models that are here can be made `peft`'s; the others are
//! listed.

use std::collections::{BTreeMap, BTreeSet};

use engraft_nn::{Error, Result};
use serde_json::{Value, json};

use crate::Named;

/// One program's way to name factors.
struct Form {
    name: &'static str,
    a: &'static str,
    b: &'static str,
    alpha: Option<&'static str>,
    /// Whether its paths are those of a model in Hugging Face form.
    convertible: bool,
}

/// What the names of `peft`'s files begin with.
pub(crate) const PREFIX: &str = "base_model.model.";

const FORMS: [Form; 7] = [
    Form { name: "loralib", a: ".lora_A", b: ".lora_B", alpha: None, convertible: true },
    Form { name: "diffusers", a: "_lora.down.weight", b: "_lora.up.weight", alpha: None, convertible: false },
    Form { name: "diffusers", a: ".lora.down.weight", b: ".lora.up.weight", alpha: None, convertible: false },
    Form {
        name: "diffusers",
        a: ".lora_linear_layer.down.weight",
        b: ".lora_linear_layer.up.weight",
        alpha: None,
        convertible: false,
    },
    Form {
        name: "kohya",
        a: ".lora_down.weight",
        b: ".lora_up.weight",
        alpha: Some(".alpha"),
        convertible: false,
    },
    Form { name: "cloneofsimo", a: ":down", b: ":up", alpha: None, convertible: false },
    Form {
        name: "bare peft names",
        a: ".lora_A.weight",
        b: ".lora_B.weight",
        alpha: Some(".alpha"),
        convertible: true,
    },
];

/// A low-rank product in such a file.
#[derive(Clone, Debug, PartialEq)]
pub struct ForeignModule {
    /// What its names begin with.
    pub path: String,
    /// Its rank.
    pub rank: usize,
    /// (out, in), the windows of convolutions laid flat.
    pub shape: (usize, usize),
}

/// What such a file holds.
#[derive(Clone, Debug)]
pub struct Foreign {
    /// Whose names it uses.
    pub form: &'static str,
    /// Its products by path.
    pub modules: Vec<ForeignModule>,
    /// Names of further tensors.
    pub others: Vec<String>,
    /// Whether [`convert`] can make it an adapter.
    pub convertible: bool,
}

/// Recognises a LoRA file by the names and shapes of its tensors; `None` where it is none of another program.
pub fn recognise<'a>(tensors: impl Iterator<Item = (&'a str, &'a [usize])>) -> Option<Foreign> {
    let shapes: BTreeMap<&str, &[usize]> = tensors.collect();
    if shapes.keys().any(|name| name.starts_with("base_model.")) {
        return None;
    }
    let has_both = |form: &&Form| {
        let paths = shapes.keys().filter_map(|name| name.strip_suffix(form.a));
        let mut paths = paths.peekable();
        paths.peek().is_some() && paths.all(|path| shapes.contains_key(&*format!("{path}{}", form.b)))
    };
    let form = FORMS.iter().find(has_both)?;
    let mut found =
        Foreign { form: form.name, modules: vec![], others: vec![], convertible: form.convertible };
    for (name, a) in &shapes {
        let ends = [Some(form.b), form.alpha].into_iter().flatten().any(|end| name.ends_with(end));
        match name.strip_suffix(form.a) {
            Some(path) => {
                let out = shapes[&*format!("{path}{}", form.b)].first().copied().unwrap_or(0);
                let (rank, inn) = (a.first().copied().unwrap_or(0), a.iter().skip(1).product());
                found.modules.push(ForeignModule { path: path.to_owned(), rank, shape: (out, inn) });
            }
            None if ends => {}
            None => found.others.push((*name).to_owned()),
        }
    }
    // Of the present names only paths say whose model it is.
    if found.convertible && found.modules.iter().all(|module| is_of_diffusers(&module.path)) {
        (found.form, found.convertible) = ("diffusers", false);
    }
    Some(found)
}

/// Whether a module lies in a part of one of diffusers' pipelines: a U-Net, a transformer of its own kind, a text encoder.
fn is_of_diffusers(path: &str) -> bool {
    let mut parts = path.split('.');
    match parts.next() {
        Some("unet") => true,
        Some(part)
            if part.strip_prefix("text_encoder").is_some_and(|n| n.is_empty() || n.starts_with('_')) =>
        {
            true
        }
        Some("transformer") => parts.any(|part| {
            part.ends_with("transformer_blocks") || matches!(part, "to_q" | "to_k" | "to_v" | "to_out")
        }),
        _ => false,
    }
}

/// What to say of a file that holds no LoRA.
fn none_of(tensors: &Named) -> Error {
    let mut text = "expected a LoRA with names such as PATH.lora_A and PATH.lora_B, found ".to_owned();
    match tensors.first() {
        Some((name, _)) => text.push_str(&format!("{} tensors such as `{name}`", tensors.len())),
        None => text.push_str("no tensor at all"),
    }
    if tensors.iter().any(|(name, _)| name.starts_with(PREFIX)) {
        text.push_str(&format!(
            "; some begin with `{PREFIX}`, as peft's do, and some do not: these are two files in one"
        ));
    }
    Error::Unsupported(text)
}

/// Factors whose other half is not in the file, each with the name that is missing.
fn halves<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let names: BTreeSet<&str> = names.collect();
    let lacks = |name: &&str| {
        FORMS.iter().find_map(|form| {
            let other = match (name.strip_suffix(form.a), name.strip_suffix(form.b)) {
                (Some(path), _) => format!("{path}{}", form.b),
                (_, Some(path)) => format!("{path}{}", form.a),
                _ => return None,
            };
            (!names.contains(&*other))
                .then(|| format!("`{name}` needs `{other}`, which the file does not hold"))
        })
    };
    names.iter().filter_map(lacks).collect()
}

/// `peft`'s configuration and tensors of such a file. Its names must be those of the model's modules; alpha is not in it unless
/// the form has one.
///
/// # Errors
/// A file that is no LoRA of another program, a form whose modules are not those of a model here, an alpha that is not known.
pub fn convert(mut tensors: Named, alpha: Option<f64>) -> Result<(Value, Named)> {
    // The weights of an adapter of peft without their configuration.
    if tensors.iter().all(|(name, _)| name.starts_with(PREFIX)) {
        tensors.iter_mut().for_each(|(name, _)| name.replace_range(..PREFIX.len(), ""));
    }
    let shapes = || tensors.iter().map(|(name, t)| (name.as_str(), t.shape()));
    let unpaired = halves(shapes().map(|(name, _)| name));
    if let [first, rest @ ..] = &unpaired[..] {
        let more =
            if rest.is_empty() { String::new() } else { format!("; {} more have no other half", rest.len()) };
        return Err(Error::Mismatch(vec![format!("{first}{more}")]));
    }
    let Some(found) = recognise(shapes()) else { return Err(none_of(&tensors)) };
    if let Some(module) = found.modules.iter().find(|module| module.rank == 0) {
        return Err(Error::Mismatch(vec![format!(
            "{}: expected a rank of at least 1, found 0",
            module.path
        )]));
    }
    if !found.convertible {
        return Err(Error::Unsupported(format!(
            "a LoRA in the form of {} ({} modules) belongs to a diffusion model, and these are not there yet; `engraft inspect` lists it",
            found.form,
            found.modules.len()
        )));
    }
    let form = FORMS.iter().find(|form| form.name == found.form);
    let (a, b, scalar) = form.map_or((".lora_A", ".lora_B", None), |form| (form.a, form.b, form.alpha));
    let (mut written, mut alphas) = (Named::new(), BTreeMap::new());
    for (name, tensor) in tensors {
        let renamed = match (name.strip_suffix(a), name.strip_suffix(b)) {
            (Some(path), _) => format!("{path}.lora_A.weight"),
            (_, Some(path)) => format!("{path}.lora_B.weight"),
            _ => match scalar.and_then(|end| name.strip_suffix(end)) {
                Some(path) if tensor.len() == 1 => {
                    alphas.insert(path.to_owned(), f64::from(tensor.to_vec()?[0]));
                    continue;
                }
                _ => name,
            },
        };
        written.push((format!("{PREFIX}{renamed}"), tensor));
    }
    let Some(alpha) = alpha.or_else(|| alphas.values().next().copied()) else {
        return Err(Error::Unsupported(
            "the file does not hold alpha, by which the product is scaled (alpha/rank); give it as it was trained with, such as --alpha 16"
                .into(),
        ));
    };
    if !alpha.is_finite() || alpha <= 0.0 || alpha > f64::from(f32::MAX) {
        return Err(Error::Unsupported(format!("alpha: expected a number above 0, found {alpha}")));
    }
    let rank = found.modules.first().map_or(1, |m| m.rank);
    let others: BTreeSet<&str> =
        found.others.iter().filter_map(|name| Some(name.split_once('.')?.0)).collect();
    let ranks: serde_json::Map<String, Value> =
        found.modules.iter().filter(|m| m.rank != rank).map(|m| (m.path.clone(), json!(m.rank))).collect();
    alphas.retain(|_, value| *value != alpha);
    let config = json!({
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas,
        "target_modules": found.modules.iter().map(|m| &m.path).collect::<Vec<_>>(),
        "modules_to_save": if others.is_empty() { Value::Null } else { json!(others) },
    });
    Ok((config, written))
}

#[cfg(test)]
mod tests {
    use engraft_tensor::Tensor;

    use super::*;

    fn file(names: &[(&str, &[usize])]) -> Named {
        names.iter().map(|(name, shape)| ((*name).to_owned(), Tensor::full(2.0, *shape))).collect()
    }

    fn seen(tensors: &Named) -> Option<Foreign> {
        recognise(tensors.iter().map(|(name, t)| (name.as_str(), t.shape())))
    }

    #[test]
    fn files_are_known_by_their_names() {
        let forms: [(&str, Named); 6] = [
            (
                "loralib",
                file(&[("x.q.lora_A", &[2, 6]), ("x.q.lora_B", &[4, 2]), ("classifier.weight", &[3, 6])]),
            ),
            (
                "kohya",
                file(&[
                    ("lora_unet_q.lora_down.weight", &[2, 6, 3, 3]),
                    ("lora_unet_q.lora_up.weight", &[4, 2, 1, 1]),
                    ("lora_unet_q.alpha", &[]),
                ]),
            ),
            (
                "diffusers",
                file(&[("unet.to_q_lora.down.weight", &[2, 6]), ("unet.to_q_lora.up.weight", &[4, 2])]),
            ),
            (
                "diffusers",
                file(&[
                    ("unet.processor.to_q.lora.down.weight", &[2, 6]),
                    ("unet.processor.to_q.lora.up.weight", &[4, 2]),
                ]),
            ),
            (
                "diffusers",
                file(&[
                    ("text.q_proj.lora_linear_layer.down.weight", &[2, 6]),
                    ("text.q_proj.lora_linear_layer.up.weight", &[4, 2]),
                ]),
            ),
            ("cloneofsimo", file(&[("unet:0:down", &[2, 6]), ("unet:0:up", &[4, 2])])),
        ];
        for (form, tensors) in forms {
            let found = seen(&tensors).unwrap();
            assert_eq!((found.form, found.modules.len(), found.modules[0].rank), (form, 1, 2));
            assert_eq!(found.modules[0].shape.0, 4, "{form}");
            assert_eq!(found.others.len(), usize::from(form == "loralib"), "{form}: {:?}", found.others);
            assert_eq!(convert(tensors, Some(4.0)).is_ok(), form == "loralib", "{form}");
        }
        assert!(
            seen(&file(&[
                ("base_model.model.q.lora_A.weight", &[2, 6]),
                ("base_model.model.q.lora_B.weight", &[4, 2])
            ]))
            .is_none()
        );
        assert!(seen(&file(&[("x.lora_A", &[2, 6])])).is_none(), "half a product");
        let error = |names: &[(&str, &[usize])]| convert(file(names), Some(4.0)).unwrap_err().to_string();
        assert!(error(&[("x.weight", &[2])]).contains("1 tensors such as `x.weight`"));
        let half = error(&[("x.lora_A", &[2, 6]), ("y.lora_A", &[2, 6]), ("y.lora_B", &[4, 2])]);
        assert!(half.contains("`x.lora_A` needs `x.lora_B`"), "{half}");
        let half = error(&[("x.lora_B.weight", &[4, 2]), ("y.lora_B.weight", &[4, 2])]);
        assert!(half.contains("needs `x.lora_A.weight`") && half.contains("1 more"), "{half}");
        assert!(error(&[("x.lora_A", &[0, 6]), ("x.lora_B", &[4, 0])]).contains("found 0"));
    }

    #[test]
    fn present_names_say_by_their_paths_whose_model_it_is() {
        for (form, path) in [
            ("diffusers", "unet.mid_block.attentions.0.to_q"),
            ("diffusers", "transformer.transformer_blocks.0.attn.to_q"),
            ("diffusers", "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"),
            // GPT-2's trunk has the name of a part of diffusers, too.
            ("bare peft names", "transformer.h.0.attn.c_attn"),
            ("bare peft names", "model.layers.0.self_attn.q_proj"),
        ] {
            let (a, b) = (format!("{path}.lora_A.weight"), format!("{path}.lora_B.weight"));
            let tensors = file(&[(&a, &[2, 6]), (&b, &[4, 2])]);
            assert_eq!(seen(&tensors).unwrap().form, form, "{path}");
            assert_eq!(convert(tensors, Some(4.0)).is_ok(), form != "diffusers", "{path}");
        }
    }

    #[test]
    fn alpha_is_the_file_s_or_must_be_given() {
        let of = |names: &[(&str, &[usize])], alpha| convert(file(names), alpha);
        let names: [(&str, &[usize]); 3] =
            [("x.q.lora_A", &[2, 6]), ("x.q.lora_B", &[4, 2]), ("classifier.dense.weight", &[3, 6])];
        assert!(of(&names, None).unwrap_err().to_string().contains("--alpha"));
        let (config, tensors) = of(&names, Some(16.0)).unwrap();
        assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(2), &json!(16.0)));
        assert_eq!(config["modules_to_save"], json!(["classifier"]));
        assert!(tensors.iter().any(|(name, _)| name == "base_model.model.x.q.lora_A.weight"));
        let names: [(&str, &[usize]); 3] =
            [("x.q.lora_A.weight", &[2, 6]), ("x.q.lora_B.weight", &[4, 2]), ("x.q.alpha", &[1])];
        assert_eq!(of(&names, None).unwrap().0["lora_alpha"], json!(2.0));
        let names: [(&str, &[usize]); 2] = [
            ("base_model.model.x.q.lora_A.weight", &[2, 6]),
            ("base_model.model.x.q.lora_B.weight", &[4, 2]),
        ];
        let (config, tensors) = of(&names, Some(4.0)).unwrap();
        assert_eq!(config["target_modules"], json!(["x.q"]));
        assert!(
            tensors.iter().all(|(name, _)| names.iter().any(|(n, _)| n == name)),
            "peft's own names stay"
        );
    }
}
