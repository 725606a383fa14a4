//! Several directions in one tangent plane of the sphere, at their normalised weighted mean.

use super::{Pieces, sphere};
use crate::error::Result;

/// `exp_mu(sum w_i log_mu(u_i)) sum w_i |D_i|`, as coefficients of the deltas.
pub(crate) fn mix(p: &Pieces<'_>) -> Result<Vec<f64>> {
    let w = p.shares()?;
    let size: f64 = (0..p.len()).map(|i| w[i] * p.norm(i)).sum();
    let units = sphere::units(p);
    let Some(mut mu) = sphere::mean_direction(p, &units, &w) else {
        return Ok(vec![0.0; p.len()]);
    };
    sphere::step(p, &units, &w, &mut mu);
    Ok(mu.iter().map(|c| c * size).collect())
}
