//! Compacter: bottleneck adapters whose matrices are sums of Kronecker products.
//!
//! A(x) = σ(x·H_d + b_d)·H_u + b_u with H = Σᵢ Rᵢ⊗(Lᵢ·Qᵢ), i = 1…n; all layers share Rᵢ [n, n]. Compacter sits after attention and MLP,
//! Compacter++ after the MLP alone. R starts normal with deviation 10⁻⁴, L and Q Glorot-uniform, biases as zero, so that a
//! new adapter changes next to nothing.
//!
//! Karimi Mahabadi et al. 2021, arXiv:2106.04647, equations 4 to 6; places, residuals and the file form are those of
//! AdapterHub's `adapters` 1.3 (`CompacterConfig`, `CompacterPlusPlusConfig`).
//!
//! shared_parameters.NAME.phm_rule (R) [n, n, n]; of each adapter's adapter_down.0 and adapter_up: W_left (L) [n, in/n, rank],
//! W_right (Q) [n, rank, out/n], b `[out]`.

use engraft_nn::Result;
use serde_json::{Map, Value};

use super::bottleneck::{Bottleneck, DROP, Form, LEAVE_OUT, Phm, ROBUST_DROP, read_file};
use crate::read::Reader;
use crate::shared::activations::{ACTIVATIONS, Activation, NAMES};
use crate::shared::fields::{choice, flag, float, int};
use crate::{Entry, Info, Loaded, Method};

const COUNT_MAX: usize = 1 << 10;

pub(super) static INFO: Info = Info {
    name: "compacter",
    title: "Compacter",
    class: "additive",
    sites: "sublayer",
    paper: "arXiv:2106.04647",
    summary: "bottleneck adapters of sums of Kronecker products, whose small left factors all layers share",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_COMPACTER",
    fields: &[
        choice(
            "form",
            &["compacter", "compacter++"],
            "\"compacter\"",
            "After attention and MLP, or after the MLP alone.",
        ),
        float("reduction", (0.01, 1e6), "32", "Width of the model over width of the bottleneck."),
        int("n", (1, COUNT_MAX as i64), Some("4"), "Number n of products, a divisor of both widths."),
        int("rank", (1, COUNT_MAX as i64), Some("1"), "Rank of the right factors."),
        choice("activation", NAMES, "\"gelu\"", "Function in the middle."),
        flag("share_factors", "false", "Let all layers share the right factors too."),
        float("dropout", (0.0, 0.999), "0", "Dropout on what is added, while training."),
        LEAVE_OUT,
        DROP,
        ROBUST_DROP,
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    let mut r = Reader::settings(settings, INFO.fields);
    let after_attention = r.one_of("form", &[("compacter", true), ("compacter++", false)]);
    let phm = Phm {
        dim: r.count("n", 4, COUNT_MAX),
        rank: r.count("rank", 1, COUNT_MAX),
        shared_factors: r.flag("share_factors", false),
        ..Phm::default()
    };
    let mut method = of(after_attention, phm);
    method.reduction = r.reduction("reduction", 32.0);
    method.activation = r.one_of("activation", ACTIVATIONS);
    method.dropout = r.dropout("dropout");
    method.read_drop(&mut r);
    r.finish()?;
    Ok(Box::new(method))
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    read_file(config, &INFO, true)
}

fn example() -> Box<dyn Method> {
    let phm = Phm { dim: 2, rank: 2, ..Phm::default() };
    Box::new(Bottleneck { reduction: 3.0, ..of(true, phm) })
}

fn of(after_attention: bool, phm: Phm) -> Bottleneck {
    let form = if after_attention { Form::Houlsby } else { Form::Pfeiffer };
    Bottleneck { activation: Activation::GELU, phm: Some(phm), ..Bottleneck::of(form) }
}

#[cfg(test)]
mod tests {
    use crate::testing::*;
    use serde_json::json;

    #[test]
    fn counts_and_files() {
        let settings = json!({ "reduction": 3, "n": 2 });
        let a = attached(&[chosen("compacter", settings.clone())], &[]);
        // n³ once; per adapter (r/n + w/n)·n·rank twice, r and w: two layers of two adapters of width 6 and r 2.
        assert_eq!(a.adapter.trained_count(), 8 + 4 * (2 * 2 * (3 + 1) + 6 + 2));
        survives_saving(&[chosen("compacter", settings)], &["head"]);
        let shared =
            json!({ "form": "compacter++", "reduction": 3, "n": 2, "rank": 2, "share_factors": true });
        let a = attached(&[chosen("compacter", shared.clone())], &[]);
        assert_eq!(a.adapter.trained_count(), 8 + 2 * 2 * 2 * (3 + 1) + 2 * (6 + 2));
        survives_saving(&[chosen("compacter", shared)], &[]);
        let (sites, info) = toy();
        let uneven = [chosen("compacter", json!({ "reduction": 3, "n": 4 }))];
        let error = crate::attach(&uneven, &[], &sites, &info, 0).err().unwrap().to_string();
        assert!(error.contains("choose a `reduction`"), "{error}");
    }
}
