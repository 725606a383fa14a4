//! The default: Fisher-weighted merge of the sides, then training on the window with replay (DER++).
//!
//! The merge is `B = (sum G_k)^-1 sum G_k B_k` with `G_k = sum u u^T`, the exact Fisher of B for squared loss
//! (Fisher-weighted averaging, arXiv 2111.09832; with a shared A also RegMean, arXiv 2212.09849): a side that saw
//! nothing moves nothing, equal Grams give the mean, an adapter with itself stays. Training adds the mean loss of
//! the window and, by `replay_ratio`, that of the reservoir with its stored outputs (DER++, arXiv 2004.07211).
//! Where nothing is replayed the penalty `lambda/2 tr((B - B_slow)^T G_slow / events (B - B_slow))` stands for
//! it, or beside it what a recursion knows of all events (`prior`): elastic weight consolidation (Kirkpatrick et al. 2017) on the change itself, canonical units.

use super::strategy::{Mix, Plan, normalised};
use super::{Problem, Rows, Side};
use crate::learn::Feedback;
use crate::learn::consolidate::solve;

/// Share of a side's mean diagonal that is added to its Gram: directions that nobody saw are shared by size, and
/// a side of no events still weighs nothing.
const FLOOR: f64 = 1e-9;

pub(super) fn plan(p: &Problem) -> Plan {
    let mut plan = Plan { mix: fisher(p), ..Plan::default() };
    if plan.mix.is_empty() {
        plan.notes.push("neither side has learned from an event: slow stays as it is".into());
    }
    train(p, &mut plan, &weights(&p.window), &weights(&p.replay));
    plan
}

/// `(sum G_k)^-1 G_k` of every side but slow; none where no side has a Gram.
fn fisher(p: &Problem) -> Vec<Mix> {
    let r = p.slow.b.rank();
    let floored = |side: &Side| {
        let mut g = side.gram.clone();
        let floor = FLOOR * (0..r).map(|i| g[i * r + i]).sum::<f64>() / r as f64;
        (0..r).for_each(|i| g[i * r + i] += floor);
        g
    };
    let others: Vec<Vec<f64>> = std::iter::once(&p.fast).chain(&p.snapshots).map(floored).collect();
    let mut sum = floored(&p.slow);
    for g in &others {
        sum.iter_mut().zip(g).for_each(|(s, g)| *s += g);
    }
    let Some(inverse) = solve::inverse(&sum, r, FLOOR / 1e3) else { return Vec::new() };
    others
        .iter()
        .map(|g| match g.iter().all(|&v| v == 0.0) {
            true => Mix::Share(0.0),
            false => Mix::Matrix(solve::product(&inverse, g, r)),
        })
        .collect()
}

/// Weights as they came.
pub(super) fn weights(rows: &Rows) -> Vec<f64> {
    rows.weight.iter().map(|&w| f64::from(w)).collect()
}

/// Training terms of DER++, or of the penalty around slow where nothing is replayed.
pub(super) fn train(p: &Problem, plan: &mut Plan, window: &[f64], replay: &[f64]) {
    let s = &p.settings;
    plan.window = normalised(window, 1.0);
    // A gradient was true where it was measured only: replayed, the stored output is all that is left of it.
    let lossless = |i: usize| matches!(*p.replay.feedback[i], Feedback::Gradient { .. });
    let replay: Vec<f64> =
        replay.iter().enumerate().map(|(i, &w)| if lossless(i) { 0.0 } else { w }).collect();
    plan.replay = normalised(&replay, s.replay_ratio);
    if !p.replay.stored.is_empty() {
        plan.logit = (s.replay_ratio * s.logit_weight / p.replay.len() as f64) as f32;
    }
    let replayed = plan.logit > 0.0 || plan.replay.iter().any(|&c| c > 0.0);
    let strength = if replayed { s.prior } else { s.ewc_lambda };
    if strength > 0.0 && p.slow.events > 0 {
        let scale = strength / p.slow.events as f64;
        plan.anchor = p.slow.gram.iter().map(|g| g * scale).collect();
    }
    // The ridge belongs to all events together: a share per sample of the window would shrink B at every turn.
    let seen = p
        .snapshots
        .iter()
        .fold(p.slow.events.saturating_add(p.fast.events), |n, side| n.saturating_add(side.events));
    let rows = (p.window.len() + p.replay.len()) as u64;
    plan.ridge = s.ridge / seen.max(rows).max(1) as f64;
}
