//! The program, and what it says.

use std::process::{Command, Output};

pub fn engraft(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engraft")).args(args).output().unwrap()
}

/// What a command that succeeds prints.
pub fn succeeds(args: &[&str]) -> String {
    let output = engraft(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What is said of a command that ends before any work, in one line.
pub fn refused(args: &[&str]) -> String {
    let output = engraft(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    String::from_utf8_lossy(&output.stderr).split_whitespace().collect::<Vec<_>>().join(" ")
}
