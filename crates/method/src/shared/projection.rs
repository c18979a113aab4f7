//! Random matrices that all targets share: each reads the corner that its sizes need.

use engraft_nn::{Builder, Init, Kind, Result, Site};
use engraft_tensor::{Param, Tensor};

use crate::shared::places;
use crate::shared::torch_random::{Generator, Seed};

/// The largest (out, in) among linear layers.
pub(crate) fn largest<'s>(sites: impl IntoIterator<Item = &'s Site>) -> (usize, usize) {
    sites.into_iter().fold((0, 0), |(most_out, most_in), site| match site.kind {
        Kind::Linear { out, inn, .. } => (most_out.max(out), most_in.max(inn)),
        _ => (most_out, most_in),
    })
}

/// `rows` × `columns` of the upper left of a matrix.
pub(crate) fn corner(matrix: &Param, rows: usize, columns: usize) -> Result<Tensor> {
    let mut m = matrix.get();
    if m.dim(0) != rows {
        m = m.narrow(0, 0, rows)?;
    }
    if m.dim(1) != columns {
        m = m.narrow(1, 0, columns)?;
    }
    Ok(m)
}

/// A [rows, largest in] and B [largest out, rank] of `peft`'s VeRA and its kin for the builder's targets, called `names`:
/// Kaiming-uniform for rectifiers (±√(6/columns)), one after the other from PyTorch's generator. Where they are not saved,
/// they are no parameters of the adapter.
pub(crate) fn kaiming_pair(
    b: &mut Builder<'_>,
    title: &str,
    names: [&str; 2],
    [rows, rank]: [usize; 2],
    seed: Seed,
    save: bool,
) -> Result<[Param; 2]> {
    for site in b.targets() {
        places::linear(site, title)?;
    }
    let (out, inn) = largest(b.targets());
    let mut generator = Generator::new(seed);
    let mut draw = |rows: usize, columns: usize| {
        let deviation = 2f64.sqrt() / (columns as f64).sqrt();
        Tensor::from_vec(generator.within(3f64.sqrt() * deviation, rows * columns), [rows, columns])
    };
    let (down, up) = (draw(rows, inn)?, draw(out, rank)?);
    let mut keep = |name: &str, values: Tensor| {
        let shape = values.shape().to_vec();
        if save { b.fixed(name, &shape, Init::Values(values)) } else { Ok(Param::frozen(values)) }
    };
    Ok([keep(names[0], down)?, keep(names[1], up)?])
}
