//! Names of parameters in an adapter of one or several methods, and in its file.

use engraft_nn::{Adapter, Result};
use engraft_tensor::Tensor;

use crate::{Chosen, Method, Named, Stored};

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

/// What the file holds in place of the parameter `name`.
pub(crate) fn file_form(methods: &[Chosen], name: &str, value: &Tensor) -> Result<Option<Named>> {
    if let [(only, _)] = methods {
        return only.file_form(name, value);
    }
    let Some((method, number, rest)) = owner(methods, name) else { return Ok(None) };
    let form = method.file_form(rest, value)?;
    Ok(form.map(|form| form.into_iter().map(|(key, value)| (format!("{number}.{key}"), value)).collect()))
}

/// Type of the numbers that the file of an adapter of these methods holds as `key`.
pub fn stored_as(methods: &[Chosen], key: &str) -> Stored {
    match methods {
        [(only, _)] => only.stored_as(key),
        several => owner(several, key).map_or(Stored::F32, |(method, _, rest)| method.stored_as(rest)),
    }
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
