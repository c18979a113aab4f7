//! What goes between the program and the process that renders for it, as bytes.
//!
//! Numbers are little-endian, lengths 32 bits. A request is its length and that many bytes; an answer is a byte that
//! says what follows (a text, or why there is none), its length, and UTF-8. Values of messages are written here rather
//! than as JSON because a number must arrive with the bits it had, and JSON's reader rounds.

use std::io::{Error, ErrorKind, Read, Result, Write};

use serde_json::{Map, Number, Value};

use super::{Beginning, OUTPUT_LIMIT};
use crate::read::Message;

/// The longest request, in bytes: four times the longest row of a data file.
pub const REQUEST_LIMIT: usize = 64 << 20;

/// What the process is told first.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// The template's source.
    pub source: String,
    /// The tokens it may name.
    pub bos: String,
    /// The end token.
    pub eos: String,
    /// The time it may ask for.
    pub now: Option<i64>,
}

/// What the process answers.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// A rendering; empty for a template that compiles.
    Text(String),
    /// What the template or its limits refuse.
    Refused(String),
}

impl Setup {
    /// The request's bytes, without their length.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.source.len() + 64);
        [&self.source, &self.bos, &self.eos].iter().for_each(|text| put_text(&mut bytes, text));
        bytes.push(u8::from(self.now.is_some()));
        bytes.extend(self.now.unwrap_or(0).to_le_bytes());
        bytes
    }

    /// What [`Setup::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Setup> {
        let mut rest = Rest(bytes);
        let (source, bos, eos) = (rest.text()?, rest.text()?, rest.text()?);
        let (is_given, now) = (rest.byte()? != 0, i64::from_le_bytes(rest.array()?));
        Ok(Setup { source, bos, eos, now: is_given.then_some(now) })
    }
}

/// The bytes of a request to render `beginnings` of `messages`.
pub fn conversation_to_bytes(messages: &[Message], beginnings: &[Beginning]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_count(&mut bytes, beginnings.len());
    for beginning in beginnings {
        put_count(&mut bytes, beginning.messages);
        bytes.push(u8::from(beginning.prompt));
    }
    put_count(&mut bytes, messages.len());
    for message in messages {
        put_text(&mut bytes, &message.role);
        put_text(&mut bytes, &message.content);
        put_fields(&mut bytes, &message.extra);
    }
    bytes
}

/// What [`conversation_to_bytes`] wrote.
pub fn conversation_from_bytes(bytes: &[u8]) -> Result<(Vec<Message>, Vec<Beginning>)> {
    let mut rest = Rest(bytes);
    let beginnings = (0..rest.count()?)
        .map(|_| Ok(Beginning { messages: rest.count()?, prompt: rest.byte()? != 0 }))
        .collect::<Result<Vec<_>>>()?;
    let messages = (0..rest.count()?)
        .map(|_| Ok(Message { role: rest.text()?, content: rest.text()?, extra: rest.fields()? }))
        .collect::<Result<Vec<_>>>()?;
    match beginnings.iter().all(|beginning| beginning.messages <= messages.len()) {
        true => Ok((messages, beginnings)),
        false => Err(malformed()),
    }
}

/// Writes `request` with its length, in one piece.
pub fn write_request(output: &mut impl Write, request: &[u8]) -> Result<()> {
    let mut framed = Vec::with_capacity(request.len() + 4);
    put_count(&mut framed, request.len());
    framed.extend(request);
    output.write_all(&framed)
}

/// The next request; none where the input ends.
pub fn read_request(input: &mut impl Read) -> Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    match input.read_exact(&mut length) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    read_bytes(input, length, REQUEST_LIMIT).map(Some)
}

/// Writes an answer.
pub fn write_answer(output: &mut impl Write, answer: &Answer) -> Result<()> {
    let (kind, text) = match answer {
        Answer::Text(text) => (0, text),
        Answer::Refused(text) => (1, text),
    };
    output.write_all(&[kind])?;
    output.write_all(&(text.len() as u32).to_le_bytes())?;
    output.write_all(text.as_bytes())?;
    output.flush()
}

/// The next answer.
pub fn read_answer(input: &mut impl Read) -> Result<Answer> {
    let mut head = [0; 5];
    input.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let text = String::from_utf8(read_bytes(input, length, OUTPUT_LIMIT)?).map_err(|_| malformed())?;
    match kind {
        0 => Ok(Answer::Text(text)),
        1 => Ok(Answer::Refused(text)),
        _ => Err(malformed()),
    }
}

fn read_bytes(input: &mut impl Read, length: [u8; 4], limit: usize) -> Result<Vec<u8>> {
    let length = u32::from_le_bytes(length) as usize;
    if length > limit {
        return Err(malformed());
    }
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn malformed() -> Error {
    Error::new(ErrorKind::InvalidData, "not a message between engraft and the process that renders for it")
}

/// Lengths fit: the whole request is compared with [`REQUEST_LIMIT`] before it is sent.
fn put_count(bytes: &mut Vec<u8>, count: usize) {
    bytes.extend((count as u32).to_le_bytes());
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    put_count(bytes, text.len());
    bytes.extend(text.as_bytes());
}

fn put_fields(bytes: &mut Vec<u8>, fields: &Map<String, Value>) {
    put_count(bytes, fields.len());
    for (key, value) in fields {
        put_text(bytes, key);
        put_value(bytes, value);
    }
}

fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Null => bytes.push(0),
        Value::Bool(value) => bytes.extend([1, u8::from(*value)]),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => {
                bytes.push(2);
                bytes.extend(integer.to_le_bytes());
            }
            (None, Some(integer)) => {
                bytes.push(3);
                bytes.extend(integer.to_le_bytes());
            }
            (None, None) => {
                bytes.push(4);
                bytes.extend(number.as_f64().unwrap_or(f64::NAN).to_le_bytes());
            }
        },
        Value::String(text) => {
            bytes.push(5);
            put_text(bytes, text);
        }
        Value::Array(list) => {
            bytes.push(6);
            put_count(bytes, list.len());
            list.iter().for_each(|value| put_value(bytes, value));
        }
        Value::Object(fields) => {
            bytes.push(7);
            put_fields(bytes, fields);
        }
    }
}

/// What of a request is not read yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| malformed())
    }

    fn byte(&mut self) -> Result<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn count(&mut self) -> Result<usize> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn text(&mut self) -> Result<String> {
        let length = self.count()?;
        String::from_utf8(self.take(length)?.to_vec()).map_err(|_| malformed())
    }

    fn fields(&mut self) -> Result<Map<String, Value>> {
        (0..self.count()?).map(|_| Ok((self.text()?, self.value()?))).collect()
    }

    fn value(&mut self) -> Result<Value> {
        Ok(match self.byte()? {
            0 => Value::Null,
            1 => Value::Bool(self.byte()? != 0),
            2 => i64::from_le_bytes(self.array()?).into(),
            3 => u64::from_le_bytes(self.array()?).into(),
            4 => Number::from_f64(f64::from_le_bytes(self.array()?)).ok_or_else(malformed)?.into(),
            5 => Value::String(self.text()?),
            6 => (0..self.count()?).map(|_| self.value()).collect::<Result<Vec<_>>>()?.into(),
            7 => Value::Object(self.fields()?),
            _ => return Err(malformed()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        let mut called = Message::new("assistant", "é\u{FDD0}\n");
        let text =
            r#"{"z": [1, -7, 18446744073709551615, 0.1, 1e300, -0.0, null, true, "\u0000"], "a": {"": {}}}"#;
        let Value::Object(extra) = serde_json::from_str(text).unwrap() else { panic!("an object") };
        called.extra = extra;
        // A reader of decimal numbers that is not exact gives a neighbour of this one.
        called.extra.insert("sum".into(), (0.1 + 0.2).into());
        vec![Message::new("user", ""), called]
    }

    #[test]
    fn requests_arrive_as_they_were() {
        let setup = Setup { source: "{{ é }}".into(), bos: "<s>".into(), eos: String::new(), now: Some(-1) };
        assert_eq!(Setup::from_bytes(&setup.to_bytes()).unwrap(), setup);
        let beginnings = [Beginning { messages: 2, prompt: false }, Beginning { messages: 0, prompt: true }];
        let bytes = conversation_to_bytes(&messages(), &beginnings);
        let mut pipe = Vec::new();
        write_request(&mut pipe, &bytes).unwrap();
        let mut pipe = pipe.as_slice();
        let read = read_request(&mut pipe).unwrap().unwrap();
        assert_eq!(conversation_from_bytes(&read).unwrap(), (messages(), beginnings.to_vec()));
        assert_eq!(read_request(&mut pipe).unwrap(), None);
        for length in 0..bytes.len() {
            assert!(conversation_from_bytes(&bytes[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn answers_arrive_and_others_are_refused() {
        for answer in [Answer::Text("é".into()), Answer::Refused(String::new())] {
            let mut pipe = Vec::new();
            write_answer(&mut pipe, &answer).unwrap();
            assert_eq!(read_answer(&mut pipe.as_slice()).unwrap(), answer);
        }
        for bytes in [&[0, 255, 255, 255, 255][..], &[2, 0, 0, 0, 0], &[0, 1, 0, 0, 0, 0xFF], &[0, 9, 0]] {
            assert!(read_answer(&mut &*bytes).is_err(), "{bytes:?}");
        }
    }
}
