//! One training run: objectives, optimizer, trainer, evaluation.
