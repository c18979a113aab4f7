//! Several runs in turn, on bases that are in memory once.

use crate::Result;
use crate::events::Observer;
use crate::run::{Outcome, Run, RunOptions};
use crate::session::Session;

/// One of several runs that are trained together.
pub struct Member<'a> {
    /// What it works on.
    pub session: &'a Session,
    /// How it is to be made.
    pub options: &'a RunOptions,
    /// Watches it.
    pub observer: &'a mut dyn Observer,
}

/// Trains several runs in turn, one step each, until all have ended: sessions opened with the same
/// [`crate::SessionOptions::packed`] hold their base once, and the activations of one step exist at a time. Each run has its
/// own directory, and the bits it has alone. One that fails leaves the others going.
pub fn train_together(members: Vec<Member<'_>>) -> Vec<Result<Outcome>> {
    let mut ended: Vec<Option<Result<Outcome>>> = Vec::new();
    let mut going = Vec::new();
    for (number, Member { session, options, observer }) in members.into_iter().enumerate() {
        match Run::open(session, options, observer) {
            Ok(run) => {
                going.push((number, run));
                ended.push(None);
            }
            Err(e) => ended.push(Some(Err(e))),
        }
    }
    while !going.is_empty() {
        for (number, mut run) in std::mem::take(&mut going) {
            match run.advance() {
                Ok(None) => going.push((number, run)),
                Ok(Some(status)) => ended[number] = Some(run.end(status)),
                Err(e) => ended[number] = Some(Err(e)),
            }
        }
    }
    ended.into_iter().flatten().collect()
}
