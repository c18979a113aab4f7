//! Fine-tuning methods, one file each, blind to models.
