//! `trainable_token_indices` of LoRA and AdaLoRA: rows of embedding tables that are trained beside the factors.
//!
//! A list means the table of the model's input; a table of names, the modules whose paths end so. What shares the input's
//! tensor has the same rows, unless the file names several of these with other tokens. `token_adapter.trainable_tokens_delta`
//! [tokens, width] in the module holds the rows themselves. A head that follows may be a target too: its factors are added to a
//! weight that has these rows.

use engraft_nn::{Builder, Error, Result, Role, Site, SiteId};
use serde_json::Value;

use crate::read::Reader;
use crate::shared::token_rows;
use crate::tied::{own_name, with_rows};

/// Which rows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tokens {
    /// Rows of the modules whose paths end so; of the input's table where there is no name.
    parts: Vec<(Option<String>, Vec<usize>)>,
    /// As in the file.
    written: Value,
}

impl Tokens {
    pub fn read(r: &mut Reader<'_>) -> Tokens {
        let Some(written) = r.value("trainable_token_indices").cloned() else { return Tokens::default() };
        let rows = |v: &Value| -> Option<Vec<usize>> {
            v.as_array()?.iter().map(|n| Some(n.as_u64()? as usize)).collect()
        };
        let parts = match &written {
            Value::Object(map) => map.iter().map(|(name, v)| Some((Some(name.clone()), rows(v)?))).collect(),
            list => rows(list).map(|rows| vec![(None, rows)]),
        };
        let parts = parts.unwrap_or_else(|| {
            r.problem("`trainable_token_indices`: expected a list of token numbers, or a table of names with such lists");
            Vec::new()
        });
        Tokens { parts, written }
    }

    pub fn written(&self) -> Value {
        self.written.clone()
    }

    pub fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let sites = b.sites();
        let Some(table) = sites.iter().find(|s| s.role == Role::Embed && s.is_weight()) else {
            return match self.parts.is_empty() {
                true => Ok(()),
                false => {
                    Err(Error::Unsupported("`trainable_token_indices`: this model reads no tokens".into()))
                }
            };
        };
        let source = own_name(sites, table).unwrap_or_else(|| table.path.clone());
        let tied: Vec<&Site> = with_rows(sites, table).filter(|s| s.path != source).collect();
        let names = |name: &Option<String>, path: &str| {
            name.as_ref().is_none_or(|name| path.ends_with(name.as_str()))
        };
        let of_source = |part: &&(Option<String>, Vec<usize>)| names(&part.0, &source);
        let of_tied = |name: &str| tied.iter().any(|s| s.path.ends_with(name));
        let together: Vec<_> =
            self.parts.iter().filter(|p| of_source(p) || p.0.as_deref().is_some_and(of_tied)).collect();
        let agree = together.windows(2).all(|pair| pair[0].1 == pair[1].1);
        let follows = agree && together.iter().any(of_source);
        let targets: Vec<SiteId> = b.targets().iter().map(|s| s.id).collect();
        for part in &self.parts {
            let all: Vec<Vec<&Site>> = if of_source(&part) {
                let own = sites.iter().filter(|s| s.path == source);
                vec![if follows { own.chain(tied.iter().copied()).collect() } else { own.collect() }]
            } else {
                let apart = |s: &&Site| !(follows && tied.iter().any(|tied| tied.id == s.id));
                let named = sites.iter().filter(|s| s.is_weight() && names(&part.0, &s.path));
                named.filter(apart).map(|site| vec![site]).collect()
            };
            for (number, group) in all.iter().enumerate() {
                // What follows the first table may be adapted as well: factors are added to what the rows made.
                let whole = |(n, s): &(usize, &&Site)| *n == 0 && targets.contains(&s.id) || b.replaced(s.id);
                if let Some((_, site)) = group.iter().enumerate().find(whole) {
                    let message = "its rows are in `trainable_token_indices` and it is adapted as a whole; leave it out of one of the two".into();
                    return Err(Error::Site { path: site.path.clone(), message });
                }
                let module = if of_source(&part) { &source } else { &all[number][0].path };
                token_rows::train(
                    b,
                    &part.1,
                    &format!("{module}.token_adapter.trainable_tokens_delta"),
                    group,
                )?;
            }
        }
        Ok(())
    }
}
