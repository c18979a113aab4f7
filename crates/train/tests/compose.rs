//! Rows of one batch go to adapters of different kinds, or to none, and each has what it has alone: logits, gradients, and the
//! logits of cached generation, with grouped-query attention, sliding windows and padding on either side.

mod fixtures;

use std::sync::{Arc, Mutex};

use engraft_method::{Chosen, attach, find};
use engraft_model::Loaded;
use engraft_nn::weight::Storage;
use engraft_nn::{Adapter, Inputs, KvCache, Layout, Mode, Model, Pass, Result, Route};
use engraft_tensor::frozen::Precision;
use engraft_tensor::testing::sample;
use engraft_tensor::{Gradients, Tensor, no_grad};
use serde_json::{Value, json};

/// Tokens of each row.
const LENGTHS: [usize; 9] = [5, 4, 7, 6, 3, 5, 8, 4, 6];

/// One adapter and the method that made it.
struct Made {
    name: &'static str,
    adapter: Arc<Adapter>,
    methods: Vec<Chosen>,
}

/// What each row goes to.
fn kinds() -> [Option<(&'static str, Value)>; 9] {
    [
        Some(("lora", json!({ "rank": 2 }))),
        Some(("prefix", json!({ "tokens": 3 }))),
        None,
        Some(("unipelt", json!({ "tokens": 2, "projection": 4, "rank": 2, "reduction": 8 }))),
        Some(("smop", json!({ "prompts": 3, "tokens": 2 }))),
        Some(("bottleneck", json!({ "reduction": 4, "activation": "gelu" }))),
        Some(("idpg", json!({ "tokens": 2, "phm_dim": 2, "bottleneck": 4, "dropout": 0.0 }))),
        Some(("lpt", json!({ "tokens": 3, "bottleneck": 4, "generator": "average", "dropout": 0.0 }))),
        Some(("apt", json!({ "tokens": 2 }))),
    ]
}

fn made(model: &dyn Model, number: usize) -> Option<Made> {
    kinds()[number].clone().map(|kind| of_kind(model, kind, number))
}

fn of_kind(model: &dyn Model, (name, settings): (&'static str, Value), number: usize) -> Made {
    let method = (find(name).unwrap().from_settings)(settings.as_object().unwrap()).unwrap();
    let methods = vec![(method, None)];
    let adapter = attach(&methods, &[], model.sites(), model.info(), number as u64).unwrap().adapter;
    for (i, p) in adapter.trainable().enumerate() {
        let value = p.param.value();
        let noise = sample(value.shape(), 1000 * number as u64 + i as u64).scale(0.3).unwrap();
        p.param.set(value.add(&noise).unwrap()).unwrap();
    }
    Made { name, adapter: Arc::new(adapter), methods }
}

/// `count` tokens of each of the rows `which` from its token `from` on, `before` columns of padding before each row.
fn inputs(
    which: std::ops::Range<usize>,
    from: usize,
    count: impl Fn(usize) -> usize,
    before: bool,
) -> Inputs {
    let (mut ids, mut positions, mut lengths) = (vec![], vec![], vec![]);
    let longest = LENGTHS.iter().max().unwrap();
    for row in which {
        let (start, own) = (if from == 0 { 0 } else { LENGTHS[row] + from - 1 }, count(row));
        let pad = if before { longest - LENGTHS[row] } else { 0 };
        ids.extend((start..start + own).map(|i| 5 + ((row * 31 + i * 17) % 60) as i64));
        positions.extend((start..start + own).map(|i| (pad + i) as i32));
        lengths.push(own);
    }
    let count = ids.len();
    let layout = Layout::new(&lengths, positions).unwrap();
    Inputs::tokens(Tensor::from_i64(ids, [count]).unwrap(), None, layout)
}

/// Routes of the rows `which`, one each.
fn routes(all: &[Option<Made>], which: std::ops::Range<usize>) -> Vec<Route> {
    let adapter = |row: usize| all[row].as_ref().map(|made| made.adapter.clone());
    which.enumerate().map(|(i, row)| Route { sequences: i..i + 1, adapter: adapter(row) }).collect()
}

/// A pass of the rows `which`, after the methods' first look.
fn logits(
    model: &dyn Model,
    all: &[Option<Made>],
    which: std::ops::Range<usize>,
    inputs: &Inputs,
    of: impl Fn(Pass) -> Pass,
) -> Result<Tensor> {
    let cx = of(Pass::with_routes(inputs.layout.clone(), routes(all, which.clone()))?);
    let first = || model.features(inputs, &Pass::new(inputs.layout.clone(), None));
    for made in all[which].iter().flatten() {
        made.methods.iter().try_for_each(|(m, _)| m.before_forward(&made.adapter, &first, &cx))?;
    }
    model.forward(inputs, &cx)
}

fn difference(found: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(1e-9f32, |m, v| m.max(v.abs()));
    assert_eq!(found.len(), expected.len());
    let far = found.iter().zip(expected).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    if found.iter().any(|v| v.is_nan()) { f32::INFINITY } else { far / largest }
}

/// Runs `check` on models of one stack, each with an adapter of each kind.
fn each(models: &[&str], check: impl Fn(&str, &Loaded, &[Option<Made>])) {
    for name in models {
        let dir = fixtures::golden().join("models").join(name);
        let loaded = fixtures::model(&dir, Precision::F32, Storage::Dense);
        let all: Vec<Option<Made>> = (0..LENGTHS.len()).map(|i| made(loaded.model.as_ref(), i)).collect();
        check(name, &loaded, &all);
    }
}

fn name_of(all: &[Option<Made>], row: usize) -> &'static str {
    all[row].as_ref().map_or("none", |made| made.name)
}

#[test]
fn each_row_has_the_logits_it_has_alone() {
    each(&["llama", "mistral", "qwen3", "gpt2", "bert_token", "roberta_token"], |what, loaded, all| {
        let model = loaded.model.as_ref();
        for before in [false, true] {
            let whole = inputs(0..LENGTHS.len(), 0, |row| LENGTHS[row], before);
            let together =
                no_grad(|| logits(model, all, 0..LENGTHS.len(), &whole, |cx| cx)).unwrap().to_vec().unwrap();
            let (mut at, width) = (0, model.info().outputs);
            for row in 0..LENGTHS.len() {
                let own = inputs(row..row + 1, 0, |row| LENGTHS[row], before);
                let alone = no_grad(|| logits(model, all, row..row + 1, &own, |cx| cx)).unwrap();
                let alone = alone.to_vec().unwrap();
                let off = difference(&together[at..at + alone.len()], &alone);
                assert!(off < 5e-6, "{what}, {}, padded before {before}: {off:e}", name_of(all, row));
                at += LENGTHS[row] * width;
                let plain = no_grad(|| model.forward(&own, &Pass::new(own.layout.clone(), None))).unwrap();
                let changed = difference(&alone, &plain.to_vec().unwrap());
                // Behind padding on the left, a window may have slid past a prefix already.
                let acts = all[row].is_some() && (changed > 1e-4 || before);
                assert!(acts || changed == 0.0, "{what}, {}: {changed:e}", name_of(all, row));
                assert!(all[row].is_none() || acts, "{what}, {} does nothing", name_of(all, row));
            }
        }
    });
}

#[test]
fn each_adapter_has_the_gradients_it_has_alone() {
    each(&["llama", "mistral", "gpt2", "roberta_token"], |what, loaded, all| {
        let model = loaded.model.as_ref();
        let trains = |cx: Pass| cx.training(Mode::Train { seed: 1, step: 2, micro: 0 });
        let width = model.info().outputs;
        let weights = sample(&[LENGTHS.iter().sum(), width], 99);
        let gradients = |which: std::ops::Range<usize>, at: usize, checkpointing: bool| -> Gradients {
            let own = inputs(which.clone(), 0, |row| LENGTHS[row], true);
            let y = logits(model, all, which, &own, |cx| trains(cx).checkpointing(checkpointing)).unwrap();
            let weights = weights.rows_between(at, at + y.dim(0)).unwrap();
            y.mul(&weights).unwrap().sum().unwrap().backward().unwrap()
        };
        let (together, again) = (gradients(0..LENGTHS.len(), 0, false), gradients(0..LENGTHS.len(), 0, true));
        let mut at = 0;
        for row in 0..LENGTHS.len() {
            let alone = all[row].as_ref().map(|made| (made, gradients(row..row + 1, at, false)));
            at += LENGTHS[row];
            let Some((made, alone)) = alone else { continue };
            for p in made.adapter.trainable() {
                let of = |g: &Gradients| g.get(&p.param).map(|t| t.to_vec().unwrap());
                let (found, expected) = (of(&together), of(&alone));
                assert_eq!(found.is_some(), expected.is_some(), "{what}, {}: {}", made.name, p.name);
                assert!(found == of(&again), "{what}, {}, checkpointed: {}", made.name, p.name);
                let Some((found, expected)) = found.zip(expected) else { continue };
                let off = difference(&found, &expected);
                assert!(off < 5e-5, "{what}, {}: {} is off by {off:e}", made.name, p.name);
            }
        }
    });
}

#[test]
fn each_text_goes_on_as_it_does_alone() {
    each(&["llama", "mistral", "qwen2_sliding", "gpt2"], |what, loaded, all| {
        let model = loaded.model.as_ref();
        for before in [false, true] {
            let run = |which: std::ops::Range<usize>| -> Vec<Vec<f32>> {
                let cache = Arc::new(Mutex::new(KvCache::new(model.info().layers, which.len(), 32)));
                let step = |from: usize| {
                    let own =
                        inputs(which.clone(), from, |row| if from == 0 { LENGTHS[row] } else { 1 }, before);
                    let cached = |cx: Pass| cx.cached(cache.clone());
                    no_grad(|| logits(model, all, which.clone(), &own, cached)).unwrap().to_vec().unwrap()
                };
                (0..4).map(step).collect()
            };
            let together = run(0..LENGTHS.len());
            let width = model.info().outputs;
            let mut at = 0;
            for (row, length) in LENGTHS.into_iter().enumerate() {
                let alone = run(row..row + 1);
                for (number, (whole, alone)) in together.iter().zip(&alone).enumerate() {
                    let start = if number == 0 { at } else { row };
                    let off = difference(&whole[start * width..start * width + alone.len()], alone);
                    let kind = name_of(all, row);
                    assert!(off < 1e-5, "{what}, {kind}, step {number}, padded before {before}: {off:e}");
                }
                at += length;
            }
        }
    });
}

/// Tokens `from..to` of the targets of the rows `which` of an encoder–decoder model, whose sources are whole.
fn pairs(which: std::ops::Range<usize>, from: usize, to: usize) -> Inputs {
    let token = |row: usize, i: usize| 5 + ((row * 23 + i * 13) % 60) as i64;
    let ids: Vec<i64> = which.clone().flat_map(|row| (from..to).map(move |i| token(row, i))).collect();
    let positions = which.clone().flat_map(|_| (from..to).map(|i| i as i32)).collect();
    let (count, lengths) = (ids.len(), vec![to - from; which.len()]);
    let layout = Layout::new(&lengths, positions).unwrap();
    inputs(which, 0, |row| LENGTHS[row], false).with_target(Tensor::from_i64(ids, [count]).unwrap(), layout)
}

#[test]
fn rows_of_an_encoder_and_decoder_have_what_they_have_alone() {
    let unipelt = |projection: u64| {
        Some(("unipelt", json!({ "tokens": 2, "projection": projection, "rank": 2, "reduction": 8 })))
    };
    let kinds = [
        unipelt(4),
        None,
        Some(("mam", json!({ "tokens": 3, "projection": 4, "reduction": 8 }))),
        Some(("lora", json!({ "rank": 2 }))),
        Some(("prefix", json!({ "tokens": 3 }))),
        unipelt(0),
    ];
    for name in ["t5", "t5_flan"] {
        let dir = fixtures::golden().join("models").join(name);
        let loaded = fixtures::model(&dir, Precision::F32, Storage::Dense);
        let model = loaded.model.as_ref();
        let made = |(number, kind): (usize, &Option<(&'static str, Value)>)| {
            kind.clone().map(|kind| of_kind(model, kind, number))
        };
        let all: Vec<Option<Made>> = kinds.iter().enumerate().map(made).collect();
        let run = |which: std::ops::Range<usize>| -> Vec<Vec<f32>> {
            let cache = Arc::new(Mutex::new(KvCache::new(model.info().layers, which.len(), 32)));
            let step = |(from, to): (usize, usize)| {
                let own = pairs(which.clone(), from, to);
                let cached = |cx: Pass| cx.cached(cache.clone());
                no_grad(|| logits(model, &all, which.clone(), &own, cached)).unwrap().to_vec().unwrap()
            };
            [(0, 3), (3, 4), (4, 5)].map(step).to_vec()
        };
        let (together, width) = (run(0..kinds.len()), model.info().outputs);
        let plain = |row: usize| {
            let own = pairs(row..row + 1, 0, 3);
            no_grad(|| model.forward(&own, &Pass::new(own.layout.clone(), None))).unwrap().to_vec().unwrap()
        };
        for row in 0..kinds.len() {
            let alone = run(row..row + 1);
            for (number, (whole, alone)) in together.iter().zip(&alone).enumerate() {
                let each = width * if number == 0 { 3 } else { 1 };
                let off = difference(&whole[row * each..(row + 1) * each], alone);
                assert!(off < 1e-5, "{name}, {}, step {number}: {off:e}", name_of(&all, row));
            }
            let changed = difference(&alone[0], &plain(row));
            assert_eq!(changed > 1e-4, all[row].is_some(), "{name}, {}: {changed:e}", name_of(&all, row));
        }
    }
}
