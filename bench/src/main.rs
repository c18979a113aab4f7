//! The project's own bench.
fn main() {}
