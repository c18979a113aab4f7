//! bf16 products on the tiles of AMX: a register of 16 rows × 64 bytes, and an instruction that adds the product of two of them
//! to a third.
//!
//! `tdpbf16ps c, a, b` multiplies 16 rows × 32 k of the left side with 32 k × 16 columns of weights, the latter as 16 rows of
//! bf16 pairs: the form that panels have anyway. It takes subnormal numbers as zero and adds pair after pair, so that an
//! element's bits depend on its own row and column alone. The panels' k and the left side are filled with zeros up to a
//! multiple of 32, and every number of rows takes this path, one row too: reading its weights takes longer than multiplying.
//!
//! Stable Rust has no names for these instructions, hence assembly. A block is one piece of it, since nothing may be left in
//! a tile from one piece to the next.

use std::arch::asm;
use std::arch::x86_64::{__m512bh, _mm512_cvtne2ps_pbh, _mm512_loadu_ps};
use std::ops::Range;
use std::sync::OnceLock;
use std::time::Instant;

use super::lanes::Lanes;
use super::pack::{Words, transposed_panel};
use super::product::{Chunk, Direction, Scratch, in_edge, out_of_edge, prefetch_rows};
use super::tile::{Init, Run};

/// Rows of a tile.
const TILE_ROWS: usize = 16;

/// k of a tile.
const TILE_K: usize = 32;

/// Words of a tile.
const TILE_WORDS: usize = 256;

/// Words in a row of a panel.
const PANEL_WIDTH: usize = 64;

/// Rows and columns of a block of two by two tiles: a load for every product, where one tile alone would need two.
const BLOCK: usize = 2 * TILE_ROWS;

/// k of a run at most. A block goes through a whole run without leaving its tiles: sums that go to memory and come back cost
/// more than operands from the second-level cache.
const FORWARD_K: usize = 2048;

/// The same backward, where more rows of shorter runs share a transposed panel.
const BACKWARD_K: usize = 1024;

/// Whether the processor has the tiles and their bf16 product, and the system lets this process use them.
pub(super) fn is_available() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| {
        const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
        let highest = std::arch::x86_64::__cpuid(0).eax;
        highest >= 7
            && std::arch::x86_64::__cpuid_count(7, 0).edx & BF16_AND_TILE == BF16_AND_TILE
            && ask_for_tiles()
    })
}

/// Linux grants the 8 KiB of tiles that a thread's state grows by to a whole process, when asked.
#[cfg(target_os = "linux")]
fn ask_for_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILE_DATA: libc::c_long = 18;
    // SAFETY: the call reads no memory of ours; a system that does not know it answers with an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0 }
}

/// Other systems are not asked.
#[cfg(not(target_os = "linux"))]
fn ask_for_tiles() -> bool {
    false
}

/// The shapes of the eight tiles, as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// The shapes that are in force on this thread; gives the tiles up when dropped.
struct Tiles {
    upper: usize,
    lower: usize,
}

impl Tiles {
    /// Shapes for blocks whose upper tiles have `upper` rows and whose lower ones `lower`.
    ///
    /// # Safety
    /// [`is_available`].
    unsafe fn shape(&mut self, upper: usize, lower: usize) {
        if (self.upper, self.lower) == (upper, lower) {
            return;
        }
        (self.upper, self.lower) = (upper, lower);
        let mut shapes =
            Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        shapes.row_bytes[..8].fill(64);
        let (upper, lower, all) = (upper as u8, lower as u8, TILE_ROWS as u8);
        shapes.rows[..8].copy_from_slice(&[upper, upper, lower, lower, upper, lower, all, all]);
        // SAFETY: the caller's promise; `shapes` has the 64 bytes of the first palette, with 1 to 16 rows of 64 bytes each.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        if self.upper > 0 {
            // SAFETY: shapes are in force, so the processor has the instruction.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
}

impl Chunk<'_> {
    /// All of this chunk.
    ///
    /// # Safety
    /// The processor has the instructions of the lanes, AVX512-BF16 among them, and [`is_available`].
    #[inline(always)]
    pub(super) unsafe fn tiles<L: Lanes, const NV: usize>(&self, scratch: &mut Scratch) {
        let (product, layout) = (self.product, self.product.layout);
        assert!(L::WIDTH * NV == PANEL_WIDTH, "a panel has four tiles");
        let backward = product.direction == Direction::Backward;
        let run_k = match (backward, self.rows.len() <= BLOCK) {
            (true, _) => BACKWARD_K,
            // The left side of one block is small whatever its length, and its weights are read in the order of memory.
            (false, true) => product.k().next_multiple_of(TILE_K),
            (false, false) => FORWARD_K,
        };
        let longest = run_k.min(product.k().next_multiple_of(PANEL_WIDTH));
        scratch.left.reserve(self.rows.len().next_multiple_of(TILE_ROWS) * longest / 2);
        if backward {
            scratch.panel.reserve(longest / 2 * PANEL_WIDTH);
        }
        let (left, transposed) = (scratch.left.as_mut_slice(), scratch.panel.as_mut_slice());
        let mut tiles = Tiles { upper: 0, lower: 0 };
        for k0 in (0..product.k()).step_by(run_k) {
            let k = run_k.min(product.k() - k0);
            // SAFETY: the caller's promise; `left` has room for the run.
            unsafe { self.pack_tiles(k0, k, left) };
            for panel in self.panels.clone() {
                // SAFETY: the caller's promise; `run_k` is a multiple of the panels' width, and `transposed` holds a whole run.
                // Panels of a tiled layout have whole tiles of k.
                unsafe {
                    let weights = if backward {
                        transposed_panel::<L, NV>(
                            layout,
                            product.words,
                            panel,
                            k0,
                            k,
                            transposed.as_mut_ptr(),
                        );
                        transposed.as_ptr()
                    } else {
                        product.words[panel * layout.panel_words() + k0 / 2 * PANEL_WIDTH..].as_ptr()
                    };
                    let run = TiledRun { panel, first: k0 == 0, steps: k.div_ceil(TILE_K), left, weights };
                    self.tiled_panel::<L>(&mut tiles, &run);
                }
            }
        }
    }

    /// Rounds this chunk's rows for the run `k0 .. k0 + k`, as `[tiles of rows, tiles of k, 16 rows, 16 words]`.
    ///
    /// # Safety
    /// The processor has AVX512-BF16.
    #[inline(always)]
    unsafe fn pack_tiles(&self, k0: usize, k: usize, left: &mut [u32]) {
        let product = self.product;
        let across = k.div_ceil(TILE_K);
        for (i, r) in self.rows.clone().enumerate() {
            let row = &product.a[r * product.a_stride + k0..][..k];
            let first = i / TILE_ROWS * across * TILE_WORDS + i % TILE_ROWS * TILE_ROWS;
            let places = left[first..].chunks_mut(TILE_WORDS);
            let (whole, rest) = row.as_chunks::<TILE_K>();
            let mut last = [0.0; TILE_K];
            last[..rest.len()].copy_from_slice(rest);
            let values = whole.iter().chain((!rest.is_empty()).then_some(&last));
            for (place, values) in places.zip(values) {
                // SAFETY: the caller's promise; `values` are 32, and 16 words of them are written.
                unsafe { round_tile_row(values, &mut place[..TILE_ROWS]) };
            }
        }
    }

    /// All rows of this chunk times one panel. Each row of blocks also asks for the next one's place in the result.
    ///
    /// # Safety
    /// [`is_available`]; the pieces of `run` are what it says.
    #[inline(always)]
    unsafe fn tiled_panel<L: Lanes>(&self, tiles: &mut Tiles, run: &TiledRun) {
        let (product, rows) = (self.product, self.rows.len());
        let columns = PANEL_WIDTH.min(product.n() - run.panel * PANEL_WIDTH);
        // Rows that fill no more than an upper tile take the whole width at once.
        let last = if rows % BLOCK <= TILE_ROWS { rows % BLOCK } else { 0 };
        for row in (0..rows - last).step_by(BLOCK) {
            let high = BLOCK.min(rows - row);
            // SAFETY: the caller's promise; places that are asked for need not exist.
            unsafe {
                let c = self.target.0.wrapping_add((self.rows.start + row) * product.c_stride);
                let c = c.wrapping_add(run.panel * PANEL_WIDTH);
                prefetch_rows::<L>(c, product.c_stride, BLOCK..2 * BLOCK, columns);
                tiles.shape(TILE_ROWS, high - TILE_ROWS);
                for column in (0..columns).step_by(BLOCK) {
                    self.block(run, row..row + high, column..columns.min(column + BLOCK));
                }
            }
        }
        if last > 0 {
            // SAFETY: the caller's promise.
            unsafe {
                tiles.shape(last, last);
                self.block(run, rows - last..rows, 0..columns);
            }
        }
    }

    /// One block: `rows` of the chunk times `columns` of the panel.
    ///
    /// # Safety
    /// [`is_available`], with shapes for these rows in force; the pieces of `run` are what it says.
    #[inline(always)]
    unsafe fn block(&self, run: &TiledRun, rows: Range<usize>, columns: Range<usize>) {
        let product = self.product;
        let column = run.panel * PANEL_WIDTH + columns.start;
        let row_words = run.steps * TILE_WORDS;
        let width = if rows.len() <= TILE_ROWS { PANEL_WIDTH } else { BLOCK };
        // SAFETY: the chunk's rows and this panel's columns lie inside `c` and belong to this thread alone; a block narrower
        // than its tiles is computed in `edge`, which holds 16 rows of 64 columns and 32 of 32.
        unsafe {
            let c = self.target.0.add((self.rows.start + rows.start) * product.c_stride + column);
            let init = match run.first {
                true => product.init(c, column),
                false => Init { at: c, row_stride: product.c_stride },
            };
            let run = Run {
                a: run.left[rows.start / TILE_ROWS * row_words..].as_ptr(),
                b: run.weights.add(columns.start),
                b_stride: 0,
                steps: run.steps,
                init,
                c,
                c_stride: product.c_stride,
            };
            if columns.len() == width {
                return multiply(width, &run, row_words);
            }
            let mut edge = [0u32; BLOCK * BLOCK];
            let inside = in_edge(rows.len(), columns.len(), width, &run, &mut edge);
            multiply(width, &inside, row_words);
            out_of_edge(rows.len(), columns.len(), width, &run, &edge);
        }
    }
}

/// One panel over one run of k.
struct TiledRun<'a> {
    panel: usize,
    /// Whether the sums start here.
    first: bool,
    /// Tiles of k.
    steps: usize,
    /// `[tiles of rows, steps, 16 rows, 16 words]`
    left: &'a [u32],
    /// `[16 · steps, 64]`
    weights: *const u32,
}

/// A block of one row of four tiles (`width` 64) or of two rows of two, the second row of the left side `lower` words after
/// the first.
///
/// # Safety
/// As for [`four_tiles`] and [`two_by_two`].
#[inline(always)]
unsafe fn multiply(width: usize, run: &Run, lower: usize) {
    // SAFETY: the caller's promise.
    unsafe { if width == PANEL_WIDTH { four_tiles(run) } else { two_by_two(run, lower) } }
}

/// # Safety
/// [`is_available`]; shapes are in force for rows whose pointers in `run` are good, `a` for 16 rows of each step.
#[inline(always)]
unsafe fn two_by_two(run: &Run, lower: usize) {
    let init_stride = 4 * run.init.row_stride;
    let c_stride = 4 * run.c_stride;
    // Weights are asked for two steps ahead, since the prefetcher does not follow rows that lie apart.
    // SAFETY: the caller's promise. Tiles 0 to 3 are sums, 4 and 5 the left side, 6 and 7 weights; a step of the left side is
    // 1 KiB in rows of 64 bytes, one of a panel 4 KiB in rows of 256. What is asked for ahead need not exist.
    unsafe {
        asm!(
            "test {init}, {init}",
            "jz 2f",
            "tileloadd tmm0, [{init} + {init_stride}]",
            "tileloadd tmm1, [{init} + {init_stride} + 64]",
            "tileloadd tmm2, [{init_lower} + {init_stride}]",
            "tileloadd tmm3, [{init_lower} + {init_stride} + 64]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{a} + {row}]",
            "tileloadd tmm6, [{b} + 4*{row}]",
            "tileloadd tmm7, [{b} + 4*{row} + 64]",
            "tileloadd tmm5, [{a_lower} + {row}]",
            ".irp row_of_16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "prefetcht0 [{b} + 2*4096 + 256*\\row_of_16]",
            "prefetcht0 [{b} + 2*4096 + 256*\\row_of_16 + 64]",
            ".endr",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 1024",
            "add {a_lower}, 1024",
            "add {b}, 4096",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c} + {c_stride}], tmm0",
            "tilestored [{c} + {c_stride} + 64], tmm1",
            "tilestored [{c_lower} + {c_stride}], tmm2",
            "tilestored [{c_lower} + {c_stride} + 64], tmm3",
            init = in(reg) run.init.at,
            init_lower = in(reg) run.init.at.wrapping_byte_add(TILE_ROWS * init_stride),
            init_stride = in(reg) init_stride,
            a = inout(reg) run.a => _,
            a_lower = inout(reg) run.a.wrapping_add(lower) => _,
            b = inout(reg) run.b => _,
            row = in(reg) 64usize,
            steps = inout(reg) run.steps => _,
            c = in(reg) run.c,
            c_lower = in(reg) run.c.wrapping_byte_add(TILE_ROWS * c_stride),
            c_stride = in(reg) c_stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// # Safety
/// As for [`two_by_two`], for at most 16 rows.
#[inline(always)]
unsafe fn four_tiles(run: &Run) {
    // SAFETY: as in `two_by_two`.
    unsafe {
        asm!(
            "test {init}, {init}",
            "jz 2f",
            "tileloadd tmm0, [{init} + {init_stride}]",
            "tileloadd tmm1, [{init} + {init_stride} + 64]",
            "tileloadd tmm2, [{init} + {init_stride} + 128]",
            "tileloadd tmm3, [{init} + {init_stride} + 192]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{a} + {row}]",
            "tileloadd tmm6, [{b} + 4*{row}]",
            ".irp row_of_16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "prefetcht0 [{b} + 2*4096 + 256*\\row_of_16]",
            "prefetcht0 [{b} + 2*4096 + 256*\\row_of_16 + 64]",
            "prefetcht0 [{b} + 2*4096 + 256*\\row_of_16 + 128]",
            "prefetcht0 [{b} + 2*4096 + 256*\\row_of_16 + 192]",
            ".endr",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + 4*{row} + 64]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm6, [{b} + 4*{row} + 128]",
            "tdpbf16ps tmm2, tmm4, tmm6",
            "tileloadd tmm7, [{b} + 4*{row} + 192]",
            "tdpbf16ps tmm3, tmm4, tmm7",
            "add {a}, 1024",
            "add {b}, 4096",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{c} + {c_stride}], tmm0",
            "tilestored [{c} + {c_stride} + 64], tmm1",
            "tilestored [{c} + {c_stride} + 128], tmm2",
            "tilestored [{c} + {c_stride} + 192], tmm3",
            init = in(reg) run.init.at,
            init_stride = in(reg) 4 * run.init.row_stride,
            a = inout(reg) run.a => _,
            b = inout(reg) run.b => _,
            row = in(reg) 64usize,
            steps = inout(reg) run.steps => _,
            c = in(reg) run.c,
            c_stride = in(reg) 4 * run.c_stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// The best rate of two by two tiles on operands in the first cache, in floating-point operations a second: that of one short run.
///
/// # Safety
/// [`is_available`].
pub(super) unsafe fn measure() -> f64 {
    const STEPS: usize = 8;
    const RUNS: usize = 64;
    let words = Words::zeroed(STEPS * TILE_ROWS * PANEL_WIDTH);
    let mut sums = Words::zeroed(BLOCK * BLOCK);
    let (words, sums) = (words.as_slice().as_ptr(), sums.as_mut_slice().as_mut_ptr());
    let mut tiles = Tiles { upper: 0, lower: 0 };
    let init = Init { at: sums, row_stride: BLOCK };
    let run = Run { a: words, b: words, b_stride: 0, steps: STEPS, init, c: sums, c_stride: BLOCK };
    // SAFETY: the caller's promise; `words` hold the steps of a panel, and so of two rows of the left side, `sums` a block.
    unsafe {
        tiles.shape(TILE_ROWS, TILE_ROWS);
        let start = Instant::now();
        for _ in 0..RUNS {
            two_by_two(&run, STEPS * TILE_WORDS);
        }
        (2 * RUNS * STEPS * TILE_K * BLOCK * BLOCK) as f64 / start.elapsed().as_secs_f64()
    }
}

/// Rounds 32 values to the nearest bf16, ties to even. Subnormal numbers become zero, as the product takes them.
///
/// # Safety
/// The processor has AVX512-BF16; `into` are 16 words.
#[inline(always)]
unsafe fn round_tile_row(values: &[f32; TILE_K], into: &mut [u32]) {
    assert!(into.len() == TILE_ROWS);
    // SAFETY: the caller's promise about the processor; the line above proves that `into` takes a register.
    unsafe {
        let (low, high) = (_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values[16..].as_ptr()));
        into.as_mut_ptr().cast::<__m512bh>().write_unaligned(_mm512_cvtne2ps_pbh(high, low));
    }
}
