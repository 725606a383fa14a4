//! The gradient of a batch on one module: forward, squared error, backward, all rows at once.

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::layer::Layer;

use super::accumulate::Gradients;
use super::regularizer::Samples;

/// Rows of a batch, gathered and contiguous.
#[derive(Clone, Copy)]
pub struct Batch<'a> {
    /// Inputs, `(n, in)`.
    pub x: &'a [f32],
    /// Wanted outputs, `(n, out)`.
    pub target: &'a [f32],
    /// Outputs of the frozen layer, `(n, out)`; none are zeros.
    pub base: Option<&'a [f32]>,
    /// Weight of each row's loss, `(n,)`; none are ones.
    pub weights: Option<&'a [f32]>,
    /// Rows of earlier tasks at the end of `x` and `target`; they have no base, and weights of their own.
    pub replayed: Option<Replayed<'a>>,
}

/// Rows of earlier tasks that join a batch (dark experience replay, arXiv 2004.07211). Each adds
/// `weight loss + logit_weight/2 |y - stored|^2`.
#[derive(Clone, Copy)]
pub struct Replayed<'a> {
    /// Outputs that were stored with them, `(m, stride)`.
    pub outputs: &'a [f32],
    /// Numbers from one row's outputs to the next one's.
    pub stride: usize,
    /// Weight of each row's own loss, `(m,)`.
    pub weights: &'a [f32],
    /// Weight of the distance to the stored outputs.
    pub logit_weight: f32,
}

impl<'a> Replayed<'a> {
    /// How many rows joined.
    pub fn rows(&self) -> usize {
        self.weights.len()
    }

    /// What the module at `offset` answered to row `i`.
    pub fn output(&self, i: usize, offset: usize, width: usize) -> &'a [f32] {
        &self.outputs[i * self.stride + offset..][..width]
    }
}

/// Buffers of one batch, kept between batches.
#[derive(Debug, Default)]
pub struct Rows {
    /// `s x A`, `(n, rank)`.
    pub u: Vec<f32>,
    /// dL/dy of each row, `(n, out)`.
    pub g: Vec<f32>,
    /// `s g B^T`, `(n, rank)`.
    pub w: Vec<f32>,
}

/// A row that cannot be learned from, counted within its batch.
#[derive(Debug)]
pub struct BadRow {
    /// Row of the batch.
    pub row: usize,
    /// Argument that it came in.
    pub arg: &'static str,
    /// What is wrong.
    pub reason: &'static str,
}

impl From<BadRow> for Error {
    fn from(b: BadRow) -> Self {
        Error::Sample { arg: b.arg.into(), row: b.row, reason: b.reason.into(), steps_done: 0 }
    }
}

pub(crate) const NOT_FINITE: &str = "contains NaN or infinity";
pub(crate) const OVERFLOW: &str = "gives a gradient that overflows float32";

/// The row for which an importance could not be measured: not finite, or with the largest squares.
pub(crate) fn unsquared(rows: usize, s: Samples<'_>) -> BadRow {
    let mut worst = (0, 0.0);
    for row in 0..rows {
        let [x, g, u, w] = [s.x, s.g, s.u, s.w].map(|v| {
            let width = v.len() / rows;
            v[row * width..(row + 1) * width].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()
        });
        if !(x.is_finite() && g.is_finite()) {
            return BadRow { row, arg: "x", reason: NOT_FINITE };
        }
        let size = (x * w).max(u * g);
        if size > worst.1 {
            worst = (row, size);
        }
    }
    BadRow { row: worst.0, arg: "x", reason: "gives a gradient whose squares overflow float32" }
}

impl Rows {
    /// `u = s x A`.
    pub(crate) fn down(&mut self, k: &Kernels, layer: &Layer, x: &[f32]) -> Result<(), BadRow> {
        let (n_in, rank) = (layer.in_features(), layer.rank());
        self.u.resize(x.len() / n_in * rank, 0.0);
        layer.a.dots_batch(k, x, &mut self.u, layer.scaling());
        if k.all_finite(&self.u) {
            return Ok(());
        }
        let row = self.u.iter().position(|v| !v.is_finite()).unwrap_or(0) / rank;
        Err(BadRow { row, arg: "x", reason: NOT_FINITE })
    }

    /// `w = s g B^T`.
    pub(crate) fn back(&mut self, k: &Kernels, layer: &Layer) -> Result<(), BadRow> {
        let rank = layer.rank();
        self.w.resize(self.u.len(), 0.0);
        layer.b.dots_batch(k, &self.g, &mut self.w, layer.scaling());
        if k.all_finite(&self.w) {
            return Ok(());
        }
        let row = self.w.iter().position(|v| !v.is_finite()).unwrap_or(0) / rank;
        Err(BadRow { row, arg: "y", reason: OVERFLOW })
    }

    /// Adds the gradients of all rows: `dB += u^T g`, `dA += w^T x`.
    pub(crate) fn add_to(&self, k: &Kernels, x: &[f32], sums: &mut Gradients) {
        sums.b.outer_batch(k, &self.u, &self.g);
        sums.a.outer_batch(k, &self.w, x);
    }
}

/// Loss of each row, `weight/2 |base + dY - target|^2`, into `losses`, and dL/dy into `rows.g`. Rows that were
/// replayed are in `rows`, but not in `losses`; `offset` is where this module's outputs begin in theirs.
///
/// # Errors
/// The first row whose input, target or loss is not finite.
pub(crate) fn squared_error(
    k: &Kernels,
    layer: &Layer,
    batch: Batch<'_>,
    offset: usize,
    rows: &mut Rows,
    losses: &mut Vec<f32>,
) -> Result<(), BadRow> {
    rows.down(k, layer, batch.x)?;
    let n_out = layer.out_features();
    let fresh = batch.x.len() / layer.in_features() - batch.replayed.map_or(0, |r| r.rows());
    let (now, before) = batch.target.split_at(fresh * n_out);
    rows.g.clear();
    match batch.base {
        Some(base) => rows.g.extend(base.iter().zip(now).map(|(b, t)| b - t)),
        None => rows.g.extend(now.iter().map(|t| -t)),
    }
    rows.g.resize(batch.target.len(), 0.0);
    layer.b.combine_batch(k, &rows.u, &mut rows.g, true);
    losses.clear();
    let (new, old) = rows.g.split_at_mut(fresh * n_out);
    for (row, g) in new.chunks_exact_mut(n_out).enumerate() {
        let weight = batch.weights.map_or(1.0, |w| w[row]);
        let loss = 0.5 * weight * k.dot(g, g);
        if !loss.is_finite() {
            let clean = k.all_finite(&batch.target[row * n_out..(row + 1) * n_out]);
            let base = batch.base.is_some_and(|b| !k.all_finite(&b[row * n_out..(row + 1) * n_out]));
            let arg = if !clean {
                "y"
            } else if base {
                "base"
            } else {
                "x"
            };
            let reason = if clean && !base { "gives a loss that is not finite" } else { NOT_FINITE };
            return Err(BadRow { row, arg, reason });
        }
        losses.push(loss);
        if batch.weights.is_some() {
            k.scale(weight, g);
        }
    }
    let Some(replayed) = batch.replayed else { return Ok(()) };
    for (i, (y, target)) in old.chunks_exact_mut(n_out).zip(before.chunks_exact(n_out)).enumerate() {
        let (weight, dark) = (replayed.weights[i], replayed.logit_weight);
        let mut loss = 0.0;
        for ((y, t), s) in y.iter_mut().zip(target).zip(replayed.output(i, offset, n_out)) {
            let (error, pull) = (*y - t, *y - s);
            loss += weight * error * error + dark * pull * pull;
            *y = weight * error + dark * pull;
        }
        if !loss.is_finite() {
            return Err(BadRow { row: fresh + i, arg: "x", reason: NOT_FINITE });
        }
    }
    Ok(())
}

/// Adds the gradient of the batch's losses to `sums`; nothing is added when a row is refused.
///
/// # Errors
/// The first row that cannot be learned from.
pub(crate) fn accumulate(
    k: &Kernels,
    layer: &Layer,
    batch: Batch<'_>,
    offset: usize,
    rows: &mut Rows,
    losses: &mut Vec<f32>,
    sums: &mut Gradients,
) -> Result<(), BadRow> {
    squared_error(k, layer, batch, offset, rows, losses)?;
    rows.back(k, layer)?;
    rows.add_to(k, batch.x, sums);
    sums.count += losses.len() as u64;
    Ok(())
}
