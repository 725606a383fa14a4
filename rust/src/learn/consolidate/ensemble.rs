//! One member per pattern, mixed for every input; merges nothing.
//!
//! Members share A, so the mixture of outputs `sum_k w_k u B_k` is one adapter with `B = sum_k w_k B_k`: what a
//! concatenation of rank `sum r_k` would answer, at the rank of one. Weights come from the patterns' centroids,
//! `softmax(cos(x, mu_k) / T)` or one-hot (a mixture of local experts, Jacobs et al. 1991).

use std::sync::Arc;

use super::ewc_merge;
use super::run::Run;
use super::strategy::Plan;
use super::{Problem, Rows, check};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;

pub(super) fn plan(_: &Problem) -> Plan {
    let note = "an ensemble merges nothing: its members are fitted one by one".into();
    Plan { idle: true, notes: vec![note], ..Plan::default() }
}

/// A run for each member on the samples of its pattern; `None` for a member that got none.
///
/// A member starts from itself and takes the steps of `ewc_merge` on its part of window and replay; the penalty that
/// stands for replay where it has none is around itself, with slow's Gram.
///
/// # Errors
/// No members, assignments of another length or beyond the members, and what [`Run::new`] refuses.
pub fn member_runs(
    k: &'static Kernels,
    problem: &Problem,
    window: &[usize],
    replay: &[usize],
    members: &[Arc<Factor>],
) -> Result<Vec<Option<Run>>> {
    check::problem(problem)?;
    shapes(&problem.slow.b, members)?;
    assignment("window", window, &problem.window, members.len())?;
    assignment("replay", replay, &problem.replay, members.len())?;
    let one = |(m, b): (usize, &Arc<Factor>)| {
        let of = |assigned: &[usize]| -> Vec<usize> {
            assigned.iter().enumerate().filter(|(_, a)| **a == m).map(|(i, _)| i).collect()
        };
        let (window, replay) = (problem.window.select(&of(window)), problem.replay.select(&of(replay)));
        let mut own = Problem {
            settings: problem.settings.clone(),
            slow: problem.slow.clone(),
            fast: problem.fast.clone(),
            snapshots: Vec::new(),
            window,
            replay,
        };
        own.slow.b = Arc::clone(b);
        if own.window.is_empty() && own.replay.is_empty() {
            return Ok(None);
        }
        let mut plan = Plan::default();
        let (window, replay) = (ewc_merge::weights(&own.window), ewc_merge::weights(&own.replay));
        ewc_merge::train(&own, &mut plan, &window, &replay);
        Ok(Some(Run::with(k, own, plan)))
    };
    members.iter().enumerate().map(one).collect()
}

/// [`member_runs`] to their ends; a member without samples stays as it is.
///
/// # Errors
/// As [`member_runs`] and [`Run::advance`].
pub fn fit_members(
    k: &'static Kernels,
    problem: &Problem,
    window: &[usize],
    replay: &[usize],
    members: &[Arc<Factor>],
) -> Result<Vec<Factor>> {
    let runs = member_runs(k, problem, window, replay, members)?;
    let fitted = runs.into_iter().zip(members).map(|(run, member)| {
        let Some(mut run) = run else { return Ok(Factor::clone(member)) };
        loop {
            if let Some(outcome) = run.advance()? {
                return Ok(outcome.b);
            }
        }
    });
    fitted.collect()
}

fn assignment(arg: &str, assigned: &[usize], rows: &Rows, members: usize) -> Result<()> {
    if assigned.len() != rows.len() {
        let got = format!("({},)", assigned.len());
        return Err(Error::shape(format!("assignment of {arg}"), got, format!("({},)", rows.len())));
    }
    match assigned.iter().find(|a| **a >= members) {
        Some(a) => Err(Error::config(format!("assignment of {arg}"), a, format!("a member below {members}"))),
        None => Ok(()),
    }
}

/// Refuses members that are not f32 factors of the shape of `like`.
fn shapes(like: &Factor, members: &[Arc<Factor>]) -> Result<()> {
    if members.is_empty() {
        return Err(Error::shape("members", "none", "at least one"));
    }
    for (i, m) in members.iter().enumerate() {
        let arg = format!("members[{i}]");
        if m.geometry() != like.geometry() {
            let [got, want] = [&**m, like].map(|f| format!("({}, {})", f.rank(), f.len()));
            return Err(Error::shape(arg, got, want));
        }
        if m.dtype() != Dtype::F32 {
            return Err(Error::Dtype { arg, got: m.dtype().to_string(), want: "f32".into() });
        }
        if !m.is_finite() {
            return Err(Error::non_finite(arg));
        }
    }
    Ok(())
}

/// `sum_k weights_k B_k`, f32; a one-hot weight gives that member bit for bit.
///
/// # Errors
/// No members, another number of weights, weights that are negative or not finite, members of unequal shapes, not
/// in f32 or not finite.
pub fn mix(k: &Kernels, weights: &[f32], members: &[Arc<Factor>]) -> Result<Factor> {
    let Some(first) = members.first() else { return Err(Error::shape("members", "none", "at least one")) };
    if weights.len() != members.len() {
        let want = format!("({},) as members", members.len());
        return Err(Error::shape("weights", format!("({},)", weights.len()), want));
    }
    if let Some(w) = weights.iter().find(|w| !(w.is_finite() && **w >= 0.0)) {
        return Err(Error::config("weights", w, "finite numbers of 0 or more"));
    }
    shapes(first, members)?;
    let mut mixed = Factor::zeros(first.rank(), first.len(), Dtype::F32);
    for (w, m) in weights.iter().zip(members).filter(|(w, _)| **w > 0.0) {
        k.axpy(*w, m.stream(), mixed.stream_mut());
    }
    Ok(mixed)
}
