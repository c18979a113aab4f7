//! S4: layers in four groups, each with its own set of kinds of change, as a search of the design space found it.
//!
//! Layers nearest the input come first; each of a model's stacks is grouped by itself. Of L layers the groups get, by
//! `grouping`, shares 1:2:2:1 (spindle), 1:2:3:4 (increasing), 1:1:1:1 (uniform), 4:3:2:1 (decreasing) or 2:1:1:2
//! (bottleneck): group g ends at the layer nearest to L times the sum of the first shares. `strategies` says what each group
//! has, in letters:
//!   A  a bottleneck adapter after the MLP      P  a prefix of its attention, whose tokens keep their positions
//!   L  LoRA at q and v of self-attention, α = r   B  its biases
//! A group of none ("-") is left as it is. The found design is the spindle with AL, AP, APB, PBL and the uniform allocation.
//! All trained layers together get `budget` times the model's numbers: by `allocation` each as much as the others (uniform), or a
//! layer of group g as g (increasing) or 5 − g (decreasing) parts. In a layer, biases are as they are and the rest is in equal
//! parts, sizes to the nearest whole number, the coarsest kind first; what one leaves is parted equally among those after it.
//! Halves round up.
//!
//! Chen et al. 2023, arXiv:2301.01821, design of T5-base. The sizes of the groups and the equal parts are ours: the paper
//! gives no numbers.
//!
//! Tensors are those of `bottleneck`, `lora`, AdapterHub's flat prefixes and `bitfit`.

use engraft_nn::{Builder, Error, Kind, Result, Role, Site, SiteId, Sites};
use serde_json::{Map, Value, json};

use super::prefix::Prefix;
use crate::read::Reader;
use crate::shared::fields::{choice, float};
use crate::{Described, Entry, Field, FieldKind, Info, Loaded, Method, peft};

#[derive(Clone, Debug)]
struct S4 {
    budget: f64,
    grouping: [usize; 4],
    strategies: Vec<String>,
    /// Parts of the budget for a layer of each group.
    allocation: [usize; 4],
}

const ALLOCATIONS: &[(&str, [usize; 4])] =
    &[("uniform", [1, 1, 1, 1]), ("increasing", [1, 2, 3, 4]), ("decreasing", [4, 3, 2, 1])];

const GROUPINGS: &[(&str, [usize; 4])] = &[
    ("spindle", [1, 2, 2, 1]),
    ("increasing", [1, 2, 3, 4]),
    ("uniform", [1, 1, 1, 1]),
    ("decreasing", [4, 3, 2, 1]),
    ("bottleneck", [2, 1, 1, 2]),
];
const LETTERS: &str = "APLB";
/// The strategy of a group that is left as it is.
const NOTHING: &str = "-";
const FOUND: [&str; 4] = ["AL", "AP", "APB", "PBL"];

static INFO: Info = Info {
    name: "s4",
    title: "S4",
    class: "hybrid",
    sites: "sublayer, keys and values, weight, vector",
    paper: "arXiv:2301.01821",
    summary: "four groups of layers, each with its own set of adapters, prefixes, LoRAs and biases",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_S4",
    fields: &[
        float("budget", (0.0, 1.0), "0.005", "Trained numbers over those of the model."),
        choice(
            "grouping",
            &["spindle", "increasing", "uniform", "decreasing", "bottleneck"],
            "\"spindle\"",
            "How layers are dealt out to the four groups.",
        ),
        Field {
            name: "strategies",
            kind: FieldKind::TextList,
            default: Some(r#"["AL", "AP", "APB", "PBL"]"#),
            doc: "What each group has: A adapter, P prefix, L LoRA, B biases; \"-\" leaves a group as it is.",
        },
        choice(
            "allocation",
            &["uniform", "increasing", "decreasing"],
            "\"uniform\"",
            "How the budget is dealt out: to every trained layer the same, or 1, 2, 3, 4 parts from the first group to the last, or back.",
        ),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> S4 {
    let found = || FOUND.iter().map(|s| (*s).to_string()).collect();
    let s4 = S4 {
        budget: r.share("budget", 0.005),
        grouping: r.one_of("grouping", GROUPINGS),
        strategies: r.texts("strategies").unwrap_or_else(found),
        allocation: r.one_of("allocation", ALLOCATIONS),
    };
    let known = |s: &String| s == NOTHING || !s.is_empty() && s.chars().all(|c| LETTERS.contains(c));
    if s4.strategies.len() != 4 || !s4.strategies.iter().all(known) {
        r.problem(format!(
            "`strategies`: expected four texts of the letters A, P, L and B, or \"-\" alone, found {:?}",
            s4.strategies
        ));
    } else if s4.strategies.iter().all(|s| s == NOTHING) {
        r.problem("`strategies`: all four groups are left as they are; give one of them a letter");
    }
    s4
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    let strategies = ["PL", "AP", "APB", "PBL"].map(String::from).to_vec();
    Box::new(S4 { budget: 0.05, grouping: [1, 1, 1, 1], strategies, allocation: [1; 4] })
}

impl Method for S4 {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("≈ budget·N")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let layers = layers(b.sites());
        if layers.is_empty() {
            return Err(Error::Unsupported("S4 needs a model with layers".into()));
        }
        let total = b.sites().parameters() as f64;
        let plans = self.plans(&layers, self.budget * total)?;
        let trained: usize = plans.iter().map(|(layer, plan)| plan.size(layer)).sum();
        // Sizes are whole: about the budget is what can be had, and no more than twice of it what was meant.
        if trained as f64 > 2.0 * self.budget * total {
            let message = format!(
                "`budget` is {}, and the least that these strategies can train is {trained} of {total} numbers; choose about {:.1e}",
                self.budget,
                trained as f64 / total
            );
            return Err(Error::Unsupported(message));
        }
        adapters(b, &plans)?;
        prefixes(b, &plans)?;
        for (layer, plan) in &plans {
            if plan.rank > 0 {
                let settings = json!({ "rank": plan.rank, "alpha": plan.rank });
                let settings = settings.as_object().cloned().unwrap_or_default();
                b.set_targets(layer.weights.clone());
                (crate::reparameterized::lora::ENTRY.from_settings)(&settings)?.attach(b)?;
            }
            if plan.biases {
                layer.biases.iter().try_for_each(|&site| b.replace(site))?;
            }
        }
        b.set_targets(Vec::new());
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let grouping = GROUPINGS.iter().find(|g| g.1 == self.grouping).map_or("spindle", |g| g.0);
        let allocation = ALLOCATIONS.iter().find(|a| a.1 == self.allocation).map_or("uniform", |a| a.0);
        let own = json!({
            "allocation": allocation, "budget": self.budget, "grouping": grouping, "strategies": self.strategies,
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

impl S4 {
    /// What each layer has, of `budget` numbers in all.
    fn plans<'l>(&self, layers: &'l [Layer], budget: f64) -> Result<Vec<(&'l Layer, Plan)>> {
        let groups = layers.iter().map(|layer| self.group(layer.place, layer.of));
        let trained: Vec<usize> = groups.filter(|group| self.strategies[*group] != NOTHING).collect();
        let parts: usize = trained.iter().map(|group| self.allocation[*group]).sum();
        let part = budget / parts.max(1) as f64;
        if trained.is_empty() {
            let message = "`strategies` leave every group that has a layer in this model as it is; give one of them a letter";
            return Err(Error::Unsupported(message.into()));
        }
        if trained.iter().any(|group| part * (self.allocation[*group] as f64) < 1.0) {
            let message = format!(
                "`budget` is {}, less than one trained number for each of the {} layers; choose a larger one",
                self.budget,
                trained.len()
            );
            return Err(Error::Unsupported(message));
        }
        let plan = |layer: &'l Layer| {
            let group = self.group(layer.place, layer.of);
            let strategy = &self.strategies[group];
            let plan = match strategy == NOTHING {
                true => Plan::default(),
                false => Plan::of(strategy, layer, part * self.allocation[group] as f64),
            };
            (layer, plan)
        };
        Ok(layers.iter().map(plan).collect())
    }

    /// The group of layer `place` of `of`.
    fn group(&self, place: usize, of: usize) -> usize {
        let total: usize = self.grouping.iter().sum();
        let end = |g: usize| {
            let sum: usize = self.grouping[..=g].iter().sum();
            (2 * of * sum + total) / (2 * total)
        };
        (0..3).find(|&g| place < end(g)).unwrap_or(3)
    }
}

/// What there is to change in a layer.
struct Layer {
    /// Its number, decoders counted on from encoders, and its place among the `of` layers of its stack.
    number: usize,
    place: usize,
    of: usize,
    /// Queries and values, and the sum of their rows and columns.
    weights: Vec<SiteId>,
    rank_size: usize,
    /// Width of the stream at its MLP, if it has one, and of keys and values together.
    width: usize,
    row_size: usize,
    biases: Vec<SiteId>,
    bias_size: usize,
}

fn layers(sites: &Sites) -> Vec<Layer> {
    let mut found: Vec<Layer> = Vec::new();
    for site in sites.iter() {
        let Some((number, place)) = sites.number(site).zip(site.layer) else { continue };
        let at = match found.iter().position(|l| l.number == number) {
            Some(at) => at,
            None => {
                let of = sites.iter().filter(|s| s.stack == site.stack).filter_map(|s| s.layer).max();
                found.push(Layer { number, place, of: of.map_or(1, |last| last + 1), ..Layer::empty() });
                found.len() - 1
            }
        };
        found[at].take(site);
    }
    found.sort_by_key(|l| l.number);
    found
}

impl Layer {
    fn empty() -> Layer {
        let (number, place, of) = (0, 0, 1);
        let (weights, biases) = (vec![], vec![]);
        Layer { number, place, of, weights, rank_size: 0, width: 0, row_size: 0, biases, bias_size: 0 }
    }

    fn take(&mut self, site: &Site) {
        match site.kind {
            Kind::Linear { out, inn, .. } if matches!(site.role, Role::Q | Role::V | Role::Qkv) => {
                self.weights.push(site.id);
                self.rank_size += out + inn;
            }
            Kind::Sublayer { width } if site.role == Role::Mlp => self.width = width,
            Kind::KeyValue { heads, dim } if site.role == Role::Attention => self.row_size = 2 * heads * dim,
            Kind::Vector { len } if site.path.ends_with(".bias") => {
                self.biases.push(site.id);
                self.bias_size += len;
            }
            _ => {}
        }
    }
}

/// Sizes of a layer's parts; zero of what it does not have.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    bottleneck: usize,
    length: usize,
    rank: usize,
    biases: bool,
}

impl Plan {
    /// The parts of `strategy` that take `budget` numbers together.
    fn of(strategy: &str, layer: &Layer, budget: f64) -> Plan {
        let mut plan = Plan { biases: strategy.contains('B'), ..Plan::default() };
        let mut left = if plan.biases { budget - layer.bias_size as f64 } else { budget };
        // (numbers of one more, numbers at any size, letter)
        let mut kinds = vec![
            (2 * layer.width + 1, layer.width, 'A'),
            (layer.row_size, 0, 'P'),
            (layer.rank_size, 0, 'L'),
        ];
        kinds.retain(|(size, fixed, letter)| strategy.contains(*letter) && *size > 1 && size > fixed);
        kinds.sort_by_key(|kind| std::cmp::Reverse(kind.0));
        let count = kinds.len();
        for (i, (size, fixed, letter)) in kinds.into_iter().enumerate() {
            let share = left / (count - i) as f64;
            let chosen = ((share - fixed as f64) / size as f64).round().max(1.0) as usize;
            left -= (chosen * size + fixed) as f64;
            match letter {
                'A' => plan.bottleneck = chosen,
                'P' => plan.length = chosen,
                _ => plan.rank = chosen,
            }
        }
        plan
    }

    /// The numbers it trains.
    fn size(&self, layer: &Layer) -> usize {
        let adapter =
            if self.bottleneck > 0 { self.bottleneck * (2 * layer.width + 1) + layer.width } else { 0 };
        let biases = if self.biases { layer.bias_size } else { 0 };
        adapter + self.length * layer.row_size + self.rank * layer.rank_size + biases
    }
}

/// One `bottleneck` method whose width differs by layer.
fn adapters(b: &mut Builder<'_>, plans: &[(&Layer, Plan)]) -> Result<()> {
    let has = |plan: &Plan| plan.bottleneck > 0;
    if !plans.iter().any(|(_, plan)| has(plan)) {
        return Ok(());
    }
    let left: Vec<usize> = plans.iter().filter(|(_, plan)| !has(plan)).map(|(l, _)| l.number).collect();
    // Half a unit more, so that the quotient of the width and this is not rounded to one less.
    let reduction = |(l, plan): &(&Layer, Plan)| {
        (l.number.to_string(), json!(l.width as f64 / (plan.bottleneck as f64 + 0.5)))
    };
    let mut reductions: Map<String, Value> = plans.iter().filter(|(_, p)| has(p)).map(reduction).collect();
    reductions.insert("default".into(), json!(1.0));
    let file = json!({ "config": {
        "leave_out": left, "original_ln_before": true, "output_adapter": true, "reduction_factor": reductions,
    } });
    match (crate::additive::bottleneck::ENTRY.from_file)(&file)? {
        Some(loaded) => loaded.method.attach(b),
        None => Err(Error::Unsupported("S4's adapters are no bottleneck adapters".into())),
    }
}

/// One prefix for each length.
fn prefixes(b: &mut Builder<'_>, plans: &[(&Layer, Plan)]) -> Result<()> {
    let mut lengths: Vec<usize> = plans.iter().map(|(_, plan)| plan.length).filter(|&n| n > 0).collect();
    lengths.sort_unstable();
    lengths.dedup();
    for length in lengths {
        let others = plans.iter().filter(|(_, plan)| plan.length != length);
        let leave_out = others.map(|(layer, _)| layer.number).collect();
        let prefix = Prefix { leave_out, one_set: true, ..Prefix::new(length, 0, false) };
        prefix.attach(b, &format!("of_{length}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    fn of(grouping: [usize; 4]) -> S4 {
        S4 { budget: 0.005, grouping, strategies: FOUND.map(String::from).to_vec(), allocation: [1; 4] }
    }

    #[test]
    fn groups_cover_the_layers_in_order() {
        let sizes = |name: &str, layers: usize| {
            let s4 = of(GROUPINGS.iter().find(|g| g.0 == name).unwrap().1);
            let groups: Vec<usize> = (0..layers).map(|place| s4.group(place, layers)).collect();
            assert!(groups.is_sorted() && groups.iter().all(|g| *g < 4), "{name}, {layers}: {groups:?}");
            [0, 1, 2, 3].map(|g| groups.iter().filter(|own| **own == g).count())
        };
        assert_eq!(sizes("spindle", 12), [2, 4, 4, 2]);
        assert_eq!(sizes("spindle", 24), [4, 8, 8, 4]);
        assert_eq!(sizes("uniform", 12), [3, 3, 3, 3]);
        assert_eq!(sizes("increasing", 10), [1, 2, 3, 4]);
        assert_eq!(sizes("decreasing", 10), [4, 3, 2, 1]);
        assert_eq!(sizes("bottleneck", 12), [4, 2, 2, 4]);
        for (name, _) in GROUPINGS {
            (1..50).for_each(|layers| assert_eq!(sizes(name, layers).iter().sum::<usize>(), layers));
        }
    }

    #[test]
    fn every_layer_gets_the_same() {
        // T5-base: 222.9 million numbers in 24 layers, no biases; then with those of BERT-base.
        for (bias_size, each) in [(0, 46_438.0), (6912, 80_000.0)] {
            let layer = Layer { width: 768, row_size: 1536, rank_size: 3072, bias_size, ..Layer::empty() };
            for strategy in FOUND {
                let plan = Plan::of(strategy, &layer, each);
                let off = plan.size(&layer) as f64 / each - 1.0;
                assert!(off.abs() < 0.02, "{strategy}: {plan:?} is off by {off}");
                let has = [plan.bottleneck > 0, plan.length > 0, plan.rank > 0, plan.biases];
                let letters = ['A', 'P', 'L', 'B'].map(|letter| strategy.contains(letter));
                assert_eq!(has, letters, "{strategy}");
            }
        }
    }

    /// A T5 of 12 layers in each stack: what its layers train together, and each as much as its group's part.
    #[test]
    fn the_budget_is_dealt_out_by_groups() {
        let layer = |number: usize| Layer {
            number,
            place: number % 12,
            of: 12,
            width: 768,
            row_size: 1536,
            rank_size: 3072,
            ..Layer::empty()
        };
        let layers: Vec<Layer> = (0..24).map(layer).collect();
        let budget = 2_000_000.0;
        for (name, parts) in ALLOCATIONS {
            for left_out in [None, Some(0), Some(2)] {
                let mut s4 = S4 { allocation: *parts, ..of([1, 2, 2, 1]) };
                left_out.into_iter().for_each(|group: usize| s4.strategies[group] = NOTHING.into());
                let plans = s4.plans(&layers, budget).unwrap();
                let total: usize = plans.iter().map(|(l, plan)| plan.size(l)).sum();
                assert!((total as f64 / budget - 1.0).abs() < 0.02, "{name}, {left_out:?}: {total}");
                let of_part: Vec<f64> = plans
                    .iter()
                    .map(|(l, plan)| plan.size(l) as f64 / parts[s4.group(l.place, l.of)] as f64)
                    .collect();
                let most = of_part.iter().cloned().fold(0.0, f64::max);
                for ((l, plan), own) in plans.iter().zip(&of_part) {
                    match left_out == Some(s4.group(l.place, l.of)) {
                        true => assert_eq!(*plan, Plan::default()),
                        false => assert!(own / most > 0.9, "{name}: {of_part:?}"),
                    }
                }
            }
        }
    }

    #[test]
    fn a_group_is_left_as_it_is() {
        let settings =
            json!({ "budget": 0.2, "grouping": "uniform", "strategies": ["-", "-", "APL", "APLB"] });
        let a = attached(&[chosen("s4", settings.clone())], &[]);
        let (sites, _) = toy();
        assert!(a.adapter.sites().iter().all(|id| sites.get(*id).layer == Some(1)));
        survives_saving(&[chosen("s4", with(settings, json!({ "allocation": "increasing" })))], &["head"]);
        // Of two layers, the first and the third group have one each.
        let settings = json!({ "budget": 0.2, "grouping": "uniform", "strategies": ["-", "A", "-", "-"] });
        let (sites, info) = toy();
        let error =
            crate::attach(&[chosen("s4", settings)], &[], &sites, &info, 1).err().unwrap().to_string();
        assert!(error.contains("`strategies` leave every group that has a layer"), "{error}");
    }

    #[test]
    fn layers_have_what_their_group_has() {
        let settings = json!({ "budget": 0.2, "strategies": ["AL", "AL", "PB", "PB"] });
        let a = attached(&[chosen("s4", settings)], &[]);
        // A fifth of 407 numbers, to a unit of each kind.
        let (count, budget) = (a.adapter.trained_count() as f64, 0.2 * 407.0);
        assert!((count - budget).abs() < 13.0, "{count} of {budget}");
        let small = [chosen("s4", json!({ "budget": 0.01 }))];
        let (sites, info) = toy();
        let error = crate::attach(&small, &[], &sites, &info, 1).err().unwrap().to_string();
        assert!(error.contains("the least that these strategies can train is"), "{error}");
        let has = |part: &str| names(&a).iter().any(|name| name.contains(part));
        assert!(has("layers.0.output_adapters.adapters.") && has("layers.0.attn.q.lora_A"));
        assert!(!has("layers.1.output_adapters.adapters.") && !has("layers.1.attn.q.lora_A"));
        assert!(has("layers.1.attn.q.bias") && !has("layers.0.attn.q.bias"));
        let (sites, _) = toy();
        assert!(a.adapter.at(site_id(&sites, "layers.0.attn")).is_empty());
        assert_eq!(a.adapter.at(site_id(&sites, "layers.1.attn")).len(), 1);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("s4", json!({ "budget": 0.2, "grouping": "uniform" }))], &["head"]);
        let good = config(&[chosen("s4", json!({ "budget": 0.2 }))], &[]);
        for bad in [
            json!({ "budget": 0.0 }),
            json!({ "strategies": ["A", "P", "L"] }),
            json!({ "strategies": ["A", "P", "L", "X"] }),
            json!({ "grouping": "spiral" }),
            json!({ "strategies": ["-", "-", "-", "-"] }),
            json!({ "allocation": "spiral" }),
        ] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
