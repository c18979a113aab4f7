//! The recipe: TOML to a checked plan, with every mistake shown at its place.
//!
//! Three steps, each a room: text becomes a tree that knows where every value was written ([`Place`]);
//! the tree is read against one table of keys ([`tables`]) and the settings of the chosen methods
//! ([`MethodSpec`]); what passes is a typed [`Recipe`], and, once model and data are known, a [`Plan`].
//! Mistakes are collected, never thrown one by one: [`Problems`] shows all of them together.

mod build;
mod check;
mod keys;
mod plan;
mod problem;
mod read;
mod recipe;
mod rules;
mod schema;
mod spec;
mod suggest;
mod tree;
mod value;

pub use engraft_words::nearest;
pub use keys::{TableSpec, reference, tables};
pub use plan::{Facts, PLAN_FORMAT, Plan};
pub use problem::{Grid, Label, Place, Problem, Problems};
pub use recipe::{
    Base, Columns, Data, Dtype, Format, Length, MethodTable, Metric, Quantize, Recipe, Schedule, Spanned,
    Targets, Task, TaskData, Template, Train, Warmup,
};
pub use schema::schema;
pub use spec::{ABOVE_ZERO, BELOW_ONE, FieldKind, FieldSpec, MethodSpec, Origin};
pub use suggest::known_elsewhere;
