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

/// Loss of each row, `weight/2 |base + dY - target|^2`, into `losses`, and dL/dy into `rows.g`.
///
/// # Errors
/// The first row whose input, target or loss is not finite.
pub(crate) fn squared_error(
    k: &Kernels,
    layer: &Layer,
    batch: Batch<'_>,
    rows: &mut Rows,
    losses: &mut Vec<f32>,
) -> Result<(), BadRow> {
    rows.down(k, layer, batch.x)?;
    let n_out = layer.out_features();
    rows.g.clear();
    match batch.base {
        Some(base) => rows.g.extend(base.iter().zip(batch.target).map(|(b, t)| b - t)),
        None => rows.g.extend(batch.target.iter().map(|t| -t)),
    }
    layer.b.combine_batch(k, &rows.u, &mut rows.g, true);
    losses.clear();
    for (row, g) in rows.g.chunks_exact_mut(n_out).enumerate() {
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
    rows: &mut Rows,
    losses: &mut Vec<f32>,
    sums: &mut Gradients,
) -> Result<(), BadRow> {
    squared_error(k, layer, batch, rows, losses)?;
    rows.back(k, layer)?;
    rows.add_to(k, batch.x, sums);
    sums.count += losses.len() as u64;
    Ok(())
}
