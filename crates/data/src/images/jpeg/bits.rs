//! Bits of entropy-coded data, and the Huffman codes in them (T.81 annex F.2.2).

use super::ENDS_EARLY;

/// Codes of up to this many bits are looked up at once.
const QUICK: u32 = 9;

/// A table of codes.
pub(super) struct Huffman {
    /// For each beginning of [`QUICK`] bits: the code's length (0: longer than that) and its value.
    quick: Vec<(u8, u8)>,
    /// For each length 1 to 16: one past the last code, and what to add to a code to find its value.
    ends: [(u32, i32); 17],
    values: Vec<u8>,
}

impl Huffman {
    /// The canonical code with `counts[n]` codes of n + 1 bits; `None` when there cannot be so many.
    pub fn new(counts: &[u8; 16], values: &[u8]) -> Option<Huffman> {
        let mut table =
            Huffman { quick: vec![(0, 0); 1 << QUICK], ends: [(0, 0); 17], values: values.to_vec() };
        let (mut code, mut index) = (0u32, 0usize);
        for (length, count) in (1u32..).zip(counts) {
            let offset = index as i32 - code as i32;
            for _ in 0..*count {
                let value = *values.get(index)?;
                if length <= QUICK {
                    let first = (code << (QUICK - length)) as usize;
                    let same = 1usize << (QUICK - length);
                    table.quick.get_mut(first..first + same)?.fill((length as u8, value));
                }
                code += 1;
                index += 1;
            }
            if code > 1 << length {
                return None;
            }
            table.ends[length as usize] = (code, offset);
            code <<= 1;
        }
        Some(table)
    }
}

/// Reads bits up to the next marker.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    held: u64,
    count: u32,
    /// Zeros put in after the end of the data; using one of them is an error.
    made_up: u32,
}

impl<'a> Bits<'a> {
    pub fn new(bytes: &'a [u8], at: usize) -> Bits<'a> {
        Bits { bytes, at, held: 0, count: 0, made_up: 0 }
    }

    fn fill(&mut self) {
        while self.count <= 48 {
            let byte = match (self.bytes.get(self.at), self.bytes.get(self.at + 1)) {
                (Some(0xFF), Some(0)) => {
                    self.at += 2;
                    0xFF
                }
                (None, _) | (Some(0xFF), _) => {
                    self.made_up += 8;
                    0
                }
                (Some(byte), _) => {
                    self.at += 1;
                    *byte
                }
            };
            self.held = self.held << 8 | u64::from(byte);
            self.count += 8;
        }
    }

    fn drop(&mut self, count: u32) -> Result<(), String> {
        self.count -= count;
        if self.count < self.made_up {
            return Err(ENDS_EARLY.into());
        }
        Ok(())
    }

    /// The next `count` bits, 16 at most.
    pub fn take(&mut self, count: u32) -> Result<u32, String> {
        if self.count < 16 {
            self.fill();
        }
        let bits = (self.held >> (self.count - count)) as u32 & ((1 << count) - 1);
        self.drop(count)?;
        Ok(bits)
    }

    /// A number of `size` bits whose first bit is its sign (T.81, EXTEND).
    pub fn number(&mut self, size: u32) -> Result<i32, String> {
        if size == 0 {
            return Ok(0);
        }
        let bits = self.take(size)? as i32;
        Ok(if bits < 1 << (size - 1) { bits - (1 << size) + 1 } else { bits })
    }

    /// The value of the next code.
    pub fn value(&mut self, table: &Huffman) -> Result<u8, String> {
        if self.count < 16 {
            self.fill();
        }
        let next = (self.held >> (self.count - 16)) as u32 & 0xFFFF;
        let (length, value) = table.quick[(next >> (16 - QUICK)) as usize];
        if length > 0 {
            self.drop(u32::from(length))?;
            return Ok(value);
        }
        for length in QUICK + 1..=16 {
            let code = next >> (16 - length);
            let (end, offset) = table.ends[length as usize];
            if code < end {
                self.drop(length)?;
                let index = usize::try_from(code as i32 + offset).ok();
                return index.and_then(|index| table.values.get(index)).copied().ok_or_else(damaged);
            }
        }
        Err(damaged())
    }

    /// Goes past the restart marker `number` (0 to 7), which must come next.
    pub fn restart(&mut self, number: u8) -> Result<(), String> {
        let at = self.end();
        if self.bytes.get(at + 1) != Some(&(0xD0 + number)) {
            return Err(damaged());
        }
        *self = Bits::new(self.bytes, at + 2);
        Ok(())
    }

    /// Where the next marker begins.
    pub fn end(&self) -> usize {
        let mut at = self.at;
        while let Some(byte) = self.bytes.get(at) {
            let marks = *byte == 0xFF && !matches!(self.bytes.get(at + 1), Some(0 | 0xFF));
            if marks {
                break;
            }
            at += 1;
        }
        at
    }
}

pub(super) fn damaged() -> String {
    "holds damaged data".into()
}
