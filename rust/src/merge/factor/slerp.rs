//! Spherical interpolation of two deltas (Shoemake 1985), on the whole module as one vector.

use super::Pieces;
use crate::error::Result;

/// Closer to parallel than this, a straight line is as good and well defined.
const PARALLEL: f64 = 0.9995;

/// Coefficients of the unnormalised deltas.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    Ok(arc(p.cosine(0, 1), p.spec.t).to_vec())
}

/// `sin((1-t)O) / sin O` and `sin(tO) / sin O`; a straight line for parallel, opposite and zero vectors.
pub(crate) fn arc(cosine: Option<f64>, t: f64) -> [f64; 2] {
    match cosine {
        Some(c) if c.abs() <= PARALLEL => {
            let o = c.acos();
            [((1.0 - t) * o).sin() / o.sin(), (t * o).sin() / o.sin()]
        }
        _ => [1.0 - t, t],
    }
}
