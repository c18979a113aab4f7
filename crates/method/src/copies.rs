//! What adapter files hold more than once.

use engraft_nn::{Error, Result, Site, SiteId, Sites, Value as Frozen};
use engraft_tensor::Tensor;
use serde_json::{Map, Value};

use crate::Named;
use crate::tied::with_rows;

/// The decoder of the masked-word head whose bias `site` is: the bias lies beside it, in the module above.
pub(crate) fn decoder_of<'s>(site: &Site, sites: &'s Sites) -> Option<&'s Site> {
    let decoder = format!("{}.decoder", site.path.strip_suffix(".bias")?);
    sites.iter().find(|s| s.is_weight() && s.path == decoder)
}

/// The bias that the layer `site` adds, also where it lies beside it.
pub(crate) fn bias_of<'s>(site: &Site, sites: &'s Sites) -> Option<&'s Site> {
    let beside = |s: &&Site| decoder_of(s, sites).is_some_and(|decoder| decoder.id == site.id);
    sites.bias_of(&site.path).or_else(|| sites.iter().find(beside))
}

/// The bias of a masked-word head has two names in files, `X.bias` and that of the decoder, `X.decoder.bias` or below a changed
/// decoder `X.decoder.base_layer.bias`; the second is the one that is added, and stays under the name of the model's site. Below
/// rows of tokens none is added: it is there as it was, unless all biases are trained.
pub(crate) fn one_bias_a_head(mut tensors: Named, config: &Value, sites: &Sites) -> Named {
    let all = config.as_object().is_some_and(all_biases);
    for site in sites.iter() {
        let Some(decoder) = decoder_of(site, sites) else { continue };
        let outer = key(&site.path);
        for end in ["bias", "base_layer.bias", BELOW_ROWS] {
            let inner = key(&format!("{}.{end}", decoder.path));
            if tensors.iter().any(|(name, _)| *name == inner) {
                tensors.retain(|(name, _)| *name != outer && (all || end != BELOW_ROWS || *name != inner));
                let own = tensors.iter_mut().filter(|(name, _)| *name == inner);
                own.for_each(|(name, _)| name.clone_from(&outer));
            }
        }
    }
    tensors
}

/// The bias of a decoder below rows of tokens that are trained in it.
const BELOW_ROWS: &str = "token_adapter.base_layer.bias";

/// Writes the trained bias of a masked-word head as `peft` does: `X.bias` where the head is trained whole or all biases are, and
/// the decoder's name where that is so, where the decoder is trained whole and where it is one of the targets (`chosen`). A
/// decoder that is trained whole has a bias of its own, so that `X.bias` stays as it was.
pub(crate) fn biases_of_decoders(
    tensors: &mut Named,
    config: &Map<String, Value>,
    (train_also, chosen): (&[String], &[SiteId]),
    sites: &Sites,
) {
    let within = |path: &str| train_also.iter().any(|name| inside(name, path).is_some());
    // With the biases of its targets a LoRA has that below rows of tokens too, as it was.
    let of_targets = config.get("bias").and_then(Value::as_str) == Some("lora_only");
    for site in sites.iter() {
        let (Some(decoder), Frozen::Vector(base)) = (decoder_of(site, sites), &site.value) else { continue };
        let Some(at) = tensors.iter().position(|(name, _)| *name == key(&site.path)) else {
            if of_targets && has_rows(decoder, tensors, sites) {
                tensors.push((key(&format!("{}.{BELOW_ROWS}", decoder.path)), base.clone()));
            }
            continue;
        };
        let inner = format!("{}.bias", decoder.path);
        let (whole, all) = (within(&inner), all_biases(config));
        let below_rows = !whole && has_rows(decoder, tensors, sites);
        let wrapped = !whole && chosen.contains(&decoder.id);
        if !(whole || wrapped || all) {
            continue;
        }
        let value = tensors[at].1.clone();
        match (within(&site.path), all) {
            (false, true) if whole => tensors[at].1 = base.clone(),
            (false, false) => _ = tensors.remove(at),
            _ => {}
        }
        let inner = match (wrapped, below_rows) {
            (true, _) => format!("{}.base_layer.bias", decoder.path),
            (_, true) => format!("{}.{BELOW_ROWS}", decoder.path),
            _ => inner,
        };
        tensors.push((key(&inner), value));
    }
}

/// Whether `tensors` hold rows of tokens, beside factors, that `decoder` follows.
fn has_rows(decoder: &Site, tensors: &Named, sites: &Sites) -> bool {
    let rows = |site: &Site| {
        let key = key(&format!("{}.token_adapter.trainable_tokens_delta", site.path));
        tensors.iter().any(|(name, _)| *name == key)
    };
    let tables = sites.iter().filter(|site| site.is_weight() && rows(site));
    tables.into_iter().any(|table| with_rows(sites, table).any(|site| site.id == decoder.id))
}

/// The key of a tensor of the model.
fn key(path: &str) -> String {
    format!("base_model.model.{path}")
}

fn all_biases(config: &Map<String, Value>) -> bool {
    config.get("bias").and_then(Value::as_str) == Some("all")
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
    if !all_biases(config) {
        return Vec::new();
    }
    let mut copies = Vec::new();
    let biases = sites.iter().filter(|site| site.path.ends_with(".bias"));
    let named = biases.flat_map(|site| {
        let of_decoder = decoder_of(site, sites).map(|decoder| format!("{}.bias", decoder.path));
        [Some(site.path.clone()), of_decoder].into_iter().flatten().map(move |path| (site, path))
    });
    for (site, path) in named {
        let Frozen::Vector(base) = &site.value else { continue };
        let Some((module, rest)) = train_also.iter().find_map(|name| inside(name, &path)) else {
            continue;
        };
        if let Some((_, trained)) = tensors.iter().find(|(name, _)| *name == key(&path)) {
            let key = |part: &str| key(&format!("{module}.{part}.{rest}"));
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
