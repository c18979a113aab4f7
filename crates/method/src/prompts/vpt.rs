//! Visual prompt tuning: trained rows beside a picture's patches, before the first block or before every one.
//!
//! Shallow: H₀ = [P; E]. Deep: the rows that block i − 1 made of its prompt are dropped, and block i reads [Pᵢ; rest].
//! Attention has no order and prompts have no position, so that it does not matter whether they stand before the class
//! token or after it. P starts uniform in ±√(6/(n + width)), n the numbers in a patch. Of models that read words, the
//! prompt is of tokens, which are counted from its first row; n is the width.
//!
//! Jia et al. 2022, arXiv:2203.12119, equations 4 to 7; the start is that of the authors' code.
//!
//! P [tokens, width] or, where deep, [layers, tokens, width], saved as `prompt_embeddings`.

use engraft_nn::{
    BlockPatch, Builder, Error, Init, Kind, Pass, Patch, PromptPatch, Result, Site, SiteId, Sites,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prompt::{TOKENS_MAX, expect_tokens};
use crate::read::Reader;
use crate::shared::fields::{choice, flag, int};
use crate::shared::sequences::with_first_rows;
use crate::{Described, Entry, Info, Loaded, Method, peft};

struct Vpt {
    tokens: usize,
    deep: bool,
    start: Start,
}

/// How P starts.
#[derive(Clone, Copy)]
enum Start {
    /// Uniform in ±√(6/(n + width)).
    Uniform,
    /// N(0, 0.02).
    Normal,
}

static INFO: Info = Info {
    name: "vpt",
    title: "Visual prompt tuning",
    class: "prompt",
    sites: "prompt, block",
    paper: "arXiv:2203.12119",
    summary: "trained rows beside the patches; with deep, rows of its own for every block",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_VPT",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("10"), "Number of rows, of each block where deep."),
        flag("deep", "false", "Give every block rows of its own."),
        choice(
            "init",
            &["uniform", "normal"],
            "\"uniform\"",
            "Start uniform, by the sizes of patch and stream, or normal with deviation 0.02.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let vpt = Vpt {
        tokens: r.count("tokens", 10, TOKENS_MAX),
        deep: r.flag("deep", false),
        start: r.one_of("init", &[("uniform", Start::Uniform), ("normal", Start::Normal)]),
    };
    r.finish()?;
    Ok(Box::new(vpt))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::file_without_targets(INFO.peft_type, config, |r| {
        expect_tokens(r);
        Vpt {
            tokens: r.count("num_virtual_tokens", 1, TOKENS_MAX),
            deep: r.flag("deep", false),
            start: Start::Uniform,
        }
    })
}

fn example() -> Box<dyn Method> {
    Box::new(Vpt { tokens: 3, deep: true, start: Start::Uniform })
}

impl Method for Vpt {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("tokens·d")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let found = b.sites().of_kind(|k| matches!(k, Kind::Prompt { .. })).next();
        let Some((prompt, Kind::Prompt { width })) = found.map(|s| (s, s.kind.clone())) else {
            return Err(Error::Unsupported("visual prompts need a model with an embedded input".into()));
        };
        let blocks = blocks(b.sites(), prompt);
        if self.deep && blocks.is_empty() {
            return Err(Error::Unsupported(
                "deep prompts need a model with blocks; set `deep = false`".into(),
            ));
        }
        let shape = if self.deep { vec![blocks.len(), self.tokens, width] } else { vec![self.tokens, width] };
        let init = match self.start {
            Start::Uniform => Init::Uniform((6.0 / (patch_size(b.sites(), width) + width) as f32).sqrt()),
            Start::Normal => Init::Normal(0.02),
        };
        let param = b.param("prompt_embeddings", &shape, init)?;
        let of = |layer: usize| Rows {
            param: param.clone(),
            layer: self.deep.then_some(layer),
            count: self.tokens,
        };
        b.patch(prompt.id, Patch::Prompt(Box::new(of(0))))?;
        for (layer, block) in blocks.into_iter().enumerate().skip(1).filter(|_| self.deep) {
            b.patch(block, Patch::Block(Box::new(of(layer))))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "deep": self.deep, "num_virtual_tokens": self.tokens });
        own.as_object().cloned().unwrap_or_default()
    }

    fn file_name(&self, name: &str) -> String {
        if name == "prompt_embeddings" { name.into() } else { format!("base_model.model.{name}") }
    }
}

/// The blocks that read the prompt, in order.
fn blocks(sites: &Sites, prompt: &Site) -> Vec<SiteId> {
    let blocks = sites.of_kind(|k| matches!(k, Kind::Block { .. }));
    blocks.filter(|s| s.stack == prompt.stack).map(|s| s.id).collect()
}

/// Numbers in a patch; the width, where words are read.
fn patch_size(sites: &Sites, width: usize) -> usize {
    let convolution = |s: &Site| match s.kind {
        Kind::Convolution { inn, .. } => Some(inn),
        _ => None,
    };
    sites.iter().find_map(convolution).unwrap_or(width)
}

/// The rows of one block, or of all.
struct Rows {
    param: Param,
    /// Which part of P; `None` where it is whole.
    layer: Option<usize>,
    count: usize,
}

impl Rows {
    /// [count, width].
    fn own(&self) -> Result<Tensor> {
        let all = self.param.get();
        match self.layer {
            None => Ok(all),
            Some(layer) => Ok(all.rows_between(layer, layer + 1)?.reshape([self.count, all.width()])?),
        }
    }
}

impl PromptPatch for Rows {
    fn count(&self) -> usize {
        self.count
    }

    fn rows(&self, _embedded: &Tensor, _cx: &Pass) -> Result<Tensor> {
        self.own()
    }
}

impl BlockPatch for Rows {
    /// The first rows of each sequence that has a prompt are these instead. With a cache, its later steps have none.
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        _site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        run(&with_first_rows(h, &self.own()?, self.count, cx)?, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn trained_numbers() {
        let count = |deep| trained("vpt", json!({ "tokens": 3, "deep": deep }));
        assert_eq!([count(false), count(true)], [3 * 6, 2 * 3 * 6], "in every block");
    }

    #[test]
    fn shallow_is_prompt_tuning() {
        let a = attached(&[chosen("vpt", json!({ "tokens": 3 }))], &[]);
        assert_eq!(names(&a), ["prompt_embeddings"]);
        let (sites, _) = toy();
        let [Patch::Prompt(p)] = a.adapter.at(site_id(&sites, "tok.prompt")) else { panic!() };
        let cx = Pass::new(Layout::counted(&[1]).unwrap(), None);
        let rows = p.rows(&sample(&[1, 6], 1), &cx).unwrap();
        close(&rows, &a.adapter.params()[0].param.value(), 0.0);
        let bound = (6.0f32 / 12.0).sqrt();
        assert!(rows.to_vec().unwrap().iter().all(|v| v.abs() <= bound));
    }

    #[test]
    fn a_block_reads_rows_of_its_own_in_place_of_the_prompt() {
        let own = Param::new(sample(&[2, 1, 4], 1));
        let rows = Rows { param: own.clone(), layer: Some(1), count: 1 };
        let (sites, _) = toy();
        let h = sample(&[5, 4], 2);
        let run = |h: &Tensor, _: &Pass| Ok(h.clone());
        // Without a prompt nothing is replaced.
        let cx = Pass::new(Layout::counted(&[2, 3]).unwrap(), None);
        let site = sites.iter().next().unwrap();
        close(&rows.around(&h, &run, site, &cx).unwrap(), &h, 0.0);
        let first = own.value().narrow(0, 1, 1).unwrap().reshape([1, 4]).unwrap();
        close(&rows.own().unwrap(), &first, 0.0);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("vpt", json!({}))], &["head"]);
        let written = config(&[chosen("vpt", json!({ "tokens": 4 }))], &[]);
        assert_eq!((&written["num_virtual_tokens"], &written["deep"]), (&json!(4), &json!(false)));
        for bad in [json!({ "num_virtual_tokens": null }), json!({ "deep": "yes" }), json!({ "odd": 1 })] {
            assert!(from_file(&with(written.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
