//! Some of a model's layers for a method that has sites of its own: what it is shown of the model, by how much its prefixes move the
//! tokens all the same, and where files say which layers.
//!
//! Such a method knows nothing of the choice: [`Sites::within`] shows it the sites of the chosen layers, of each stack those with
//! these numbers. Its file has the numbers as `layers_to_transform`, unless the method has a setting for layers left out, as
//! AdapterHub's forms do ([`Method::leave_out`]).

use std::sync::Arc;

use engraft_nn::{
    Builder, Error, KeyValuePatch, KeyValues, Kind, LayerChoice, Matcher, Pass, Patch, Result, Role, Site,
    SiteId, Sites, Stack, Targets,
};
use engraft_tensor::Tensor;
use serde_json::Value;

use crate::Method;
use crate::read::Reader;

/// Precedes a type of `peft` where an adapter is in some layers alone, which `peft` has no key for.
pub(crate) const SOME_LAYERS: &str = "ENGRAFT_LAYERS_";

/// The key of files.
pub(crate) const KEY: &str = "layers_to_transform";

/// The choice of layers of a method that has sites of its own.
pub(crate) fn own(targets: Option<&Targets>) -> Option<&LayerChoice> {
    targets.filter(|targets| targets.matcher == Matcher::Own)?.layers.as_ref()
}

/// What a method with such targets is shown of the model.
pub(crate) fn view(targets: Option<&Targets>, sites: &Sites) -> Option<Arc<Sites>> {
    own(targets).map(|choice| Arc::new(sites.within(&choice.layers)))
}

/// The targets that a file's layers are, for a method that can be in some alone.
pub(crate) fn read(r: &mut Reader<'_>, method: &dyn Method) -> Option<Targets> {
    let given = method.by_layers() && r.value(KEY).is_some_and(|value| !value.is_null());
    let layers = r.counts(KEY).filter(|_| given)?;
    let layers = Some(LayerChoice { layers, ..LayerChoice::default() });
    Some(Targets { layers, ..Matcher::Own.into() })
}

/// The numbers of the blocks, a decoder's counted on from an encoder's, that lie in none of `layers`.
pub(crate) fn others(sites: &Sites, layers: &[usize]) -> Vec<usize> {
    let out = |site: &&Site| site.layer.is_some_and(|layer| !layers.contains(&layer));
    let mut numbers: Vec<usize> = sites.iter().filter(out).filter_map(|site| sites.number(site)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// The layers of a configuration of one method that says them, as blocks left out.
pub(crate) fn left_out(config: &Value, sites: &Sites) -> Vec<usize> {
    let layers = config.get(KEY).and_then(Value::as_array);
    let layers =
        layers.map(|all| all.iter().filter_map(Value::as_u64).map(|n| n as usize).collect::<Vec<_>>());
    layers.map_or(vec![], |layers| others(sites, &layers))
}

/// Gives a choice of layers to the method itself where its files have a place for it; what is left of the targets.
pub fn settle(method: &mut dyn Method, targets: Option<Targets>, sites: &Sites) -> Option<Targets> {
    let taken = own(targets.as_ref()).is_some_and(|choice| method.leave_out(&others(sites, &choice.layers)));
    targets.filter(|_| !taken)
}

/// The self-attentions, by the stacks that they lie in.
fn attentions(sites: &Sites) -> Vec<Vec<&Site>> {
    let of = |stack: Stack| {
        let is_its = |s: &&Site| s.stack == stack && s.role == Role::Attention;
        sites.of_kind(|k| matches!(k, Kind::KeyValue { .. })).filter(is_its).collect()
    };
    [Stack::Only, Stack::Encoder, Stack::Decoder].map(of).into()
}

/// By how many positions the patches at a site move the tokens.
fn moved(b: &Builder<'_>, site: SiteId) -> usize {
    let of = |patch: &Patch| match patch {
        Patch::KeyValue(rows) if rows.gate().is_none() => rows.moved(),
        _ => 0,
    };
    b.patches(site).iter().map(of).sum()
}

/// Attaches `method` to what `view` shows of `sites`. Tokens move by its prefixes as if these lay in every layer: positions are the
/// same in all of them, and are said by the first.
pub(crate) fn attach<'a>(
    method: &dyn Method,
    b: &mut Builder<'a>,
    sites: &'a Arc<Sites>,
    view: Option<&'a Arc<Sites>>,
) -> Result<()> {
    let Some(view) = view else { return method.attach(b) };
    let stacks = attentions(sites);
    let count = |b: &Builder<'_>| -> Vec<Vec<usize>> {
        stacks.iter().map(|stack| stack.iter().map(|site| moved(b, site.id)).collect()).collect()
    };
    let patches = |b: &Builder<'_>| sites.iter().map(|site| b.patches(site.id).len()).sum::<usize>();
    let (before, there) = (count(b), patches(b));
    b.show(Some(view));
    let attached = method.attach(b);
    b.show(None);
    attached?;
    if patches(b) == there {
        let title = method.info().title;
        return Err(Error::Unsupported(format!(
            "`layers`: there is nothing for {title} in these layers of this model"
        )));
    }
    for ((stack, before), after) in stacks.iter().zip(before).zip(count(b)) {
        let by: Vec<usize> = after.iter().zip(before).map(|(after, before)| after - before).collect();
        let (Some(first), Some(most)) = (stack.first(), by.iter().max()) else { continue };
        if let (Kind::KeyValue { heads, dim }, true) = (&first.kind, *most > by[0]) {
            let moves = Moves { by: most - by[0], heads: *heads, dim: *dim };
            b.patch(first.id, Patch::KeyValue(Box::new(moves)))?;
        }
    }
    Ok(())
}

/// No rows, and the move of a prefix that lies in later layers alone.
struct Moves {
    by: usize,
    heads: usize,
    dim: usize,
}

impl KeyValuePatch for Moves {
    fn count(&self) -> usize {
        0
    }

    fn moved(&self) -> usize {
        self.by
    }

    fn rows(&self, _input: &Tensor, _cx: &Pass) -> Result<KeyValues> {
        let none = Tensor::zeros([0, self.heads, self.dim]);
        Ok(KeyValues { keys: none.clone(), values: none })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use crate::{METHODS, load_adapter, save_adapter};
    use serde_json::json;

    fn in_layers(layers: &[usize]) -> Targets {
        let layers = Some(LayerChoice { layers: layers.to_vec(), ..LayerChoice::default() });
        Targets { layers, ..Matcher::Own.into() }
    }

    /// Every method that has such a choice leaves the other layers as they are, in its file too.
    #[test]
    fn the_other_layers_stay_as_they_are() {
        let (sites, info) = toy();
        let (mut seen, mut held) = (0, 0);
        // CoDA is no method for the toy, which writes.
        let all = METHODS.iter().filter(|entry| (entry.example)().by_layers() && entry.info.name != "coda");
        for entry in all {
            let mut method = (entry.example)();
            let targets = settle(method.as_mut(), Some(in_layers(&[1])), &sites);
            held += usize::from(targets.is_none());
            let methods = [(method, targets)];
            let a = attached(&methods, &[]);
            let rows_or_more = |id: &SiteId| {
                a.adapter.at(*id).iter().any(|p| !matches!(p, Patch::KeyValue(rows) if rows.count() == 0))
            };
            let changed: Vec<SiteId> = a.adapter.sites().into_iter().filter(rows_or_more).collect();
            let name = entry.info.name;
            assert!(!changed.is_empty(), "{name}");
            assert!(changed.iter().all(|id| sites.get(*id).layer != Some(0)), "{name} is in layer 0");
            let (whole, _) = ([((entry.example)(), None)], ());
            assert!(attached(&whole, &[]).adapter.trained_count() > a.adapter.trained_count(), "{name}");
            survives_saving(&methods, &["head"]);
            let (config, _) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
            let kind = config["peft_type"].as_str().unwrap();
            assert!(kind.starts_with("ENGRAFT_"), "{name}: `peft` would take {kind} for one of all layers");
            seen += 1;
        }
        assert!(seen >= 14 && held >= 4, "{seen} methods, {held} of which say it themselves");
    }

    #[test]
    fn tokens_move_as_they_do_with_a_prefix_everywhere() {
        let (sites, info) = toy();
        let methods = [(chosen("prefix", json!({ "tokens": 3 })).0, Some(in_layers(&[1])))];
        let a = attached(&methods, &[]);
        assert_eq!((a.adapter.prompt_rows(), a.adapter.trained_count()), (3, 3 * 2 * 4));
        let (config, tensors) = save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        assert_eq!(
            (&config["peft_type"], &config[KEY]),
            (&json!("ENGRAFT_LAYERS_PREFIX_TUNING"), &json!([1]))
        );
        let first = site_id(&sites, "layers.0.attn");
        let loaded = load_adapter(&config, tensors, &sites, &info).unwrap();
        for adapter in [&a.adapter, &loaded.adapter] {
            let [Patch::KeyValue(p)] = adapter.at(first) else { panic!("nothing moves the tokens") };
            assert_eq!((p.count(), p.moved()), (0, 3));
        }
        let both = [
            chosen("prefix", json!({ "tokens": 2 })),
            (chosen("apt", json!({ "tokens": 3 })).0, Some(in_layers(&[1]))),
        ];
        let both = attached(&both, &[]);
        let [Patch::KeyValue(p), Patch::KeyValue(q)] = both.adapter.at(first) else { panic!() };
        assert_eq!((p.moved(), q.moved()), (2, 3));
        let gated = [(chosen("mam", json!({ "projection": 0 })).0, Some(in_layers(&[1])))];
        assert!(attached(&gated, &[]).adapter.at(first).is_empty(), "AdapterHub's prefixes move no token");
    }

    #[test]
    fn what_has_no_layers_has_no_such_choice() {
        for name in ["prompt", "p_tuning", "smop", "s4", "lora", "reft", "lst", "llama_adapter", "pha"] {
            assert!(!(crate::find(name).unwrap().example)().by_layers(), "{name}");
        }
        let (sites, info) = toy();
        let methods = [(chosen("krona_b", json!({})).0, Some(in_layers(&[5])))];
        let error = crate::attach(&methods, &[], &sites, &info, 1).err().unwrap().to_string();
        assert!(error.contains("the chosen layers leave none"), "{error}");
    }
}
