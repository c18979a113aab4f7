//! Chat templates.
/// The longest template source, in bytes.
pub const SOURCE_LIMIT: u64 = 1 << 20;
