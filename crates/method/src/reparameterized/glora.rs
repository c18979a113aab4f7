//! GLoRA: weight and bias scaled and shifted, each by a low-rank matrix, a vector or one number.
//!
//! W′ = W + W ⊙ A + B and b′ = b + b ⊙ D + E + W·C. A and B are both low-rank products (`lora`), one number an output
//! (`vector`), one number (`constant`) or nothing (`none`); C a low-rank product, a vector or nothing; D and E vectors, numbers
//! or nothing. Layers without a bias have no C, D, E. All start as zero (of a product the left factor), so W′ = W.
//! Except under a low-rank A, W′ is not formed.
//!
//! Chavan et al. 2023, arXiv:2306.07967. In `peft` A and B have one kind, and D and E have one; here each of the five has one of
//! its own, 432 choices in all, which are the same in all targets. The paper's search for a choice a layer is not here. What `peft`
//! cannot say has a `peft_type` of our own.
//!
//! Low-rank: `Xd` [out, r] and `Xu` [r, in] (of C [in, r] and [r, 1]); vector: `X` [out, 1] (of C [in, 1], of D and E `[out]`);
//! constant: `X` `[1]`; nothing: `zeros` in the shape of what is left out. Each in `glora_A` to `glora_E`.

use std::sync::Arc;

use engraft_nn::{
    Base, Builder, Error, Init, Pass, Patch, Result, Role, Site, VectorPatch, Weight, WeightPatch,
};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::biases::Biases;
use crate::shared::fields::{choice, flag, int};
use crate::shared::matrices;
use crate::shared::sizes;
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

/// What stands for the biases of the targets.
const OWN: &str = "glora_only";

#[derive(Clone, Copy)]
struct Glora {
    rank: usize,
    a: Kind,
    b: Kind,
    c: Kind,
    d: Kind,
    e: Kind,
    bias: Biases,
    init_weights: bool,
}

/// `peft_type` where A and B, or D and E, differ.
const APART: &str = "ENGRAFT_GLORA";

/// How a matrix is made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Lora,
    Vector,
    Constant,
    None,
}

const LORA: (&str, Kind) = ("lora", Kind::Lora);
const VECTOR: (&str, Kind) = ("vector", Kind::Vector);
const CONSTANT: (&str, Kind) = ("constant", Kind::Constant);
const NONE: (&str, Kind) = ("none", Kind::None);

static INFO: Info = Info {
    name: "glora",
    title: "GLoRA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2306.07967",
    summary: "W′ = W + W ⊙ A + B and b′ = b + b ⊙ D + E + W·C",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "GLORA",
    fields: &[
        int("rank", (1, 1024), Some("8"), "Rank of what is a low-rank product."),
        choice(
            "config_A_B",
            &["lora", "vector", "constant", "none"],
            "\"lora\"",
            "What scales and shifts the weight.",
        ),
        choice_or(
            "config_A",
            &["lora", "vector", "constant", "none"],
            "What scales the weight, if not `config_A_B`.",
        ),
        choice_or(
            "config_B",
            &["lora", "vector", "constant", "none"],
            "What shifts the weight, if not `config_A_B`.",
        ),
        choice("config_C", &["lora", "vector", "none"], "\"lora\"", "What the weight adds to the bias."),
        choice(
            "config_D_E",
            &["constant", "vector", "none"],
            "\"constant\"",
            "What scales and shifts the bias.",
        ),
        choice_or("config_D", &["constant", "vector", "none"], "What scales the bias, if not `config_D_E`."),
        choice_or("config_E", &["constant", "vector", "none"], "What shifts the bias, if not `config_D_E`."),
        choice("bias", &["none", "all", OWN], "\"none\"", "Which biases of the model are trained too."),
        flag("init_weights", "true", "Start as zero; otherwise all is drawn."),
    ],
};

/// A setting in the place of one for two.
const fn choice_or(name: &'static str, words: &'static [&'static str], doc: &'static str) -> Field {
    Field { name, kind: FieldKind::OneOf(words), default: None, doc }
}

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, "rank"))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    match peft::own_file(&INFO, config, |r| read_pairs(r, "r"))? {
        Some(loaded) => Ok(Some(loaded)),
        None => peft::file_of(APART, config, |r| read(r, "r")),
    }
}

/// What `peft` can say. Recipes and files differ in one name.
fn read_pairs(r: &mut Reader<'_>, rank: &'static str) -> Glora {
    let a = r.one_of("config_A_B", &[LORA, VECTOR, CONSTANT, NONE]);
    let d = r.one_of("config_D_E", &[CONSTANT, VECTOR, NONE]);
    Glora {
        rank: r.count(rank, 8, 1 << 16),
        a,
        b: a,
        c: r.one_of("config_C", &[LORA, VECTOR, NONE]),
        d,
        e: d,
        bias: Biases::read(r, OWN),
        init_weights: r.flag("init_weights", true),
    }
}

/// The same, and what each of the five is where two differ.
fn read(r: &mut Reader<'_>, rank: &'static str) -> Glora {
    let pairs = read_pairs(r, rank);
    let mut own = |key: &'static str, kinds: &[(&str, Kind)], pair: Kind| match r.value(key) {
        None => pair,
        Some(_) => r.one_of(key, kinds),
    };
    let (of_weight, of_bias) = ([LORA, VECTOR, CONSTANT, NONE], [CONSTANT, VECTOR, NONE]);
    Glora {
        a: own("config_A", &of_weight, pairs.a),
        b: own("config_B", &of_weight, pairs.b),
        d: own("config_D", &of_bias, pairs.d),
        e: own("config_E", &of_bias, pairs.e),
        ..pairs
    }
}

fn example() -> Box<dyn Method> {
    Box::new(Glora {
        rank: 3,
        a: Kind::Lora,
        b: Kind::Lora,
        c: Kind::Lora,
        d: Kind::Vector,
        e: Kind::Vector,
        bias: Biases::None,
        init_weights: true,
    })
}

impl Method for Glora {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let low_rank = [self.a, self.b].contains(&Kind::Lora);
        if low_rank { sizes::beyond_rank(targets, |_| self.rank) } else { vec![] }
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        self.bias.attach(b)?;
        for site in b.targets() {
            let (out, inn) = matrices::linear(site, INFO.title)?;
            let engraft_nn::Value::Weight(weight) = &site.value else {
                return Err(Error::Site {
                    path: site.path.clone(),
                    message: "expected a weight, found none".into(),
                });
            };
            let (a, shift) = (
                self.path(b, site, ("A", self.a), &[out, inn])?,
                self.path(b, site, ("B", self.b), &[out, inn])?,
            );
            b.patch(site.id, Patch::Weight(Box::new(OfWeight { a, b: shift })))?;
            let bias = b.sites().bias_of(&site.path);
            let kind = |kind| if bias.is_some() { kind } else { Kind::None };
            let patch = OfBias {
                c: self.path(b, site, ("C", kind(self.c)), &[inn, 1])?,
                d: self.path(b, site, ("D", kind(self.d)), &[out])?,
                e: self.path(b, site, ("E", kind(self.e)), &[out])?,
                weight: weight.clone(),
            };
            if let Some(bias) = bias {
                b.patch(bias.id, Patch::Vector(Box::new(patch)))?;
            }
        }
        Ok(())
    }

    /// Of the paths that are off `peft` keeps a buffer.
    fn in_type_of_model(&self, key: &str) -> bool {
        key.ends_with(".zeros")
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let name =
            |kind: Kind| [LORA, VECTOR, CONSTANT, NONE].into_iter().find(|k| k.1 == kind).map_or("", |k| k.0);
        let mut own = json!({
            "bias": self.bias.name(OWN), "config_C": name(self.c), "init_weights": self.init_weights, "r": self.rank,
        });
        match self.apart() {
            true => {
                for (key, kind) in
                    [("config_A", self.a), ("config_B", self.b), ("config_D", self.d), ("config_E", self.e)]
                {
                    own[key] = name(kind).into();
                }
            }
            false => {
                own["config_A_B"] = name(self.a).into();
                own["config_D_E"] = name(self.d).into();
            }
        }
        own.as_object().cloned().unwrap_or_default()
    }

    fn peft_type(&self) -> &'static str {
        if self.apart() { APART } else { INFO.peft_type }
    }
}

impl Glora {
    /// Whether `peft` cannot say it.
    fn apart(&self) -> bool {
        self.a != self.b || self.d != self.e
    }

    /// One of the five, for a value of `shape` ([rows, columns], or `[rows]`).
    fn path(
        &self,
        b: &mut Builder<'_>,
        site: &Site,
        (letter, kind): (&str, Kind),
        shape: &[usize],
    ) -> Result<Path> {
        let name = |end: &str| format!("{}.glora_{letter}.{end}", site.path);
        let start = |init: Init| if self.init_weights { Init::Zeros } else { init };
        let (rows, columns) = (shape[0], shape.get(1).copied().unwrap_or(1));
        Ok(match kind {
            Kind::Lora => Path::Product(
                b.param(&name("Xd"), &[rows, self.rank], start(Init::kaiming(self.rank)))?,
                b.param(&name("Xu"), &[self.rank, columns], Init::kaiming(columns))?,
            ),
            Kind::Vector if shape.len() == 2 => {
                Path::Value(b.param(&name("X"), &[rows, 1], start(Init::kaiming(1)))?)
            }
            Kind::Vector => Path::Value(b.param(&name("X"), &[rows], start(Init::kaiming(rows)))?),
            Kind::Constant => Path::Value(b.param(&name("X"), &[1], start(Init::Normal(0.02)))?),
            Kind::None => {
                // peft has these zeros in its files.
                b.fixed(&name("zeros"), shape, Init::Zeros)?;
                Path::Nothing
            }
        })
    }
}

/// One of the five matrices.
enum Path {
    /// Xd·Xu.
    Product(Param, Param),
    /// A column or a single number, to be broadcast.
    Value(Param),
    Nothing,
}

impl Path {
    fn value(&self) -> Result<Option<Tensor>> {
        Ok(match self {
            Path::Product(down, up) => Some(down.get().matmul(&up.get())?),
            Path::Value(x) => Some(x.get()),
            Path::Nothing => None,
        })
    }

    /// For every output `[out]`, where it is no product.
    fn of_outputs(x: &Param, out: usize) -> Result<Tensor> {
        let x = x.get();
        match x.len() {
            1 => Ok(Tensor::full(1.0, [out]).mul(&x.reshape([1])?)?),
            _ => Ok(x.reshape([out])?),
        }
    }
}

struct OfWeight {
    a: Path,
    b: Path,
}

impl WeightPatch for OfWeight {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let mut w = base.dense()?;
        if let Some(a) = self.a.value()? {
            w = w.mul(&a.unary(Unary::Shift(1.0))?)?;
        }
        match self.b.value()? {
            Some(b) => Ok(w.add(&b)?),
            None => Ok(w),
        }
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let (out, inn) = base.shape();
        let y = match &self.a {
            Path::Product(down, up) => {
                let scale = down.get().matmul(&up.get())?.unary(Unary::Shift(1.0))?;
                x.matmul_t(&base.dense()?.mul(&scale)?)?
            }
            Path::Value(a) => base.forward(x)?.mul(&Path::of_outputs(a, out)?.unary(Unary::Shift(1.0))?)?,
            Path::Nothing => base.forward(x)?,
        };
        match &self.b {
            Path::Product(down, up) => Ok(y.add_low_rank(x, &up.get(), &down.get(), 1.0)?),
            // The same number for all inputs of an output: their sum times it.
            Path::Value(b) => {
                let column = Path::of_outputs(b, out)?.reshape([out, 1])?;
                Ok(y.add_low_rank(x, &Tensor::full(1.0, [1, inn]), &column, 1.0)?)
            }
            Path::Nothing => Ok(y),
        }
    }
}

struct OfBias {
    c: Path,
    d: Path,
    e: Path,
    weight: Arc<Weight>,
}

impl VectorPatch for OfBias {
    fn vector(&self, v: &Tensor) -> Result<Tensor> {
        let mut changed = v.clone();
        if let Some(d) = self.d.value()? {
            changed = changed.add(&v.mul(&d)?)?;
        }
        if let Some(e) = self.e.value()? {
            changed = changed.add(&e)?;
        }
        if let Some(c) = self.c.value()? {
            // W·c is what W makes of one row.
            let row = self.weight.forward(&c.reshape([1, c.len()])?)?;
            changed = changed.add(&row.reshape([v.len()])?)?;
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    fn all_choices() -> Vec<Value> {
        let mut all = Vec::new();
        let (of_weight, of_bias) = (["lora", "vector", "constant", "none"], ["vector", "constant", "none"]);
        for (a, b) in of_weight.iter().flat_map(|a| of_weight.map(|b| (a, b))) {
            for (d, e) in of_bias.iter().flat_map(|d| of_bias.map(|e| (d, e))) {
                for c in ["lora", "vector", "none"] {
                    all.push(json!({ "rank": 2, "config_A": a, "config_B": b, "config_C": c, "config_D": d, "config_E": e }));
                }
            }
        }
        assert_eq!(all.len(), 432);
        all
    }

    #[test]
    fn every_choice_starts_as_the_base_and_merges() {
        let x = sample(&[5, 6], 3);
        let (w, bias) = (frozen("layers.0.attn.q"), frozen("layers.0.attn.q.bias"));
        for settings in all_choices() {
            let a = attached(&[chosen("glora", settings.clone())], &[]);
            close(&both_ways(&a, "layers.0.attn.q", &x).0, &x.matmul_t(&w).unwrap(), 1e-6);
            close(&vector(&a, "layers.0.attn.q.bias"), &bias, 1e-6);
            stir(&a, 0.5);
            for path in ["layers.0.attn.q", "layers.1.attn.v"] {
                let (fast, defined) = both_ways(&a, path, &x);
                close(&fast, &defined, 1e-5);
            }
            let get = |end: &str| {
                let name = format!("layers.0.attn.q.glora_{end}");
                a.adapter.params().iter().find(|p| p.name == name).map(|p| p.param.value())
            };
            let value = |letter: &str| match (get(&format!("{letter}.Xd")), get(&format!("{letter}.Xu"))) {
                (Some(down), Some(up)) => down.matmul(&up).unwrap(),
                _ => get(&format!("{letter}.X")).or(get(&format!("{letter}.zeros"))).unwrap(),
            };
            let coupled = w.matmul(&value("C")).unwrap().reshape([6]).unwrap();
            let expected = bias.add(&bias.mul(&value("D")).unwrap()).unwrap();
            let expected = expected.add(&value("E")).unwrap().add(&coupled).unwrap();
            close(&vector(&a, "layers.0.attn.q.bias"), &expected, 1e-5);
            let weight = w.add(&w.mul(&value("A")).unwrap()).unwrap().add(&value("B")).unwrap();
            close(&both_ways(&a, "layers.0.attn.q", &x).1, &x.matmul_t(&weight).unwrap(), 1e-5);
            close(&merged(&a, "layers.0.attn.q"), &weight, 1e-5);
        }
    }

    #[test]
    fn counts() {
        let count = |settings| attached(&[chosen("glora", settings)], &[]).adapter.trained_count();
        // q has a bias, v has none.
        let lora = json!({ "rank": 2 });
        assert_eq!(count(lora), 2 * (2 * 2 * (6 + 6) + 2 * (6 + 1) + 2 + 2 * 2 * (6 + 4)));
        let vectors = json!({ "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector" });
        assert_eq!(count(vectors), 2 * (2 * 6 + 6 + 2 * 6 + 2 * 4));
        let constants = json!({ "config_A_B": "constant", "config_C": "none", "config_D_E": "constant" });
        assert_eq!(count(constants), 2 * (2 + 2 + 2));
        let mixed = json!({ "rank": 2, "config_A": "constant", "config_B": "lora", "config_C": "vector",
            "config_D": "none", "config_E": "vector" });
        assert_eq!(count(mixed), 2 * ((1 + 2 * (6 + 6) + 6 + 6) + (1 + 2 * (6 + 4))));
    }

    #[test]
    fn configurations() {
        for settings in all_choices().into_iter().step_by(7) {
            survives_saving(&[chosen("glora", settings)], &["head"]);
        }
        // What `peft` can say is said in its words, and nothing else under its name.
        let pairs = json!({ "config_A_B": "vector", "config_D_E": "constant" });
        let apart = json!({ "config_A_B": "vector", "config_B": "lora" });
        let (pairs, apart) = (config(&[chosen("glora", pairs)], &[]), config(&[chosen("glora", apart)], &[]));
        assert_eq!((&pairs["peft_type"], &pairs["config_A_B"]), (&json!("GLORA"), &json!("vector")));
        assert!(pairs.get("config_A").is_none());
        assert_eq!((&apart["peft_type"], &apart["config_B"]), (&json!(APART), &json!("lora")));
        assert_eq!((&apart["config_A"], apart.get("config_A_B")), (&json!("vector"), None));
        assert!(from_file(&with(pairs, json!({ "config_A": "lora" }))).is_err());
        survives_saving(&[chosen("glora", json!({ "bias": "all", "init_weights": false }))], &[]);
        let bad = json!({ "config_D_E": "lora" });
        assert!(from_settings(bad.as_object().unwrap()).is_err());
    }
}
