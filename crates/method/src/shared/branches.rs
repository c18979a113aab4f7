//! Adapters whose outputs can be mixed with others' (AdapterFusion): each reads something at a sublayer and adds what it makes
//! of it to something that stays.

use engraft_nn::{Builder, Pass, Result, Role, Site, SiteId, Sublayer};
use engraft_tensor::Tensor;
use serde_json::{Map, Value};

/// Such an adapter at one sublayer.
pub trait Branch: Send + Sync {
    /// What it reads, and what it adds to.
    fn read(&self, s: &Sublayer<'_>) -> Result<(Tensor, Tensor)>;

    /// What it makes of x [tokens, width].
    fn branch(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor>;

    /// What the sublayer gives when `next`, the sum of what was added and what it was added to, is to go on.
    fn going_on(&self, next: Tensor, _s: &Sublayer<'_>) -> Result<Tensor> {
        Ok(next)
    }

    /// As [`engraft_nn::SublayerPatch::replaces_norm`].
    fn replaces_norm(&self) -> bool {
        false
    }
}

/// Such an adapter.
pub trait Branches: Send + Sync {
    /// Where it sits and what it reads.
    fn form(&self) -> Form;

    /// What keeps its outputs from being mixed.
    fn hindrances(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// The name that its tensors have in theirs, as AdapterHub's do; the tensors of others are named by their sites alone.
    fn name(&self) -> Option<&str> {
        None
    }

    /// What the tensor `key` of its file is called in the adapter that [`Branches::build`] makes as `name`; `None` where it is not
    /// of the adapter (a head trained beside it) or is there twice.
    fn tensor(&self, key: &str, name: &str) -> Option<String>;

    /// Its configuration, of which a fusion's file tells what it mixes.
    fn config(&self) -> Map<String, Value>;

    /// It at the sublayers of a model, called `name`.
    fn build(&self, b: &mut Builder<'_>, name: &str) -> Result<Vec<(SiteId, Box<dyn Branch>)>>;
}

/// Where an adapter sits, what it reads and what it adds to: what is mixed is alike in the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Form {
    /// At attention, cross-attention, MLP.
    pub places: [bool; 3],
    /// What it reads.
    pub reads: Reads,
    /// What it adds to.
    pub rest: Reads,
    /// Whether the model's own residual and norm follow.
    pub goes_on: bool,
}

/// Something at a sublayer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// The stream.
    Stream,
    /// What the sublayer reads.
    Input,
    /// What it gives.
    Output,
    /// Stream and output together, before a norm.
    Sum,
    /// Stream and output together, normed in a post-norm model.
    Normed,
}

impl Form {
    /// Whether it sits at sublayers of `role`.
    pub fn is_at(&self, role: Role) -> bool {
        let roles = [Role::Attention, Role::CrossAttention, Role::Mlp];
        roles.iter().zip(self.places).any(|(own, is_there)| is_there && *own == role)
    }

    /// Whether it sits at sublayers where `other` does.
    pub fn meets(&self, other: &Form) -> bool {
        self.places.iter().zip(other.places).any(|(here, there)| *here && there)
    }

    /// Beside the MLP, added to its output.
    pub fn beside_mlp(reads: Reads) -> Form {
        Form { places: [false, false, true], reads, rest: Reads::Output, goes_on: true }
    }
}
