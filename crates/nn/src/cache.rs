//! Keys and values kept from pass to pass, for generation.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::Span;
use engraft_tensor::ops::Spans;

use crate::attention::Prefix;
use crate::{Pass, Result};

/// Keys and values of the tokens so far, for generation. Each sequence owns `capacity` rows of one buffer a layer.
pub struct KvCache {
    capacity: usize,
    sequences: usize,
    layers: Vec<CachedLayer>,
    /// What cross-attention reads in each layer, by the first of the sequences that it is for: made once, the same for every step.
    sources: HashMap<(usize, usize), Attended>,
    /// What patches found in the first pass, by route and key: the first of its sequences, a row for each.
    kept: HashMap<Key, (usize, Tensor)>,
    /// What the model without an adapter read of the same tokens, for methods that look at it at every one.
    beside: Option<Arc<Mutex<KvCache>>>,
}

/// A route, by its first sequence, and a key.
type Key = (Option<usize>, String);

/// Keys and values that queries attend to, and which of them each sequence sees.
#[derive(Clone)]
pub(crate) struct Attended {
    /// [rows, kv_heads, dim].
    pub keys: Tensor,
    /// [rows, kv_heads, dim].
    pub values: Tensor,
    /// Position of each row.
    pub positions: Tensor,
    /// Rows that each sequence sees.
    pub seen: Vec<std::ops::Range<usize>>,
}

#[derive(Clone, Default)]
struct CachedLayer {
    keys: Option<Tensor>,
    values: Option<Tensor>,
    lengths: Vec<usize>,
    positions: Vec<i32>,
}

impl KvCache {
    /// Room for `capacity` rows of each of `sequences` sequences in each of `layers` layers.
    pub fn new(layers: usize, sequences: usize, capacity: usize) -> Self {
        KvCache {
            capacity,
            sequences,
            layers: vec![CachedLayer::default(); layers],
            sources: HashMap::new(),
            kept: HashMap::new(),
            beside: None,
        }
    }

    /// The cache of the model without an adapter over the same tokens, empty at first.
    pub(crate) fn beside(&mut self) -> Arc<Mutex<KvCache>> {
        let empty = || Arc::new(Mutex::new(KvCache::new(self.layers.len(), self.sequences, self.capacity)));
        self.beside.get_or_insert_with(empty).clone()
    }

    /// What cross-attention of `layer` reads for the sequences from `first` on, where it was made.
    pub(crate) fn source(&self, layer: usize, first: usize) -> Option<Attended> {
        self.sources.get(&(layer, first)).cloned()
    }

    /// Keeps what cross-attention of `layer` reads for the sequences from `first` on.
    pub(crate) fn keep_source(&mut self, layer: usize, first: usize, source: Attended) {
        self.sources.insert((layer, first), source);
    }

    /// What [`Pass::once`] made in the first pass.
    pub(crate) fn kept(&self, key: &Key) -> Option<Tensor> {
        self.kept.get(key).map(|(_, rows)| rows.clone())
    }

    /// Keeps rows of the sequences from `first` on.
    pub(crate) fn keep(&mut self, key: Key, first: usize, rows: Tensor) {
        self.kept.insert(key, (first, rows));
    }

    /// Lets sequence i go on from what sequence `order[i]` had (beams).
    pub fn reorder(&mut self, order: &[usize]) -> Result<()> {
        for layer in &mut self.layers {
            layer.reorder(order, self.capacity)?;
        }
        for ((_, first), source) in &mut self.sources {
            let own = &order[*first..*first + source.seen.len()];
            source.seen = own.iter().map(|&i| source.seen[i - *first].clone()).collect();
        }
        if let Some(beside) = &self.beside {
            beside.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).reorder(order)?;
        }
        for (first, rows) in self.kept.values_mut() {
            let own = &order[*first..*first + rows.dim(0)];
            let index = own.iter().map(|&i| (i - *first) as i64).collect();
            *rows = rows.gather(&Tensor::from_i64(index, [own.len()])?)?;
        }
        Ok(())
    }

    /// Whether nothing has been stored yet.
    pub fn is_empty(&self) -> bool {
        self.layers.iter().all(|l| l.keys.is_none())
    }

    /// Appends the rows of this pass and gives all rows so far with the spans of its sequences.
    pub(crate) fn extend(
        &mut self,
        layer: usize,
        k: &Tensor,
        v: &Tensor,
        prefixes: &[Option<Prefix>],
        cx: &Pass,
    ) -> Result<(Tensor, Tensor, Spans)> {
        let (capacity, sequences) = (self.capacity, self.sequences);
        // Attention of patches comes behind the model's own layers.
        if layer >= self.layers.len() {
            self.layers.resize_with(layer + 1, CachedLayer::default);
        }
        let store = &mut self.layers[layer];
        let fresh = store.keys.is_none();
        if fresh {
            let shape = [sequences * capacity, k.dim(1), k.dim(2)];
            store.keys = Some(Tensor::zeros(shape));
            store.values = Some(Tensor::zeros(shape));
            store.lengths = vec![0; sequences];
            store.positions = vec![0; sequences * capacity];
        }
        let mut spans = Vec::new();
        for (r, route) in cx.routes().iter().enumerate() {
            let prefix = prefixes.get(r).and_then(Option::as_ref);
            for (i, s) in cx.layout().sequences()[route.sequences.clone()].iter().enumerate() {
                let number = cx.first_sequence() + route.sequences.start + i;
                if let Some(prefix) = prefix {
                    let (own, counted) = (prefix.rows_of(i), prefix.positions().collect::<Vec<_>>());
                    let part = |t: &Tensor| t.rows_between(own.start, own.end);
                    store.append(number, capacity, &part(&prefix.keys)?, &part(&prefix.values)?, &counted)?;
                }
                let (k, v) = (k.rows_between(s.start, s.end)?, v.rows_between(s.start, s.end)?);
                store.append(number, capacity, &k, &v, &cx.layout().positions()[s.clone()])?;
                let begin = number * capacity;
                spans.push(Span { q: s.clone(), kv: begin..begin + store.lengths[number] });
            }
        }
        let key_positions = Tensor::from_i32(store.positions.clone(), [sequences * capacity])?;
        let query_positions = cx.layout().positions_tensor().clone();
        let spans = Spans { spans: spans.into(), query_positions, key_positions };
        let missing = || crate::Error::Unsupported("the key-value cache has no buffer".into());
        Ok((store.keys.clone().ok_or_else(missing)?, store.values.clone().ok_or_else(missing)?, spans))
    }
}

impl CachedLayer {
    fn reorder(&mut self, order: &[usize], capacity: usize) -> Result<()> {
        let rows = |i: &usize| i * capacity..(i + 1) * capacity;
        let index: Vec<i64> = order.iter().flat_map(rows).map(|row| row as i64).collect();
        let index = Tensor::from_i64(index.clone(), [index.len()])?;
        for buffer in [&mut self.keys, &mut self.values].into_iter().flatten() {
            *buffer = buffer.gather(&index)?;
        }
        if !self.lengths.is_empty() {
            self.positions = order.iter().flat_map(|i| self.positions[rows(i)].to_vec()).collect();
            self.lengths = order.iter().map(|&i| self.lengths[i]).collect();
        }
        Ok(())
    }

    fn append(
        &mut self,
        sequence: usize,
        capacity: usize,
        k: &Tensor,
        v: &Tensor,
        positions: &[i32],
    ) -> Result<()> {
        let length = self.lengths[sequence];
        if length + positions.len() > capacity {
            let message = format!(
                "the key-value cache holds {capacity} tokens a sequence; {} are needed",
                length + positions.len()
            );
            return Err(crate::Error::Unsupported(message));
        }
        let at = sequence * capacity + length;
        for (buffer, rows) in [(&mut self.keys, k), (&mut self.values, v)] {
            if let Some(buffer) = buffer {
                buffer.write_rows(at, rows)?;
            }
        }
        self.positions[at..at + positions.len()].copy_from_slice(positions);
        self.lengths[sequence] += positions.len();
        Ok(())
    }
}
