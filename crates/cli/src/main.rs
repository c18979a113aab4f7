//! The engraft command line.
fn main() {}
