//! What training changes, and what is stored beside it.

use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, RwLock};

use crate::error::{Result, shape_error};
use crate::tape::{Node, leaf};
use crate::tensor::Tensor;

/// A trainable tensor: patches read it, the optimizer writes it. Clones are the same parameter.
#[derive(Clone)]
pub struct Param(Arc<ParamInner>);

struct ParamInner {
    node: Arc<Node>,
    value: RwLock<Tensor>,
    version: AtomicU64,
    trainable: bool,
}

impl Param {
    /// A parameter that training changes.
    pub fn new(value: Tensor) -> Self {
        Self::with(value, true)
    }

    /// A parameter that is stored with an adapter but not trained (a frozen projection).
    pub fn frozen(value: Tensor) -> Self {
        Self::with(value, false)
    }

    fn with(value: Tensor, trainable: bool) -> Self {
        let node = Node::new("parameter", None);
        let value = RwLock::new(value.detach());
        Param(Arc::new(ParamInner { node, value, version: AtomicU64::new(0), trainable }))
    }

    /// The value; on the tape if it is trainable and recording is on.
    pub fn get(&self) -> Tensor {
        let value = self.value();
        if !self.0.trainable {
            return value;
        }
        leaf(value, &self.0.node)
    }

    /// The value, off the tape.
    pub fn value(&self) -> Tensor {
        self.0.value.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Replaces the value; the shape must stay.
    pub fn set(&self, value: Tensor) -> Result<()> {
        let mut slot = self.0.value.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        if slot.shape() != value.shape() {
            return shape_error("parameter", format!("{:?}", slot.shape()), format!("{:?}", value.shape()));
        }
        *slot = value.detach();
        self.0.version.fetch_add(1, Release);
        Ok(())
    }

    pub(crate) fn with_value(&self, f: impl FnOnce(&mut Tensor)) {
        let mut slot = self.0.value.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        f(&mut slot);
        self.0.version.fetch_add(1, Release);
    }

    /// How often the value has changed: what was computed from it holds while this stays the same.
    pub fn version(&self) -> u64 {
        self.0.version.load(Acquire)
    }

    /// Where its gradients arrive.
    pub(crate) fn node(&self) -> &Node {
        &self.0.node
    }

    /// Whether training changes it.
    pub fn trainable(&self) -> bool {
        self.0.trainable
    }

    /// Whether `other` is the same parameter.
    pub fn same(&self, other: &Param) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
