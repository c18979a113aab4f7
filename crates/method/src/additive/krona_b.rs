//! KronA^B and KronA^B_res: a Kronecker product beside the MLP.
//!
//! y = u + MLP(x) + s·(A⊗B)·x, x what the MLP reads; with `residual` also + s_res·x, s_res a trained number. A [a₁, a₂] starts
//! Kaiming-uniform, B [width/a₁, width/a₂] and s_res as zero, so that a new adapter changes nothing. The product is linear, and
//! never formed: x is read as a matrix.
//!
//! Edalati et al. 2022, arXiv:2212.10650, section 3.3 (equations 5 and 6); KronA itself, on weights, is `krona`.
//!
//! Of each MLP's site: krona_A [a₁, a₂], krona_B [width/a₁, width/a₂]; krona_scale (s_res) `[1]`.

use engraft_nn::{
    Builder, Error, Init, Kind, Pass, Patch, Result, Role, Site, SiteId, Sublayer, SublayerPatch,
};
use engraft_tensor::{Param, Tensor};
use serde_json::{Map, Value, json};

use crate::read::{Reader, as_written, number};
use crate::reparameterized::krona::middle;
use crate::shared::branches::{Branch, Branches, Form, Reads};
use crate::shared::fields::{flag, float, int};
use crate::shared::kronecker;
use crate::{Described, Entry, Info, Loaded, Method, foreign, peft};

const SIZE_MAX: usize = 1 << 20;

#[derive(Clone)]
struct KronaB {
    /// a₁ and a₂; where absent, the largest divisor up to the root.
    rows: Option<usize>,
    columns: Option<usize>,
    scale: f64,
    dropout: f32,
    residual: bool,
}

static INFO: Info = Info {
    name: "krona_b",
    title: "KronA^B",
    class: "additive",
    sites: "sublayer",
    paper: "arXiv:2212.10650",
    summary: "a Kronecker product beside the MLP, with a scaled residual of its own as KronA^B_res",
    mergeable: false,
    identity_at_init: true,
    default_roles: None,
    peft_type: "ENGRAFT_KRONA_B",
    fields: &[
        int(
            "a1",
            (1, SIZE_MAX as i64),
            None,
            "Rows of A, a divisor of the width; by default the largest one up to its root.",
        ),
        int(
            "a2",
            (1, SIZE_MAX as i64),
            None,
            "Columns of A, a divisor of the width; by default the largest one up to its root.",
        ),
        float("scale", (0.0, 1e9), "1", "Factor s on the product."),
        float("dropout", (0.0, 0.999), "0", "Dropout on the input of the product while training."),
        flag("residual", "false", "Add the input times a trained number, from zero (KronA^B_res)."),
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

fn read(r: &mut Reader<'_>) -> KronaB {
    let mut size = |key| r.value(key).is_some().then(|| r.count(key, 1, SIZE_MAX));
    let (rows, columns) = (size("a1"), size("a2"));
    KronaB {
        rows,
        columns,
        scale: r.float("scale", 1.0),
        dropout: r.dropout("dropout"),
        residual: r.flag("residual", false),
    }
}

fn example() -> Box<dyn Method> {
    Box::new(KronaB { rows: None, columns: Some(2), scale: 1.5, dropout: 0.0, residual: true })
}

impl Method for KronaB {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("L·(a1·a2 + (d/a1)·(d/a2))")
    }

    fn by_layers(&self) -> bool {
        true
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        for (site, part) in self.parts(b)? {
            b.patch(site, Patch::Sublayer(Box::new(part)))?;
        }
        Ok(())
    }

    fn branches(&self) -> Option<Box<dyn Branches>> {
        Some(Box::new(self.clone()))
    }

    fn config(&self, _model: &Described<'_>) -> Map<String, Value> {
        self.keys()
    }
}

impl KronaB {
    fn keys(&self) -> Map<String, Value> {
        let own = json!({
            "a1": self.rows, "a2": self.columns, "dropout": as_written(self.dropout), "residual": self.residual,
            "scale": number(self.scale),
        });
        own.as_object().cloned().unwrap_or_default()
    }

    fn parts(&self, b: &mut Builder<'_>) -> Result<Vec<(SiteId, Beside)>> {
        let mut parts = Vec::new();
        for site in b.sites().iter().filter(|s| s.role == Role::Mlp) {
            let Kind::Sublayer { width } = site.kind else { continue };
            let [a1, a2] = [self.rows, self.columns].map(|size| size.unwrap_or(middle(width)));
            if !width.is_multiple_of(a1) || !width.is_multiple_of(a2) {
                let message = format!(
                    "a product with [{a1}, {a2}] is not {width} wide; choose `a1` and `a2` that divide it"
                );
                return Err(Error::Site { path: site.path.clone(), message });
            }
            let left = b.param(&format!("{}.krona_A", site.path), &[a1, a2], Init::kaiming(a2))?;
            let right = b.param(&format!("{}.krona_B", site.path), &[width / a1, width / a2], Init::Zeros)?;
            let own = match self.residual {
                true => Some(b.param(&format!("{}.krona_scale", site.path), &[1], Init::Zeros)?),
                false => None,
            };
            parts.push((site.id, Beside { left, right, own, config: self.clone() }));
        }
        if parts.is_empty() {
            return Err(Error::Unsupported("KronA^B needs a model with MLP sublayers; choose krona".into()));
        }
        Ok(parts)
    }
}

impl Branches for KronaB {
    fn form(&self) -> Form {
        Form::beside_mlp(Reads::Input)
    }

    fn tensor(&self, key: &str, _name: &str) -> Option<String> {
        key.strip_prefix(foreign::PREFIX).filter(|name| name.contains(".krona_")).map(str::to_owned)
    }

    fn config(&self) -> Map<String, Value> {
        let mut keys = self.keys();
        keys.insert("peft_type".into(), INFO.peft_type.into());
        keys
    }

    fn build(&self, b: &mut Builder<'_>, _name: &str) -> Result<Vec<(SiteId, Box<dyn Branch>)>> {
        let boxed = |(site, part)| (site, Box::new(part) as Box<dyn Branch>);
        Ok(self.parts(b)?.into_iter().map(boxed).collect())
    }
}

struct Beside {
    left: Param,
    right: Param,
    own: Option<Param>,
    config: KronaB,
}

impl Branch for Beside {
    fn read(&self, s: &Sublayer<'_>) -> Result<(Tensor, Tensor)> {
        Ok((s.input.clone(), s.output.clone()))
    }

    fn branch(&self, x: &Tensor, site: &Site, cx: &Pass) -> Result<Tensor> {
        let dropped = cx.dropout(x, self.config.dropout, site.id, 1)?;
        let left = self.left.get().scale(self.config.scale as f32)?;
        let y = kronecker::multiply(&dropped, &left, &self.right.get())?;
        match &self.own {
            Some(own) => Ok(y.plus(&x.mul(&own.get())?)?),
            None => Ok(y),
        }
    }
}

impl SublayerPatch for Beside {
    fn output(&self, s: &Sublayer<'_>, site: &Site, cx: &Pass) -> Result<Tensor> {
        Ok(s.output.add(&self.branch(s.input, site, cx)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_tensor::testing::close;

    const SITE: &str = "layers.0.output_adapters";

    #[test]
    fn the_product_is_dense_kron() {
        let a =
            attached(&[chosen("krona_b", json!({ "a1": 3, "a2": 2, "scale": 2.0, "residual": true }))], &[]);
        assert_eq!(a.adapter.trained_count(), 2 * (3 * 2 + 2 * 3 + 1));
        let (_, g, y) = at_sublayer(&a, SITE, false).unwrap();
        close(&y, &g, 0.0);
        stir(&a, 0.5);
        let get = |end: &str| value_of(&a, &format!("{SITE}.krona_{end}"));
        let (u, g, y) = at_sublayer(&a, SITE, false).unwrap();
        let dense = kronecker::kron(&get("A"), &get("B")).unwrap();
        let wanted = g.add(&u.matmul_t(&dense).unwrap().scale(2.0).unwrap()).unwrap();
        close(&y, &wanted.add(&u.mul(&get("scale")).unwrap()).unwrap(), 1e-5);
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("krona_b", json!({ "residual": true, "dropout": 0.1 }))], &["head"]);
        let (sites, info) = toy();
        let error =
            crate::attach(&[chosen("krona_b", json!({ "a1": 4 }))], &[], &sites, &info, 0).err().unwrap();
        assert!(error.to_string().contains("choose `a1`"), "{error}");
        let written = config(&[chosen("krona_b", json!({}))], &[]);
        assert!(from_file(&with(written, json!({ "scale": "big" }))).is_err());
    }
}
