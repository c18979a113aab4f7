//! One training run: from a checked recipe to a finished run directory.
//!
//! [`Session::open`] loads everything a recipe names and reports all its mistakes; [`train`] takes the steps and leaves
//! adapter, plot and log; [`evaluate`] measures. The library prints nothing and reads no environment: an [`Observer`]
//! sees what happens.

mod attach;
mod batch;
mod calibrate;
mod check;
mod checkpoint;
mod error;
mod estimate;
mod evaluate;
mod events;
mod fingerprint;
mod finish;
mod finite;
mod fit;
mod hub_head;
mod labels;
mod metrics;
mod names;
mod objective;
mod open;
mod optimizer;
mod read;
mod run;
mod schedule;
mod session;
mod share;
mod sizes;
mod specs;
mod target;
mod task_names;
mod tensors;
mod together;
mod trainer;
mod wanted;
mod watch;

pub use attach::{AttachedAdapter, adapter_tensors, new_modules, open_adapter, open_adapter_choosing};
pub use batch::{Batch, Feed, FeedOptions, Masking};
pub use check::check;
pub use error::{Error, NotFinite, Result};
pub use estimate::{Estimate, Trial, estimate, trial};
pub use evaluate::{Evaluated, Evaluation, evaluate};
pub use events::{DataEvent, EndEvent, EvalEvent, Event, Observer, StepEvent};
pub use fingerprint::Fingerprint;
pub use finish::{run_data, write_adapter_files};
pub use fit::{Smaller, smaller};
pub use hub_head::{HubModel, Parts, adapter_parts, labels_of_adapter, task_of_adapter, write_hub_files};
pub use labels::{label_names, model_classes, model_labels, write_label_names};
pub use metrics::{Bleu, ExactMatch, Rouge, RougeScores};
pub use objective::{Objective, is_prompted};
pub use open::SessionOptions;
pub use run::{Outcome, RunOptions, Status, metric_name, train};
pub use schedule::LearningRate;
pub use session::Session;
pub use specs::method_specs;
pub use target::{Shift, decoder_start};
pub use task_names::{TaskNames, task_names, task_number};
pub use together::{Member, train_together};
pub use trainer::{Stepped, Trainer};
