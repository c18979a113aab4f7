//! A toy model's sites for the tests of this crate: two layers of width 6, no forward pass.

use std::ops::Range;
use std::sync::Arc;

use engraft_nn::weight::Storage;
use engraft_nn::{
    Adapter, Base, Builder, Kind, Layout, Linear, ModelInfo, Norm, Pass, Patch, Patched, Result, Role, Site,
    SiteId, Sites, Sublayer, Task, Value, Weight,
};
use engraft_tensor::frozen::{Precision, RowSource};
use engraft_tensor::testing::sample;
use engraft_tensor::{Gradients, Param, Tensor};
use serde_json::{Map, Value as Json, json};

use crate::{Attached, Calibration, Chosen, Method, attach};

struct Rows(Vec<f32>, usize);

impl RowSource for Rows {
    fn shape(&self) -> (usize, usize) {
        (self.0.len() / self.1, self.1)
    }
    fn rows(&self, rows: Range<usize>, out: &mut [f32]) {
        out.copy_from_slice(&self.0[rows.start * self.1..rows.end * self.1]);
    }
}

fn rows(out: usize, inn: usize, seed: u64) -> Rows {
    Rows(sample(&[out, inn], seed).to_vec().unwrap(), inn)
}

/// A matrix as the source of a weight.
pub fn rows_of(t: &Tensor) -> Arc<dyn RowSource + Send> {
    Arc::new(Rows(t.to_vec().unwrap(), t.width()))
}

/// Sizes of a toy; its width is that of all heads together.
pub struct Toy {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub inner: usize,
    pub vocabulary: usize,
}

pub fn toy() -> (Arc<Sites>, ModelInfo) {
    toy_of(&Toy { layers: 2, heads: 3, kv_heads: 2, head_dim: 2, inner: 8, vocabulary: 11 })
}

pub fn toy_of(toy: &Toy) -> (Arc<Sites>, ModelInfo) {
    let (width, kv) = (toy.heads * toy.head_dim, toy.kv_heads * toy.head_dim);
    let mut s = Sites::default();
    let table = Arc::new(Weight::table(Arc::new(rows(toy.vocabulary, width, 1)), None));
    let kind = Kind::Embedding { rows: toy.vocabulary, width };
    s.add_value("tok", Role::Embed, None, kind, Value::Weight(table), "tok.weight");
    s.add("tok.prompt", Role::Prompt, None, Kind::Prompt { width });
    for layer in 0..toy.layers {
        s.add(format!("layers.{layer}"), Role::Block, Some(layer), Kind::Block { width });
        let linears = [
            ("attn.q", Role::Q, width, width, true),
            ("attn.k", Role::K, kv, width, true),
            ("attn.v", Role::V, kv, width, false),
            ("mlp.down", Role::Down, width, toy.inner, true),
        ];
        for (number, (name, role, out, inn, bias)) in linears.into_iter().enumerate() {
            let path = format!("layers.{layer}.{name}");
            let seed = 10 * layer as u64 + number as u64 + 2;
            let weight = Weight::matrix(&rows(out, inn, seed), Storage::Dense, Precision::F32).unwrap();
            let bias = bias.then(|| sample(&[out], seed + 100));
            Linear::declare(&mut s, (&path, &path), role, Some(layer), Arc::new(weight), bias);
        }
        let at = |name: &str| format!("layers.{layer}.{name}");
        s.add(
            at("attn"),
            Role::Attention,
            Some(layer),
            Kind::KeyValue { heads: toy.kv_heads, dim: toy.head_dim },
        );
        s.add(at("attention_adapters"), Role::Attention, Some(layer), Kind::Sublayer { width });
        s.add(at("output_adapters"), Role::Mlp, Some(layer), Kind::Sublayer { width });
        let norm = at("norm");
        Norm::declare(
            &mut s,
            (&norm, &norm),
            Some(layer),
            sample(&[width], 50),
            Some(sample(&[width], 51)),
            1e-5,
        );
    }
    let weight = Weight::matrix(&rows(3, width, 90), Storage::Dense, Precision::F32).unwrap();
    Linear::declare(&mut s, ("head", "head"), Role::Head, None, Arc::new(weight), Some(sample(&[3], 91)));
    let info = ModelInfo {
        architecture: "toy".into(),
        class: None,
        task: Task::CausalLm,
        width,
        layers: toy.layers,
        heads: toy.heads,
        kv_heads: toy.kv_heads,
        head_dim: toy.head_dim,
        vocabulary: toy.vocabulary,
        outputs: 3,
        max_positions: 32,
        picture: None,
        any_size: None,
    };
    (Arc::new(s), info)
}

/// A method of the registry from a recipe's settings.
pub fn chosen(name: &str, settings: Json) -> Chosen {
    let empty = Map::new();
    ((crate::find(name).unwrap().from_settings)(settings.as_object().unwrap_or(&empty)).unwrap(), None)
}

pub fn attached(methods: &[Chosen], train_also: &[&str]) -> Attached {
    let (sites, info) = toy();
    let train_also: Vec<String> = train_also.iter().map(|s| s.to_string()).collect();
    attach(methods, &train_also, &sites, &info, 7).unwrap()
}

/// How many numbers a method trains at the sites that it takes by default.
pub fn trained(name: &str, settings: Json) -> usize {
    attached(&[chosen(name, settings)], &[]).adapter.trained_count()
}

/// Moves every trained tensor off its start, by up to `by`.
pub fn stir(a: &Attached, by: f32) {
    for (number, p) in a.adapter.trainable().enumerate() {
        let value = p.param.value();
        let moved = value.add(&sample(value.shape(), 1000 + number as u64).scale(by).unwrap()).unwrap();
        p.param.set(moved).unwrap();
    }
}

pub fn site_id(sites: &Sites, path: &str) -> SiteId {
    sites.iter().find(|s| s.path == path).unwrap().id
}

pub fn names(a: &Attached) -> Vec<&str> {
    a.adapter.params().iter().map(|p| p.name.as_str()).collect()
}

/// What the patches at a weight site give: by their own forward, and from W′.
pub fn both_ways(a: &Attached, path: &str, x: &Tensor) -> (Tensor, Tensor) {
    let (sites, _) = toy();
    let site = sites.get(site_id(&sites, path));
    let Value::Weight(weight) = &site.value else { panic!("{path} is no weight") };
    let cx = Pass::new(Layout::counted(&[x.dim(0)]).unwrap(), None);
    let patched = Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx);
    let dense = patched.dense().unwrap();
    match site.kind {
        Kind::Embedding { .. } => (patched.lookup(x).unwrap(), dense.gather(x).unwrap()),
        _ => (patched.forward(x).unwrap(), x.matmul_t(&dense).unwrap()),
    }
}

/// (residual, output, what the patch of a sublayer makes of them), under a norm that doubles where `post_norm`.
pub fn at_sublayer(a: &Attached, path: &str, post_norm: bool) -> Result<(Tensor, Tensor, Tensor)> {
    let (sites, _) = toy();
    let site = sites.get(site_id(&sites, path));
    let [Patch::Sublayer(p)] = a.adapter.at(site.id) else { panic!("no adapter at {path}") };
    let (residual, output) = (sample(&[4, 6], 1), sample(&[4, 6], 2));
    let norm = |x: &Tensor| Ok(x.scale(2.0)?);
    let norm = post_norm.then_some(&norm as &dyn Fn(&Tensor) -> Result<Tensor>);
    let cx = Pass::new(Layout::counted(&[4])?, None);
    let s = Sublayer { residual: &residual, input: &residual, output: output.clone(), norm };
    let y = p.output(&s, site, &cx)?;
    Ok((residual, output, y))
}

/// The frozen weight of a site.
pub fn frozen(path: &str) -> Tensor {
    let (sites, _) = toy();
    match &sites.get(site_id(&sites, path)).value {
        Value::Weight(w) => w.dense().unwrap(),
        Value::Vector(v) => v.clone(),
        Value::None => panic!("{path} holds nothing"),
    }
}

/// W′ of a site, as merging makes it.
pub fn merged(a: &Attached, path: &str) -> Tensor {
    let (sites, _) = toy();
    let all = engraft_nn::merged_tensors(&sites, &a.adapter).unwrap();
    all.iter().find(|m| m.site.path == path).unwrap().value.clone()
}

/// A tensor of an adapter.
pub fn value_of(a: &Attached, name: &str) -> Tensor {
    let found = a.adapter.params().iter().find(|p| p.name == name);
    found.unwrap_or_else(|| panic!("{name} is not there")).param.value()
}

/// The vector that the patches at a site make.
pub fn vector(a: &Attached, path: &str) -> Tensor {
    let (sites, _) = toy();
    let mut v = frozen(path);
    for patch in a.adapter.at(site_id(&sites, path)) {
        let Patch::Vector(p) = patch else { panic!("not a vector patch at {path}") };
        v = p.vector(&v).unwrap();
    }
    v
}

/// The configuration that would be saved.
pub fn config(methods: &[Chosen], train_also: &[&str]) -> Json {
    let a = attached(methods, train_also);
    let (sites, info) = toy();
    let train_also: Vec<String> = train_also.iter().map(|s| s.to_string()).collect();
    crate::save_adapter(&a.adapter, methods, &train_also, "some/base", &sites, &info).unwrap().0
}

/// `config` with some keys changed.
pub fn with(mut config: Json, changes: Json) -> Json {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Saving, loading and saving again gives the same file.
pub fn survives_saving(methods: &[Chosen], train_also: &[&str]) {
    let a = attached(methods, train_also);
    stir(&a, 0.3);
    let (sites, info) = toy();
    let also: Vec<String> = train_also.iter().map(|s| s.to_string()).collect();
    let (config, tensors) = crate::save_adapter(&a.adapter, methods, &also, "b", &sites, &info).unwrap();
    let loaded = crate::load_adapter(&config, tensors.clone(), &sites, &info).unwrap();
    let again = crate::save_adapter(&loaded.adapter, &loaded.methods, &loaded.train_also, "b", &sites, &info)
        .unwrap();
    assert_eq!(again.0, config);
    assert_eq!(again.1.len(), tensors.len());
    for ((name, found), (expected_name, expected)) in again.1.iter().zip(&tensors) {
        assert_eq!(name, expected_name);
        assert_eq!(found.dtype(), expected.dtype(), "{name}");
        assert_eq!(found.to_bytes().unwrap(), expected.to_bytes().unwrap(), "{name}");
    }
    let unknown = with(config, json!({ "sharpness": 2.0 }));
    let union = unknown["peft_type"] == "ENGRAFT_UNION" || unknown.get("config").is_some();
    assert!(union || crate::load_adapter(&unknown, tensors, &sites, &info).is_err(), "an unknown key passed");
}

/// Linear layers side by side in place of a model: batch `n` has an input of its own for each of the targets, and the loss is
/// the sum of their outputs times fixed numbers, so that inputs and gradients of outputs are known.
pub struct Linears {
    sites: Arc<Sites>,
    info: ModelInfo,
    targets: Vec<SiteId>,
}

impl Linears {
    /// Rows of a batch.
    pub const ROWS: usize = 5;
    /// Its sequences.
    pub const SEQUENCES: [Range<usize>; 2] = [0..2, 2..5];
    /// Its labels.
    pub const LABELS: usize = 3;

    pub fn new(paths: &[&str]) -> Linears {
        let (sites, info) = toy();
        let targets = paths.iter().map(|path| site_id(&sites, path)).collect();
        Linears { sites, info, targets }
    }

    /// The input of a target in batch `number`, and the gradient of its output.
    pub fn seen(&self, site: &Site, number: u64) -> (Tensor, Tensor) {
        let Kind::Linear { out, inn, .. } = site.kind else { panic!("{} is not linear", site.path) };
        let seed = 100 * site.id.0 as u64 + number;
        (sample(&[Self::ROWS, inn], seed), sample(&[Self::ROWS, out], 7777 + seed))
    }

    /// An adapter that `attach` fills at the targets.
    pub fn adapter(&self, attach: &dyn Fn(&mut Builder<'_>) -> Result<()>) -> Arc<Adapter> {
        let mut b = Builder::new(&self.sites, &self.info, 7);
        b.set_targets(self.targets.clone());
        attach(&mut b).unwrap();
        Arc::new(b.finish())
    }

    /// The loss of batch `number` under an adapter.
    pub fn loss(&self, number: u64, adapter: &Arc<Adapter>) -> Result<Tensor> {
        let cx = Pass::new(Layout::counted(&Self::SEQUENCES.map(|s| s.len()))?, None);
        let mut loss = Tensor::scalar(0.0);
        for site in self.targets.iter().map(|&id| self.sites.get(id)) {
            let (x, dy) = self.seen(site, number);
            let Value::Weight(weight) = &site.value else { panic!("{} is no weight", site.path) };
            let y = Patched::new(weight.as_ref(), adapter.at(site.id), site, &cx).forward(&x)?;
            loss = loss.add(&y.mul(&dy)?.sum()?)?;
        }
        Ok(loss)
    }
}

impl Calibration for Linears {
    fn sites(&self) -> &Arc<Sites> {
        &self.sites
    }
    fn info(&self) -> &ModelInfo {
        &self.info
    }
    fn seed(&self) -> u64 {
        7
    }
    fn targets(&self) -> &[SiteId] {
        &self.targets
    }
    fn micro_batches(&self) -> u64 {
        4
    }
    fn labels(&self, _number: u64) -> Result<usize> {
        Ok(Self::LABELS)
    }
    fn forward(&self, number: u64, probe: &Arc<Adapter>) -> Result<()> {
        self.loss(number, probe).map(|_| ())
    }
    fn backward(&self, number: u64, probe: &Arc<Adapter>) -> Result<Gradients> {
        Ok(self.loss(number, probe)?.backward()?)
    }
}

/// Prepares a method's adapter for [`Linears`].
pub fn prepared(method: &dyn Method, paths: &[&str]) -> (Linears, Arc<Adapter>) {
    let base = Linears::new(paths);
    let adapter = base.adapter(&|b| method.attach(b));
    method.prepare(&adapter, &base).unwrap();
    (base, adapter)
}

/// A parameter of an adapter by its name.
pub fn param(adapter: &Adapter, name: &str) -> Param {
    adapter.params().iter().find(|p| p.name == name).unwrap_or_else(|| panic!("no {name}")).param.clone()
}
