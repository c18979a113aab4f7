//! "Did you mean": the name that somebody meant who wrote another.

/// A word longer than this is no mistyped name.
const LONGEST: usize = 256;
/// Edits that a mistyped name may have.
const EDITS: usize = 2;
/// Letters from which on the beginning of a name may mean it.
const BEGINNING: usize = 3;

/// The nearest of `names` within two edits, case aside; never one that would change every letter. Of equals the first. Where none
/// is so near, the shortest that begins with `word`, or the only one that has it as a part between separators.
pub fn nearest<N: AsRef<str>>(word: &str, names: impl IntoIterator<Item = N>) -> Option<N> {
    if word.len() > LONGEST {
        return None;
    }
    let (lower, letters) = (word.to_lowercase(), word.chars().count());
    let mut names: Vec<(String, N)> =
        names.into_iter().map(|name| (name.as_ref().to_lowercase(), name)).collect();
    let edits = |name: &str| strsim::damerau_levenshtein(&lower, name);
    let near = names
        .iter()
        .enumerate()
        .map(|(i, (name, _))| (edits(name), i))
        .filter(|(edits, i)| *edits <= EDITS && *edits < names[*i].0.chars().count().min(letters));
    let near = near.min_by_key(|(edits, _)| *edits).map(|(_, i)| i);
    near.or_else(|| whole(&lower, &names)).map(|i| names.swap_remove(i).1)
}

/// The name that `word` begins, or a part of which it is.
fn whole<N>(word: &str, names: &[(String, N)]) -> Option<usize> {
    let (letters, count) = (word.chars().count(), |i: &usize| names[*i].0.chars().count());
    let begins = |i: &usize| letters >= BEGINNING && names[*i].0.starts_with(word) && count(i) > letters;
    let is_part = |i: &usize| {
        let mut parts = names[*i].0.split(['_', '-', '.', ' ', '/']);
        letters > 0 && count(i) > letters && parts.any(|part| part == word)
    };
    let mut within = (0..names.len()).filter(is_part);
    let only = within.next().filter(|_| within.next().is_none());
    (0..names.len()).filter(begins).min_by_key(count).or(only)
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

    #[test]
    fn a_beginning_or_a_part_means_the_whole() {
        let names = ["q_proj", "k_proj", "gate_proj", "up_proj", "lm_head"];
        assert_eq!(nearest("gate", names), Some("gate_proj"));
        assert_eq!(nearest("Up", names), Some("up_proj"), "a whole part, however short");
        assert_eq!(nearest("head", names), Some("lm_head"));
        assert_eq!(nearest("name", ["first_name", "last_name"]), None, "both have it");
        assert_eq!(nearest("qpr", ["k", "a_qproj"]), None);
        assert_eq!(
            nearest("post_att", ["post_attention_norm_2", "post_attention_norm"]),
            Some("post_attention_norm")
        );
        assert_eq!(nearest("", names), None);
    }
}
