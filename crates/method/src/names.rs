//! Names of parameters in an adapter of one or several methods, and in its file.

use engraft_nn::Adapter;

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
