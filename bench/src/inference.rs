//! `engraft-bench inference`: what an adapter costs where a model is used, beside the base alone.
//!
//! Two models: MiniLM reads sequences (one number: reading), a Llama of random weights reads a text and writes on (reading, and a
//! token written with the cache). All adapters of a model share its packed base; they take turns round by round, and a ratio is
//! the median over rounds of the ratio to the base's time in the same round, beside half of what its middle half spans.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use engraft_model::Packed;
use serde_json::{Value, json};

use crate::base::{Llama, write_llama, write_tokens};
use crate::median;
use crate::open::open;
use crate::reader::Reader;

#[derive(clap::Args)]
pub struct Args {
    /// Where recipes and the model of random weights are put
    #[arg(long, default_value = "target/bench/inference")]
    folder: PathBuf,
    /// Rounds, each of one reading and some written tokens with every adapter
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Tokens of a sequence that is read
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Sequences that MiniLM reads at once
    #[arg(long, default_value_t = 8)]
    sequences: usize,
    /// Tokens written a round
    #[arg(long, default_value_t = 16)]
    written: usize,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Only adapters whose name holds one of these texts, parted by commas, and the base
    #[arg(long)]
    only: Option<String>,
    /// Write the results here too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Names in the table and settings of recipes.
const ADAPTERS: &[(&str, &str)] = &[
    ("adapter, Pfeiffer", "name = \"bottleneck\""),
    ("adapter, Houlsby", "name = \"bottleneck\"\nform = \"houlsby\""),
    ("adapter, parallel", "name = \"bottleneck\"\nform = \"parallel\"\nreduction = 16"),
    ("AdapterDrop, first half", "name = \"bottleneck\"\ndrop = HALF"),
    ("wide Houlsby", "name = \"bottleneck\"\nform = \"houlsby\"\nreduction = 2"),
    (
        "AdapterDrop of wide, first half",
        "name = \"bottleneck\"\nform = \"houlsby\"\nreduction = 2\ndrop = HALF",
    ),
    ("CoDA, a third", "name = \"coda\""),
    ("AdapterFusion of two", "name = \"adapter_fusion\"\nadapters = SAVED"),
    ("AdaMix", "name = \"adamix\""),
    ("Hyperformer", "name = \"hyperformer\""),
    ("PHA", "name = \"pha\""),
    ("CIAT", "name = \"ciat\""),
    ("AdaptFormer", "name = \"adaptformer\""),
    ("SparseAdapter", "name = \"sparse_adapter\"\nscore = \"magnitude\""),
    ("MoV", "name = \"mov\""),
    ("side-tuning", "name = \"side_tuning\""),
    ("Res-Tuning", "name = \"res_tuning\""),
    ("Compacter", "name = \"compacter\""),
    ("KronA^B", "name = \"krona_b\""),
    ("SSF", "name = \"ssf\""),
    ("LoReFT", "name = \"reft\""),
    ("(IA)³", "name = \"ia3\""),
    ("ladder side-tuning", "name = \"lst\""),
    ("prompt of 20", "name = \"prompt\"\ntokens = 20"),
    ("SMoP, 4 of 20", "name = \"smop\"\nprompts = 4\ntokens = 20"),
    ("prompt of 5", "name = \"prompt\"\ntokens = 5"),
    ("SMoP, 4 of 5", "name = \"smop\"\nprompts = 4\ntokens = 5"),
    ("P-tuning of 20", "name = \"p_tuning\"\ntokens = 20"),
    ("MPT", "name = \"mpt\"\ntokens = 20"),
    ("DePT", "name = \"dept\""),
    ("XPrompt of 20", "name = \"xprompt\"\ntokens = 20\nscore_steps = 1"),
    ("APT", "name = \"apt\""),
    ("IDPG", "name = \"idpg\""),
    ("late prompt", "name = \"lpt\""),
    ("prefix of 20", "name = \"prefix\"\ntokens = 20"),
    ("LLaMA-Adapter", "name = \"llama_adapter\""),
    ("LLaMA-Adapter v2", "name = \"llama_adapter_v2\""),
    ("MAM", "name = \"mam\"\nprojection = 0\nreduction = 16"),
    ("UniPELT", "name = \"unipelt\"\nprojection = 0"),
    ("ProPETL", "name = \"propetl\""),
    ("S4", "name = \"s4\""),
    ("LoRA", "name = \"lora\"\ntargets = \"all-linear\""),
    ("DoRA", "name = \"lora\"\ndora = true\ntargets = \"all-linear\""),
    ("OFT", "name = \"oft\"\ntargets = \"all-linear\""),
    ("sparse mask, 0.5 %", "name = \"random_mask\"\ndensity = 0.005\ntargets = \"all-linear\""),
];

/// A model with an adapter, or with none, and the times of its rounds.
struct Racer {
    name: &'static str,
    reader: Reader,
    /// Seconds to read, a round.
    read: Vec<f64>,
    /// Seconds a written token, a round.
    written: Vec<f64>,
}

/// Measures both models and prints their tables.
pub fn run(args: &Args) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global()?;
    std::fs::create_dir_all(&args.folder)?;
    let folder = args.folder.canonicalize()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize()?;
    let rows = root.join("data/helpdesk/train.csv").display().to_string();
    let encoder = Setting {
        model: root.join("models/all-minilm-l6-v2"),
        task: "sequence-classification",
        data: format!(
            "format = \"csv\"\npath = {rows:?}\ncolumns = {{ text = \"text\", label = \"intent\" }}"
        ),
        layers: 6,
        sequences: args.sequences,
        writes: false,
    };
    let llama = Llama { width: 768, inner: 2048, layers: 12, heads: 12, kv_heads: 12, vocabulary: 32_000 };
    write_llama(&folder.join("llama"), &llama, 2048)?;
    let tokens = folder.join("tokens.safetensors");
    write_tokens(&tokens, 2, 16, llama.vocabulary)?;
    let decoder = Setting {
        model: folder.join("llama"),
        task: "causal-lm",
        data: format!("format = \"tensors\"\npath = {:?}", tokens.display().to_string()),
        layers: llama.layers,
        sequences: 1,
        writes: true,
    };
    let mut all = Vec::new();
    for (title, setting) in [("MiniLM", &encoder), ("Llama of 137 M", &decoder)] {
        let mut racers = start(args, setting, &folder)?;
        // The first round warms caches and pools.
        for round in 0..=args.rounds {
            for racer in &mut racers {
                racer.race(args, setting, round > 0).with_context(|| racer.name.to_owned())?;
            }
        }
        all.push(json!({ "model": title, "adapters": table(title, args, setting, &mut racers) }));
    }
    if let Some(path) = &args.json {
        let all = json!({ "threads": args.threads, "rounds": args.rounds, "length": args.length,
            "sequences": args.sequences, "written": args.written, "models": all });
        std::fs::write(path, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// A model and how it is used.
struct Setting {
    model: PathBuf,
    task: &'static str,
    data: String,
    layers: usize,
    sequences: usize,
    writes: bool,
}

impl Setting {
    fn recipe(&self, method: &str) -> String {
        format!(
            "model = {:?}\ntask = {:?}\n[method]\n{method}\n[data]\n{}\n[train]\nsteps = 8\n",
            self.model.display().to_string(),
            self.task,
            self.data
        )
    }
}

/// The base, and every adapter that the model can have.
fn start(args: &Args, setting: &Setting, folder: &Path) -> Result<Vec<Racer>> {
    let packed = Packed::default();
    let mut racers = Vec::new();
    // The base alone is opened with a small adapter, and used without it.
    let base = [("the base alone", "name = \"ia3\"")];
    for (name, settings) in base.iter().chain(ADAPTERS) {
        let alone = racers.is_empty();
        if !alone && args.only.as_ref().is_some_and(|only| !only.split(',').any(|text| name.contains(text))) {
            continue;
        }
        let recipe = folder.join("recipe.toml");
        let mut settings = settings.replace("HALF", &(setting.layers / 2).to_string());
        if settings.contains("SAVED") {
            settings = settings.replace("SAVED", &saved(setting, folder)?);
        }
        std::fs::write(&recipe, setting.recipe(&settings))?;
        match open(&recipe, &packed) {
            Ok(session) => {
                let reader = if alone { Reader::base(session) } else { Reader::adapted(session) };
                racers.push(Racer { name, reader, read: Vec::new(), written: Vec::new() });
            }
            // CoDA reads and cannot write; what a model cannot have is told, not passed over.
            Err(error) if !alone => eprintln!("{name}: {}", format!("{error:#}").replace('\n', " ")),
            Err(error) => return Err(error),
        }
    }
    Ok(racers)
}

/// Two adapters of eight steps each, as a list of a recipe.
fn saved(setting: &Setting, folder: &Path) -> Result<String> {
    let (recipe, mut paths) = (folder.join("saved.toml"), Vec::new());
    std::fs::write(&recipe, setting.recipe("name = \"bottleneck\""))?;
    for name in ["saved-1", "saved-2"] {
        let run = folder.join(name);
        if run.exists() {
            std::fs::remove_dir_all(&run)?;
        }
        let engraft = std::env::current_exe()?.with_file_name("engraft");
        let mut command = Command::new(&engraft);
        command.arg("train").arg(&recipe).arg("--out").arg(&run).arg("-q");
        let output = command.output().with_context(|| format!("cannot run {}", engraft.display()))?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        paths.push(format!("{:?}", run.join("adapter").display().to_string()));
    }
    Ok(format!("[{}]", paths.join(", ")))
}

impl Racer {
    fn race(&mut self, args: &Args, setting: &Setting, counts: bool) -> Result<()> {
        let texts = self.reader.texts(setting.sequences, 0, args.length)?;
        let started = Instant::now();
        if !setting.writes {
            self.reader.read(&texts)?;
            if counts {
                self.read.push(started.elapsed().as_secs_f64());
            }
            return Ok(());
        }
        let cache = self.reader.cache(setting.sequences, args.length + args.written);
        self.reader.feed(&texts, &cache)?;
        let read = started.elapsed().as_secs_f64();
        let started = Instant::now();
        for i in 0..args.written {
            self.reader.feed(&self.reader.texts(setting.sequences, args.length + i, 1)?, &cache)?;
        }
        if counts {
            self.read.push(read);
            self.written.push(started.elapsed().as_secs_f64() / args.written as f64);
        }
        Ok(())
    }
}

fn table(title: &str, args: &Args, setting: &Setting, racers: &mut [Racer]) -> Vec<Value> {
    println!("\n{title}: {} × {} tokens read\n", setting.sequences, args.length);
    let writes = if setting.writes {
        (" a token written, ms | beside the base |", " ---: | ---: |")
    } else {
        ("", "")
    };
    println!("| adapter | trained | reading, ms | beside the base |{}", writes.0);
    println!("| --- | ---: | ---: | ---: |{}", writes.1);
    let Some((base, _)) = racers.split_first() else { return Vec::new() };
    let (base_read, base_written) = (base.read.clone(), base.written.clone());
    racers
        .iter_mut()
        .map(|racer| {
            let trained = racer.reader.adapter.as_ref().map_or(0, |adapter| adapter.trained_count());
            let (read, to_base, spread) = beside(&mut racer.read, &base_read);
            let (written, written_to_base, written_spread) = beside(&mut racer.written, &base_written);
            let cells = if setting.writes {
                format!(" {:.2} | {written_to_base:.3} ± {written_spread:.3} |", 1e3 * written)
            } else {
                String::new()
            };
            println!(
                "| {} | {trained} | {:.1} | {to_base:.3} ± {spread:.3} |{cells}",
                racer.name,
                1e3 * read
            );
            json!({ "adapter": racer.name, "trained": trained, "read_seconds": read, "read_to_base": to_base,
                "read_to_base_spread": spread, "written_seconds": written, "written_to_base": written_to_base,
                "written_to_base_spread": written_spread })
        })
        .collect()
}

/// The median, the median of the ratios to the base's times of the same rounds, and half of what the middle half of these spans.
fn beside(times: &mut [f64], base: &[f64]) -> (f64, f64, f64) {
    let mut ratios: Vec<f64> = times.iter().zip(base).map(|(time, base)| time / base).collect();
    let middle = median(&mut ratios);
    ratios.sort_by(f64::total_cmp);
    let at = |share: f64| ratios.get((share * ratios.len() as f64) as usize).copied().unwrap_or(middle);
    (median(times), middle, (at(0.75) - at(0.25)) / 2.0)
}
