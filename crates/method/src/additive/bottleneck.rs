//! Bottleneck adapters: a small MLP with a residual after, or beside, a sublayer.
//!
//! A(x) = s·(σ(x·W_dᵀ + b_d)·W_uᵀ + b_u), r = width/reduction. With u the stream, g the sublayer's output and N the norm
//! of a post-norm model (the identity elsewhere), the next stream is
//!   Houlsby, after attention and MLP:  N(u + g + A(g))
//!   Pfeiffer, after the MLP:           N(u + g + A(N(u + g)))
//!   parallel, beside the MLP:          N(u + g + A(u))
//!
//! Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; He et al. 2022, arXiv:2110.04366; the
//! variants and the file form are those of AdapterHub's `adapters` 1.3.
//!
//! W_d [r, width], b_d `[r]`, W_u [width, r], b_u `[width]`; own norms `[width]`; a learned s `[1]` or `[width]`.

mod file;

use engraft_nn::{
    Adapter, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, Sites, Stack, Sublayer,
    SublayerPatch,
};
use engraft_tensor::ops::{Unary, layer_norm};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value};

use crate::read::Reader;
use crate::{Described, Entry, Field, FieldKind, Info, Method};

/// PyTorch's default for a layer norm.
const NORM_EPS: f32 = 1e-5;

/// Where adapters sit and how they compute; the words are those of `adapters`.
#[derive(Clone, Debug, PartialEq)]
struct Bottleneck {
    /// Name of the adapter, part of its tensors' names.
    name: String,
    after_attention: bool,
    after_mlp: bool,
    parallel: bool,
    activation: Activation,
    /// width/r, with exceptions by layer.
    reduction: f64,
    reduction_by_layer: Vec<(usize, f64)>,
    leave_out: Vec<usize>,
    scaling: Scaling,
    dropout: f32,
    /// Norms of its own before and after.
    ln_before: bool,
    ln_after: bool,
    /// Whether the input is the normed sum of stream and output, and whether the model's norm follows.
    original_ln_before: bool,
    original_ln_after: bool,
    residual: Residual,
    /// Whether the residual is added before the norm of its own.
    residual_before_own_norm: bool,
    start: Start,
}

/// What the adapter's own residual is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Residual {
    /// The sublayer's output.
    Output,
    /// Stream plus output.
    Sum,
    /// What the adapter reads.
    Input,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scaling {
    Fixed(f64),
    Learned,
    Channel,
}

/// How the matrices start.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Start {
    /// N(0, 0.02).
    Bert,
    /// W_d Kaiming-uniform, W_u zero: no change at first.
    ZeroUp,
    /// N(0, 0.01).
    Houlsby,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Activation {
    Linear,
    LeakyRelu,
    Of(Unary),
}

const ACTIVATIONS: &[(&str, Activation)] = &[
    ("relu", Activation::Of(Unary::Relu)),
    ("swish", Activation::Of(Unary::Silu)),
    ("silu", Activation::Of(Unary::Silu)),
    ("gelu", Activation::Of(Unary::Gelu)),
    ("gelu_new", Activation::Of(Unary::GeluTanh)),
    ("gelu_pytorch_tanh", Activation::Of(Unary::GeluTanh)),
    ("quick_gelu", Activation::Of(Unary::QuickGelu)),
    ("tanh", Activation::Of(Unary::Tanh)),
    ("sigmoid", Activation::Of(Unary::Sigmoid)),
    ("leakyrelu", Activation::LeakyRelu),
    ("linear", Activation::Linear),
];

static INFO: Info = Info {
    name: "bottleneck",
    title: "Bottleneck adapter",
    class: "additive",
    sites: "sublayer",
    paper: "arXiv:1902.00751",
    summary: "a small MLP with a residual after (Houlsby, Pfeiffer) or beside (parallel) a sublayer",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_BOTTLENECK",
    fields: &[
        Field {
            name: "form",
            kind: FieldKind::OneOf(&["pfeiffer", "houlsby", "parallel"]),
            default: Some("\"pfeiffer\""),
            doc: "After the MLP, after attention and MLP, or beside the MLP.",
        },
        Field {
            name: "reduction",
            kind: FieldKind::Float { min: 1.0, max: 1e6 },
            default: None,
            doc: "Width of the model over width of the bottleneck; 16, and 2 for parallel.",
        },
        Field {
            name: "activation",
            kind: FieldKind::OneOf(&[
                "relu",
                "swish",
                "gelu",
                "gelu_new",
                "tanh",
                "sigmoid",
                "leakyrelu",
                "linear",
            ]),
            default: None,
            doc: "Function in the middle; relu, and swish for houlsby.",
        },
        Field {
            name: "scaling",
            kind: FieldKind::Float { min: 0.0, max: 1e6 },
            default: None,
            doc: "Factor on what is added; 1, and 4 for parallel.",
        },
        Field {
            name: "learned_scaling",
            kind: FieldKind::Bool,
            default: Some("false"),
            doc: "Train the factor, from 1, instead.",
        },
        Field {
            name: "dropout",
            kind: FieldKind::Float { min: 0.0, max: 0.999 },
            default: Some("0"),
            doc: "Dropout on what is added, while training.",
        },
        Field {
            name: "zero_init",
            kind: FieldKind::Bool,
            default: Some("false"),
            doc: "Start with W_u = 0, so that nothing changes at first; always so for parallel.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file: file::from_file, example };

#[derive(Clone, Copy)]
enum Form {
    Pfeiffer,
    Houlsby,
    Parallel,
}

const FORMS: &[(&str, Form)] =
    &[("pfeiffer", Form::Pfeiffer), ("houlsby", Form::Houlsby), ("parallel", Form::Parallel)];

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let mut method = Bottleneck::of(r.one_of("form", FORMS));
    method.reduction = r.float("reduction", method.reduction);
    if r.value("activation").is_some() {
        method.activation = r.one_of("activation", ACTIVATIONS);
    }
    let fixed = match method.scaling {
        Scaling::Fixed(s) => s,
        _ => 1.0,
    };
    method.scaling = Scaling::Fixed(r.float("scaling", fixed));
    if r.flag("learned_scaling", false) {
        method.scaling = Scaling::Learned;
    }
    method.dropout = r.dropout("dropout");
    if r.flag("zero_init", false) {
        method.start = Start::ZeroUp;
    }
    r.finish()?;
    Ok(Box::new(method))
}

fn example() -> Box<dyn Method> {
    Box::new(Bottleneck {
        ln_after: true,
        scaling: Scaling::Learned,
        reduction: 4.0,
        ..Bottleneck::of(Form::Houlsby)
    })
}

impl Bottleneck {
    fn of(form: Form) -> Bottleneck {
        let pfeiffer = Bottleneck {
            name: "engraft".into(),
            after_attention: false,
            after_mlp: true,
            parallel: false,
            activation: Activation::Of(Unary::Relu),
            reduction: 16.0,
            reduction_by_layer: vec![],
            leave_out: vec![],
            scaling: Scaling::Fixed(1.0),
            dropout: 0.0,
            ln_before: false,
            ln_after: false,
            original_ln_before: true,
            original_ln_after: true,
            residual: Residual::Output,
            residual_before_own_norm: false,
            start: Start::Bert,
        };
        match form {
            Form::Pfeiffer => pfeiffer,
            Form::Houlsby => Bottleneck {
                after_attention: true,
                original_ln_before: false,
                activation: Activation::Of(Unary::Silu),
                ..pfeiffer
            },
            Form::Parallel => Bottleneck {
                parallel: true,
                original_ln_before: false,
                reduction: 2.0,
                scaling: Scaling::Fixed(4.0),
                start: Start::ZeroUp,
                ..pfeiffer
            },
        }
    }

    /// Whether there is an adapter at a sublayer of layer `number`.
    fn wants(&self, site: &Site, number: Option<usize>) -> bool {
        let place = match site.role {
            Role::Attention => self.after_attention,
            Role::Mlp => self.after_mlp,
            _ => false,
        };
        place && !number.is_some_and(|layer| self.leave_out.contains(&layer))
    }

    /// r at a site of `width` in layer `number`.
    fn size_at(&self, number: Option<usize>, width: usize) -> usize {
        let by_layer = self.reduction_by_layer.iter().find(|(layer, _)| Some(*layer) == number);
        let reduction = by_layer.map_or(self.reduction, |(_, reduction)| *reduction);
        ((width as f64 / reduction).floor() as usize).max(1)
    }

    fn build(&self, b: &mut Builder<'_>, site: &Site, (width, size): (usize, usize)) -> Result<Tensors> {
        let stem = format!("{}.adapters.{}", site.path, self.name);
        let (down, up) = match self.start {
            Start::Bert => (Init::Normal(0.02), Init::Normal(0.02)),
            Start::ZeroUp => (Init::kaiming(width), Init::Zeros),
            Start::Houlsby => (Init::Normal(0.01), Init::Normal(0.01)),
        };
        let norm = |b: &mut Builder<'_>, wanted: bool, name: &str| -> Result<Option<Norm>> {
            if !wanted {
                return Ok(None);
            }
            let gain = b.param(&format!("{stem}.{name}.weight"), &[width], Init::Ones)?;
            Ok(Some(Norm { gain, bias: b.param(&format!("{stem}.{name}.bias"), &[width], Init::Zeros)? }))
        };
        let before = norm(b, self.ln_before, "adapter_norm_before")?;
        let after = norm(b, self.ln_after, "adapter_norm_after")?;
        // The layers up to the activation are counted together, a norm first.
        let down_stem = format!("{stem}.adapter_down.{}", usize::from(self.ln_before));
        let scale = match self.scaling {
            Scaling::Fixed(_) => None,
            Scaling::Learned => Some(b.param(&format!("{stem}.scaling"), &[1], Init::Ones)?),
            Scaling::Channel => Some(b.param(&format!("{stem}.scaling"), &[width], Init::Ones)?),
        };
        Ok(Tensors {
            before,
            down: b.param(&format!("{down_stem}.weight"), &[size, width], down)?,
            down_bias: b.param(&format!("{down_stem}.bias"), &[size], Init::Zeros)?,
            up: b.param(&format!("{stem}.adapter_up.weight"), &[width, size], up)?,
            up_bias: b.param(&format!("{stem}.adapter_up.bias"), &[width], Init::Zeros)?,
            scale,
            after,
        })
    }
}

/// The number of a site's layer as AdapterHub counts: the decoder's layers go on from the encoder's.
fn layer_number(sites: &Sites, site: &Site) -> Option<usize> {
    let before = match site.stack {
        Stack::Decoder => {
            let encoder = sites.iter().filter(|s| s.stack == Stack::Encoder);
            encoder.filter_map(|s| s.layer).max().map_or(0, |last| last + 1)
        }
        _ => 0,
    };
    site.layer.map(|layer| layer + before)
}

impl Method for Bottleneck {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let mut found = false;
        for site in b.sites().iter() {
            let Kind::Sublayer { width } = site.kind else { continue };
            found = true;
            let number = layer_number(b.sites(), site);
            if self.wants(site, number) {
                let tensors = self.build(b, site, (width, self.size_at(number, width)))?;
                b.patch(site.id, Patch::Sublayer(Box::new(AtSublayer { config: self.clone(), tensors })))?;
            }
        }
        if found {
            Ok(())
        } else {
            Err(Error::Unsupported("bottleneck adapters need a model with sublayers".into()))
        }
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        self.to_file(model)
    }

    fn file_name(&self, name: &str) -> String {
        if name.contains(".adapters.") { name.into() } else { format!("base_model.model.{name}") }
    }

    /// `adapters` keeps the norm before the bottleneck in two places.
    fn file_copies(&self, name: &str, _adapter: &Adapter) -> Vec<String> {
        let own = name.contains(".adapter_norm_before.");
        own.then(|| name.replace(".adapter_norm_before.", ".adapter_down.0.")).into_iter().collect()
    }
}

struct Norm {
    gain: Param,
    bias: Param,
}

impl Norm {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(x, &self.gain.get(), &self.bias.get(), NORM_EPS)?)
    }
}

/// The tensors at one site.
struct Tensors {
    before: Option<Norm>,
    down: Param,
    down_bias: Param,
    up: Param,
    up_bias: Param,
    scale: Option<Param>,
    after: Option<Norm>,
}

struct AtSublayer {
    config: Bottleneck,
    tensors: Tensors,
}

impl AtSublayer {
    /// s·(σ(N(x)·W_dᵀ + b_d)·W_uᵀ + b_u), x [tokens, width].
    fn bottleneck(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let t = &self.tensors;
        let x = match &t.before {
            Some(norm) => norm.apply(x)?,
            None => x.clone(),
        };
        let middle = x.matmul_t(&t.down.get())?.add(&t.down_bias.get())?;
        let middle = match self.config.activation {
            Activation::Of(f) => middle.unary(f)?,
            Activation::LeakyRelu => middle.scale(0.01)?.add(&middle.unary(Unary::Relu)?.scale(0.99)?)?,
            Activation::Linear => middle,
        };
        let up = middle.matmul_t(&t.up.get())?.add(&t.up_bias.get())?;
        let up = match (&t.scale, self.config.scaling) {
            (Some(scale), _) => up.mul(&scale.get())?,
            (None, Scaling::Fixed(s)) if s != 1.0 => up.scale(s as f32)?,
            _ => up,
        };
        cx.dropout(&up, self.config.dropout, site.id, 1)
    }

    fn own_norm(&self, x: Tensor) -> Result<Tensor> {
        match &self.tensors.after {
            Some(norm) => norm.apply(&x),
            None => Ok(x),
        }
    }

    fn parallel(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        let added = self.own_norm(self.bottleneck(s.residual, site, cx)?)?;
        Ok(s.output.add(&added)?)
    }

    fn serial(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        let c = &self.config;
        let sum = s.output.add(s.residual)?;
        let input = match (c.original_ln_before, s.norm) {
            (true, Some(norm)) => norm(&sum)?,
            (true, None) => sum.clone(),
            (false, _) => s.output.clone(),
        };
        let added = self.bottleneck(&input, site, cx)?;
        let residual = match c.residual {
            Residual::Output => s.output.clone(),
            Residual::Sum => sum,
            Residual::Input => input,
        };
        if c.residual_before_own_norm {
            return self.own_norm(added.add(&residual)?);
        }
        Ok(self.own_norm(added)?.add(&residual)?)
    }
}

impl SublayerPatch for AtSublayer {
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        let next = if self.config.parallel { self.parallel(s, site, cx)? } else { self.serial(s, site, cx)? };
        match (self.config.original_ln_after, s.norm) {
            (true, _) => Ok(next),
            // Without the model's own residual: what the model adds to the stream is taken off first.
            (false, None) => Ok(next.sub(s.residual)?),
            (false, Some(_)) => {
                let message =
                    "`original_ln_after` = false drops the model's norm, which a post-norm model cannot do"
                        .into();
                Err(Error::Site { path: site.path.clone(), message })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    /// (residual, output, what the patch of layer 1 makes of them) under a norm that doubles.
    fn run(a: &crate::Attached, path: &str, post_norm: bool) -> Result<(Tensor, Tensor, Tensor)> {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, path));
        let [Patch::Sublayer(p)] = a.adapter.at(site.id) else { panic!("no adapter at {path}") };
        let (residual, output) = (sample(&[4, 6], 1), sample(&[4, 6], 2));
        let norm = |x: &Tensor| Ok(x.scale(2.0)?);
        let norm = post_norm.then_some(&norm as &dyn Fn(&Tensor) -> Result<Tensor>);
        let cx = Pass::new(Layout::counted(&[4])?, None);
        let y = p.output(
            &Sublayer { residual: &residual, input: &residual, output: output.clone(), norm },
            site,
            &cx,
        )?;
        Ok((residual, output, y))
    }

    /// A(x) of layer 1 from its parameters.
    fn adapter(a: &crate::Attached, x: &Tensor, f: Unary, scale: f32) -> Tensor {
        let get = |end: &str| {
            let name = format!("layers.1.output_adapters.adapters.engraft.{end}");
            a.adapter.params().iter().find(|p| p.name == name).unwrap().param.value()
        };
        let middle =
            x.matmul_t(&get("adapter_down.0.weight")).unwrap().add(&get("adapter_down.0.bias")).unwrap();
        let up = middle.unary(f).unwrap().matmul_t(&get("adapter_up.weight")).unwrap();
        up.add(&get("adapter_up.bias")).unwrap().scale(scale).unwrap()
    }

    #[test]
    fn the_three_forms_by_hand() {
        let path = "layers.1.output_adapters";
        let made = |settings: serde_json::Value| {
            let a = attached(&[chosen("bottleneck", with(settings, json!({ "reduction": 2 })))], &[]);
            stir(&a, 0.5);
            a
        };
        let a = made(json!({}));
        assert_eq!(names(&a).len(), 8, "after the MLPs alone");
        for post_norm in [true, false] {
            let (u, g, y) = run(&a, path, post_norm).unwrap();
            let read = u.add(&g).unwrap().scale(if post_norm { 2.0 } else { 1.0 }).unwrap();
            close(&y, &g.add(&adapter(&a, &read, Unary::Relu, 1.0)).unwrap(), 1e-5);
        }
        let a = made(json!({ "form": "houlsby" }));
        assert_eq!(names(&a).len(), 16);
        let (_, g, y) = run(&a, path, true).unwrap();
        close(&y, &g.add(&adapter(&a, &g, Unary::Silu, 1.0)).unwrap(), 1e-5);
        let a = made(json!({ "form": "parallel", "activation": "gelu" }));
        let (u, g, y) = run(&a, path, true).unwrap();
        close(&y, &g.add(&adapter(&a, &u, Unary::Gelu, 4.0)).unwrap(), 1e-5);
        let zero = attached(&[chosen("bottleneck", json!({ "zero_init": true }))], &[]);
        let (_, g, y) = run(&zero, path, true).unwrap();
        close(&y, &g, 0.0);
    }

    #[test]
    fn without_the_models_norm() {
        let free = Bottleneck { original_ln_after: false, reduction: 2.0, ..Bottleneck::of(Form::Houlsby) };
        let a = attached(&[(Box::new(free), None)], &[]);
        stir(&a, 0.5);
        let path = "layers.1.output_adapters";
        let (u, g, y) = run(&a, path, false).unwrap();
        close(&y.add(&u).unwrap(), &g.add(&adapter(&a, &g, Unary::Silu, 1.0)).unwrap(), 1e-5);
        assert!(run(&a, path, true).is_err());
    }

    #[test]
    fn configurations() {
        for settings in [
            json!({}),
            json!({ "form": "houlsby", "dropout": 0.1 }),
            json!({ "form": "parallel", "learned_scaling": true }),
        ] {
            survives_saving(&[chosen("bottleneck", settings)], &["head"]);
        }
        let odd = Bottleneck {
            ln_before: true,
            ln_after: true,
            scaling: Scaling::Channel,
            reduction_by_layer: vec![(1, 3.0)],
            residual: Residual::Sum,
            ..Bottleneck::of(Form::Pfeiffer)
        };
        survives_saving(&[(Box::new(odd), None)], &[]);
        let written = config(&[chosen("bottleneck", json!({}))], &[]);
        let read = |inner: serde_json::Value| {
            let config = with(written["config"].clone(), inner);
            file::from_file(&with(written.clone(), json!({ "config": config })))
        };
        for bad in [
            json!({ "phm_layer": true }),
            json!({ "non_linearity": "mish" }),
            json!({ "scaling": "odd" }),
            json!({ "reduction_factor": { "x": 2 } }),
        ] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
        let theirs = with(written.clone(), json!({ "peft_type": null }));
        assert!(file::from_file(&theirs).unwrap().is_some(), "AdapterHub's files have no peft_type");
    }
}
