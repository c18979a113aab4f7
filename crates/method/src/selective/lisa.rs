//! LISA: another few blocks are trained every some steps, whole; what lies outside the blocks always is.
//!
//! W′ = P with P starting as W. Every `interval` steps `active_blocks` of the L blocks are drawn, all equally likely and none twice; until
//! the next draw only these, the embeddings, what follows the blocks and the head receive gradients. Those of the others are
//! not computed. A tensor without a gradient keeps its value and its moments, which go on where they were when its block is
//! drawn again. The outcome is a whole model.
//!
//! Pan et al. 2024, arXiv:2403.17919, algorithm 1 with equal probabilities, as in the authors' experiments.
//!
//! P has the shape of W and is saved under its name. A tied table stays tied.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use engraft_nn::{
    Base, Builder, Error, Init, Kind, Mode, Pass, Patch, Result, Site, Stack, Value as Frozen, VectorPatch,
    WeightPatch,
};
use engraft_tensor::cpu::random::Key;
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::Reader;
use crate::shared::fields::int;
use crate::shared::sparse::drawn;
use crate::{Described, Entry, Info, Method, peft};

const BLOCKS_MAX: usize = 1 << 16;
const INTERVAL_MAX: usize = 1 << 30;

struct Lisa {
    active: usize,
    interval: usize,
}

static INFO: Info = Info {
    name: "lisa",
    title: "LISA",
    class: "selective",
    sites: "weight, vector",
    paper: "arXiv:2403.17919",
    summary: "trains random blocks, others every some steps, with embeddings and head",
    mergeable: true,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_LISA",
    fields: &[
        int(
            "active_blocks",
            (1, BLOCKS_MAX as i64),
            Some("2"),
            "Blocks trained at a time (γ); all of them where there are not so many.",
        ),
        int("interval", (1, INTERVAL_MAX as i64), Some("20"), "Steps until others are drawn (K)."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry {
    info: &INFO,
    from_settings: |settings| peft::own_settings(&INFO, settings, Lisa::read),
    from_file: |config| peft::own_file(&INFO, config, Lisa::read),
    // All blocks at once, so that every gradient is there.
    example: || Box::new(Lisa { active: BLOCKS_MAX, interval: 3 }),
};

impl Lisa {
    fn read(r: &mut Reader<'_>) -> Self {
        Lisa {
            active: r.count("active_blocks", 2, BLOCKS_MAX),
            interval: r.count("interval", 20, INTERVAL_MAX),
        }
    }
}

/// Which blocks are trained when.
struct Draw {
    active: usize,
    interval: u64,
    blocks: Vec<(Stack, usize)>,
    /// Seed and step of the pass that was begun last, the step 0 where nothing is trained.
    now: [AtomicU64; 2],
}

impl Draw {
    /// Notes where training is. What is embedded comes before every block, so that blocks find this pass's step.
    fn note(&self, mode: Mode) {
        let (seed, step) = match mode {
            Mode::Train { seed, step, .. } => (seed, step),
            Mode::Eval => (0, 0),
        };
        self.now[0].store(seed, Relaxed);
        self.now[1].store(step, Relaxed);
    }

    /// Numbers of the blocks that are trained in `step`, from 1.
    fn active(&self, seed: u64, step: u64) -> Vec<u64> {
        let period = (step.max(1) - 1) / self.interval;
        let key = Key { stream: Init::key(seed, "lisa").stream ^ period, seed };
        drawn(self.active.min(self.blocks.len()), self.blocks.len() as u64, key)
    }

    /// Whether a tensor of `block` is trained now.
    fn trains(&self, block: Option<usize>) -> bool {
        let [seed, step] = [0, 1].map(|i| self.now[i].load(Relaxed));
        match block {
            Some(number) if step > 0 => self.active(seed, step).contains(&(number as u64)),
            _ => true,
        }
    }
}

impl Method for Lisa {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn doubts(&self, targets: &[&Site]) -> Vec<String> {
        let mut blocks: Vec<(Stack, usize)> = Vec::new();
        for block in targets.iter().filter_map(|site| Some((site.stack, site.layer?))) {
            if !blocks.contains(&block) {
                blocks.push(block);
            }
        }
        if self.active <= blocks.len() {
            return vec![];
        }
        vec![format!(
            "`active_blocks` is {}, and the model has {}: every block is trained in every step",
            self.active,
            blocks.len()
        )]
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let sites = b.sites();
        let mut blocks: Vec<(Stack, usize)> = Vec::new();
        for site in sites.iter() {
            if let Some(block) =
                site.layer.map(|layer| (site.stack, layer)).filter(|block| !blocks.contains(block))
            {
                blocks.push(block);
            }
        }
        if blocks.is_empty() {
            return Err(Error::Unsupported("this model has no blocks to draw from; choose full".into()));
        }
        let draw = Arc::new(Draw {
            active: self.active,
            interval: self.interval as u64,
            blocks,
            now: [AtomicU64::new(0), AtomicU64::new(0)],
        });
        let mut trained: HashMap<(&str, Option<Range<usize>>), Param> = HashMap::new();
        for site in sites.iter().filter(|s| !matches!(s.value, Frozen::None)) {
            if b.replaced(site.id) {
                continue;
            }
            // Layers that a file has as one are rows of the same tensor.
            let tensor = (site.tensor.as_deref().unwrap_or(&site.path), site.rows.clone());
            let tied = trained.get(&tensor).filter(|_| site.is_weight()).cloned();
            let param = match tied {
                Some(param) => param,
                None => own(b, site)?,
            };
            trained.entry(tensor).or_insert_with(|| param.clone());
            let block = site.layer.and_then(|l| draw.blocks.iter().position(|b| *b == (site.stack, l)));
            let whole = Whole { param, draw: draw.clone(), block };
            let patch = if site.is_weight() {
                Patch::Weight(Box::new(whole))
            } else {
                Patch::Vector(Box::new(whole))
            };
            b.patch(site.id, patch)?;
        }
        Ok(())
    }

    fn rests(&self) -> bool {
        true
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({ "active_blocks": self.active, "interval": self.interval });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// P of a site.
fn own(b: &mut Builder<'_>, site: &Site) -> Result<Param> {
    let (name, start) = match &site.value {
        Frozen::Weight(w) => (format!("{}.weight", site.path), w.dense()?),
        Frozen::Vector(v) => (site.path.clone(), v.clone()),
        Frozen::None => {
            let message = "holds no tensor to train".into();
            return Err(Error::Site { path: site.path.clone(), message });
        }
    };
    let shape = match site.kind {
        Kind::Convolution { shape, .. } => shape.to_vec(),
        _ => start.shape().to_vec(),
    };
    b.param(&name, &shape, Init::Values(start))
}

/// P in place of a frozen tensor; off the tape while its block is not trained.
struct Whole {
    param: Param,
    draw: Arc<Draw>,
    /// Number of its block; `None` outside the blocks.
    block: Option<usize>,
}

impl Whole {
    fn value(&self) -> Tensor {
        if self.draw.trains(self.block) { self.param.get() } else { self.param.value() }
    }

    fn matrix(&self, base: &dyn Base) -> Result<Tensor> {
        let (rows, width) = base.shape();
        Ok(self.value().reshape([rows, width])?)
    }
}

impl WeightPatch for Whole {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        self.matrix(base)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, _site: &Site, cx: &Pass) -> Result<Tensor> {
        self.draw.note(cx.mode());
        Ok(x.matmul_t(&self.matrix(base)?)?)
    }

    fn lookup(&self, ids: &Tensor, base: &dyn Base, _site: &Site, cx: &Pass) -> Result<Tensor> {
        self.draw.note(cx.mode());
        Ok(self.matrix(base)?.gather(ids)?)
    }
}

impl VectorPatch for Whole {
    fn vector(&self, _v: &Tensor) -> Result<Tensor> {
        Ok(self.value())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::{Layout, Patched};
    use engraft_tensor::testing::{close, sample};

    fn draw(active: usize, blocks: usize) -> Draw {
        let now = [AtomicU64::new(0), AtomicU64::new(0)];
        Draw { active, interval: 5, blocks: (0..blocks).map(|l| (Stack::Only, l)).collect(), now }
    }

    #[test]
    fn trained_numbers() {
        // Everything, of which a few blocks are awake at a time.
        assert_eq!(trained("lisa", json!({})), trained("full", json!({})));
    }

    #[test]
    fn every_block_is_drawn_equally_often_and_stays_for_an_interval() {
        let d = draw(3, 12);
        let (mut visits, periods) = (vec![0; 12], 4000);
        for period in 0..periods {
            let active = d.active(1, period * 5 + 1);
            assert_eq!(active.len(), 3);
            assert!((1..=5).all(|i| d.active(1, period * 5 + i) == active));
            active.iter().for_each(|&block| visits[block as usize] += 1);
        }
        // 1000 expected, deviation √(4000·¼·¾) = 27.
        assert!(visits.iter().all(|v| (v - 1000i32).abs() < 110), "{visits:?}");
        assert_ne!(d.active(1, 1), d.active(1, 6));
    }

    #[test]
    fn what_was_not_drawn_gets_no_gradient() {
        let a = attached(&[chosen("lisa", json!({ "active_blocks": 1, "interval": 2 }))], &[]);
        let (sites, _) = toy();
        let run = |path: &str, step: u64| {
            let site = sites.get(site_id(&sites, path));
            let Frozen::Weight(weight) = &site.value else { panic!() };
            let cx = Pass::new(Layout::counted(&[3]).unwrap(), None).training(Mode::Train {
                seed: 1,
                step,
                micro: 0,
            });
            let patched = Patched::new(weight.as_ref(), a.adapter.at(site.id), site, &cx);
            let y = match site.kind {
                Kind::Embedding { .. } => patched.lookup(&Tensor::from_i64(vec![1, 2, 3], [3]).unwrap()),
                _ => patched.forward(&sample(&[3, patched.shape().1], 1)),
            };
            y.unwrap().needs_grad()
        };
        let mut seen = [false; 2];
        for step in 1..40 {
            assert!(run("tok", step) && run("head", step), "always trained");
            let trained = [0, 1].map(|layer| run(&format!("layers.{layer}.attn.q"), step));
            assert!(trained[0] != trained[1], "one of two");
            let bias = |layer: usize| {
                let id = site_id(&sites, &format!("layers.{layer}.attn.q.bias"));
                let [Patch::Vector(p)] = a.adapter.at(id) else { panic!() };
                p.vector(&frozen(&format!("layers.{layer}.attn.q.bias"))).unwrap().needs_grad()
            };
            assert_eq!([bias(0), bias(1)], trained);
            (0..2).filter(|&l| trained[l]).for_each(|l| seen[l] = true);
        }
        assert_eq!(seen, [true; 2]);
    }

    #[test]
    fn starts_as_the_base() {
        let a = attached(&[chosen("lisa", json!({}))], &[]);
        assert_eq!(names(&a).len(), 1 + 2 * (4 + 3 + 2) + 2, "every tensor once");
        let x = sample(&[4, 6], 2);
        let plain = x.matmul_t(&frozen("layers.0.attn.q")).unwrap();
        close(&both_ways(&a, "layers.0.attn.q", &x).0, &plain, 1e-6);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("lisa", json!({}))], &[]);
        survives_saving(&[chosen("lisa", json!({ "active_blocks": 1, "interval": 4 }))], &["head"]);
        let written = config(&[chosen("lisa", json!({}))], &[]);
        assert!((ENTRY.from_file)(&with(written, json!({ "interval": 0 }))).is_err());
    }
}
