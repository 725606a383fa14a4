//! Events that are kept: what was seen, what was said of it, and what the adapter answered then.
//!
//! [`Reservoir`] is a uniform sample of the whole stream, bounded by count and bytes, with a held-out part that
//! nothing trains on; [`PatternBank`] names the region of input space that an event lies in.

use std::sync::Arc;

use crate::learn::Feedback;

mod bank;
mod bank_state;
mod entry;
mod holdout;
mod part;
mod reservoir;
mod said;
mod state;
mod tensors;

pub use bank::PatternBank;
pub use entry::Entry;
pub use holdout::{HoldOut, held_out};
pub use part::Part;
pub use reservoir::{Reservoir, Settings};

/// One event as it is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Its number; events are numbered from 1 in the order of their coming.
    pub event: u64,
    /// The module that it concerns; `None` is every module.
    pub module: Option<u32>,
    /// Input, `(in,)`.
    pub x: Vec<f32>,
    /// Output of the frozen layer, `(out,)`.
    pub base: Option<Vec<f32>>,
    /// What was said of the output.
    pub feedback: Arc<Feedback>,
    /// Quality in [0, 1] that came with it.
    pub quality: Option<f32>,
    /// Weight of its loss, from the quality: 1 where nothing else is known.
    pub weight: f32,
    /// `kappa (R - b)` at the time of a reward; 0 for other feedback.
    pub advantage: f32,
}
