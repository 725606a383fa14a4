//! Consolidation of one module: a fast and a slow adapter that share A become one, and a gate looks at it.
//!
//! A is frozen between deep runs, so everything is about B in the bottleneck `u = s x A`: importance is the
//! `rank x rank` matrix `sum u u^T`, the exact Fisher of B for squared loss. A strategy is one file and one row
//! of [`STRATEGIES`]: it says how the sides merge and which samples count how much; [`Run`] does the arithmetic
//! for all of them, a slice at a time, and [`Gate`] judges what came out on samples that none has seen.

mod average;
mod best_only;
mod check;
mod ensemble;
mod ewc_merge;
mod gate;
mod general;
mod objective;
mod quality_weighted;
mod run;
mod solve;
mod strategy;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::factor::Factor;
use crate::learn::Feedback;

pub use ensemble::{fit_members, member_runs, mix};
pub use gate::{EPSILON, Gate, Verdict};
pub use general::mean_loss;
pub use run::Run;
pub use strategy::{Row, STRATEGIES, strategy};

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

impl Rows {
    /// Samples.
    pub fn len(&self) -> usize {
        self.feedback.len()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.feedback.is_empty()
    }

    /// The samples of these numbers, in their order.
    ///
    /// # Panics
    /// When a number is not below [`Rows::len`].
    pub fn select(&self, which: &[usize]) -> Rows {
        let wide = |v: &[f32], width: usize| {
            let mut out = Vec::with_capacity(which.len() * width);
            for &i in which.iter().filter(|_| !v.is_empty()) {
                out.extend_from_slice(&v[i * width..(i + 1) * width]);
            }
            out
        };
        Rows {
            rank: self.rank,
            out: self.out,
            u: wide(&self.u, self.rank),
            base: wide(&self.base, self.out),
            feedback: which.iter().map(|&i| Arc::clone(&self.feedback[i])).collect(),
            advantage: wide(&self.advantage, 1),
            weight: wide(&self.weight, 1),
            quality: wide(&self.quality, 1),
            stored: wide(&self.stored, self.out),
            event: which.iter().map(|&i| self.event[i]).collect(),
        }
    }

    /// Mean of the known qualities; `None` where none is known.
    pub fn mean_quality(&self) -> Option<f64> {
        let known = self.quality.iter().filter(|q| !q.is_nan());
        let (n, sum) = known.fold((0u32, 0.0), |(n, sum), q| (n + 1, sum + f64::from(*q)));
        (n > 0).then(|| sum / f64::from(n))
    }
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

/// How to consolidate.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Row of [`STRATEGIES`].
    pub strategy: &'static Row,
    /// Newton steps after the merge; 0 merges only. One is exact where every loss is a squared error.
    pub steps: usize,
    /// Weight of `1/2 |u B - stored|^2` beside the loss of a replayed sample.
    pub logit_weight: f64,
    /// Weight of the replayed samples beside the window.
    pub replay_ratio: f64,
    /// Canonical weight of the penalty against leaving slow, used where nothing is replayed.
    pub ewc_lambda: f64,
    /// The same beside what is replayed: what a recursion over all events knows, which a reservoir does not. 0
    /// without one.
    pub prior: f64,
    /// Share of the window that `best_only` trains on, in (0, 1].
    pub best_share: f64,
    /// Quality from which a sample counts in `quality_weighted`.
    pub quality_threshold: f64,
    /// Ridge of all events together, as in recursive least squares.
    pub ridge: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            strategy: &STRATEGIES[0],
            steps: 2,
            logit_weight: 0.5,
            replay_ratio: 1.0,
            ewc_lambda: 100.0,
            prior: 0.0,
            best_share: 0.2,
            quality_threshold: 0.5,
            ridge: 5.0,
        }
    }
}

/// One consolidation to be done.
#[derive(Clone, Debug)]
pub struct Problem {
    /// How.
    pub settings: Settings,
    /// The weights that were accepted last.
    pub slow: Side,
    /// The live weights.
    pub fast: Side,
    /// More adapters to merge, mostly none; their order does not matter.
    pub snapshots: Vec<Side>,
    /// Samples since the last consolidation.
    pub window: Rows,
    /// Samples of the reservoir's training part.
    pub replay: Rows,
}

/// What a consolidation gives.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The candidate, f32.
    pub b: Factor,
    /// Samples that it was trained on.
    pub used: usize,
    /// The strategy found nothing to do: `b` is slow's, and neither side need change.
    pub idle: bool,
    /// What a reader of the result should know.
    pub notes: Vec<String>,
}
