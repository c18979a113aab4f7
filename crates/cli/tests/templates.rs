//! Chat templates as foreign code: whatever one asks for, the program ends with an error in words and soon; a good one
//! gives the same text in a process of its own.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use engraft_data::rng::Random;
use engraft_data::{ChatTemplate, Message, TemplateOptions, Tokenizer, Worker, encode_conversation};

const EXAMPLES: [&str; 5] = [
    include_str!("../../data/src/template/examples/llama3.jinja"),
    include_str!("../../data/src/template/examples/qwen.jinja"),
    include_str!("../../data/src/template/examples/mistral.jinja"),
    include_str!("../../data/src/template/examples/chatml.jinja"),
    include_str!("../../data/src/template/examples/gemma.jinja"),
];

/// The tiny Llama of the fixtures with a tokenizer of words, and `template` where there is one.
fn model(dir: &Path, template: Option<&str>) -> PathBuf {
    let model = dir.join("model");
    fs::create_dir_all(&model).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture.join(file), model.join(file)).unwrap();
    }
    let words: Vec<String> = (0..101).map(|i| format!("\"t{i}\":{i}")).collect();
    let tokenizer = format!(
        r#"{{"version":"1.0","pre_tokenizer":{{"type":"Whitespace"}},"added_tokens":[],
            "model":{{"type":"WordLevel","unk_token":"t0","vocab":{{{}}}}}}}"#,
        words.join(",")
    );
    fs::write(model.join("tokenizer.json"), tokenizer).unwrap();
    fs::write(model.join("tokenizer_config.json"), r#"{"bos_token":"t1","eos_token":"t2"}"#).unwrap();
    if let Some(template) = template {
        fs::write(model.join("chat_template.jinja"), template).unwrap();
    }
    model
}

/// Rendering in a process of the program.
fn apart() -> TemplateOptions {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_engraft"));
    TemplateOptions { now: None, worker: Some(Worker { program, arguments: vec!["template-worker".into()] }) }
}

fn here() -> TemplateOptions {
    TemplateOptions::default()
}

fn messages() -> Vec<Message> {
    let mut called = Message::new("assistant", "4 is é\u{FDD0}");
    let call =
        serde_json::json!([{"function": {"name": "f", "arguments": {"z": 0.1 + 0.2, "a": [null, true]}}}]);
    called.extra.insert("tool_calls".into(), call);
    vec![
        Message::new("user", " What is 2+2? "),
        called,
        Message::new("user", "And \"3+3\"?\n"),
        Message::new("assistant", "6"),
    ]
}

/// A template that sets `x` to `step` in a loop, beginning with `start`, and then does `end`.
fn grow(start: &str, step: &str, end: &str) -> String {
    format!(
        "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}{end}"
    )
}

/// Templates that grow a text or a list, mostly by doubling it.
fn growing() -> Vec<String> {
    let text = |step: &str| grow("'aaaaaaaaaaaaaaaa'", step, "{{ ns.x }}");
    let list = |step: &str| grow("[1, 2, 3]", step, "{{ ns.x | length }}");
    let nest = |end: &str| grow("[]", "[ns.x, ns.x]", end);
    let dict = |end: &str| grow("{}", "{'a': ns.x, 'b': ns.x}", end);
    vec![
        text("ns.x ~ ns.x"),
        text("ns.x + ns.x"),
        text("ns.x ~ ns.x ~ ns.x ~ ns.x ~ ns.x ~ ns.x ~ ns.x ~ ns.x"),
        text("ns.x[::-1] ~ ns.x"),
        text("ns.x * 16"),
        text("ns.x.replace('a', 'aaaaaaaa')"),
        text("ns.x | replace('a', 'aaaaaaaa')"),
        text("ns.x.join([ns.x, ns.x])"),
        text("[ns.x, ns.x, ns.x] | join(ns.x)"),
        text("'%s%s' | format(ns.x, ns.x)"),
        text("'{}{}'.format(ns.x, ns.x)"),
        grow("'%A'", "ns.x ~ ns.x", "{{ strftime_now(ns.x) }}"),
        grow("'a'", "ns.x ~ ns.x", "{{ raise_exception(ns.x) }}"),
        "{% set a = 'x' * 1000 %}".to_owned() + &"{% set a = a ~ a %}".repeat(40),
        "{% set a = 'x' %}".to_owned() + &"{% set a %}{{ a }}{{ a }}{% endset %}".repeat(40),
        list("(ns.x + ns.x) | list"),
        list("ns.x * 16"),
        grow("[1, 2, 3]", "ns.x + ns.x", "{{ ns.x | tojson }}"),
        nest("{{ ns.x | tojson }}"),
        nest("{{ ns.x }}"),
        nest("{{ {ns.x: 1} }}"),
        dict("{{ ns.x | tojson(indent=16) }}"),
        dict("{{ ns.x | items | list }}"),
    ]
}

/// Templates that repeat, nest, or are large themselves.
fn repeating() -> Vec<String> {
    let itself = |end: &str| "{% set ns = namespace(x=1) %}{% set ns.x = ns %}".to_owned() + end;
    let deep =
        |open: &str, close: &str| format!("{{{{ {}1{} }}}}", open.repeat(50_000), close.repeat(50_000));
    let mut bombs = vec![
        itself("{{ ns }}"),
        itself("{{ ns | tojson }}"),
        itself("{{ [ns, ns] | unique }}"),
        grow("'a'", "ns.x * 2", "{{ ns.x }}"),
        deep("[", "]"),
        deep("(", ")"),
        deep("not ", ""),
        deep("- ", ""),
        deep("1 + ", ""),
        deep("'a' ~ ", ""),
        deep("", " | upper"),
        "{% for a in b %}".repeat(20_000) + &"{% endfor %}".repeat(20_000),
        "{% if a %}".to_owned() + &"{% elif a %}".repeat(60_000) + "{% endif %}",
        "{{".repeat(500_000),
        "{#".repeat(500_000),
        "x".repeat(2 << 20),
    ];
    let short = [
        "{% set ns = namespace(x='a') %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{{ 'x' * 99999999 }}",
        "{{ 'x' * 99999999999999 }}",
        "{{ '%0999999999d' | format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ ('a\n' * 100000) | indent(1000000) }}",
        "{{ [1] | batch(1000000000, 'x') | list | length }}",
        "{{ 9 ** 999999999 }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(x) %}{{ m(x ~ x) }}{% endmacro %}{{ m('aaaaaaaaaaaaaaaa') }}",
        "{% macro m() %}{{ caller() }}{% endmacro %}{% macro n() %}{% call m() %}{{ n() }}{% endcall %}{% endmacro %}\
         {{ n() }}",
        "{% for x in [1, 2] recursive %}{{ loop([x, x]) }}{% endfor %}",
        "{% set s = 'ab' * 1000000 %}{% for i in range(99999) %}{% set y = s | upper %}{% endfor %}",
        "{% for i in range(999) %}{% set y = range(99999) | unique | list %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = ns.x + [range(99999) | list] %}{% endfor %}",
        "{% include 'chat' %}",
        "{% import '/etc/passwd' as x %}",
    ];
    bombs.extend(short.map(str::to_owned));
    bombs
}

/// Does `work` for each index below `count`, on two threads.
fn on_two_threads(count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let take = || {
        while let Some(at) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|at| *at < count) {
            work(at);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(take);
        scope.spawn(take);
    });
}

#[test]
fn fifty_bombs_end_in_errors() {
    let bombs = [growing(), repeating()].concat();
    assert!(bombs.len() >= 50, "{}", bombs.len());
    on_two_threads(bombs.len(), |at| {
        let bomb = &bombs[at];
        let name: String = bomb.chars().take(200).collect();
        let dir = tempfile::tempdir().unwrap();
        model(dir.path(), Some(bomb));
        let started = Instant::now();
        let output = Command::new(env!("CARGO_BIN_EXE_engraft"))
            .current_dir(dir.path())
            .args(["generate", "--model", "model", "--chat", "--prompt", "hi", "--max-tokens", "1"])
            .env("NO_COLOR", "1")
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{name}: {} {error}", output.status);
        assert!(error.starts_with("error: ") && error.contains("chat"), "{name}: {error}");
        assert!(!error.contains("panicked") && error.len() < 6000, "{name}: {error}");
        // The limit is 2 s; the rest is room for a busy machine.
        assert!(started.elapsed() < Duration::from_secs(10), "{name}: {:?}", started.elapsed());
    });
}

#[test]
fn a_good_template_gives_the_same_text_in_a_process_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::open(&model(dir.path(), None)).unwrap();
    let mut encoded = 0;
    for source in EXAMPLES {
        let [one, other] = [here(), apart()]
            .map(|options| ChatTemplate::new(source, Some("<s>"), Some("</s>"), &options).unwrap());
        for count in 0..=messages().len() {
            for prompt in [true, false] {
                let render = |template: &ChatTemplate| {
                    template.render(&messages()[..count], prompt).map_err(|error| error.to_string())
                };
                assert_eq!(render(&one), render(&other));
            }
        }
        let encode = |template| {
            let encoded = encode_conversation(&tokenizer, template, &messages()[..2]);
            encoded.map_err(|error| error.to_string())
        };
        assert_eq!(encode(&one), encode(&other));
        encoded += usize::from(encode(&one).is_ok());
    }
    assert!(encoded > 2, "{encoded} of the examples can be trained on");
}

#[test]
fn a_process_that_died_is_replaced() {
    let source = "{{ '%0999999999d' | format(1) if messages | length == 1 }}{{ messages | length }}";
    let template = ChatTemplate::new(source, None, None, &apart()).unwrap();
    for _ in 0..2 {
        assert_eq!(template.render(&messages(), false).unwrap(), "4");
        let error = template.render(&messages()[..1], false).unwrap_err().to_string();
        assert!(error.contains("256 MiB") && error.contains("data.template"), "{error}");
    }
    let slow = "{% set s = 'ab' * 1000000 %}{% for i in range(99999) %}{% set y = s | upper %}{% endfor %}";
    let slow = ChatTemplate::new(slow, None, None, &apart()).unwrap();
    let error = slow.render(&messages(), false).unwrap_err().to_string();
    assert!(error.contains("longer than 2 s"), "{error}");
    let Some(mut worker) = apart().worker else { panic!("a worker") };
    worker.program = "/nonexistent/engraft".into();
    let options = TemplateOptions { now: None, worker: Some(worker) };
    let error = ChatTemplate::new("x", None, None, &options).err().unwrap().to_string();
    assert!(error.contains("/nonexistent/engraft"), "{error}");
}

#[test]
fn mutants_give_the_same_in_a_process_of_their_own() {
    const MUTANTS: usize = 3000;
    let words = ["{%", "%}", "{{", "}}", "[", "loop", "é", "-1", " ~ ", "messages", "*"];
    let refused = AtomicUsize::new(0);
    on_two_threads(MUTANTS, |at| {
        let mut random = Random::new(11, at as u64, 0);
        let mut source: Vec<char> = EXAMPLES[at % EXAMPLES.len()].chars().collect();
        for _ in 0..=random.below(3) {
            let at = random.below(source.len() as u64) as usize;
            let end = source.len().min(at + 1 + random.below(12) as usize);
            let word = words[random.below(words.len() as u64) as usize];
            match random.below(3) {
                0 => drop(source.splice(at..end, [])),
                1 => drop(source.splice(at..end, word.chars())),
                _ => drop(source.splice(at..at, source[at..end].to_vec())),
            }
        }
        let source: String = source.into_iter().collect();
        let render = |options: &TemplateOptions| {
            let template = ChatTemplate::new(&source, Some("<s>"), None, options);
            template.and_then(|t| t.render(&messages(), true)).map_err(|error| error.to_string())
        };
        let found = render(&apart());
        assert_eq!(found, render(&here()), "{source}");
        refused.fetch_add(usize::from(found.is_err()), Ordering::Relaxed);
    });
    let refused = refused.into_inner();
    assert!((300..MUTANTS - 300).contains(&refused), "{refused} of {MUTANTS} mutants refused");
}

/// `text` as it goes to the process: its length, then its bytes.
fn framed(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_le_bytes(), text].concat()
}

#[test]
fn the_process_ends_with_its_input_even_while_it_renders() {
    let source = "{% for i in range(999) %}{% set y = range(99999) | unique | list %}{% endfor %}";
    let setup = [framed(source.as_bytes()), framed(b""), framed(b""), vec![0; 9]].concat();
    let whole = [&1u32.to_le_bytes()[..], &[0; 5], &[0; 4]].concat();
    for requests in [vec![], framed(&setup), [framed(&setup), framed(&whole)].concat()] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_engraft"))
            .arg("template-worker")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(&requests).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        assert!(child.try_wait().unwrap().is_none(), "it waits for its input or renders");
        drop(input);
        let started = Instant::now();
        assert!(child.wait().unwrap().success());
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    }
}

#[test]
fn the_process_is_given_no_environment() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("environment");
    let script = format!("env > {}", file.display());
    let worker = Worker { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] };
    let options = TemplateOptions { now: None, worker: Some(worker) };
    assert!(ChatTemplate::new("x", None, None, &options).is_err(), "it does not answer");
    let found = fs::read_to_string(file).unwrap();
    // Those that shells set themselves.
    let known = |line: &str| ["PWD=", "OLDPWD=", "SHLVL=", "_="].iter().any(|name| line.starts_with(name));
    assert!(found.lines().all(known), "{found}");
}

#[test]
#[ignore = "a measurement: cargo test --release -p engraft-cli --test templates -- --ignored --nocapture"]
fn overhead_of_a_process_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::open(&model(dir.path(), None)).unwrap();
    let conversation =
        [Message::new("user", "How do I reset my password?"), Message::new("assistant", "Open t3 and t4.")];
    for round in 0..3 {
        for (name, options) in [("this process", here()), ("a worker", apart())] {
            let template = ChatTemplate::new(EXAMPLES[1], Some("t1"), Some("t2"), &options).unwrap();
            let started = Instant::now();
            for _ in 0..10_000 {
                encode_conversation(&tokenizer, &template, &conversation).unwrap();
            }
            println!("round {round}: 10,000 conversations in {name}: {:?}", started.elapsed());
        }
    }
}
