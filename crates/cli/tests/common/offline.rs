//! The program with no Hub.

use std::path::Path;
use std::process::{Command, Output};

/// The program in `dir`, which no Hub answers: a look-up fails at once and says so.
pub fn engraft(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engraft"));
    command.current_dir(dir).args(args).env("NO_COLOR", "1").env_remove("FORCE_COLOR");
    command.env("HF_HOME", dir.join("hf")).env("HF_HUB_OFFLINE", "1").output().unwrap()
}
