//! "Did you mean": the name that somebody meant who wrote another.

/// A word longer than this is no mistyped name.
const LONGEST: usize = 256;
/// Edits that a mistyped name may have.
const EDITS: usize = 2;

/// The nearest of `names` within two edits, case aside; never one that would change every letter. Of equals the first.
pub fn nearest<N: AsRef<str>>(word: &str, names: impl IntoIterator<Item = N>) -> Option<N> {
    if word.len() > LONGEST {
        return None;
    }
    let lower = word.to_lowercase();
    let edits = |name: N| (strsim::damerau_levenshtein(&lower, &name.as_ref().to_lowercase()), name);
    let near = names.into_iter().map(edits).filter(|(edits, name)| {
        *edits <= EDITS && *edits < name.as_ref().chars().count().min(lower.chars().count())
    });
    near.min_by_key(|(edits, _)| *edits).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_edits_and_no_more() {
        assert_eq!(nearest("rnak", ["rank", "alpha"]), Some("rank"));
        assert_eq!(nearest("RANK", ["rank", "alpha"]), Some("rank"));
        assert_eq!(nearest("ranking", ["rank", "alpha"]), None);
        assert_eq!(nearest("ab", ["cd"]), None, "no letter is kept");
        assert_eq!(nearest("lr", ["learning_rate"]), None);
        assert_eq!(nearest("catgory", ["text", "category"]), Some("category"));
        assert_eq!(nearest("kat", ["cat", "mat"]), Some("cat"), "the first of equals");
        assert_eq!(nearest(&"a".repeat(300), [&"a".repeat(299)]), None);
    }
}
