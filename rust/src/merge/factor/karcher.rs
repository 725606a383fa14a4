//! The Riemannian (Karcher) mean of directions on the sphere, times the mean norm (arXiv 2603.04972).

use super::{Pieces, sphere};
use crate::error::Result;

const STEPS: usize = 100;
const TOLERANCE: f64 = 1e-12;

/// Coefficients of the deltas.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    let m = p.len();
    let w = vec![1.0 / m as f64; m];
    let size: f64 = (0..m).map(|i| p.norm(i)).sum::<f64>() / m as f64;
    let units = sphere::units(p);
    let Some(mut mu) = sphere::mean_direction(p, &units, &w) else {
        return Ok(vec![0.0; m]);
    };
    for _ in 0..STEPS {
        if sphere::step(p, &units, &w, &mut mu) < TOLERANCE {
            break;
        }
    }
    Ok(mu.iter().map(|c| c * size).collect())
}
