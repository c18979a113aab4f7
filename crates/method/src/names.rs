//! Names of parameters in an adapter of one or several methods, and in its file.

use engraft_nn::{Adapter, Numbers, Site, Sites, Value as Frozen};

use crate::{Chosen, Method, Stored};

/// What precedes the names of a method's parameters.
pub fn prefix(methods: &[Chosen], number: usize) -> String {
    if methods.len() > 1 { format!("{number}.") } else { String::new() }
}

/// The method that made the parameter `name` of an adapter of several, and the name without that method's number.
fn owner<'m, 'n>(methods: &'m [Chosen], name: &'n str) -> Option<(&'m dyn Method, usize, &'n str)> {
    let (number, rest) = name.split_once('.')?;
    let number: usize = number.parse().ok()?;
    Some((methods.get(number)?.0.as_ref(), number, rest))
}

/// Whether the file holds the parameter `name`.
pub(crate) fn kept(methods: &[Chosen], adapter: &Adapter, name: &str) -> bool {
    match methods {
        [(only, _)] => only.keeps(adapter, name),
        several => owner(several, name).is_none_or(|(method, _, _)| method.keeps(adapter, name)),
    }
}

/// Type of the numbers that the file of an adapter of these methods holds as `key`.
///
/// `peft` makes what it adds to a model F32; what it trains of the model itself, and copies of that, keep the model's type.
pub fn stored_as(methods: &[Chosen], key: &str, sites: &Sites) -> Stored {
    let [(only, _)] = methods else {
        return owner(methods, key).map_or(Stored::F32, |(method, _, rest)| method.stored_as(rest));
    };
    let peft = !only.peft_type().starts_with("ENGRAFT_");
    match (only.stored_as(key), sites.numbers()) {
        (Stored::F32, Numbers::F16) if peft && is_of_model(key, sites) => Stored::F16,
        (Stored::F32, Numbers::BF16) if peft && is_of_model(key, sites) => Stored::BF16,
        (own, _) => own,
    }
}

/// Whether `key` holds one of the model's own tensors, trained or as it is.
fn is_of_model(key: &str, sites: &Sites) -> bool {
    /// What `peft` puts between a module and its tensors where it wraps or copies the module.
    const BETWEEN: [&str; 5] = [
        ".base_layer.",
        ".ln_tuning_layers.",
        ".modules_to_save.default.",
        ".modules_to_save.",
        ".original_module.",
    ];
    let Some(path) = key.strip_prefix("base_model.") else { return false };
    let wrapped = BETWEEN.iter().find(|part| path.contains(**part));
    let path = wrapped.map_or(path.to_owned(), |part| path.replacen(part, ".", 1));
    // Prompts do not wrap the model.
    let is = |own: &str| path == own || path.strip_prefix("model.") == Some(own);
    let named = |site: &Site| match site.path.strip_suffix(".bias") {
        _ if site.is_weight() => is(&format!("{}.weight", site.path)),
        // The second name of a masked-word head's bias.
        Some(stem) => is(&site.path) || is(&format!("{stem}.decoder.bias")),
        None => is(&site.path),
    };
    sites.iter().any(|site| !matches!(site.value, Frozen::None) && named(site))
}

/// The key in the file of the parameter `name`, and the further keys that hold it too.
pub(crate) fn file_names(methods: &[Chosen], adapter: &Adapter, name: &str) -> (String, Vec<String>) {
    if let [(only, _)] = methods {
        return (only.file_name(name), only.file_copies(name, adapter));
    }
    match owner(methods, name) {
        Some((method, n, rest)) => {
            let copies = method.file_copies(rest, adapter);
            (format!("{n}.{}", method.file_name(rest)), copies.iter().map(|c| format!("{n}.{c}")).collect())
        }
        None => (format!("base_model.model.{name}"), Vec::new()),
    }
}
