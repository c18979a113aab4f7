//! Rows of one batch under adapters of different methods are what each is alone: in a forward, token by token with a cache,
//! and in the gradients of training; padded on the left, in models with windows, grouped heads, learned and relative positions.

mod fixtures;

use std::sync::{Arc, Mutex};

use engraft_method::{Chosen, METHODS, attach, find, look_first};
use engraft_model::Loaded;
use engraft_nn::weight::Storage;
use engraft_nn::{Adapter, Inputs, KvCache, Layout, Pass, Route, Task};
use engraft_tensor::frozen::Precision;
use engraft_tensor::testing::sample;
use engraft_tensor::{Tensor, no_grad};
use serde_json::json;

const MODELS: [&str; 6] = ["llama", "mistral", "qwen2_sliding", "gpt2", "t5", "t5_uneven"];
/// Tokens of the rows, how many columns of padding are before them, and how many tokens are read one by one.
const LENGTHS: [usize; 4] = [4, 3, 9, 2];
const PADDED: [usize; 4] = [0, 2, 1, 7];
const STEPS: usize = 3;
/// What rounding makes of gradients that are zero, or sums that cancel.
const SMALLEST: f32 = 2e-5;

/// Unions of rows before the tokens: each of the second kind stands behind those of the first.
const UNIONS: [(&str, [&str; 2]); 5] = [
    ("prompt and prefix", ["prompt", "prefix"]),
    ("prefix and prompt", ["prefix", "prompt"]),
    ("prompt and cartridge", ["prompt", "cartridge"]),
    ("late prompt and prefix", ["lpt", "prefix"]),
    ("late prompt and gated prefix", ["lpt", "apt"]),
];

/// An adapter of a method, moved off its start.
struct One {
    title: &'static str,
    methods: Vec<Chosen>,
    adapter: Arc<Adapter>,
}

/// Those that live on activations and can be had on this model, and two on weights.
fn adapters(loaded: &Loaded) -> Vec<One> {
    let lives = |class: &str, name: &str| {
        ["additive", "prompt", "hybrid"].contains(&class) || name == "lora" || name == "ia3"
    };
    let mut found = Vec::new();
    for (seed, entry) in METHODS.iter().enumerate().filter(|(_, e)| lives(e.info.class, e.info.name)) {
        let method = match entry.info.name {
            // Which positions are a text's last ones changes as it goes on.
            "reft" => {
                (entry.from_settings)(json!({ "prefix": 2, "suffix": 0, "rank": 2 }).as_object().unwrap())
                    .unwrap()
            }
            _ => (entry.example)(),
        };
        found.extend(moved(loaded, entry.info.title, vec![(method, None)], seed));
    }
    for (seed, (title, names)) in UNIONS.iter().enumerate() {
        let methods = names.iter().map(|name| ((find(name).unwrap().example)(), None)).collect();
        found.extend(moved(loaded, title, methods, 1000 + seed));
    }
    found
}

/// The adapter of these methods moved off its start, if the model can have it.
fn moved(loaded: &Loaded, title: &'static str, methods: Vec<Chosen>, seed: usize) -> Option<One> {
    let adapter = attach(&methods, &[], loaded.model.sites(), loaded.model.info(), seed as u64).ok()?.adapter;
    for (number, p) in adapter.trainable().enumerate() {
        let value = p.param.value();
        let moved = sample(value.shape(), (seed * 1000 + number) as u64).scale(0.3).unwrap();
        p.param.set(value.add(&moved).unwrap()).unwrap();
    }
    Some(One { title, methods, adapter: Arc::new(adapter) })
}

/// The rows `which` from token `from` to `to` of each; an encoder reads a row's tokens, and its decoder others.
fn inputs(loaded: &Loaded, which: &[usize], part: impl Fn(usize) -> (usize, usize), asked: usize) -> Inputs {
    let vocabulary = loaded.model.info().vocabulary as i64;
    let id = |row: usize, at: usize, by: i64| 5 + ((row * 31 + at) as i64 * by + 11) % (vocabulary - 6);
    let seq2seq = loaded.model.info().task == Task::Seq2Seq;
    let (mut ids, mut positions, mut lengths) = (vec![], vec![], vec![]);
    for &row in which {
        let (from, to) = part(row);
        let padded = if seq2seq { 0 } else { PADDED[row] };
        ids.extend((from..to).map(|at| id(row, at, 37)));
        positions.extend((from..to).map(|at| (padded + at) as i32));
        lengths.push(to - from);
    }
    let tokens = |ids: Vec<i64>| {
        let count = ids.len();
        Tensor::from_i64(ids, [count]).unwrap()
    };
    let layout = Layout::new(&lengths, positions).unwrap();
    if !seq2seq {
        return Inputs::tokens(tokens(ids), None, layout.with_asked(vec![asked; which.len()]));
    }
    let source: Vec<i64> =
        which.iter().flat_map(|&row| (0..LENGTHS[row]).map(move |at| id(row, at, 23))).collect();
    let starts =
        which.iter().flat_map(|&row| (0..LENGTHS[row]).map(move |at| (PADDED[row] + at) as i32)).collect();
    let counts: Vec<usize> = which.iter().map(|&row| LENGTHS[row]).collect();
    let source = Inputs::tokens(tokens(source), None, Layout::new(&counts, starts).unwrap());
    source.with_target(tokens(ids), layout.with_asked(vec![asked; which.len()]))
}

fn run(loaded: &Loaded, inputs: &Inputs, cx: &Pass, ones: &[&One]) -> Result<Tensor, String> {
    for one in ones {
        look_first(&one.methods, &one.adapter, loaded.model.as_ref(), inputs, cx)
            .map_err(|e| e.to_string())?;
    }
    loaded.model.forward(inputs, cx).map_err(|e| e.to_string())
}

/// The batch of three adapters and a row without.
struct Batch<'a> {
    loaded: &'a Loaded,
    ones: Vec<Option<&'a One>>,
}

impl Batch<'_> {
    fn named(&self) -> Vec<&One> {
        self.ones.iter().flatten().copied().collect()
    }

    fn pass(&self, inputs: &Inputs) -> Pass {
        let route = |(row, one): (usize, &Option<&One>)| Route {
            sequences: row..row + 1,
            adapter: one.map(|one| one.adapter.clone()),
        };
        Pass::with_routes(inputs.layout.clone(), self.ones.iter().enumerate().map(route).collect()).unwrap()
    }

    fn check(&self) -> Result<(), String> {
        let rows: Vec<usize> = (0..self.ones.len()).collect();
        let full = |row: usize| (0, LENGTHS[row] + STEPS);
        let together = inputs(self.loaded, &rows, full, STEPS);
        let mixed = run(self.loaded, &together, &self.pass(&together), &self.named())?;
        let weights = sample(mixed.shape(), 5);
        let gradients = mixed.mul(&weights).unwrap().sum().unwrap().backward().unwrap();
        let (mut at, mut alone) = (0, vec![]);
        for (row, one) in self.ones.iter().enumerate() {
            let title = one.map_or("none", |one| one.title);
            let own = inputs(self.loaded, &[row], full, STEPS);
            let cx = Pass::new(own.layout.clone(), one.map(|one| one.adapter.clone()));
            let logits = run(self.loaded, &own, &cx, &one.iter().copied().collect::<Vec<_>>())?;
            let count = logits.dim(0);
            close(&format!("{title} in a forward"), &mixed.rows_between(at, at + count).unwrap(), &logits)?;
            if let Some(one) = one {
                let weights = weights.rows_between(at, at + count).unwrap();
                let expected = logits.mul(&weights).unwrap().sum().unwrap().backward().unwrap();
                for p in one.adapter.trainable() {
                    match (gradients.get(&p.param), expected.get(&p.param)) {
                        (Some(found), Some(expected)) => {
                            close(&format!("{title}: gradient of {}", p.name), found, expected)?
                        }
                        (None, None) => {}
                        _ => return Err(format!("{title}: {} has a gradient in one of the two", p.name)),
                    }
                }
            }
            at += count;
            alone.push(logits);
        }
        self.cached(&rows, &alone)
    }

    /// The first tokens at once, the others one by one.
    fn cached(&self, rows: &[usize], alone: &[Tensor]) -> Result<(), String> {
        let rows_of = |one: &Option<&One>| one.map_or(0, |one| one.adapter.cache_rows());
        let room = LENGTHS.iter().max().unwrap() + STEPS + self.ones.iter().map(rows_of).max().unwrap_or(0);
        let layers = self.loaded.model.info().layers;
        let cache = Arc::new(Mutex::new(KvCache::new(layers, rows.len(), room)));
        for step in 0..=STEPS {
            let part = |row: usize| match step {
                0 => (0, LENGTHS[row]),
                _ => (LENGTHS[row] + step - 1, LENGTHS[row] + step),
            };
            let now = inputs(self.loaded, rows, part, 0);
            let cx = self.pass(&now).cached(cache.clone());
            let logits = no_grad(|| run(self.loaded, &now, &cx, &self.named()))?;
            let mut at = 0;
            for (row, one) in self.ones.iter().enumerate() {
                let (from, to) = part(row);
                let found = logits.rows_between(at, at + to - from).unwrap();
                let title = one.map_or("none", |one| one.title);
                close(
                    &format!("{title} with a cache, step {step}"),
                    &found,
                    &alone[row].rows_between(from, to).unwrap(),
                )?;
                at += to - from;
            }
        }
        Ok(())
    }
}

fn close(what: &str, found: &Tensor, expected: &Tensor) -> Result<(), String> {
    let (found, expected) = (found.to_vec().unwrap(), expected.to_vec().unwrap());
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let off = found.iter().zip(&expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    let equal = found.len() == expected.len()
        && off <= 5e-5 * largest + SMALLEST
        && found.iter().all(|v| v.is_finite());
    if equal { Ok(()) } else { Err(format!("{what}: off by {off:e} of {largest:e}")) }
}

#[test]
fn rows_under_different_methods_are_what_each_is_alone() {
    let (mut failures, mut count) = (Vec::new(), 0);
    for name in MODELS {
        let loaded =
            fixtures::model(&fixtures::golden().join("models").join(name), Precision::F32, Storage::Dense);
        let ones = adapters(&loaded);
        assert!(ones.len() > 20, "{name}: {}", ones.len());
        // Every method meets three rows of different lengths, and different mates.
        for shift in [0, 1, 7] {
            for first in 0..ones.len() {
                let mates = [first, (first + shift + 1) % ones.len(), (first + 2 * shift + 3) % ones.len()];
                if !mates.iter().any(|&mate| fixtures::wanted(ones[mate].title)) {
                    continue;
                }
                let [a, b, c] = mates.map(|mate| Some(&ones[mate]));
                count += 1;
                let batch = Batch { loaded: &loaded, ones: vec![a, None, b, c] };
                if let Err(problem) = batch.check() {
                    let titles: Vec<&str> = mates.iter().map(|&mate| ones[mate].title).collect();
                    failures.push(format!("{name}, {}: {problem}", titles.join(" / ")));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} of {count}:\n{}", failures.len(), failures.join("\n"));
}
