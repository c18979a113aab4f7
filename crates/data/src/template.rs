//! Chat templates: messages to the text that a model was trained on, by the Jinja source that comes with it.
//!
//! The source is foreign code, so it is rendered without a loader, with only the variables that `transformers` gives,
//! with limits on its length, its steps and its output. Values that grow inside one expression are not bounded by
//! those: where there is a [`Worker`], a template that is not the plain one is compiled and rendered in a process with
//! limits on memory and time, with the same result. Without one (a test, another program) all happens in this process.

mod wire;
mod worker;

use std::fmt::Write as _;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value};

use crate::clock;
use crate::error::{Error, Result, not_among};
use crate::read::Message;
use crate::template::wire::Setup;
use crate::template::worker::{Answers, Apart};
pub use crate::template::worker::{MEMORY_LIMIT, Worker, serve};
use crate::tokenizer::Tokenizer;

/// The longest template source, in bytes.
pub const SOURCE_LIMIT: u64 = 1 << 20;
/// The most steps of one rendering.
const FUEL: u64 = 1_000_000;
/// The longest output of one rendering, in bytes; also of all that it captures in blocks on the way, times eight.
const OUTPUT_LIMIT: usize = 8 << 20;
/// The longest error, in bytes: a template may raise one with any text.
const ERROR_LIMIT: usize = 4096;
/// 26 July 2024, the date that Llama's templates take when they are given none: training must not depend on the day.
const FIXED_DATE: i64 = 1_721_952_000;

/// The plain form, for models without a template; asked for by name.
const PLAIN: &str = "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\
{{ eos_token if message.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}";

/// What a template is given besides messages.
#[derive(Clone, Debug, Default)]
pub struct TemplateOptions {
    /// The time it may ask for, in seconds since 1970 (UTC), or none for a fixed date, so that a run gives the same
    /// bits on any day.
    pub now: Option<i64>,
    /// The process that renders it; none to render it in this one, without a limit on memory.
    pub worker: Option<Worker>,
}

/// A chat template, ready to render.
pub struct ChatTemplate {
    place: Place,
}

/// Where a template is rendered.
enum Place {
    Here(Compiled),
    Apart(Apart),
}

/// A beginning of a conversation, to be rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beginning {
    /// How many messages of it.
    pub messages: usize,
    /// Whether it ends where an answer begins.
    pub prompt: bool,
}

impl ChatTemplate {
    /// Compiles `source`. `bos` and `eos` are the tokens it may name.
    ///
    /// # Errors
    /// A source that is too long, or not Jinja; a worker that cannot be started.
    pub fn new(
        source: &str,
        bos: Option<&str>,
        eos: Option<&str>,
        options: &TemplateOptions,
    ) -> Result<ChatTemplate> {
        if source.len() as u64 > SOURCE_LIMIT {
            let (what, help) = ("the chat template".into(), "check that data.template names a template");
            return Err(Error::TooLarge { what, found: source.len() as u64, limit: SOURCE_LIMIT, help });
        }
        let (bos, eos) = (bos.unwrap_or("").to_owned(), eos.unwrap_or("").to_owned());
        let setup = Setup { source: source.to_owned(), bos, eos, now: options.now };
        let place = match &options.worker {
            Some(worker) => Place::Apart(Apart::new(worker, &setup)?),
            None => Place::Here(Compiled::new(setup)?),
        };
        Ok(ChatTemplate { place })
    }

    /// The template of `tokenizer` called `name` (its default without a name).
    ///
    /// # Errors
    /// The tokenizer has none, or none of that name; as [`ChatTemplate::new`].
    pub fn of(tokenizer: &Tokenizer, name: Option<&str>, options: &TemplateOptions) -> Result<ChatTemplate> {
        let names: Vec<&str> = tokenizer.templates.iter().map(|template| template.name.as_str()).collect();
        if names.is_empty() {
            let message = "the model has no chat template; set data.template to a template file of the format it was \
                           trained on, or to \"plain\" for `User: …`, `Assistant: …` lines";
            return Err(fail(message));
        }
        let wanted = name.unwrap_or(names[0]);
        let found = tokenizer.templates.iter().find(|template| template.name == wanted);
        let found = found.ok_or_else(|| fail(not_among("chat template", wanted, &names)))?;
        ChatTemplate::new(&found.source, tokenizer.bos.as_deref(), tokenizer.eos.as_deref(), options)
    }

    /// The plain form: a line `User: …` or `Assistant: …` for each message, the end token after each answer. It is
    /// rendered in this process: its source is known.
    ///
    /// # Errors
    /// None in practice; the source is compiled like any other.
    pub fn plain(tokenizer: &Tokenizer) -> Result<ChatTemplate> {
        let (bos, eos) = (tokenizer.bos.as_deref(), tokenizer.eos.as_deref());
        ChatTemplate::new(PLAIN, bos, eos, &TemplateOptions::default())
    }

    /// The text of `messages`; with `add_generation_prompt` ending where an answer begins.
    ///
    /// # Errors
    /// What the template raises, and its limits.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let whole = Beginning { messages: messages.len(), prompt: add_generation_prompt };
        self.renderings(messages, vec![whole])?.next()
    }

    /// The texts of `beginnings` of `messages`, one after another. To ask for all at once spares a worker's time.
    pub(crate) fn renderings(
        &self,
        messages: &[Message],
        beginnings: Vec<Beginning>,
    ) -> Result<Renderings<'_>> {
        Ok(match &self.place {
            Place::Here(template) => {
                Renderings::Here(template, Compiled::values(messages), beginnings.into_iter())
            }
            Place::Apart(apart) => Renderings::Apart(apart.renderings(messages, &beginnings)?),
        })
    }
}

/// Texts that were asked for, in their order.
pub(crate) enum Renderings<'a> {
    Here(&'a Compiled, Vec<Value>, std::vec::IntoIter<Beginning>),
    Apart(Answers<'a>),
}

impl Renderings<'_> {
    /// The next text.
    ///
    /// # Errors
    /// What the template raises, and its limits; also to take more than was asked for, or anything after an error.
    pub fn next(&mut self) -> Result<String> {
        let next = match self {
            Renderings::Here(template, messages, beginnings) => {
                beginnings.next().map(|beginning| template.render(messages, beginning))
            }
            Renderings::Apart(answers) => answers.next(),
        };
        next.unwrap_or_else(|| Err(fail("no further rendering was asked for")))
    }
}

/// A template compiled in this process, with the tokens it may name.
pub(crate) struct Compiled {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl Compiled {
    fn new(setup: Setup) -> Result<Compiled> {
        let now = setup.now.unwrap_or(FIXED_DATE);
        let source = without_generation_tags(&setup.source);
        let environment = fenced(|| environment(source, now))?;
        Ok(Compiled { environment, bos: setup.bos, eos: setup.eos })
    }

    /// Messages as the template sees them.
    fn values(messages: &[Message]) -> Vec<Value> {
        messages.iter().map(message_value).collect()
    }

    fn render(&self, messages: &[Value], beginning: Beginning) -> Result<String> {
        let context = Value::from_pairs([
            ("messages", messages[..beginning.messages].iter().cloned().collect::<Value>()),
            ("add_generation_prompt", Value::from(beginning.prompt)),
            ("bos_token", Value::from(self.bos.as_str())),
            ("eos_token", Value::from(self.eos.as_str())),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        fenced(|| {
            let mut output = Capped { bytes: Vec::new() };
            let template = self.environment.get_template("chat")?;
            template.render_captured_to(context, &mut output).map_err(|error| match error.kind() {
                ErrorKind::WriteFailure => too_long(),
                _ => error,
            })?;
            String::from_utf8(output.bytes)
                .map_err(|_| minijinja::Error::new(ErrorKind::BadSerialization, "not UTF-8"))
        })
    }
}

fn fail(message: impl Into<String>) -> Error {
    Error::Template { message: message.into() }
}

fn too_long() -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, format!("its output passes {OUTPUT_LIMIT} bytes"))
}

/// Runs `call` into the template library; its panic is an error in words.
fn fenced<T>(call: impl FnOnce() -> std::result::Result<T, minijinja::Error>) -> Result<T> {
    match crate::fence::fenced(call) {
        Ok(result) => result.map_err(|error| {
            let mut message = error.to_string();
            if message.len() > ERROR_LIMIT {
                message.truncate(message.floor_char_boundary(ERROR_LIMIT));
                message.push('…');
            }
            fail(message)
        }),
        Err(_) => Err(fail("the template library failed inside; the template is malformed")),
    }
}

/// `{% generation %}` marks answers for `transformers`' masks; here prefixes find them, so the tags become comments,
/// which trim blanks around them as tags do.
fn without_generation_tags(source: &str) -> String {
    let (mut text, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        text.push_str(before);
        let Some(end) = tag[2..].find("%}").map(|at| at + 2) else {
            rest = tag;
            break;
        };
        let inside = &tag[2..end];
        match inside.trim_matches(['-', '+']).trim() {
            "generation" | "endgeneration" => {
                let left = if inside.starts_with('-') { "{#-" } else { "{#" };
                let right = if inside.ends_with('-') { "-#}" } else { "#}" };
                let _ = write!(text, "{left} {right}");
            }
            _ => text.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    text + rest
}

/// Jinja as `transformers` sets it up.
fn environment(source: String, now: i64) -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    let syntax = environment.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(100);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|output, state, value| {
        let size = value.as_str().map_or(0, str::len);
        let written = state.get_temp("written").and_then(|written| written.as_usize()).unwrap_or(0);
        let written = written.saturating_add(size);
        if size > OUTPUT_LIMIT || written > OUTPUT_LIMIT * 8 {
            return Err(too_long());
        }
        state.set_temp("written", Value::from(written));
        minijinja::escape_formatter(output, state, value)
    });
    environment.add_filter("tojson", to_json);
    environment.add_function(
        "raise_exception",
        |message: String| -> std::result::Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("it refuses these messages: {message}"),
            ))
        },
    );
    environment.add_function("strftime_now", move |format: String| clock::format(now, &format));
    environment.add_template_owned("chat", source)?;
    Ok(environment)
}

/// Python's methods of text, lists and dicts; those that multiply text are bounded.
fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> std::result::Result<Value, minijinja::Error> {
    let longest = args.iter().filter_map(|arg| arg.as_str().map(str::len)).max().unwrap_or(1).max(1);
    let size = value.as_str().map_or(0, str::len);
    if matches!(name, "replace" | "join" | "format") && size.saturating_mul(longest) > OUTPUT_LIMIT * 8 {
        return Err(too_long());
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn message_value(message: &Message) -> Value {
    let own = [("role", &message.role), ("content", &message.content)];
    let own = own.map(|(key, text)| (key.to_owned(), Value::from(text.as_str())));
    Value::from_pairs(
        own.into_iter().chain(message.extra.iter().map(|(key, value)| (key.clone(), from_json(value)))),
    )
}

fn from_json(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(float)) => Value::from(float),
            (None, None) => Value::from(number.to_string()),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(list) => list.iter().map(from_json).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(key, value)| (key.clone(), from_json(value))))
        }
    }
}

/// `tojson` as `transformers` defines it: Python's `json.dumps` with `ensure_ascii` off, and no HTML escapes.
fn to_json(value: Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?.map(|indent| indent.min(16));
    // Python's other options change nothing in published templates.
    let _ = (options.get::<Option<bool>>("ensure_ascii")?, options.get::<Option<bool>>("sort_keys")?);
    options.assert_all_used()?;
    let mut text = String::new();
    write_json(&mut text, &value, indent, 0)?;
    Ok(text)
}

fn write_json(
    text: &mut String,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
) -> std::result::Result<(), minijinja::Error> {
    if depth > 100 || text.len() > OUTPUT_LIMIT {
        return Err(too_long());
    }
    let quoted = |part: &str| serde_json::Value::from(part).to_string();
    let (open, close) = match value.kind() {
        ValueKind::Map => ('{', '}'),
        ValueKind::Seq | ValueKind::Iterable => ('[', ']'),
        ValueKind::Undefined | ValueKind::None => {
            text.push_str("null");
            return Ok(());
        }
        ValueKind::Bool => {
            text.push_str(if value.is_true() { "true" } else { "false" });
            return Ok(());
        }
        ValueKind::Number => {
            let _ = write!(text, "{value}");
            return Ok(());
        }
        _ => {
            text.push_str(&quoted(&value.to_string()));
            return Ok(());
        }
    };
    text.push(open);
    let line = |text: &mut String, depth: usize| {
        if let Some(indent) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let mut empty = true;
    for item in value.try_iter()? {
        if !empty {
            text.push_str(if indent.is_some() { "," } else { ", " });
        }
        empty = false;
        line(text, depth + 1);
        if open == '{' {
            let _ = write!(text, "{}: ", quoted(&item.to_string()));
            write_json(text, &value.get_item(&item)?, indent, depth + 1)?;
        } else {
            write_json(text, &item, indent, depth + 1)?;
        }
    }
    if !empty {
        line(text, depth);
    }
    text.push(close);
    Ok(())
}

struct Capped {
    bytes: Vec<u8>,
}

impl std::io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > OUTPUT_LIMIT {
            return Err(std::io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
