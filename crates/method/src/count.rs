//! How many numbers a method trains at a linear layer, as a formula in its sizes and the method's settings.
//!
//! The formula is found by attaching the method to layers of several sizes, with its usual settings and with each of them doubled
//! (or halved), and holds for all that were tried; what is no sum of products of sizes and settings (shares, roundings) has none.

use std::ops::Range;
use std::sync::Arc;

use engraft_nn::weight::Storage;
use engraft_nn::{Linear, ModelInfo, Role, Sites, Targets, Task, Weight};
use engraft_tensor::Tensor;
use engraft_tensor::frozen::{Precision, RowSource};
use serde_json::{Map, json};

use crate::{Entry, FieldKind, Settings, attach};

/// Factors of 1, out, in and out·in.
type Factors = [i64; 4];

/// The sizes that factors are found from, and those that they must hold for too.
const FOUND_FROM: [(usize, usize); 4] = [(64, 64), (128, 64), (64, 128), (128, 128)];
const HELD_BY: [(usize, usize); 3] = [(192, 64), (64, 192), (192, 128)];

impl Entry {
    /// Numbers trained at a linear layer [out, in] with the usual settings, such as "rank·(out + in)", and what is trained for all
    /// layers together; `None` where the method has no targets or no such formula.
    pub fn trained_formula(&self) -> Option<(String, Option<String>)> {
        self.usual_targets()?;
        let usual = Settings::new();
        let [own, shared] = self.factors(&usual)?;
        let roles = self.roles();
        let at = |roles: &[Role]| self.count(roles, HELD_BY[2], &usual);
        let alike =
            |role: &Role| at(&[*role]) == at(&roles[..1]) && at(&[*role, roles[0]]) == at(&[roles[0]; 2]);
        // What layers of a kind share is shared by all, or there is no formula for one of them.
        if !roles.iter().all(alike) {
            return None;
        }
        let mut powers: Vec<Power<'_>> = Vec::new();
        for field in self.info.fields {
            let FieldKind::Int { .. } = field.kind else { continue };
            let Some(value) = field.default.and_then(|text| text.parse::<i64>().ok()) else { continue };
            if value < 1 {
                continue;
            }
            let scaled = |to: i64| self.factors(&Map::from_iter([(field.name.to_owned(), json!(to))]));
            // What can be neither doubled nor halved alone needs other settings to have a part.
            let halved = || scaled(value / 2).filter(|_| value % 2 == 0).map(|found| (found, value / 2));
            let Some((found, to)) = scaled(2 * value).map(|found| (found, 2 * value)).or_else(halved) else {
                continue;
            };
            let power = |usual, found| if to > value { power(usual, found) } else { power(found, usual) };
            let of = [power(own, found[0])?, power(shared, found[1])?];
            if of.iter().flatten().any(|power| *power > 0) {
                powers.push(Power { name: field.name, value, to, of });
            }
        }
        // What depends on several settings must be a product of them.
        let all: Settings = powers.iter().map(|p| (p.name.to_owned(), json!(p.to))).collect();
        let together = self.factors(&all)?;
        let text = |which: usize, factors: Factors, scaled: Factors| {
            let terms = (0..4).map(|at| {
                let own: Vec<(&str, i64, u32)> =
                    powers.iter().map(|p| (p.name, p.value, p.of[which][at])).collect();
                let sum = |up: bool| {
                    powers.iter().filter(|p| (p.to > p.value) == up).map(|p| p.of[which][at]).sum::<u32>()
                };
                (scaled[at] << sum(false) == factors[at] << sum(true)).then(|| term(factors[at], &own))?
            });
            written(&terms.collect::<Option<Vec<_>>>()?)
        };
        let own = text(0, own, together[0])?;
        let shared = if shared == [0; 4] { None } else { Some(text(1, shared, together[1])?) };
        Some((own, shared))
    }

    /// The factors of a layer's own numbers, and of those that all layers share.
    fn factors(&self, settings: &Settings) -> Option<[Factors; 2]> {
        let role = self.roles()[0];
        let counted = |sizes| {
            let (one, two) =
                (self.count(&[role], sizes, settings)?, self.count(&[role; 2], sizes, settings)?);
            Some([two - one, 2 * one - two])
        };
        let counts = FOUND_FROM.map(counted);
        let mut found = [[0; 4]; 2];
        for (which, found) in found.iter_mut().enumerate() {
            let of = |at: usize| Some(counts[at]?[which]);
            let (a, b, c, d) = (of(0)?, of(1)?, of(2)?, of(3)?);
            let both = (d - b - c + a) / (64 * 64);
            let (out, inn) = ((b - a) / 64 - 64 * both, (c - a) / 64 - 64 * both);
            *found = [a - 64 * (out + inn) - 64 * 64 * both, out, inn, both];
        }
        let holds = |&(out, inn): &(usize, usize)| {
            let at = |f: Factors| f[0] + f[1] * out as i64 + f[2] * inn as i64 + f[3] * (out * inn) as i64;
            counted((out, inn)).is_some_and(|counted| counted == found.map(at))
        };
        FOUND_FROM.iter().chain(&HELD_BY).all(holds).then_some(found)
    }

    /// What the targets do; some roles where they are all linear layers.
    fn roles(&self) -> &'static [Role] {
        self.info.default_roles.filter(|roles| !roles.is_empty()).unwrap_or(&[Role::Q, Role::Down])
    }

    /// Numbers trained at linear layers [out, in] of these roles, each in a block of its own.
    fn count(&self, roles: &[Role], (out, inn): (usize, usize), settings: &Settings) -> Option<i64> {
        let mut sites = Sites::default();
        let layers = roles.len();
        let names: Vec<String> =
            roles.iter().enumerate().map(|(layer, role)| format!("layers.{layer}.{}", role.name())).collect();
        for (layer, (name, &role)) in names.iter().zip(roles).enumerate() {
            let weight = Weight::matrix(&Slanted(out, inn), Storage::Dense, Precision::F32).ok()?;
            let bias = Some(Tensor::zeros([out]));
            Linear::declare(&mut sites, (name, name), role, Some(layer), Arc::new(weight), bias);
        }
        let info = ModelInfo {
            architecture: String::new(),
            class: None,
            task: Task::CausalLm,
            width: inn,
            layers,
            heads: 2,
            kv_heads: 2,
            head_dim: inn / 2,
            vocabulary: 1,
            outputs: 1,
            max_positions: 1,
            picture: None,
            any_size: None,
        };
        let methods = [(
            (self.from_settings)(settings).ok()?,
            Some(Targets::names(roles.iter().map(|role| role.name()))),
        )];
        let attached = attach(&methods, &[], &Arc::new(sites), &info, 0).ok()?;
        i64::try_from(attached.adapter.trained_count()).ok()
    }
}

/// A setting that factors depend on.
struct Power<'a> {
    name: &'a str,
    value: i64,
    /// What it was set to: double, or half where there is no double.
    to: i64,
    /// Its powers in the factors of a layer's own numbers, and of those that all share.
    of: [[u32; 4]; 2],
}

/// How often each factor doubles where a setting is doubled.
fn power(usual: Factors, doubled: Factors) -> Option<[u32; 4]> {
    let mut powers = [0; 4];
    for (power, (usual, doubled)) in powers.iter_mut().zip(usual.into_iter().zip(doubled)) {
        *power = (0..3).find(|power| usual << power == doubled)?;
    }
    Some(powers)
}

/// A factor as a product of settings, empty for zero; `None` where what is left is no whole number.
fn term(factor: i64, powers: &[(&str, i64, u32)]) -> Option<String> {
    if factor == 0 {
        return Some(String::new());
    }
    let of_settings: i64 = powers.iter().map(|(_, value, power)| value.pow(*power)).product();
    if factor < 0 || factor % of_settings != 0 {
        return None;
    }
    let mut parts: Vec<String> = Vec::new();
    parts.extend((factor != of_settings).then(|| (factor / of_settings).to_string()));
    parts.extend(powers.iter().filter(|(.., power)| *power > 0).map(|(name, _, power)| match power {
        1 => (*name).to_owned(),
        power => format!("{name}^{power}"),
    }));
    Some(if parts.is_empty() { "1".into() } else { parts.join("·") })
}

/// The sum of factors of 1, out, in and out·in.
fn written(terms: &[String]) -> Option<String> {
    let [alone, out, inn, both] = terms else { return None };
    let times = |factor: &str, size: &str| match factor {
        "1" => size.to_owned(),
        factor => format!("{factor}·{size}"),
    };
    let mut sum: Vec<String> = Vec::new();
    sum.extend((!both.is_empty()).then(|| times(both, "out·in")));
    if out == inn && !out.is_empty() {
        sum.push(if out == "1" { "out + in".into() } else { format!("{out}·(out + in)") });
    } else {
        sum.extend((!out.is_empty()).then(|| times(out, "out")));
        sum.extend((!inn.is_empty()).then(|| times(inn, "in")));
    }
    sum.extend((!alone.is_empty()).then(|| alone.clone()));
    Some(if sum.is_empty() { "0".into() } else { sum.join(" + ") })
}

/// A matrix of full rank that costs nothing to make.
struct Slanted(usize, usize);

impl RowSource for Slanted {
    fn shape(&self) -> (usize, usize) {
        (self.0, self.1)
    }

    fn rows(&self, rows: Range<usize>, dense: &mut [f32]) {
        for (row, values) in rows.zip(dense.chunks_mut(self.1)) {
            for (column, value) in values.iter_mut().enumerate() {
                *value = if row == column { 2.0 } else { ((row * 7 + column * 13) % 17) as f32 / 17.0 - 0.5 };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{METHODS, find};

    #[test]
    fn formulas_are_those_of_the_papers() {
        let of = |name: &str| find(name).unwrap().trained_formula();
        for (name, own, shared) in [
            ("lora", "rank·(out + in)", None),
            ("dylora", "rank·(out + in)", None),
            ("sora", "rank·(out + in) + rank", None),
            ("loha", "2·rank·(out + in)", None),
            ("vera", "out + rank", None),
            ("fourierft", "n_frequency", None),
            ("hra", "rank·in", None),
            ("hira", "rank·(out + in)", None),
            ("miss", "rank·out", None),
        ] {
            let shared = shared.map(|text: &str| text.to_owned());
            assert_eq!(of(name), Some((own.to_owned(), shared)), "{name}");
        }
        // A prompt has no targets, and a share of a weight is rounded.
        assert_eq!((of("prompt"), of("fish")), (None, None));
        // Keys and values are scaled behind a layer, the MLP before one; a router looks at a head; layers of a kind share experts.
        assert_eq!([of("ia3"), of("mov"), of("lily")], [None, None, None]);
        let known = METHODS.iter().filter(|entry| entry.trained_formula().is_some()).count();
        assert!(known > 30, "{known}");
    }
}
