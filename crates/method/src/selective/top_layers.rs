//! Top-layer tuning: the last K blocks, what follows them and the head are trained whole, everything below stays.
//!
//! W′ = P with P starting as W. Backward ends below the lowest trained block, so that nothing of the blocks under it is kept. Of
//! an encoder and a decoder the decoder's blocks are meant. A head that shares the table of tokens stays as it is: training it
//! would train the bottom of the model.
//!
//! Standard practice; Lee, Tang and Lin 2019, arXiv:1911.03090, compare K.
//!
//! P has the shape of W and is saved under its name.

use std::collections::BTreeSet;

use engraft_nn::{Builder, Error, Result, Role, Site, SiteId, Sites, Stack, Value as Frozen};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::{flag, int};
use crate::{Described, Entry, Info, Method, peft};

struct TopLayers {
    blocks: usize,
    head: bool,
}

const BLOCKS_MAX: usize = 1 << 16;

static INFO: Info = Info {
    name: "top_layers",
    title: "Top-layer tuning",
    class: "selective",
    sites: "weight, vector",
    paper: "arXiv:1911.03090",
    summary: "trains the last blocks, the norm after them and the head",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_TOP_LAYERS",
    fields: &[
        int(
            "blocks",
            (1, BLOCKS_MAX as i64),
            Some("2"),
            "Number of blocks that are trained, from the last one down.",
        ),
        flag(
            "head",
            "true",
            "Train what comes after the blocks too: the last norm, a pooler, a head of its own.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, TopLayers::read),
    from_file: |config| peft::own_file(&INFO, config, TopLayers::read),
    example: || Box::new(TopLayers { blocks: 1, head: true }),
};

impl TopLayers {
    fn read(r: &mut Reader<'_>) -> Self {
        TopLayers { blocks: r.count("blocks", 2, BLOCKS_MAX), head: r.flag("head", true) }
    }

    /// The tensors that are trained.
    fn chosen<'s>(&self, sites: &'s Sites) -> Result<Vec<&'s Site>> {
        let in_stack =
            |s: &&Site| s.stack != Stack::Encoder || !sites.iter().any(|s| s.stack == Stack::Decoder);
        let blocks: BTreeSet<usize> = sites.iter().filter(in_stack).filter_map(|s| s.layer).collect();
        let Some(last) = blocks.last().copied() else {
            return Err(Error::Unsupported(
                "this model has no blocks; choose full, with the targets that you mean".into(),
            ));
        };
        if self.blocks > blocks.len() {
            let message = format!("`blocks` is {}, and this model has {} blocks", self.blocks, blocks.len());
            return Err(Error::Unsupported(message));
        }
        let first = last + 1 - self.blocks;
        let of_block = |s: &&Site| s.layer.is_some_and(|layer| layer >= first);
        // Sites are declared in the order of the forward.
        let end = sites.iter().filter(in_stack).filter(|s| s.layer.is_some()).map(|s| s.id).max();
        let after = |s: &&Site| self.head && s.layer.is_none() && Some(s.id) > end && !below(sites, s);
        let holds = |s: &&Site| !matches!(s.value, Frozen::None);
        Ok(sites.iter().filter(in_stack).filter(holds).filter(|s| of_block(s) || after(s)).collect())
    }
}

/// Whether the tensor of a head is also one from below the blocks.
fn below(sites: &Sites, head: &Site) -> bool {
    let table = |s: &Site| s.role == Role::Embed && s.is_weight() && s.tensor == head.tensor;
    head.tensor.is_some() && sites.iter().any(table)
}

impl Method for TopLayers {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let chosen: Vec<SiteId> = self.chosen(b.sites())?.iter().map(|s| s.id).collect();
        for id in chosen {
            if !b.replaced(id) {
                b.replace(id)?;
            }
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "head": self.head, "blocks": self.blocks });
        own.as_object().cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn the_last_blocks_and_the_head_are_trained() {
        let count = |settings: Value| {
            let a = attached(&[chosen("top_layers", settings)], &[]);
            (names(&a).iter().all(|n| !n.starts_with("tok")), a.adapter.trained_count())
        };
        // Of a toy's block: q, k and v without a bias, up, down, norm; biases of q, k and down.
        let (sites, _) = toy();
        let block: usize = sites
            .iter()
            .filter(|s| s.layer == Some(1))
            .map(|s| match &s.value {
                Frozen::Weight(w) => {
                    engraft_nn::Base::shape(w.as_ref()).0 * engraft_nn::Base::shape(w.as_ref()).1
                }
                Frozen::Vector(v) => v.len(),
                Frozen::None => 0,
            })
            .sum();
        assert_eq!(count(json!({ "blocks": 1, "head": false })), (true, block));
        assert_eq!(count(json!({ "blocks": 2, "head": false })), (true, 2 * block));
        assert_eq!(count(json!({ "blocks": 1 })), (true, block + 3 * 6 + 3));
        let a = attached(&[chosen("top_layers", json!({ "blocks": 1, "head": false }))], &[]);
        assert!(names(&a).iter().all(|n| n.starts_with("layers.1.")), "{:?}", names(&a));
        let (sites, info) = toy();
        let many = [chosen("top_layers", json!({ "blocks": 3 }))];
        assert!(crate::attach(&many, &[], &sites, &info, 0).is_err(), "more than there are");
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("top_layers", json!({ "blocks": 1 }))], &[]);
        survives_saving(&[chosen("top_layers", json!({ "blocks": 2, "head": false }))], &["head"]);
        let written = config(&[chosen("top_layers", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "blocks": 0 }))).is_err());
    }
}
