//! DePT: a short prompt, and a change of low rank on the embedded tokens that stands for the rest of a longer one.
//!
//! H₀ = [P; E + c·A·B], row i of A for the token at position i, c = α/√r. A token's position is its column in its padded row,
//! as in the authors' program, which pads on the right; those from `max_length` on have no row, so that a text may be
//! continued past it. With B = 0 it is prompt tuning.
//!
//! Shi & Lipani 2024, arXiv:2309.05173, equations 3 and 4; c is the authors' program's.
//!
//! P [tokens, width], A [max_length, rank] and B [rank, width], saved as `prompt_embeddings`, `lora_embedding_A` and
//! `lora_embedding_B`. P starts as in prompt tuning, A uniform in ±1/√rank, B zero. A and B learn at a rate of their own: the
//! paper finds 0.3 for P and 5·10⁻⁴ to 5·10⁻³ for these. In an encoder–decoder model all of it is at the encoder's input.

use engraft_nn::{
    Base, Builder, Error, Init, Kind, Pass, Patch, PromptPatch, Result, Role, Site, Stack, WeightPatch,
};
use engraft_tensor::ops::cat;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::{
    INIT, INIT_BELOW, INIT_IDS, INIT_TEXT, Start, TOKENS_MAX, expect_tokens, kept_start, read_start,
};
use crate::read::{Reader, number};
use crate::shared::fields::{float, int};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const RANK_MAX: usize = 1 << 16;
const LENGTH_MAX: usize = 1 << 20;
/// The parameter group of A and B.
const LOW_RANK: &str = "low_rank";

struct DePt {
    tokens: usize,
    rank: usize,
    max_length: usize,
    alpha: f64,
    lr_ratio: f64,
    start: Start,
}

static INFO: Info = Info {
    name: "dept",
    title: "DePT",
    class: "prompt",
    sites: "prompt, weight",
    paper: "arXiv:2309.05173",
    summary: "a short prompt before the embedded input, and a change of low rank on the input itself",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_DEPT",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("40"), "Number of rows."),
        int(
            "rank",
            (1, RANK_MAX as i64),
            Some("45"),
            "Inner size of the product that is added to the embedded tokens.",
        ),
        int("max_length", (1, LENGTH_MAX as i64), Some("256"), "Positions that have a row of the product."),
        float("alpha", (0.0, 1e9), "8", "The product is scaled by alpha/√rank."),
        float(
            "lr_ratio",
            (0.0, 1e6),
            "0.01",
            "Learning rate of the product's factors over that of the prompt.",
        ),
        INIT,
        INIT_TEXT,
        INIT_IDS,
        INIT_BELOW,
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>, tokens: &'static str, start: fn(&mut Reader<'_>) -> Start) -> DePt {
    DePt {
        tokens: r.count(tokens, 40, TOKENS_MAX),
        rank: r.count("rank", 45, RANK_MAX),
        max_length: r.count("max_length", 256, LENGTH_MAX),
        alpha: r.float("alpha", 8.0),
        lr_ratio: r.float("lr_ratio", 0.01),
        start: start(r),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, |r| read(r, "tokens", read_start))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::file_without_targets(INFO.peft_type, config, |r| {
        expect_tokens(r);
        read(r, "num_virtual_tokens", kept_start)
    })
}

fn example() -> Box<dyn Method> {
    // Shorter than the conformance tests' sequences, so that some tokens have no row.
    Box::new(DePt { tokens: 2, rank: 3, max_length: 4, alpha: 4.0, lr_ratio: 0.1, start: Start::Noise })
}

impl Method for DePt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("tokens·d + rank·(max_length + d)")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let table = |s: &&Site| s.role == Role::Embed && s.is_weight() && s.stack != Stack::Decoder;
        let prompt = b.sites().of_kind(|k| matches!(k, Kind::Prompt { .. })).next();
        let (Some(prompt), Some(table)) = (prompt, b.sites().iter().find(table)) else {
            return Err(Error::Unsupported(
                "DePT changes embedded tokens, and this model has none; choose `vpt`".into(),
            ));
        };
        let Kind::Embedding { width, .. } = table.kind else {
            return Err(Error::Site {
                path: table.path.clone(),
                message: "expected a table of tokens".into(),
            });
        };
        let start = self.start.of(b, self.tokens, self.tokens)?;
        let param = b.param("prompt_embeddings", &[self.tokens, width], start)?;
        b.patch(prompt.id, Patch::Prompt(Box::new(Rows { param, count: self.tokens })))?;
        let sizes = ([self.max_length, self.rank], [self.rank, width]);
        let a = b.param_in_group("lora_embedding_A", &sizes.0, Init::kaiming(self.rank), LOW_RANK)?;
        let low = b.param_in_group("lora_embedding_B", &sizes.1, Init::Zeros, LOW_RANK)?;
        let scale = (self.alpha / (self.rank as f64).sqrt()) as f32;
        b.patch(table.id, Patch::Weight(Box::new(ByPosition { a, b: low, scale })))
    }

    fn learning_rate_factor(&self, group: &str) -> f32 {
        if group == LOW_RANK { self.lr_ratio as f32 } else { 1.0 }
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "alpha": number(self.alpha), "lr_ratio": number(self.lr_ratio), "max_length": self.max_length,
            "num_virtual_tokens": self.tokens, "rank": self.rank,
        });
        let mut map = own.as_object().cloned().unwrap_or_default();
        map.extend(self.start.origin(model.base_model));
        map
    }

    fn file_name(&self, name: &str) -> String {
        match name {
            "prompt_embeddings" | "lora_embedding_A" | "lora_embedding_B" => name.into(),
            _ => format!("base_model.model.{name}"),
        }
    }
}

struct Rows {
    param: Param,
    count: usize,
}

impl PromptPatch for Rows {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self, _embedded: &Tensor, _cx: &Pass) -> Result<Tensor> {
        Ok(self.param.get())
    }
}

/// c·A·B, added to the embedded tokens by their positions.
struct ByPosition {
    a: Param,
    b: Param,
    scale: f32,
}

impl WeightPatch for ByPosition {
    /// What is added depends on where a token stands, so that the table stays as it is.
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        base.dense()
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, cx: &Pass) -> Result<Tensor> {
        let mut a = self.a.get();
        let length = a.dim(0) as i64;
        let row = |at: &i32| i64::from(*at).clamp(0, length);
        let index: Vec<i64> = cx.layout().positions().iter().map(row).collect();
        if index.contains(&length) {
            // A row of zeros for all that lie beyond.
            a = cat(&[&a, &Tensor::zeros([1, a.width()])], 0)?;
        }
        let rows = a.gather(&Tensor::from_i64(index.clone(), [index.len()])?)?;
        Ok(base.lookup(ids)?.plus(&rows.matmul(&self.b.get())?.scale(self.scale)?)?)
    }

    fn mergeable(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patched, Value as Frozen};
    use engraft_tensor::testing::close;

    fn looked_up(a: &crate::Attached, ids: &Tensor, positions: Vec<i32>) -> Tensor {
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "tok"));
        let Frozen::Weight(weight) = &site.value else { panic!("no table") };
        let cx = Pass::new(Layout::new(&[positions.len()], positions).unwrap(), None);
        engraft_nn::Base::lookup(&Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx), ids)
            .unwrap()
    }

    #[test]
    fn tokens_are_changed_by_where_they_stand() {
        let settings = json!({ "tokens": 2, "rank": 2, "max_length": 3, "alpha": 3 });
        let a = attached(&[chosen("dept", settings)], &[]);
        // m·d + r·(S + d).
        assert_eq!(a.adapter.trained_count(), 2 * 6 + 2 * (3 + 6));
        let ids = Tensor::from_i64(vec![4, 4, 1], [3]).unwrap();
        let plain = frozen("tok").gather(&ids).unwrap();
        close(&looked_up(&a, &ids, vec![0, 1, 2]), &plain, 0.0);
        stir(&a, 0.5);
        let change = value_of(&a, "lora_embedding_A").matmul(&value_of(&a, "lora_embedding_B")).unwrap();
        let change = change.scale(3.0 / 2f32.sqrt()).unwrap();
        let row = |i: usize| change.rows_between(i, i + 1).unwrap();
        // Position 5 has no row.
        let expected = plain.add(&cat(&[&row(2), &Tensor::zeros([1, 6]), &row(0)], 0).unwrap()).unwrap();
        close(&looked_up(&a, &ids, vec![2, 5, 0]), &expected, 1e-6);
    }

    #[test]
    fn factors_learn_at_a_rate_of_their_own() {
        let (method, _) = chosen("dept", json!({ "lr_ratio": 0.002, "max_length": 8 }));
        assert_eq!((method.learning_rate_factor(LOW_RANK), method.learning_rate_factor("")), (0.002, 1.0));
        survives_saving(&[(method, None)], &["head"]);
        let written = config(&[chosen("dept", json!({}))], &[]);
        for bad in [json!({ "num_virtual_tokens": null }), json!({ "rank": 0 }), json!({ "odd": 1 })] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
