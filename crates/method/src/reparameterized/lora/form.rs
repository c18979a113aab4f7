//! Forms of the product that are not W + s·B·A everywhere and always: VeLoRA and MonteCLoRA are another one in training,
//! aLoRA on some tokens. A LoRA has one of them at most, with neither DoRA, a mixer, KaSA nor blocks, as in `peft`.

use engraft_nn::{Builder, Error, Kind, Result, Site};
use serde_json::{Map, Value};

use super::alora::{Alora, Invoked};
use super::monteclora::{MonteClora, Sampler};
use super::velora::{Direction, Velora};
use crate::read::Reader;

/// Which form, with its settings.
#[derive(Clone, Debug, Default)]
pub(super) enum Form {
    #[default]
    Plain,
    Velora(Velora),
    MonteClora(MonteClora),
    Alora(Alora),
}

/// The form at one matrix.
#[derive(Clone)]
pub(super) enum At {
    Plain,
    Velora(Direction),
    MonteClora(Sampler),
    Alora(Invoked),
}

impl Form {
    /// The keys of a file, or of a recipe.
    pub fn read(r: &mut Reader<'_>) -> Form {
        let found = [
            Velora::read(r).map(Form::Velora),
            MonteClora::read(r).map(Form::MonteClora),
            Alora::read(r).map(Form::Alora),
        ];
        if found.iter().flatten().count() > 1 {
            r.problem("VeLoRA, MonteCLoRA and aLoRA cannot be combined");
        }
        found.into_iter().flatten().next().unwrap_or_default()
    }

    /// The keys of a file.
    pub fn write(&self, map: &mut Map<String, Value>) {
        match self {
            Form::Plain => {}
            Form::Velora(form) => _ = map.insert("velora_config".into(), form.written()),
            Form::MonteClora(form) => _ = map.insert("monteclora_config".into(), form.written()),
            Form::Alora(form) => _ = map.insert("alora_invocation_tokens".into(), form.written()),
        }
    }

    /// Its name, where it is not plain.
    pub fn name(&self) -> Option<&'static str> {
        match self {
            Form::Plain => None,
            Form::Velora(_) => Some("VeLoRA"),
            Form::MonteClora(_) => Some("MonteCLoRA"),
            Form::Alora(_) => Some("aLoRA"),
        }
    }

    /// What it needs of the model before its matrices.
    pub fn begin(&self, b: &mut Builder<'_>) -> Result<()> {
        if let Form::Alora(form) = self { form.watch(b) } else { Ok(()) }
    }

    /// The form at the matrix of `site`, which has `rank` ranks.
    pub fn at(&self, b: &mut Builder<'_>, site: &Site, rank: usize) -> Result<At> {
        match (self, &site.kind) {
            (Form::Plain, _) => Ok(At::Plain),
            (Form::Velora(form), Kind::Linear { inn, .. }) => {
                Ok(At::Velora(form.attach(b, &site.path, *inn)?))
            }
            (Form::MonteClora(form), Kind::Linear { .. }) => {
                Ok(At::MonteClora(form.attach(b, &site.path, rank)?))
            }
            (Form::Alora(_), Kind::Linear { .. }) => Ok(At::Alora(Invoked::at(b, site)?)),
            _ => {
                let name = self.name().unwrap_or_default();
                let message = format!("{name} is for linear layers; leave this module out of the targets");
                Err(Error::Site { path: site.path.clone(), message })
            }
        }
    }
}

/// The table under `key` of a file and as it is written; `of` must know all that it holds.
pub(super) fn table<T>(
    r: &mut Reader<'_>,
    key: &'static str,
    of: impl FnOnce(&mut Reader<'_>) -> T,
) -> Option<(T, Value)> {
    let found = r.value(key).cloned()?;
    let Some(map) = found.as_object() else {
        r.problem(format!("`{key}`: expected a table, found {found}"));
        return None;
    };
    let mut own = Reader::file(map);
    let read = of(&mut own);
    if let Err(error) = own.finish() {
        r.problem(format!("`{key}`: {error}"));
    }
    Some((read, found))
}
