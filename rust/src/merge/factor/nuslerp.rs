//! Spherical interpolation of two directions by weights, with the magnitudes on a straight line.

use super::Pieces;
use super::slerp::arc;
use crate::error::Result;

/// Coefficients of the deltas.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    let t = p.shares()?[1];
    let norms = [p.norm(0), p.norm(1)];
    let size = (1.0 - t) * norms[0] + t * norms[1];
    let [a, b] = arc(p, t);
    let unit = |c: f64, norm: f64| if norm > 0.0 { c / norm } else { 0.0 };
    let (mut x, mut y) = (unit(a, norms[0]), unit(b, norms[1]));
    // Between opposite or zero vectors the straight line is not of unit length: its own length counts.
    let length = p.length(&[x, y]);
    if length > 0.0 {
        (x, y) = (x / length, y / length);
    }
    Ok(vec![x * size, y * size])
}
