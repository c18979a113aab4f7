//! Settings under which a run that is too large for the memory would fit.

use engraft_recipe::{Dtype, Quantize};

use crate::estimate::{Estimate, activations};
use crate::session::Session;

/// Settings that need less memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Smaller {
    /// `KEY=VALUE`, as one would write them after `--set`.
    pub settings: Vec<String>,
    /// What the run would take with all of them.
    pub total_bytes: u64,
}

/// What decides most of the memory.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    checkpointing: bool,
    four_bits: bool,
}

impl Shape {
    fn total_bytes(self, session: &Session, sizes: &Estimate) -> u64 {
        let rows = session.plan.train.batch_size.max(1);
        let tokens = (sizes.largest_batch_tokens * self.rows).div_ceil(rows);
        let base = sizes.base_bytes - if self.four_bits { saved_by_four_bits(session) } else { 0 };
        base + sizes.adapter_bytes + activations(session, tokens, self.checkpointing)
    }
}

fn saved_by_four_bits(session: &Session) -> u64 {
    let blocks = session.model_bytes.blocks as u64;
    let bytes_a_weight = if session.plan.train.dtype == Dtype::F32 { 4 } else { 2 };
    // Half a byte a weight, and a 64th more for the scales.
    blocks - (blocks / bytes_a_weight) * 33 / 64
}

/// Ever smaller settings, each list with those before it: first those that change no number (recomputing blocks, taking the
/// rows of a step one after another), then four-bit weights. The last one fits into `available` bytes if any does.
pub fn smaller(session: &Session, sizes: &Estimate, available: u64) -> Vec<Smaller> {
    let train = &session.plan.train;
    let four_bits = session.plan.base.quantize != Quantize::None;
    let start =
        Shape { rows: train.batch_size, checkpointing: train.gradient_checkpointing, four_bits: false };
    let fits = |shape: Shape| shape.total_bytes(session, sizes) <= available;
    let mut steps: Vec<(Vec<String>, Shape)> = Vec::new();
    let mut shape = start;
    if !shape.checkpointing {
        shape.checkpointing = true;
        steps.push((vec!["train.gradient_checkpointing=true".into()], shape));
    }
    let divisors = (1..train.batch_size).rev().filter(|n| train.batch_size.is_multiple_of(*n));
    let rows: Vec<usize> = divisors.collect();
    let fitting = rows.iter().copied().find(|&rows| fits(Shape { rows, ..shape }));
    if let Some(rows) = fitting.or(rows.last().copied()) {
        shape.rows = rows;
        let accumulation = train.gradient_accumulation * (train.batch_size / rows);
        let settings =
            vec![format!("train.batch_size={rows}"), format!("train.gradient_accumulation={accumulation}")];
        steps.push((settings, shape));
    }
    if !four_bits {
        steps.push((vec!["base.quantize=nf4".into()], Shape { four_bits: true, ..shape }));
    }
    let mut settings = Vec::new();
    let mut found = Vec::new();
    for (more, shape) in steps {
        settings.extend(more);
        found.push(Smaller { settings: settings.clone(), total_bytes: shape.total_bytes(session, sizes) });
        if fits(shape) {
            break;
        }
    }
    found
}
