//! The contract between models and methods: sites, patches, passes, weights.
