//! What every registered method promises, on every tiny model and every way the base is kept.
//!
//! Identity at the start (or declared otherwise), gradients as finite differences, the base untouched, each fast path
//! equal to its definition, merged equal to adapted, saved equal to loaded, batch-mates independent, checkpointing to the
//! same bits, unknown keys rejected.

mod fixtures;

use std::sync::{Arc, Mutex};

use engraft_method::{Chosen, METHODS, attach, find, load_adapter, look_first, save_adapter, settle};
use engraft_model::Loaded;
use engraft_nn::weight::Storage;
use engraft_nn::{
    Adapter, Builder, Error, Init, Inputs, Kind, KvCache, LayerChoice, Layout, Matcher, Mode, NamedParam,
    Pass, Patch, Patched, Replacement, Result, Role, Route, Site, Stack, Targets, Task, Value,
    merged_tensors,
};
use engraft_tensor::frozen::Precision;
use engraft_tensor::testing::sample;
use engraft_tensor::{Gradients, Tensor, no_grad};
use serde_json::json;

const LENGTHS: [usize; 4] = [5, 3, 6, 2];
/// One model of every architecture and task.
const MODELS: [&str; 13] = [
    "bert",
    "bert_encoder",
    "bert_mlm",
    "dinov2_swiglu",
    "gpt2",
    "gpt2_cls",
    "llama_tied",
    "mistral",
    "post_vit",
    "qwen3",
    "roberta_token",
    "t5",
    "vit",
];
const NF4: Storage = Storage::Nf4 { block: 64, double: false };

#[test]
fn on_f32_bases() {
    every_method(Precision::F32, Storage::Dense);
}

#[test]
fn on_bf16_bases() {
    every_method(Precision::Bf16, Storage::Dense);
}

#[test]
fn on_nf4_bases() {
    every_method(Precision::F32, NF4);
}

#[test]
fn unknown_keys_are_rejected() {
    let unknown = json!({ "sharpness": 2.0 });
    for entry in METHODS {
        let Err(error) = (entry.from_settings)(unknown.as_object().unwrap()) else {
            panic!("{}", entry.info.name)
        };
        assert!(error.to_string().contains("sharpness"), "{error}");
        let config = json!({ "peft_type": entry.info.peft_type, "num_virtual_tokens": 3, "sharpness": 2.0,
            "config": { "reduction_factor": 4, "sharpness": 2.0 } });
        let Err(error) = (entry.from_file)(&config) else { panic!("{}", entry.info.name) };
        assert!(error.to_string().contains("sharpness"), "{error}");
    }
}

/// The example of every method, variants that an example cannot show at once, and a union.
fn adapters(decoder_reads_encoder: bool) -> Vec<(String, Vec<Chosen>)> {
    let of = |name: &str, settings: serde_json::Value, targets: Option<Targets>| {
        vec![((find(name).unwrap().from_settings)(settings.as_object().unwrap()).unwrap(), targets)]
    };
    let mut all: Vec<(String, Vec<Chosen>)> =
        METHODS.iter().map(|e| (e.info.name.to_string(), vec![((e.example)(), None)])).collect();
    all.push(("prompt, noise".into(), of("prompt", json!({ "tokens": 3, "init": "random" }), None)));
    let small = json!({ "tokens": 3, "encoder_hidden_size": 5 });
    all.push(("p_tuning, perceptron".into(), of("p_tuning", small, None)));
    all.push(("prefix, whole".into(), of("prefix", json!({ "tokens": 3, "dropout": 0.1 }), None)));
    all.push(("llama_adapter, scalar".into(), of("llama_adapter", json!({ "adapter_layers": 1 }), None)));
    all.push(("vpt, shallow".into(), of("vpt", json!({ "tokens": 2, "init": "normal" }), None)));
    let tables = Targets::roles(&[Role::Embed, Role::PatchEmbed, Role::Q, Role::Down]);
    all.push(("lora, tables".into(), of("lora", json!({ "rank": 2 }), Some(tables))));
    let linears = Targets::from(Matcher::AllLinear);
    all.push(("lora, own bias".into(), of("lora", json!({ "rank": 2, "lora_bias": true }), Some(linears))));
    all.push(("dora".into(), of("lora", json!({ "rank": 2, "dora": true }), None)));
    let tables = Targets::roles(&[Role::Embed, Role::Down]);
    all.push(("dora, tables".into(), of("lora", json!({ "rank": 2, "dora": true }), Some(tables))));
    all.push(("lora, mixer".into(), of("lora", json!({ "rank": 2, "mixer": "kaiming" }), None)));
    all.push(("lora, frozen A".into(), of("lora", json!({ "rank": 2, "freeze_a": true }), None)));
    for init in ["pissa", "mica", "eva"] {
        all.push((format!("lora, {init}"), of("lora", json!({ "rank": 2, "init": init }), None)));
    }
    let sequences = json!({ "rank": 2, "experts": 3, "scalings": "sequence", "enable_softmax": false });
    all.push(("xlora, sequences".into(), of("xlora", sequences, None)));
    all.push(("pfeiffer".into(), of("bottleneck", json!({ "reduction": 4, "activation": "gelu" }), None)));
    all.push((
        "parallel".into(),
        of("bottleneck", json!({ "form": "parallel", "activation": "tanh" }), None),
    ));
    let mut union = of("lora", json!({ "rank": 2 }), None);
    union.extend(of("ia3", json!({}), None));
    union.extend(of("prefix", json!({ "tokens": 2 }), None));
    all.push(("union".into(), union));
    let perceptrons = json!({ "reduction": 2, "block": "mlp", "activation": "gelu", "side_layers": [0] });
    all.push(("lst, mlp".into(), of("lst", perceptrons, None)));
    all.push(("res_tuning, sum".into(), of("res_tuning", json!({ "bottleneck": 3, "mix": "sum" }), None)));
    if decoder_reads_encoder {
        let everywhere = json!({ "tokens": 2, "at": ["encoder", "decoder", "cross"] });
        all.push(("prefix, everywhere".into(), of("prefix", everywhere, None)));
        let crossed = Targets::roles(&[Role::CrossQ, Role::CrossV]);
        let whole = [Role::CrossQ, Role::CrossK, Role::CrossV, Role::CrossO];
        all.push(("full, cross".into(), of("full", json!({}), Some(Targets::roles(&whole)))));
        all.push(("lora, cross".into(), of("lora", json!({ "rank": 2 }), Some(crossed))));
    }
    all
}

/// Every method that can be in some layers alone, in the last.
fn in_last_layer(loaded: &Loaded) -> Vec<(String, Vec<Chosen>)> {
    let sites = loaded.model.sites();
    let last = sites.iter().filter_map(|s| s.layer).max().unwrap_or(0);
    let layers = Some(LayerChoice { layers: vec![last], ..LayerChoice::default() });
    let targets = Targets { layers, ..Matcher::Own.into() };
    let of = |entry: &&engraft_method::Entry| {
        let mut method = (entry.example)();
        let targets = settle(method.as_mut(), Some(targets.clone()), sites);
        (format!("{}, last layer", entry.info.name), vec![(method, targets)])
    };
    METHODS.iter().filter(|entry| (entry.example)().by_layers()).map(of).collect()
}

/// What only some models have: patches of pictures under magnitudes, modules that had other names before.
fn of_model(loaded: &Loaded) -> Vec<(String, Vec<Chosen>)> {
    let of = |title: &str, name: &str, settings: serde_json::Value, targets: &Targets| {
        let method = (find(name).unwrap().from_settings)(settings.as_object().unwrap()).unwrap();
        (title.to_string(), vec![(method, Some(targets.clone()))])
    };
    let sites = loaded.model.sites();
    let mut all = Vec::new();
    if sites.iter().any(|s| matches!(s.kind, Kind::Convolution { .. })) {
        let patches = Targets::roles(&[Role::PatchEmbed]);
        all.push(of("dora, patches", "lora", json!({ "rank": 2, "dora": true }), &patches));
    }
    if let Some(older) = sites.older() {
        let wanted = |s: &&Site| matches!(s.role, Role::Q | Role::Up | Role::Down) && s.is_weight();
        let names = Targets::names(older.iter().filter(wanted).map(|s| s.path.clone()));
        all.push(of("lora, older names", "lora", json!({ "rank": 2, "bias": "all" }), &names));
        for name in ["ia3", "bitfit", "full"] {
            all.push(of(&format!("{name}, older names"), name, json!({}), &names));
        }
    }
    all
}

fn every_method(precision: Precision, storage: Storage) {
    let models = fixtures::golden().join("models");
    let mut failures = Vec::new();
    let (mut count, mut met) = (0, 0);
    for (model, name) in fixtures::directories(&models).into_iter().enumerate() {
        let loaded = fixtures::model(&models.join(&name), precision, storage);
        let crossed = loaded.model.sites().iter().any(|s| s.role == Role::CrossAttention);
        let all = adapters(crossed).into_iter().chain(of_model(&loaded)).chain(in_last_layer(&loaded));
        for (number, (title, methods)) in all.enumerate() {
            let exact = precision == Precision::F32;
            // Methods see sites alone: each meets one model of every architecture and task, a fifth of the others, and other
            // ways to keep the base on an eighth of all. `ENGRAFT_ONLY` tries a method on every model.
            let usual = exact && storage == Storage::Dense;
            let turn = match (usual, MODELS.contains(&name.as_str())) {
                (true, true) => true,
                (true, false) => (model + number).is_multiple_of(5),
                (false, _) => (model + number).is_multiple_of(8),
            };
            let is_asked =
                std::env::var("ENGRAFT_ONLY").is_ok() && (usual || (model + number).is_multiple_of(3));
            if !fixtures::wanted(&title) || !turn && !is_asked {
                continue;
            }
            met += 1;
            if !fixtures::in_part(met) {
                continue;
            }
            let setting = Setting { title: &title, loaded: &loaded, exact, methods: &methods };
            count += 1;
            if let Err(problem) = setting.check() {
                failures.push(format!("{title} on {name}: {problem}"));
            }
        }
    }
    assert!(failures.is_empty(), "{} of {count}:\n{}", failures.len(), failures.join("\n"));
}

/// One method, or union, on one model.
struct Setting<'a> {
    title: &'a str,
    loaded: &'a Loaded,
    /// Whether products are computed in f32.
    exact: bool,
    methods: &'a [Chosen],
}

type Checked = std::result::Result<(), String>;

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(what()) }
}

impl Setting<'_> {
    fn check(&self) -> Checked {
        let before = self.logits(None)?;
        let adapter = match self.attach(1) {
            Err(Error::Unsupported(_)) if self.impossible() => return Ok(()),
            Ok(_) if self.impossible() => return Err("attaches where it cannot work".into()),
            other => other.map_err(|e| e.to_string())?,
        };
        let info = self.methods[0].0.info();
        let sites = self.loaded.model.sites();
        let starts_as_base =
            |m: &Chosen| m.0.info().identity_at_init && m.0.followed(&adapter, sites).is_empty();
        if self.methods.iter().all(starts_as_base) {
            close("at the start", &self.logits(Some(&adapter))?, &before, self.tolerance())?;
        }
        stir(&adapter, 1);
        let adapted = self.logits(Some(&adapter))?;
        ensure(difference(&adapted, &before) > 1e-4, || "the adapter changes nothing".into())?;
        let gradients = self.gradients(&adapter, false).map_err(|e| e.to_string())?;
        if self.exact {
            self.finite_differences(&adapter, &gradients)?;
        }
        self.checkpointing(&adapter, &gradients)?;
        let after = self.logits(None)?;
        ensure(after.to_vec().unwrap() == before.to_vec().unwrap(), || "the base has changed".into())?;
        self.fast_paths(&adapter)?;
        let mergeable = self.methods.iter().all(|m| m.0.info().mergeable);
        match self.merged(&adapter) {
            Ok(merged) if mergeable => {
                close("merged", &self.logits(Some(&merged))?, &adapted, 10.0 * self.tolerance())?
            }
            Ok(_) => return Err(format!("{} merges and says it does not", info.title)),
            Err(Error::Mismatch(lines)) if !mergeable || self.carries_own_bias(&lines) => {}
            Err(e) => return Err(e.to_string()),
        }
        self.saved(&adapter, &adapted)?;
        self.cached(&adapter)?;
        self.batch_mates(&adapter)
    }

    /// What a method says it cannot do on this model.
    fn impossible(&self) -> bool {
        let sites = self.loaded.model.sites();
        let name = self.methods[0].0.info().name;
        let has = |is: &dyn Fn(&Site) -> bool| sites.iter().any(is);
        let table = has(&|s| s.role == Role::Embed && s.is_weight());
        // Its example starts as tokens.
        name == "prompt" && self.title == "prompt" && !table
            || ["dept", "trainable_tokens"].contains(&name) && !table
            || self.title == "xlora" && self.loaded.model.info().task == Task::Seq2Seq
            || name == "coda" && self.loaded.model.info().task == Task::CausalLm
            // `peft`'s form of a prompt in attention goes past the bias of the output projection.
            || self.title == "llama_adapter, scalar"
                && has(&|s| s.role == Role::O && sites.bias_of(&s.path).is_some())
                && !has(&|s| s.role == Role::Qkv)
            || name == "lpt"
                && !has(&|s| s.role == Role::Block && s.layer == Some(1) && s.stack != Stack::Decoder)
            || name == "bitfit" && !has(&|s| s.path.ends_with(".bias"))
            // Their prefix, in AdapterHub's form, has no layers left out in two stacks.
            || ["mam", "unipelt"].contains(&name)
                && self.title.ends_with("last layer")
                && has(&|s| s.stack == Stack::Decoder)
                && has(&|s| s.layer == Some(1))
            // It is in the encoder alone.
            || self.title == "coda, last layer"
                && has(&|s| s.stack == Stack::Decoder)
                && sites.iter().filter_map(|s| s.layer).max()
                    != sites.iter().filter(|s| s.stack == Stack::Encoder).filter_map(|s| s.layer).max()
            || name == "head" && !has(&|s| s.role == Role::Head && s.is_weight())
    }

    /// A product's own bias cannot be folded into a layer that has none.
    fn carries_own_bias(&self, lines: &[String]) -> bool {
        let sites = self.loaded.model.sites();
        lines.iter().all(|l| l.split(':').next().is_some_and(|path| sites.bias_of(path).is_none()))
    }

    fn tolerance(&self) -> f32 {
        if self.exact { 2e-5 } else { 2e-2 }
    }

    fn attach(&self, seed: u64) -> Result<Arc<Adapter>> {
        let (sites, info) = (self.loaded.model.sites(), self.loaded.model.info());
        Ok(Arc::new(attach(self.methods, &[], sites, info, seed)?.adapter))
    }

    /// Sequences of fixed lengths with ids far from the special ones, or as many pictures.
    fn inputs(&self, which: std::ops::Range<usize>) -> Inputs {
        if let Some(p) = self.loaded.model.info().picture {
            let all = sample(&[LENGTHS.len(), p.channels, p.height, p.width], 7);
            return Inputs::pixels(all.rows_between(which.start, which.end).unwrap()).unwrap();
        }
        let vocabulary = self.loaded.model.info().vocabulary as i64;
        let start = which.start;
        let first: usize = LENGTHS[..start].iter().sum();
        let lengths = &LENGTHS[which];
        let count: usize = lengths.iter().sum();
        let ids = (first..first + count).map(|i| 5 + (i as i64 * 37 + 11) % (vocabulary - 6)).collect();
        let layout = Layout::counted(lengths).unwrap();
        let inputs = Inputs::tokens(Tensor::from_i64(ids, [count]).unwrap(), None, layout);
        if self.loaded.model.info().task != Task::Seq2Seq {
            return inputs;
        }
        // Targets of other lengths than their sources.
        let shorter = |n: &usize| n / 2 + 1;
        let first: usize = LENGTHS[..start].iter().map(shorter).sum();
        let lengths: Vec<usize> = lengths.iter().map(shorter).collect();
        let count: usize = lengths.iter().sum();
        let ids = (0..count).map(|i| 5 + ((first + i) as i64 * 23 + 7) % (vocabulary - 6)).collect();
        inputs.with_target(Tensor::from_i64(ids, [count]).unwrap(), Layout::counted(&lengths).unwrap())
    }

    fn logits(&self, adapter: Option<&Arc<Adapter>>) -> std::result::Result<Tensor, String> {
        let inputs = self.inputs(0..LENGTHS.len());
        let cx = Pass::new(inputs.layout.clone(), adapter.cloned());
        if let Some(adapter) = adapter {
            self.before_forward(adapter, &inputs, &cx).map_err(|e| e.to_string())?;
        }
        no_grad(|| self.loaded.model.forward(&inputs, &cx)).map_err(|e| e.to_string())
    }

    /// What the methods look at before a pass.
    fn before_forward(&self, adapter: &Arc<Adapter>, inputs: &Inputs, cx: &Pass) -> Result<()> {
        look_first(self.methods, adapter, self.loaded.model.as_ref(), inputs, cx)
    }

    /// A projection of the logits on fixed numbers, as the loss.
    fn gradients(&self, adapter: &Arc<Adapter>, checkpointing: bool) -> Result<Gradients> {
        let logits = self.trained_logits(adapter, checkpointing)?;
        Ok(logits.mul(&sample(logits.shape(), 99))?.sum()?.backward()?)
    }

    /// Logits as training sees them: what is drawn is drawn.
    fn trained_logits(&self, adapter: &Arc<Adapter>, checkpointing: bool) -> Result<Tensor> {
        let inputs = self.inputs(0..LENGTHS.len());
        let mode = Mode::Train { seed: 1, step: 1, micro: 0 };
        let cx = Pass::new(inputs.layout.clone(), Some(adapter.clone()));
        let cx = cx.training(mode).checkpointing(checkpointing);
        self.before_forward(adapter, &inputs, &cx)?;
        self.loaded.model.forward(&inputs, &cx)
    }

    /// The loss of [`Setting::gradients`], summed in f64.
    fn loss(&self, adapter: &Arc<Adapter>) -> std::result::Result<f64, String> {
        let logits = no_grad(|| self.trained_logits(adapter, false)).map_err(|e| e.to_string())?;
        let weights = sample(logits.shape(), 99).to_vec().unwrap();
        Ok(logits.to_vec().unwrap().iter().zip(weights).map(|(&a, w)| f64::from(a) * f64::from(w)).sum())
    }

    /// Along one random direction of every parameter, and along its steepest coordinate.
    fn finite_differences(&self, adapter: &Arc<Adapter>, gradients: &Gradients) -> Checked {
        // PVeRA trains under noise, which the differences of an evaluation do not see; its own tests compare them.
        if adapter.params().iter().any(|p| p.name.contains(".pvera_lambda")) {
            return Ok(());
        }
        // DoRA's gradient leaves the norms out on purpose; only its magnitudes have the plain one.
        // Masks are steps, which have no slope; what is sent straight through them is compared in `trajectories.rs`.
        let plain = |name: &str| {
            let magnitude = !self.is_dora(adapter) || name.ends_with("lora_magnitude_vector");
            magnitude && !name.ends_with(".mask_scores")
        };
        for (number, p) in adapter.trainable().enumerate().filter(|(_, p)| plain(&p.name)) {
            let count = p.param.value().len();
            // What the output does not depend on (the pooler of an encoder) has none.
            let gradient = gradients.get(&p.param).map_or(vec![0.0; count], |g| g.to_vec().unwrap());
            let random = sample(&[count], number as u64).to_vec().unwrap();
            let length = random.iter().map(|v| v * v).sum::<f32>().sqrt();
            let steepest =
                (0..count).max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs())).unwrap_or(0);
            let mut coordinate = vec![0.0; count];
            coordinate[steepest] = 1.0;
            for direction in [random.iter().map(|v| v / length).collect(), coordinate] {
                self.directional(adapter, p, &gradient, direction)?;
            }
        }
        Ok(())
    }

    fn is_dora(&self, adapter: &Adapter) -> bool {
        adapter.params().iter().any(|p| p.name.ends_with("lora_magnitude_vector"))
    }

    /// Curvature asks for small steps, rounding for large ones: one of them must agree.
    fn directional(
        &self,
        adapter: &Arc<Adapter>,
        p: &NamedParam,
        gradient: &[f32],
        direction: Vec<f32>,
    ) -> Checked {
        let start = p.param.value();
        let found: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
        let norm = gradient.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        let direction = Tensor::from_vec(direction, start.shape()).unwrap();
        let along = |step: f32| -> std::result::Result<f64, String> {
            p.param.set(start.add(&direction.scale(step).unwrap()).unwrap()).unwrap();
            let loss = self.loss(adapter);
            p.param.set(start.clone()).unwrap();
            loss
        };
        let mut seen = Vec::new();
        for step in [1e-2f32, 1e-3, 1e-1, 3e-4, 3e-3] {
            // Fourth-order central difference.
            let (a, b) = (along(step)? - along(-step)?, along(2.0 * step)? - along(-2.0 * step)?);
            let expected = (8.0 * a - b) / (12.0 * f64::from(step));
            if (found - expected).abs() <= self.slack() * norm + 2e-4 {
                return Ok(());
            }
            seen.push(expected);
        }
        Err(format!("{}: gradient {found}, differences {seen:?}", p.name))
    }

    /// How far a difference may be off, as a share of the gradient. Across kinks (a ReLU's, those of CoDA's choice)
    /// differences are means of two slopes and show only what is far off; what such models train is compared step by step in `trajectories.rs`.
    fn slack(&self) -> f64 {
        let config = self.loaded.config.as_object().unwrap();
        // T5's first files name no activation.
        let unnamed = config.contains_key("d_ff") && !config.contains_key("feed_forward_proj");
        // Some methods have kinks of their own.
        let own = ["adaptformer", "ciat", "coda", "lpt", "propetl", "s4", "xlora"]
            .contains(&self.methods[0].0.info().name);
        if unnamed || own || config.values().any(|value| value == "relu") { 0.2 } else { 1e-2 }
    }

    /// Blocks that are run again give the same gradients to the bit.
    fn checkpointing(&self, adapter: &Arc<Adapter>, gradients: &Gradients) -> Checked {
        let again = self.gradients(adapter, true).map_err(|e| e.to_string())?;
        for p in adapter.trainable() {
            let bits = |g: &Gradients| g.get(&p.param).map(|t| t.to_vec().unwrap());
            ensure(bits(gradients) == bits(&again), || {
                format!("{}: checkpointing changes the gradient", p.name)
            })?;
        }
        Ok(())
    }

    /// forward and lookup equal products with W′.
    fn fast_paths(&self, adapter: &Adapter) -> Checked {
        let sites = self.loaded.model.sites();
        for site in adapter.sites().into_iter().map(|id| sites.get(id)) {
            let Value::Weight(weight) = &site.value else { continue };
            if adapter.at(site.id).iter().any(|p| matches!(p, Patch::Weight(w) if !w.mergeable())) {
                continue;
            }
            let cx = Pass::new(Layout::counted(&[4]).unwrap(), None);
            let patched = Patched::new(weight.as_ref(), adapter.at(site.id), site, &cx);
            let both = || -> Result<(Tensor, Tensor)> {
                use engraft_nn::Base;
                if let Kind::Embedding { rows, .. } = site.kind {
                    let ids = Tensor::from_i64(vec![rows as i64 - 1, 0, rows as i64 / 2, 0], [4])?;
                    return Ok((patched.lookup(&ids)?, patched.dense()?.gather(&ids)?));
                }
                let x = sample(&[4, patched.shape().1], 5);
                Ok((patched.forward(&x)?, x.matmul_t(&patched.dense()?)?))
            };
            let (fast, defined) = no_grad(both).map_err(|e| e.to_string())?;
            close(&format!("{}: fast path", site.path), &fast, &defined, self.tolerance())?;
        }
        Ok(())
    }

    /// An adapter that only replaces tensors by what merging makes of them.
    fn merged(&self, adapter: &Adapter) -> Result<Arc<Adapter>> {
        let sites = self.loaded.model.sites();
        let mut b = Builder::new(sites, self.loaded.model.info(), 0);
        for m in merged_tensors(sites, adapter)? {
            // As the engine sees it, not as the file stores it.
            let transposed = matches!(m.site.kind, Kind::Linear { transposed: true, .. });
            let value = if transposed { m.value.t()? } else { m.value };
            let shape = value.shape().to_vec();
            let param = b.fixed(&m.site.path, &shape, Init::Values(value))?;
            let patch = match m.site.kind {
                Kind::Vector { .. } => Patch::Vector(Box::new(Replacement(param))),
                _ => Patch::Weight(Box::new(Replacement(param))),
            };
            b.patch(m.site.id, patch)?;
        }
        Ok(Arc::new(b.finish()))
    }

    fn saved(&self, adapter: &Adapter, adapted: &Tensor) -> Checked {
        let (sites, info) = (self.loaded.model.sites(), self.loaded.model.info());
        let saved =
            save_adapter(adapter, self.methods, &[], "base", sites, info).map_err(|e| e.to_string())?;
        let loaded =
            load_adapter(&saved.0, saved.1.clone(), sites, info).map_err(|e| format!("loading: {e}"))?;
        let again = save_adapter(&loaded.adapter, &loaded.methods, &loaded.train_also, "base", sites, info);
        ensure(again.map_err(|e| e.to_string())?.0 == saved.0, || {
            "the configuration changes when saved again".into()
        })?;
        // A classifier that nobody trained is saved too, as peft wants it, and is then multiplied in f32, not packed. What is
        // folded when it is saved is summed in another order.
        let folded = loaded.adapter.params().len() != adapter.params().len();
        let tolerance = match (loaded.train_also.is_empty(), folded) {
            (true, false) => 0.0,
            (true, true) => self.tolerance(),
            (false, _) => 1e-2,
        };
        let logits = self.logits(Some(&Arc::new(loaded.adapter)))?;
        let (found, wanted) = (logits.to_vec().unwrap(), adapted.to_vec().unwrap());
        let largest = wanted.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        ensure(found.iter().zip(&wanted).all(|(a, b)| (a - b).abs() <= tolerance * largest), || {
            "loaded is not what was saved".into()
        })
    }

    /// Prompts of any kind, side networks, and what follows a text: continued token by token, with a cache, it has the
    /// logits of the whole text.
    fn cached(&self, adapter: &Arc<Adapter>) -> Checked {
        let info = self.loaded.model.info();
        let keeps = |m: &Chosen| {
            let info = m.0.info();
            info.class == "prompt" || ["lst", "side_tuning", "res_tuning"].contains(&info.name)
        };
        let prompts = self.methods.iter().all(keeps);
        let follows = self.methods.iter().all(|m| m.0.follows());
        if info.task != Task::CausalLm || !prompts && !follows {
            return Ok(());
        }
        let run = |inputs: &Inputs, cx: &Pass| {
            self.before_forward(adapter, inputs, cx).map_err(|e| e.to_string())?;
            no_grad(|| self.loaded.model.forward(inputs, cx)).map_err(|e| e.to_string())
        };
        let inputs = self.inputs(2..3);
        // Rows that depend on what is said are those of the first tokens.
        let layout = inputs.layout.clone().with_asked(vec![3]);
        let inputs = Inputs { layout, ..inputs };
        let whole = run(&inputs, &Pass::new(inputs.layout.clone(), Some(adapter.clone())))?;
        let ids = inputs.ids().and_then(|ids| Ok(ids.to_i64()?)).map_err(|e| e.to_string())?;
        let room = ids.len() + adapter.cache_rows();
        let cache = Arc::new(Mutex::new(KvCache::new(info.layers, 1, room)));
        let mut at = 0;
        for count in [3, 1, 1, 1] {
            let layout = Layout::new(&[count], (at..at + count).map(|p| p as i32).collect()).unwrap();
            let new = Tensor::from_i64(ids[at..at + count].to_vec(), [count]).unwrap();
            let cx = Pass::new(layout.clone(), Some(adapter.clone())).cached(cache.clone());
            let part = run(&Inputs::tokens(new, None, layout), &cx)?;
            let expected = whole.rows_between(at, at + count).map_err(|e| e.to_string())?;
            close("with a cache", &part, &expected, self.tolerance())?;
            at += count;
        }
        Ok(())
    }

    /// Rows with this adapter, none, and another of the same method in one batch equal their solo runs.
    fn batch_mates(&self, adapter: &Arc<Adapter>) -> Checked {
        let other = self.attach(2).map_err(|e| e.to_string())?;
        stir(&other, 2);
        let route = |sequences, adapter| Route { sequences, adapter };
        let routes = vec![route(0..2, Some(adapter.clone())), route(2..3, None), route(3..4, Some(other))];
        let inputs = self.inputs(0..LENGTHS.len());
        let run = |inputs: &Inputs, cx: &Pass| {
            self.before_forward(adapter, inputs, cx).map_err(|e| e.to_string())?;
            no_grad(|| self.loaded.model.forward(inputs, cx)).map_err(|e| e.to_string())
        };
        let cx = Pass::with_routes(inputs.layout.clone(), routes.clone()).map_err(|e| e.to_string())?;
        let mixed = run(&inputs, &cx)?;
        let mut at = 0;
        for Route { sequences, adapter } in routes {
            let inputs = self.inputs(sequences);
            let alone = run(&inputs, &Pass::new(inputs.layout.clone(), adapter))?;
            let part = mixed.rows_between(at, at + alone.dim(0)).map_err(|e| e.to_string())?;
            close("among batch-mates", &part, &alone, self.tolerance())?;
            at += alone.dim(0);
        }
        Ok(())
    }
}

/// Moves every trained tensor off its start.
fn stir(adapter: &Adapter, seed: u64) {
    for (number, p) in adapter.trainable().enumerate() {
        let value = p.param.value();
        let noise = sample(value.shape(), 1000 * seed + number as u64).scale(0.2).unwrap();
        p.param.set(value.add(&noise).unwrap()).unwrap();
    }
}

/// The largest difference over the largest value.
fn difference(found: &Tensor, expected: &Tensor) -> f32 {
    let (a, b) = (found.to_vec().unwrap(), expected.to_vec().unwrap());
    let largest = b.iter().fold(1e-9f32, |m, v| m.max(v.abs()));
    a.iter()
        .zip(&b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0f32, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
        / largest
}

fn close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) -> Checked {
    ensure(found.shape() == expected.shape(), || {
        format!("{what}: {:?}, not {:?}", found.shape(), expected.shape())
    })?;
    let off = difference(found, expected);
    ensure(off <= tolerance, || format!("{what}: off by {off:e}"))
}
