//! Scans: coefficients of blocks from entropy-coded data, sequential and progressive (T.81 annexes F.2 and G.2).

use super::bits::{Bits, Huffman, damaged};
use super::{Component, Frame, Tables, ZIGZAG};

/// Which coefficients a scan holds (first to last in zigzag order), and which of their bits.
#[derive(Clone, Copy)]
struct Band {
    first: usize,
    last: usize,
    /// Bits that earlier scans gave; 0 when this is the first.
    high: u8,
    /// Bits still to come.
    low: u8,
}

/// A component of the scan with its tables; tables that the scan does not need may be absent.
struct Part<'a> {
    component: usize,
    dc: Option<&'a Huffman>,
    ac: Option<&'a Huffman>,
    /// The last DC value.
    before: i32,
}

/// Reads the scan with the header `body`, whose data begin at `at`, into `frame`; gives where the next marker is.
pub(super) fn read(
    frame: &mut Frame,
    tables: &Tables,
    body: &[u8],
    bytes: &[u8],
    at: usize,
) -> Result<usize, String> {
    let (mut parts, band) = header(frame, tables, body)?;
    let (wide, high) = match &parts[..] {
        // A component alone comes block by block, without the blocks past the picture.
        [only] => {
            let component = &frame.components[only.component];
            (component.width.div_ceil(8), component.height.div_ceil(8))
        }
        _ => (frame.width.div_ceil(8 * frame.across), frame.height.div_ceil(8 * frame.down)),
    };
    let alone = parts.len() == 1;
    let mut reader = Reader { bits: Bits::new(bytes, at), band, progressive: frame.progressive, run: 0 };
    for unit in 0..wide * high {
        if tables.restart > 0 && unit > 0 && unit % tables.restart == 0 {
            reader.bits.restart(((unit / tables.restart - 1) % 8) as u8)?;
            reader.run = 0;
            parts.iter_mut().for_each(|part| part.before = 0);
        }
        let (row, column) = (unit / wide, unit % wide);
        for part in &mut parts {
            let component = &mut frame.components[part.component];
            let (across, down) = if alone { (1, 1) } else { (component.across, component.down) };
            for block in 0..across * down {
                let place =
                    (row * down + block / across) * component.blocks_wide + column * across + block % across;
                let block =
                    component.coefficients[place * 64..].first_chunk_mut::<64>().ok_or_else(damaged)?;
                reader.block(block, part)?;
            }
        }
    }
    Ok(reader.bits.end())
}

fn header<'a>(frame: &mut Frame, tables: &'a Tables, body: &[u8]) -> Result<(Vec<Part<'a>>, Band), String> {
    let wrong = || "has a damaged scan header".to_string();
    let (count, rest) = body.split_first().ok_or_else(wrong)?;
    let count = usize::from(*count);
    if count == 0 || count > frame.components.len() || rest.len() < count * 2 + 3 {
        return Err(wrong());
    }
    let limits = &rest[count * 2..];
    let mut band =
        Band { first: limits[0].into(), last: limits[1].into(), high: limits[2] >> 4, low: limits[2] & 15 };
    if !frame.progressive {
        band = Band { first: 0, last: 63, high: 0, low: 0 };
    }
    let kept_apart = if band.first == 0 { band.last == 0 } else { count == 1 };
    let sound = band.first <= band.last && band.last < 64 && band.low < 14;
    if frame.progressive && !(kept_apart && sound) {
        return Err(wrong());
    }
    let mut parts: Vec<Part> = Vec::with_capacity(count);
    for choice in rest[..count * 2].chunks_exact(2) {
        let index =
            frame.components.iter().position(|component| component.id == choice[0]).ok_or_else(wrong)?;
        if parts.iter().any(|part| part.component == index) {
            return Err(wrong());
        }
        let slot =
            |slots: &'a [Option<Huffman>; 4], slot: u8| slots.get(usize::from(slot)).and_then(Option::as_ref);
        let (dc, ac) = (slot(&tables.dc, choice[1] >> 4), slot(&tables.ac, choice[1] & 15));
        let needs_dc = band.first == 0 && band.high == 0;
        if needs_dc && dc.is_none() || band.last > 0 && ac.is_none() {
            return Err("lacks a Huffman table".into());
        }
        keep_steps(&mut frame.components[index], tables)?;
        parts.push(Part { component: index, dc, ac, before: 0 });
    }
    Ok((parts, band))
}

/// A component is scaled by the table that stood when its first scan began.
fn keep_steps(component: &mut Component, tables: &Tables) -> Result<(), String> {
    if component.steps.is_none() {
        let steps = tables.quantizers[component.quantizer].ok_or("lacks a quantization table")?;
        component.steps = Some(steps);
    }
    Ok(())
}

struct Reader<'a> {
    bits: Bits<'a>,
    band: Band,
    progressive: bool,
    /// Blocks, this one included, that hold nothing more in this band.
    run: u32,
}

impl Reader<'_> {
    fn block(&mut self, block: &mut [i16; 64], part: &mut Part) -> Result<(), String> {
        match (self.progressive, self.band.first, self.band.high) {
            (false, _, _) => {
                block[0] = self.dc(part)? as i16;
                self.sequential(block, part.ac.ok_or_else(damaged)?)
            }
            (true, 0, 0) => {
                block[0] = (self.dc(part)? << self.band.low) as i16;
                Ok(())
            }
            (true, 0, _) => {
                block[0] |= (self.bits.take(1)? << self.band.low) as i16;
                Ok(())
            }
            (true, _, 0) => self.first(block, part.ac.ok_or_else(damaged)?),
            (true, _, _) => self.refine(block, part.ac.ok_or_else(damaged)?),
        }
    }

    /// The DC value, coded as the difference to the one before.
    fn dc(&mut self, part: &mut Part) -> Result<i32, String> {
        let size = u32::from(self.bits.value(part.dc.ok_or_else(damaged)?)?);
        if size > 15 {
            return Err(damaged());
        }
        part.before = part.before.wrapping_add(self.bits.number(size)?);
        Ok(part.before)
    }

    /// (zeros to skip, size of the value after them).
    fn symbol(&mut self, table: &Huffman) -> Result<(usize, u32), String> {
        let value = self.bits.value(table)?;
        Ok((usize::from(value >> 4), u32::from(value & 15)))
    }

    fn sequential(&mut self, block: &mut [i16; 64], table: &Huffman) -> Result<(), String> {
        let mut index = 1;
        while index < 64 {
            let (zeros, size) = self.symbol(table)?;
            match (zeros, size) {
                (15, 0) => index += 16,
                (_, 0) => break,
                _ => {
                    index += zeros;
                    let place = *ZIGZAG.get(index).ok_or_else(damaged)?;
                    block[place] = self.bits.number(size)? as i16;
                    index += 1;
                }
            }
        }
        Ok(())
    }

    fn first(&mut self, block: &mut [i16; 64], table: &Huffman) -> Result<(), String> {
        if self.run > 0 {
            self.run -= 1;
            return Ok(());
        }
        let mut index = self.band.first;
        while index <= self.band.last {
            let (zeros, size) = self.symbol(table)?;
            match (zeros, size) {
                (15, 0) => index += 16,
                (power, 0) => {
                    self.run = (1 << power) + self.bits.take(power as u32)? - 1;
                    break;
                }
                _ => {
                    index += zeros;
                    let place = *ZIGZAG.get(index).ok_or_else(damaged)?;
                    block[place] = (self.bits.number(size)? << self.band.low) as i16;
                    index += 1;
                }
            }
        }
        Ok(())
    }

    /// One more bit of the values that are there, and new values of one bit between them.
    fn refine(&mut self, block: &mut [i16; 64], table: &Huffman) -> Result<(), String> {
        let mut index = self.band.first;
        if self.run == 0 {
            while index <= self.band.last {
                let (mut zeros, size) = self.symbol(table)?;
                let mut new = 0;
                if size > 0 {
                    new = if self.bits.take(1)? == 1 { 1 << self.band.low } else { -1 << self.band.low };
                } else if zeros < 15 {
                    self.run = (1 << zeros) + self.bits.take(zeros as u32)?;
                    break;
                }
                while index <= self.band.last {
                    let value = &mut block[ZIGZAG[index]];
                    if *value != 0 {
                        self.correct(value)?;
                    } else if zeros == 0 {
                        *value = new;
                        break;
                    } else {
                        zeros -= 1;
                    }
                    index += 1;
                }
                index += 1;
            }
        }
        if self.run > 0 {
            for place in &ZIGZAG[index..=self.band.last] {
                if block[*place] != 0 {
                    self.correct(&mut block[*place])?;
                }
            }
            self.run -= 1;
        }
        Ok(())
    }

    fn correct(&mut self, value: &mut i16) -> Result<(), String> {
        let bit = 1i16 << self.band.low;
        if self.bits.take(1)? == 1 && *value & bit == 0 {
            *value = if *value > 0 { value.wrapping_add(bit) } else { value.wrapping_sub(bit) };
        }
        Ok(())
    }
}
