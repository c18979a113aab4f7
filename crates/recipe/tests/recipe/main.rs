//! The recipe as its users meet it: what is read, what is refused, and every word of the answer.

mod combinations;
mod common;
mod names;
mod plans;
mod texts;
mod values;
mod worked;
