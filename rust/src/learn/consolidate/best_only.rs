//! Trains slow on the best share of the window and nothing else.
//!
//! `B = B_s + (G_s + ridge + sum u u^T)^-1 sum u^T e` for squared losses: what recursive least squares would
//! give that starts from slow and sees the chosen samples only.
//!
//! The best of many noisy ratings is mostly lucky (`E[max]` is above the mean even where all are equal), so
//! qualities are shrunk before they are compared: a thing rated n times (the same bottleneck and equal feedback)
//! with mean q counts as `(n q + 3 m) / (n + 3)`, m being the mean of the window, as if three ratings of average
//! luck had come before: one lucky rating does not beat several good ones (James & Stein 1961 in the
//! empirical-Bayes form of Efron & Morris 1975). Samples without quality count as m.

use std::collections::HashMap;

use super::strategy::Plan;
use super::{Problem, Rows};

/// Ratings of average luck that every thing starts with.
const PRIOR: f64 = 3.0;

pub(super) fn plan(p: &Problem) -> Plan {
    let chosen = best(&p.window, p.settings.best_share);
    let Some(few) = ratings(&p.window, &chosen) else {
        let note = "the window is empty: nothing was consolidated".into();
        return Plan { idle: true, notes: vec![note], ..Plan::default() };
    };
    let r = p.slow.b.rank();
    let mut plan = Plan { window: vec![0.0; p.window.len()], anchor: p.slow.gram.clone(), ..Plan::default() };
    for &i in &chosen {
        plan.window[i] = p.window.weight[i];
    }
    for i in 0..r {
        plan.anchor[i * r + i] += p.settings.ridge;
    }
    if p.window.mean_quality().is_none() {
        plan.notes.push("no sample has a quality: the most recent were chosen".into());
    } else if few < 3 {
        let note = "the best samples were rated fewer than 3 times: choosing them selects on noise";
        plan.notes.push(note.into());
    }
    plan
}

/// The fewest ratings of a chosen sample.
fn ratings(rows: &Rows, chosen: &[usize]) -> Option<usize> {
    let (group, members) = things(rows);
    let rated = |g: usize| members[g].iter().filter(|&&j| !rows.quality[j].is_nan()).count();
    chosen.iter().map(|&i| rated(group[i])).min()
}

/// The `max(1, ceil(share n))` samples of the highest shrunk quality, the most recent first among equals.
pub(super) fn best(rows: &Rows, share: f64) -> Vec<usize> {
    let n = rows.len();
    let m = ((share * n as f64).ceil() as usize).clamp(1, n.max(1)).min(n);
    let quality = shrunk(rows);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| {
        quality[b].total_cmp(&quality[a]).then_with(|| rows.event[b].cmp(&rows.event[a])).then(b.cmp(&a))
    });
    order.truncate(m);
    order
}

/// Shrunk quality of each sample, rounded to f32 so that sums in another order do not break ties.
pub(super) fn shrunk(rows: &Rows) -> Vec<f32> {
    let mean = rows.mean_quality().unwrap_or(0.0);
    let (group, members) = things(rows);
    let means: Vec<f32> = members
        .iter()
        .map(|m| {
            let known: Vec<f64> =
                m.iter().map(|&j| f64::from(rows.quality[j])).filter(|q| !q.is_nan()).collect();
            ((known.iter().sum::<f64>() + PRIOR * mean) / (known.len() as f64 + PRIOR)) as f32
        })
        .collect();
    group.into_iter().map(|g| means[g]).collect()
}

/// Which thing each sample rates, and the samples of each thing.
fn things(rows: &Rows) -> (Vec<usize>, Vec<Vec<usize>>) {
    let mut members: Vec<Vec<usize>> = Vec::new();
    let mut seen: HashMap<Vec<u32>, Vec<usize>> = HashMap::new();
    let group = (0..rows.len())
        .map(|i| {
            let key: Vec<u32> =
                rows.u[i * rows.rank..(i + 1) * rows.rank].iter().map(|v| v.to_bits()).collect();
            let at_u = seen.entry(key).or_default();
            let same = |g: &&usize| rows.feedback[members[**g][0]] == rows.feedback[i];
            if let Some(&g) = at_u.iter().find(same) {
                members[g].push(i);
                return g;
            }
            at_u.push(members.len());
            members.push(vec![i]);
            members.len() - 1
        })
        .collect();
    (group, members)
}
