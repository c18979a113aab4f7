//! `bias` of `peft`'s low-rank methods: which biases of the model are trained along.

use engraft_nn::{Builder, Kind, Result};

/// Which biases of the model are trained along.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Biases {
    /// None.
    None,
    /// Every vector called `bias`.
    All,
    /// Those of the targets.
    OfTargets,
}

/// Their names in `peft`.
pub(crate) const BIASES: &[(&str, Biases)] =
    &[("none", Biases::None), ("all", Biases::All), ("lora_only", Biases::OfTargets)];

impl Biases {
    /// The name in `peft`.
    pub fn name(self) -> &'static str {
        BIASES.iter().find(|b| b.1 == self).map_or("", |b| b.0)
    }

    /// Trains them as whole vectors.
    pub fn attach(self, b: &mut Builder<'_>) -> Result<()> {
        let targets: Vec<&str> = b.targets().iter().map(|s| s.path.as_str()).collect();
        let sites = b.sites();
        for site in sites.of_kind(|k| matches!(k, Kind::Vector { .. })) {
            let Some(module) = site.path.strip_suffix(".bias") else { continue };
            let of_target = targets.contains(&module);
            let wanted = self == Biases::All || self == Biases::OfTargets && of_target;
            if wanted && !b.replaced(site.id) {
                // peft moves the layers it changes one level down.
                let name = if of_target { format!("{module}.base_layer.bias") } else { site.path.clone() };
                b.replace_as(site.id, &name)?;
            }
        }
        Ok(())
    }
}
