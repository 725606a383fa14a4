//! Several directions in one tangent plane of the sphere, at their normalised weighted mean.

use super::{Pieces, sphere};
use crate::error::Result;

/// `exp_mu(sum w_i log_mu(u_i)) sum w_i |D_i|`, as coefficients of the deltas.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    let w = p.shares()?;
    let size: f64 = (0..p.len()).map(|i| w[i] * p.norm(i)).sum();
    let units = sphere::units(p);
    // A zero delta has no direction: the others share its weight there, and it counts in the size alone.
    let live: f64 = w.iter().zip(&units).filter(|(_, u)| **u > 0.0).map(|(w, _)| w).sum();
    let w: Vec<f64> = w.iter().map(|w| if live == 0.0 { 0.0 } else { w / live }).collect();
    let Some(mut mu) = sphere::mean_direction(p, &units, &w) else {
        return Ok(vec![0.0; p.len()]);
    };
    sphere::step(p, &units, &w, &mut mu);
    Ok(mu.iter().map(|c| c * size).collect())
}
