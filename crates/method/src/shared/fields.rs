//! Settings that many methods have, and short ways to write down one's own.

use crate::prompts::prompt::TOKENS_MAX;
use crate::{Field, FieldKind};

/// A whole number.
pub(crate) const fn int(
    name: &'static str,
    (min, max): (i64, i64),
    default: Option<&'static str>,
    doc: &'static str,
) -> Field {
    Field { name, kind: FieldKind::Int { min, max }, default, doc }
}

/// A number.
pub(crate) const fn float(
    name: &'static str,
    (min, max): (f64, f64),
    default: &'static str,
    doc: &'static str,
) -> Field {
    Field { name, kind: FieldKind::Float { min, max }, default: Some(default), doc }
}

/// `true` or `false`.
pub(crate) const fn flag(name: &'static str, default: &'static str, doc: &'static str) -> Field {
    Field { name, kind: FieldKind::Bool, default: Some(default), doc }
}

/// One of some words.
pub(crate) const fn choice(
    name: &'static str,
    words: &'static [&'static str],
    default: &'static str,
    doc: &'static str,
) -> Field {
    Field { name, kind: FieldKind::OneOf(words), default: Some(default), doc }
}

/// Keys and values before those of the tokens.
pub(crate) const fn extra_tokens(default: &'static str) -> Field {
    int("tokens", (1, TOKENS_MAX as i64), Some(default), "Number of extra keys and values in a layer.")
}

/// Read where saved adapters are given to a method.
pub(crate) const ANY_BASE: Field = flag(
    "any_base",
    "false",
    "Takes adapters whose bases are called differently: a model may lie in two places.",
);

/// The rank of a pair of factors.
pub(crate) const fn rank(default: &'static str) -> Field {
    int("rank", (1, 1024), Some(default), "Inner size r of the product.")
}

/// Its scale.
pub(crate) const fn alpha(default: &'static str) -> Field {
    float("alpha", (0.0, 1e9), default, "The product is scaled by alpha/rank.")
}

/// Dropout before A.
pub(crate) const fn dropout(default: &'static str) -> Field {
    float("dropout", (0.0, 0.999), default, "Dropout on the input of A while training.")
}
