//! Over which outcomes an event's squared gradient is averaged: gradient rows of `-log p(outcome)`.
//!
//! `F = E_x E_{y ~ model} [(d log p(y|x) / d th)^2]`. Rows of the exact Fisher carry the square root of their
//! outcome's probability, so that the sum of their squares is the sample's share of F.

use super::Fisher;
use crate::chain::Labels;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::learn::feedback::{angular_gradient, cosines_of, sigmoid};
use crate::learn::{Feedback, TargetLoss};
use crate::rng::Rng;

/// Up to this many outcomes "auto" takes all of them.
pub const EXACT_CLASSES: usize = 32;

impl Fisher {
    /// The mode that "auto" stands for with so many outcomes.
    pub fn resolve(self, outcomes: usize) -> Fisher {
        match self {
            Fisher::Auto if outcomes <= EXACT_CLASSES => Fisher::Exact,
            Fisher::Auto => Fisher::Sample,
            other => other,
        }
    }

    /// What a chain with so many outputs is asked for.
    pub(super) fn labels(self, outcomes: usize) -> Labels {
        match self.resolve(outcomes) {
            Fisher::Sample => Labels::Sample,
            Fisher::Empirical => Labels::Empirical,
            Fisher::Exact | Fisher::Auto => Labels::Exact,
        }
    }
}

/// Softmax of every row, in f64 on the way.
fn softmax(z: &[f32], width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(z.len());
    for row in z.chunks_exact(width) {
        let top = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
        let e: Vec<f64> = row.iter().map(|v| f64::from(v - top).exp()).collect();
        let total: f64 = e.iter().sum();
        out.extend(e.iter().map(|e| (e / total) as f32));
    }
    out
}

/// An outcome drawn with these probabilities.
fn draw(p: &[f32], rng: &mut Rng) -> usize {
    let mut left = rng.uniform();
    for (i, p) in p.iter().enumerate() {
        left -= p;
        if left < 0.0 {
            return i;
        }
    }
    // Rounding left a little: the last outcome that can happen.
    p.iter().rposition(|p| *p > 0.0).unwrap_or(0)
}

/// A vector of +1 and -1: the second moments of a unit Gaussian without its spread.
fn signs(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| if rng.uniform() < 0.5 { -1.0 } else { 1.0 }).collect()
}

/// Refuses feedback that is no likelihood where outcomes of the model are asked for.
pub(crate) fn check_feedback(mode: Fisher, feedback: &Feedback) -> Result<()> {
    let why = match feedback {
        _ if mode == Fisher::Empirical => return Ok(()),
        Feedback::Gradient { .. } => "a bare gradient",
        Feedback::Target { loss: TargetLoss::Cosine, .. } => "a cosine target",
        Feedback::Reward { .. } => "a reward",
        _ => return Ok(()),
    };
    Err(Error::Feedback(format!(
        "{why} is no likelihood, so its outcomes have no probabilities for fisher={:?}: make the \
         consolidation with fisher=\"empirical\", which squares the gradients that were observed",
        mode.as_str()
    )))
}

/// Gradient rows of one event, `(passes, width)`, whose squares sum to its share of F.
/// `None`: the output is zero and has no direction.
pub(crate) fn event_rows(
    mode: Fisher,
    rng: &mut Rng,
    k: &Kernels,
    feedback: &Feedback,
    y: &[f32],
) -> Option<Vec<f32>> {
    let mut g = vec![0.0; y.len()];
    match feedback {
        Feedback::Preference { chosen, rejected, beta, .. } => {
            let norm = k.dot(y, y).sqrt();
            if norm == 0.0 {
                return None;
            }
            let c = [k.dot(y, chosen) / norm, k.dot(y, rejected) / norm];
            let p = sigmoid(beta * (c[0] - c[1]));
            // Both outcomes push along one direction, so the exact mean of squares is one row.
            let d = match mode.resolve(2) {
                Fisher::Sample if rng.uniform() < p => p - 1.0,
                Fisher::Sample => p,
                _ => (p * sigmoid(beta * (c[1] - c[0]))).sqrt(),
            };
            let d = beta * d;
            angular_gradient(k, y, norm, &[(chosen, d, c[0]), (rejected, -d, c[1])], &mut g);
            Some(g)
        }
        Feedback::Contrastive { rows, tau, .. } => {
            let (norm, c) = cosines_of(k, y, rows)?;
            let z: Vec<f32> = c.iter().map(|c| c / tau).collect();
            let p = softmax(&z, z.len());
            let push = |outcome: usize, weight: f32, g: &mut [f32]| {
                let d = |j: usize| weight * (p[j] - f32::from(u8::from(j == outcome))) / tau;
                let terms: Vec<_> =
                    rows.chunks_exact(y.len()).enumerate().map(|(j, r)| (r, d(j), c[j])).collect();
                angular_gradient(k, y, norm, &terms, g);
            };
            if mode.resolve(p.len()) == Fisher::Sample {
                push(draw(&p, rng), 1.0, &mut g);
                return Some(g);
            }
            let mut all = vec![0.0; p.len() * y.len()];
            for (outcome, g) in all.chunks_exact_mut(y.len()).enumerate() {
                push(outcome, p[outcome].sqrt(), g);
            }
            Some(all)
        }
        _ => Some(signs(rng, y.len())),
    }
}
