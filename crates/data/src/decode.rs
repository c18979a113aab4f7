//! Text from ids that arrive one at a time, as in generation.
//!
//! One id may be part of a character, and what an id decodes to depends on its neighbours, so a window of the last
//! ids is decoded as a whole and what is new since the last time is given. A trailing U+FFFD means that the last
//! character is not complete yet; it is held back for a few ids, then given as it is.

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// The window is shortened when it has this many ids.
const WINDOW: usize = 64;
/// It is shortened to about this many.
const KEPT: usize = 8;
/// A character has at most four bytes, so more waiting ids than this never become one.
const WAITING: usize = 8;

/// Gives text as ids arrive; see [`Tokenizer::stream`].
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    window: Vec<u32>,
    /// The text of the window that was given already, or lay before the stream.
    given: String,
    /// Ids since text was last given.
    waiting: usize,
}

impl<'a> DecodeStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> DecodeStream<'a> {
        DecodeStream { tokenizer, skip_special, window: Vec::new(), given: String::new(), waiting: 0 }
    }

    /// Sets what comes before the stream (the prompt), so that spacing after it is right.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn after(mut self, prompt: &[u32]) -> Result<DecodeStream<'a>> {
        self.window = prompt[prompt.len().saturating_sub(KEPT)..].to_vec();
        self.given = self.text()?;
        Ok(self)
    }

    /// Takes the next id and gives the text that is now certain; often one word, sometimes nothing.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.window.push(id);
        self.waiting += 1;
        let text = self.text()?;
        let sure = text.trim_end_matches('\u{FFFD}');
        let sure = if self.waiting > WAITING { text.as_str() } else { sure };
        let new = match sure.strip_prefix(self.given.as_str()) {
            Some(new) => new.to_owned(),
            // Bytes that never became a character changed how those before them read: begin anew after them.
            None if self.waiting > WAITING => return self.restart(),
            None => return Ok(String::new()),
        };
        if !new.is_empty() {
            self.waiting = 0;
            self.given = sure.to_owned();
        }
        if self.window.len() >= WINDOW && sure.len() == text.len() {
            self.shorten()?;
        }
        Ok(new)
    }

    /// Ends the stream: what was held back, complete or not.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(mut self) -> Result<String> {
        let text = self.text()?;
        match text.strip_prefix(self.given.as_str()) {
            Some(rest) => Ok(rest.to_owned()),
            None => self.restart(),
        }
    }

    fn restart(&mut self) -> Result<String> {
        self.window.drain(..self.window.len() - self.waiting.min(self.window.len()));
        self.given = self.text()?;
        self.waiting = 0;
        Ok(self.given.clone())
    }

    /// Forgets old ids, cutting where no character is split (or, past four windows, anywhere).
    fn shorten(&mut self) -> Result<()> {
        for kept in KEPT..KEPT * 3 {
            let tail = &self.window[self.window.len() - kept..];
            let text = self.tokenizer.decode(tail, self.skip_special)?;
            if !text.contains('\u{FFFD}') || self.window.len() > WINDOW * 4 {
                self.window = tail.to_vec();
                self.given = text;
                return Ok(());
            }
        }
        Ok(())
    }

    fn text(&self) -> Result<String> {
        self.tokenizer.decode(&self.window, self.skip_special)
    }
}
