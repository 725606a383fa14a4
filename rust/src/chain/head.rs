//! What the outputs of a chain are compared with.

use std::str::FromStr;

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::learn::batch::{BadRow, NOT_FINITE, Replayed};
use crate::learn::train::Targets;

/// The loss at the end of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// `-log softmax(z)[label]`.
    CrossEntropy,
    /// `1/2 |z - t|^2`.
    Mse,
}

impl FromStr for Head {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "cross_entropy" => Ok(Head::CrossEntropy),
            "mse" => Ok(Head::Mse),
            _ => Err(Error::config("head", format!("{s:?}"), "cross_entropy or mse")),
        }
    }
}

/// `row = softmax(row)`; returns `log sum exp` of what it was.
pub(crate) fn softmax(row: &mut [f32]) -> f32 {
    let top = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    let mut total = 0.0;
    for v in row.iter_mut() {
        *v = (*v - top).exp();
        total += *v;
    }
    for v in row.iter_mut() {
        *v /= total;
    }
    top + total.ln()
}

impl Head {
    /// Turns outputs into dL/dz, row by row, and appends each row's loss. The last rows may be replayed ones:
    /// the distance to what was stored with them counts too, and their losses are left out.
    ///
    /// # Errors
    /// The first row whose target or loss is not finite.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn losses(
        self,
        k: &Kernels,
        width: usize,
        z: &mut [f32],
        y: Targets<'_>,
        weights: Option<&[f32]>,
        replayed: Option<Replayed<'_>>,
        losses: &mut Vec<f32>,
    ) -> Result<(), BadRow> {
        losses.clear();
        let fresh = z.len() / width - replayed.map_or(0, |r| r.rows());
        let mut pull = Vec::new();
        for (row, z) in z.chunks_exact_mut(width).enumerate() {
            let dark = replayed.filter(|_| row >= fresh).map(|r| (r, row - fresh));
            if let Some((r, i)) = dark {
                // Taken here, because the loss puts its gradient where the outputs are.
                pull.clear();
                pull.extend(z.iter().zip(r.output(i, 0, width)).map(|(z, s)| z - s));
            }
            let mut loss = match y {
                Targets::Labels(labels) => {
                    let label = labels[row] as usize;
                    let at = z[label];
                    let total = softmax(z);
                    z[label] -= 1.0;
                    total - at
                }
                Targets::Values(t) => {
                    let t = &t[row * width..(row + 1) * width];
                    if !k.all_finite(t) {
                        return Err(BadRow { row, arg: "y", reason: NOT_FINITE });
                    }
                    k.axpy(-1.0, t, z);
                    0.5 * k.dot(z, z)
                }
            };
            let weight = match dark {
                Some((r, i)) => Some(r.weights[i]),
                None => weights.map(|w| w[row]),
            };
            if let Some(w) = weight {
                loss *= w;
                k.scale(w, z);
            }
            if let Some((r, _)) = dark {
                loss += 0.5 * r.logit_weight * k.dot(&pull, &pull);
                k.axpy(r.logit_weight, &pull, z);
            }
            if !loss.is_finite() {
                return Err(BadRow { row, arg: "x", reason: "gives a loss that is not finite" });
            }
            losses.push(loss);
        }
        losses.truncate(fresh);
        Ok(())
    }
}
