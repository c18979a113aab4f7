//! Rows that depend on what their sequence says: prompts, prefixes, a prompt that enters in the middle of the blocks.

mod common;

use std::sync::{Arc, Mutex};

use common::{batch, distance, golden, model, run};
use engraft_nn::{
    Adapter, BlockPatch, Builder, Init, KeyValuePatch, KeyValues, Kind, KvCache, Layout, Model, Pass, Patch,
    PromptPatch, Result, Route, Site,
};
use engraft_tensor::{Param, Tensor, no_grad};

/// Rows [count, width], multiplied for each sequence by the mean of what it says, which is found once.
#[derive(Clone)]
struct Own {
    rows: Param,
    heads: usize,
    dim: usize,
    key: String,
}

impl Own {
    /// [sequences · count, width of the rows].
    fn of(&self, input: &Tensor, cx: &Pass) -> Result<Tensor> {
        let means = cx.once(&self.key, || {
            let means = cx.layout().sequences().iter().map(|s| {
                let own = input.rows_between(s.start, s.end)?;
                Ok(own.mul(&own)?.sum()?.scale(1.0 / own.len() as f32)?.reshape([1, 1, 1])?)
            });
            let means: Vec<Tensor> = means.collect::<Result<_>>()?;
            Ok(engraft_tensor::ops::cat(&means.iter().collect::<Vec<_>>(), 0)?)
        })?;
        let rows = self.rows.get();
        let (count, width) = (rows.dim(0), rows.width());
        let each = means.mul(&rows.reshape([1, count, width])?)?;
        Ok(each.reshape([means.dim(0) * count, width])?)
    }
}

impl PromptPatch for Own {
    fn count(&self) -> usize {
        self.rows.value().dim(0)
    }
    fn rows(&self, embedded: &Tensor, cx: &Pass) -> Result<Tensor> {
        self.of(embedded, cx)
    }
}

impl KeyValuePatch for Own {
    fn count(&self) -> usize {
        self.rows.value().dim(0)
    }
    fn rows(&self, input: &Tensor, cx: &Pass) -> Result<KeyValues> {
        let (all, width) = (self.of(input, cx)?, self.heads * self.dim);
        let part = |first| all.narrow(1, first, width)?.reshape([all.dim(0), self.heads, self.dim]);
        Ok(KeyValues { keys: part(0)?, values: part(width)? })
    }
}

/// Late rows: they enter before this block and leave after it.
impl BlockPatch for Own {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        _: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let count = PromptPatch::count(self);
        let (rows, own) = cx.with_rows_before(count, || self.of(h, cx), h)?;
        let out = run(&rows, &own)?;
        match own.layout().real_rows() {
            Some(real) => Ok(out.gather(&Tensor::from_i64(real.clone(), [real.len()])?)?),
            None => Ok(out),
        }
    }
}

/// An adapter of such rows at the prompt, at every keys and values, or at the second block.
fn adapter(model: &dyn Model, kind: &str, seed: u64) -> Arc<Adapter> {
    let mut b = Builder::new(model.sites(), model.info(), seed);
    let sites = model.sites().clone();
    for site in sites.iter() {
        let (width, heads, dim) = match (kind, &site.kind) {
            ("prompt", Kind::Prompt { width }) => (*width, 1, 1),
            ("prefix", Kind::KeyValue { heads, dim }) => (2 * heads * dim, *heads, *dim),
            ("late", Kind::Block { width }) if site.layer == Some(1) => (*width, 1, 1),
            _ => continue,
        };
        let rows = b.param(&site.path, &[3, width], Init::Normal(0.8)).unwrap();
        let own = Box::new(Own { rows, heads, dim, key: site.path.clone() });
        let patch = match kind {
            "prompt" => Patch::Prompt(own),
            "prefix" => Patch::KeyValue(own),
            _ => Patch::Block(own),
        };
        b.patch(site.id, patch).unwrap();
    }
    Arc::new(b.finish())
}

#[test]
fn each_sequence_has_the_logits_it_has_alone() {
    // Seven tokens and three late rows do not fit into tables of eight positions.
    let rows = [&[5i64, 9, 17, 33][..], &[12, 4, 77, 6, 8, 9, 11], &[90, 31, 8], &[7, 7, 2, 40, 3]];
    for name in ["llama", "gpt2", "bert", "roberta_token"] {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        for kind in ["prompt", "prefix", "late"] {
            let (a, b) = (adapter(model, kind, 1), adapter(model, "prefix", 2));
            let own = [Some(a.clone()), Some(a.clone()), None, Some(b.clone())];
            let inputs = batch(&rows);
            let routes = vec![
                Route { sequences: 0..2, adapter: Some(a.clone()) },
                Route { sequences: 2..3, adapter: None },
                Route { sequences: 3..4, adapter: Some(b) },
            ];
            let cx = Pass::with_routes(inputs.layout.clone(), routes).unwrap();
            let together = no_grad(|| model.forward(&inputs, &cx)).unwrap().to_vec().unwrap();
            let alone: Vec<f32> =
                (0..4).flat_map(|i| run(model, &batch(&[rows[i]]), own[i].clone())).collect();
            assert!(distance(&together, &alone) < 5e-6, "{name}, {kind}");
            let plain = run(model, &inputs, None);
            assert!(distance(&run(model, &inputs, Some(a)), &plain) > 1e-3, "{name}, {kind} does nothing");
        }
    }
}

#[test]
fn text_that_goes_on_keeps_the_rows_of_its_beginning() {
    let rows = [&[5i64, 9, 17, 33, 60, 8][..], &[12, 4, 77, 6, 1, 2]];
    let loaded = model(&golden().join("models/llama"));
    let model = loaded.model.as_ref();
    for kind in ["prompt", "prefix", "late"] {
        let adapter = adapter(model, kind, 3);
        let cache = Arc::new(Mutex::new(KvCache::new(model.info().layers, 2, 16)));
        let first = batch(&[&rows[0][..4], &rows[1][..4]]);
        let step = |inputs: &engraft_nn::Inputs| {
            let cx = Pass::new(inputs.layout.clone(), Some(adapter.clone())).cached(cache.clone());
            no_grad(|| model.forward(inputs, &cx)).unwrap().to_vec().unwrap()
        };
        let begun = step(&first);
        assert!(distance(&begun, &run(model, &first, Some(adapter.clone()))) < 2e-6, "{kind}");
        // Beams: both go on from the second, and back.
        cache.lock().unwrap().reorder(&[1, 1]).unwrap();
        let next = batch(&[&[30], &[31]]);
        let layout = Layout::new(&[1, 1], vec![4, 4]).unwrap();
        let next = engraft_nn::Inputs { layout, ..next };
        let going = step(&next);
        // The whole text at once would find other means: hand over those of its first four tokens.
        let whole = batch(&[&[12, 4, 77, 6, 30], &[12, 4, 77, 6, 31]]);
        let fixed = Pass::new(whole.layout.clone(), Some(adapter.clone()))
            .cached(Arc::new(Mutex::new(KvCache::new(model.info().layers, 2, 16))));
        for site in adapter.sites() {
            let path = model.sites().get(site).path.clone();
            let kept = Pass::new(next.layout.clone(), Some(adapter.clone())).cached(cache.clone());
            let means = kept.once(&path, || panic!("{path} kept nothing")).unwrap();
            fixed.once(&path, || Ok(means)).unwrap();
        }
        let all = no_grad(|| model.forward(&whole, &fixed)).unwrap().to_vec().unwrap();
        let width = model.info().outputs;
        let lasts = [&all[4 * width..5 * width], &all[9 * width..]].concat();
        assert!(distance(&going, &lasts) < 5e-6, "{kind}: {}", distance(&going, &lasts));
    }
}

#[test]
fn tasks_go_with_their_sequences() {
    let layout = Layout::counted(&[2, 3, 1]).unwrap();
    assert!(Pass::new(layout.clone(), None).tasks().is_none());
    let layout = layout.with_tasks(vec![4, 0, 7]);
    assert_eq!(layout.slice(1..3).unwrap().tasks(), [0, 7]);
    let cx = Pass::new(layout, None);
    assert_eq!(cx.tasks(), Some(&[4, 0, 7][..]));
    assert_eq!(cx.select(&[1, 2, 5]).unwrap().tasks(), Some(&[4, 0, 7][..]));
}

#[test]
fn what_is_asked_for_is_not_given() {
    let layout = Layout::counted(&[4, 3, 2]).unwrap();
    assert_eq!(Pass::new(layout.clone(), None).given(), [0..4, 4..7, 7..9]);
    let layout = layout.with_asked(vec![3, 0, 2]);
    assert_eq!(layout.slice(1..3).unwrap().asked(), [0, 2]);
    let cx = Pass::new(layout, None);
    assert_eq!(cx.given(), [0..1, 4..7, 7..8], "one token at least is given");
    // Another stack's rows are other tokens, and virtual rows are never given.
    assert_eq!(cx.over(Layout::counted(&[2, 2, 2]).unwrap()).unwrap().given(), [0..2, 2..4, 4..6]);
    let (rows, inner) = cx.with_rows_before(2, || Ok(Tensor::zeros([2, 1])), &Tensor::zeros([9, 1])).unwrap();
    assert_eq!((rows.dim(0), inner.given()), (15, vec![2..3, 8..11, 13..14]));
}
