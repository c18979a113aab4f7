//! What a method sees while it attaches: the sites it may use, the frozen values, a place for new tensors.

use std::cell::Cell;
use std::sync::Arc;

use engraft_tensor::{Param, Tensor};

use crate::adapter::{NamedParam, assign};
use crate::{
    Adapter, Error, Init, Kind, ModelInfo, Patch, Replacement, Result, Site, SiteId, Sites, Targets, Value,
};

/// How many times as large as its model an adapter may be.
const TIMES: usize = 4;

/// Numbers that an adapter of any model may have: half a gigabyte.
const ROOM: usize = 1 << 27;

/// Builds an [`Adapter`].
pub struct Builder<'a> {
    all: &'a Arc<Sites>,
    /// What the next method is shown of them.
    sites: &'a Arc<Sites>,
    info: &'a ModelInfo,
    targets: Vec<SiteId>,
    asked: Cell<bool>,
    choice: Option<Targets>,
    seed: u64,
    prefix: String,
    replaced: Vec<SiteId>,
    /// Whether new parameters are trained.
    trains: bool,
    /// Numbers made so far, and the most.
    made: usize,
    most: usize,
    adapter: Adapter,
}

impl<'a> Builder<'a> {
    /// Starts an empty adapter for a model; new tensors are drawn from `seed` and their names.
    pub fn new(sites: &'a Arc<Sites>, info: &'a ModelInfo, seed: u64) -> Self {
        let (targets, prefix, replaced) = (Vec::new(), String::new(), Vec::new());
        Builder {
            all: sites,
            sites,
            info,
            targets,
            asked: Cell::new(false),
            choice: None,
            seed,
            prefix,
            replaced,
            trains: true,
            made: 0,
            most: ROOM.max(TIMES * sites.parameters()),
            adapter: Adapter::named(sites.names()),
        }
    }

    /// The sites the next method was told to use.
    pub fn set_targets(&mut self, targets: Vec<SiteId>) {
        self.targets = targets;
        self.asked.set(false);
    }

    /// Whether that method has looked at them: others have sites of their own, whatever was chosen.
    pub fn heeds_targets(&self) -> bool {
        self.asked.get()
    }

    /// Says how these were chosen.
    pub fn set_choice(&mut self, choice: Option<Targets>) {
        self.choice = choice;
    }

    /// How the targets were chosen: a file's rules may count modules that are none of the sites.
    pub fn choice(&self) -> Option<&Targets> {
        self.choice.as_ref()
    }

    /// Puts `prefix` before the names of parameters made from here on (several methods in one adapter).
    pub fn set_prefix(&mut self, prefix: impl Into<String>) {
        self.prefix = prefix.into();
    }

    /// What precedes the names of parameters made from here on: it tells apart what two methods of one adapter leave on a
    /// pass.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The chosen sites, in model order.
    pub fn targets(&self) -> Vec<&'a Site> {
        self.asked.set(true);
        self.targets.iter().map(|&id| self.sites.get(id)).collect()
    }

    /// The sites of the model, of the layers that the method was given.
    pub fn sites(&self) -> &'a Arc<Sites> {
        self.sites
    }

    /// Shows the next method `some` of the sites ([`Sites::within`]), or all of them again.
    pub fn show(&mut self, some: Option<&'a Arc<Sites>>) {
        self.sites = some.unwrap_or(self.all);
    }

    /// The seed that new tensors are drawn from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Sizes of the model.
    pub fn info(&self) -> &'a ModelInfo {
        self.info
    }

    /// A new trained parameter, saved as `name`.
    pub fn param(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Param> {
        self.param_in_group(name, shape, init, "")
    }

    /// A new trained parameter of a group (see [`NamedParam::group`]).
    pub fn param_in_group(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
        group: &'static str,
    ) -> Result<Param> {
        let name = format!("{}{name}", self.prefix);
        let value = self.make(&name, shape, init)?;
        let param = if self.trains { Param::new(value) } else { Param::frozen(value) };
        self.add(name, param.clone(), group, true)?;
        Ok(param)
    }

    /// What `make` adds is a part of the adapter that is not trained. Where `values` are given, they are all that its tensors
    /// hold, by their names without the prefix.
    pub fn frozen<T>(
        &mut self,
        values: Option<Vec<(String, Tensor)>>,
        make: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let (first, trains) = (self.adapter.params().len(), std::mem::replace(&mut self.trains, false));
        let made = make(self);
        self.trains = trains;
        let made = made?;
        if let Some(values) = values {
            let named = values.into_iter().map(|(name, value)| (format!("{}{name}", self.prefix), value));
            assign(&self.adapter.params()[first..], named.collect())?;
        }
        Ok(made)
    }

    /// A trained parameter that a finished adapter does not need (a stage of training that ends): in checkpoints, not in the
    /// adapter's file.
    pub fn working(&mut self, name: &str, shape: &[usize], init: Init, group: &'static str) -> Result<Param> {
        let name = format!("{}{name}", self.prefix);
        let param = Param::new(self.make(&name, shape, init)?);
        self.add(name, param.clone(), group, false)?;
        Ok(param)
    }

    /// A tensor that belongs to the adapter but is not trained (a fixed projection).
    pub fn fixed(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Param> {
        let name = format!("{}{name}", self.prefix);
        let param = Param::frozen(self.make(&name, shape, init)?);
        self.add(name, param.clone(), "", true)?;
        Ok(param)
    }

    /// A tensor that training needs and a finished adapter does not (averages, counters, gates): in checkpoints, not in
    /// the adapter's file.
    pub fn state(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Param> {
        let name = format!("{}{name}", self.prefix);
        let param = Param::frozen(self.make(&name, shape, init)?);
        self.add(name, param.clone(), "", false)?;
        Ok(param)
    }

    /// A new tensor, unless sizes are absurd: nothing is allocated then.
    fn make(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let count = shape.iter().fold(1, |count: usize, size| count.saturating_mul(*size));
        self.made = self.made.saturating_add(count);
        if self.made > self.most {
            return Err(Error::Unsupported(format!(
                "`{name}` of shape {shape:?} makes this an adapter of {} numbers, more than {TIMES} times those of the model, which has \
                 {}; choose smaller sizes",
                self.made,
                self.sites.parameters()
            )));
        }
        init.tensor(shape, self.seed, name)
    }

    fn add(&mut self, name: String, param: Param, group: &'static str, saved: bool) -> Result<()> {
        if self.adapter.params().iter().any(|p| p.name == name) {
            return Err(Error::Unsupported(format!(
                "two methods make a tensor named `{name}`; let only one of them train it"
            )));
        }
        self.adapter.push_param(NamedParam { name, param, group, saved });
        Ok(())
    }

    /// Attaches a patch; its kind must fit the site's. A prompt or prefix of no rows that moves nothing is left out.
    pub fn patch(&mut self, site: SiteId, patch: Patch) -> Result<()> {
        let site = self.sites.get(site);
        if !patch.fits(&site.kind) {
            let message = format!("this kind of patch does not fit a {:?} site", site.kind);
            return Err(Error::Site { path: site.path.clone(), message });
        }
        let is_empty = match &patch {
            Patch::Prompt(rows) => rows.count() == 0,
            Patch::KeyValue(rows) => rows.count() == 0 && rows.moved() == 0,
            _ => false,
        };
        if !is_empty {
            self.adapter.push_patch(site.id, patch);
        }
        Ok(())
    }

    /// The trained parameter called `name`, where one was made before.
    pub fn trained(&self, name: &str) -> Option<Param> {
        let named = self.adapter.params().iter().find(|p| p.name == name && p.group.is_empty());
        named.map(|p| p.param.clone())
    }

    /// The patches that are at `site` so far, of earlier methods too.
    pub fn patches(&self, site: SiteId) -> &[Patch] {
        self.adapter.at(site)
    }

    /// Whether the value at `site` is already trained as a whole.
    pub fn replaced(&self, site: SiteId) -> bool {
        self.replaced.contains(&site)
    }

    /// Trains the frozen value at `site` as a whole, saved under the site's own name.
    pub fn replace(&mut self, site: SiteId) -> Result<()> {
        let site = self.sites.get(site);
        self.replace_as(site.id, &site.tensor_name())?;
        Ok(())
    }

    /// Trains the frozen value at `site` as a whole, saved as `name`.
    pub fn replace_as(&mut self, site: SiteId, name: &str) -> Result<Param> {
        let site = self.sites.get(site);
        let start = match (&site.kind, &site.value) {
            (Kind::Convolution { shape, .. }, Value::Weight(w)) => {
                crate::Base::dense(w.as_ref())?.reshape(*shape)?
            }
            (Kind::Linear { .. } | Kind::Embedding { .. }, Value::Weight(w)) => {
                crate::Base::dense(w.as_ref())?
            }
            (Kind::Vector { .. }, Value::Vector(v)) => v.clone(),
            _ => {
                let message = format!("a {:?} site holds no tensor to train", site.kind);
                return Err(Error::Site { path: site.path.clone(), message });
            }
        };
        let shape = start.shape().to_vec();
        let param = self.param(name, &shape, Init::Values(start))?;
        self.replaced.push(site.id);
        let patch: Patch = match site.kind {
            Kind::Vector { .. } => Patch::Vector(Box::new(Replacement(param.clone()))),
            _ => Patch::Weight(Box::new(Replacement(param.clone()))),
        };
        self.patch(site.id, patch)?;
        Ok(param)
    }

    /// Trains every tensor of the modules that `names` match (`peft`'s `modules_to_save`: the path of a module, or
    /// of one that it lies in, ends so). Gives the names that matched nothing.
    pub fn train_modules(&mut self, names: &[String]) -> Result<Vec<String>> {
        let mut dead = names.to_vec();
        let sites = self.all;
        for site in sites.iter().filter(|s| !matches!(s.value, Value::None)) {
            let parent = site.path.rsplit_once('.').map_or("", |(parent, _)| parent);
            let module = if site.is_weight() { &site.path } else { parent };
            // The bias of a masked-word head lies beside its decoder, and is the decoder's.
            let decoder = format!("{parent}.decoder");
            let decodes =
                site.path.ends_with(".bias") && sites.iter().any(|s| s.is_weight() && s.path == decoder);
            let mut hit = false;
            for name in names {
                if module_ends(name, module) || decodes && module_ends(name, &decoder) {
                    dead.retain(|d| d != name);
                    hit = true;
                }
            }
            if hit {
                self.replace(site.id)?;
            }
        }
        Ok(dead)
    }

    /// The finished adapter.
    pub fn finish(self) -> Adapter {
        self.adapter
    }
}

/// Whether the path of a module, or of one that it lies in, ends in `name`.
fn module_ends(name: &str, path: &str) -> bool {
    let ends = |at: usize| at == path.len() || path.as_bytes()[at] == b'.';
    !name.is_empty() && path.match_indices(name).any(|(at, _)| ends(at + name.len()))
}

/// Whether `path` lies in a module called `name`: `(^|.*\.)name($|\..*)`.
pub(crate) fn module_contains(name: &str, path: &str) -> bool {
    path.match_indices(name).any(|(at, _)| {
        let before = at == 0 || path.as_bytes()[at - 1] == b'.';
        let end = at + name.len();
        before && (end == path.len() || path.as_bytes()[end] == b'.')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Task;

    #[test]
    fn an_absurd_size_is_refused_before_anything_is_allocated() {
        let info = ModelInfo {
            architecture: "toy".into(),
            class: None,
            task: Task::CausalLm,
            width: 4,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 4,
            vocabulary: 4,
            outputs: 4,
            max_positions: 8,
            picture: None,
            any_size: None,
        };
        let sites = Arc::new(Sites::default());
        let mut b = Builder::new(&sites, &info, 1);
        assert!(b.param("small", &[8, 4], Init::Zeros).is_ok());
        for shape in [vec![1 << 20, 1 << 20], vec![usize::MAX, 3], vec![ROOM]] {
            let mut b = Builder::new(&sites, &info, 1);
            b.param("small", &[8, 4], Init::Zeros).unwrap();
            let error = b.fixed("large", &shape, Init::Normal(1.0)).err().unwrap().to_string();
            assert!(error.contains("`large` of shape") && error.contains("choose smaller sizes"), "{error}");
        }
    }
}
