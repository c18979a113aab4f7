//! What adapter files hold more than once.

use engraft_nn::{Error, Result, Sites, Value as Frozen};
use engraft_tensor::Tensor;
use serde_json::{Map, Value};

use crate::Named;

/// The bias of a masked-word head has two names in files, `X.bias` and `X.decoder.bias`; the second is the one that is
/// added, and stays under the name of the model's site.
pub(crate) fn one_bias_a_head(mut tensors: Named, sites: &Sites) -> Named {
    for site in sites.iter() {
        let Some(stem) = site.path.strip_suffix(".bias") else { continue };
        let [outer, inner] =
            [&site.path, &format!("{stem}.decoder.bias")].map(|p| format!("base_model.model.{p}"));
        if tensors.iter().any(|(name, _)| *name == inner) {
            tensors.retain(|(name, _)| *name != outer);
            tensors
                .iter_mut()
                .filter(|(name, _)| *name == inner)
                .for_each(|(name, _)| name.clone_from(&outer));
        }
    }
    tensors
}

/// Writes the bias of a masked-word head as `peft` asks for it where the head is trained whole: under both names, or, where
/// only the decoder is, under the decoder's alone.
pub(crate) fn biases_of_decoders(tensors: &mut Named, train_also: &[String], sites: &Sites) {
    for site in sites.iter() {
        let Some(stem) = site.path.strip_suffix(".bias") else { continue };
        let inner = format!("{stem}.decoder.bias");
        let within = |path: &str| train_also.iter().any(|name| inside(name, path).is_some());
        let decoder = sites.iter().any(|s| s.is_weight() && s.path == format!("{stem}.decoder"));
        let outer = format!("base_model.model.{}", site.path);
        let at = tensors.iter().position(|(key, _)| *key == outer).filter(|_| decoder && within(&inner));
        let Some(at) = at else { continue };
        let value = tensors[at].1.clone();
        if !within(&site.path) {
            tensors.remove(at);
        }
        tensors.push((format!("base_model.model.{inner}"), value));
    }
}

/// An error where a tensor that is in the file again, under another key, has other values there.
pub(crate) fn copies_are_equal(copied: &[(String, &String, Tensor)], given: &Named) -> Result<()> {
    let mut wrong = Vec::new();
    for (key, name, copy) in copied {
        let Some((_, first)) = given.iter().find(|(other, _)| other == *name) else { continue };
        if first.shape() != copy.shape() || first.to_vec()? != copy.to_vec()? {
            wrong.push(format!("{key}: expected the values of {name}, whose copy it is, found others"));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(Error::Mismatch(wrong)) }
}

/// With `bias = "all"` peft also writes the biases of a replaced module as they were; they change nothing.
pub(crate) fn stale(key: &str) -> bool {
    key.contains(".modules_to_save.") || key.contains(".original_module.")
}

/// What `peft` writes with `bias = "all"` of a module trained as a whole: its biases under two further names, as trained
/// (found in `tensors`) and as the base has them.
pub(crate) fn biases_of_saved(
    config: &Map<String, Value>,
    train_also: &[String],
    tensors: &Named,
    sites: &Sites,
) -> Named {
    if config.get("bias").and_then(Value::as_str) != Some("all") {
        return Vec::new();
    }
    let mut copies = Vec::new();
    for site in sites.iter() {
        let Frozen::Vector(base) = &site.value else { continue };
        let Some((module, rest)) = train_also.iter().find_map(|name| inside(name, &site.path)) else {
            continue;
        };
        let trained = tensors.iter().find(|(key, _)| *key == format!("base_model.model.{}", site.path));
        if let (true, Some((_, trained))) = (site.path.ends_with(".bias"), trained) {
            let key = |part: &str| format!("base_model.model.{module}.{part}.{rest}");
            // `peft` takes its own name for the adapter out of keys only where it is the last part but one.
            let own = if rest.contains('.') { "modules_to_save.default" } else { "modules_to_save" };
            copies.push((key(own), trained.clone()));
            copies.push((key("original_module"), base.clone()));
        }
    }
    copies
}

/// The module called `name` that `path` lies in, and the rest of the path.
fn inside<'a>(name: &str, path: &'a str) -> Option<(&'a str, &'a str)> {
    path.match_indices('.').map(|(at, _)| (&path[..at], &path[at + 1..])).find(|(module, _)| {
        *module == name || module.strip_suffix(name).is_some_and(|before| before.ends_with('.'))
    })
}
