//! Components to grey or red, green and blue, as libjpeg (`jdcolor.c`) and, for inks, Pillow convert them.

use super::{Frame, Tables, upsample};
use crate::images::picture::Picture;

/// What the components mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Coding {
    Grey,
    Rgb,
    /// Brightness and two chromas.
    YCbCr,
    /// Inks, stored inverted.
    Cmyk,
    /// Inks as brightness and chromas, stored inverted.
    Ycck,
}

impl Coding {
    /// As libjpeg decides: by the JFIF and Adobe markers, else by the components' names.
    pub fn of(frame: &Frame, tables: &Tables) -> Result<Coding, String> {
        let ids: Vec<u8> = frame.components.iter().map(|component| component.id).collect();
        Ok(match (&ids[..], tables.adobe) {
            ([_], _) => Coding::Grey,
            ([_, _, _], _) if tables.jfif => Coding::YCbCr,
            ([_, _, _], Some(0)) => Coding::Rgb,
            ([b'R', b'G', b'B'], None) => Coding::Rgb,
            ([_, _, _], _) => Coding::YCbCr,
            ([_, _, _, _], Some(2)) => Coding::Ycck,
            ([_, _, _, _], _) => Coding::Cmyk,
            _ => return Err(format!("has {} components; 1, 3 or 4 are read", ids.len())),
        })
    }
}

impl Coding {
    /// Red, green and blue of one point, whose components are `of(0)`, `of(1)` …
    fn point(self, of: impl Fn(usize) -> u8) -> [u8; 3] {
        match self {
            Coding::Grey => [of(0); 3],
            Coding::Rgb => [of(0), of(1), of(2)],
            Coding::YCbCr => rgb(of(0), of(1), of(2)),
            Coding::Cmyk => mixed([0, 1, 2].map(|ink| 255 - of(ink)), of(3)),
            Coding::Ycck => mixed(rgb(of(0), of(1), of(2)), of(3)),
        }
    }
}

/// The picture of a frame whose components are transformed.
pub(super) fn picture(frame: &Frame, coding: Coding) -> Result<Picture, String> {
    let channels = if coding == Coding::Grey { 1 } else { 3 };
    let mut levels = Vec::new();
    let size = frame.height * frame.width * channels;
    levels.try_reserve_exact(size).map_err(|_| format!("needs {size} bytes, more than there are"))?;
    let mut rows = vec![Vec::new(); frame.components.len()];
    for y in 0..frame.height {
        for (component, row) in frame.components.iter().zip(&mut rows) {
            upsample::row(component, frame, y, row);
        }
        match coding {
            Coding::Grey => levels.extend_from_slice(&rows[0][..frame.width]),
            _ => levels.extend((0..frame.width).flat_map(|x| coding.point(|component| rows[component][x]))),
        }
    }
    Ok(Picture { height: frame.height, width: frame.width, channels, levels })
}

/// R = Y + 1.402 Cr, G = Y − 0.34414 Cb − 0.71414 Cr, B = Y + 1.772 Cb, in 16-bit fixed point.
fn rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = y + ((91881 * cr + HALF) >> 16);
    let green = y + ((-22554 * cb - 46802 * cr + HALF) >> 16);
    let blue = y + ((116130 * cb + HALF) >> 16);
    [red, green, blue].map(|level| level.clamp(0, 255) as u8)
}

/// Inks over paper: each channel is what its ink and the black leave of the white. `paper` is 255 less the black.
fn mixed(inks: [u8; 3], paper: u8) -> [u8; 3] {
    inks.map(|ink| {
        let product = u32::from(ink) * u32::from(paper) + 128;
        paper - ((product + (product >> 8)) >> 8) as u8
    })
}
