//! Model Stock (Jang et al., arXiv 2403.19522): the mean, pulled to the base by how little parents agree.

use super::Pieces;
use crate::error::Result;

/// `m c / (1 + (m - 1) c) / m` each, with c the mean cosine of pairs, at least 0.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    let m = p.len();
    let mut cosines = 0.0;
    for i in 0..m {
        cosines += (0..i).filter_map(|j| p.cosine(i, j)).sum::<f64>();
    }
    let c = (cosines / (m * (m - 1) / 2) as f64).clamp(0.0, 1.0);
    Ok(vec![c / (1.0 + (m as f64 - 1.0) * c); m])
}
