//! Two methods that stretch the contract, sketched for real: a ladder side network, whose trunk must stay off the tape, and
//! a router that needs a first pass without adapters.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use common::*;
use engraft_nn::{
    Adapter, Base, BlockPatch, Builder, Init, Kind, Model, Pass, Patch, Result, Role, Route, Site,
    WeightPatch,
};
use engraft_tensor::ops::Unary;
use engraft_tensor::testing::sample;
use engraft_tensor::{Param, Tensor, no_grad};

/// Side state s ← tanh(½·s + D·h) beside the trunk; the last block's output becomes h + U·s.
struct Rung {
    down: Param,
    up: Option<Param>,
    /// Counts blocks whose output was recorded.
    recorded: Arc<AtomicUsize>,
}

impl BlockPatch for Rung {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        _: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let out = run(&h.detach(), cx)?;
        self.recorded.fetch_add(usize::from(out.needs_grad() || h.needs_grad()), SeqCst);
        let own = out.matmul_t(&self.down.get())?;
        let state = match cx.find("side") {
            Some(before) => before.scale(0.5)?.add(&own)?,
            None => own,
        };
        let state = state.unary(Unary::Tanh)?;
        cx.put("side", state.clone());
        match &self.up {
            Some(up) => Ok(out.add(&state.matmul_t(&up.get())?)?),
            None => Ok(out),
        }
    }
}

fn ladder(model: &dyn Model, seed: u64) -> (Arc<Adapter>, Arc<AtomicUsize>) {
    let (width, recorded) = (model.info().width, Arc::new(AtomicUsize::new(0)));
    let mut b = Builder::new(model.sites(), model.info(), seed);
    let blocks: Vec<&Site> = model.sites().of_kind(|k| matches!(k, Kind::Block { .. })).collect();
    for (i, site) in blocks.iter().enumerate() {
        let down = b.param(&format!("{}.down", site.path), &[6, width], Init::Normal(0.2)).unwrap();
        let last = i + 1 == blocks.len();
        let up = last.then(|| b.param("up", &[width, 6], Init::Normal(0.2)).unwrap());
        b.patch(site.id, Patch::Block(Box::new(Rung { down, up, recorded: recorded.clone() }))).unwrap();
    }
    (Arc::new(b.finish()), recorded)
}

fn loss(logits: &Tensor) -> Tensor {
    logits.mul(&sample(logits.shape(), 7)).unwrap().sum().unwrap()
}

/// The gradient of every parameter equals a difference along a fixed direction.
fn check_gradients(adapter: &Adapter, forward: &dyn Fn() -> Tensor) {
    let gradients = loss(&forward()).backward().unwrap();
    for p in adapter.params() {
        let value = p.param.value();
        let direction = sample(value.shape(), 3);
        let at = |h: f32| -> f64 {
            p.param.set(value.add(&direction.scale(h).unwrap()).unwrap()).unwrap();
            let logits = no_grad(forward);
            let weights = sample(logits.shape(), 7).to_vec().unwrap();
            logits.to_vec().unwrap().iter().zip(weights).map(|(&a, w)| f64::from(a) * f64::from(w)).sum()
        };
        let expected = (8.0 * (at(4e-3) - at(-4e-3)) - (at(8e-3) - at(-8e-3))) / (12.0 * 4e-3);
        p.param.set(value.clone()).unwrap();
        let gradient = gradients.get(&p.param).unwrap_or_else(|| panic!("{} has no gradient", p.name));
        let found = f64::from(gradient.mul(&direction).unwrap().sum().unwrap().item().unwrap());
        assert!(
            (found - expected).abs() < 1e-2 * expected.abs().max(0.3),
            "{}: {found} against {expected}",
            p.name
        );
    }
}

#[test]
fn a_ladder_trains_beside_an_unrecorded_trunk() {
    for name in ["llama", "bert", "roberta_token"] {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        let (adapter, recorded) = ladder(model, 1);
        let inputs = batch(&[&[5, 9, 17, 33, 60, 8], &[12, 4, 77, 6]]);
        for checkpointing in [false, true] {
            // Every forward is a pass of its own: the board lives as long as one.
            let cx = || Pass::new(inputs.layout.clone(), Some(adapter.clone())).checkpointing(checkpointing);
            check_gradients(&adapter, &|| model.forward(&inputs, &cx()).unwrap());
        }
        assert_eq!(recorded.load(SeqCst), 0, "{name}: the trunk was recorded");
        assert!(distance(&run(model, &inputs, Some(adapter)), &run(model, &inputs, None)) > 1e-3);
    }
}

#[test]
fn ladders_of_several_routes_keep_their_states_apart() {
    let loaded = model(&golden().join("models/llama"));
    let model = loaded.model.as_ref();
    let rows = [&[5i64, 9, 17, 33][..], &[12, 4, 77, 6], &[90, 31, 8], &[7, 7, 2, 40, 3]];
    let (a, b) = (ladder(model, 1).0, ladder(model, 2).0);
    // The same adapter twice, and none between.
    let adapters = [Some(a.clone()), Some(b), None, Some(a)];
    let route = |(i, a): (usize, &Option<Arc<Adapter>>)| Route { sequences: i..i + 1, adapter: a.clone() };
    let inputs = batch(&rows);
    let cx =
        Pass::with_routes(inputs.layout.clone(), adapters.iter().enumerate().map(route).collect()).unwrap();
    let together = no_grad(|| model.forward(&inputs, &cx)).unwrap().to_vec().unwrap();
    let alone: Vec<f32> = (0..4).flat_map(|i| run(model, &batch(&[rows[i]]), adapters[i].clone())).collect();
    assert!(distance(&together, &alone) < 2e-6);
}

/// W + Σ_e s_e·P_e, the scalings s [tokens, experts] left on the pass by the router.
struct Experts(Vec<Param>);

impl WeightPatch for Experts {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }
    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let Some(scalings) = cx.find_rows("scalings")? else {
            return Err(engraft_nn::Error::Site {
                path: site.path.clone(),
                message: "the router did not run".into(),
            });
        };
        let mut y = base.forward(x)?;
        for (e, expert) in self.0.iter().enumerate() {
            y = y.add(&x.matmul_t(&expert.get())?.mul(&scalings.narrow(1, e, 1)?)?)?;
        }
        Ok(y)
    }
    fn mergeable(&self) -> bool {
        false
    }
}

/// Experts at every q, and a router [experts, width].
fn mixture(model: &dyn Model, seed: u64) -> Arc<Adapter> {
    let mut b = Builder::new(model.sites(), model.info(), seed);
    b.param("router", &[2, model.info().width], Init::Normal(0.5)).unwrap();
    let sites: Vec<&Site> = model.sites().iter().filter(|s| s.role == Role::Q && s.is_weight()).collect();
    for site in sites {
        let Kind::Linear { out, inn, .. } = site.kind else { continue };
        let expert = |b: &mut Builder<'_>, e: usize| {
            b.param(&format!("{}.{e}", site.path), &[out, inn], Init::Normal(0.2))
        };
        let experts = (0..2).map(|e| expert(&mut b, e).unwrap()).collect();
        b.patch(site.id, Patch::Weight(Box::new(Experts(experts)))).unwrap();
    }
    Arc::new(b.finish())
}

/// First a pass without adapters, whose features the router turns into scalings, then the pass with them.
fn routed(model: &dyn Model, rows: &[&[i64]], routes: Vec<Route>, router: &Param) -> Tensor {
    let inputs = batch(rows);
    let first = no_grad(|| model.features(&inputs, &Pass::new(inputs.layout.clone(), None))).unwrap();
    let scalings = first.features.matmul_t(&router.get()).unwrap().softmax().unwrap();
    let cx = Pass::with_routes(inputs.layout.clone(), routes).unwrap();
    cx.put("scalings", scalings);
    model.forward(&inputs, &cx).unwrap()
}

#[test]
fn a_router_reads_a_first_pass_and_steers_the_second() {
    for name in ["llama", "bert_token"] {
        let loaded = model(&golden().join("models").join(name));
        let model = loaded.model.as_ref();
        let adapter = mixture(model, 5);
        let router = adapter.params()[0].param.clone();
        let rows = [&[5i64, 9, 17, 33, 60, 8][..], &[12, 4, 77, 6], &[90, 31, 8]];
        let all = |which: &[usize], adapter: &dyn Fn(usize) -> Option<Arc<Adapter>>| -> Vec<f32> {
            let routes =
                (0..which.len()).map(|i| Route { sequences: i..i + 1, adapter: adapter(which[i]) }).collect();
            let rows: Vec<&[i64]> = which.iter().map(|&i| rows[i]).collect();
            no_grad(|| routed(model, &rows, routes, &router)).to_vec().unwrap()
        };
        let some = |i: usize| (i != 1).then(|| adapter.clone());
        let together = all(&[0, 1, 2], &some);
        let alone: Vec<f32> = (0..3).flat_map(|i| all(&[i], &some)).collect();
        assert!(distance(&together, &alone) < 2e-6, "{name}");
        assert!(distance(&all(&[0], &some), &run(model, &batch(&rows[..1]), None)) > 1e-3, "{name}");

        let whole = || vec![Route { sequences: 0..3, adapter: Some(adapter.clone()) }];
        check_gradients(&adapter, &|| routed(model, &rows, whole(), &router));
    }
}
