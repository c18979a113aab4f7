//! Fine-tuning methods, one file each, blind to models.
//!
//! A method is a configuration that fills an adapter with patches at the sites it was given, and hooks into training.
//! Files lie by the classes of the surveys. To add one: write its file, add `mod` and one line to [`METHODS`], commit
//! one fixture made elsewhere.

mod adapter_hub;
mod additive;
pub mod algebra;
mod assemble;
mod bases;
mod calibration;
mod choices;
mod classifier;
mod copies;
mod count;
mod elsewhere;
mod entry;
pub mod foreign;
mod formula;
mod hybrid;
mod layers;
mod names;
mod neurons;
mod peft;
mod prompts;
mod read;
mod reparameterized;
mod run;
mod selective;
mod shared;
#[cfg(test)]
mod testing;
mod tied;
mod transposed;
mod written;

use std::sync::Arc;

use engraft_nn::{
    Adapter, Builder, Error, Inputs, Model, ModelInfo, Output, Pass, Resolution, Result, Site, SiteId, Sites,
    Targets,
};
use engraft_tensor::{Gradients, Tensor};
use serde_json::{Map, Value};

use additive::{
    adamix, adapter_fusion, adaptformer, beft, bottleneck, ciat, coda, compacter, hyperformer, ia3, krona_b,
    lst, mov, pha, reft, res_tuning, side_tuning, sparse_adapter, ssf,
};
use hybrid::{mam, propetl, s4, unipelt};
use prompts::{
    apt, cartridge, dept, idpg, llama_adapter, llama_adapter_v2, lpt, mpt, p_tuning, prefix, prompt, smop,
    vpt, xprompt,
};
use reparameterized::{
    adalora, adamss, autolora, bilora, boft, c3a, capaboost, deft, delora, dvora, dylora, fourierft, frod,
    glora, gralora, hira, hiwi, hra, kadaptation, krona, lily, loha, lokr, lora, loramoe, miss, molora, nola,
    oft, osf, peanut, periodiclora, phm, poly, psoft, pvera, randlora, road, rosa, said, sora, tinylora,
    unilora, vblora, vera, waveft, xlora,
};
use selective::{
    bitfit, child_tuning, diff_pruning, far, fish, full, gps, lisa, ln_tuning, lt_sft, pafi, random_mask,
    sam_mask, shira, sift, spt, supertuning, top_layers, trainable_tokens,
};

pub use adapter_hub::{HubDirectory, HubFiles, adapter_hub};
pub use assemble::{Attached, Chosen, LoadedAdapter, Named, attach, load_adapter, save_adapter};
pub use calibration::{Calibration, Observe, Seen, observe};
pub use choices::choose;
pub use elsewhere::elsewhere;
pub use entry::{Entry, Field, FieldKind, Info, Loaded, Settings, find, from_file};
pub use formula::SIZES;
pub use layers::settle;
pub use names::{prefix, stored_as};
pub use neurons::{active_neurons, overlap};
pub use peft::in_present_names;
pub use prompts::transfer::prompt_similarity;
pub use reparameterized::dylora::sliced_dylora;
pub use reparameterized::lora::joined_start;
pub use run::{Ahead, Forget, Part, Step, Update};
pub use shared::branches::{Branch, Branches, Form, Reads};
pub use transposed::not_in_peft;

/// Every method, in the order of the documentation.
pub static METHODS: &[&Entry] = &[
    &lora::ENTRY,
    &adalora::ENTRY,
    &sora::ENTRY,
    &dylora::ENTRY,
    &capaboost::ENTRY,
    &periodiclora::ENTRY,
    &autolora::ENTRY,
    &bilora::ENTRY,
    &molora::ENTRY,
    &loramoe::ENTRY,
    &xlora::ENTRY,
    &poly::ENTRY,
    &rosa::ENTRY,
    &loha::ENTRY,
    &lokr::ENTRY,
    &krona::ENTRY,
    &kadaptation::ENTRY,
    &phm::ENTRY,
    &vera::ENTRY,
    &dvora::ENTRY,
    &pvera::ENTRY,
    &vblora::ENTRY,
    &unilora::ENTRY,
    &randlora::ENTRY,
    &fourierft::ENTRY,
    &waveft::ENTRY,
    &c3a::ENTRY,
    &miss::ENTRY,
    &nola::ENTRY,
    &said::ENTRY,
    &ia3::ENTRY,
    &bitfit::ENTRY,
    &ln_tuning::ENTRY,
    &hira::ENTRY,
    &hra::ENTRY,
    &road::ENTRY,
    &oft::ENTRY,
    &boft::ENTRY,
    &delora::ENTRY,
    &gralora::ENTRY,
    &glora::ENTRY,
    &deft::ENTRY,
    &peanut::ENTRY,
    &lily::ENTRY,
    &psoft::ENTRY,
    &tinylora::ENTRY,
    &osf::ENTRY,
    &frod::ENTRY,
    &adamss::ENTRY,
    &hiwi::ENTRY,
    &beft::ENTRY,
    &bottleneck::ENTRY,
    &adapter_fusion::ENTRY,
    &adamix::ENTRY,
    &hyperformer::ENTRY,
    &pha::ENTRY,
    &coda::ENTRY,
    &compacter::ENTRY,
    &krona_b::ENTRY,
    &ciat::ENTRY,
    &adaptformer::ENTRY,
    &ssf::ENTRY,
    &mov::ENTRY,
    &reft::ENTRY,
    &lst::ENTRY,
    &side_tuning::ENTRY,
    &res_tuning::ENTRY,
    &sparse_adapter::ENTRY,
    &prompt::ENTRY,
    &p_tuning::ENTRY,
    &mpt::ENTRY,
    &dept::ENTRY,
    &xprompt::ENTRY,
    &prefix::ENTRY,
    &cartridge::ENTRY,
    &llama_adapter::ENTRY,
    &llama_adapter_v2::ENTRY,
    &vpt::ENTRY,
    &idpg::ENTRY,
    &smop::ENTRY,
    &lpt::ENTRY,
    &apt::ENTRY,
    &unipelt::ENTRY,
    &mam::ENTRY,
    &propetl::ENTRY,
    &s4::ENTRY,
    &full::FULL,
    &full::HEAD,
    &top_layers::ENTRY,
    &trainable_tokens::ENTRY,
    &shira::ENTRY,
    &supertuning::ENTRY,
    &random_mask::ENTRY,
    &pafi::ENTRY,
    &fish::ENTRY,
    &sam_mask::ENTRY,
    &sift::ENTRY,
    &gps::ENTRY,
    &spt::ENTRY,
    &child_tuning::ENTRY,
    &lt_sft::ENTRY,
    &diff_pruning::ENTRY,
    &far::ENTRY,
    &lisa::ENTRY,
];

/// A configured method.
pub trait Method: Send + Sync {
    /// What it is.
    fn info(&self) -> &'static Info;

    /// How many numbers it trains in a model of one stack as its settings stand by default, where it has sites of its own: a sum of
    /// products of [`SIZES`] and settings, what else it names behind a comma, and words behind a semicolon.
    fn formula(&self) -> Option<&'static str> {
        None
    }

    /// Takes the saved adapters that a setting of [`FieldKind::Adapters`] names, in its order, before anything is attached.
    fn take_adapters(&mut self, setting: &str, _adapters: Vec<SavedAdapter>) -> Result<()> {
        Err(Error::Unsupported(format!("{} reads no adapters for `{setting}`", self.info().title)))
    }

    /// Attaches patches at `b.targets()` (or, for methods that have sites of their own kind, at those).
    fn attach(&self, b: &mut Builder<'_>) -> Result<()>;

    /// Whether a choice of layers says where it changes something, of a method that has sites of its own: it is shown the sites of
    /// these layers alone.
    fn by_layers(&self) -> bool {
        false
    }

    /// Goes without the blocks of these numbers, a decoder's counted on from an encoder's, where it has a setting for that which its
    /// files hold; whether it has.
    fn leave_out(&mut self, _blocks: &[usize]) -> bool {
        false
    }

    /// Factor on the learning rate of a parameter group.
    fn learning_rate_factor(&self, _group: &str) -> f32 {
        1.0
    }

    /// Whether weight decay reaches a parameter group.
    fn decays(&self, _group: &str) -> bool {
        true
    }

    /// Whether tensors may be without a gradient in some steps (stages of a run, blocks in turn), so that nobody is warned.
    fn rests(&self) -> bool {
        false
    }

    /// An error where the run that lies ahead cannot be made with these settings: told with the recipe's other mistakes, before
    /// anything is written.
    fn suits(&self, _run: &Ahead) -> Result<()> {
        Ok(())
    }

    /// How many tasks its adapter tells apart, for methods that have something of each.
    fn tasks(&self) -> Option<usize> {
        None
    }

    /// What to tell of settings that can be had at the sites `targets` and are hardly what was meant. A method that has no targets is
    /// given every site.
    fn doubts(&self, _targets: &[&Site]) -> Vec<String> {
        Vec::new()
    }

    /// What to tell of weights that its adapter changes beside its targets.
    fn followed(&self, _adapter: &Adapter, _sites: &Sites) -> Vec<String> {
        Vec::new()
    }

    /// What a key of one of its maps of patterns (`rank_pattern`) stands for.
    ///
    /// # Errors
    /// A text that is no regular expression.
    fn pattern(&self, text: &str) -> std::result::Result<engraft_nn::Pattern, String> {
        read::pattern(text)
    }

    /// Settings that may be chosen anew wherever a saved adapter is used, each with its key in the configuration.
    fn chosen_in_use(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// Before the first step of a new run: may run the base on training batches and set what it attached by what it saw
    /// (starts from activations or gradients, masks by importance). A run that is resumed or goes on from a saved adapter
    /// does not come here.
    fn prepare(&self, _adapter: &Arc<Adapter>, _base: &dyn Calibration) -> Result<()> {
        Ok(())
    }

    /// How many of the trained numbers of a new adapter, those of the method's parameters behind `prefix`, are room that
    /// [`Method::prepare`] deals out and leaves empty in the end.
    fn spare(&self, _adapter: &Adapter, _prefix: &str) -> usize {
        0
    }

    /// A scalar added to the loss.
    fn penalty(&self, _adapter: &Adapter, _step: Step) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// How much the divergence of two passes over each micro-batch, which draw apart, counts in the loss:
    /// ½·[KL(sg p₂ ‖ p₁) + KL(sg p₁ ‖ p₂)]; `None` takes one pass.
    fn consistency(&self) -> Option<f32> {
        None
    }

    /// The share of the training rows that a method of two levels keeps apart for its upper one; 0 for none.
    fn held_out(&self) -> f64 {
        0.0
    }

    /// Which rows a step reads. Steps of the two levels take turns, so that each goes through its own rows in order.
    fn part(&self, _step: Step) -> Part {
        Part::All
    }

    /// Before a forward with the adapter: may run the model without it (`first`) and leave tensors on the pass
    /// (routers such as X-LoRA). A pass that goes on from a cache shows the new tokens alone: what the whole text gave is
    /// kept by [`Pass::once`].
    fn before_forward(
        &self,
        _adapter: &Arc<Adapter>,
        _first: &dyn Fn() -> Result<Output>,
        _cx: &Pass,
    ) -> Result<()> {
        Ok(())
    }

    /// Whether `before_forward` asks for the first pass at every token that text is gone on with: the model without the adapter
    /// then has a cache of its own ([`Pass::beside`]).
    fn follows(&self) -> bool {
        false
    }

    /// Between backward and the update: may change gradients (masks, importance).
    fn after_backward(&self, _adapter: &Adapter, _gradients: &mut Gradients, _step: Step) -> Result<()> {
        Ok(())
    }

    /// After the update: may change parameters (proximal steps, pruning of ranks) and forget their moments.
    fn after_step(&self, _adapter: &Adapter, _moments: &mut dyn Forget, _step: Step) -> Result<()> {
        Ok(())
    }

    /// The adapter as one whose outputs at sublayers can be mixed with others', where it has such.
    fn branches(&self) -> Option<Box<dyn Branches>> {
        None
    }

    /// Whether training can go on from a saved adapter: an error where its file holds only what a forward needs.
    fn trains_on(&self) -> Result<()> {
        Ok(())
    }

    /// After training, before the adapter is saved.
    fn finish(&self, _adapter: &Adapter) -> Result<()> {
        Ok(())
    }

    /// The sites used when neither recipe nor file names any; `None` for methods that have sites of their own kind. Where
    /// queries, keys and values are one matrix, that matrix stands for each of them; roles that the model does not have (a
    /// gate) are left out.
    fn default_targets(&self, sites: &Sites) -> Option<Targets> {
        self.info().usual_targets(sites)
    }

    /// The sites that `targets` choose for this method: weights, unless it lives elsewhere.
    fn resolve(&self, targets: &Targets, sites: &Sites) -> Result<Resolution> {
        Ok(targets.resolve(sites)?)
    }

    /// Takes from the tensors of a file what its configuration says wrongly or not at all.
    fn read_shapes(&mut self, _tensors: &Named) {}

    /// The method's own keys of `adapter_config.json`, those about targets and the header left out.
    fn config(&self, model: &Described<'_>) -> Map<String, Value>;

    /// `peft_type` of its configuration.
    fn peft_type(&self) -> &'static str {
        self.info().peft_type
    }

    /// `peft_type` of what `adapter` is saved as: another method's where training has made it one.
    fn file_type(&self, _adapter: &Adapter) -> &'static str {
        self.peft_type()
    }

    /// Whether the file of `adapter` holds its parameter `name`.
    fn keeps(&self, _adapter: &Adapter, _name: &str) -> bool {
        true
    }

    /// Name in the adapter file of the parameter `name`.
    fn file_name(&self, name: &str) -> String {
        format!("base_model.model.{name}")
    }

    /// What the adapter's file holds of the method's saved parameters, by their names: these, unless it trains in another
    /// form than it saves (a mixer between factors, a start taken off the weights). `state` are those that are not saved.
    fn file_tensors(&self, tensors: Named, _state: &Named) -> Result<Named> {
        Ok(tensors)
    }

    /// The parameters, by their keys, of what a file holds: its tensors, unless it trains in another form than it saves and
    /// can have that back ([`Method::file_tensors`]).
    fn own_tensors(&self, tensors: Named) -> Result<Named> {
        Ok(tensors)
    }

    /// Type of the numbers that the file holds as `key`.
    fn stored_as(&self, _key: &str) -> Stored {
        Stored::F32
    }

    /// Whether `peft` keeps what it adds to the model as `key` in the model's type, where it makes the rest F32.
    fn in_type_of_model(&self, _key: &str) -> bool {
        false
    }

    /// Further names under which the file of `adapter` holds the same parameter.
    fn file_copies(&self, _name: &str, _adapter: &Adapter) -> Vec<String> {
        Vec::new()
    }
}

/// Lets the methods of an adapter look before its pass `cx` over `inputs`: what they ask of the model without it is computed
/// once for each, beside the cache where the method follows a text.
pub fn look_first(
    methods: &[Chosen],
    adapter: &Arc<Adapter>,
    model: &dyn Model,
    inputs: &Inputs,
    cx: &Pass,
) -> Result<()> {
    methods.iter().try_for_each(|(method, _)| {
        let alone = || if method.follows() { cx.beside() } else { Pass::new(inputs.layout.clone(), None) };
        method.before_forward(adapter, &|| model.features(inputs, &alone()), cx)
    })
}

/// How a file holds numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Stored {
    F32,
    F16,
    BF16,
    U8,
    I16,
    I32,
    I64,
}

/// The model that an adapter is saved for, and the sites its method was given.
pub struct Described<'a> {
    /// Sizes.
    pub info: &'a ModelInfo,
    /// All sites.
    pub sites: &'a Sites,
    /// The chosen ones, in model order.
    pub chosen: &'a [SiteId],
    /// The adapter, whose ranks training may have changed.
    pub adapter: &'a Adapter,
    /// What precedes the names of the method's own parameters in it, where it is one of several.
    pub prefix: &'a str,
    /// The base as the user named it.
    pub base_model: &'a str,
}

/// A saved adapter that another one is built on.
#[derive(Clone, Debug)]
pub struct SavedAdapter {
    /// Where it lies, as the recipe names it.
    pub path: String,
    /// Its `adapter_config.json`.
    pub config: Value,
    /// The tensors of its file.
    pub tensors: Named,
}
