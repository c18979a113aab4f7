//! Numbers of an evaluation: of classes, from what was predicted and what was right, and of texts, from what was written
//! and what was hoped for. Each collects one answer after another and is read at the end.

mod bleu;
mod classes;
mod exact_match;
mod rouge;

pub use bleu::Bleu;
pub(crate) use classes::Confusion;
pub use exact_match::ExactMatch;
pub use rouge::{Rouge, RougeScores};

/// White space as Python's `str.split` sees it, so that tokens are those of the reference programs.
fn is_blank(c: char) -> bool {
    c.is_whitespace() || ('\x1C'..='\x1F').contains(&c)
}
