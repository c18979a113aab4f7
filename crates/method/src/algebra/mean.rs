//! Means of adapters that are configured alike: of equal tensors (AdapterSoup), and of bottlenecks whose units are brought to
//! meet first (MerA).

use std::collections::BTreeMap;

use engraft_nn::{Error, Result};
use engraft_tensor::{DType, Tensor};
use serde_json::Value;

use super::alike::start_off_base;
use super::assignment::assign;
use super::config::{hub_name, same_configuration, scales_config};
use super::factors::modules;
use super::{Combined, Term, methods_of, norm};
use crate::Named;

/// Tensors of one name with the weights of the adapters that have them.
type Weighted = BTreeMap<String, Vec<(f64, Tensor)>>;

/// The weighted mean of tensors of one name each.
pub(super) fn means(tensors: &Weighted) -> Result<Named> {
    tensors.iter().map(|(name, terms)| mean(name, terms)).collect()
}

fn mean(name: &str, terms: &[(f64, Tensor)]) -> Result<(String, Tensor)> {
    let total: f64 = terms.iter().map(|(w, _)| w).sum();
    let share = |w: f64| w / total;
    if terms.iter().any(|(_, t)| t.dtype() != DType::F32) {
        return same(name, terms);
    }
    // Copies of a table below adapters are the base's own.
    if terms.len() > 1 && equal(terms)? {
        return Ok((name.to_owned(), terms[0].1.clone()));
    }
    if total == 0.0 || terms.len() > 1 && terms.iter().any(|(w, _)| *w < 0.0) {
        return Err(Error::Unsupported(format!(
            "{name} is trained as a whole and can only be averaged, which a negative weight or a sum of zero does not allow; \
             give positive weights, or combine adapters without it"
        )));
    }
    let (weight, first) = &terms[0];
    let mut sum = first.scale(share(*weight) as f32)?;
    for (weight, tensor) in &terms[1..] {
        if sum.shape() != tensor.shape() {
            let (a, b) = (sum.shape(), tensor.shape());
            return Err(Error::Mismatch(vec![format!("{name}: {a:?} and {b:?} cannot be averaged")]));
        }
        sum = sum.add(&tensor.scale(share(*weight) as f32)?)?;
    }
    Ok((name.to_owned(), sum))
}

fn equal(terms: &[(f64, Tensor)]) -> Result<bool> {
    let (_, first) = &terms[0];
    for (_, other) in &terms[1..] {
        if other.shape() != first.shape() || other.to_bytes()? != first.to_bytes()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whole numbers (places of a mask) have no mean: they must be the same in all.
fn same(name: &str, terms: &[(f64, Tensor)]) -> Result<(String, Tensor)> {
    let (_, first) = &terms[0];
    for (_, other) in &terms[1..] {
        if (other.shape(), other.dtype()) != (first.shape(), first.dtype())
            || other.to_bytes()? != first.to_bytes()?
        {
            return Err(Error::Mismatch(vec![format!(
                "{name}: the adapters hold other places, and places have no mean"
            )]));
        }
    }
    Ok((name.to_owned(), first.clone()))
}

/// The tensors of adapters configured alike, by the names of the first.
fn by_name(terms: &[Term]) -> Result<Weighted> {
    same_configuration(terms)?;
    if terms.iter().map(|term| term.weight).sum::<f64>() == 0.0 {
        return Err(Error::Unsupported("the weights of a mean add up to zero; choose others".into()));
    }
    let own = terms.first().and_then(|first| hub_name(&first.config));
    let mut by_name = Weighted::new();
    for term in terms {
        for (name, tensor) in &term.tensors {
            // AdapterHub's names have the adapter's own in them.
            let name = match (own, hub_name(&term.config)) {
                (Some(own), Some(other)) => {
                    name.replace(&format!(".adapters.{other}."), &format!(".adapters.{own}."))
                }
                _ => name.clone(),
            };
            by_name.entry(name).or_default().push((term.weight, tensor.clone()));
        }
    }
    if let Some((name, found)) = by_name.iter().find(|(_, found)| found.len() != terms.len()) {
        let message =
            format!("{name}: in {} of {} adapters; all must hold the same tensors", found.len(), terms.len());
        return Err(Error::Mismatch(vec![message]));
    }
    Ok(by_name)
}

/// The mean of every tensor of adapters that are configured alike.
pub(super) fn average(terms: &[Term]) -> Result<Combined> {
    let tensors = means(&by_name(terms)?)?;
    let config = terms[0].config.clone();
    let methods = methods_of(&config)?;
    let mut combined = Combined { config, tensors, methods, error: None, worst: None, notes: Vec::new() };
    if crate::peft::is_type(&combined.config, "LORA") {
        combined.error = distance(terms, &combined)?;
    }
    Ok(combined)
}

/// Σ w·l of (IA)³'s scales, at each module of those that have one there, as in `peft`. What is trained as a whole is averaged.
pub(super) fn scales(terms: &[Term]) -> Result<Combined> {
    let config = scales_config(terms)?;
    let (mut sums, mut others) = (Weighted::new(), Weighted::new());
    for term in terms {
        for (name, tensor) in &term.tensors {
            let to = if name.ends_with(".ia3_l") { &mut sums } else { &mut others };
            to.entry(name.clone()).or_default().push((term.weight, tensor.clone()));
        }
    }
    let mut tensors = Named::new();
    for (name, terms) in sums {
        let (weight, first) = &terms[0];
        let mut sum = first.scale(*weight as f32)?;
        for (weight, tensor) in &terms[1..] {
            if sum.shape() != tensor.shape() {
                let (a, b) = (sum.shape(), tensor.shape());
                let message = format!(
                    "{name}: {a:?} and {b:?} cannot be added: `feedforward_modules` differ at this module"
                );
                return Err(Error::Mismatch(vec![message]));
            }
            sum = sum.add(&tensor.scale(*weight as f32)?)?;
        }
        tensors.push((name, sum));
    }
    let notes = match others.len() {
        0 => vec![],
        count => vec![format!(
            "{count} tensors that are trained as a whole are averaged by weight: they do not add"
        )],
    };
    tensors.extend(means(&others)?);
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Combined { methods: methods_of(&config)?, config, tensors, error: None, worst: None, notes })
}

/// How far the product of mean factors is from the mean of the products; `None` where the factors are not plain.
fn distance(terms: &[Term], combined: &Combined) -> Result<Option<f64>> {
    let total: f64 = terms.iter().map(|t| t.weight).sum();
    // Equal starts below the products leave them no changes of the base to compare.
    if terms.iter().any(|term| start_off_base(&term.config).is_some()) {
        return Ok(None);
    }
    let Ok(found) = modules(terms) else { return Ok(None) };
    let mean = Term {
        name: "mean".into(),
        config: combined.config.clone(),
        tensors: combined.tensors.clone(),
        weight: 1.0,
    };
    let mean = modules(std::slice::from_ref(&mean))?;
    let (mut off, mut whole) = (0.0, 0.0);
    for (module, result) in found.modules.iter().zip(&mean.modules) {
        let exact = module.sum(terms)?.scale((1.0 / total) as f32)?;
        let Some(Some(result)) = result.factors.first() else { continue };
        off += norm(&result.change()?.sub(&exact)?)?.powi(2);
        whole += norm(&exact)?.powi(2);
    }
    Ok((whole > 0.0).then(|| (off / whole).sqrt()))
}

/// What ends the names of a bottleneck's tensors.
const UP: &str = ".adapter_up.weight";

/// MerA: in every bottleneck the units of the other adapters are reordered so that they meet those of the first, by the
/// assignment of least ‖row of W_d − row of W_d‖², which is optimal transport with equal masses; then the mean.
pub(super) fn mera(terms: &[Term]) -> Result<Combined> {
    let mut tensors = by_name(terms)?;
    if terms.iter().any(|term| !is_bottleneck(&term.config)) {
        return Err(Error::Unsupported(
            "MerA brings the units of bottleneck adapters together, and these are others; the rule average takes any method"
                .into(),
        ));
    }
    let (mut moved, mut units, mut before, mut after) = (0, 0, 0.0, 0.0);
    for stem in tensors.keys().filter_map(|name| name.strip_suffix(UP)).map(str::to_owned).collect::<Vec<_>>()
    {
        // A norm of its own before the bottleneck is counted among the same layers.
        let is_matrix = |all: &[(f64, Tensor)]| all.iter().all(|(_, tensor)| tensor.shape().len() == 2);
        let mut down = tensors.iter().filter(|(name, all)| is_down(name, &stem) && is_matrix(all));
        let Some(down) = down.next().map(|(name, _)| name.clone()) else {
            return Err(Error::Mismatch(vec![format!("{stem}: W_u is there, W_d is not")]));
        };
        let bias = down.replace(".weight", ".bias");
        for number in 1..terms.len() {
            let of = |name: &str| Some(tensors.get(name)?.get(number)?.1.clone());
            let (Some(anchor), Some(own), Some(up)) =
                (tensors.get(&down).and_then(|all| all.first()), of(&down), of(&format!("{stem}{UP}")))
            else {
                continue;
            };
            let cost = cost(&anchor.1, &own, &down)?;
            let order = assign(&cost);
            moved += order.iter().enumerate().filter(|(at, from)| at != *from).count();
            units += order.len();
            before += (0..order.len()).map(|unit| cost[unit][unit]).sum::<f64>();
            after += order.iter().enumerate().map(|(unit, &from)| cost[unit][from]).sum::<f64>();
            let places = order.iter().map(|&from| from as i64).collect();
            let places = Tensor::from_i64(places, [order.len()])?;
            let bias_own =
                of(&bias).map(|bias| bias.reshape([order.len(), 1])?.gather(&places)?.reshape([order.len()]));
            let mut set = |name: &str, tensor: Tensor| {
                if let Some(slot) = tensors.get_mut(name).and_then(|all| all.get_mut(number)) {
                    slot.1 = tensor;
                }
            };
            set(&down, own.gather(&places)?);
            set(&format!("{stem}{UP}"), up.t()?.gather(&places)?.t()?);
            if let Some(bias_own) = bias_own {
                set(&bias, bias_own?);
            }
        }
    }
    let config = terms[0].config.clone();
    let share = if before > 0.0 { (after / before).sqrt() } else { 1.0 };
    let notes = vec![format!(
        "{moved} of {units} units were moved to meet those of {}; the distance of W_d is {:.0}% of what it was",
        terms[0].name,
        100.0 * share
    )];
    let (tensors, methods) = (means(&tensors)?, methods_of(&config)?);
    Ok(Combined { config, tensors, methods, error: None, worst: None, notes })
}

fn is_bottleneck(config: &Value) -> bool {
    let inner = config.get("config");
    let of = |key: &str| inner.and_then(|inner| inner.get(key));
    // A Compacter's two layers are sums of Kronecker products, which have no rows of units.
    of("reduction_factor").is_some() && of("phm_layer").and_then(Value::as_bool) != Some(true)
}

/// A layer of a bottleneck up to its activation.
fn is_down(name: &str, stem: &str) -> bool {
    let end = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix(".adapter_down."));
    let number = end.and_then(|end| end.strip_suffix(".weight"));
    number.is_some_and(|number| number.chars().all(|c| c.is_ascii_digit()))
}

/// ‖row of `a` − row of `b`‖² for each two rows.
fn cost(a: &Tensor, b: &Tensor, name: &str) -> Result<Vec<Vec<f64>>> {
    if a.shape() != b.shape() {
        let (a, b) = (a.shape(), b.shape());
        return Err(Error::Mismatch(vec![format!("{name}: {a:?} and {b:?} cannot be averaged")]));
    }
    let width = a.dim(1);
    let (a, b) = (a.to_vec()?, b.to_vec()?);
    let distance = |p: &[f32], q: &[f32]| p.iter().zip(q).map(|(p, q)| f64::from(p - q).powi(2)).sum::<f64>();
    Ok(a.chunks(width).map(|p| b.chunks(width).map(|q| distance(p, q)).collect()).collect())
}
