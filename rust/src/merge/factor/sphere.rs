//! Points of the unit sphere as coefficients of the parents' deltas: log, exp and means from inner products.

use super::Pieces;

/// `1 / |D_i|`, 0 for a zero delta, which has no direction.
pub(super) fn units(p: &Pieces<'_>) -> Vec<f64> {
    (0..p.len()).map(|i| if p.norm(i) > 0.0 { 1.0 / p.norm(i) } else { 0.0 }).collect()
}

/// The normalised `sum w_i u_i`; none, with a note, where that vanishes: no direction is nearer than another.
pub(super) fn mean_direction(p: &Pieces<'_>, units: &[f64], w: &[f64]) -> Option<Vec<f64>> {
    let mean: Vec<f64> = w.iter().zip(units).map(|(w, u)| w * u).collect();
    let length = p.length(&mean);
    let total: f64 = w.iter().zip(units).filter(|(_, u)| **u > 0.0).map(|(w, _)| w.abs()).sum();
    if length > 1e-9 * total {
        return Some(mean.iter().map(|c| c / length).collect());
    }
    p.note("zero: the directions cancel, so they have no mean on the sphere");
    None
}

/// Moves `mu` to `exp_mu(sum w_i log_mu(u_i))`; returns how far.
pub(super) fn step(p: &Pieces<'_>, units: &[f64], w: &[f64], mu: &mut [f64]) -> f64 {
    let m = p.len();
    // log_mu(u) = O / sin O (u - cos O mu)
    let mut tangent = vec![0.0; m];
    let mut along = 0.0;
    for i in (0..m).filter(|&i| units[i] > 0.0) {
        let cosine = (units[i] * p.product_with(i, mu)).clamp(-1.0, 1.0);
        let o = cosine.acos();
        let ratio = if o.sin() > 1e-12 { o / o.sin() } else { 1.0 };
        tangent[i] += w[i] * ratio * units[i];
        along += w[i] * ratio * cosine;
    }
    for (t, mu) in tangent.iter_mut().zip(mu.iter()) {
        *t -= along * mu;
    }
    let length = p.length(&tangent);
    if length > 0.0 {
        for (mu, t) in mu.iter_mut().zip(&tangent) {
            *mu = *mu * length.cos() + t * length.sin() / length;
        }
        let norm = p.length(mu);
        mu.iter_mut().for_each(|c| *c /= norm);
    }
    length
}
