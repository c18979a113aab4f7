//! One picture as levels from 0 to 255, and its conversion between grey and colour.

/// A picture without alpha.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1 for grey, 3 for red, green, blue.
    pub channels: usize,
    /// `[height, width, channels]`.
    pub levels: Vec<u8>,
}

impl Picture {
    /// As `channels` (1 or 3), the way Pillow's `convert("L")` and `convert("RGB")` do it: grey is repeated, and colours
    /// become their luma by ITU-R 601-2 in 16-bit fixed point.
    pub(crate) fn with_channels(self, channels: usize) -> Picture {
        let levels = match (self.channels, channels) {
            (1, 3) => self.levels.iter().flat_map(|level| [*level; 3]).collect(),
            (3, 1) => self.levels.chunks_exact(3).map(luma).collect(),
            _ => return self,
        };
        Picture { channels, levels, ..self }
    }

    /// Turned and mirrored as the EXIF orientation 1 to 8 says, so that up is up.
    pub(crate) fn upright(self, orientation: u8) -> Picture {
        let (h, w, c) = (self.height, self.width, self.channels);
        // For each orientation, where the level at (row, column) of the upright picture comes from.
        let from: fn(usize, usize, usize, usize) -> (usize, usize) = match orientation {
            2 => |r, c, _, w| (r, w - 1 - c),
            3 => |r, c, h, w| (h - 1 - r, w - 1 - c),
            4 => |r, c, h, _| (h - 1 - r, c),
            5 => |r, c, _, _| (c, r),
            6 => |r, c, h, _| (h - 1 - c, r),
            7 => |r, c, h, w| (h - 1 - c, w - 1 - r),
            8 => |r, c, _, w| (c, w - 1 - r),
            _ => return self,
        };
        let (height, width) = upright_size(h, w, orientation);
        let mut levels = Vec::with_capacity(self.levels.len());
        for row in 0..height {
            for column in 0..width {
                let (r, k) = from(row, column, h, w);
                let at = (r * w + k) * c;
                levels.extend_from_slice(&self.levels[at..at + c]);
            }
        }
        Picture { height, width, channels: c, levels }
    }
}

/// (height, width) after [`Picture::upright`].
pub(crate) fn upright_size(height: usize, width: usize, orientation: u8) -> (usize, usize) {
    if orientation >= 5 { (width, height) } else { (height, width) }
}

fn luma(rgb: &[u8]) -> u8 {
    let [r, g, b] = [rgb[0], rgb[1], rgb[2]].map(u32::from);
    ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grey_and_colour_convert_as_pillow_does() {
        let colour = Picture { height: 1, width: 2, channels: 3, levels: vec![10, 200, 30, 255, 0, 1] };
        // Image.fromarray(…).convert("L")
        let grey = colour.with_channels(1);
        assert_eq!(grey.levels, [124, 76]);
        assert_eq!(grey.with_channels(3).levels, [124, 124, 124, 76, 76, 76]);
    }

    #[test]
    fn every_orientation_is_undone_as_pillow_does() {
        // ImageOps.exif_transpose of [[0, 1, 2], [3, 4, 5]]
        let expected: [(u8, usize, &[u8]); 8] = [
            (1, 3, &[0, 1, 2, 3, 4, 5]),
            (2, 3, &[2, 1, 0, 5, 4, 3]),
            (3, 3, &[5, 4, 3, 2, 1, 0]),
            (4, 3, &[3, 4, 5, 0, 1, 2]),
            (5, 2, &[0, 3, 1, 4, 2, 5]),
            (6, 2, &[3, 0, 4, 1, 5, 2]),
            (7, 2, &[5, 2, 4, 1, 3, 0]),
            (8, 2, &[2, 5, 1, 4, 0, 3]),
        ];
        for (orientation, width, levels) in expected {
            let stored = Picture { height: 2, width: 3, channels: 1, levels: (0..6).collect() };
            let upright = stored.upright(orientation);
            assert_eq!((upright.width, upright.levels.as_slice()), (width, levels), "{orientation}");
        }
    }
}
