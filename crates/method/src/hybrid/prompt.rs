//! AdapterHub's prompt: rows behind the embeddings, in models whose embeddings know positions: tokens keep theirs, and the
//! rows have none. What stands for a sequence is the first row of all, a row of the prompt unless that comes behind the first
//! token.
//!
//! P [length, width], uniform in ±½.

use engraft_nn::{BlockPatch, Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, Sites};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use super::prefix::trunk;
use crate::adapter_hub::hub_name;
use crate::prompts::prompt::TOKENS_MAX;
use crate::read::Reader;
use crate::shared::carried::{Carried, first_of};

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Prompt {
    pub length: usize,
    /// Whether the rows come behind the first token.
    pub behind_first: bool,
    /// How they started, for the file.
    pub start: (String, Value),
}

const COMBINES: &[(&str, bool)] = &[("prefix", false), ("prefix_after_bos", true)];

impl Prompt {
    pub fn read(map: &Map<String, Value>) -> Result<Prompt> {
        let mut r = Reader::file(map);
        r.ignore(&["architecture", "init_weights_seed", "random_uniform_scale"]);
        let prompt = Prompt {
            length: r.count("prompt_length", 10, TOKENS_MAX),
            behind_first: r.one_of("combine", COMBINES),
            start: (
                r.text("prompt_init").unwrap_or_else(|| "random_uniform".into()),
                r.value("prompt_init_text").cloned().unwrap_or(Value::Null),
            ),
        };
        r.finish()?;
        Ok(prompt)
    }

    pub fn config(&self) -> Value {
        json!({
            "architecture": "prompt_tuning", "combine": COMBINES.iter().find(|c| c.1 == self.behind_first).map(|c| c.0),
            "init_weights_seed": null, "prompt_init": self.start.0, "prompt_init_text": self.start.1,
            "prompt_length": self.length,
        })
    }

    /// Attaches it as `name`.
    pub fn attach(&self, b: &mut Builder<'_>, name: &str) -> Result<()> {
        let sites = b.sites();
        let blocks: Vec<&Site> = sites.of_kind(|k| matches!(k, Kind::Block { .. })).collect();
        let (true, Some(first)) = (fits(sites), blocks.first()) else {
            return Err(Error::Unsupported(
                "a prompt in AdapterHub's form needs an encoder whose embeddings know positions; choose `prompt`, in peft's form".into(),
            ));
        };
        let Kind::Block { width } = first.kind else { return Ok(()) };
        let stem = format!("{}prompt_tuning.prompt_tunings.{name}", trunk(&hub_name(sites, first)));
        let rows =
            b.param(&format!("{stem}.prompt_embedding.weight"), &[self.length, width], Init::Uniform(0.5))?;
        let stands = !self.behind_first && b.info().task.per_sequence();
        for (i, site) in blocks.iter().enumerate() {
            let (key, ends) = (format!("{}hub.prompt", b.prefix()), i + 1 == blocks.len());
            let carried = Carried { key, count: self.length, begins: i == 0, ends };
            let at = At { rows: rows.clone(), carried, stands: stands && ends };
            b.patch(site.id, Patch::Block(Box::new(at)))?;
        }
        Ok(())
    }
}

/// Whether a model has embeddings that are whole before the first block: of words with positions and types, of patches.
pub(super) fn fits(sites: &Sites) -> bool {
    let has = |role: Role| sites.iter().any(|s| s.role == role);
    has(Role::PositionEmbed) && (has(Role::TypeEmbed) || has(Role::PatchEmbed))
}

/// The rows at one block.
struct At {
    rows: Param,
    carried: Carried,
    /// Whether the first of them stands for its sequence from here on.
    stands: bool,
}

impl BlockPatch for At {
    fn rows_before(&self) -> usize {
        self.carried.count
    }

    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let (out, rows) = self.carried.through(h, run, site, cx, || Ok(self.rows.get()))?;
        match rows.filter(|_| self.stands) {
            Some(rows) => first_of(&out, &rows, self.carried.count, cx),
            None => Ok(out),
        }
    }
}
