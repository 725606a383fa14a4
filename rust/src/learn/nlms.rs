//! Normalised LMS: a gradient step divided by the local curvature, halved until the event's loss falls.
//!
//! After a step of size eta the output is exactly `y - eta p + eta^2 q` with
//! `p = |u|^2 g + s^2 |x|^2 (B g) B` and `q = s^2 |x|^2 (g . dY) g` (B only: `p = |u|^2 g`, `q = 0`),
//! so the line check costs no forward pass. `eta = mu / (|u|^2 + s^2 |x|^2 |B|_F^2)`.

use crate::error::{Error, Result};
use crate::kernels::Kernels;

use super::feedback::{Feedback, Output};
use super::learner::{Buffers, Event, Learner, TINY, Touched};
use super::settings::{Instant, Train};
use super::step::StepResult;

/// Sufficient-decrease share of Armijo's test.
const ARMIJO: f32 = 0.25;
/// After this many halvings the step is below what f32 can resolve.
const MAX_HALVINGS: u32 = 40;

pub(crate) fn step(
    learner: &mut Learner,
    k: &Kernels,
    settings: &Instant,
    event: Event<'_>,
) -> Result<StepResult> {
    let mut result = StepResult::new("nlms");
    let (layer, both) = (std::sync::Arc::clone(learner.master()), settings.train == Train::Both);
    let mut buffers = Buffers::take();
    let scratch = &mut buffers.0;
    let norm2 = learner.bottleneck(k, event.x, &mut scratch.u)?;
    if norm2 < TINY {
        return Ok(result.skipped("x gives a zero bottleneck (x A = 0): nothing to learn from"));
    }
    let reach = (norm2 * layer.rank() as f64).sqrt();
    learner.guard(|[_, b]| reach.max(1.0) * b, "x")?;

    let n = layer.out_features();
    let (u2, s2) = (norm2 as f32, layer.scaling() * layer.scaling());
    let mut delta = vec![0.0; n];
    layer.b.combine(k, &scratch.u, &mut delta, false);
    scratch.y.clear();
    scratch.y.extend_from_slice(&delta);
    if let Some(base) = event.base {
        k.axpy(1.0, base, &mut scratch.y);
    }
    scratch.g.resize(n, 0.0);
    let advantage = match event.feedback {
        Feedback::Reward { reward, .. } => {
            result.baseline = Some(learner.baseline.value as f32);
            settings.kappa * (reward - learner.baseline.value as f32)
        }
        _ => 0.0,
    };
    let here = Output { y: &scratch.y, delta: &delta };
    let Some(loss) = event.feedback.evaluate(k, here, advantage, Some(&mut scratch.g)) else {
        return Ok(result.skipped("the output is all zeros, so it has no direction yet: pass base="));
    };
    let mut g2 = k.dot(&scratch.g, &scratch.g);
    if !g2.is_finite() || loss.is_infinite() {
        return Err(Error::NonFinite {
            arg: event.feedback.argument().into(),
            detail: " in its gradient".into(),
        });
    }
    if let Some(max) = settings.max_grad_norm {
        let norm = g2.sqrt();
        if norm > max {
            k.scale(max / norm, &mut scratch.g);
            g2 = max * max;
        }
    }
    if !loss.is_nan() {
        result.loss_before = Some(loss);
    }

    // Terms of the closed-form output after a step of size eta.
    let mut w = vec![0.0; layer.rank()];
    let (mut p, mut curvature, mut q) = (Vec::new(), u2, 0.0);
    let x2 = k.dot(event.x, event.x);
    layer.b.dots(k, &scratch.g, &mut w);
    let w2 = k.dot(&w, &w);
    if both {
        p = scratch.g.clone();
        k.scale(u2, &mut p);
        let scaled: Vec<f32> = w.iter().map(|w| w * s2 * x2).collect();
        layer.b.combine(k, &scaled, &mut p, true);
        q = s2 * x2 * k.dot(&scratch.g, &delta);
        let b = layer.b.stream();
        curvature += s2 * x2 * k.dot(b, b);
    }
    let scale = if event.feedback.is_angular() { k.dot(&scratch.y, &scratch.y) } else { 1.0 };
    let mu = settings.mu.unwrap_or_else(|| event.feedback.default_mu());
    let mut eta = event.weight.min(1.0) * mu * scale / (curvature + f32::MIN_POSITIVE);
    result.grad_norm_a = (s2 * x2 * w2).sqrt();
    result.grad_norm_b = (u2 * g2).sqrt();
    if !result.grad_norm_a.is_finite() || !eta.is_finite() {
        return Err(Error::NonFinite { arg: "x".into(), detail: " once squared in float32".into() });
    }

    if !loss.is_nan() && g2 > 0.0 {
        let slope = if both { k.dot(&scratch.g, &p) } else { u2 * g2 };
        let (mut y, mut d) = (vec![0.0; n], vec![0.0; n]);
        loop {
            let along = |out: &mut Vec<f32>, start: &[f32]| {
                out.copy_from_slice(start);
                if both {
                    k.axpy(-eta, &p, out);
                    k.axpy(eta * eta * q, &scratch.g, out);
                } else {
                    k.axpy(-eta * u2, &scratch.g, out);
                }
            };
            along(&mut y, &scratch.y);
            along(&mut d, &delta);
            let there = event.feedback.evaluate(k, Output { y: &y, delta: &d }, advantage, None);
            match there {
                Some(after) if after <= loss - ARMIJO * eta * slope => {
                    result.loss_after = Some(after);
                    break;
                }
                _ if result.halvings == MAX_HALVINGS => {
                    return Ok(result.skipped("no step decreases this event's loss"));
                }
                _ => {
                    eta *= 0.5;
                    result.halvings += 1;
                }
            }
        }
    } else if !loss.is_nan() {
        result.loss_after = Some(loss);
    }

    let worst = f64::from(eta) * (norm2 * f64::from(g2)).sqrt();
    let worst_a = if both { f64::from(eta) * f64::from(result.grad_norm_a) } else { 0.0 };
    k.scale(-eta * layer.scaling(), &mut w);
    k.scale(-eta, &mut scratch.u);
    let arg = event.feedback.argument();
    let checked = if k.all_finite(&scratch.u) && (!both || k.all_finite(&w)) {
        learner.guard_weights([worst_a, worst], arg)
    } else {
        Err(Error::NonFinite { arg: arg.into(), detail: ": the step would overflow float32".into() })
    };
    checked?;
    if let Feedback::Reward { reward, .. } = event.feedback {
        learner.baseline.update(*reward, settings.baseline_rate);
    }
    drop(layer);
    learner.edit(Touched { a: both, b: true }, |layer| {
        if both {
            std::sync::Arc::make_mut(&mut layer.a).rank1(k, &w, event.x);
        }
        std::sync::Arc::make_mut(&mut layer.b).rank1(k, &scratch.u, &scratch.g);
    });
    if both {
        // P was measured with the old A.
        learner.rls = None;
        learner.basis_unit = None;
        learner.bounds[0] += worst_a;
    }
    learner.bounds[1] += worst;
    result.step = eta * u2;
    result.applied = true;
    Ok(result)
}
