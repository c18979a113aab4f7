//! `bias` of `peft`: the biases of the model that are trained along with a method's own tensors.

use engraft_nn::{Builder, Kind, Result};
use serde_json::Value;

use crate::copies::decoder_of;
use crate::read::Reader;

/// Which biases of the model are trained along.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Biases {
    None,
    All,
    OfTargets,
}

impl Biases {
    /// The setting `bias`; `of_targets` is the method's word for the biases of its targets ("vera_only"). In files `peft` takes
    /// any word that ends so.
    pub fn read(r: &mut Reader<'_>, of_targets: &str) -> Biases {
        let of_any = r.value("bias").and_then(Value::as_str).is_some_and(|word| word.ends_with("_only"));
        if r.is_file() && of_any {
            return Biases::OfTargets;
        }
        r.one_of("bias", &[("none", Biases::None), ("all", Biases::All), (of_targets, Biases::OfTargets)])
    }

    /// The setting as it is written.
    pub fn name(self, of_targets: &'static str) -> &'static str {
        match self {
            Biases::None => "none",
            Biases::All => "all",
            Biases::OfTargets => of_targets,
        }
    }

    /// Trains every vector called `bias`, or those of the targets.
    pub fn attach(self, b: &mut Builder<'_>) -> Result<()> {
        if self == Biases::None {
            return Ok(());
        }
        let targets: Vec<&str> = b.targets().iter().map(|s| s.path.as_str()).collect();
        for site in b.sites().of_kind(|k| matches!(k, Kind::Vector { .. })) {
            let Some(module) = site.path.strip_suffix(".bias") else { continue };
            let of_target = targets.contains(&module);
            let decoder = decoder_of(site, b.sites()).map(|decoder| decoder.path.as_str());
            let of_decoder = decoder.is_some_and(|path| targets.contains(&path));
            if (self == Biases::All || of_target || of_decoder) && !b.replaced(site.id) {
                // peft moves the layers it changes one level down. The bias beside a decoder is called so in files alone.
                let name = if of_target { format!("{module}.base_layer.bias") } else { site.path.clone() };
                b.replace_as(site.id, &name)?;
            }
        }
        Ok(())
    }
}
