//! KronA: a frozen weight plus the Kronecker product of two small trained matrices.
//!
//! W′ = W + s·A⊗B with A [a₁, a₂], B [out/a₁, in/a₂]: out/a₁·in/a₂ + a₁·a₂ numbers reach every rank. B starts as zero and A as
//! Kaiming-uniform noise, so W′ = W. The forward reads x as a matrix and never forms the product.
//!
//! Edalati et al. 2022, arXiv:2212.10650, equation 4.
//!
//! krona_A [a₁, a₂], krona_B [out/a₁, in/a₂].

use engraft_nn::{Base, Builder, Init, Pass, Patch, Result, Role, Site, WeightPatch};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::shared::fields::{float, int};
use crate::shared::{kronecker, places};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const SIZE_MAX: usize = 1 << 20;

struct Krona {
    /// a₁ and a₂; where absent, the largest divisor up to the root.
    rows: Option<usize>,
    columns: Option<usize>,
    scale: f64,
    dropout: f32,
}

static INFO: Info = Info {
    name: "krona",
    title: "KronA",
    class: "reparameterized",
    sites: "weight",
    paper: "arXiv:2212.10650",
    summary: "W′ = W + s·A⊗B",
    mergeable: true,
    identity_at_init: true,
    default_roles: Some(&[Role::Q, Role::V]),
    peft_type: "ENGRAFT_KRONA",
    fields: &[
        int(
            "a1",
            (1, SIZE_MAX as i64),
            None,
            "Rows of A, a divisor of the outputs; by default the largest one up to their root.",
        ),
        int(
            "a2",
            (1, SIZE_MAX as i64),
            None,
            "Columns of A, a divisor of the inputs; by default the largest one up to their root.",
        ),
        float("scale", (0.0, 1e9), "1", "Factor s on the product."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of the product while training."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn read(r: &mut Reader<'_>) -> Krona {
    let mut size = |key| r.value(key).is_some().then(|| r.count(key, 1, SIZE_MAX));
    let (rows, columns) = (size("a1"), size("a2"));
    Krona { rows, columns, scale: r.float("scale", 1.0), dropout: r.dropout("dropout") }
}

fn example() -> Box<dyn Method> {
    Box::new(Krona { rows: None, columns: Some(2), scale: 1.5, dropout: 0.0 })
}

/// The largest divisor of `n` up to its root.
pub(crate) fn middle(n: usize) -> usize {
    (1..=n).take_while(|d| d * d <= n).filter(|d| n.is_multiple_of(*d)).last().unwrap_or(1)
}

impl Method for Krona {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for site in b.targets() {
            let (out, inn) = places::linear(site, INFO.title)?;
            let (a1, a2) = (self.rows.unwrap_or(middle(out)), self.columns.unwrap_or(middle(inn)));
            if !out.is_multiple_of(a1) || !inn.is_multiple_of(a2) {
                let message = format!(
                    "[{out}, {inn}] is no product with [{a1}, {a2}]; choose `a1` and `a2` that divide both"
                );
                return places::unfit(site, message);
            }
            let left = b.param(&format!("{}.krona_A", site.path), &[a1, a2], Init::kaiming(a2))?;
            let right = b.param(&format!("{}.krona_B", site.path), &[out / a1, inn / a2], Init::Zeros)?;
            let patch = Product { left, right, scale: self.scale as f32, dropout: self.dropout };
            b.patch(site.id, Patch::Weight(Box::new(patch)))?;
        }
        Ok(())
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        let own = json!({
            "a1": self.rows, "a2": self.columns, "dropout": as_written(self.dropout), "layers_pattern": null,
            "layers_to_transform": null, "scale": number(self.scale),
        });
        own.as_object().cloned().unwrap_or_default()
    }
}

/// s·A⊗B.
struct Product {
    left: Param,
    right: Param,
    scale: f32,
    dropout: f32,
}

impl WeightPatch for Product {
    fn weight(&self, base: &dyn Base) -> Result<Tensor> {
        let product = kronecker::kron(&self.left.get(), &self.right.get())?;
        Ok(base.dense()?.add(&product.scale(self.scale)?)?)
    }

    fn forward(&self, x: &Tensor, base: &dyn Base, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.dropout, site.id, 0)?;
        let left = self.left.get().scale(self.scale)?;
        Ok(base.forward(x)?.plus(&kronecker::multiply(&dropped, &left, &self.right.get())?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::{close, sample};

    #[test]
    fn is_a_scaled_kronecker_product() {
        for (settings, count) in [(json!({ "scale": 2.0 }), 4 + 9), (json!({ "a1": 3, "a2": 1 }), 3 + 2 * 6)]
        {
            let targets = Some(engraft_nn::Targets::names(["attn.q"]));
            let a = attached(&[(chosen("krona", settings.clone()).0, targets)], &[]);
            assert_eq!(a.adapter.trained_count(), 2 * count);
            let q = "layers.0.attn.q";
            let x = sample(&[5, 6], 3);
            close(&both_ways(&a, q, &x).0, &x.matmul_t(&frozen(q)).unwrap(), 1e-6);
            stir(&a, 0.5);
            let (fast, defined) = both_ways(&a, q, &x);
            close(&fast, &defined, 1e-5);
            let (left, right) =
                (value_of(&a, &format!("{q}.krona_A")), value_of(&a, &format!("{q}.krona_B")));
            let scale = settings.get("scale").and_then(Value::as_f64).unwrap_or(1.0) as f32;
            let product = kronecker::kron(&left, &right).unwrap().scale(scale).unwrap();
            close(&merged(&a, q), &frozen(q).add(&product).unwrap(), 1e-6);
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("krona", json!({ "a1": 2, "dropout": 0.1 }))], &["head"]);
        let written = config(&[chosen("krona", json!({}))], &[]);
        assert!(from_file(&with(written, json!({ "a1": 0 }))).is_err());
        let (sites, info) = toy();
        assert!(crate::attach(&[chosen("krona", json!({ "a1": 4 }))], &[], &sites, &info, 0).is_err());
    }
}
