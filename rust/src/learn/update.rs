//! One optimiser step over all modules of a learner: mean gradients, penalty, clipping, weights.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;

use super::accumulate::Gradients;
use super::learner::{LIMIT, Learner, Touched};
use super::optim::Optimizer;
use super::regularizer::Regularizer;

/// How one step is taken.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions {
    /// Learning rate of A (B's is this times the LoRA+ ratio).
    pub lr: f64,
    /// Global norm to clip to.
    pub max_grad_norm: Option<f64>,
    /// Weight of the penalty in this step: 1, or 0 in between and n in every n-th, so that lambda means the
    /// same.
    pub penalty: f64,
}

impl StepOptions {
    /// Weight of a penalty that acts in every n-th step, after `steps` of them.
    pub fn penalty_weight(steps: u64, every: usize) -> f64 {
        if steps.is_multiple_of(every.max(1) as u64) { every.max(1) as f64 } else { 0.0 }
    }

    pub(crate) fn validate(self) -> Result<Self> {
        if !self.lr.is_finite() || self.lr < 0.0 {
            return Err(Error::config("lr", self.lr, "a finite number, 0 or above"));
        }
        match self.max_grad_norm {
            Some(c) if !(c.is_finite() && c > 0.0) => {
                Err(Error::config("max_grad_norm", c, "a finite number above 0"))
            }
            _ => Ok(self),
        }
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepOutcome {
    /// Samples in the step.
    pub events: u64,
    /// Norm of the mean gradient (penalty included) over all modules, before clipping.
    pub grad_norm: f64,
}

/// Gradient sums in the learner's module order; `None` or a count of 0 leaves a module alone.
pub(crate) type Sums = [Option<Box<Gradients>>];

fn norm2(k: &Kernels, v: &[f32]) -> f64 {
    f64::from(k.dot(v, v))
}

/// Norms of a module's gradient sum over A, B and magnitudes. One event of `adapt` left its norms in closed
/// form, `|dA| = |w| |x|`, `|dB| = |u| |g|` (a rank-one gradient); a batch is summed up.
fn norms(k: &Kernels, s: &Gradients, closed: bool) -> [f64; 3] {
    if closed && s.count == 1 && s.bounds != [0.0; 2] {
        return [s.bounds[0], s.bounds[1], 0.0];
    }
    [s.a.stream(), s.b.stream(), &s.magnitude[..]].map(|v| norm2(k, v).sqrt())
}

/// Applies the mean of the sums, and clears them.
///
/// # Errors
/// A step that would overflow; weights, moments and anchors are untouched then, sums may hold means.
pub(crate) fn update(
    k: &Kernels,
    learners: &mut [Learner],
    sums: &mut Sums,
    opt: &mut Optimizer,
    mut anchor: Option<&mut (dyn Regularizer + '_)>,
    at: StepOptions,
) -> Result<StepOutcome> {
    let active = anchor.as_ref().is_some_and(|e| e.is_active());
    let follows = anchor.as_ref().is_some_and(|e| e.uses_path());
    let pulls = active && at.penalty > 0.0 && anchor.as_ref().is_some_and(|e| e.in_gradient());
    let mut outcome = StepOutcome::default();
    let mut pure: Vec<Option<(Factor, Factor)>> = Vec::new();
    let mut scales = vec![0.0; learners.len()];
    let mut sizes = vec![[0.0; 3]; learners.len()];
    let mut total = 0.0;
    for (i, (learner, sums)) in learners.iter().zip(sums.iter_mut()).enumerate() {
        pure.push(None);
        let Some(s) = sums.as_deref_mut().filter(|s| s.count > 0) else { continue };
        outcome.events += s.count;
        scales[i] = 1.0 / s.count as f64;
        if let (true, Some(e)) = (pulls || follows, anchor.as_deref_mut()) {
            if follows {
                k.scale(scales[i] as f32, s.a.stream_mut());
                k.scale(scales[i] as f32, s.b.stream_mut());
                k.scale(scales[i] as f32, &mut s.magnitude);
                scales[i] = 1.0;
                pure[i] = Some((s.a.clone(), s.b.clone()));
            }
            if pulls {
                // The sums are made a mean in the step, and the penalty with them.
                let weight = at.penalty / scales[i];
                e.add_gradient(k, i, learner.master(), weight, (&mut s.a, &mut s.b))?;
            }
        }
        sizes[i] = norms(k, s, !pulls).map(|n| n * scales[i]);
        total += sizes[i].iter().map(|n| n * n).sum::<f64>();
    }
    if outcome.events == 0 {
        return Ok(outcome);
    }
    outcome.grad_norm = total.sqrt();
    if !(total.is_finite() && outcome.grad_norm < LIMIT) {
        let detail = ": the gradient overflows float32".into();
        return Err(Error::NonFinite { arg: "gradient".into(), detail });
    }
    let clip = match at.max_grad_norm {
        Some(max) if outcome.grad_norm > max => max / outcome.grad_norm,
        _ => 1.0,
    };
    let set = opt.settings;
    let rates = [at.lr, at.lr * set.lora_plus_ratio];
    let mut grow = vec![[0.0; 2]; learners.len()];
    for (i, learner) in learners.iter_mut().enumerate() {
        if sums[i].as_ref().is_none_or(|s| s.count == 0) {
            continue;
        }
        let slots = [&opt.slots[i].a, &opt.slots[i].b];
        for f in 0..2 {
            grow[i][f] = slots[f].reach(&set, rates[f], sizes[i][f] * clip, learner.bounds[f]);
        }
        learner.guard_weights(grow[i], "lr")?;
    }
    for (i, learner) in learners.iter_mut().enumerate() {
        let Some(s) = sums[i].as_deref_mut().filter(|s| s.count > 0) else { continue };
        let (slot, scale) = (&mut opt.slots[i], scales[i] * clip);
        let before = pure[i].as_ref().map(|_| Arc::clone(learner.master()));
        let proximal =
            if active && at.penalty > 0.0 { anchor.as_deref().filter(|e| !e.in_gradient()) } else { None };
        learner.edit(Touched { a: true, b: true }, |layer| {
            let a = Arc::make_mut(&mut layer.a).stream_mut();
            slot.a.step(k, &set, rates[0], scale, s.a.stream_mut(), a);
            let b = Arc::make_mut(&mut layer.b).stream_mut();
            slot.b.step(k, &set, rates[1], scale, s.b.stream_mut(), b);
            if let Some(e) = proximal {
                e.proximal(i, at.lr * at.penalty, layer);
            }
        });
        if let Some(m) = &mut learner.magnitude {
            slot.magnitude.step(k, &set, at.lr, scale, &mut s.magnitude, Arc::make_mut(m).as_mut_slice());
        }
        if let (Some(e), Some((ga, gb)), Some(old)) = (anchor.as_deref_mut(), &pure[i], before) {
            let new = learner.master();
            e.path(i, (ga, gb), (&old.a, &old.b), (&new.a, &new.b));
        }
        for f in 0..2 {
            learner.bounds[f] += grow[i][f];
        }
        if active && anchor.as_deref().is_some_and(|e| !e.in_gradient()) {
            learner.refresh_bounds();
        }
        // P was measured with the old A.
        learner.rls = None;
        learner.basis_unit = None;
        s.count = 0;
        s.bounds = [0.0; 2];
    }
    opt.steps += 1;
    Ok(outcome)
}
