//! The project's own chores: `cargo run --release -p engraft-xtask -- docs` writes the generated pages; the tests of this
//! crate keep the house tidy.

mod docs;
#[cfg(test)]
mod names;
#[cfg(test)]
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The repository's root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("docs") => match docs::write() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("usage: cargo run --release -p engraft-xtask -- docs");
            ExitCode::from(2)
        }
    }
}
