//! The instant loop: one event, learned from at once, and kept for the background.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use super::records::kind;
use super::result::{Adaptation, Loop, Outcome};
use super::stats::{HELD_OUT, UNDER_THRESHOLD};
use super::window::Incoming;
use super::{Inner, Sona};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::learn::feedback::Output;
use crate::learn::learner::{Event as Step, LIMIT};
use crate::learn::{Feedback, Learner, Rule, StepResult, TargetLoss};
use crate::micro_lora::MicroLora;

/// An event as it comes in.
#[derive(Clone, Copy)]
pub struct Event<'a> {
    /// Input, `(in,)`.
    pub x: &'a [f32],
    /// What is said of the output.
    pub feedback: &'a Arc<Feedback>,
    /// Quality in [0, 1].
    pub quality: Option<f32>,
    /// The module that it concerns; `None`: every module.
    pub module: Option<usize>,
    /// Output of the frozen layer.
    pub base: Option<&'a [f32]>,
}

/// What learning from one event gave.
pub(super) struct Learned {
    pub first: StepResult,
    before: f64,
    after: f64,
}

/// Feedback up to this, and weights up to [`FAR`], cannot overflow any storage in one step.
const CALM: f64 = 100.0;
/// Bounds of weights that are far from what float16, and what wider storage, holds.
const FAR: [f64; 2] = [1e3, 1e9];
/// Squares of what a step divides by, from which it cannot go far, in float16 and in wider storage.
const NEAR: [f64; 2] = [1e-4, 1e-12];

impl Sona {
    /// The modules that an event concerns.
    pub(super) fn concerned(&self, module: Option<usize>) -> std::ops::Range<usize> {
        module.map_or(0..self.lora.names().len(), |m| m..m + 1)
    }

    fn check(&self, e: &Event<'_>) -> Result<()> {
        if let Some(q) = e.quality {
            if q.is_nan() {
                return Err(Error::NonFinite { arg: "quality".into(), detail: ", expected 0 to 1".into() });
            }
            if !(0.0..=1.0).contains(&q) {
                return Err(Error::Feedback(format!("quality: got {q}, expected a number from 0 to 1")));
            }
        }
        let squared = matches!(**e.feedback, Feedback::Target { loss: TargetLoss::Mse, .. });
        if self.lora.settings().instant.rule == Rule::Rls && !squared {
            // Said of every event, whether its number is held out or not.
            return Err(Error::Feedback(format!(
                "instant.rule is rls, which needs Target(t, loss=\"mse\"), not feedback with a {}",
                e.feedback.argument()
            )));
        }
        for m in self.concerned(e.module) {
            self.lora.check_event(m, e.x, e.feedback, e.base)?;
        }
        if !self.kernels.all_finite(e.x) {
            return Err(Error::non_finite("x"));
        }
        if e.base.is_some_and(|b| !self.kernels.all_finite(b)) {
            return Err(Error::non_finite("base"));
        }
        Ok(())
    }

    /// Weight of an event by its quality: targets are imitated, so poor ones are passed over (`None`); other
    /// feedback says by itself what was bad.
    fn weight(&self, feedback: &Feedback, quality: Option<f32>) -> Option<f32> {
        let (Some(q), Feedback::Target { .. }) = (quality, feedback) else { return Some(1.0) };
        let threshold = self.settings.quality_threshold as f32;
        let weight = (q - threshold) / (1.0 - threshold);
        (weight > 0.0).then_some(weight)
    }

    /// Learns from one event at once, unless it is held out, and keeps it for the background loop.
    ///
    /// # Errors
    /// Wrong widths, non-finite numbers, a quality outside [0, 1], feedback that the rule cannot use, a journal
    /// that cannot be written. Nothing changes then.
    pub fn instant(&self, e: Event<'_>) -> Result<Adaptation> {
        let started = Instant::now();
        self.check(&e)?;
        let mut done = Adaptation::new(Loop::Instant, Outcome::Event);
        let Some(weight) = self.weight(e.feedback, e.quality) else {
            let mut inner = self.inner();
            inner.stats.counts.skip(&UNDER_THRESHOLD);
            inner.stats.counts.quality(e.quality, false);
            done.version = self.lora.version();
            return Ok(done.note(UNDER_THRESHOLD));
        };
        let module = e.module.map(|m| m as u32);
        let incoming =
            Incoming { x: e.x, base: e.base, feedback: e.feedback, module, quality: e.quality, weight };
        let inner = &mut *self.inner();
        self.take_event(inner, incoming, &mut done)?;
        done.latency_ns = started.elapsed().as_nanos() as u64;
        inner.stats.instant.add(done.latency_ns);
        Ok(done)
    }

    /// The part of an event that is the same when it comes again from a journal.
    pub(super) fn take_event(&self, inner: &mut Inner, e: Incoming<'_>, done: &mut Adaptation) -> Result<()> {
        let event = inner.next;
        let held_out = inner.hold.contains(event) && !matches!(**e.feedback, Feedback::Gradient { .. });
        // Written down before it is learned, where there is a journal.
        inner.window.push(event, held_out, self.advantage(&e), e);
        let written = inner.record_event();
        let recorded = written.is_ok();
        let learned = match written.and_then(|()| self.learn(&e, held_out)) {
            Ok(learned) => learned,
            Err(e) => {
                if recorded {
                    // On disk it is taken back; a journal that cannot be written says so by itself.
                    drop(inner.record(kind::REFUSED, &[&event.to_le_bytes()]));
                }
                inner.window.drop_newest();
                return Err(e);
            }
        };
        inner.next = event + 1;
        if inner.window.len() > self.settings.max_pending_samples {
            inner.overflowed |= inner.taken_through.is_some();
            inner.complete = false;
            inner.stats.counts.dropped += 1;
            inner.window.drop_oldest();
        }
        let counts = &mut inner.stats.counts;
        counts.instant += 1;
        counts.quality(e.quality, true);
        done.event = Some(event);
        let Some(learned) = learned else {
            counts.held_out += 1;
            done.version = self.lora.version();
            done.notes.push(HELD_OUT);
            return Ok(());
        };
        done.applied = learned.first.applied;
        done.version = learned.first.version;
        done.samples_used = usize::from(done.applied);
        counts.applied += u64::from(done.applied);
        if learned.before.is_finite() {
            done.loss_before = Some(learned.before);
            counts.loss(learned.before);
        }
        if learned.after.is_finite() {
            done.loss_after = Some(learned.after);
            done.quality_delta = learned.before - learned.after;
        }
        if learned.first.rule == "nlms" {
            counts.halved.0 += u64::from(learned.first.halvings > 0);
            counts.halved.1 += 1;
            counts.refused_steps += u64::from(!done.applied);
        }
        if let Some(reason) = learned.first.reason {
            counts.skip(&reason);
            done.notes.push(reason);
        }
        Ok(())
    }

    /// Refuses a held-out event for what a learned one would be refused: numbers that overflow once squared.
    fn bearable(&self, e: &Incoming<'_>) -> Result<()> {
        let (k, lora) = (self.kernels, self.member_of(e.x));
        let advantage = self.advantage(e);
        let (mut u, mut y) = (Vec::new(), Vec::new());
        lora.inspect(|learners| {
            for m in self.concerned(e.module.map(|m| m as usize)) {
                let (l, b) = (&learners[m], &learners[m].master().b);
                let norm2 = l.bottleneck(k, e.x, &mut u)?;
                let reach = (norm2 * u.len() as f64).sqrt();
                if !(reach.max(1.0) * l.bounds[1] < LIMIT) {
                    let detail = ": its output would overflow float32".into();
                    return Err(Error::NonFinite { arg: "x".into(), detail });
                }
                y.resize(b.len(), 0.0);
                b.combine(k, &u, &mut y, false);
                let delta = y.clone();
                if let Some(base) = e.base {
                    k.axpy(1.0, base, &mut y);
                }
                let at = Output { y: &y, delta: &delta };
                if e.feedback.evaluate(k, at, advantage, None).is_some_and(|loss| !loss.is_finite()) {
                    let (arg, detail) = (e.feedback.argument().into(), ": its loss overflows float32".into());
                    return Err(Error::NonFinite { arg, detail });
                }
            }
            Ok(())
        })
    }

    fn advantage(&self, e: &Incoming<'_>) -> f32 {
        let Feedback::Reward { reward, .. } = **e.feedback else { return 0.0 };
        let m = self.concerned(e.module.map(|m| m as usize)).start;
        let lora = self.member_of(e.x);
        let baseline = lora.inspect(|l| l[m].baseline.value) as f32;
        lora.settings().instant.kappa * (reward - baseline)
    }

    /// The learner that events with this input teach.
    pub(super) fn member_of(&self, x: &[f32]) -> Arc<MicroLora> {
        if !self.settings.is_ensemble() {
            return Arc::clone(&self.lora);
        }
        let members = self.members.load();
        Arc::clone(&members.loras[members.nearest(self.kernels, x)])
    }

    /// One event into the live learner; where a module refuses, none has learned.
    fn learn(&self, e: &Incoming<'_>, held_out: bool) -> Result<Option<Learned>> {
        if held_out {
            return self.bearable(e).map(|()| None);
        }
        let modules = self.concerned(e.module.map(|m| m as usize));
        let step = Step { x: e.x, feedback: e.feedback, base: e.base, weight: e.weight };
        if self.settings.is_ensemble() {
            learn(&self.member_of(e.x), modules, step).map(Some)
        } else {
            learn(&self.lora, modules, step).map(Some)
        }
    }
}

/// One event into the modules of one learner.
fn learn(lora: &MicroLora, modules: std::ops::Range<usize>, step: Step<'_>) -> Result<Learned> {
    let many = modules.len();
    let before = (many > 1 && !calm(lora, modules.clone(), step)).then(|| lora.state_before());
    let mut out: Option<Learned> = None;
    for m in modules {
        let result = match lora.instant_event(m, step) {
            Ok(result) => result,
            Err(e) => {
                if let Some(before) = before {
                    lora.undo(before);
                }
                return Err(e);
            }
        };
        let share = 1.0 / many as f64;
        let loss = |l: Option<f32>| l.map_or(f64::NAN, |l| share * f64::from(l));
        let (before, after) = (loss(result.loss_before), loss(result.loss_after));
        match &mut out {
            Some(out) => {
                out.before += before;
                out.after += after;
                out.first.applied |= result.applied;
                out.first.version = result.version;
            }
            None => out = Some(Learned { first: result, before, after }),
        }
    }
    Ok(out.expect("an event concerns a module"))
}

/// Whether no number of a step can come near what any storage holds, so that no module will refuse it.
fn calm(lora: &MicroLora, modules: std::ops::Range<usize>, step: Step<'_>) -> bool {
    let k = lora.kernels();
    let small = |v: &[f32]| f64::from(k.dot(v, v)) < CALM * CALM;
    let said = match step.feedback {
        Feedback::Target { target, .. } => small(target),
        Feedback::Gradient { gradient } => small(gradient),
        Feedback::Reward { reward, .. } => f64::from(reward.abs()) < CALM,
        Feedback::Preference { .. } | Feedback::Contrastive { .. } => false,
    };
    let squared = matches!(step.feedback, Feedback::Target { loss: TargetLoss::Mse, .. });
    let recursive = squared && lora.settings().instant.rule != Rule::Nlms;
    let mut u = Vec::new();
    let mut near = |l: &Learner| {
        let narrow = usize::from(l.layer().b.dtype() != Dtype::F16);
        // A step of the recursion is at most |error| / (2 sqrt(ridge)), any other |gradient| / |u|.
        let divisor2 = match &l.rls {
            Some(rls) if recursive => rls.ridge,
            _ => l.bottleneck(k, step.x, &mut u).unwrap_or(f64::NAN),
        };
        l.bounds.iter().all(|b| *b < FAR[narrow]) && (NEAR[narrow]..1.0 / NEAR[1]).contains(&divisor2)
    };
    said && step.base.is_none_or(small) && lora.inspect(|all| all[modules].iter().all(&mut near))
}

/// Learns again, from an event that was kept: on learners that nobody reads.
pub(super) fn relearn(
    lora: &MicroLora,
    learners: &mut [Learner],
    modules: std::ops::Range<usize>,
    step: Step<'_>,
) -> Option<Cow<'static, str>> {
    let mut said = None;
    for m in modules {
        // What could be learned on the old weights may be out of range on the new: it is passed over.
        match learners[m].instant(lora.kernels(), &lora.settings().instant, step) {
            Ok(result) => said = said.or(result.reason),
            Err(_) => said = Some(Cow::Borrowed("an event could not be learned again on the new weights")),
        }
    }
    said
}
