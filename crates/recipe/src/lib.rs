//! The recipe: TOML to a checked plan, with every mistake shown at its place.
