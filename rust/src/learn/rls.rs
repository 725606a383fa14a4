//! Recursive least squares on B with A frozen: the exact ridge solution of all events so far, one sweep each.
//!
//! With `u = s x A`: `k = P u / (phi + u.Pu)`, `B += k^T (t - u B)`, `P = (P - k (Pu)^T) / phi`, starting from
//! `P = I / ridge` (Haykin, Adaptive Filter Theory, ch. 13). For squared loss this recursion is also EWC with
//! the full Fisher of B, so it does not forget while `phi = 1`.

use crate::error::{Error, Result};
use crate::kernels::Kernels;

use super::learner::{Buffers, Event, Learner, Scratch, TINY, Touched};
use super::settings::Instant;
use super::step::StepResult;

/// Inverse correlation of the bottleneck.
#[derive(Clone, Debug, PartialEq)]
pub struct Rls {
    /// P, row-major `(rank, rank)`, f64: f32 drifts to an asymmetry of 4e-4 in 1,000 updates.
    pub p: Vec<f64>,
    /// The ridge constant that P started from.
    pub ridge: f64,
}

impl Rls {
    fn new(rank: usize, ridge: f64) -> Self {
        let mut p = vec![0.0; rank * rank];
        for i in 0..rank {
            p[i * rank + i] = 1.0 / ridge;
        }
        Rls { p, ridge }
    }

    /// Upper bound of `|k|` over all u: `sqrt(largest eigenvalue of P / phi) / 2`, P being capped at its prior.
    fn gain_bound(&self, rank: usize, phi: f64) -> f64 {
        0.5 * (rank as f64 / self.ridge / phi).sqrt()
    }

    /// With forgetting, directions that are no longer seen would grow without end; P never gets less certain
    /// than the prior.
    fn cap_trace(&mut self, rank: usize) {
        let trace: f64 = (0..rank).map(|i| self.p[i * rank + i]).sum();
        let prior = rank as f64 / self.ridge;
        if trace > prior {
            let shrink = prior / trace;
            for p in &mut self.p {
                *p *= shrink;
            }
        }
    }
}

/// Whether the step fits the weights' storage, worked out on copies of P and of the error.
fn check(learner: &mut Learner, k: &Kernels, settings: &Instant, s: &mut Scratch, arg: &str) -> Result<()> {
    let Some(rls) = &learner.rls else { return Ok(()) };
    k.rls_gain(&mut rls.p.clone(), &s.u, settings.forgetting, &mut s.pu, &mut s.gain);
    let mut output = vec![0.0; s.y.len()];
    learner.master().b.combine(k, &s.u, &mut output, false);
    k.axpy(-1.0, &s.y, &mut output);
    let top = |v: &[f32]| v.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
    let (error2, gain) = (k.dot(&output, &output), top(&s.gain));
    if !(error2.is_finite() && gain.is_finite()) {
        return Err(Error::NonFinite {
            arg: arg.into(),
            detail: ": its squared error overflows float32".into(),
        });
    }
    learner.guard_weights([0.0, gain * f64::from(error2).sqrt()], arg)
}

/// Takes one event out of the recursion again: `P^-1 -= w u u^T`, and B with it.
///
/// # Errors
/// An event that the recursion has not seen, as far as numbers can tell. Nothing changes then.
pub(crate) fn downdate(learner: &mut Learner, k: &Kernels, event: Event<'_>, target: &[f32]) -> Result<()> {
    let unknown = || Error::Feedback("the learner's recursion has not seen this event".into());
    let mut u = Vec::new();
    let norm2 = learner.bottleneck(k, event.x, &mut u)?;
    if norm2 < TINY {
        return Ok(());
    }
    let root = event.weight.sqrt();
    k.scale(root, &mut u);
    let mut wanted = target.to_vec();
    if let Some(base) = event.base {
        k.axpy(-1.0, base, &mut wanted);
    }
    k.scale(root, &mut wanted);
    let Some(rls) = &mut learner.rls else { return Err(unknown()) };
    let r = u.len();
    let of = |row: &[f64]| row.iter().zip(&u).map(|(p, u)| p * f64::from(*u)).sum::<f64>();
    let pu: Vec<f64> = rls.p.chunks_exact(r).map(of).collect();
    let left = 1.0 - pu.iter().zip(&u).map(|(p, u)| p * f64::from(*u)).sum::<f64>();
    if !(left > 1e-9) {
        return Err(unknown());
    }
    for (row, a) in rls.p.chunks_exact_mut(r).zip(&pu) {
        row.iter_mut().zip(&pu).for_each(|(p, b)| *p += a * b / left);
    }
    // With the gain k = P'u of the new P: B' = B - k (t - u B) / 1, as u P' u = (1 - left) / left.
    let gain: Vec<f32> = pu.iter().map(|p| (-p / left) as f32).collect();
    learner.edit(Touched { a: false, b: true }, |layer| {
        std::sync::Arc::make_mut(&mut layer.b).fit_sweep(k, &u, &gain, &mut wanted)
    });
    learner.refresh_bounds();
    Ok(())
}

pub(crate) fn step(
    learner: &mut Learner,
    k: &Kernels,
    settings: &Instant,
    event: Event<'_>,
    target: &[f32],
) -> Result<StepResult> {
    let result = StepResult::new("rls");
    let mut buffers = Buffers::take();
    let scratch = &mut buffers.0;
    let norm2 = learner.bottleneck(k, event.x, &mut scratch.u)?;
    if norm2 < TINY {
        return Ok(result.skipped("x gives a zero bottleneck (x A = 0): nothing to learn from"));
    }
    let rank = scratch.u.len();
    let reach = (norm2 * rank as f64).sqrt();
    learner.guard(|[_, b]| reach.max(1.0) * b, "x")?;

    scratch.y.clear();
    scratch.y.extend_from_slice(target);
    if let Some(base) = event.base {
        k.axpy(-1.0, base, &mut scratch.y);
    }
    if event.weight != 1.0 {
        // Weighted least squares: both sides of the event's equation by the root of its weight.
        let root = event.weight.sqrt();
        k.scale(root, &mut scratch.u);
        k.scale(root, &mut scratch.y);
    }
    let unit = learner.basis_unit.unwrap_or(norm2);
    let fresh = learner.rls.is_none();
    let rls = learner.rls.get_or_insert_with(|| Rls::new(rank, settings.rho * unit));
    let farthest = rls.gain_bound(rank, settings.forgetting);
    scratch.gain.resize(rank, 0.0);
    scratch.pu.resize(rank, 0.0);
    let wanted = f64::from(k.dot(&scratch.y, &scratch.y)).sqrt();
    let worst = (wanted + reach * (scratch.y.len() as f64).sqrt() * learner.bounds[1]) * farthest;
    if !(learner.bounds[1] + worst < learner.limits()[1])
        && let Err(e) = check(learner, k, settings, scratch, event.feedback.argument())
    {
        if fresh {
            learner.rls = None;
        }
        return Err(e);
    }
    let Some(rls) = &mut learner.rls else { unreachable!("made above") };
    let step =
        k.rls_gain(&mut rls.p, &scratch.u, settings.forgetting, &mut scratch.pu, &mut scratch.gain) as f32;
    if settings.forgetting < 1.0 {
        rls.cap_trace(rank);
    }
    let error2 = learner.edit(Touched { a: false, b: true }, |layer| {
        let b = std::sync::Arc::make_mut(&mut layer.b);
        b.fit_sweep(k, &scratch.u, &scratch.gain, &mut scratch.y)
    });
    let gain = scratch.gain.iter().fold(0.0f32, |m, g| m.max(g.abs()));
    learner.bounds[1] += f64::from(gain) * f64::from(error2).sqrt();

    let left = 1.0 - step;
    let error2 = error2 / event.weight;
    Ok(StepResult {
        loss_before: Some(0.5 * error2),
        loss_after: Some(0.5 * error2 * left * left),
        grad_norm_b: (norm2 as f32 * error2).sqrt(),
        step,
        applied: true,
        ..result
    })
}
