//! The core of every attention: extra keys and values, the cache, and the packed kernel.

use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::{AttentionSpec, Span};
use engraft_tensor::ops::{Attention, Spans, attention, cat};

use crate::{KeyValuePatch, Kind, Pass, Patch, Result, Role, SiteId, Sites};

/// The attention of one layer: its heads, what is visible, its key-and-value site.
#[derive(Clone)]
pub struct Attend {
    spec: AttentionSpec,
    site: SiteId,
    layer: usize,
}

impl Attend {
    /// Declares the key-and-value site `path`.
    pub fn declare(sites: &mut Sites, path: &str, layer: usize, spec: AttentionSpec) -> Attend {
        let kind = Kind::KeyValue { heads: spec.kv_heads, dim: spec.dim };
        let site = sites.add(path, Role::Attention, Some(layer), kind);
        Attend { spec, site, layer }
    }

    /// q [tokens, heads, dim], k and v [tokens, kv_heads, dim] (rotated already) → [tokens, heads, dim].
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, cx: &Pass) -> Result<Tensor> {
        let (keys, values, spans) = match cx.cache() {
            Some(mut cache) => {
                let prefixes = cx.prefixes(self.site)?;
                cache.extend(self.layer, k, v, &prefixes, cx)?
            }
            None => self.gathered(k, v, cx)?,
        };
        let y = attention(&Attention { spans, spec: self.spec, bias: None }, q, &keys, &values)?;
        self.gated(q, y, cx)
    }

    /// Keys and values with the prefix of each sequence before them.
    fn gathered(&self, k: &Tensor, v: &Tensor, cx: &Pass) -> Result<(Tensor, Tensor, Spans)> {
        let layout = cx.layout();
        let positions = layout.positions_tensor();
        let prefixes = cx.prefixes(self.site)?;
        if prefixes.iter().all(Option::is_none) {
            let span = |(i, s): (usize, &std::ops::Range<usize>)| Span { q: s.clone(), kv: layout.seen(i) };
            let spans = layout.sequences().iter().enumerate().map(span).collect();
            let spans = Spans { spans, query_positions: positions.clone(), key_positions: positions.clone() };
            return Ok((k.clone(), v.clone(), spans));
        }
        // All prefixes first, then the tokens; each sequence picks its rows.
        let (mut keys, mut values, mut starts, mut at) = (vec![], vec![], vec![], 0);
        for prefix in &prefixes {
            starts.push(at);
            if let Some(rows) = prefix {
                at += rows.keys.dim(0);
                keys.push(rows.keys.clone());
                values.push(rows.values.clone());
            }
        }
        keys.push(k.clone());
        values.push(v.clone());
        let (mut index, mut key_positions, mut spans) = (vec![], vec![], vec![]);
        for ((route, prefix), start) in cx.routes().iter().zip(&prefixes).zip(starts) {
            let count = prefix.as_ref().map_or(0, |p| p.keys.dim(0));
            for number in route.sequences.clone() {
                let (begin, seen) = (index.len(), layout.seen(number));
                index.extend((start..start + count).map(|i| i as i64));
                index.extend(seen.clone().map(|i| (at + i) as i64));
                key_positions.extend(0..count as i32);
                key_positions.extend_from_slice(&layout.positions()[seen]);
                spans.push(Span { q: layout.sequences()[number].clone(), kv: begin..index.len() });
            }
        }
        let index = Tensor::from_i64(index.clone(), [index.len()])?;
        let pick = |parts: &[Tensor]| -> Result<Tensor> {
            Ok(cat(&parts.iter().collect::<Vec<_>>(), 0)?.gather(&index)?)
        };
        let rows = key_positions.len();
        let key_positions = Tensor::from_i32(key_positions, [rows])?;
        let spans = Spans { spans: spans.into(), query_positions: positions.clone(), key_positions };
        Ok((pick(&keys)?, pick(&values)?, spans))
    }

    /// Adds what gated rows give in a softmax of their own.
    fn gated(&self, q: &Tensor, y: Tensor, cx: &Pass) -> Result<Tensor> {
        let has_gate = |r: &crate::Route| {
            let patches = r.adapter.as_ref().map_or(&[][..], |a| a.at(self.site));
            key_value_patches(patches).any(|p| p.gate().is_some())
        };
        if !cx.routes().iter().any(has_gate) {
            return Ok(y);
        }
        let spec = AttentionSpec { causal: false, window: None, ..self.spec };
        // Queries and attention outputs are cut together, so join them side by side first.
        let both = cat(&[q, &y], 2)?;
        cx.by_route(self.site, &both, |both, patches, cx| {
            let q = both.narrow(2, 0, spec.dim)?;
            let mut y = both.narrow(2, spec.dim, spec.dim)?;
            for (patch, gate) in key_value_patches(patches).filter_map(|p| p.gate().map(|g| (p, g))) {
                let rows = patch.rows()?;
                let count = rows.keys.dim(0);
                // Every sequence gets rows of its own, so that their gradients are summed by the gather.
                let sequences = cx.layout().sequences();
                let copies = sequences.len() * count;
                let index = Tensor::from_i64((0..copies).map(|i| (i % count) as i64).collect(), [copies])?;
                let own = |(i, s): (usize, &std::ops::Range<usize>)| Span {
                    q: s.clone(),
                    kv: i * count..(i + 1) * count,
                };
                let spans = Spans {
                    spans: sequences.iter().enumerate().map(own).collect(),
                    query_positions: cx.layout().positions_tensor().clone(),
                    key_positions: Tensor::from_i32(vec![0; copies], [copies])?,
                };
                let (keys, values) = (rows.keys.gather(&index)?, rows.values.gather(&index)?);
                let extra = attention(&Attention { spans, spec, bias: None }, &q, &keys, &values)?;
                y = y.add(&extra.mul(&gate.reshape([1, spec.heads, 1])?)?)?;
            }
            Ok(y)
        })
    }
}

fn key_value_patches(patches: &[Patch]) -> impl Iterator<Item = &dyn KeyValuePatch> {
    patches.iter().filter_map(|p| match p {
        Patch::KeyValue(p) => Some(p.as_ref()),
        _ => None,
    })
}

impl Pass {
    /// Ungated extra rows of each route, joined: [count, kv_heads, dim].
    fn prefixes(&self, site: SiteId) -> Result<Vec<Option<crate::KeyValues>>> {
        let of_route = |patches: &[Patch]| -> Result<Option<crate::KeyValues>> {
            let rows: Vec<_> = key_value_patches(patches)
                .filter(|p| p.gate().is_none())
                .map(|p| p.rows())
                .collect::<Result<_>>()?;
            if rows.is_empty() {
                return Ok(None);
            }
            let keys = cat(&rows.iter().map(|r| &r.keys).collect::<Vec<_>>(), 0)?;
            let values = cat(&rows.iter().map(|r| &r.values).collect::<Vec<_>>(), 0)?;
            Ok(Some(crate::KeyValues { keys, values }))
        };
        self.routes().iter().map(|r| of_route(r.adapter.as_ref().map_or(&[], |a| a.at(site)))).collect()
    }

    /// Number of ungated extra key rows at `site` for each sequence: the distance its tokens move.
    pub(crate) fn prefix_counts(&self, site: SiteId) -> Vec<usize> {
        let of_route = |r: &crate::Route| {
            let patches = r.adapter.as_ref().map_or(&[][..], |a| a.at(site));
            let count = key_value_patches(patches).filter(|p| p.gate().is_none()).map(|p| p.count()).sum();
            std::iter::repeat_n(count, r.sequences.len())
        };
        self.routes().iter().flat_map(of_route).collect()
    }
}

/// Keys and values of the tokens so far, for generation. Each sequence owns `capacity` rows of one buffer a layer.
pub struct KvCache {
    capacity: usize,
    sequences: usize,
    layers: Vec<CachedLayer>,
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
        KvCache { capacity, sequences, layers: vec![CachedLayer::default(); layers] }
    }

    /// Whether nothing has been stored yet.
    pub fn is_empty(&self) -> bool {
        self.layers.iter().all(|l| l.keys.is_none())
    }

    /// Appends the rows of this pass and gives all rows so far with the spans of its sequences.
    fn extend(
        &mut self,
        layer: usize,
        k: &Tensor,
        v: &Tensor,
        prefixes: &[Option<crate::KeyValues>],
        cx: &Pass,
    ) -> Result<(Tensor, Tensor, Spans)> {
        let (capacity, sequences) = (self.capacity, self.sequences);
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
        for (route, prefix) in cx.routes().iter().zip(prefixes) {
            for (i, s) in cx.layout().sequences()[route.sequences.clone()].iter().enumerate() {
                let number = cx.first_sequence() + route.sequences.start + i;
                if let (true, Some(rows)) = (store.lengths[number] == 0, prefix) {
                    let counted: Vec<i32> = (0..rows.keys.dim(0) as i32).collect();
                    store.append(number, capacity, &rows.keys, &rows.values, &counted)?;
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
