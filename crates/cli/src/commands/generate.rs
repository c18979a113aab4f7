//! `engraft generate`: text from a prompt, streamed as it is made.

use std::collections::HashSet;
use std::io::Read;
use std::time::Instant;

use engraft_data::{ChatTemplate, Message, Tokenizer, encode_prompt};
use engraft_nn::Task;
use engraft_report::human;
use serde_json::json;

use crate::beam::Search;
use crate::context::Context;
use crate::engine::{Engine, ModelArgs};
use crate::failure::{BeforeWork, Failure, Outcome};
use crate::generation::{End, Prompt, Writing, answer_stream, ends_of, generate, write};
use crate::sampling::{Choice, Sampler};
use crate::stops::Stops;

/// Bytes of a prompt from standard input.
const PROMPT_MAX: u64 = 16 << 20;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft generate --model DIR --prompt 'Once upon a time'
  engraft generate --model DIR --adapter runs/a/adapter --chat \\
      --prompt 'Who are you?' --temperature 0.7 --top-p 0.9
  echo 'a long text' | engraft generate --model DIR --prompt - --json
  engraft generate --model DIR --adapter runs/a/adapter \\
      --choose eval_rank=4 --prompt 'Once upon a time'
  engraft generate --model T5 --prompt 'summarize: …' --beams 4

An encoder-decoder model reads the prompt and writes its answer.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to go on from; `-` reads it from standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Puts the prompt into the model's chat template
    #[arg(long)]
    chat: bool,
    /// The system message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// The task that the prompt is of, by its name or its number from 0, for an adapter of several; without it the adapter's own
    #[arg(long, value_name = "TASK", requires = "adapter")]
    task: Option<String>,
    /// Most tokens to write
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Spread of the draws; 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = not_negative, allow_negative_numbers = true)]
    temperature: f64,
    /// Draws from the K most probable tokens; 0 from all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draws from the fewest tokens that hold this much probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share, allow_negative_numbers = true)]
    top_p: f64,
    /// Decides the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Keeps the N most probable texts at every step and prints the best at the end
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64), conflicts_with = "temperature")]
    beams: u64,
    /// Power of the length that a text's log-probability is divided by
    #[arg(long, value_name = "P", default_value_t = 1.0, requires = "beams", allow_negative_numbers = true)]
    length_penalty: f64,
    /// Ends the search as soon as N texts have ended
    #[arg(long, requires = "beams")]
    early_stopping: bool,
    /// Ends before this text; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = some_text)]
    stop: Vec<String>,
    /// Prints one JSON object at the end instead of the text as it is made
    #[arg(long)]
    json: bool,
}

fn not_negative(text: &str) -> Result<f64, String> {
    let found = text.parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0);
    found.ok_or_else(|| "expected a number of at least 0".into())
}

fn some_text(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("expected some text".into()) } else { Ok(text.to_owned()) }
}

fn share(text: &str) -> Result<f64, String> {
    let found = text.parse::<f64>().ok().filter(|value| *value > 0.0 && *value <= 1.0);
    found.ok_or_else(|| "expected a number above 0 and at most 1".into())
}

/// Generates.
pub fn run(args: &Args, cx: &Context) -> Outcome {
    let text = prompt(args)?;
    let engine = Engine::load(&args.model, cx)?;
    let tokenizer = Tokenizer::open(&engine.dir).before_work()?;
    let prompt = encode(args, &tokenizer, &text, cx).before_work()?;
    let most = room(args, &engine, prompt.len(), cx)?;
    let ends = ends_of(&engine.dir, &tokenizer, &cx.limits).before_work()?;
    if args.beams > 1 {
        return by_beams(args, &engine, &tokenizer, &prompt, most, &ends, cx);
    }
    let read = Prompt { ids: &prompt, task: task(args, &engine)? };
    let choice = Choice { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p };
    let mut sampler = Sampler::new(choice, args.seed);

    let mut stream = answer_stream(&engine, &tokenizer, &prompt)?;
    let mut stops = Stops::new(&args.stop);
    let (mut whole, mut tokens) = (String::new(), 0usize);
    let show = |text: &str, whole: &mut String| {
        whole.push_str(text);
        if !args.json {
            cx.ui.stream(text);
        }
    };
    let started = Instant::now();
    let end = generate(&engine, read, most, &ends, &mut sampler, &mut |id| {
        tokens += 1;
        let (text, stopped) = stops.push(&stream.push(id)?);
        show(&text, &mut whole);
        Ok(!stopped)
    })?;
    if end != End::Stop {
        let (text, stopped) = stops.push(&stream.finish()?);
        show(&text, &mut whole);
        if !stopped {
            show(&stops.finish(), &mut whole);
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let speed = if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    if args.json {
        cx.ui.json(json!({
            "text": whole, "end": end.name(), "prompt_tokens": prompt.len(), "tokens": tokens, "seconds": seconds,
        }));
    } else {
        cx.ui.stream("\n");
        let counts =
            format!("{} prompt tokens, {tokens} written, {}", prompt.len(), human::duration(seconds));
        cx.ui.say(&format!("{counts}, {} tokens/s", human::count(speed)));
    }
    Ok(())
}

/// The task of the prompt.
fn task(args: &Args, engine: &Engine) -> Outcome<Option<usize>> {
    args.task.as_ref().map(|given| engine.task(given)).transpose()
}

/// The best text of a beam search, shown when it is found.
fn by_beams(
    args: &Args,
    engine: &Engine,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    most: usize,
    ends: &HashSet<u32>,
    cx: &Context,
) -> Outcome {
    let by = Search {
        beams: args.beams as usize,
        length_penalty: args.length_penalty,
        early_stopping: args.early_stopping,
    };
    let started = Instant::now();
    let read = Prompt { ids: prompt, task: task(args, engine)? };
    let found = write(engine, tokenizer, read, Writing { most, by: Some(by) }, ends)?;
    let mut stops = Stops::new(&args.stop);
    let (mut shown, stopped) = stops.push(&found.text);
    if !stopped {
        shown.push_str(&stops.finish());
    }
    let seconds = started.elapsed().as_secs_f64();
    let (written, score) = (found.tokens, found.score);
    if args.json {
        let end = if stopped { End::Stop } else { found.end };
        cx.ui.json(json!({
            "text": shown, "end": end.name(), "prompt_tokens": prompt.len(), "tokens": written, "seconds": seconds,
            "score": score,
        }));
        return Ok(());
    }
    cx.ui.stream(&shown);
    cx.ui.stream("\n");
    let counts = format!("{} prompt tokens, {written} written", prompt.len());
    let score = score.map_or(String::new(), |score| format!(", score {score:.4}"));
    cx.ui.say(&format!("{counts}{score}, {}", human::duration(seconds)));
    Ok(())
}

/// The prompt, from the arguments or standard input.
fn prompt(args: &Args) -> Outcome<String> {
    if args.prompt != "-" {
        return Ok(args.prompt.clone());
    }
    let mut text = String::new();
    let read = std::io::stdin().take(PROMPT_MAX + 1).read_to_string(&mut text);
    read.map_err(|e| Failure::before_work(format!("cannot read the prompt from standard input: {e}")))?;
    if text.len() as u64 > PROMPT_MAX {
        return Err(Failure::before_work(format!("the prompt has more than {PROMPT_MAX} bytes; shorten it")));
    }
    Ok(text)
}

fn encode(args: &Args, tokenizer: &Tokenizer, text: &str, cx: &Context) -> Outcome<Vec<u32>> {
    if !args.chat {
        return Ok(tokenizer.encode(text, true)?.ids);
    }
    if tokenizer.templates.is_empty() {
        return Err(Failure::before_work(
            "--chat needs the model's chat template, and the model has none; put the one it was trained with into its \
             directory as chat_template.jinja, or leave --chat out",
        ));
    }
    let template = ChatTemplate::of(tokenizer, None, &cx.templates()?)?;
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
    Ok(encode_prompt(tokenizer, &template, &messages)?.ids)
}

/// How many tokens may be written: what was asked for, within what the model was made for.
fn room(args: &Args, engine: &Engine, prompt: usize, cx: &Context) -> Outcome<usize> {
    if engine.model.info().task == Task::Seq2Seq {
        return Ok(args.max_tokens);
    }
    let limit = engine.model.info().max_positions;
    let rows = engine.adapter.as_ref().map_or(0, |adapter| adapter.prompt_rows());
    let left = limit.saturating_sub(prompt + rows);
    if left == 0 {
        let also =
            if rows > 0 { format!(", the adapter puts {rows} rows before them,") } else { String::new() };
        let message =
            format!("the prompt has {prompt} tokens{also} and the model was made for {limit}; shorten it");
        return Err(Failure::before_work(message));
    }
    if left < args.max_tokens {
        cx.ui.note(&format!("the model was made for {limit} tokens: at most {left} are written"));
    }
    Ok(left.min(args.max_tokens))
}
