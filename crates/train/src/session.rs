//! Everything a run works on, loaded and checked: model, adapter, data, plan.

use std::path::PathBuf;
use std::sync::Arc;

use engraft_data::{Dataset, Order, Tokenizer};
use engraft_method::{Chosen, prefix};
use engraft_nn::{Adapter, Model};
use engraft_recipe::{Data, Plan, Train};

use crate::batch::{Feed, FeedOptions, Masking};
use crate::evaluate::Evaluated;
use crate::fingerprint::Fingerprint;
use crate::objective::Objective;
use crate::target::Shift;
use crate::task_names::TaskNames;
use crate::{Error, Result};

/// What a recipe means on this machine. [`Session::open`] makes one; nothing has been written yet.
pub struct Session {
    /// Every setting, decided.
    pub plan: Plan,
    /// The model with its frozen weights.
    pub model: Arc<dyn Model>,
    /// Its directory.
    pub model_dir: PathBuf,
    /// Its memory by part.
    pub model_bytes: engraft_model::Bytes,
    /// Tensors of the model that were drawn anew (a head of another size).
    pub new_tensors: Vec<String>,
    /// What is trained.
    pub adapter: Arc<Adapter>,
    /// The adapter's methods with their targets.
    pub methods: Vec<Chosen>,
    /// Whether the adapter was saved before and training goes on from it.
    pub goes_on: bool,
    /// Modules trained as a whole.
    pub train_also: Vec<String>,
    /// The tokenizer; `tensors` data need none.
    pub tokenizer: Option<Tokenizer>,
    /// The training examples.
    pub train: Dataset,
    /// The evaluation examples.
    pub eval: Option<Dataset>,
    /// Names of the classes, in the order of their numbers.
    pub labels: Option<Vec<String>>,
    /// Names of the tasks, where the data have several.
    pub tasks: TaskNames,
    /// What is minimised.
    pub objective: Objective,
    /// How the labels of targets become decoder inputs, for encoder–decoder models.
    pub shift: Option<Shift>,
    /// What fixes the bits of the run.
    pub fingerprint: Fingerprint,
    /// Facts worth telling: guesses about the data, sizes that differ.
    pub notes: Vec<String>,
}

impl Session {
    /// An error where the adapter was read from a file that holds only what a forward needs: it can be scored, not trained on.
    pub fn expect_training(&self) -> Result<()> {
        if self.goes_on {
            self.methods.iter().try_for_each(|(method, _)| method.trains_on())?;
        }
        Ok(())
    }

    /// How many numbers are trained; ranks that are yet to be dealt out count as they will be.
    pub fn trained_count(&self) -> usize {
        let of = |(number, (method, _)): (usize, &Chosen)| {
            method.spare(&self.adapter, &prefix(&self.methods, number))
        };
        let spare: usize = if self.goes_on { 0 } else { self.methods.iter().enumerate().map(of).sum() };
        self.adapter.trained_count() - spare
    }

    /// How the training examples are batched.
    pub fn feed_options(&self) -> Result<FeedOptions> {
        let masking = self.masking()?;
        let writes = self.objective == Objective::CausalLm;
        let plan = &self.plan;
        let options = feed_options(&plan.data, &plan.train, plan.max_length, masking, self.shift);
        Ok(FeedOptions { writes, ..options })
    }

    /// The micro-batches of every step.
    pub fn feed(&self) -> Result<Feed<'_>> {
        Feed::new(&self.train, self.feed_options()?)
    }

    /// The micro-batches of the two levels, for methods that have two.
    ///
    /// # Errors
    /// Too few rows for both levels.
    pub(crate) fn levels(&self) -> Result<Option<[Feed<'_>; 2]>> {
        let held_out = self.methods.iter().map(|(m, _)| m.held_out()).fold(0.0, f64::max);
        let parts = || Feed::parts(&self.train, self.feed_options()?, held_out);
        (held_out > 0.0).then(parts).transpose()
    }

    /// How masks are drawn, for masked language models whose examples are text.
    pub fn masking(&self) -> Result<Option<Masking>> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(None) };
        if self.objective != Objective::MaskedLm {
            return Ok(None);
        }
        let mask_id = tokenizer.mask_id().ok_or_else(|| {
            Error::Setup("the tokenizer has no mask token, which masked language modelling needs".into())
        })?;
        let vocabulary = self.model.info().vocabulary.min(tokenizer.vocabulary()) as u32;
        Ok(Some(Masking { mask_id, vocabulary, seed: self.plan.train.seed }))
    }

    /// The model to be evaluated, with the adapter or alone.
    pub fn evaluated(&self, with_adapter: bool) -> Result<Evaluated<'_>> {
        Ok(Evaluated {
            model: &self.model,
            adapter: with_adapter.then_some(&self.adapter),
            methods: &self.methods,
            batch_size: self.plan.train.batch_size,
            masking: self.masking()?,
            shift: self.shift,
            tasks: self.tasks.names(),
        })
    }
}

/// How examples are batched.
pub(crate) fn feed_options(
    data: &Data,
    train: &Train,
    max_length: usize,
    masking: Option<Masking>,
    shift: Option<Shift>,
) -> FeedOptions {
    let seed = train.seed;
    let order = match (data.shuffle, data.group_by_length) {
        (false, _) => Order::File,
        (true, false) => Order::Shuffled { seed },
        (true, true) => Order::LengthGrouped { seed },
    };
    let packed = data.packing.then_some(max_length);
    FeedOptions {
        batch_size: train.batch_size,
        accumulation: train.gradient_accumulation,
        order,
        packed,
        masking,
        shift,
        temperature: data.temperature,
        writes: false,
    }
}
