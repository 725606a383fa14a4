//! Sides and samples count by their quality above a threshold.
//!
//! A sample weighs `w_i = max(q_i - threshold, 0) / sum`, in place of its own weight, which a caller makes of the
//! same quality. A sample without quality counts with its `weight` and the mean quality; so do rewards and
//! preferences, because a failure is their information and dropping it would teach that everything is good.
//! Where no quality is known at all, every sample counts with its `weight`. Sides weigh by the same excess of
//! their mean quality, one without by the mean of the others; so equal qualities merge as `average` does.
//! Nothing in the window above the threshold: nothing happens.

use super::ewc_merge::{train, weights};
use super::strategy::{Mix, Plan};
use super::{Problem, Rows, Side};
use crate::learn::Feedback;

pub(super) fn plan(p: &Problem) -> Plan {
    let threshold = p.settings.quality_threshold;
    let window = excess(&p.window, threshold);
    let shares = shares(p, threshold);
    let idle = if p.window.is_empty() { shares.is_none() } else { window.iter().all(|&w| w == 0.0) };
    if idle {
        let note = format!("no quality is above the threshold of {threshold}: nothing was consolidated");
        return Plan { idle: true, notes: vec![note], ..Plan::default() };
    }
    let mut plan = Plan { mix: shares.unwrap_or_default(), ..Plan::default() };
    if plan.mix.is_empty() {
        plan.notes.push(format!("no side's mean quality is above {threshold}: training starts from slow"));
    }
    train(p, &mut plan, &window, &excess(&p.replay, threshold));
    plan
}

/// Whether low quality says "do not imitate" and no more.
fn imitates(f: &Feedback) -> bool {
    !matches!(f, Feedback::Reward { .. } | Feedback::Preference { .. })
}

/// Weights of samples, before they are normalised.
pub(super) fn excess(rows: &Rows, threshold: f64) -> Vec<f64> {
    let Some(mean) = rows.mean_quality() else { return weights(rows) };
    let over = |q: f64| (q - threshold).max(0.0);
    let rated = |i: usize| !rows.quality[i].is_nan() && imitates(&rows.feedback[i]);
    (0..rows.len())
        .map(|i| match rated(i) {
            // A weight of 0 takes a sample out whatever its quality.
            true if rows.weight[i] == 0.0 => 0.0,
            true => over(f64::from(rows.quality[i])),
            false => f64::from(rows.weight[i]) * over(mean),
        })
        .collect()
}

/// Shares of fast and the snapshots; `None` where no side is above the threshold.
fn shares(p: &Problem, threshold: f64) -> Option<Vec<Mix>> {
    let sides: Vec<&Side> = [&p.slow, &p.fast].into_iter().chain(&p.snapshots).collect();
    let known: Vec<f64> = sides.iter().filter_map(|side| side.quality).collect();
    if known.is_empty() {
        return Some(vec![Mix::Share(1.0 / sides.len() as f64); sides.len() - 1]);
    }
    let mean = known.iter().sum::<f64>() / known.len() as f64;
    let over = |side: &&Side| (side.quality.unwrap_or(mean) - threshold).max(0.0);
    let sum: f64 = sides.iter().map(over).sum();
    (sum > 0.0).then(|| sides[1..].iter().map(|side| Mix::Share(over(side) / sum)).collect())
}
