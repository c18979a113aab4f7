//! What is asked of a model's sites as a whole: those of some layers alone, and how many numbers there are.

use std::sync::Arc;

use super::{Kind, Sites, Value};

impl Sites {
    /// The same sites, of which those in other layers of their stacks than `layers` are not shown: what a method sees that was given
    /// these. Blocks are counted as before, and every index still has its site.
    pub fn within(&self, layers: &[usize]) -> Sites {
        let older = self.older.as_ref().map(|older| Arc::new(older.within(layers)));
        Sites { layers: Some(layers.to_vec()), older, ..self.clone() }
    }

    /// The numbers of the model, those of tied tensors once.
    pub fn parameters(&self) -> usize {
        let mut seen = Vec::new();
        let mut total = 0;
        let all = self.all.iter().filter(|s| s.only.is_none_or(|only| only == self.names));
        for site in all.filter(|s| !matches!(s.value, Value::None)) {
            let own = (&site.tensor, &site.rows);
            if site.tensor.is_some() && seen.contains(&own) {
                continue;
            }
            seen.push(own);
            total += match site.kind {
                Kind::Linear { out, inn, .. } | Kind::Convolution { out, inn, .. } => out * inn,
                Kind::Embedding { rows, width } => rows * width,
                Kind::Vector { len } => len,
                _ => 0,
            };
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Role, SiteId, Stack};
    use super::*;

    #[test]
    fn a_view_of_some_layers_counts_blocks_as_the_whole() {
        let mut s = Sites::default();
        for (stack, layers) in [(Stack::Encoder, 3), (Stack::Decoder, 2)] {
            s.set_stack(stack);
            for layer in 0..layers {
                s.add(format!("{stack:?}.{layer}"), Role::Block, Some(layer), Kind::Block { width: 4 });
            }
        }
        s.add("head", Role::Head, None, Kind::Block { width: 4 });
        let view = s.with_older(|path| format!("old.{path}")).within(&[0, 2]);
        let seen = |sites: &Sites| sites.iter().map(|s| s.path.clone()).collect::<Vec<_>>();
        assert_eq!(seen(&view), ["Encoder.0", "Encoder.2", "Decoder.0", "head"]);
        assert_eq!(seen(view.older().unwrap())[1], "old.Encoder.2");
        let decoder = view.iter().find(|s| s.stack == Stack::Decoder).unwrap();
        assert_eq!((view.number(decoder), view.blocks()), (Some(3), 5));
        assert_eq!(view.get(SiteId(1)).path, "Encoder.1", "an index has its site in any view");
    }
}
