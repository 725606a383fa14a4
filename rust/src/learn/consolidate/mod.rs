//! Consolidation of one module: a fast and a slow adapter that share A become one, and a gate looks at it.
//!
//! A is frozen between deep runs, so everything is about B in the bottleneck `u = s x A`: importance is the
//! `rank x rank` matrix `sum u u^T`, the exact Fisher of B for squared loss.

use std::sync::Arc;

use crate::factor::Factor;
use crate::learn::Feedback;

/// Samples of one module as the strategies see them.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Rank of the bottleneck.
    pub rank: usize,
    /// Width of the output.
    pub out: usize,
    /// `s x A`, `(n, rank)`.
    pub u: Vec<f32>,
    /// Outputs of the frozen layer, `(n, out)`, zeros where there is none.
    pub base: Vec<f32>,
    /// What was said of each.
    pub feedback: Vec<Arc<Feedback>>,
    /// `kappa (R - b)` of rewards at their time, 0 otherwise, `(n,)`.
    pub advantage: Vec<f32>,
    /// Weight of each loss, `(n,)`.
    pub weight: Vec<f32>,
    /// Quality of each, NaN where none is known, `(n,)`.
    pub quality: Vec<f32>,
    /// What the adapter answered when the sample was stored (`dY`), `(n, out)`; empty for a window.
    pub stored: Vec<f32>,
    /// Number of each event.
    pub event: Vec<u64>,
}

/// One adapter that goes into a consolidation.
#[derive(Clone, Debug)]
pub struct Side {
    /// B in f32, `rank` rows of `out`.
    pub b: Arc<Factor>,
    /// `sum weight u u^T` over the events that it has learned from and the other sides have not, `(rank, rank)`.
    pub gram: Vec<f64>,
    /// Those events.
    pub events: u64,
    /// Their mean quality, where any is known.
    pub quality: Option<f64>,
}
