//! `engraft-bench matmul`: the forward product with a frozen matrix beside PyTorch's `F.linear`, and the backward product.
//!
//! Engine and peer take turns round by round, so that a machine that slows down does so for both; medians are compared.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use engraft_tensor::cpu::gemm::{PackedMatrix, Precision, isa, peak_flops};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;
use serde_json::json;

use crate::median;
use crate::peer::Peer;

/// `(rows, out, in)` of the linears in a training step.
const SHAPES: [(usize, usize, usize); 4] =
    [(1024, 768, 768), (1024, 3072, 768), (1024, 2048, 2048), (512, 4096, 4096)];

/// Short runs of the tile alone in each round; the best counts.
const PEAK_TRIES: usize = 20;

#[derive(clap::Args)]
pub struct Args {
    /// The Python that has PyTorch (bench/requirements.txt)
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// Rounds, each of one product of the engine and one of the peer
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Numbers of threads
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    /// Rows in place of each shape's own: 1 is decoding
    #[arg(long)]
    rows: Option<usize>,
    /// Write the results here too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One line of the table.
#[derive(Serialize)]
struct Line {
    rows: usize,
    out: usize,
    r#in: usize,
    precision: &'static str,
    threads: usize,
    forward_gflops: f64,
    backward_gflops: f64,
    /// The tile's peak on one core in the same rounds: where others use the machine, it changes from minute to minute.
    peak_gflops: f64,
    /// The forward rate as a share of this peak on as many cores.
    forward_share_of_peak: f64,
    peer_gflops: Option<f64>,
    ratio_to_peer: Option<f64>,
}

/// Measures every shape and prints the table.
pub fn run(args: &Args) -> Result<()> {
    let (mut peer, version) = match Peer::start(&args.python, "matmul.py") {
        Ok((peer, hello)) => (Some(peer), hello["version"].as_str().map(str::to_owned)),
        Err(error) => {
            println!(
                "No peer: {error:#}. Install bench/requirements.txt and pass --python PATH; ratios are left out."
            );
            (None, None)
        }
    };
    let peaks = [Precision::F32, Precision::Bf16].map(|precision| peak_flops(precision, 2000) / 1e9);
    println!("instructions {}, peer PyTorch {}", isa().name(), version.as_deref().unwrap_or("missing"));
    println!("peak of the tile on one core: f32 {:.0}, bf16 {:.0} GFLOP/s", peaks[0], peaks[1]);
    println!(
        "{:>20} {:>5} {:>7} {:>8} {:>6} {:>9} {:>7} {:>6}",
        "rows x out x in", "", "threads", "forward", "peak", "backward", "peer", "ratio"
    );
    let mut lines = Vec::new();
    for &threads in &args.threads {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
        for (rows, out, inn) in SHAPES {
            let shape = (args.rows.unwrap_or(rows), out, inn);
            for precision in [Precision::F32, Precision::Bf16] {
                let line = measure(args.rounds, &pool, shape, precision, peer.as_mut())?;
                print_line(&line);
                lines.push(line);
            }
        }
    }
    if let Some(path) = &args.json {
        let all = json!({ "instructions": isa().name(), "peer": version, "peak_gflops_f32": peaks[0],
            "peak_gflops_bf16": peaks[1], "lines": lines });
        std::fs::write(path, format!("{all:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn print_line(line: &Line) {
    let shape = format!("{} x {} x {}", line.rows, line.out, line.r#in);
    let number = |value: Option<f64>, digits| value.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
    println!(
        "{shape:>20} {:>5} {:>7} {:>8.0} {:>5.0}% {:>9.0} {:>7} {:>6}",
        line.precision,
        line.threads,
        line.forward_gflops,
        100.0 * line.forward_share_of_peak,
        line.backward_gflops,
        number(line.peer_gflops, 0),
        number(line.ratio_to_peer, 2),
    );
}

fn measure(
    rounds: usize,
    pool: &ThreadPool,
    (rows, out, inn): (usize, usize, usize),
    precision: Precision,
    mut peer: Option<&mut Peer>,
) -> Result<Line> {
    let name = match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    };
    let threads = pool.current_num_threads();
    let packed = PackedMatrix::pack(out, inn, precision, &mut |range, dense| {
        dense.copy_from_slice(&values(range.len() * inn, range.start));
    });
    let (x, dy) = (values(rows * inn, 1), values(rows * out, 2));
    let (mut y, mut dx) = (vec![0.0; rows * out], vec![0.0; rows * inn]);
    let request =
        json!({ "rows": rows, "out": out, "in": inn, "precision": name, "threads": threads, "runs": 1 });
    let (mut forward, mut backward, mut peers, mut peaks) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let peak = peak_flops(precision, PEAK_TRIES) / 1e9;
        // Each once untimed, as in the peer: caches are warm and threads awake for both.
        let mut forward_once = || pool.install(|| seconds(|| packed.forward(&x, rows, None, &mut y)));
        let (_, first) = (forward_once(), forward_once());
        let mut backward_once = || pool.install(|| seconds(|| packed.backward(&dy, rows, false, &mut dx)));
        let (_, second) = (backward_once(), backward_once());
        let other = match &mut peer {
            Some(peer) => Some(peer.ask(&request)?["seconds"][0].as_f64().context("the peer gave no time")?),
            None => None,
        };
        // The first round warms caches and pools.
        if round > 0 {
            forward.push(first);
            backward.push(second);
            peaks.push(peak);
            peers.extend(other);
        }
    }
    let gflop = 2e-9 * rows as f64 * out as f64 * inn as f64;
    let peak_gflops = median(&mut peaks);
    let forward_gflops = gflop / median(&mut forward);
    let peer_gflops = (!peers.is_empty()).then(|| gflop / median(&mut peers));
    Ok(Line {
        rows,
        out,
        r#in: inn,
        precision: name,
        threads,
        forward_gflops,
        backward_gflops: gflop / median(&mut backward),
        peak_gflops,
        forward_share_of_peak: forward_gflops / (peak_gflops * threads as f64),
        peer_gflops,
        ratio_to_peer: peer_gflops.map(|rate| forward_gflops / rate),
    })
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Values in [-1, 1), the same in every run.
fn values(len: usize, seed: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0;
    (0..len).map(value).collect()
}
