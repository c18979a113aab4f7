//! Tokenizers, chat templates, data sets and batches.
