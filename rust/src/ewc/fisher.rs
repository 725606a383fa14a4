//! Over which outcomes a squared gradient is averaged: gradient rows of `-log p(outcome)`, pass by pass.
//!
//! `F = E_x E_{y ~ model} [(d log p(y|x) / d th)^2]`. A pass is one gradient row per sample; rows of the exact
//! Fisher carry the square root of their outcome's probability, so that sums of squares over passes are F.

use super::Fisher;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::learn::feedback::{angular_gradient, cosines_of, sigmoid};
use crate::learn::{Feedback, TargetLoss};
use crate::rng::Rng;

/// Up to this many outcomes "auto" takes all of them.
pub const EXACT_CLASSES: usize = 32;

/// What a head's rows are compared with.
#[derive(Clone, Copy, Debug)]
pub enum Labels<'a> {
    /// Class of each row, for a softmax head.
    Classes(&'a [i64]),
    /// Target rows `(n, width)`, for a head of unit Gaussians.
    Targets(&'a [f32]),
}

#[derive(Debug)]
enum Rows {
    /// Probabilities, and the classes to take instead of all.
    Classes { p: Vec<f32>, one: Option<Vec<usize>> },
    /// Unit vectors in turn.
    Units,
    /// One given row per sample.
    Given(Vec<f32>),
}

/// The passes of one batch.
#[derive(Debug)]
pub struct Passes {
    n: usize,
    width: usize,
    rows: Rows,
}

impl Fisher {
    /// The mode that "auto" stands for with so many outcomes.
    pub fn resolve(self, outcomes: usize) -> Fisher {
        match self {
            Fisher::Auto if outcomes <= EXACT_CLASSES => Fisher::Exact,
            Fisher::Auto => Fisher::Sample,
            other => other,
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

impl Passes {
    /// Passes of a head with output rows `y`, `(n, width)`: logits for classes, means for targets.
    ///
    /// # Errors
    /// Labels that do not fit `y`, a class out of range; NaN or infinity.
    pub fn of_head(mode: Fisher, rng: &mut Rng, y: &[f32], width: usize, labels: Labels<'_>) -> Result<Self> {
        let n = y.len() / width;
        let fits = |got: usize, want: usize| match got == want {
            true => Ok(()),
            false => Err(Error::shape("y", format!("{got} numbers"), format!("{want}"))),
        };
        if y.iter().any(|v| !v.is_finite()) {
            return Err(Error::non_finite("x"));
        }
        let rows = match (labels, mode.resolve(width)) {
            (Labels::Classes(labels), mode) => {
                fits(labels.len(), n)?;
                let p = softmax(y, width);
                let in_range = |&c: &i64| match usize::try_from(c) {
                    Ok(c) if c < width => Ok(c),
                    _ => Err(Error::config("y", c, format!("a class from 0 to {}", width - 1))),
                };
                let observed = labels.iter().map(in_range).collect::<Result<Vec<_>>>()?;
                let one = match mode {
                    Fisher::Empirical => Some(observed),
                    Fisher::Sample => Some(p.chunks_exact(width).map(|p| draw(p, rng)).collect()),
                    _ => None,
                };
                Rows::Classes { p, one }
            }
            (Labels::Targets(t), mode) => {
                fits(t.len(), y.len())?;
                if t.iter().any(|v| !v.is_finite()) {
                    return Err(Error::non_finite("y"));
                }
                match mode {
                    Fisher::Empirical => Rows::Given(y.iter().zip(t).map(|(y, t)| y - t).collect()),
                    Fisher::Sample => Rows::Given(signs(rng, y.len())),
                    _ => Rows::Units,
                }
            }
        };
        Ok(Passes { n, width, rows })
    }

    /// The one pass of `|y|^2`, for kind "mas".
    pub fn of_norm(y: &[f32], width: usize) -> Self {
        let rows = Rows::Given(y.iter().map(|v| 2.0 * v).collect());
        Passes { n: y.len() / width, width, rows }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        match &self.rows {
            Rows::Classes { one: None, .. } | Rows::Units => self.width,
            _ => 1,
        }
    }

    /// Gradient rows `(n, width)` of one pass.
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn gradient(&self, pass: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.n * self.width);
        match &self.rows {
            Rows::Classes { p, one } => {
                out.copy_from_slice(p);
                for (i, row) in out.chunks_exact_mut(self.width).enumerate() {
                    let class = one.as_ref().map_or(pass, |one| one[i]);
                    let weight = if one.is_some() { 1.0 } else { row[class].sqrt() };
                    row[class] -= 1.0;
                    row.iter_mut().for_each(|v| *v *= weight);
                }
            }
            Rows::Units => {
                out.fill(0.0);
                out.iter_mut().skip(pass).step_by(self.width).for_each(|v| *v = 1.0);
            }
            Rows::Given(rows) => out.copy_from_slice(rows),
        }
    }
}

/// What feedback is called that is no likelihood, so that its outcomes have no probabilities.
fn no_likelihood(feedback: &Feedback) -> Option<&'static str> {
    match feedback {
        Feedback::Gradient { .. } => Some("a bare gradient"),
        Feedback::Target { loss: TargetLoss::Cosine, .. } => Some("a cosine target"),
        Feedback::Reward { .. } => Some("a reward"),
        _ => None,
    }
}

/// Whether the observed gradient is squared: asked for, or all there is under "auto".
pub(crate) fn takes_observed(mode: Fisher, feedback: &Feedback) -> bool {
    mode == Fisher::Empirical || (mode == Fisher::Auto && no_likelihood(feedback).is_some())
}

/// Refuses feedback that is no likelihood where outcomes of the model are asked for.
pub(crate) fn check_feedback(mode: Fisher, feedback: &Feedback) -> Result<()> {
    match no_likelihood(feedback) {
        Some(why) if !takes_observed(mode, feedback) => Err(Error::Feedback(format!(
            "{why} is no likelihood, so its outcomes have no probabilities for fisher={:?}: make the \
             consolidation with fisher=\"empirical\" (or \"auto\"), which squares the gradients that were \
             observed",
            mode.as_str()
        ))),
        _ => Ok(()),
    }
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
