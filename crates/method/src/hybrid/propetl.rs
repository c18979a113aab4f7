//! ProPETL: one small module, the prototype, shared by all layers; each layer uses the part of it that a binary mask of its
//! own keeps.
//!
//! Φⱼ = Φ ⊙ mⱼ; mⱼ keeps the share `keep` of the entries of each matrix, those of the largest |score|. Scores are trained with
//! the mask's gradient as it is (straight through the choice) and are not needed afterwards. Φ is
//!   adapter  a bottleneck after the MLP, h ← h + W_u·ReLU(W_d·x + b_d) + b_u, x the normed sum of stream and output; biases
//!            have no masks
//!   lora     B·A for each kind of target, y = x·Wᵀ + α/r·x·(A ⊙ m)ᵀ·(B ⊙ m)ᵀ
//!   prefix   keys and values [tokens, 2·kv_heads·dim] before those of every attention, whose tokens keep their positions
//!
//! Zeng et al. 2023, arXiv:2305.17682; starts, rates and the number of kept entries, n − ⌊(1 − keep)·n⌋, as in the authors'
//! code.
//! The prefix is trained as it is, without a network that makes it.
//!
//! prototype.adapter_down.weight and so on, prototype.ROLE_OUTxIN.lora_A and .lora_B, or prototype.prefix; in files
//! PATH.PART.mask, bits. While training PATH.PART.mask_scores, of the matrix's shape, Kaiming-uniform.

use std::collections::HashMap;

use engraft_nn::{
    Base, Builder, Error, Init, KeyValuePatch, KeyValues, Kind, Pass, Patch, Result, Role, Site, Sites,
    Stack, Sublayer, SublayerPatch, Targets, WeightPatch,
};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::prompts::prompt::TOKENS_MAX;
use crate::read::{Reader, number};
use crate::shared::bits::{Bits, MASK, pack};
use crate::shared::fields::{choice, float, int};
use crate::shared::kept::Kept;
use crate::shared::low_rank::{RANK_MAX, added, changed, linear};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, Named, Stored, peft};

const SCORES: &str = ".mask_scores";
const GROUP: &str = "mask";

#[derive(Clone, Debug)]
struct Propetl {
    form: Form,
    keep: f64,
    reduction: f64,
    rank: usize,
    alpha: f64,
    tokens: usize,
    mask_rate: f64,
    /// Masks come from a file and stay.
    saved: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Adapter,
    Lora,
    Prefix,
}

const FORMS: &[(&str, Form)] = &[("adapter", Form::Adapter), ("lora", Form::Lora), ("prefix", Form::Prefix)];

static INFO: Info = Info {
    name: "propetl",
    title: "ProPETL",
    class: "hybrid",
    sites: "sublayer, weight, or keys and values",
    paper: "arXiv:2305.17682",
    summary: "one module shared by all layers, each of which keeps a part of it by a binary mask",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_PROPETL",
    fields: &[
        choice("form", &["adapter", "lora", "prefix"], "\"adapter\"", "What is shared."),
        Field {
            name: "keep",
            kind: FieldKind::Float { min: 0.0, max: 1.0 },
            default: None,
            doc: "Share of the entries that a layer keeps; 0.5 of an adapter, 0.1 of a LoRA or a prefix.",
        },
        float("reduction", (1.0, 1e6), "12", "Width of the model over width of the bottleneck (adapter)."),
        int("rank", (1, RANK_MAX as i64), Some("32"), "Inner size of the product (lora)."),
        float("alpha", (0.0, 1e9), "48", "The product is scaled by alpha/rank (lora)."),
        int(
            "tokens",
            (1, TOKENS_MAX as i64),
            Some("64"),
            "Number of extra keys and values in a layer (prefix).",
        ),
        Field {
            name: "mask_rate",
            kind: FieldKind::Float { min: 0.0, max: 1e6 },
            default: None,
            doc: "Learning rate of the scores over that of the prototype; 30 of an adapter, 300 of a LoRA, 1 of a prefix.",
        },
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Propetl {
    let form = r.one_of("form", FORMS);
    let (keep, rate) = match form {
        Form::Adapter => (0.5, 30.0),
        Form::Lora => (0.1, 300.0),
        Form::Prefix => (0.1, 1.0),
    };
    Propetl {
        form,
        keep: r.share("keep", keep),
        reduction: r.reduction("reduction", 12.0),
        rank: r.count("rank", 32, RANK_MAX),
        alpha: r.float("alpha", 48.0),
        tokens: r.count("tokens", 64, TOKENS_MAX),
        mask_rate: r.float("mask_rate", rate),
        saved: false,
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, |r| Propetl { saved: true, ..read(r) })
}

fn example() -> Box<dyn Method> {
    Box::new(Propetl {
        form: Form::Adapter,
        keep: 0.5,
        reduction: 4.0,
        rank: 2,
        alpha: 4.0,
        tokens: 3,
        mask_rate: 1.0,
        saved: false,
    })
}

impl Method for Propetl {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        match self.form {
            Form::Adapter => self.adapters(b),
            Form::Lora => self.loras(b),
            Form::Prefix => self.prefixes(b),
        }
    }

    fn default_targets(&self, sites: &Sites) -> Option<Targets> {
        let parted = sites.iter().any(|s| s.role == Role::Q);
        let roles: &[Role] = if parted { &[Role::Q, Role::V] } else { &[Role::Qkv] };
        (self.form == Form::Lora).then(|| Targets::roles(roles))
    }

    fn learning_rate_factor(&self, group: &str) -> f32 {
        if group == GROUP { self.mask_rate as f32 } else { 1.0 }
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let form = FORMS.iter().find(|f| f.1 == self.form).map_or("adapter", |f| f.0);
        let own = json!({
            "alpha": number(self.alpha), "form": form, "keep": self.keep, "mask_rate": number(self.mask_rate),
            "rank": self.rank, "reduction": number(self.reduction), "tokens": self.tokens,
        });
        own.as_object().cloned().unwrap_or_default()
    }

    /// Bits in the place of scores.
    fn file_tensors(&self, mut tensors: Named, state: &Named) -> Result<Named> {
        for (name, scores) in state {
            if let Some(stem) = name.strip_suffix(SCORES) {
                let ones = chosen(scores, self.kept(scores.len()))?.to_vec()?;
                let bits: Vec<bool> = ones.iter().map(|one| *one == 1.0).collect();
                tensors.push((format!("{stem}{MASK}"), pack(&bits)?));
            }
        }
        Ok(tensors)
    }

    fn stored_as(&self, key: &str) -> Stored {
        if key.ends_with(MASK) { Stored::U8 } else { Stored::F32 }
    }
}

impl Propetl {
    /// How many of n entries a mask keeps.
    fn kept(&self, n: usize) -> usize {
        (n - ((1.0 - self.keep) * n as f64) as usize).max(1)
    }

    /// The mask of one matrix of one layer.
    fn mask(&self, b: &mut Builder<'_>, name: &str, shape: &[usize]) -> Result<Mask> {
        if self.saved {
            return Ok(Mask::Saved(Bits::new(b, name, shape)?));
        }
        let start = Init::kaiming(shape.last().copied().unwrap_or(1));
        let scores = b.working(&format!("{name}{SCORES}"), shape, start, GROUP)?;
        let kept = self.kept(shape.iter().product());
        Ok(Mask::Trained { scores, kept, mask: Kept::new() })
    }

    fn adapters(&self, b: &mut Builder<'_>) -> Result<()> {
        let of = |s: &Site| match s.kind {
            Kind::Sublayer { width } if s.role == Role::Mlp => Some((s.id, s.path.clone(), width)),
            _ => None,
        };
        let places: Vec<_> = b.sites().iter().filter_map(of).collect();
        let Some(&(_, _, width)) = places.first() else {
            return Err(Error::Unsupported("ProPETL's adapters need a model with MLPs".into()));
        };
        let inner = ((width as f64 / self.reduction).floor() as usize).max(1);
        let mut own =
            |name: &str, shape: &[usize], init: Init| b.param(&format!("prototype.{name}"), shape, init);
        let (down, up) = ([inner, width], [width, inner]);
        let prototype = [
            own("adapter_down.weight", &down, Init::Normal(0.02))?,
            own("adapter_down.bias", &[inner], Init::Zeros)?,
            own("adapter_up.weight", &up, Init::Normal(0.02))?,
            own("adapter_up.bias", &[width], Init::Zeros)?,
        ];
        for (site, path, _) in places {
            let masks = [
                self.mask(b, &format!("{path}.adapter_down"), &down)?,
                self.mask(b, &format!("{path}.adapter_up"), &up)?,
            ];
            let adapter = MaskedAdapter { prototype: prototype.clone(), masks };
            b.patch(site, Patch::Sublayer(Box::new(adapter)))?;
        }
        Ok(())
    }

    fn loras(&self, b: &mut Builder<'_>) -> Result<()> {
        let mut prototypes: HashMap<String, [Param; 2]> = HashMap::new();
        for site in b.targets() {
            let (out, inn) = linear(site, INFO.title)?;
            let key = format!("prototype.{}_{out}x{inn}", site.role.name());
            let (a, up) = ([self.rank, inn], [out, self.rank]);
            if !prototypes.contains_key(&key) {
                let pair = [
                    b.param(&format!("{key}.lora_A"), &a, Init::kaiming(inn))?,
                    b.param(&format!("{key}.lora_B"), &up, Init::Zeros)?,
                ];
                prototypes.insert(key.clone(), pair);
            }
            let masks = [
                self.mask(b, &format!("{}.lora_A", site.path), &a)?,
                self.mask(b, &format!("{}.lora_B", site.path), &up)?,
            ];
            let scale = (self.alpha / self.rank as f64) as f32;
            let lora = MaskedLora { prototype: prototypes[&key].clone(), masks, scale };
            b.patch(site.id, Patch::Weight(Box::new(lora)))?;
        }
        Ok(())
    }

    fn prefixes(&self, b: &mut Builder<'_>) -> Result<()> {
        let of = |s: &Site| match s.kind {
            Kind::KeyValue { heads, dim } if s.stack == Stack::Only => {
                Some((s.id, s.path.clone(), heads, dim))
            }
            _ => None,
        };
        let places: Vec<_> = b.sites().iter().filter_map(of).collect();
        let Some(&(_, _, heads, dim)) = places.first() else {
            let text =
                "ProPETL's prefix needs a model with one stack and attention; choose `form = \"adapter\"`";
            return Err(Error::Unsupported(text.into()));
        };
        let shape = [self.tokens, 2 * heads * dim];
        let prototype = b.param("prototype.prefix", &shape, Init::Normal(1.0))?;
        for (site, path, heads, dim) in places {
            let mask = self.mask(b, &format!("{path}.prefix"), &shape)?;
            let prefix = MaskedPrefix { prototype: prototype.clone(), mask, heads, dim };
            b.patch(site, Patch::KeyValue(Box::new(prefix)))?;
        }
        Ok(())
    }
}

/// One where |score| is among the `kept` largest, else zero.
fn chosen(scores: &Tensor, kept: usize) -> Result<Tensor> {
    let n = scores.len();
    let sizes = scores.detach().unary(Unary::Abs)?.reshape([1, n])?;
    let places = sizes.top_k(kept)?.1.reshape([kept])?;
    Ok(Tensor::full(1.0, [kept]).scatter_add(&places, n)?.reshape(scores.shape())?)
}

/// A mask, trained or from a file.
enum Mask {
    Trained { scores: Param, kept: usize, mask: Kept<Tensor> },
    Saved(Bits),
}

impl Mask {
    /// Φ where it is kept; the mask's gradient is that of |scores|.
    fn of(&self, prototype: &Param) -> Result<Tensor> {
        let mask = match self {
            Mask::Saved(bits) => bits.mask()?,
            Mask::Trained { scores, kept, mask } => mask.of(&[scores], || {
                let sizes = scores.get().unary(Unary::Abs)?;
                // The difference is zero, and has a slope.
                Ok(sizes.sub(&sizes.detach())?.add(&chosen(&scores.value(), *kept)?)?)
            })?,
        };
        Ok(prototype.get().mul(&mask)?)
    }
}

/// The adapter of one layer: W_d, b_d, W_u, b_u of all.
struct MaskedAdapter {
    prototype: [Param; 4],
    masks: [Mask; 2],
}

impl SublayerPatch for MaskedAdapter {
    fn output(&self, s: &Sublayer<'_>, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let [down, down_bias, up, up_bias] = &self.prototype;
        let sum = s.output.add(s.residual)?;
        let x = s.norm.map_or_else(|| Ok(sum.clone()), |norm| norm(&sum))?;
        let inner = x.matmul_t(&self.masks[0].of(down)?)?.plus(&down_bias.get())?.unary(Unary::Relu)?;
        let added = inner.matmul_t(&self.masks[1].of(up)?)?.plus(&up_bias.get())?;
        Ok(added.plus(&s.output)?)
    }
}

/// The LoRA of one matrix: A and B of all of its kind.
struct MaskedLora {
    prototype: [Param; 2],
    masks: [Mask; 2],
    scale: f32,
}

impl MaskedLora {
    fn own(&self) -> Result<[Tensor; 2]> {
        Ok([self.masks[0].of(&self.prototype[0])?, self.masks[1].of(&self.prototype[1])?])
    }
}

impl WeightPatch for MaskedLora {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let [a, b] = self.own()?;
        changed(base, &a, &b, self.scale)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        let [a, b] = self.own()?;
        added(base.forward(x)?, x, &a, &b, self.scale)
    }
}

/// The prefix of one attention: keys beside values of all.
struct MaskedPrefix {
    prototype: Param,
    mask: Mask,
    heads: usize,
    dim: usize,
}

impl KeyValuePatch for MaskedPrefix {
    fn count(&self) -> usize {
        self.prototype.value().dim(0)
    }

    fn rows(&self, _input: &Tensor, _cx: &Pass) -> Result<KeyValues> {
        let (rows, width) = (self.mask.of(&self.prototype)?, self.heads * self.dim);
        let part = |first: usize| rows.narrow(1, first, width)?.reshape([rows.dim(0), self.heads, self.dim]);
        Ok(KeyValues { keys: part(0)?, values: part(width)? })
    }

    fn moves(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    fn small(form: &str) -> Value {
        json!({ "form": form, "reduction": 2, "rank": 2, "alpha": 4, "tokens": 3, "keep": 0.3 })
    }

    #[test]
    fn a_layer_keeps_its_share_of_the_prototype() {
        let a = attached(&[crate::testing::chosen("propetl", small("lora"))], &[]);
        // Prototypes of q and v once, scores in each of two layers: r·(6 + 6) and r·(6 + 4).
        assert_eq!(a.adapter.trained_count(), 3 * 2 * (12 + 10));
        stir(&a, 0.5);
        for end in ["A", "B"] {
            let scores = value_of(&a, &format!("layers.0.attn.q.lora_{end}{SCORES}"));
            // 12 − ⌊0.7·12⌋.
            let ones = super::chosen(&scores, 4).unwrap().to_vec().unwrap();
            assert_eq!(ones.iter().sum::<f32>(), 4.0);
            let least = |of: f32| {
                let sizes = scores.to_vec().unwrap().into_iter().map(f32::abs);
                let own: Vec<f32> = sizes.zip(&ones).filter(|(_, one)| **one == of).map(|(s, _)| s).collect();
                own
            };
            let smallest = least(1.0).into_iter().fold(f32::MAX, f32::min);
            assert!(least(0.0).into_iter().all(|s| s <= smallest));
        }
        let x = sample(&[5, 6], 3);
        let (fast, defined) = both_ways(&a, "layers.0.attn.q", &x);
        close(&fast, &defined, 1e-5);
        let other = both_ways(&a, "layers.1.attn.q", &x).0;
        let plain = |path: &str| x.matmul_t(&frozen(path)).unwrap();
        let change = |y: &Tensor, path: &str| y.sub(&plain(path)).unwrap().to_vec().unwrap();
        assert_ne!(
            change(&fast, "layers.0.attn.q"),
            change(&other, "layers.1.attn.q"),
            "masks are a layer's own"
        );
    }

    #[test]
    fn the_prototype_has_the_gradients_of_all_layers_under_their_masks() {
        let prototype = Param::new(sample(&[3, 4], 1));
        let masks: Vec<Mask> = (0..2)
            .map(|i| Mask::Trained {
                scores: Param::new(sample(&[3, 4], 10 + i)),
                kept: 5,
                mask: Kept::new(),
            })
            .collect();
        let weights = [sample(&[3, 4], 20), sample(&[3, 4], 21)];
        let mut loss = Tensor::scalar(0.0);
        for (mask, w) in masks.iter().zip(&weights) {
            loss = loss.add(&mask.of(&prototype).unwrap().mul(w).unwrap().sum().unwrap()).unwrap();
        }
        let gradients = loss.backward().unwrap();
        let mut expected = Tensor::zeros([3, 4]);
        for (mask, w) in masks.iter().zip(&weights) {
            let Mask::Trained { scores, kept, .. } = mask else { panic!() };
            let own = super::chosen(&scores.value(), *kept).unwrap().mul(w).unwrap();
            expected = expected.add(&own).unwrap();
            // Straight through: Φ·w, by the sign of the score.
            let signs: Vec<f32> = scores.value().to_vec().unwrap().into_iter().map(f32::signum).collect();
            let through = prototype.value().mul(w).unwrap();
            let through = through.mul(&Tensor::from_vec(signs, [3, 4]).unwrap()).unwrap();
            close(gradients.get(scores).unwrap(), &through, 1e-6);
        }
        close(gradients.get(&prototype).unwrap(), &expected, 1e-6);
    }

    #[test]
    fn configurations() {
        for form in ["adapter", "lora", "prefix"] {
            survives_saving(&[crate::testing::chosen("propetl", small(form))], &["head"]);
        }
        let methods = [crate::testing::chosen("propetl", small("adapter"))];
        assert_eq!(
            (methods[0].0.learning_rate_factor(GROUP), methods[0].0.learning_rate_factor("")),
            (30.0, 1.0)
        );
        let good = config(&methods, &[]);
        for bad in [json!({ "form": "ia3" }), json!({ "keep": 0.0 }), json!({ "odd": 1 })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
