//! Weighted sums: `linear`, `weighted`, `task_arithmetic` (Ilharco et al., arXiv 2212.04089) and `cat`.

use super::Pieces;
use crate::error::Result;

/// The weights as they are, or relative to their sum where the spec says so.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    if p.spec.normalize { weighted(p) } else { Ok(p.weights.to_vec()) }
}

/// The weights relative to their sum.
pub(crate) fn weighted(p: &Pieces<'_>) -> Result<Vec<f64>> {
    p.shares()
}
