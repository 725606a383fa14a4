//! The table of strategies, and what a strategy decides.

use super::{Problem, average, best_only, ensemble, ewc_merge, quality_weighted};
use crate::error::{Error, Result};

/// A strategy: how the sides merge and which samples train with which weight.
pub struct Row {
    /// Name that `consolidation` takes.
    pub name: &'static str,
    /// What it does, in one sentence.
    pub summary: &'static str,
    /// A pure function of the problem.
    pub(super) plan: fn(&Problem) -> Plan,
}

impl std::fmt::Debug for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Row({})", self.name)
    }
}

/// Every strategy; the first is the default.
pub static STRATEGIES: &[Row] = &[
    Row {
        name: "ewc_merge",
        summary: "merges by Fisher information, then trains on window and replay (DER++)",
        plan: ewc_merge::plan,
    },
    Row { name: "average", summary: "takes the mean of all sides and trains nothing", plan: average::plan },
    Row {
        name: "quality_weighted",
        summary: "as ewc_merge, but sides and samples count by their quality above a threshold",
        plan: quality_weighted::plan,
    },
    Row {
        name: "best_only",
        summary: "trains the slow side on the best share of the window only",
        plan: best_only::plan,
    },
    Row {
        name: "ensemble",
        summary: "merges nothing: one member per pattern, mixed for every input",
        plan: ensemble::plan,
    },
];

/// The row of a name.
///
/// # Errors
/// A name that is not in [`STRATEGIES`].
pub fn strategy(name: &str) -> Result<&'static Row> {
    STRATEGIES.iter().find(|row| row.name == name).ok_or_else(|| {
        let have: Vec<&str> = STRATEGIES.iter().map(|row| row.name).collect();
        Error::config("consolidation", format!("{name:?}"), format!("one of {}", have.join(", ")))
    })
}

/// How far the start goes from slow towards a side.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Mix {
    /// By this share.
    Share(f64),
    /// By this `(rank, rank)` matrix, row-major.
    Matrix(Vec<f64>),
}

/// What a strategy decided: `J(B) = sum c_i L_i + logit sum 1/2 |u_j B - stored_j|^2
/// + 1/2 tr((B - slow)^T anchor (B - slow)) + ridge/2 |B|^2`, and where to start.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    /// From slow towards fast, then towards each snapshot; what is not there adds nothing.
    pub mix: Vec<Mix>,
    /// `c_i` of the window; empty: it trains nothing.
    pub window: Vec<f32>,
    /// `c_i` of the replayed samples; empty: they train nothing.
    pub replay: Vec<f32>,
    /// Coefficient of every stored output.
    pub logit: f32,
    /// Penalty around slow, `(rank, rank)`; empty is none.
    pub anchor: Vec<f64>,
    /// Penalty around zero.
    pub ridge: f64,
    /// Nothing to do at all.
    pub idle: bool,
    /// For the outcome.
    pub notes: Vec<String>,
}

/// `total w_i / sum w`; all 0 where no weight is above 0.
pub(super) fn normalised(weights: &[f64], total: f64) -> Vec<f32> {
    let sum: f64 = weights.iter().sum();
    let scale = if sum > 0.0 { total / sum } else { 0.0 };
    weights.iter().map(|w| (w * scale) as f32).collect()
}
