//! The places that `torch.topk` finds on a CPU, of equal values the same ones.
//!
//! Files may leave the places out that a method chose by size, and mean that they are found again (Super-Tuning). Weights in half
//! precision have many equal sizes, and which of these are taken is left to the algorithm: PyTorch orders pairs of a value and its
//! place by the value alone, with C++'s `partial_sort` where few are wanted (selection by a heap), else with `nth_element`
//! (introselect, Musser 1997) and `sort` (introsort). Each exchange moves ties, so they are taken here step by step as
//! GNU's library takes them, with which PyTorch is built.

/// A value and its place.
type Pair = (f32, u32);

/// Up to so many pairs introsort leaves to insertion.
const SHORT: usize = 16;
/// A heap is used where at most one pair of so many is wanted.
const FEW: usize = 64;

/// The places of the `count` largest (or smallest) of `values`, in this order.
pub(crate) fn top(values: impl IntoIterator<Item = f32>, count: usize, largest: bool) -> Vec<u32> {
    let mut pairs: Vec<Pair> = values.into_iter().zip(0..).collect();
    let count = count.min(pairs.len());
    match largest {
        // What is not a number counts as the largest.
        true => select(&mut pairs, count, |a, b| a.0.is_nan() && !b.0.is_nan() || a.0 > b.0),
        false => select(&mut pairs, count, |a, b| !a.0.is_nan() && b.0.is_nan() || a.0 < b.0),
    }
    // Not in the place of the pairs, which would keep the memory of all.
    pairs[..count].iter().map(|&(_, place)| place).collect()
}

fn select(pairs: &mut [Pair], count: usize, before: impl Fn(Pair, Pair) -> bool + Copy) {
    if count == 0 {
        return;
    }
    if count * FEW <= pairs.len() {
        heap_select(pairs, count, before);
        sort_heap(&mut pairs[..count], before);
    } else {
        introselect(pairs, count - 1, before);
        introsort(&mut pairs[..count - 1], twice_log(count - 1), before);
        insertion_sort(&mut pairs[..count - 1], before);
    }
}

/// How many partitions may go wrong before a heap takes over.
fn twice_log(len: usize) -> u32 {
    2 * len.checked_ilog2().unwrap_or(0)
}

/// Brings the pair that belongs at `nth` there, what comes before it before it and the others behind.
fn introselect(pairs: &mut [Pair], nth: usize, before: impl Fn(Pair, Pair) -> bool + Copy) {
    let (mut first, mut last, mut left) = (0, pairs.len(), twice_log(pairs.len()));
    while last - first > 3 {
        if left == 0 {
            heap_select(&mut pairs[first..last], nth + 1 - first, before);
            pairs.swap(first, nth);
            return;
        }
        left -= 1;
        let cut = first + partition(&mut pairs[first..last], before);
        if cut <= nth {
            first = cut;
        } else {
            last = cut;
        }
    }
    insertion_sort(&mut pairs[first..last], before);
}

/// Sorts but for what insertion does at the end.
fn introsort(pairs: &mut [Pair], mut left: u32, before: impl Fn(Pair, Pair) -> bool + Copy) {
    let mut last = pairs.len();
    while last > SHORT {
        if left == 0 {
            heap_select(&mut pairs[..last], last, before);
            sort_heap(&mut pairs[..last], before);
            return;
        }
        left -= 1;
        let cut = partition(&mut pairs[..last], before);
        introsort(&mut pairs[cut..last], left, before);
        last = cut;
    }
}

fn insertion_sort(pairs: &mut [Pair], before: impl Fn(Pair, Pair) -> bool) {
    for i in 1..pairs.len() {
        let (pair, mut at) = (pairs[i], i);
        while at > 0 && before(pair, pairs[at - 1]) {
            pairs[at] = pairs[at - 1];
            at -= 1;
        }
        pairs[at] = pair;
    }
}

/// Parts at least three pairs by the median of the second, the middle and the last, and gives where the second part begins.
fn partition(pairs: &mut [Pair], before: impl Fn(Pair, Pair) -> bool) -> usize {
    let (a, b, c) = (1, pairs.len() / 2, pairs.len() - 1);
    let less = |i: usize, j: usize| before(pairs[i], pairs[j]);
    let median = match (less(a, b), less(b, c), less(a, c)) {
        (true, true, _) => b,
        (true, false, true) => c,
        (true, false, false) => a,
        (false, _, true) => a,
        (false, true, false) => c,
        (false, false, false) => b,
    };
    pairs.swap(0, median);
    let (pivot, mut first, mut last) = (pairs[0], 1, pairs.len());
    loop {
        while before(pairs[first], pivot) {
            first += 1;
        }
        last -= 1;
        while before(pivot, pairs[last]) {
            last -= 1;
        }
        if first >= last {
            return first;
        }
        pairs.swap(first, last);
        first += 1;
    }
}

/// Makes a heap of what belongs into the first `middle` places, the last of it on top.
fn heap_select(pairs: &mut [Pair], middle: usize, before: impl Fn(Pair, Pair) -> bool + Copy) {
    for parent in (0..middle / 2).rev() {
        let pair = pairs[parent];
        sift(&mut pairs[..middle], parent, pair, before);
    }
    for i in middle..pairs.len() {
        if before(pairs[i], pairs[0]) {
            let pair = pairs[i];
            pairs[i] = pairs[0];
            sift(&mut pairs[..middle], 0, pair, before);
        }
    }
}

fn sort_heap(heap: &mut [Pair], before: impl Fn(Pair, Pair) -> bool + Copy) {
    for last in (1..heap.len()).rev() {
        let pair = heap[last];
        heap[last] = heap[0];
        sift(&mut heap[..last], 0, pair, before);
    }
}

/// Moves the hole at `top` down to the leaves, and up again to where `pair` belongs.
fn sift(heap: &mut [Pair], top: usize, pair: Pair, before: impl Fn(Pair, Pair) -> bool) {
    let (len, mut hole) = (heap.len(), top);
    while hole < (len - 1) / 2 {
        let right = 2 * hole + 2;
        let child = if before(heap[right], heap[right - 1]) { right - 1 } else { right };
        heap[hole] = heap[child];
        hole = child;
    }
    // The last of an even number has no sibling.
    if len % 2 == 0 && hole == len / 2 - 1 {
        heap[hole] = heap[len - 1];
        hole = len - 1;
    }
    while hole > top && before(heap[(hole - 1) / 2], pair) {
        heap[hole] = heap[(hole - 1) / 2];
        hole = (hole - 1) / 2;
    }
    heap[hole] = pair;
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// The values of a case: numbers below `levels` from a congruential generator, or in an order that defeats the median of three.
    fn values(n: usize, levels: u64, seed: u64) -> Vec<f32> {
        if levels == 0 {
            return hard(n);
        }
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((x >> 33) % levels) as f32
        };
        (0..n).map(|_| next()).collect()
    }

    /// McIlroy's adversary ("A killer adversary for quicksort", 1999): places are given their values as they are compared.
    fn hard(n: usize) -> Vec<f32> {
        use std::cell::RefCell;
        let (gas, state) = (n as f32, RefCell::new((vec![n as f32; n], 0.0, 0)));
        let before = |a: Pair, b: Pair| {
            let (values, solid, candidate) = &mut *state.borrow_mut();
            let (a, b) = (a.1 as usize, b.1 as usize);
            if values[a] == gas && values[b] == gas {
                values[if a == *candidate { a } else { b }] = *solid;
                *solid += 1.0;
            }
            if values[a] == gas {
                *candidate = a;
            } else if values[b] == gas {
                *candidate = b;
            }
            values[a] < values[b]
        };
        let mut pairs: Vec<Pair> = (0..n as u32).map(|place| (0.0, place)).collect();
        introsort(&mut pairs, u32::MAX, before);
        state.into_inner().0
    }

    #[test]
    fn places_are_those_of_pytorch() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/random/topk.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let cases = file["cases"].as_array().unwrap();
        assert!(cases.len() > 100);
        for case in cases {
            let number = |key: &str| case[key].as_u64().unwrap();
            let (n, count) = (number("n") as usize, number("k") as usize);
            let found =
                top(values(n, number("levels"), number("seed")), count, case["largest"].as_bool().unwrap());
            assert_eq!(found.len(), count);
            let digest = found.iter().fold(0u32, |sum, &place| sum.wrapping_mul(31).wrapping_add(place));
            assert_eq!(u64::from(digest), number("digest"), "{case}");
        }
    }

    #[test]
    fn what_is_not_a_number_is_the_largest() {
        let values = [1.0, f32::NAN, 3.0, 2.0];
        assert_eq!(top(values, 2, true), [1, 2]);
        assert_eq!(top(values, 4, false), [0, 3, 2, 1]);
        assert!(top(values, 0, true).is_empty());
    }
}
