//! Against the definition, and for the bits.

use super::*;
use crate::cpu::primitives;
use crate::cpu::random::Key;

fn random(len: usize, stream: u64) -> Vec<f32> {
    let mut x = vec![0.0; len];
    Key { seed: 1, stream }.fill_normal(&mut x);
    x
}

/// The products of one low-rank factor pair on `rows` rows.
fn products(rows: usize, width: usize, rank: usize) -> [(&'static str, Product); 6] {
    let (down, up) = (Product::new(rows, width, rank), Product::new(rows, rank, width));
    [
        ("x·Aᵀ", Product { transpose_b: true, ..down }),
        ("h·Bᵀ", Product { transpose_b: true, accumulate: true, scale: 2.0, ..up }),
        ("dy·B", Product { scale: 0.5, ..down }),
        ("dh·A", Product { accumulate: true, ..up }),
        ("dyᵀ·h", Product { transpose_a: true, scale: 2.0, ..Product::new(width, rows, rank) }),
        ("dhᵀ·x", Product { transpose_a: true, accumulate: true, ..Product::new(rank, rows, width) }),
    ]
}

/// The definition, in f64.
fn expected(p: Product, a: &[f32], b: &[f32], before: &[f32]) -> Vec<f64> {
    let a_at = |i: usize, q: usize| f64::from(if p.transpose_a { a[q * p.m + i] } else { a[i * p.k + q] });
    let b_at = |q: usize, j: usize| f64::from(if p.transpose_b { b[j * p.k + q] } else { b[q * p.n + j] });
    let places = (0..p.m).flat_map(|i| (0..p.n).map(move |j| (i, j)));
    let sums = places.map(|(i, j)| (0..p.k).map(|q| a_at(i, q) * b_at(q, j)).sum::<f64>());
    let first = |before: f32| if p.accumulate { f64::from(before) } else { 0.0 };
    sums.zip(before).map(|(sum, &before)| first(before) + f64::from(p.scale) * sum).collect()
}

#[test]
fn odd_shapes_equal_the_definition() {
    for (rows, width, rank) in
        [(1, 1, 1), (5, 7, 3), (9, 40, 4), (97, 33, 8), (70, 50, 17), (131, 100, 16), (33, 300, 31)]
    {
        for (name, p) in products(rows, width, rank) {
            let (a, b, before) = (random(p.m * p.k, 1), random(p.k * p.n, 2), random(p.m * p.n, 3));
            let mut y = before.clone();
            assert!(narrow(p, &a, &b, &mut y), "{name}");
            for (y, e) in y.iter().zip(expected(p, &a, &b, &before)) {
                assert!((f64::from(*y) - e).abs() < 1e-4, "{name} {rows} {width} {rank}: {y}, not {e}");
            }
        }
    }
}

#[test]
fn bits_depend_neither_on_threads_nor_on_other_rows() {
    let (rows, width, rank) = (131, 200, 13);
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for (name, p) in products(rows, width, rank) {
        let (a, b) = (random(p.m * p.k, 1), random(p.k * p.n, 2));
        let on = |threads: usize| {
            let mut y = vec![0.5; p.m * p.n];
            pool(threads).install(|| narrow(p, &a, &b, &mut y));
            y
        };
        let whole = on(1);
        assert!([2, 3, 5].into_iter().all(|threads| on(threads) == whole), "{name}");
        if !p.transpose_a {
            let mut row = vec![0.5; p.n];
            narrow(Product { m: 1, ..p }, &a[100 * p.k..101 * p.k], &b, &mut row);
            assert_eq!(row, whole[100 * p.n..101 * p.n], "{name}");
        }
    }
}

/// Medians of the general product and of this file's, in GFLOP/s, on operands that have left the caches.
#[test]
#[ignore = "a measurement"]
fn rates() {
    let memory = vec![0.5f32; 1 << 25];
    let mut results = vec![0.5f32; 1 << 25];
    for (rows, width) in [(1024, 768), (1024, 2048), (4096, 768), (352, 384), (8, 768), (1, 768)] {
        for rank in [4, 8, 16, 32] {
            print!("{rows} × {width}, {rank}:");
            for (name, p) in products(rows, width, rank) {
                let mut seconds = [vec![], vec![]];
                for round in 0..42 {
                    let at = |len: usize, step: usize| (round * step) % (memory.len() - len);
                    let (a, b) = (&memory[at(p.m * p.k, 1 << 20)..], &memory[at(p.k * p.n, 3 << 19)..]);
                    let y = &mut results[at(p.m * p.n, 5 << 18)..];
                    let start = std::time::Instant::now();
                    if round % 2 == 0 {
                        primitives::general(p, a, b, y);
                    } else {
                        assert!(narrow(p, a, b, y));
                    }
                    seconds[round % 2].push(start.elapsed().as_secs_f64());
                }
                let [general, own] = seconds.map(|mut s| {
                    s.sort_by(f64::total_cmp);
                    2e-9 * (p.m * p.k * p.n) as f64 / s[s.len() / 2]
                });
                print!("  {name} {general:.0} {own:.0} ({:.2})", own / general);
            }
            println!();
        }
    }
}
