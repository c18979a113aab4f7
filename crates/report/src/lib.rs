//! Charts and the HTML report of a run.
//!
//! Everything here turns plain data into text: [`Events`] are read from `events.jsonl`, a [`Chart`], [`Bars`] or a
//! [`HeatMap`] becomes an SVG file, a [`Table`] lines for the terminal. Nothing reads files, prints, or knows how the
//! data came about.

pub mod axis;
pub mod cells;
pub mod chart;
mod error;
pub mod events;
mod frame;
pub mod html;
pub mod human;
pub mod plot;
pub mod run;
mod series;
mod svg;
pub mod table;

pub use axis::Axis;
pub use cells::{Bars, HeatMap};
pub use chart::{Chart, Series};
pub use error::{Error, Result};
pub use events::Events;
pub use html::report;
pub use plot::training_plot;
pub use run::RunData;
pub use table::{Align, Table};
