//! Chroma at the picture's size: libjpeg's "fancy" triangle filter (`jdsample.c`), which weighs the nearer sample with
//! 3/4, the farther with 1/4, and rounds up and down in turn; other ratios, and parts two samples wide, are repeated.

use super::{Component, Frame};

/// Row `y` of the picture from `component`, into `out`, `[width]` or a little longer.
pub(super) fn row(component: &Component, frame: &Frame, y: usize, out: &mut Vec<u8>) {
    out.clear();
    let (across, down) = (frame.across / component.across, frame.down / component.down);
    let samples = |row: usize| {
        let start = row.min(component.height - 1) * component.blocks_wide * 8;
        &component.samples[start..start + component.width]
    };
    let near = samples(y / down);
    let is_fine = component.width > 2;
    // The row on the other side of this one, itself at the picture's edge.
    let far = || match y % 2 {
        0 => samples((y / 2).saturating_sub(1)),
        _ => samples(y / 2 + 1),
    };
    match (across, down) {
        (1, 1) => out.extend_from_slice(near),
        (2, 1) if is_fine => wide(near, out),
        (2, 2) if is_fine => both(near, far(), out),
        (1, 2) => {
            let half = 1 + (y % 2) as u16;
            let mix = |(near, far): (&u8, &u8)| ((u16::from(*near) * 3 + u16::from(*far) + half) >> 2) as u8;
            out.extend(near.iter().zip(far()).map(mix));
        }
        _ => out.extend(near.iter().flat_map(|level| std::iter::repeat_n(*level, across))),
    }
}

fn wide(row: &[u8], out: &mut Vec<u8>) {
    for (index, level) in row.iter().enumerate() {
        let here = u16::from(*level) * 3;
        let left =
            row.get(index.wrapping_sub(1)).map_or(*level, |left| ((here + u16::from(*left) + 1) >> 2) as u8);
        let right = row.get(index + 1).map_or(*level, |right| ((here + u16::from(*right) + 2) >> 2) as u8);
        out.extend([left, right]);
    }
}

fn both(near: &[u8], far: &[u8], out: &mut Vec<u8>) {
    let column = |index: usize| u16::from(near[index]) * 3 + u16::from(far[index]);
    let last = near.len() - 1;
    for index in 0..near.len() {
        let here = column(index) * 3;
        // At the edges a column is its own neighbour: 3 + 1 = 4 quarters.
        let left = column(index.saturating_sub(1));
        let right = column((index + 1).min(last));
        out.extend([((here + left + 8) >> 4) as u8, ((here + right + 7) >> 4) as u8]);
    }
}
