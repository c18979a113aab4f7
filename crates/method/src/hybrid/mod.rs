//! Several kinds of change in one adapter, by design.

mod lora;
pub(crate) mod mam;
mod prefix;
pub(crate) mod propetl;
pub(crate) mod s4;
mod union;
pub(crate) mod unipelt;

use engraft_nn::{Site, Sites, Stack};

/// The number of a site's layer as AdapterHub counts: the decoder's layers go on from the encoder's.
fn layer_number(sites: &Sites, site: &Site) -> Option<usize> {
    let encoder = || sites.iter().filter(|s| s.stack == Stack::Encoder).filter_map(|s| s.layer).max();
    let before = if site.stack == Stack::Decoder { encoder().map_or(0, |last| last + 1) } else { 0 };
    site.layer.map(|layer| layer + before)
}
