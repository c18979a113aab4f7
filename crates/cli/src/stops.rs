//! Stop texts in a stream: text is given on as soon as it cannot be the beginning of one.

/// Watches a stream for stop texts.
pub struct Stops {
    texts: Vec<String>,
    held: String,
}

impl Stops {
    /// Stops at the first of `texts`; empty ones are left out.
    pub fn new(texts: &[String]) -> Stops {
        Stops { texts: texts.iter().filter(|text| !text.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes the next piece. Gives what may be shown, and whether a stop text was found (it is not shown).
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let found = self.texts.iter().filter_map(|text| self.held.find(text.as_str())).min();
        if let Some(at) = found {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let beginning = |at: &usize| self.texts.iter().any(|text| text.starts_with(&self.held[*at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(beginning).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back at the end of the stream.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = Stops::new(&stops.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        let mut text = String::new();
        for piece in pieces {
            let (shown, stopped) = watch.push(piece);
            text.push_str(&shown);
            if stopped {
                return (text, true);
            }
        }
        text.push_str(&watch.finish());
        (text, false)
    }

    #[test]
    fn a_stop_text_split_over_pieces_is_found_and_not_shown() {
        assert_eq!(run(&["\n\nUser:"], &["ok\n", "\nUs", "er: x"]), ("ok".into(), true));
        assert_eq!(run(&["ab", "b"], &["xa", "b"]), ("x".into(), true));
    }

    #[test]
    fn a_false_beginning_is_shown_later() {
        assert_eq!(run(&["</s>"], &["a<", "/", "b", "é<"]), ("a</bé<".into(), false));
        assert_eq!(run(&[""], &["a"]), ("a".into(), false));
        let mut watch = Stops::new(&["stop".into()]);
        assert_eq!(watch.push("go s"), ("go ".into(), false));
    }
}
