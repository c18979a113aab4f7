//! `engraft schema`: the JSON Schema of recipes, from the tables that check them.

use crate::context::Context;
use crate::failure::Outcome;
use engraft_train::method_specs;

/// Arguments.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  engraft schema > engraft.schema.json
  Put `#:schema ./engraft.schema.json` on a recipe's first line,
  and editors complete and check it.")]
pub struct Args {}

/// Prints the schema.
pub fn run(_args: &Args, cx: &Context) -> Outcome {
    cx.ui.stream(&text());
    Ok(())
}

/// The schema as text.
pub fn text() -> String {
    format!("{:#}\n", engraft_recipe::schema(&method_specs()))
}
