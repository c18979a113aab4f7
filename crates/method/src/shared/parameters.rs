//! Names of matrices in place of their modules', as `peft`'s LoRA has them in `target_parameters`.

use std::borrow::Cow;

/// What names the matrix of a module.
pub(crate) const WEIGHT: &str = ".weight";

/// Whether `name` means the matrix of the module at `path`: it is the whole of its name, or the end from a dot on.
pub(crate) fn means(name: &str, path: &str) -> bool {
    let Some(module) = name.strip_suffix(WEIGHT) else { return false };
    path.strip_suffix(module).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// What patterns of ranks and scales are held against: the name of a matrix that is named by itself, else the module's.
pub(crate) fn pattern_name<'a>(names: &[String], path: &'a str) -> Cow<'a, str> {
    match names.iter().any(|name| means(name, path)) {
        true => format!("{path}{WEIGHT}").into(),
        false => path.into(),
    }
}
