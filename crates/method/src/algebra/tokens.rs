//! Rows of tokens (`trainable_token_indices`) of several adapters: brought together by the tokens they stand for.

use std::collections::BTreeMap;

use engraft_nn::{Error, Result};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;
use serde_json::{Map, Value, json};

use super::Term;
use super::factors::path_of;
use super::mean::means;

/// Where an adapter says which tokens its rows are.
const KEY: &str = "trainable_token_indices";
/// What ends the names of such rows, one a token.
pub(super) const ROWS: &str = ".token_adapter.trainable_tokens_delta";

/// Rows of one table: of each adapter that has some its weight, its tokens, and the rows [tokens, width].
pub(super) type Rows = Vec<(f64, Vec<i64>, Tensor)>;

/// The tokens whose rows `term` holds as `name`.
///
/// # Errors
/// A configuration that does not say which these are.
pub(super) fn of_rows(term: &Term, name: &str, rows: &Tensor) -> Result<Vec<i64>> {
    let path = path_of(name.strip_suffix(ROWS).unwrap_or(name));
    let found = match term.config.get(KEY) {
        // A table that shares its tensor with a named one has the same rows.
        Some(Value::Object(tables)) => {
            let named = tables.iter().find(|(table, _)| path.ends_with(table.as_str())).map(|(_, ids)| ids);
            named.or_else(|| tables.values().next().filter(|_| tables.len() == 1))
        }
        list => list,
    };
    let ids: Option<Vec<i64>> =
        found.and_then(Value::as_array).and_then(|ids| ids.iter().map(Value::as_i64).collect());
    ids.filter(|ids| rows.shape().len() == 2 && ids.len() == rows.dim(0)).ok_or_else(|| {
        Error::Mismatch(vec![format!(
            "{}: {name} is {:?}, and `{KEY}` does not name as many tokens",
            term.name,
            rows.shape()
        )])
    })
}

/// The tokens of all, each once, in the order in which they are first named.
fn united<'a>(lists: impl Iterator<Item = &'a Vec<i64>>) -> Vec<i64> {
    let mut all = Vec::new();
    for id in lists.flatten() {
        if !all.contains(id) {
            all.push(*id);
        }
    }
    all
}

/// Of every token the mean of the rows of those adapters that have one.
pub(super) fn aligned(name: &str, rows: &Rows) -> Result<Tensor> {
    let ids = united(rows.iter().map(|(_, ids, _)| ids));
    let mut by_token = BTreeMap::new();
    for (place, id) in ids.iter().enumerate() {
        let of_token = rows.iter().filter_map(|(weight, ids, rows)| {
            let row = ids.iter().position(|other| other == id)?;
            Some(rows.rows_between(row, row + 1).map(|row| (*weight, row)))
        });
        let of_token = of_token.collect::<engraft_tensor::Result<Vec<_>>>()?;
        by_token.insert(format!("{name}, row {place:09}"), of_token);
    }
    let rows = means(&by_token)?;
    Ok(cat(&rows.iter().map(|(_, row)| row).collect::<Vec<_>>(), 0)?)
}

/// `trainable_token_indices` of what [`aligned`] gives.
///
/// # Errors
/// Tables that adapters name in different ways.
pub(super) fn united_config(terms: &[Term]) -> Result<Value> {
    let mut given = terms.iter().filter_map(|t| Some((t, t.config.get(KEY).filter(|v| !v.is_null())?)));
    let Some((first, value)) = given.clone().next() else { return Ok(Value::Null) };
    if given.clone().all(|(_, other)| other == value) {
        return Ok(value.clone());
    }
    let lists = |value: &Value| -> Option<Vec<i64>> { value.as_array()?.iter().map(Value::as_i64).collect() };
    let Some(tables) = value.as_object() else {
        let all = given.clone().map(|(_, value)| lists(value)).collect::<Option<Vec<_>>>();
        let other = given.find(|(_, value)| lists(value).is_none()).map_or(first, |(other, _)| other);
        let all = all.ok_or_else(|| otherwise(first, other))?;
        return Ok(json!(united(all.iter())));
    };
    let mut found: Map<String, Value> = Map::new();
    for (term, value) in given {
        let own = value.as_object().ok_or_else(|| otherwise(first, term))?;
        for (table, ids) in own {
            let beside =
                |known: &str| known != table && (known.ends_with(table.as_str()) || table.ends_with(known));
            if tables.keys().chain(found.keys()).any(|known| beside(known)) {
                return Err(otherwise(first, term));
            }
            let ids = lists(ids).ok_or_else(|| otherwise(first, term))?;
            let before = found.get(table).and_then(lists).unwrap_or_default();
            found.insert(table.clone(), json!(united([before, ids].iter())));
        }
    }
    Ok(Value::Object(found))
}

fn otherwise(first: &Term, other: &Term) -> Error {
    Error::Unsupported(format!(
        "`{KEY}` names tables otherwise in {} and {}: {} and {}; write both in one form",
        first.name, other.name, first.config[KEY], other.config[KEY]
    ))
}
