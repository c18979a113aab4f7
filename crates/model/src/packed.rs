//! Weights that several models of one process share: what is packed once for one of them serves the others.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use engraft_nn::Weight;
use engraft_nn::weight::Storage;
use engraft_tensor::frozen::Precision;

use crate::Result;

/// What a packed weight is: the values of a tensor's rows, and how they are kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Directory of the model.
    pub dir: PathBuf,
    /// Name of the tensor.
    pub tensor: String,
    /// First row of those that are taken, for a matrix that is cut.
    pub first: usize,
    /// Rows that are taken.
    pub rows: usize,
    /// How it is kept; `None` for a table, packed only where it is also multiplied by.
    pub storage: Option<Storage>,
    /// What it is multiplied in; `None` for a table that is only looked up.
    pub precision: Option<Precision>,
}

/// The weights packed so far. Clones share them; a weight goes with the last model that uses it.
#[derive(Clone, Default)]
pub struct Packed(Arc<Mutex<HashMap<Key, Weak<Weight>>>>);

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Packed")
    }
}

impl Packed {
    /// The weight `key`, made by `make` where no model has it.
    pub(crate) fn get(&self, key: Key, make: impl FnOnce() -> Result<Weight>) -> Result<Arc<Weight>> {
        let mut known = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(weight) = known.get(&key).and_then(Weak::upgrade) {
            return Ok(weight);
        }
        let weight = Arc::new(make()?);
        known.insert(key, Arc::downgrade(&weight));
        Ok(weight)
    }
}

/// The directory as one path, however it was named.
pub(crate) fn place(dir: &Path) -> PathBuf {
    dir.canonicalize().unwrap_or_else(|_| dir.to_owned())
}
