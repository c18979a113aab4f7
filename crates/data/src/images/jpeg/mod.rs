//! JPEG files to levels, the same to the bit as libjpeg-turbo's defaults, which Pillow and so `transformers` use.
//!
//! ITU-T T.81, Huffman-coded, 8 bits: baseline, extended and progressive. The accurate integer transform ([`idct`]),
//! "fancy" upsampling of chroma ([`upsample`]) and the 16-bit colour conversion ([`color`]) are those of libjpeg; other
//! decoders round otherwise and differ by up to 4 levels of 255, more than a picture may differ from the reference.
//! A damaged stretch is an error, never a grey patch.

mod bits;
mod color;
mod idct;
mod scan;
mod upsample;

use super::exif;
use super::picture::Picture;
use bits::Huffman;

/// Scans of one file; more only serve to keep a decoder busy.
const SCANS_MAX: usize = 200;

/// One of the frame's components: brightness, a chroma, an ink.
#[derive(Default)]
struct Component {
    id: u8,
    /// Sampling factors, 1 to 4, across and down.
    across: usize,
    down: usize,
    quantizer: usize,
    /// Samples that belong to the picture.
    width: usize,
    height: usize,
    /// Blocks of 8 by 8 samples, whole units of the frame, so at the right and below they may pass the picture.
    blocks_wide: usize,
    blocks_high: usize,
    /// `[blocks_high, blocks_wide, 64]`, each block row by row.
    coefficients: Vec<i16>,
    /// Its table when its first scan began.
    steps: Option<[u16; 64]>,
    /// `[blocks_high · 8, blocks_wide · 8]`, once transformed.
    samples: Vec<u8>,
}

/// What the frame header says.
struct Frame {
    progressive: bool,
    width: usize,
    height: usize,
    /// The largest sampling factors.
    across: usize,
    down: usize,
    components: Vec<Component>,
}

/// What the markers before a scan have set.
#[derive(Default)]
struct Tables {
    quantizers: [Option<[u16; 64]>; 4],
    dc: [Option<Huffman>; 4],
    ac: [Option<Huffman>; 4],
    restart: usize,
    jfif: bool,
    /// Adobe's marker with its colour transform.
    adobe: Option<u8>,
}

/// Zigzag order to places in a block.
const ZIGZAG: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7,
    14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39,
    46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// Size and orientation, before anything is decoded.
pub(super) struct Header {
    pub width: usize,
    pub height: usize,
    /// As EXIF numbers it; 1 is upright.
    pub orientation: u8,
}

/// The header of the picture in `bytes`, which may be only its beginning.
///
/// # Errors
/// What is wrong, in words, without the file's name.
pub(super) fn header(bytes: &[u8]) -> Result<Header, String> {
    let (mut at, mut orientation) = (2, 1);
    while let Some(Segment { marker, body, end }) = segment(bytes, at)? {
        match marker {
            0xE1 => {
                orientation = body.strip_prefix(exif::MARK).and_then(exif::orientation).unwrap_or(orientation)
            }
            0xC0..=0xC2 => {
                let (height, width) = (number(body, 1)?, number(body, 3)?);
                return Ok(Header { width, height, orientation });
            }
            0xDA => break,
            _ => {}
        }
        at = end;
    }
    Err("holds no baseline or progressive picture; convert it to a baseline JPEG".into())
}

/// The picture in `bytes`, as it is stored (not turned upright).
///
/// # Errors
/// As [`header`].
pub(super) fn decode(bytes: &[u8]) -> Result<Picture, String> {
    let (mut frame, coding) = read(bytes)?;
    for component in &mut frame.components {
        let steps = component.steps.ok_or("holds no data for one of its components")?;
        idct::transform(component, &steps);
    }
    color::picture(&frame, coding)
}

/// The frame with its coefficients, and how its colours are coded.
fn read(bytes: &[u8]) -> Result<(Frame, color::Coding), String> {
    let (mut tables, mut frame, mut at, mut scans) = (Tables::default(), None, 2, 0);
    // The end marker of a sequential file may be lost once all components are there: nothing else can follow.
    let is_whole = |frame: &Option<Frame>| {
        frame.as_ref().is_some_and(|f| !f.progressive && f.components.iter().all(|c| c.steps.is_some()))
    };
    loop {
        let Segment { marker, body, end } = match segment(bytes, at) {
            Ok(Some(found)) => found,
            Ok(None) => break,
            Err(_) if is_whole(&frame) => break,
            Err(error) => return Err(error),
        };
        at = end;
        match marker {
            0xC0..=0xC2 if frame.is_some() => return Err("has two frames".into()),
            0xC0..=0xC2 => frame = Some(Frame::read(body, marker == 0xC2, bytes.len())?),
            0xC4 => tables.huffman(body)?,
            0xDB => tables.quantizer(body)?,
            0xDD => tables.restart = number(body, 0)?,
            0xE0 => tables.jfif |= body.starts_with(b"JFIF\0"),
            0xEE if body.starts_with(b"Adobe") => tables.adobe = body.get(11).copied(),
            0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                let what =
                    "is a lossless, hierarchical or arithmetic-coded JPEG; convert it to a baseline JPEG";
                return Err(what.into());
            }
            0xDA => {
                let frame = frame.as_mut().ok_or("has data before its frame")?;
                scans += 1;
                if scans > SCANS_MAX {
                    return Err(format!("has more than {SCANS_MAX} scans"));
                }
                at = scan::read(frame, &tables, body, bytes, at)?;
            }
            _ => {}
        }
    }
    let frame = frame.ok_or("holds no picture")?;
    let coding = color::Coding::of(&frame, &tables)?;
    Ok((frame, coding))
}

/// A marker with a body.
struct Segment<'a> {
    marker: u8,
    body: &'a [u8],
    /// Where the next begins.
    end: usize,
}

/// The marker at or after `at`; `None` at the end of the picture.
fn segment(bytes: &[u8], at: usize) -> Result<Option<Segment<'_>>, String> {
    let mut at = at;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        let Some(start) = rest.iter().position(|byte| *byte == 0xFF) else {
            return Err(ENDS_EARLY.into());
        };
        let Some(skip) = rest[start..].iter().position(|byte| *byte != 0xFF) else {
            return Err(ENDS_EARLY.into());
        };
        let marker = rest[start + skip];
        at += start + skip + 1;
        match marker {
            0xD9 => return Ok(None),
            // Markers without a body, and what is no marker.
            0x00 | 0x01 | 0xD0..=0xD8 => {}
            _ => {
                let length = number(bytes, at)?;
                let body = bytes.get(at + 2..at + length).ok_or(ENDS_EARLY)?;
                return Ok(Some(Segment { marker, body, end: at + length }));
            }
        }
    }
}

const ENDS_EARLY: &str = "ends in the middle of the picture";

/// The two bytes at `at`.
fn number(bytes: &[u8], at: usize) -> Result<usize, String> {
    match bytes.get(at..at + 2) {
        Some(pair) => Ok(usize::from(pair[0]) << 8 | usize::from(pair[1])),
        None => Err(ENDS_EARLY.into()),
    }
}

impl Frame {
    fn read(body: &[u8], progressive: bool, file: usize) -> Result<Frame, String> {
        let [8, _, _, _, _, count @ (1 | 3 | 4), parts @ ..] = body else {
            let found = (body.first().unwrap_or(&0), body.get(5).unwrap_or(&0));
            return Err(format!(
                "has {} bits and {} components; 8 bits and 1, 3 or 4 are read",
                found.0, found.1
            ));
        };
        let (height, width) = (number(body, 1)?, number(body, 3)?);
        let parts: Vec<&[u8]> = parts.chunks_exact(3).take(usize::from(*count)).collect();
        if height == 0 || width == 0 || parts.len() != usize::from(*count) {
            return Err("has a frame without a size".into());
        }
        let factors = |part: &[u8]| (usize::from(part[1] >> 4), usize::from(part[1] & 15));
        let legal = |part: &&[u8]| {
            let (across, down) = factors(part);
            (1..=4).contains(&across) && (1..=4).contains(&down) && part[2] < 4
        };
        if !parts.iter().all(legal) {
            return Err("has an impossible frame header".into());
        }
        let across = parts.iter().map(|part| factors(part).0).max().unwrap_or(1);
        let down = parts.iter().map(|part| factors(part).1).max().unwrap_or(1);
        let mut frame = Frame { progressive, width, height, across, down, components: Vec::new() };
        let (units_wide, units_high) = (width.div_ceil(8 * across), height.div_ceil(8 * down));
        let mut coded = 0;
        for part in parts {
            let factors = factors(part);
            let component = Component {
                id: part[0],
                across: factors.0,
                down: factors.1,
                quantizer: usize::from(part[2]),
                width: (width * factors.0).div_ceil(across),
                height: (height * factors.1).div_ceil(down),
                blocks_wide: units_wide * factors.0,
                blocks_high: units_high * factors.1,
                ..Component::default()
            };
            if across % factors.0 != 0 || down % factors.1 != 0 {
                return Err("has fractional sampling factors; convert it to a common JPEG".into());
            }
            coded += component.width.div_ceil(8) * component.height.div_ceil(8);
            frame.components.push(component);
        }
        // Every block takes a bit at least, so a header cannot ask for memory that the file does not fill.
        if coded / 8 > file {
            return Err(ENDS_EARLY.into());
        }
        for component in &mut frame.components {
            component.coefficients = vec![0; component.blocks_wide * component.blocks_high * 64];
        }
        Ok(frame)
    }
}

impl Tables {
    fn quantizer(&mut self, mut body: &[u8]) -> Result<(), String> {
        while let [head, rest @ ..] = body {
            let (wide, slot) = (usize::from(head >> 4), usize::from(head & 15));
            let size = 64 * (wide + 1);
            if wide > 1 || slot > 3 || rest.len() < size {
                return Err("has a damaged quantization table".into());
            }
            let mut steps = [0; 64];
            for (index, step) in rest[..size].chunks_exact(wide + 1).enumerate() {
                steps[ZIGZAG[index]] = step.iter().fold(0, |value, byte| value << 8 | u16::from(*byte));
            }
            self.quantizers[slot] = Some(steps);
            body = &rest[size..];
        }
        Ok(())
    }

    fn huffman(&mut self, mut body: &[u8]) -> Result<(), String> {
        let damaged = || "has a damaged Huffman table".to_string();
        while let [head, rest @ ..] = body {
            let (class, slot) = (head >> 4, usize::from(head & 15));
            let counts = rest.first_chunk::<16>().ok_or_else(damaged)?;
            let total: usize = counts.iter().map(|count| usize::from(*count)).sum();
            let values = rest.get(16..16 + total).ok_or_else(damaged)?;
            if class > 1 || slot > 3 {
                return Err(damaged());
            }
            let table = Huffman::new(counts, values).ok_or_else(damaged)?;
            let tables = if class == 0 { &mut self.dc } else { &mut self.ac };
            tables[slot] = Some(table);
            body = &rest[16 + total..];
        }
        Ok(())
    }
}
