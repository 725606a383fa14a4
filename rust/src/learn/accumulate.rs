//! Gradients that wait for `apply_updates`: dense sums, so that n events cost the memory of one.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;

use super::feedback::{Feedback, Output};
use super::learner::{Buffers, Event, Learner, Touched};
use super::settings::Instant;
use super::step::StepResult;
use crate::ewc::{Ewc, Observed};

/// Sums of dL/dA and dL/dB over the pending events.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Sum of dL/dA, in A's layout.
    pub a: Factor,
    /// Sum of dL/dB, in B's layout.
    pub b: Factor,
    /// Sum of dL/dm of DoRA's magnitudes; empty for plain LoRA.
    pub magnitude: Vec<f32>,
    /// Events in the sums.
    pub count: u64,
    /// Upper bounds of the norms of both sums.
    pub bounds: [f64; 2],
}

impl Gradients {
    /// Empty sums for a layer.
    pub fn new(layer: &Layer) -> Self {
        let zeros = |f: &Factor| Factor::zeros(f.rank(), f.len(), Dtype::F32);
        Gradients {
            a: zeros(&layer.a),
            b: zeros(&layer.b),
            magnitude: Vec::new(),
            count: 0,
            bounds: [0.0; 2],
        }
    }

    /// Empties the sums.
    pub fn clear(&mut self) {
        self.a.stream_mut().fill(0.0);
        self.b.stream_mut().fill(0.0);
        self.magnitude.fill(0.0);
        self.count = 0;
        self.bounds = [0.0; 2];
    }

    /// Resident bytes.
    pub fn memory_bytes(&self) -> usize {
        self.a.memory_bytes() + self.b.memory_bytes() + 4 * self.magnitude.len()
    }
}

/// Who else learns from an event that is accumulated.
pub(crate) struct Watch<'a> {
    /// Takes the squares of the event's gradient.
    pub ewc: &'a mut Ewc,
    /// Position of the event's module.
    pub module: usize,
    /// Whether the gradient itself joins the pending sums as well.
    pub learns: bool,
}

/// Adds one event's gradient (chain rule: `dL/dB = u^T g`, `dL/dA = s x^T (B g)` with `u = s x A`).
pub(crate) fn accumulate(
    learner: &mut Learner,
    k: &Kernels,
    settings: &Instant,
    event: Event<'_>,
    watch: Option<Watch<'_>>,
) -> Result<StepResult> {
    let mut result = StepResult::new("accumulate");
    if let Some(watch) = &watch {
        watch.ewc.check_feedback(Some(event.feedback))?;
    }
    if let Some(base) = event.base
        && !k.dot(base, base).is_finite()
    {
        return Err(Error::non_finite("base"));
    }
    let mut buffers = Buffers::take();
    let scratch = &mut buffers.0;
    let norm2 = learner.bottleneck(k, event.x, &mut scratch.u)?;
    let layer = std::sync::Arc::clone(learner.master());
    let reach = (norm2 * layer.rank() as f64).sqrt();
    learner.guard(|[_, b]| reach.max(1.0) * b, "x")?;
    let n = layer.out_features();
    scratch.g.resize(n, 0.0);

    let mut advantage = 0.0;
    let loss = if let Feedback::Gradient { gradient } = event.feedback {
        scratch.g.copy_from_slice(gradient);
        Some(f32::NAN)
    } else {
        // Rewards look at dY alone; everything else at the whole output.
        scratch.y.resize(n, 0.0);
        layer.b.combine(k, &scratch.u, &mut scratch.y, false);
        match event.feedback {
            Feedback::Reward { reward, .. } => {
                result.baseline = Some(learner.baseline.value as f32);
                advantage = settings.kappa * (reward - learner.baseline.value as f32);
            }
            _ => {
                if let Some(base) = event.base {
                    k.axpy(1.0, base, &mut scratch.y);
                }
            }
        }
        let at = Output { y: &scratch.y, delta: &scratch.y };
        event.feedback.evaluate(k, at, advantage, Some(&mut scratch.g))
    };
    let learns = watch.as_ref().is_none_or(|w| w.learns);
    let outcome = add(learner, k, &layer, scratch, event, norm2, loss, result, watch);
    let result = outcome?;
    if let (Feedback::Reward { reward, .. }, true) = (event.feedback, result.applied && learns) {
        learner.baseline.update(*reward, settings.baseline_rate);
    }
    Ok(result)
}

#[allow(clippy::too_many_arguments)]
fn add(
    learner: &mut Learner,
    k: &Kernels,
    layer: &Layer,
    scratch: &mut super::learner::Scratch,
    event: Event<'_>,
    norm2: f64,
    loss: Option<f32>,
    mut result: StepResult,
    watch: Option<Watch<'_>>,
) -> Result<StepResult> {
    let Some(loss) = loss else {
        return Ok(result.skipped("the output is all zeros, so it has no direction yet: pass base="));
    };
    let s = layer.scaling();
    scratch.gain.resize(layer.rank(), 0.0);
    layer.b.dots(k, &scratch.g, &mut scratch.gain);
    k.scale(s, &mut scratch.gain);
    let g2 = k.dot(&scratch.g, &scratch.g);
    let x2 = k.dot(event.x, event.x);
    result.grad_norm_a = (x2 * k.dot(&scratch.gain, &scratch.gain)).sqrt();
    result.grad_norm_b = (norm2 as f32 * g2).sqrt();
    if !(result.grad_norm_a.is_finite() && result.grad_norm_b.is_finite()) || loss.is_infinite() {
        let arg = event.feedback.argument();
        return Err(Error::NonFinite { arg: arg.into(), detail: ": its gradient overflows float32".into() });
    }
    let learns = watch.as_ref().is_none_or(|w| w.learns);
    let sums = learner.gradients.as_ref().map_or([0.0; 2], |g| g.bounds);
    let bounds = [sums[0] + f64::from(result.grad_norm_a), sums[1] + f64::from(result.grad_norm_b)];
    if learns && bounds.iter().any(|b| *b > super::learner::LIMIT) {
        let detail = ": the accumulated gradient would overflow float32".into();
        return Err(Error::NonFinite { arg: event.feedback.argument().into(), detail });
    }
    if let Some(Watch { ewc, module, .. }) = watch {
        let Event { x, feedback, base, .. } = event;
        let (u, g, w) = (&scratch.u[..], &scratch.g[..], &scratch.gain[..]);
        ewc.stage(k, module, &Observed { layer, x, u, g, w, feedback: Some(feedback), base })?;
        ewc.commit(k);
    }
    if learns {
        let sums = learner.gradients.get_or_insert_with(|| Box::new(Gradients::new(layer)));
        sums.bounds = bounds;
        sums.a.rank1(k, &scratch.gain, event.x);
        sums.b.rank1(k, &scratch.u, &scratch.g);
        sums.count += 1;
    }
    if !loss.is_nan() {
        result.loss_before = Some(loss);
    }
    result.applied = true;
    Ok(result)
}

/// Norm of the mean pending gradient over both factors; 0 without pending events.
pub(crate) fn mean_norm2(learner: &Learner, k: &Kernels) -> f64 {
    match &learner.gradients {
        Some(g) if g.count > 0 => {
            let sum =
                f64::from(k.dot(g.a.stream(), g.a.stream())) + f64::from(k.dot(g.b.stream(), g.b.stream()));
            sum / (g.count as f64 * g.count as f64)
        }
        _ => 0.0,
    }
}

/// Whether a step `w -= lr * clip * mean gradient` is safe for this learner.
pub(crate) fn check_apply(learner: &mut Learner, lr: f64) -> Result<()> {
    let Some(g) = &learner.gradients else { return Ok(()) };
    if g.count == 0 {
        return Ok(());
    }
    let grow = g.bounds.map(|b| lr.abs() * b / g.count as f64);
    if !((lr / g.count as f64) as f32).is_finite() {
        let detail = format!(": {lr:e} overflows float32");
        return Err(Error::NonFinite { arg: "lr".into(), detail });
    }
    learner.guard_weights(grow, "lr")
}

/// Applies `w -= lr * mean gradient` and clears the sums. Returns whether anything was pending.
pub(crate) fn apply(learner: &mut Learner, k: &Kernels, lr: f64) -> bool {
    let Some(mut g) = learner.gradients.take() else { return false };
    if g.count == 0 {
        learner.gradients = Some(g);
        return false;
    }
    let c = (-lr / g.count as f64) as f32;
    let grow = g.bounds.map(|b| lr.abs() * b / g.count as f64);
    learner.edit(Touched { a: true, b: true }, |layer| {
        k.step_and_clear(c, g.a.stream_mut(), std::sync::Arc::make_mut(&mut layer.a).stream_mut());
        k.step_and_clear(c, g.b.stream_mut(), std::sync::Arc::make_mut(&mut layer.b).stream_mut());
    });
    learner.bounds = [learner.bounds[0] + grow[0], learner.bounds[1] + grow[1]];
    // P was measured with the old A.
    learner.rls = None;
    learner.basis_unit = None;
    g.count = 0;
    g.bounds = [0.0; 2];
    learner.gradients = Some(g);
    true
}
