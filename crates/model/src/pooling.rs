//! One row for each sequence.

use engraft_nn::{Layout, Output, Pass};
use engraft_tensor::Tensor;

/// The last row of each sequence, what a causal classifier reads: [sequences, width] with their pass.
pub(crate) fn lasts(h: &Tensor, cx: &Pass) -> engraft_nn::Result<Output> {
    let rows: Vec<i64> = cx.layout().sequences().iter().map(|s| s.end as i64 - 1).collect();
    let (pass, count) = (cx.select(&rows)?, rows.len());
    let features = h.gather(&Tensor::from_i64(rows, [count])?)?;
    Ok(Output { features, states: Some(h.clone()), pass })
}

/// The mean of each sequence's real rows but the first `skipped`: h [rows, width] → [sequences, width].
pub(crate) fn means(h: &Tensor, layout: &Layout, skipped: usize) -> engraft_nn::Result<Tensor> {
    let (mut rows, mut owners, mut shares) = (vec![], vec![], vec![]);
    for (i, (s, &prompt)) in layout.sequences().iter().zip(layout.virtual_counts()).enumerate() {
        let real = (s.start + prompt + skipped).min(s.end)..s.end;
        owners.extend(std::iter::repeat_n(i as i64, real.len()));
        shares.push(1.0 / real.len().max(1) as f32);
        rows.extend(real.map(|r| r as i64));
    }
    let (count, sequences) = (rows.len(), shares.len());
    let real = h.gather(&Tensor::from_i64(rows, [count])?)?;
    let sums = real.scatter_add(&Tensor::from_i64(owners, [count])?, sequences)?;
    Ok(sums.mul(&Tensor::from_vec(shares, [sequences, 1])?)?)
}
