//! Events that are kept: what was seen, what was said of it, and what the adapter answered then.

use std::sync::Arc;

use crate::learn::Feedback;

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
