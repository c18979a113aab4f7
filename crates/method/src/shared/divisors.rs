//! Sizes that cut a matrix evenly, for what is said where the chosen one does not.

/// The numbers that divide all of `sizes` and lie nearest to `asked`, the larger of two first: "192 or 384".
pub(crate) fn near(asked: usize, sizes: &[usize]) -> String {
    let greatest = sizes.iter().copied().fold(0, common);
    let divides = |n: &usize| greatest.is_multiple_of(*n);
    let below = (1..=asked.min(greatest)).rev().find(divides);
    let above = (asked + 1..=greatest).find(divides);
    let found: Vec<String> = [below, above].into_iter().flatten().map(|n| n.to_string()).collect();
    found.join(" or ")
}

/// The divisor of `all` nearest to `wanted`, the smaller of two.
pub(crate) fn nearest(all: usize, wanted: usize) -> usize {
    if wanted >= all {
        return all;
    }
    let divides = |n: &usize| all.is_multiple_of(*n);
    let (above, below) = ((wanted..=all).find(divides), (1..=wanted).rev().find(divides));
    match (above, below) {
        (Some(above), Some(below)) if above - wanted < wanted - below => above,
        (_, Some(below)) => below,
        _ => all,
    }
}

/// The greatest common divisor.
fn common(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_that_divide() {
        assert_eq!(near(256, &[384, 384]), "192 or 384");
        assert_eq!(near(256, &[384, 1536]), "192 or 384");
        assert_eq!(near(256, &[64, 172]), "4");
        assert_eq!(near(5, &[7, 13]), "1");
        assert_eq!(near(2, &[9]), "1 or 3");
    }

    #[test]
    fn sizes_that_do_not_divide_are_moved_as_peft_moves_them() {
        for (all, wanted, found) in
            [(48, 32, 24), (48, 5, 4), (77, 8, 7), (77, 10, 11), (48, 60, 48), (49, 10, 7)]
        {
            assert_eq!(nearest(all, wanted), found, "{wanted} of {all}");
        }
    }
}
