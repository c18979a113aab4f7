//! Patterns over the paths of modules, as `peft` gives them to Python's `re`: look-around and back-references included.
//!
//! What a linear automaton cannot decide is searched for with a bound on the steps. A pattern that meets it has no answer;
//! it is remembered on its thread until [`gave_up`] asks, so that whoever used it can fail instead of going on with a guess.

use std::cell::RefCell;
use std::fmt;

use fancy_regex::{Regex, RegexBuilder};

/// Steps of a search in one path. Paths have a hundred characters; three free gaps over them stay below it.
const STEPS_MAX: usize = 2_000_000;

thread_local! {
    static GAVE_UP: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A compiled pattern.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    regex: Regex,
}

impl Pattern {
    /// `re.fullmatch`: the whole path.
    ///
    /// # Errors
    /// What is wrong with it, in one line; so for the others.
    pub fn whole(text: &str) -> Result<Pattern, String> {
        Pattern::within(text, &format!("^(?:{text})$"))
    }

    /// `re.match(r"(.*\.)?(text)$")`: the path, or its end after a dot. Groups are counted as there.
    ///
    /// # Errors
    /// See [`Pattern::whole`].
    pub fn ending(text: &str) -> Result<Pattern, String> {
        Pattern::within(text, &format!(r"^(.*\.)?({text})$"))
    }

    /// `re.search`: any part of the path.
    ///
    /// # Errors
    /// See [`Pattern::whole`].
    pub fn anywhere(text: &str) -> Result<Pattern, String> {
        Pattern::within(text, text)
    }

    /// `text` in its surroundings. Alone first: what is closed by the brackets around it is no pattern of its own.
    fn within(text: &str, surrounded: &str) -> Result<Pattern, String> {
        // A group that it counts by number may only be there in its surroundings.
        if let Err(alone) = Regex::new(text)
            && !text.contains('\\')
        {
            return Err(one_line(&alone));
        }
        let regex = RegexBuilder::new(surrounded).backtrack_limit(STEPS_MAX).build();
        Ok(Pattern { text: text.to_owned(), regex: regex.map_err(|e| one_line(&e))? })
    }

    /// Whether it matches; `false`, and remembered, where the search gave up.
    pub fn is_match(&self, path: &str) -> bool {
        self.regex.is_match(path).unwrap_or_else(|_| self.give_up(path))
    }

    /// The number that its group `number` caught.
    pub fn number(&self, path: &str) -> Option<usize> {
        let found = self.regex.captures(path).unwrap_or_else(|_| {
            self.give_up(path);
            None
        });
        found?.name("number")?.as_str().parse().ok()
    }

    fn give_up(&self, path: &str) -> bool {
        let message = format!(
            "the pattern `{}` takes more than {STEPS_MAX} steps on `{path}`; write it with fewer repetitions",
            self.text
        );
        GAVE_UP.with(|slot| *slot.borrow_mut() = Some(message));
        false
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.text)
    }
}

/// What a search on this thread gave up on since it was last asked.
///
/// # Errors
/// The pattern and the path.
pub fn gave_up() -> crate::Result<()> {
    match GAVE_UP.with(|slot| slot.borrow_mut().take()) {
        Some(message) => Err(crate::Error::Unsupported(message)),
        None => Ok(()),
    }
}

/// The last line of an error that may be drawn over several.
fn one_line(error: &fancy_regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("");
    last.trim().trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_python() {
        let whole = |text: &str, path: &str| Pattern::whole(text).unwrap().is_match(path);
        assert!(whole(r"model\.layers\.(?!0)\d+\.(q|k)_proj", "model.layers.1.q_proj"));
        assert!(!whole(r"model\.layers\.(?!0)\d+\.(q|k)_proj", "model.layers.0.q_proj"));
        assert!(whole(r"(?P<a>.*)q_proj", "x.q_proj") && !whole("a|ab", "abc") && whole("a|ab", "ab"));
        assert!(whole(r"(\d)\.\1", "3.3") && !whole(r"(\d)\.\1", "3.4"));
        let ending = |text: &str, path: &str| Pattern::ending(text).unwrap().is_match(path);
        assert!(ending("q_proj", "a.q_proj") && ending("q_proj", "q_proj") && !ending("roj", "a.q_proj"));
        assert!(ending(r"(?<!k_)proj", "a.proj") && !ending("a|b", "x.ab"));
        // Its first group is the second of the whole, as in `peft`.
        assert!(ending(r"(\d)x", "1x") && ending(r"(\d)\.\3", "z.3.3"));
        let anywhere = Pattern::anywhere(r"\.\d\.").unwrap();
        assert!(anywhere.is_match("a.1.b") && !anywhere.is_match("a.b"));
        let layer = Pattern::anywhere(r"^.*?\.[^.]*\.(?P<number>\d+)\.").unwrap();
        assert_eq!((layer.number("model.layers.12.mlp.3.x"), layer.number("model.norm")), (Some(12), None));
    }

    #[test]
    fn mistakes_are_one_line_and_endless_searches_end() {
        for bad in ["(", "[z"] {
            let message = Pattern::whole(bad).unwrap_err();
            assert!(!message.is_empty() && !message.contains('\n'), "{message}");
        }
        assert!(Pattern::whole("a)(b").is_err(), "closed by what stands around it");
        let endless = Pattern::whole(r"(?:(?=a)a|a)*(?:a|aa)*(?:a|aa)*(?!.)b").unwrap();
        assert!(gave_up().is_ok());
        assert!(!endless.is_match(&"a".repeat(60)));
        assert!(gave_up().unwrap_err().to_string().contains("steps"));
        assert!(gave_up().is_ok());
    }
}
