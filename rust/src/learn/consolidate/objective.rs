//! What a consolidation minimises, and the part of it that one pass over the samples knows for good.
//!
//! Squared errors, stored outputs, gradients and penalties are quadratic in B, so with the move D from where they
//! were measured they are `<g, D> + 1/2 <D, H D>` for every D: their samples are read once, whatever the number of
//! steps. Everything goes through residuals at the starting point, which f32 keeps better than normal equations.

use std::ops::Range;

use super::Rows;
use super::strategy::Plan;
use crate::dtype::Dtype;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::learn::{Feedback, TargetLoss};

/// Rows that go through the kernels together; with their outputs they stay in the second-level cache.
pub(super) const BLOCK: usize = 32;

/// Which samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Window,
    Replay,
}

/// Whether a loss is quadratic in y with unit curvature.
pub(super) fn is_squared(f: &Feedback) -> bool {
    matches!(f, Feedback::Target { loss: TargetLoss::Mse, .. })
}

/// Whether a sample's loss must be evaluated again after every step.
pub(super) fn is_general(f: &Feedback) -> bool {
    !is_squared(f) && !matches!(f, Feedback::Gradient { .. })
}

/// Gradient and curvature of the quadratic part at the current B.
#[derive(Clone)]
pub(super) struct Quadratic {
    /// `(rank, rank)`, row-major, symmetric.
    pub h: Vec<f64>,
    /// `(rank, out)`.
    pub g: Factor,
}

/// Buffers of a block, kept between slices.
#[derive(Clone, Default)]
pub(super) struct Block {
    /// Bottlenecks as they are.
    pub u: Vec<f32>,
    /// Bottlenecks times the coefficient of the output.
    pub scaled: Vec<f32>,
    /// Residuals or gradients.
    pub z: Vec<f32>,
    /// Outputs of the adapter.
    pub delta: Vec<f32>,
    /// One whole output.
    pub y: Vec<f32>,
}

impl Quadratic {
    pub fn new(rank: usize, out: usize) -> Self {
        Quadratic { h: vec![0.0; rank * rank], g: Factor::zeros(rank, out, Dtype::F32) }
    }

    /// `h += c u u^T`, the lower triangle.
    pub fn curve(&mut self, c: f64, u: &[f32]) {
        curve(&mut self.h, c, u);
    }

    /// Adds the quadratic terms of some rows, measured at `b`.
    #[allow(clippy::too_many_arguments)]
    pub fn add(
        &mut self,
        k: &Kernels,
        b: &Factor,
        rows: &Rows,
        part: Part,
        plan: &Plan,
        which: Range<usize>,
        block: &mut Block,
    ) {
        let (rank, out) = (rows.rank, rows.out);
        let (coefs, logit) = match part {
            Part::Window => (&plan.window, 0.0),
            Part::Replay => (&plan.replay, plan.logit),
        };
        let mut at = which.start;
        while at < which.end {
            let until = (at + BLOCK).min(which.end);
            block.u.clear();
            block.scaled.clear();
            block.z.clear();
            for i in at..until {
                let c = coefs.get(i).copied().unwrap_or(0.0);
                let u = &rows.u[i * rank..(i + 1) * rank];
                let base = &rows.base[i * out..(i + 1) * out];
                let stored = rows.stored.get(i * out..(i + 1) * out).filter(|_| logit > 0.0);
                let (lead, curvature) = match (&*rows.feedback[i], stored) {
                    (Feedback::Target { target, loss: TargetLoss::Mse }, Some(stored)) if c > 0.0 => {
                        let three = base.iter().zip(target).zip(stored);
                        block.z.extend(three.map(|((b, t), s)| c * (b - t) - logit * s));
                        (c + logit, c + logit)
                    }
                    (Feedback::Target { target, loss: TargetLoss::Mse }, None) if c > 0.0 => {
                        block.z.extend(base.iter().zip(target).map(|(b, t)| c * (b - t)));
                        (c, c)
                    }
                    // A proximal step of its own: alone, the row moves its output by exactly -mu times the gradient.
                    (f @ Feedback::Gradient { gradient }, None) if c > 0.0 => {
                        block.z.extend(gradient.iter().map(|g| c * g));
                        (0.0, c / f.default_mu())
                    }
                    (_, Some(stored)) => {
                        block.z.extend(stored.iter().map(|s| -logit * s));
                        (logit, logit)
                    }
                    _ => continue,
                };
                block.u.extend_from_slice(u);
                block.scaled.extend(u.iter().map(|u| lead * u));
                self.curve(f64::from(curvature), u);
            }
            if !block.z.is_empty() {
                b.combine_batch(k, &block.scaled, &mut block.z, true);
                self.g.outer_batch(k, &block.u, &block.z);
            }
            at = until;
        }
    }

    /// Mirrors the curvature and adds the penalties: `anchor` around slow, the ridge around zero.
    pub fn close(&mut self, k: &Kernels, b: &[f32], slow: &[f32], plan: &Plan) {
        let r = self.g.rank();
        mirror(&mut self.h, r);
        let mut penalty = vec![0.0; b.len()];
        let out = self.g.len();
        if !plan.anchor.is_empty() {
            let moved: Vec<f32> = b.iter().zip(slow).map(|(b, s)| b - s).collect();
            k.mix_rows(&plan.anchor, &moved, out, &mut penalty);
            self.h.iter_mut().zip(&plan.anchor).for_each(|(h, a)| *h += a);
        }
        k.axpy(plan.ridge as f32, b, &mut penalty);
        (0..r).for_each(|i| self.h[i * r + i] += plan.ridge);
        k.axpy(1.0, Factor::from_rows(&penalty, r, out, Dtype::F32).stream(), self.g.stream_mut());
    }
}

/// `h += c u u^T`, the lower triangle only.
pub(super) fn curve(h: &mut [f64], c: f64, u: &[f32]) {
    for (i, row) in h.chunks_exact_mut(u.len()).enumerate() {
        let c = c * f64::from(u[i]);
        for (h, u) in row.iter_mut().zip(&u[..=i]) {
            *h += c * f64::from(*u);
        }
    }
}

/// Copies the lower triangle onto the upper.
pub(super) fn mirror(h: &mut [f64], r: usize) {
    for i in 0..r {
        for j in 0..i {
            h[j * r + i] = h[i * r + j];
        }
    }
}
