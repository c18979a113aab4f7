//! Picture files to levels: PNG and JPEG, told apart by their first bytes.
//!
//! The size is read before anything is decoded and held against the limits. Palettes are looked up, and 16-bit colours
//! keep their upper 8 bits, as in Pillow.

use std::io::{Cursor, Read, Seek, SeekFrom};

use super::picture::{Picture, upright_size};
use super::{exif, jpeg};
use crate::fence::fenced;

/// The largest picture file, in bytes.
pub const PICTURE_BYTES_MAX: u64 = 20 << 20;
/// The most points of what a processor makes of a picture: 4096 by 4096, far beyond what image classifiers are made for.
pub const OUTPUT_POINTS_MAX: usize = 1 << 24;
/// The longest side of a picture.
pub const SIDE_MAX: usize = 16_384;
/// The most points of a picture.
pub const POINTS_MAX: usize = 64_000_000;

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";
/// Bytes of EXIF data that are looked through.
const EXIF_BYTES_MAX: u64 = 1 << 20;
/// Deflate never packs tighter than this.
const DEFLATE_MAX: usize = 1032;

/// What becomes of the alpha of a picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Alpha {
    /// It is left out, as Pillow's `convert("RGB")` and `convert("L")` do.
    Dropped,
    /// The picture is laid on white, as `do_convert_rgb` of `transformers` does.
    OnWhite,
}

/// (height, width) of the upright picture in the file `all`, which begins with `bytes`.
///
/// # Errors
/// In words, without the file's name: not a picture, or one beyond the limits.
pub(super) fn size_in(bytes: &[u8], all: &mut (impl Read + Seek)) -> Result<(usize, usize), String> {
    let (height, width) = if bytes.starts_with(PNG) {
        let (height, width) = png_size(bytes)?;
        upright_size(height, width, png_orientation(all))
    } else if bytes.starts_with(b"\xFF\xD8\xFF") {
        let header = jpeg::header(bytes)?;
        upright_size(header.height, header.width, header.orientation)
    } else {
        return Err(not_read(bytes));
    };
    within_limits(height, width)?;
    Ok((height, width))
}

/// (height, width) of the upright picture that `bytes` hold.
///
/// # Errors
/// As [`size_in`].
pub(super) fn size(bytes: &[u8]) -> Result<(usize, usize), String> {
    size_in(bytes, &mut Cursor::new(bytes))
}

/// The picture that `bytes` hold, upright.
///
/// # Errors
/// As [`size`]; also damaged data.
pub(super) fn picture(bytes: &[u8], alpha: Alpha) -> Result<Picture, String> {
    size(bytes)?;
    if bytes.starts_with(PNG) {
        let picture =
            fenced(|| png(bytes, alpha)).unwrap_or_else(|_| Err("is a PNG that cannot be decoded".into()))?;
        return Ok(picture.upright(png_orientation(&mut Cursor::new(bytes))));
    }
    let orientation = jpeg::header(bytes)?.orientation;
    Ok(jpeg::decode(bytes)?.upright(orientation))
}

/// Whether a picture may be so large.
pub(super) fn within_limits(height: usize, width: usize) -> Result<(), String> {
    if height == 0 || width == 0 {
        return Err(format!("is {width} wide and {height} high; a picture has at least one point"));
    }
    if height > SIDE_MAX || width > SIDE_MAX {
        return Err(format!(
            "is {width} wide and {height} high; a side may have {SIDE_MAX} points, so make it smaller"
        ));
    }
    if height * width > POINTS_MAX {
        let points = height * width;
        return Err(format!("has {points} points; a picture may have {POINTS_MAX}, so make it smaller"));
    }
    Ok(())
}

/// Names the format, where it is known, of a file that is not read.
fn not_read(bytes: &[u8]) -> String {
    let known: [(&[u8], &str); 6] = [
        (b"GIF8", "a GIF"),
        (b"BM", "a BMP"),
        (b"RIFF", "perhaps a WebP"),
        (b"II*\0", "a TIFF"),
        (b"MM\0*", "a TIFF"),
        (b"\0\0\0", "perhaps a HEIC or AVIF"),
    ];
    let found =
        known.iter().find(|(start, _)| bytes.starts_with(start)).map_or("something else", |(_, name)| name);
    format!(
        "expected a PNG or JPEG, found {}; convert it",
        if bytes.is_empty() { "an empty file" } else { found }
    )
}

fn png_size(bytes: &[u8]) -> Result<(usize, usize), String> {
    let header = bytes.get(8..24).filter(|header| header[4..8] == *b"IHDR");
    let header = header.ok_or("is a PNG without its header")?;
    let number = |at: usize| header[at..at + 4].iter().fold(0, |value, byte| value << 8 | usize::from(*byte));
    Ok((number(12), number(8)))
}

/// The EXIF orientation of a PNG; 1 where it says nothing. Its chunk may come before the picture or after it.
fn png_orientation(file: &mut (impl Read + Seek)) -> u8 {
    let mut at = PNG.len() as u64;
    let mut next = || -> Option<([u8; 4], Vec<u8>)> {
        file.seek(SeekFrom::Start(at)).ok()?;
        let (mut length, mut name) = ([0; 4], [0; 4]);
        file.read_exact(&mut length).and_then(|()| file.read_exact(&mut name)).ok()?;
        let length = u64::from(u32::from_be_bytes(length));
        // Its length and name before the data, their checksum behind.
        at += length + 12;
        let mut data = Vec::new();
        if name == *b"eXIf" {
            file.take(length.min(EXIF_BYTES_MAX)).read_to_end(&mut data).ok()?;
        }
        Some((name, data))
    };
    while let Some((name, data)) = next() {
        match &name {
            b"eXIf" => return exif::orientation(data.strip_prefix(exif::MARK).unwrap_or(&data)).unwrap_or(1),
            b"IEND" => break,
            _ => {}
        }
    }
    1
}

fn png(bytes: &[u8], alpha: Alpha) -> Result<Picture, String> {
    use png::{BitDepth, ColorType, Decoder, Transformations};
    let damaged = |error: png::DecodingError| match error {
        png::DecodingError::IoError(_) => "is a PNG that ends in the middle of the picture".to_string(),
        other => format!("is a damaged PNG: {other}"),
    };
    let mut decoder = Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    decoder.ignore_checksums(false);
    let mut reader = decoder.read_info().map_err(damaged)?;
    let info = reader.info();
    if (info.color_type, info.bit_depth) == (ColorType::Grayscale, BitDepth::Sixteen) {
        // Pillow cuts such levels off at 255, which leaves a white picture: nobody means that.
        return Err("is a 16-bit grey PNG; convert it to 8 bits".into());
    }
    let (height, width) = (info.height as usize, info.width as usize);
    if info.raw_bytes().checked_div(DEFLATE_MAX).is_none_or(|packed| packed > bytes.len()) {
        return Err("is a PNG that ends in the middle of the picture".into());
    }
    let size = reader.output_buffer_size().ok_or("is a PNG of impossible size")?;
    let mut levels = Vec::new();
    levels.try_reserve_exact(size).map_err(|_| format!("needs {size} bytes, more than there are"))?;
    levels.resize(size, 0);
    let frame = reader.next_frame(&mut levels).map_err(damaged)?;
    reader.finish().map_err(damaged)?;
    let (samples, points) = (frame.color_type.samples(), height * width);
    let channels = match samples {
        1 | 3 => samples,
        // Two and four samples end in alpha.
        _ => without_alpha(&mut levels, samples, points, alpha),
    };
    levels.truncate(points * channels);
    Ok(Picture { height, width, channels, levels })
}

/// Moves the colours of `points`, `samples` levels each, to the front; gives their channels.
fn without_alpha(levels: &mut [u8], samples: usize, points: usize, alpha: Alpha) -> usize {
    let channels = samples - 1;
    for point in 0..points {
        let opaque = levels[point * samples + channels];
        for channel in 0..channels {
            let level = levels[point * samples + channel];
            levels[point * channels + channel] = match alpha {
                Alpha::Dropped => level,
                Alpha::OnWhite => on_white(level, opaque),
            };
        }
    }
    channels
}

/// Pillow's `alpha_composite` over opaque white: 7 bits more than a level has, and a division by 255 in shifts.
fn on_white(level: u8, opaque: u8) -> u8 {
    let (own, white) = (u32::from(opaque) << 7, (255 - u32::from(opaque)) << 7);
    let sum = u32::from(level) * own + 255 * white + (0x80 << 7);
    (((sum >> 8) + sum) >> 15) as u8
}
