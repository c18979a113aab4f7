//! Invertible adapters behind the embeddings, as MAD-X's language adapters have them: NICE's additive coupling.
//!
//! h = [h₁; h₂], in halves: y₁ = h₁ + F(h₂), y₂ = h₂ + G(y₁), F and G perceptrons W₂·σ(W₁·x + b₁) + b₂ whose inner width is
//! that of their input over `reduction`. h is what the first block reads, in an encoder–decoder model the encoder's. As in the
//! classes of `transformers` under AdapterHub's library, heads of the model's own read the stream as it is; the inverse belongs to
//! heads that the library has beside them.
//!
//! Pfeiffer et al. 2020, arXiv:2005.00052, section 3.3; Dinh et al. 2015, arXiv:1410.8516.
//!
//! TRUNK.invertible_adapters.NAME.F.0, .F.2, .G.0 and .G.2, each .weight and .bias; N(0, 0.02), biases zero.

use engraft_nn::{BlockPatch, Builder, Error, Init, Kind, Pass, Patch, Result, Site, Stack};
use engraft_tensor::Tensor;
use engraft_tensor::ops::cat;

use crate::shared::activations::Activation;
use crate::shared::dense::Dense;

/// Puts one before the first block.
pub(super) fn attach(b: &mut Builder<'_>, name: &str, activation: Activation, reduction: f64) -> Result<()> {
    let first =
        |s: &&Site| matches!(s.kind, Kind::Block { .. }) && s.stack != Stack::Decoder && s.layer == Some(0);
    let reads_tokens = b.sites().iter().any(|s| matches!(s.kind, Kind::Embedding { .. }));
    let Some(site) = b.sites().iter().find(first).filter(|_| reads_tokens) else {
        let text = "invertible adapters need a model that reads tokens; leave `invertible` out";
        return Err(Error::Unsupported(text.into()));
    };
    let Kind::Block { width } = site.kind else { return Ok(()) };
    // A bare encoder is its own trunk, and an encoder beside a decoder another's.
    let trunk = match (site.path.split('.').next(), site.stack) {
        (Some("encoder"), Stack::Only) | (None, _) => String::new(),
        (Some(trunk), _) => format!("{trunk}."),
    };
    let (one, two) = (width / 2, width - width / 2);
    let mut network = |part: &str, inn: usize, out: usize| -> Result<[Dense; 2]> {
        let inner = (inn as f64 / reduction) as usize;
        if inner == 0 {
            return Err(Error::Unsupported(format!(
                "`inv_adapter_reduction_factor`: {reduction} leaves nothing of the {inn} numbers of a half"
            )));
        }
        let stem = format!("{trunk}invertible_adapters.{name}.{part}");
        let start = || [Init::Normal(0.02), Init::Zeros];
        Ok([
            Dense::starting(b, &format!("{stem}.0"), (inn, inner), start())?,
            Dense::starting(b, &format!("{stem}.2"), (inner, out), start())?,
        ])
    };
    let coupling = Coupling { f: network("F", two, one)?, g: network("G", one, two)?, activation, one };
    b.patch(site.id, Patch::Block(Box::new(coupling)))
}

struct Coupling {
    f: [Dense; 2],
    g: [Dense; 2],
    activation: Activation,
    /// Width of the first half.
    one: usize,
}

impl Coupling {
    fn network(&self, [inner, outer]: &[Dense; 2], x: &Tensor) -> Result<Tensor> {
        outer.of(&self.activation.apply(inner.of(x)?)?)
    }

    fn forward(&self, h: &Tensor) -> Result<Tensor> {
        let (first, second) = (h.narrow(1, 0, self.one)?, h.narrow(1, self.one, h.width() - self.one)?);
        let first = first.add(&self.network(&self.f, &second)?)?;
        let second = second.add(&self.network(&self.g, &first)?)?;
        Ok(cat(&[&first, &second], 1)?)
    }
}

impl BlockPatch for Coupling {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        _site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        run(&self.forward(h)?, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};
    use serde_json::json;

    #[test]
    fn the_coupling_has_an_inverse() {
        let a = attached(&[chosen("bottleneck", json!({ "reduction": 2, "invertible": true }))], &[]);
        // Beside the adapters: twice a perceptron from 3 to 1 to 3.
        let without = attached(&[chosen("bottleneck", json!({ "reduction": 2 }))], &[]);
        assert_eq!(a.adapter.trained_count() - without.adapter.trained_count(), 2 * (3 + 1 + 3 + 3));
        stir(&a, 0.5);
        let (sites, _) = toy();
        let site = sites.get(site_id(&sites, "layers.0"));
        let [Patch::Block(patch)] = a.adapter.at(site.id) else { panic!() };
        let (h, cx) = (sample(&[4, 6], 1), Pass::new(Layout::counted(&[4]).unwrap(), None));
        let y = patch.around(&h, &|h: &Tensor, _: &Pass| Ok(h.clone()), site, &cx).unwrap();
        let network = |part: &str, x: &Tensor| {
            let get = |end: &str| value_of(&a, &format!("layers.invertible_adapters.engraft.{part}.{end}"));
            let inner = x.matmul_t(&get("0.weight")).unwrap().add(&get("0.bias")).unwrap();
            let inner = inner.unary(engraft_tensor::ops::Unary::Relu).unwrap();
            inner.matmul_t(&get("2.weight")).unwrap().add(&get("2.bias")).unwrap()
        };
        let (y1, y2) = (y.narrow(1, 0, 3).unwrap(), y.narrow(1, 3, 3).unwrap());
        let h2 = y2.sub(&network("G", &y1)).unwrap();
        let h1 = y1.sub(&network("F", &h2)).unwrap();
        close(&cat(&[&h1, &h2], 1).unwrap(), &h, 1e-5);
        assert!(y.sub(&h).unwrap().to_vec().unwrap().iter().any(|v| v.abs() > 1e-2), "it changes something");
    }

    #[test]
    fn configurations() {
        survives_saving(&[chosen("bottleneck", json!({ "invertible": true }))], &["head"]);
        let written = config(&[chosen("bottleneck", json!({ "invertible": true }))], &[]);
        assert_eq!(written["config"]["inv_adapter"], "nice");
        let glow = with(written["config"].clone(), json!({ "inv_adapter": "glow" }));
        let entry = crate::find("bottleneck").unwrap();
        let error = (entry.from_file)(&with(written, json!({ "config": glow }))).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("nice"), "{error}");
    }
}
