//! Off-policy evaluation: what another policy would have earned on logged choices.

use crate::error::{Error, Result};

/// Estimates of a policy's mean reward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OffPolicy {
    /// Inverse propensity score (Horvitz and Thompson 1952): unbiased where every arm that the policy takes had
    /// a chance.
    pub ips: f64,
    /// Its standard error.
    pub ips_error: f64,
    /// Self-normalised (Swaminathan and Joachims, NeurIPS 2015): a little biased, less variance.
    pub snips: f64,
    /// Its standard error, by the delta method.
    pub snips_error: f64,
    /// Mean weight; 1 but for chance where every arm that the policy takes had a chance.
    pub weight: f64,
    /// Effective sample size `(sum w)^2 / sum w^2`.
    pub effective: f64,
    /// Logged choices.
    pub events: usize,
}

/// Mean reward of a policy that takes the logged arms with `probabilities`, from rewards that were earned by
/// arms chosen with `propensities`.
///
/// # Errors
/// Nothing logged, lengths that differ, numbers out of range, a policy that takes none of the logged arms.
pub fn off_policy(propensities: &[f64], rewards: &[f64], probabilities: &[f64]) -> Result<OffPolicy> {
    let n = rewards.len();
    if n == 0 {
        return Err(Error::shape("rewards", "(0,)", "at least one logged choice"));
    }
    for (arg, v) in [("propensities", propensities), ("probabilities", probabilities)] {
        if v.len() != n {
            return Err(Error::shape(arg, format!("({},)", v.len()), format!("({n},) as rewards")));
        }
    }
    let refuse = |arg: &str, v: &[f64], ok: fn(f64) -> bool, want: &str| match v.iter().position(|&v| !ok(v))
    {
        None => Ok(()),
        Some(row) => Err(Error::config(arg, format!("{} in row {row}", v[row]), want)),
    };
    refuse("propensities", propensities, |p| p > 0.0 && p <= 1.0, "numbers in (0, 1]")?;
    refuse("probabilities", probabilities, |p| (0.0..=1.0).contains(&p), "numbers in [0, 1]")?;
    if rewards.iter().any(|r| !r.is_finite()) {
        return Err(Error::non_finite("rewards"));
    }
    let weights: Vec<f64> = probabilities.iter().zip(propensities).map(|(w, p)| w / p).collect();
    let count = n as f64;
    let (sum, squares) = weights.iter().fold((0.0, 0.0), |(s, q), w| (s + w, q + w * w));
    if sum == 0.0 {
        return Err(Error::config(
            "probabilities",
            "zeros alone",
            "a policy that would take some of the logged arms",
        ));
    }
    let pairs = || weights.iter().zip(rewards);
    let earned: f64 = pairs().map(|(w, r)| w * r).sum();
    let (ips, snips) = (earned / count, earned / sum);
    let spread: f64 = pairs().map(|(w, r)| (w * r - ips).powi(2)).sum();
    let around: f64 = pairs().map(|(w, r)| (w * (r - snips)).powi(2)).sum();
    Ok(OffPolicy {
        ips,
        ips_error: (spread / count).sqrt() / (count - 1.0).max(1.0).sqrt(),
        snips,
        snips_error: around.sqrt() / sum,
        weight: sum / count,
        effective: sum * sum / squares,
        events: n,
    })
}
