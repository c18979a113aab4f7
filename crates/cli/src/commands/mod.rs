//! The commands, one a file.

mod combine;
mod compare;
mod completions;
mod convert;
mod doctor;
mod eval;
mod extract;
mod generate;
mod init;
mod inspect;
pub mod logits;
mod merge;
mod methods;
mod plan;
mod report;
mod schema;
pub mod template_worker;
mod together;
mod train;

use crate::context::Context;
use crate::failure::Outcome;

/// What to do.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Trains by a recipe
    Train(train::Args),
    /// Shows what a run would take: parameters, memory and time
    Plan(plan::Args),
    /// Scores a model and its adapter on data
    Eval(eval::Args),
    /// Writes text after a prompt
    Generate(generate::Args),
    /// Folds an adapter into a plain model directory
    Merge(merge::Args),
    /// Combines adapters into one
    Combine(combine::Args),
    /// Shows how alike prompts and other adapters of one model are
    Compare(compare::Args),
    /// Makes an adapter of what differs between two models
    Extract(extract::Args),
    /// Makes an adapter of a LoRA file of another program, or another program's of an adapter
    Convert(convert::Args),
    /// Computes logits of given tensors
    Logits(logits::Args),
    /// Looks at data and writes a recipe for it, with reasons
    Init(init::Args),
    /// Shows the methods and their settings
    Methods(methods::Args),
    /// Shows what a model, adapter, run or checkpoint holds
    Inspect(inspect::Args),
    /// Writes the report of a run as one HTML file
    Report(report::Args),
    /// Checks what this machine can do
    Doctor(doctor::Args),
    /// Prints the JSON Schema of recipes, for editors
    Schema(schema::Args),
    /// Prints shell completions or manual pages
    Completions(completions::Args),
    /// Renders a chat template for another process of this program
    #[command(name = template_worker::NAME, hide = true)]
    TemplateWorker,
}

impl Command {
    /// Runs the command.
    pub fn run(&self, cx: &Context) -> Outcome {
        match self {
            Command::Train(args) => train::run(args, cx),
            Command::Plan(args) => plan::run(args, cx),
            Command::Eval(args) => eval::run(args, cx),
            Command::Generate(args) => generate::run(args, cx),
            Command::Merge(args) => merge::run(args, cx),
            Command::Combine(args) => combine::run(args, cx),
            Command::Compare(args) => compare::run(args, cx),
            Command::Extract(args) => extract::run(args, cx),
            Command::Convert(args) => convert::run(args, cx),
            Command::Logits(args) => logits::run(args, cx),
            Command::Init(args) => init::run(args, cx),
            Command::Methods(args) => methods::run(args, cx),
            Command::Inspect(args) => inspect::run(args, cx),
            Command::Report(args) => report::run(args, cx),
            Command::Doctor(args) => doctor::run(args, cx),
            Command::Schema(args) => schema::run(args, cx),
            Command::Completions(args) => completions::run(args, cx),
            Command::TemplateWorker => template_worker::run(),
        }
    }
}
