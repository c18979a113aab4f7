//! aLoRA, the activated LoRA: it acts from the invocation tokens on, where these stand for the last time in a text.
//!
//! y = x·Wᵀ + m·s·(drop(x)·Aᵀ)·Bᵀ, m one for the tokens from the first of the last invocation on, zero before it, and zero
//! everywhere in a text that has none. What stands before the invocation is what the base alone makes of it, so its keys and
//! values can be those of the base. In a text that is continued new tokens are adapted if what was given has an invocation;
//! one that the model itself writes changes nothing, as in `peft`.
//!
//! Greenewald et al. 2025, arXiv:2504.12397. A [rank, in], B [out, rank]. It cannot be merged.

use engraft_nn::{Base, Builder, Error, Pass, Patch, Result, Role, Site, Stack, Task, WeightPatch};
use engraft_tensor::Tensor;
use serde_json::{Value, json};

use crate::read::Reader;
use crate::shared::sequences::owners;
use crate::{Field, FieldKind};

pub(super) const FIELDS: [Field; 1] = [Field {
    name: "alora_invocation_tokens",
    kind: FieldKind::IntList,
    default: Some("[]"),
    doc: "aLoRA: adapt only what follows these tokens, which every text should hold; the tokenizer's numbers of the invocation, without special tokens.",
}];

/// The invocation.
#[derive(Clone, Debug)]
pub(super) struct Alora {
    tokens: Vec<i64>,
}

/// Where the pass holds m, a row for every token.
fn key(b: &Builder<'_>) -> String {
    format!("{}alora", b.prefix())
}

impl Alora {
    pub fn read(r: &mut Reader<'_>) -> Option<Alora> {
        let tokens = r.counts("alora_invocation_tokens")?;
        (!tokens.is_empty()).then(|| Alora { tokens: tokens.into_iter().map(|t| t as i64).collect() })
    }

    pub fn written(&self) -> Value {
        json!(self.tokens)
    }

    /// Has the table of the model's words look for the invocation.
    pub fn watch(&self, b: &mut Builder<'_>) -> Result<()> {
        let words = |s: &&Site| s.role == Role::Embed && s.is_weight() && s.stack == Stack::Only;
        let table = b.sites().iter().find(words).filter(|_| b.info().task == Task::CausalLm);
        let Some(table) = table else {
            return Err(Error::Unsupported(
                "aLoRA is for causal language models (in peft it changes nothing in others); choose a plain LoRA".into(),
            ));
        };
        let watch = Watch { tokens: self.tokens.clone(), key: key(b) };
        b.patch(table.id, Patch::Weight(Box::new(watch)))
    }
}

/// Leaves the table as it is and m on the pass.
struct Watch {
    tokens: Vec<i64>,
    key: String,
}

impl Watch {
    /// m [rows, 1].
    fn mask(&self, ids: &[i64], cx: &Pass) -> Result<Tensor> {
        let (sequences, n) = (cx.layout().sequences(), self.tokens.len());
        let last = |rows: &std::ops::Range<usize>| {
            ids[rows.clone()].windows(n).rposition(|own| own == self.tokens).map(|at| rows.start + at)
        };
        let starts: Vec<Option<usize>> = sequences.iter().map(last).collect();
        let found = cx.once(&self.key, || {
            let found = starts.iter().map(|start| f32::from(u8::from(start.is_some()))).collect();
            Ok(Tensor::from_vec(found, [starts.len(), 1])?)
        })?;
        if cx.continues() {
            return Ok(found.gather(&owners(cx)?)?);
        }
        let mut mask = vec![0.0; ids.len()];
        for (rows, start) in sequences.iter().zip(&starts) {
            start.iter().for_each(|&start| mask[start..rows.end].fill(1.0));
        }
        Ok(Tensor::from_vec(mask, [ids.len(), 1])?)
    }
}

impl WeightPatch for Watch {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, _cx: &Pass) -> Result<Tensor> {
        base.forward(x)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, cx: &Pass) -> Result<Tensor> {
        cx.put(self.key.clone(), self.mask(ids.ids()?, cx)?);
        base.lookup(ids)
    }

    fn mergeable(&self) -> bool {
        false
    }
}

/// m at one matrix.
#[derive(Clone)]
pub(super) struct Invoked {
    key: String,
}

impl Invoked {
    pub fn at(b: &Builder<'_>, site: &Site) -> Result<Invoked> {
        let head = site.role == Role::Head && b.info().task == Task::CausalLm;
        if site.layer.is_none() && !head || site.stack != Stack::Only {
            let message = "aLoRA adapts rows of tokens, and what stands before the blocks may see others; leave it out of the \
                           targets"
                .into();
            return Err(Error::Site { path: site.path.clone(), message });
        }
        Ok(Invoked { key: key(b) })
    }

    /// m·x.
    pub fn only(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        Ok(x.mul(&self.mask(x, site, cx)?)?)
    }

    /// m for the rows of x: at the head, those that were selected.
    pub fn mask(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let own = cx.find(&self.key).map(|mask| cx.selected(&mask)).transpose()?.flatten();
        own.filter(|mask| mask.dim(0) == x.dim(0)).ok_or_else(|| Error::Site {
            path: site.path.clone(),
            message: "aLoRA needs the rows of all tokens and no others; leave out prompts and methods that choose tokens".into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{KvCache, Layout, Patched};
    use engraft_tensor::testing::{close, sample};
    use std::sync::{Arc, Mutex};

    const Q: &str = "layers.0.attn.q";

    fn adapter() -> crate::Attached {
        let a = attached(&[chosen("lora", json!({ "rank": 2, "alora_invocation_tokens": [3, 4] }))], &[]);
        stir(&a, 0.5);
        a
    }

    /// Which rows of Q's output are adapted, after a look-up of `ids` in the same pass.
    fn adapted(a: &crate::Attached, ids: &[i64], cx: &Pass) -> Result<Vec<bool>> {
        let (sites, _) = toy();
        let patched = |path: &str, run: &dyn Fn(&Patched<'_>) -> Result<Tensor>| {
            let site = sites.get(site_id(&sites, path));
            let engraft_nn::Value::Weight(weight) = &site.value else { panic!("no weight") };
            run(&Patched::new(weight.as_ref(), a.adapter.at(site.id), site, cx))
        };
        let tokens = Tensor::from_i64(ids.to_vec(), [ids.len()])?;
        let rows = patched("tok", &|w| w.lookup(&tokens))?;
        close(&rows, &frozen("tok").gather(&tokens)?, 0.0);
        let x = sample(&[ids.len(), 6], 3);
        let moved = patched(Q, &|w| w.forward(&x))?.sub(&x.matmul_t(&frozen(Q))?)?.to_vec()?;
        Ok(moved.chunks(6).map(|row| row.iter().any(|v| v.abs() > 1e-4)).collect())
    }

    #[test]
    fn it_acts_from_the_last_invocation_on() {
        let a = adapter();
        let of = |ids: &[i64], lengths: &[usize]| {
            adapted(&a, ids, &Pass::new(Layout::counted(lengths).unwrap(), None)).unwrap()
        };
        assert_eq!(of(&[1, 3, 4, 5, 3, 4, 7], &[7]), [false, false, false, false, true, true, true]);
        // The tokens of an invocation may not lie in two texts; a text without one is the base's.
        assert_eq!(of(&[3, 4, 1, 2, 3, 4, 5], &[3, 2, 2]), [true, true, true, false, false, false, false]);
        assert_eq!(of(&[1, 3, 4], &[3]), [false, true, true]);
        assert_eq!(of(&[3], &[1]), [false]);
    }

    #[test]
    fn a_text_that_is_continued_stays_what_it_was() {
        let a = adapter();
        let cache = Arc::new(Mutex::new(KvCache::new(1, 2, 8)));
        let layout = Layout::counted(&[2, 3]).unwrap();
        let first = Pass::new(layout, None).cached(cache.clone());
        assert_eq!(adapted(&a, &[3, 4, 1, 4, 3], &first).unwrap(), [true, true, false, false, false]);
        // The second text writes the invocation itself, and is not adapted for it.
        let rows = first.once("alora", || panic!("kept")).unwrap();
        assert_eq!(rows.to_vec().unwrap(), [1.0, 0.0]);
    }

    #[test]
    fn the_head_is_adapted_at_the_rows_that_it_is_given() {
        let methods = [(
            chosen("lora", json!({ "rank": 2, "alora_invocation_tokens": [3, 4] })).0,
            Some(engraft_nn::Targets::names(["head"])),
        )];
        let a = attached(&methods, &[]);
        stir(&a, 0.5);
        let (sites, _) = toy();
        let patched = |path: &str, cx: &Pass, run: &dyn Fn(&Patched<'_>) -> Result<Tensor>| {
            let site = sites.get(site_id(&sites, path));
            let engraft_nn::Value::Weight(weight) = &site.value else { panic!("no weight") };
            run(&Patched::new(weight.as_ref(), a.adapter.at(site.id), site, cx)).unwrap()
        };
        let cx = Pass::new(Layout::counted(&[3, 4]).unwrap(), None);
        let ids = Tensor::from_i64(vec![3, 4, 5, 1, 3, 4, 2], [7]).unwrap();
        patched("tok", &cx, &|w| w.lookup(&ids));
        let x = sample(&[3, 6], 3);
        let moved = |cx: &Pass| {
            let y = patched("head", cx, &|w| w.forward(&x));
            let off = y.sub(&x.matmul_t(&frozen("head")).unwrap()).unwrap();
            let off = off.to_vec().unwrap();
            off.chunks(off.len() / 3).map(|row| row.iter().any(|v| v.abs() > 1e-4)).collect::<Vec<_>>()
        };
        assert_eq!(moved(&cx.select(&[2, 3, 5]).unwrap()), [true, false, true]);
        assert_eq!(
            moved(&cx.select(&[1, 2, 3, 4]).unwrap().select(&[1, 2, 3]).unwrap()),
            [true, false, true]
        );
    }

    #[test]
    fn a_bias_of_the_product_acts_there_too() {
        let settings = json!({ "rank": 2, "lora_bias": true, "alora_invocation_tokens": [3, 4] });
        let a = attached(&[chosen("lora", settings)], &[]);
        for p in a.adapter.trainable().filter(|p| p.name.ends_with("lora_B.bias")) {
            p.param.set(Tensor::full(0.5, [p.param.value().len()])).unwrap();
        }
        let cx = Pass::new(Layout::counted(&[4]).unwrap(), None);
        assert_eq!(adapted(&a, &[1, 3, 4, 2], &cx).unwrap(), [false, true, true, true]);
    }

    #[test]
    fn configurations_and_what_cannot_be() {
        let methods = [chosen("lora", json!({ "rank": 2, "alora_invocation_tokens": [3, 4] }))];
        survives_saving(&methods, &["head"]);
        assert_eq!(config(&methods, &[])["alora_invocation_tokens"], json!([3, 4]));
        let a = attached(&methods, &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (2 * (6 + 6) + 2 * (6 + 4)));
        let (sites, info) = toy();
        assert!(engraft_nn::merged_tensors(&sites, &a.adapter).is_err());
        let of = |target: &str| {
            let method = chosen("lora", json!({ "alora_invocation_tokens": [3] })).0;
            crate::attach(&[(method, Some(engraft_nn::Targets::names([target])))], &[], &sites, &info, 0)
        };
        assert!(of("tok").err().unwrap().to_string().contains("tok"));
        assert!(of("head").is_ok());
        for other in [json!({ "dora": true }), json!({ "kasa": true }), json!({ "init": "pissa" })] {
            let settings = with(json!({ "alora_invocation_tokens": [3] }), other);
            let made = (crate::find("lora").unwrap().from_settings)(settings.as_object().unwrap());
            assert!(made.err().unwrap().to_string().contains("aLoRA"));
        }
        let masked = engraft_nn::ModelInfo { task: Task::MaskedLm, ..toy().1 };
        let error = crate::attach(&methods, &[], &sites, &masked, 0).err().unwrap().to_string();
        assert!(error.contains("causal"), "{error}");
        let cx = Pass::new(Layout::counted(&[2]).unwrap(), None);
        let site = sites.get(site_id(&sites, Q));
        let engraft_nn::Value::Weight(weight) = &site.value else { panic!("no weight") };
        let alone =
            Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx).forward(&sample(&[2, 6], 1));
        assert!(alone.err().unwrap().to_string().contains("rows of all tokens"));
    }
}
