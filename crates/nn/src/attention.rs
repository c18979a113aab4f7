//! The core of every attention: extra keys and values, the cache, and the packed kernel.

use std::ops::Range;

use engraft_tensor::Tensor;
use engraft_tensor::cpu::attention::{AttentionSpec, Span};
use engraft_tensor::ops::{Attention, RelativeBias, Spans, attention, cat};

use crate::cache::Attended;
use crate::virtual_rows::{joined, step};
use crate::{KeyValuePatch, Kind, Layout, Pass, Patch, Result, Role, SiteId, Sites};

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
        Self::declare_as(sites, path, Role::Attention, layer, spec)
    }

    /// Declares the key-and-value site `path` of a cross-attention.
    pub fn declare_cross(sites: &mut Sites, path: &str, layer: usize, spec: AttentionSpec) -> Attend {
        Self::declare_as(sites, path, Role::CrossAttention, layer, spec)
    }

    fn declare_as(sites: &mut Sites, path: &str, role: Role, layer: usize, spec: AttentionSpec) -> Attend {
        let kind = Kind::KeyValue { heads: spec.kv_heads, dim: spec.dim };
        let site = sites.add(path, role, Some(layer), kind);
        Attend { spec, site, layer }
    }

    /// The key-and-value site.
    pub fn site(&self) -> SiteId {
        self.site
    }

    /// q [tokens, heads, dim], k and v [tokens, kv_heads, dim] (rotated already), made of x [tokens, width] →
    /// [tokens, heads, dim].
    pub fn forward(&self, x: &Tensor, [q, k, v]: [&Tensor; 3], cx: &Pass) -> Result<Tensor> {
        self.attended(x, [q, k, v], None, cx)
    }

    /// [`Attend::forward`] with as many key heads as query heads and a number added to each score by the distance of key
    /// and query; `bias` gives those of a pass, whose adapters may change them.
    pub fn forward_biased(
        &self,
        x: &Tensor,
        [q, k, v]: [&Tensor; 3],
        bias: &dyn Fn(&Pass) -> Result<RelativeBias>,
        cx: &Pass,
    ) -> Result<Tensor> {
        if let [_] = cx.routes() {
            return self.attended(x, [q, k, v], Some(bias(cx)?), cx);
        }
        let heads = self.spec.heads;
        cx.by_route(self.site, &cat(&[q, k, v], 1)?, |all, _, own| {
            let part = |i: usize| all.narrow(1, i * heads, heads);
            let x = own.rows_in(cx, x)?;
            self.attended(&x, [&part(0)?, &part(1)?, &part(2)?], Some(bias(own)?), own)
        })
    }

    /// An error where a window hides rows that are to be seen from everywhere.
    fn expect_in_view(&self, cx: &Pass) -> Result<()> {
        let Some(window) = self.spec.window else { return Ok(()) };
        let rows = cx.most_still(self.site, |p| p.stays_in_view());
        let last = cx.layout().positions().iter().copied().max().unwrap_or(0) as usize;
        if rows == 0 || last + rows < window {
            return Ok(());
        }
        Err(crate::Error::Unsupported(format!(
            "this prefix in AdapterHub's form is seen by every token, which a window of {window} positions does not let those from \
             {} on do; shorten the texts, or train a `prefix` here",
            window.saturating_sub(rows)
        )))
    }

    fn attended(
        &self,
        x: &Tensor,
        [q, k, v]: [&Tensor; 3],
        bias: Option<RelativeBias>,
        cx: &Pass,
    ) -> Result<Tensor> {
        self.expect_in_view(cx)?;
        let prefixes = if cx.continues() { Vec::new() } else { cx.prefixes(self.site, x)? };
        let (keys, values, spans) = cx.seen(self.layer, k, v, &prefixes)?;
        let y = attention(&Attention { spans, spec: self.spec, bias }, q, &keys, &values)?;
        self.gated(x, q, y, cx)
    }

    /// q [target tokens, heads, dim], made of x [target tokens, width], attends to what `memory` holds →
    /// [target tokens, heads, dim]. Under a cache, keys and values are made once, and `memory` is not needed again.
    pub fn forward_cross(
        &self,
        x: &Tensor,
        q: &Tensor,
        memory: Option<&Memory>,
        keys_and_values: impl FnOnce(&Memory) -> Result<(Tensor, Tensor)>,
        cx: &Pass,
    ) -> Result<Tensor> {
        let own = cx.first_sequence()..cx.first_sequence() + cx.layout().sequences().len();
        let kept = cx.cache().and_then(|cache| cache.source(self.layer, own.start));
        let found = match (kept, memory) {
            (Some(kept), _) => kept,
            (None, Some(memory)) => {
                // Of these sequences alone: where blocks go route by route, gates of others have not seen their queries yet.
                let memory = memory.of(&own)?;
                let (k, v) = keys_and_values(&memory)?;
                let prefixes = memory.pass.prefixes(self.site, &memory.states)?;
                let found = gathered(&k, &v, memory.pass.layout(), &prefixes, &memory.pass)?;
                if let Some(mut cache) = cx.cache() {
                    cache.keep_source(self.layer, own.start, found.clone());
                }
                found
            }
            (None, None) => {
                let message = "cross-attention has nothing to read: the source was not encoded";
                return Err(crate::Error::Unsupported(message.into()));
            }
        };
        let spans = spans_of(&found, cx.layout());
        let y = attention(&Attention { spans, spec: self.spec, bias: None }, q, &found.keys, &found.values)?;
        self.gated(x, q, y, cx)
    }

    /// Adds what gated rows give in a softmax of their own.
    fn gated(&self, x: &Tensor, q: &Tensor, y: Tensor, cx: &Pass) -> Result<Tensor> {
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
        cx.by_route(self.site, &both, |both, patches, own| {
            let (x, cx) = (own.rows_in(cx, x)?, own);
            let q = both.narrow(2, 0, spec.dim)?;
            let mut y = both.narrow(2, spec.dim, spec.dim)?;
            for (patch, gate) in key_value_patches(patches).filter_map(|p| p.gate().map(|g| (p, g))) {
                let (rows, count) = (patch.rows(&x, cx)?, patch.count());
                let step = step(&rows.keys, count);
                // Every sequence gets rows of its own, so that their gradients are summed by the gather.
                let sequences = cx.layout().sequences();
                let copies = sequences.len() * count;
                let row = |i: usize| (i / count * step + i % count) as i64;
                let index = Tensor::from_i64((0..copies).map(row).collect(), [copies])?;
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

/// What the decoder of an encoder–decoder model reads: the encoder's states and the pass that describes their rows.
#[derive(Clone)]
pub struct Memory {
    /// [source tokens, width].
    pub states: Tensor,
    /// The encoder's pass.
    pub pass: Pass,
}

impl Memory {
    /// What the sequences `own` read: all of them, or those of one route.
    fn of(&self, own: &Range<usize>) -> Result<Memory> {
        if *own == (0..self.pass.layout().sequences().len()) {
            return Ok(self.clone());
        }
        let Some(route) = self.pass.routes().iter().find(|route| route.sequences == *own) else {
            let message = "cross-attention reads sequences that are no route of the source";
            return Err(crate::Error::Unsupported(message.into()));
        };
        let (states, pass) = self.pass.rows_of_route(route, &self.states)?;
        Ok(Memory { states, pass })
    }
}

/// The queries of each sequence of `layout` over the keys it sees.
fn spans_of(found: &Attended, layout: &Layout) -> Spans {
    let pairs = layout.sequences().iter().zip(&found.seen);
    Spans {
        spans: pairs.map(|(q, kv)| Span { q: q.clone(), kv: kv.clone() }).collect(),
        query_positions: layout.positions_tensor().clone(),
        key_positions: found.positions.clone(),
    }
}

/// Keys and values, laid out as `layout` says, with the prefix of each sequence before them.
fn gathered(
    k: &Tensor,
    v: &Tensor,
    layout: &Layout,
    prefixes: &[Option<Prefix>],
    cx: &Pass,
) -> Result<Attended> {
    if prefixes.iter().all(Option::is_none) {
        let seen = (0..layout.sequences().len()).map(|i| layout.seen(i)).collect();
        let positions = layout.positions_tensor().clone();
        return Ok(Attended { keys: k.clone(), values: v.clone(), positions, seen });
    }
    // All prefixes first, then the tokens; each sequence picks its rows.
    let (mut keys, mut values, mut starts, mut at) = (vec![], vec![], vec![], 0);
    for prefix in prefixes {
        starts.push(at);
        if let Some(prefix) = prefix {
            at += prefix.keys.dim(0);
            keys.push(prefix.keys.clone());
            values.push(prefix.values.clone());
        }
    }
    keys.push(k.clone());
    values.push(v.clone());
    let (mut index, mut positions, mut seen) = (vec![], vec![], vec![]);
    for ((route, prefix), start) in cx.routes().iter().zip(prefixes).zip(starts) {
        for (i, number) in route.sequences.clone().enumerate() {
            let (begin, own) = (index.len(), layout.seen(number));
            let before = prefix.as_ref().map_or(0..0, |p| p.rows_of(i));
            positions.extend(prefix.as_ref().map_or(0..0, Prefix::positions));
            index.extend(before.map(|row| (start + row) as i64));
            index.extend(own.clone().map(|row| (at + row) as i64));
            positions.extend_from_slice(&layout.positions()[own]);
            seen.push(begin..index.len());
        }
    }
    let index = Tensor::from_i64(index.clone(), [index.len()])?;
    let pick = |parts: &[Tensor]| -> Result<Tensor> {
        Ok(cat(&parts.iter().collect::<Vec<_>>(), 0)?.gather(&index)?)
    };
    let rows = positions.len();
    let positions = Tensor::from_i32(positions, [rows])?;
    Ok(Attended { keys: pick(&keys)?, values: pick(&values)?, positions, seen })
}

/// The extra rows of a route: `count` for all its sequences, or for each.
pub(crate) struct Prefix {
    pub keys: Tensor,
    pub values: Tensor,
    pub count: usize,
    /// How many of them do not move the tokens.
    pub still: usize,
}

impl Prefix {
    /// Their positions: the tokens' follow.
    pub fn positions(&self) -> Range<i32> {
        -(self.still as i32)..(self.count - self.still) as i32
    }

    /// The rows of the route's sequence `i`.
    pub fn rows_of(&self, i: usize) -> Range<usize> {
        let first = i * step(&self.keys, self.count);
        first..first + self.count
    }
}

fn key_value_patches(patches: &[Patch]) -> impl Iterator<Item = &dyn KeyValuePatch> {
    patches.iter().filter_map(|p| match p {
        Patch::KeyValue(p) => Some(p.as_ref()),
        _ => None,
    })
}

impl Pass {
    /// An attention of a patch's own: q [tokens, heads, dim], k and v [tokens, kv_heads, dim] of this pass's rows →
    /// [tokens, heads, dim]. Under a cache keys and values are kept as those of `layer`, which counts on from the model's.
    pub fn attend(&self, layer: usize, spec: AttentionSpec, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let (keys, values, spans) = self.seen(layer, k, v, &[])?;
        Ok(attention(&Attention { spans, spec, bias: None }, q, &keys, &values)?)
    }

    /// The keys and values that queries see, and which of them each sequence: this pass's own behind its prefixes and, under a
    /// cache, behind those that `layer` kept.
    fn seen(
        &self,
        layer: usize,
        k: &Tensor,
        v: &Tensor,
        prefixes: &[Option<Prefix>],
    ) -> Result<(Tensor, Tensor, Spans)> {
        if let Some(mut cache) = self.cache() {
            return cache.extend(layer, k, v, prefixes, self);
        }
        let found = gathered(k, v, self.layout(), prefixes, self)?;
        let spans = spans_of(&found, self.layout());
        Ok((found.keys, found.values, spans))
    }

    /// Ungated extra rows of each route, whose keys and values are made of x [tokens, width].
    fn prefixes(&self, site: SiteId, x: &Tensor) -> Result<Vec<Option<Prefix>>> {
        let of_route = |route: &crate::Route| -> Result<Option<Prefix>> {
            let patches = route.adapter.as_ref().map_or(&[][..], |a| a.at(site));
            let ungated: Vec<_> =
                key_value_patches(patches).filter(|p| p.gate().is_none() && p.count() > 0).collect();
            if ungated.is_empty() {
                return Ok(None);
            }
            let (input, cx) = self.rows_of_route(route, x)?;
            let (mut keys, mut values) = (vec![], vec![]);
            for patch in &ungated {
                let rows = patch.rows(&input, &cx)?;
                keys.push((patch.count(), rows.keys));
                values.push((patch.count(), rows.values));
            }
            let (count, sequences) = (ungated.iter().map(|p| p.count()).sum(), route.sequences.len());
            let still = ungated.iter().filter(|p| !p.moves()).map(|p| p.count()).sum();
            let (keys, values) = (joined(&keys, sequences)?, joined(&values, sequences)?);
            Ok(Some(Prefix { keys, values, count, still }))
        };
        if self.patched(site) { self.routes().iter().map(of_route).collect() } else { Ok(Vec::new()) }
    }

    /// The most rows before the first position that a route has at `site`: relative positions reach so much further back.
    pub fn still_rows(&self, site: SiteId) -> usize {
        self.most_still(site, |_| true)
    }

    /// How much further from its queries each key at `site` counts as ([`KeyValuePatch::widens`]).
    pub fn widened(&self, site: SiteId) -> usize {
        self.most_still(site, |p| p.widens())
    }

    fn most_still(&self, site: SiteId, counts: impl Fn(&dyn KeyValuePatch) -> bool) -> usize {
        let of_route = |r: &crate::Route| -> usize {
            let patches = r.adapter.as_ref().map_or(&[][..], |a| a.at(site));
            let still = key_value_patches(patches).filter(|p| p.gate().is_none() && !p.moves() && counts(*p));
            still.map(|p| p.count()).sum()
        };
        self.routes().iter().map(of_route).max().unwrap_or(0)
    }

    /// Number of extra key rows at `site` that each sequence's tokens are counted from: the distance these move.
    pub(crate) fn prefix_counts(&self, site: SiteId) -> Vec<usize> {
        let of_route = |r: &crate::Route| {
            let patches = r.adapter.as_ref().map_or(&[][..], |a| a.at(site));
            let count = key_value_patches(patches).filter(|p| p.gate().is_none()).map(|p| p.moved()).sum();
            std::iter::repeat_n(count, r.sequences.len())
        };
        self.routes().iter().flat_map(of_route).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use engraft_tensor::testing::{close, sample};

    use super::*;
    use crate::{Adapter, KeyValues, KvCache};

    /// Two rows, to be seen from everywhere or not.
    struct Two(bool);

    impl KeyValuePatch for Two {
        fn count(&self) -> usize {
            2
        }
        fn rows(&self, _: &Tensor, _: &Pass) -> Result<KeyValues> {
            Ok(KeyValues { keys: sample(&[2, 2, 3], 8), values: sample(&[2, 2, 3], 9) })
        }
        fn moves(&self) -> bool {
            false
        }
        fn stays_in_view(&self) -> bool {
            self.0
        }
    }

    #[test]
    fn a_window_that_hides_what_is_to_be_seen_is_refused() {
        let mut sites = Sites::default();
        let declared =
            AttentionSpec { heads: 2, kv_heads: 2, dim: 3, scale: 0.5, causal: true, window: None };
        let attend = Attend::declare(&mut sites, "attn", 0, declared);
        let (x, qkv) = (sample(&[5, 6], 1), [1, 2, 3].map(|seed| sample(&[5, 2, 3], seed)));
        let run = |stays: bool, window: Option<usize>| {
            let patch = Patch::KeyValue(Box::new(Two(stays)));
            let adapter = Arc::new(Adapter::default().with_patches(vec![(attend.site(), patch)]));
            let cx = Pass::new(Layout::counted(&[5]).unwrap(), Some(adapter));
            let [q, k, v] = &qkv;
            let spec = AttentionSpec { window, ..declared };
            Attend { spec, ..attend.clone() }.forward(&x, [q, k, v], &cx)
        };
        assert!(run(true, None).is_ok() && run(true, Some(7)).is_ok() && run(false, Some(6)).is_ok());
        let error = run(true, Some(6)).unwrap_err().to_string();
        assert!(error.contains("window of 6 positions"), "{error}");
    }

    #[test]
    fn attention_of_a_patch_goes_on_from_a_cache() {
        let spec = AttentionSpec { heads: 2, kv_heads: 2, dim: 3, scale: 0.5, causal: true, window: None };
        let [q, k, v] = [1, 2, 3].map(|seed| sample(&[5, 2, 3], seed));
        let whole = Pass::new(Layout::counted(&[5]).unwrap(), None).attend(7, spec, [&q, &k, &v]).unwrap();
        let cache = Arc::new(Mutex::new(KvCache::new(2, 1, 5)));
        for (from, to) in [(0, 3), (3, 4), (4, 5)] {
            let layout = Layout::new(&[to - from], (from as i32..to as i32).collect()).unwrap();
            let cx = Pass::new(layout, None).cached(cache.clone());
            let [q, k, v] = [&q, &k, &v].map(|t| t.rows_between(from, to).unwrap());
            let part = cx.attend(7, spec, [&q, &k, &v]).unwrap();
            close(&part, &whole.rows_between(from, to).unwrap(), 1e-6);
        }
    }
}
