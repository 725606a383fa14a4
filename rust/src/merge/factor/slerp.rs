//! Spherical interpolation of two deltas (Shoemake 1985), on the whole module as one vector.

use super::Pieces;
use crate::error::Result;

/// Closer to parallel than this, a straight line is as good and well defined.
const PARALLEL: f64 = 0.9995;

/// Coefficients of the unnormalised deltas.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    Ok(arc(p, p.spec.t).to_vec())
}

/// `sin((1-t)O) / sin O` and `sin(tO) / sin O`; a straight line for parallel, opposite and zero vectors.
pub(crate) fn arc(p: &Pieces<'_>, t: f64) -> [f64; 2] {
    match p.cosine(0, 1) {
        Some(c) if c.abs() <= PARALLEL => {
            let o = c.acos();
            [((1.0 - t) * o).sin() / o.sin(), (t * o).sin() / o.sin()]
        }
        cosine => {
            p.note(match cosine {
                None => "a straight line: one delta is zero and has no direction",
                Some(c) if c < 0.0 => "a straight line: the deltas are opposite, so no arc is the shortest",
                Some(_) => "a straight line: the deltas are parallel",
            });
            [1.0 - t, t]
        }
    }
}
