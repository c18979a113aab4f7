//! Changes as low-rank products.

use engraft_method::algebra::cut;
use engraft_method::{Chosen, attach, find};
use engraft_nn::{Adapter, Targets};
use engraft_tensor::Tensor;
use serde_json::json;

use super::{Extracted, squared};
use crate::engine::Engine;
use crate::failure::{BeforeWork, Failure, Outcome};

/// Path of a weight and the factors of its change.
type Product = (String, (Tensor, Tensor));

/// A LoRA whose products are the changes, cut to `rank`; the modules of `head` are trained as a whole.
pub fn extract(
    engine: &Engine,
    changes: &[(String, bool, Tensor)],
    head: &[String],
    rank: u32,
) -> Outcome<Extracted> {
    let (mut products, mut lost) = (Vec::new(), 0.0);
    for (path, is_table, change) in changes {
        // A table's product is the transpose of its change.
        let change = if *is_table { change.t()? } else { change.clone() };
        let (a, b) = cut(&change, rank as usize)?;
        lost += squared(&b.matmul(&a)?.sub(&change)?)?;
        products.push((path.clone(), (a, b)));
    }
    let asked = rank;
    let largest = products.iter().map(|(_, (a, _))| a.dim(0)).max().unwrap_or(0);
    let rank = u32::try_from(largest).unwrap_or(asked);
    let methods = vec![method(&products, rank)?];
    let (sites, info) = (engine.model.sites(), engine.model.info());
    let adapter = attach(&methods, head, sites, info, 0).before_work()?.adapter;
    fill(&adapter, &products)?;
    let form = match rank < asked {
        true => format!("rank {rank}, all that the weights have of {asked},"),
        false => format!("rank {rank}"),
    };
    Ok(Extracted { adapter, methods, lost, form, rank: Some(largest), left_out: vec![] })
}

/// LoRA of scale 1 at the weights that differ, each with the rank that its product has.
fn method(products: &[Product], rank: u32) -> Outcome<Chosen> {
    let Some(entry) = find("lora") else { return Err(Failure::running("there is no method lora")) };
    let ranks = products.iter().filter(|(_, (a, _))| a.dim(0) != rank as usize);
    let ranks: serde_json::Map<String, serde_json::Value> =
        ranks.map(|(path, (a, _))| (path.clone(), json!(a.dim(0)))).collect();
    let settings = json!({ "rank": rank, "alpha": rank, "rank_pattern": ranks, "alpha_pattern": ranks });
    let settings = settings.as_object().cloned().unwrap_or_default();
    let method = (entry.from_settings)(&settings).before_work()?;
    Ok((method, Some(Targets::names(products.iter().map(|(path, _)| path.clone())))))
}

fn fill(adapter: &Adapter, products: &[Product]) -> Outcome {
    for (path, (a, b)) in products {
        let of = |ends: [&str; 2]| {
            let named = |end: &str| format!("{path}.{end}");
            adapter.params().iter().find(|p| ends.iter().any(|end| p.name == named(end)))
        };
        for (param, value) in
            [(of(["lora_A.weight", "lora_embedding_A"]), a), (of(["lora_B.weight", "lora_embedding_B"]), b)]
        {
            let Some(param) = param else {
                return Err(Failure::running(format!("{path}: a low-rank product cannot be attached here")));
            };
            let shape = param.param.value().shape().to_vec();
            param.param.set(value.reshape(shape)?)?;
        }
    }
    Ok(())
}
