//! Model architectures, one file each, blind to methods.
