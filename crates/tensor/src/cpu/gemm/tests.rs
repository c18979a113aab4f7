//! Every instruction set this machine has, and the AVX-512 tile on emulated lanes, against sums in f64.

use std::ops::Range;

use super::*;

/// Shapes `(rows, out, in)` around every edge: one, odd, tile and panel widths and their neighbours, several runs of k.
const SHAPES: [(usize, usize, usize); 18] = [
    (1, 1, 1),
    (1, 17, 5),
    (2, 8, 64),
    (3, 63, 7),
    (5, 65, 66),
    (6, 16, 16),
    (7, 130, 257),
    (13, 15, 513),
    (1, 64, 300),
    (4, 129, 1),
    (12, 1, 40),
    (241, 33, 20),
    (9, 515, 31),
    (8, 300, 1027),
    (16, 32, 32),
    (33, 97, 2100),
    (49, 1100, 65),
    (31, 64, 95),
];

const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

fn sets() -> Vec<Isa> {
    let mut sets = Isa::available();
    sets.push(Isa::Emulated512);
    sets
}

/// Values in [-1, 1) from a small linear congruence.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn pack(isa: Isa, out: usize, inn: usize, precision: Precision, w: &[f32]) -> PackedMatrix {
    PackedMatrix::pack_for(isa, out, inn, precision, &mut |rows, dense| {
        dense.copy_from_slice(&w[rows.start * inn..rows.end * inn]);
    })
}

/// Checks `got[r][j]` against `start + Σ a[r][k] · b(k, j)`: the error of f32 sums grows with the sum of magnitudes.
fn check(
    what: &str,
    got: &[f32],
    (rows, n, k): (usize, usize, usize),
    start: &dyn Fn(usize, usize) -> f32,
    term: &dyn Fn(usize, usize, usize) -> f64,
) {
    for r in 0..rows {
        for j in 0..n {
            let start = f64::from(start(r, j));
            let (mut sum, mut magnitude) = (start, start.abs());
            for i in 0..k {
                sum += term(r, i, j);
                magnitude += term(r, i, j).abs();
            }
            let error = (f64::from(got[r * n + j]) - sum).abs();
            // Rounding errors of k sums add up like a walk; 2^-24 is one of them.
            let allowed = magnitude * (4.0 + (k as f64).sqrt()) * 2f64.powi(-24);
            assert!(error <= allowed, "{what}: [{r}, {j}] is {} and should be {sum}", got[r * n + j]);
        }
    }
}

fn rounded(p: Precision, values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(p.round(*v))).collect()
}

#[test]
fn products_equal_sums_in_f64() {
    for isa in sets() {
        for precision in BOTH {
            for (rows, out, inn) in SHAPES {
                let what = format!("{} {precision:?} {rows} x {out} x {inn}", isa.name());
                let (w, x, dy) = (values(out * inn, 1), values(rows * inn, 2), values(rows * out, 3));
                let (bias, before) = (values(out, 4), values(rows * inn, 5));
                let (wr, xr, dyr) = (rounded(precision, &w), rounded(precision, &x), rounded(precision, &dy));
                let packed = pack(isa, out, inn, precision, &w);
                let forward = |r: usize, k: usize, j: usize| xr[r * inn + k] * wr[j * inn + k];
                let backward = |r: usize, k: usize, j: usize| dyr[r * out + k] * wr[k * inn + j];

                let mut y = vec![f32::NAN; rows * out];
                packed.forward(&x, rows, None, &mut y);
                check(&format!("forward {what}"), &y, (rows, out, inn), &|_, _| 0.0, &forward);
                packed.forward(&x, rows, Some(&bias), &mut y);
                check(&format!("bias {what}"), &y, (rows, out, inn), &|_, j| bias[j], &forward);

                let mut dx = vec![f32::NAN; rows * inn];
                packed.backward(&dy, rows, false, &mut dx);
                check(&format!("backward {what}"), &dx, (rows, inn, out), &|_, _| 0.0, &backward);
                dx.copy_from_slice(&before);
                packed.backward(&dy, rows, true, &mut dx);
                let start = |r: usize, j: usize| before[r * inn + j];
                check(&format!("accumulate {what}"), &dx, (rows, inn, out), &start, &backward);
            }
        }
    }
}

#[test]
fn unpacking_gives_the_rounded_weights_back() {
    for isa in sets() {
        for precision in BOTH {
            for (out, inn) in [(1, 1), (70, 33), (16, 128), (131, 7)] {
                let w = values(out * inn, 7);
                let packed = pack(isa, out, inn, precision, &w);
                let (from, to) = (out / 3, out);
                let mut dense = vec![f32::NAN; (to - from) * inn];
                packed.unpack(from..to, &mut dense);
                let expected: Vec<f32> = w[from * inn..].iter().map(|v| precision.round(*v)).collect();
                assert_eq!(dense, expected, "{} {precision:?} {out} x {inn}", isa.name());
            }
        }
    }
}

#[test]
fn large_matrices_are_asked_for_block_by_block() {
    let (out, inn) = (700, 4096);
    let mut asked: Vec<Range<usize>> = Vec::new();
    let packed = PackedMatrix::pack(out, inn, Precision::Bf16, &mut |rows, dense| {
        for (row, dense) in rows.clone().zip(dense.chunks_exact_mut(inn)) {
            dense.fill(row as f32);
        }
        asked.push(rows);
    });
    assert!(asked.len() > 1 && asked.windows(2).all(|two| two[0].end == two[1].start), "{asked:?}");
    assert_eq!((asked[0].start, asked.last().map(|last| last.end)), (0, Some(out)));
    let mut row = vec![0.0; inn];
    packed.unpack(601..602, &mut row);
    assert!(row.iter().all(|v| *v == Precision::Bf16.round(601.0)));
    assert!(packed.bytes() <= (out + 64) * inn * 2, "one bf16 a weight, panels rounded up");
}

#[test]
fn bits_do_not_depend_on_threads_or_on_other_rows() {
    // The second shape takes several runs of k in both directions.
    for isa in Isa::available() {
        for precision in BOTH {
            for shape in [(247, 530, 519), (67, 1100, 2100)] {
                same_bits(isa, precision, shape);
            }
        }
    }
}

fn same_bits(isa: Isa, precision: Precision, (rows, out, inn): (usize, usize, usize)) {
    let (w, x, dy) = (values(out * inn, 1), values(rows * inn, 2), values(rows * out, 3));
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let packed = pack(isa, out, inn, precision, &w);
    let both = |rows: usize, first: usize| {
        let (mut y, mut dx) = (vec![0.0; rows * out], vec![0.0; rows * inn]);
        packed.forward(&x[first * inn..][..rows * inn], rows, None, &mut y);
        packed.backward(&dy[first * out..][..rows * out], rows, false, &mut dx);
        (y, dx)
    };
    let (y, dx) = pool(1).install(|| both(rows, 0));
    for threads in [2, 5] {
        assert_eq!(pool(threads).install(|| both(rows, 0)), (y.clone(), dx.clone()), "{threads} threads");
    }
    // All heights of few rows, and more.
    for some in (1..=17).chain([31, 32, 33]) {
        let first = 19 * some % (rows - some);
        let (y_some, dx_some) = both(some, first);
        let what = format!("{} {precision:?}: {some} rows from {first} on", isa.name());
        assert_eq!(y_some, y[first * out..][..some * out], "{what}");
        assert_eq!(dx_some, dx[first * inn..][..some * inn], "{what}");
    }
}

struct Dense(usize, usize, Vec<f32>);

impl RowSource for Dense {
    fn shape(&self) -> (usize, usize) {
        (self.0, self.1)
    }
    fn rows(&self, rows: Range<usize>, dense: &mut [f32]) {
        dense.copy_from_slice(&self.2[rows.start * self.1..rows.end * self.1]);
    }
}

#[test]
fn streamed_products_have_the_bits_of_packed_ones() {
    // The second shape takes several slabs.
    for (rows, out, inn) in [(3, 37, 11), (9, 610, 4100)] {
        let source = Dense(out, inn, values(out * inn, 1));
        let (x, dy, bias) = (values(rows * inn, 2), values(rows * out, 3), values(out, 4));
        for precision in BOTH {
            let packed = pack(isa(), out, inn, precision, &source.2);
            let (mut y, mut streamed_y) = (vec![0.0; rows * out], vec![f32::NAN; rows * out]);
            packed.forward(&x, rows, Some(&bias), &mut y);
            streamed_forward(&source, precision, &x, rows, Some(&bias), &mut streamed_y);
            assert_eq!(y, streamed_y, "{precision:?} {rows} x {out} x {inn}");
            for accumulate in [false, true] {
                let (mut dx, mut streamed_dx) = (x.clone(), x.clone());
                packed.backward(&dy, rows, accumulate, &mut dx);
                streamed_backward(&source, precision, &dy, rows, accumulate, &mut streamed_dx);
                assert_eq!(dx, streamed_dx, "{precision:?} {rows} x {out} x {inn}, accumulate {accumulate}");
            }
        }
    }
}

#[test]
fn empty_shapes_are_sums_of_nothing() {
    for isa in sets() {
        for precision in BOTH {
            let empty_sum = pack(isa, 3, 0, precision, &[]);
            let mut y = [7.0; 6];
            empty_sum.forward(&[], 2, Some(&[1.0, 2.0, 3.0]), &mut y);
            assert_eq!(y, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
            empty_sum.forward(&[], 2, None, &mut y);
            assert_eq!(y, [0.0; 6]);
            let no_outs = pack(isa, 0, 3, precision, &[]);
            no_outs.backward(&[], 2, true, &mut [1.0; 6]);
            no_outs.forward(&[1.0; 6], 2, None, &mut []);
            pack(isa, 3, 3, precision, &[1.0; 9]).forward(&[], 0, None, &mut []);
        }
    }
}

#[test]
fn bf16_rounds_to_nearest_even_and_keeps_nan_and_infinity() {
    let round = |v: f32| Precision::Bf16.round(v);
    for v in values(1000, 9) {
        assert_eq!(round(v).to_bits(), half::bf16::from_f32(v).to_f32().to_bits());
    }
    assert_eq!(round(f32::from_bits(0x3f80_8000)).to_bits(), 0x3f80_0000, "a tie goes down to even");
    assert_eq!(round(f32::from_bits(0x3f81_8000)).to_bits(), 0x3f82_0000, "a tie goes up to even");
    assert_eq!(round(f32::MAX), f32::INFINITY);
    for nan in [0x7fff_ffff, 0xffff_ffff, 0x7f80_0001] {
        assert!(round(f32::from_bits(nan)).is_nan(), "{nan:x}");
    }
}

#[test]
fn a_value_that_is_not_finite_stays_in_its_row() {
    for isa in sets() {
        for precision in BOTH {
            let packed = pack(isa, 5, 3, precision, &[1.0; 15]);
            let mut y = [0.0; 10];
            packed.forward(&[f32::INFINITY, 0.0, 0.0, 1.0, 2.0, 3.0], 2, None, &mut y);
            assert_eq!(y[..5], [f32::INFINITY; 5]);
            assert_eq!(y[5..], [6.0; 5]);
        }
    }
}

#[test]
#[should_panic(expected = "x must be [2, 3] and has 5 elements")]
fn a_wrong_shape_is_named() {
    pack(isa(), 4, 3, Precision::F32, &[0.0; 12]).forward(&[0.0; 5], 2, None, &mut [0.0; 8]);
}
