//! The pool of f32 buffers: a step's buffers come from it and go back to it.
//!
//! Buffers are kept in size classes (eight to an octave), so that ragged batches find one of a similar size. The pool
//! never holds more than the largest amount that was ever live at once leaves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{LazyLock, Mutex};

use memmap2::MmapMut;

use crate::device::card;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);
static FREE: LazyLock<Mutex<Free>> = LazyLock::new(Default::default);

/// Elements from which a buffer has pages of its own: the allocator keeps what large vectors leave behind, in pieces that
/// batches of other sizes do not fit.
const PAGES_FROM: usize = 1 << 15;

/// Memory of a buffer.
pub(crate) enum Block {
    Small(Vec<f32>),
    Pages(MmapMut),
}

impl Default for Block {
    fn default() -> Self {
        Block::Small(Vec::new())
    }
}

impl Block {
    /// `len` zeros; memory from the system costs nothing until it is touched.
    fn zeroed(len: usize) -> Block {
        if len >= PAGES_FROM
            && let Ok(pages) = MmapMut::map_anon(4 * len)
        {
            return Block::Pages(pages);
        }
        Block::Small(vec![0.0; len])
    }

    fn len(&self) -> usize {
        self.as_slice().len()
    }

    pub(crate) fn as_slice(&self) -> &[f32] {
        match self {
            Block::Small(vector) => vector,
            Block::Pages(pages) => bytemuck::cast_slice(pages),
        }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        match self {
            Block::Small(vector) => vector,
            Block::Pages(pages) => bytemuck::cast_slice_mut(pages),
        }
    }
}

#[derive(Default)]
struct Free {
    by_size: BTreeMap<usize, Vec<Block>>,
    bytes: usize,
}

impl Free {
    /// The smallest buffer that holds `class` elements without wasting as much again.
    fn take(&mut self, class: usize) -> Option<Block> {
        let (&size, _) = self.by_size.range(class..=class * 2).next()?;
        self.take_of(size)
    }

    fn take_of(&mut self, size: usize) -> Option<Block> {
        let buffers = self.by_size.get_mut(&size)?;
        let found = buffers.pop();
        if buffers.is_empty() {
            self.by_size.remove(&size);
        }
        self.bytes -= found.as_ref().map_or(0, |b| b.len() * 4);
        found
    }

    /// Makes room for a new buffer of `class` elements where the pool holds none that suits: one that is a little too small
    /// goes, since batches have grown and the new buffer will do its work, and beyond `limit` bytes the largest go.
    fn make_room(&mut self, class: usize, limit: usize) {
        let size = self.by_size.range(class / 2..class).next_back().map(|(&size, _)| size);
        drop(size.and_then(|size| self.take_of(size)));
        self.shrink(class, limit, None);
    }

    /// Gives buffers back to the system, but none of `kept` elements, until `len` elements more fit into `limit` bytes: the
    /// smallest that makes room enough, or the largest where none does. Memory that is given back and asked for again costs as
    /// much as several passes over it.
    fn shrink(&mut self, len: usize, limit: usize, kept: Option<usize>) {
        while self.bytes + 4 * len > limit {
            let lacking = (self.bytes + 4 * len - limit).div_ceil(4);
            let mut sizes = self.by_size.keys().copied().filter(|size| Some(*size) != kept);
            let enough = sizes.find(|size| *size >= lacking);
            let found =
                enough.or_else(|| self.by_size.keys().rev().copied().find(|size| Some(*size) != kept));
            let Some(size) = found else { break };
            drop(self.take_of(size));
        }
    }

    /// Keeps `buffer`, giving others back to the system where the pool would hold more than `limit` bytes: batches
    /// change shape, and what was just used is what will be asked for again.
    fn keep(&mut self, buffer: Block, limit: usize) {
        let bytes = buffer.len() * 4;
        if bytes > limit {
            return;
        }
        self.shrink(buffer.len(), limit, Some(buffer.len()));
        if self.bytes + bytes <= limit {
            self.bytes += bytes;
            self.by_size.entry(buffer.len()).or_default().push(buffer);
        }
    }
}

/// Bytes in use now: of f32 buffers, or of the card where one is used.
pub fn live_bytes() -> usize {
    card().map_or_else(|| LIVE_BYTES.load(Relaxed), |card| card.memory().0)
}

/// Largest [`live_bytes`] since the last [`reset_peak`].
pub fn peak_bytes() -> usize {
    card().map_or_else(|| PEAK_BYTES.load(Relaxed), |card| card.memory().1)
}

/// Starts a new measurement of [`peak_bytes`].
pub fn reset_peak() {
    if let Some(card) = card() {
        card.reset_peak();
    }
    PEAK_BYTES.store(LIVE_BYTES.load(Relaxed), Relaxed);
}

/// Gives every pooled buffer back to the system.
pub fn trim() {
    *lock() = Free::default();
}

fn lock() -> std::sync::MutexGuard<'static, Free> {
    FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The capacity that serves `len` elements: the next of eight steps within an octave.
pub(crate) fn class_of(len: usize) -> usize {
    let len = len.max(64);
    let step = (len.next_power_of_two() / 16).max(1);
    len.div_ceil(step) * step
}

/// A buffer of at least `len` elements whose contents are arbitrary (but initialised) numbers.
pub(crate) fn take(len: usize) -> Block {
    let class = class_of(len);
    let pooled = {
        let mut free = lock();
        let found = free.take(class);
        if found.is_none() {
            free.make_room(class, PEAK_BYTES.load(Relaxed).saturating_sub(LIVE_BYTES.load(Relaxed)));
        }
        found
    };
    let buffer = pooled.unwrap_or_else(|| Block::zeroed(class));
    let bytes = buffer.len() * 4;
    let live = LIVE_BYTES.fetch_add(bytes, Relaxed) + bytes;
    PEAK_BYTES.fetch_max(live, Relaxed);
    buffer
}

/// Takes a buffer back. Only for buffers that came from [`take`], at their full length.
pub(crate) fn give(buffer: Block) {
    let bytes = buffer.len() * 4;
    let live = LIVE_BYTES.fetch_sub(bytes, Relaxed) - bytes;
    let limit = PEAK_BYTES.load(Relaxed).saturating_sub(live);
    lock().keep(buffer, limit);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_cover_their_lengths_with_little_waste() {
        for len in [1, 63, 64, 65, 1000, 4096, 4097, 1 << 20, (1 << 20) + 1] {
            let class = class_of(len);
            assert!(class >= len && (len < 64 || class <= len + len / 4), "{len} → {class}");
            assert_eq!(class_of(class), class, "a class must serve itself");
        }
    }

    #[test]
    fn small_and_large_blocks_are_zeros_that_can_be_written() {
        for len in [0, 100, PAGES_FROM - 1, PAGES_FROM, PAGES_FROM + 7] {
            let mut block = Block::zeroed(len);
            assert!(block.len() == len && block.as_slice().iter().all(|v| *v == 0.0));
            assert_eq!(matches!(block, Block::Pages(_)), len >= PAGES_FROM);
            block.as_mut_slice().fill(1.5);
            assert!(block.as_slice().iter().all(|v| *v == 1.5));
        }
    }

    #[test]
    fn a_larger_buffer_takes_the_place_of_one_that_is_outgrown() {
        let mut free = Free::default();
        [100, 120, 50].into_iter().for_each(|len| free.keep(Block::zeroed(len), 4000));
        free.make_room(130, 4000);
        assert_eq!(free.by_size.keys().copied().collect::<Vec<_>>(), [50, 100]);
        free.make_room(110, 4000);
        free.make_room(110, 4000);
        assert_eq!((free.by_size.len(), free.bytes), (1, 200), "50 is less than half of what was asked for");
        // Room for 20 elements beside those that are left.
        free.keep(Block::zeroed(100), 4000);
        free.make_room(20, 80 + 200);
        assert_eq!((free.by_size.len(), free.bytes), (1, 200), "the larger one went");
    }

    #[test]
    fn the_pool_keeps_what_was_used_last() {
        let mut free = Free::default();
        free.keep(Block::zeroed(100), 1000);
        free.keep(Block::zeroed(120), 1000);
        assert_eq!((free.bytes, free.by_size.len()), (880, 2));
        free.keep(Block::zeroed(60), 1000);
        assert_eq!(free.bytes, 720, "the smallest buffer that makes room enough went");
        assert!(free.take(130).is_none(), "nothing is large enough");
        assert_eq!(free.take(64).map(|b| b.len()), Some(120));
        assert!(free.take(20).is_none(), "three times what is needed is too much");
        free.keep(Block::zeroed(500), 1000);
        assert_eq!(
            (free.take(60).map(|b| b.len()), free.bytes),
            (Some(60), 0),
            "what alone is beyond the limit is not kept, and takes nothing with it"
        );
    }
}
