//! The project's own xtask.
fn main() {}
