//! A model with an optional adapter, loaded as the command line asks, and its forward pass.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engraft_method::{Chosen, Settings, look_first};
use engraft_model::LoadOptions;
use engraft_nn::weight::Storage;
use engraft_nn::{Adapter, Inputs, KvCache, Model, Pass, Route, Site};
use engraft_store::{read_adapter, read_config};
use engraft_tensor::frozen::Precision;
use engraft_tensor::{Tensor, no_grad};
use engraft_train::{
    AttachedAdapter, label_names, labels_of_adapter, open_adapter_choosing, task_names, task_number,
    task_of_adapter,
};
use serde_json::Value;

use crate::context::Context;
use crate::failure::{BeforeWork, Failure, Outcome};

/// The type of the computation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16 weights.
    Bf16,
}

/// How the frozen weights are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantize {
    /// Four-bit normal floats in blocks of 64 with quantized scales.
    Nf4,
}

/// The arguments that choose a model.
#[derive(Clone, Debug, clap::Args)]
pub struct ModelArgs {
    /// A model directory in Hugging Face form, or a Hub id
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// An adapter directory, or a Hub id
    #[arg(long, value_name = "ADAPTER")]
    pub adapter: Option<String>,
    /// Leaves the adapter out of the model's first N layers
    #[arg(long, value_name = "N", requires = "adapter")]
    pub drop_layers: Option<usize>,
    /// Chooses anew what the adapter leaves open, such as eval_rank=4; `engraft methods NAME` tells what that is
    #[arg(long, value_name = "SETTING=VALUE", requires = "adapter")]
    pub choose: Vec<Choice>,
    /// Type of the computation
    #[arg(long, value_enum, default_value_t)]
    pub dtype: Dtype,
    /// Keeps the frozen linear weights in four bits
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub quantize: Option<Quantize>,
}

/// A setting that an adapter leaves open until it is used, and its value.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice(String, Value);

impl std::str::FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        let (name, value) = text.split_once('=').ok_or("expected SETTING=VALUE, such as eval_rank=4")?;
        let value = value.trim();
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        Ok(Choice(name.trim().to_owned(), value))
    }
}

/// The choices by setting.
///
/// # Errors
/// A setting twice.
pub fn choices(given: &[Choice]) -> Outcome<Settings> {
    let mut choices = Settings::new();
    for Choice(name, value) in given {
        if choices.insert(name.clone(), value.clone()).is_some() {
            return Err(Failure::before_work(format!("--choose {name}: given twice")));
        }
    }
    Ok(choices)
}

/// The adapter without its part in the first `count` layers (AdapterDrop).
///
/// # Errors
/// More layers than there are, and adapters whose layers cannot do without each other.
pub fn without_first(
    adapter: Option<Arc<Adapter>>,
    model: &dyn Model,
    count: usize,
) -> Outcome<Option<Arc<Adapter>>> {
    let (sites, layers) = (model.sites(), model.sites().blocks());
    if count > layers {
        return Err(Failure::before_work(format!("--drop-layers {count}: this model has {layers} layers")));
    }
    let Some(adapter) = adapter else { return Ok(None) };
    let within = |id| sites.number(sites.get(id)).is_some_and(|number| number < count);
    if count > 0 && !adapter.sites().into_iter().any(within) {
        let message =
            format!("--drop-layers {count}: the adapter has no part in these layers that could be left out");
        return Err(Failure::before_work(message));
    }
    let own = Arc::into_inner(adapter);
    let own = own.ok_or_else(|| Failure::before_work("--drop-layers: the adapter is in use elsewhere"))?;
    Ok(Some(Arc::new(own.without_first_blocks(sites, count).before_work()?)))
}

/// A loaded model with an optional adapter.
pub struct Engine {
    /// The model's directory.
    pub dir: PathBuf,
    /// `config.json`.
    pub config: Value,
    /// The model.
    pub model: Arc<dyn Model>,
    /// The adapter.
    pub adapter: Option<Arc<Adapter>>,
    /// The adapter's methods.
    pub methods: Vec<Chosen>,
    /// Further adapters that rows of the same batches may use, each with its methods.
    pub beside: Vec<(Arc<Adapter>, Vec<Chosen>)>,
    /// The names of the classes that the adapter was trained on.
    pub labels: Option<Vec<String>>,
    /// The names of the tasks that it was trained on, by their numbers.
    pub tasks: Vec<String>,
    /// Tensors of a head that the files do not hold in the size that is asked for.
    pub new_tensors: Vec<String>,
}

impl Engine {
    /// Loads what `args` name.
    ///
    /// # Errors
    /// Anything about the files; exit code 2.
    pub fn load(args: &ModelArgs, cx: &Context) -> Outcome<Engine> {
        let dir = cx.resolve(&args.model)?;
        let adapter = match &args.adapter {
            Some(name) => {
                let dir = cx.resolve(name)?;
                Some((dir.clone(), read_adapter(&dir, &cx.limits).before_work()?))
            }
            None => None,
        };
        let (mut task, mut labels) = (None, None);
        if let Some((_, files)) = &adapter {
            let config = read_config(&dir.join("config.json"), &cx.limits).before_work()?;
            task = task_of_adapter(&config, files);
            labels = labels_of_adapter(&config, files);
        }
        let options = LoadOptions {
            task,
            labels,
            precision: match args.dtype {
                Dtype::F32 => Precision::F32,
                Dtype::Bf16 => Precision::Bf16,
            },
            storage: match args.quantize {
                Some(Quantize::Nf4) => Storage::Nf4 { block: 64, double: true },
                None => Storage::Dense,
            },
            limits: cx.limits.clone(),
            ..LoadOptions::default()
        };
        let mut engine = Engine::read(&dir, &options)?;
        if let Some((dir, _)) = &adapter {
            engine.attach(dir, &choices(&args.choose)?, cx)?;
        }
        if let Some(count) = args.drop_layers {
            engine.adapter = without_first(engine.adapter.take(), engine.model.as_ref(), count)?;
        }
        engine.tell_random(cx);
        Ok(engine)
    }

    /// The model of a directory, without an adapter.
    pub fn open(dir: &Path, options: &LoadOptions, cx: &Context) -> Outcome<Engine> {
        let engine = Engine::read(dir, options)?;
        engine.tell_random(cx);
        Ok(engine)
    }

    /// As [`Engine::open`], and nothing is said of tensors that the files do not hold.
    pub fn read(dir: &Path, options: &LoadOptions) -> Outcome<Engine> {
        let loaded = engraft_model::load(dir, options).before_work()?;
        Ok(Engine {
            dir: dir.to_owned(),
            config: loaded.config,
            model: loaded.model,
            adapter: None,
            methods: Vec::new(),
            beside: Vec::new(),
            labels: None,
            tasks: Vec::new(),
            new_tensors: loaded.new_tensors,
        })
    }

    /// A note for every tensor that neither the files nor the adapter hold.
    fn tell_random(&self, cx: &Context) {
        for name in self.random(self.adapter.as_ref()) {
            cx.ui.note(&format!("{name} is not in the model's files and starts at random"));
        }
    }

    /// The tensors that neither the model's files nor `adapter` hold.
    fn random<'e>(&'e self, adapter: Option<&'e Arc<Adapter>>) -> impl Iterator<Item = &'e str> {
        let given = move |name: &&String| {
            let site = self.model.sites().iter().find(|site| site.tensor.as_ref() == Some(name));
            let patched = |site: &Site| adapter.is_some_and(|a| !a.at(site.id).is_empty());
            site.is_some_and(patched)
        };
        self.new_tensors.iter().filter(move |name| !given(name)).map(String::as_str)
    }

    /// The same for rows of the adapter `user`, 0 the engine's own and then those beside it, or of none.
    pub fn random_of(&self, user: Option<usize>) -> impl Iterator<Item = &str> {
        let mut all = self.adapter.iter().chain(self.beside.iter().map(|(adapter, _)| adapter));
        self.random(user.and_then(|number| all.nth(number)))
    }

    /// The adapter of a directory; its notes are said.
    fn opened(&self, dir: &Path, choices: &Settings, cx: &Context) -> Outcome<AttachedAdapter> {
        let opened = open_adapter_choosing(self.model.as_ref(), dir, &cx.limits, choices).map_err(
            |error| match error {
                engraft_train::Error::Choice(text) => Failure::before_work(format!("--choose: {text}")),
                other => Failure::before_work(format!(
                    "{} does not fit {}:\n{other}",
                    dir.display(),
                    self.dir.display()
                )),
            },
        )?;
        opened.notes.iter().for_each(|note| cx.ui.note(note));
        Ok(opened)
    }

    /// Opens another adapter, which rows may use beside the first.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn open_beside(&mut self, name: &str, cx: &Context) -> Outcome {
        let opened = self.opened(&cx.resolve(name)?, &Settings::new(), cx)?;
        self.beside.push((Arc::new(opened.adapter), opened.methods));
        Ok(())
    }

    /// Takes the adapter of a directory.
    fn attach(&mut self, dir: &Path, choices: &Settings, cx: &Context) -> Outcome {
        let opened = self.opened(dir, choices, cx)?;
        (self.adapter, self.methods) = (Some(Arc::new(opened.adapter)), opened.methods);
        self.labels = label_names(dir).before_work()?;
        self.tasks = task_names(dir).before_work()?;
        Ok(())
    }

    /// The number of the task that `given` names, or is.
    ///
    /// # Errors
    /// A name that the adapter does not know, an adapter that tells no tasks apart.
    pub fn task(&self, given: &str) -> Outcome<usize> {
        let Some(count) = self.methods.iter().filter_map(|(method, _)| method.tasks()).min() else {
            return Err(Failure::before_work(format!(
                "--task {given}: the adapter has nothing of single tasks; leave it out"
            )));
        };
        match (given.parse(), self.tasks.is_empty()) {
            (Ok(number), _) if number < count => Ok(number),
            (Ok(number), _) => {
                Err(Failure::before_work(format!("--task {number}: the adapter knows {count} tasks, from 0")))
            }
            (Err(_), false) => task_number(&self.tasks, given).before_work(),
            (Err(_), true) => Err(Failure::before_work(format!(
                "--task {given}: the adapter knows no tasks by name; give a number, from 0"
            ))),
        }
    }

    /// Tokens → logits of the real tokens [tokens, outputs], or [sequences, outputs].
    pub fn logits(&self, inputs: &Inputs) -> engraft_nn::Result<Tensor> {
        no_grad(|| self.model.forward(inputs, &self.pass(inputs, None)?))
    }

    /// As [`Engine::logits`], where row i uses the adapter `users[i]`, 0 the engine's own and then those beside it, or none.
    pub fn logits_of(&self, inputs: &Inputs, users: &[Option<usize>]) -> engraft_nn::Result<Tensor> {
        let own = self.adapter.iter().map(|adapter| (adapter, &self.methods));
        let all: Vec<_> =
            own.chain(self.beside.iter().map(|(adapter, methods)| (adapter, methods))).collect();
        let mut routes: Vec<Route> = Vec::new();
        let alike = users.chunk_by(|a, b| a == b);
        for rows in alike {
            let first = routes.last().map_or(0, |route| route.sequences.end);
            let adapter = rows[0].map(|number| all[number].0.clone());
            routes.push(Route { sequences: first..first + rows.len(), adapter });
        }
        no_grad(|| {
            let pass = Pass::with_routes(inputs.layout.clone(), routes)?;
            for (number, (adapter, methods)) in all.iter().enumerate() {
                if users.contains(&Some(number)) {
                    look_first(methods, adapter, self.model.as_ref(), inputs, &pass)?;
                }
            }
            self.model.forward(inputs, &pass)
        })
    }

    /// Tokens → logits after the last token of each sequence [sequences, outputs], reading and extending `cache`.
    pub fn last_logits(
        &self,
        inputs: &Inputs,
        cache: &Arc<std::sync::Mutex<KvCache>>,
    ) -> engraft_nn::Result<Tensor> {
        no_grad(|| {
            let out = self.model.features(inputs, &self.pass(inputs, Some(cache))?)?;
            let lasts: Vec<i64> = out.pass.layout().sequences().iter().map(|s| s.end as i64 - 1).collect();
            let rows = out.features.gather(&Tensor::from_i64(lasts.clone(), [lasts.len()])?)?;
            self.model.logits(&rows, &out.pass.select(&lasts)?)
        })
    }

    /// The pass of all sequences with the adapter, what its methods prepare included.
    fn pass(
        &self,
        inputs: &Inputs,
        cache: Option<&Arc<std::sync::Mutex<KvCache>>>,
    ) -> engraft_nn::Result<Pass> {
        let pass = Pass::new(inputs.layout.clone(), self.adapter.clone());
        let pass = match cache {
            Some(cache) => pass.cached(cache.clone()),
            None => pass,
        };
        if let Some(adapter) = &self.adapter {
            look_first(&self.methods, adapter, self.model.as_ref(), inputs, &pass)?;
        }
        Ok(pass)
    }

    /// Rows that the adapter adds to every sequence in the cache.
    pub fn virtual_rows(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| adapter.cache_rows())
    }
}
