//! Conversations to ids, with the tokens of the assistant's answers marked.
//!
//! A template only gives text, so the answers are found by rendering beginnings of the conversation: answer i lies
//! between (messages before it, with the generation prompt) and (messages up to it). That holds when each rendering
//! is a beginning of the next; a template that rewrites earlier messages is refused.
//!
//! Names of control tokens inside messages stay text: a noncharacter is put into them before rendering, and the
//! stretch around it is encoded without recognising special tokens. (A tokenizer that puts a blank before a text puts
//! one before such a stretch too.)

use std::ops::Range;

use crate::error::{Error, Result};
use crate::read::Message;
use crate::template::{Beginning, ChatTemplate};
use crate::tokenizer::{Encoding, Tokenizer};

/// A conversation as ids.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// The rendered text.
    pub text: String,
    /// Its ids, with offsets into `text`.
    pub encoding: Encoding,
    /// Which tokens are the assistant's, `[tokens]`: those that are trained.
    pub trained: Vec<bool>,
}

/// The ids of `messages` followed by the generation prompt, for generating an answer.
///
/// # Errors
/// As [`ChatTemplate::render`] and [`Tokenizer::encode`].
pub fn encode_prompt(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<Encoding> {
    let shield = Shield::new(tokenizer, messages)?;
    let text = template.render(&shield.messages, true)?;
    Ok(shield.encode(tokenizer, &text)?.1)
}

/// The ids of `messages` with the assistant's answers marked.
///
/// # Errors
/// As [`encode_prompt`]; also when the template's renderings are not beginnings of one another.
pub fn encode_conversation(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
) -> Result<Conversation> {
    let shield = Shield::new(tokenizer, messages)?;
    let answers: Vec<usize> = (0..messages.len()).filter(|at| messages[*at].role == "assistant").collect();
    let mut renderings = template.renderings(&shield.messages, beginnings(&answers, messages.len()))?;
    let whole = renderings.next()?;
    let mut spans: Vec<Range<usize>> = Vec::new();
    for at in answers {
        let before = renderings.next()?;
        let through = if at + 1 == messages.len() { None } else { Some(renderings.next()?) };
        let span = answer(&before, through.as_deref().unwrap_or(&whole), at, &whole)?;
        let end = turn_end(&whole[span.clone()], tokenizer);
        spans.push(shield.bare(&whole[..span.start])..shield.bare(&whole[..span.start + end]));
    }
    let (text, encoding) = shield.encode(tokenizer, &whole)?;
    let inside =
        |start: usize, end: usize| spans.iter().any(|s| end > start && start >= s.start && start < s.end);
    let trained = encoding.offsets.iter().map(|(start, end)| inside(*start, *end)).collect();
    Ok(Conversation { text, encoding, trained })
}

/// What is rendered of a conversation of `count` messages: the whole, then what lies before each of `answers` and what
/// goes up to it, unless that is the whole again.
fn beginnings(answers: &[usize], count: usize) -> Vec<Beginning> {
    let before = |at: &usize| Beginning { messages: *at, prompt: true };
    let through = |at: &usize| Beginning { messages: *at + 1, prompt: false };
    let mut wanted = vec![Beginning { messages: count, prompt: false }];
    for at in answers {
        wanted.push(before(at));
        wanted.extend((*at + 1 < count).then(|| through(at)));
    }
    wanted
}

/// Where the answer `at` lies in the whole rendering.
fn answer(before: &str, through: &str, at: usize, whole: &str) -> Result<Range<usize>> {
    let fail = |what: &str| Error::Template {
        message: format!(
            "{what} message {}, so it cannot be told which tokens are its answer; use a template that keeps earlier \
             messages as they are (data.template), or rows that end with this answer",
            at + 1
        ),
    };
    if !whole.starts_with(through) {
        return Err(fail("later messages change how the template writes"));
    }
    if !through.starts_with(before) {
        return Err(fail("the generation prompt is not how the template begins"));
    }
    Ok(before.len()..through.len())
}

/// The end of an answer: generation stops at the token that ends a turn, so blanks after it are not learned.
fn turn_end(answer: &str, tokenizer: &Tokenizer) -> usize {
    let trimmed = answer.trim_end();
    let stops =
        tokenizer.special_tokens().iter().any(|token| !token.is_empty() && trimmed.ends_with(token.as_str()));
    if stops { trimmed.len() } else { answer.len() }
}

/// Messages in which no control token can be recognised.
struct Shield {
    messages: Vec<Message>,
    mark: char,
}

impl Shield {
    fn new(tokenizer: &Tokenizer, messages: &[Message]) -> Result<Shield> {
        // Noncharacters are never exchanged as text; one that no message holds is the mark.
        let unused = |mark: &char| !messages.iter().any(|message| message.content.contains(*mark));
        let mark = ('\u{FDD0}'..='\u{FDEF}').find(unused).ok_or_else(|| Error::Template {
            message: "the messages hold every Unicode noncharacter from U+FDD0 to U+FDEF; take them out"
                .into(),
        })?;
        let mut names = tokenizer.special_tokens();
        names.retain(|name| name.chars().count() > 1);
        let shielded = |message: &Message| {
            let mut message = message.clone();
            for name in &names {
                if message.content.contains(name.as_str()) {
                    let mut broken = name.clone();
                    broken.insert(name.chars().next().map_or(0, char::len_utf8), mark);
                    message.content = message.content.replace(name.as_str(), &broken);
                }
            }
            message
        };
        Ok(Shield { messages: messages.iter().map(shielded).collect(), mark })
    }

    /// The length of `text` without marks, in bytes.
    fn bare(&self, text: &str) -> usize {
        text.len() - text.matches(self.mark).count() * self.mark.len_utf8()
    }

    /// `text` without marks, and its ids: stretches with a mark are read as plain text.
    fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<(String, Encoding)> {
        let encoding = tokenizer.encode(text, false)?;
        if !text.contains(self.mark) {
            return Ok((text.to_owned(), encoding));
        }
        let (mut bare, mut joined, mut start) = (String::new(), Encoding::default(), 0);
        let special = |at: &usize| tokenizer.special_ids().contains(&encoding.ids[*at]);
        let mut cuts: Vec<(usize, usize, Option<u32>)> = (0..encoding.ids.len())
            .filter(special)
            .map(|at| (encoding.offsets[at].0, encoding.offsets[at].1, Some(encoding.ids[at])))
            .filter(|(from, to, _)| to > from)
            .collect();
        cuts.push((text.len(), text.len(), None));
        for (from, to, id) in cuts {
            let (Some(piece), Some(name)) = (text.get(start..from), text.get(from..to)) else { continue };
            let plain: String = piece.chars().filter(|c| *c != self.mark).collect();
            let part = if plain.len() == piece.len() {
                tokenizer.encode(piece, false)?
            } else {
                tokenizer.encode_literal(&plain)?
            };
            joined.ids.extend(&part.ids);
            joined.type_ids.extend(&part.type_ids);
            joined.offsets.extend(part.offsets.iter().map(|(a, b)| (a + bare.len(), b + bare.len())));
            bare.push_str(&plain);
            if let Some(id) = id {
                joined.ids.push(id);
                joined.type_ids.push(0);
                joined.offsets.push((bare.len(), bare.len() + name.len()));
                bare.push_str(name);
            }
            start = to;
        }
        Ok((bare, joined))
    }
}
