//! Putting a decision into force: events that came meanwhile are learned again on the new weights, then the
//! learners are exchanged.

use std::sync::Arc;

use super::instant::relearn;
use super::members::Members;
use super::records::{Ended, b_factors, kind, pack};
use super::result::{Adaptation, Loop, Outcome};
use super::window::Pending;
use super::{Accepted, Back, Sona};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::learn::Learner;
use crate::learn::learner::{Event as Step, Touched};

use super::background::Task;

/// What the gate found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Decision {
    /// The candidate serves.
    Accept,
    /// The live weights stay, and count as accepted.
    Keep,
    /// The last accepted weights serve again.
    RollBack,
}

/// Events that are learned again between two looks at the window.
const CHUNK: usize = 32;
/// So many may be learned again under the lock, right before the exchange: a few microseconds.
const LAST: usize = 4;
/// After so many chunks the rest is done under the lock: events come as fast as they are learned again.
const MOST_CHUNKS: usize = 256;

impl Sona {
    /// Ends a consolidation.
    ///
    /// # Errors
    /// A journal that cannot be written; the consolidation is cancelled then.
    pub(super) fn finish(&self, back: &mut Back, task: Task, ended: &Ended) -> Result<Adaptation> {
        let decision = ended.decision;
        let now = self.members.load_full();
        let mut accepted: Vec<Accepted> = match decision {
            Decision::RollBack => back.slow.clone(),
            Decision::Keep | Decision::Accept => task.slow.clone(),
        };
        if decision == Decision::Keep {
            accepted.truncate(now.loras.len());
        }
        if decision != Decision::RollBack {
            for (i, a) in accepted.iter_mut().enumerate() {
                a.learners.clone_from(&task.live[i]);
                for (m, g) in a.grams.iter_mut().enumerate() {
                    g.iter_mut().zip(&task.grams[i][m]).for_each(|(g, w)| *g += w);
                    a.events[m] += task.events[i][m];
                }
            }
            for (p, &i) in task.taken.iter().zip(&task.route).filter(|(p, _)| !p.held_out) {
                if let (Some(q), Some(a)) = (p.sample.quality, accepted.get_mut(i)) {
                    a.quality = (a.quality.0 + f64::from(q), a.quality.1 + 1);
                }
            }
        }
        if decision == Decision::Accept {
            for (a, candidates) in accepted.iter_mut().zip(&task.candidates) {
                for (learner, b) in a.learners.iter_mut().zip(candidates) {
                    learner.edit(Touched { a: false, b: true }, |layer| layer.b = Arc::clone(b));
                    learner.refresh_bounds();
                }
            }
        }
        let members = if decision == Decision::Accept { &task.members } else { &*now };
        let mut done = Adaptation::new(Loop::Background, outcome(decision));
        let learners: Vec<Vec<Learner>> = accepted.iter().map(|a| a.learners.clone()).collect();
        let factors = if decision == Decision::Accept { &learners[..] } else { &[] };
        let payload = pack(ended, b_factors(factors))?;
        let served = if decision == Decision::Keep {
            let inner = &mut *self.inner();
            inner.record(kind::DONE, &[&payload]).map(|()| {
                inner.taken_through = None;
                // Live is what was accepted and the window on top, if nothing left the window since.
                inner.complete = !inner.overflowed;
                Some(self.lora.version())
            })
        } else {
            done.applied = true;
            self.serve(members, learners, Some((kind::DONE, &payload)))
        };
        match served {
            Ok(Some(version)) => done.version = version,
            Ok(None) => return self.cancel(task, None),
            Err(e) => {
                self.cancel(task, Some(e.to_string()))?;
                return Err(e);
            }
        }
        done.latency_ns = task.spent.as_nanos() as u64;
        (done.loss_before, done.loss_after) = (ended.loss_before, ended.loss_after);
        done.quality_delta = ended.loss_before.unwrap_or(f64::NAN) - ended.loss_after.unwrap_or(f64::NAN);
        (done.samples_used, done.ungated) = (ended.used, ended.ungated);
        back.slow = accepted;
        back.contradicted = if ended.distrusted { back.contradicted + task.taken.len() as u64 } else { 0 };
        if !ended.distrusted {
            back.bank = task.bank;
            for &(from, into) in &task.merged {
                back.reservoir.merge_patterns(from as u32, into as u32);
            }
            self.absorb(back, members, &task.taken, &task.route);
        }
        if decision != Decision::RollBack
            && let Err(e) = self.publish(back)
        {
            done.notes.push(format!("not published: {e}").into());
        }
        self.inner().window.recycle(task.taken, self.settings.max_pending_samples);
        Ok(done)
    }

    /// Learns the window again on learners that nobody reads yet, then lets them serve. `None`: events were
    /// pushed out of the window before they could be learned again.
    /// The record is written with the exchange.
    ///
    /// # Errors
    /// A journal that cannot be written; the learners of before serve on.
    pub(super) fn serve(
        &self,
        members: &Members,
        mut learners: Vec<Vec<Learner>>,
        record: Option<(u8, &[u8])>,
    ) -> Result<Option<u64>> {
        let mut done = 0;
        for turn in 0.. {
            let chunk: Vec<Pending> = {
                let inner = &mut *self.inner();
                if inner.overflowed {
                    return Ok(None);
                }
                if inner.window.len() - done <= LAST || turn == MOST_CHUNKS {
                    inner.window.iter().skip(done).for_each(|p| self.learn_again(members, &mut learners, p));
                    if let Some((kind, payload)) = record {
                        inner.record(kind, &[payload])?;
                    }
                    inner.taken_through = None;
                    inner.complete = true;
                    let mut version = 0;
                    for (lora, learners) in members.loras.iter().zip(&mut learners).rev() {
                        version = lora.exchange(learners);
                    }
                    if self.settings.is_ensemble() {
                        self.members.store(Arc::new(members.clone()));
                    }
                    return Ok(Some(version));
                }
                inner.window.iter().skip(done).take(CHUNK).cloned().collect()
            };
            chunk.iter().for_each(|p| self.learn_again(members, &mut learners, p));
            done += chunk.len();
        }
        unreachable!("the loop ends at its last turn")
    }

    fn learn_again(&self, members: &Members, learners: &mut [Vec<Learner>], p: &Pending) {
        if p.held_out {
            return;
        }
        let s = &p.sample;
        let i = members.nearest(self.kernels, &s.x);
        let step = Step { x: &s.x, feedback: &s.feedback, base: s.base.as_deref(), weight: s.weight };
        let modules = self.concerned(s.module.map(|m| m as usize));
        // What it says was said when the event came.
        drop(relearn(&members.loras[i], &mut learners[i], modules, step));
    }

    /// Gives a consolidation up: its window goes back where there is room, live weights stay as they are.
    pub(super) fn cancel(&self, task: Task, error: Option<String>) -> Result<Adaptation> {
        let inner = &mut *self.inner();
        // A journal that cannot be written has said so already.
        drop(inner.record(kind::CANCELLED, &[]));
        inner.taken_through = None;
        inner.overflowed = false;
        let room = self.settings.max_pending_samples.saturating_sub(inner.window.len());
        let mut taken = task.taken;
        let lost = taken.len().saturating_sub(room);
        inner.stats.counts.dropped += lost as u64;
        inner.stats.counts.cancelled += 1;
        inner.complete &= lost == 0;
        inner.window.put_back(taken.split_off(lost));
        let why = error.unwrap_or_else(|| {
            "more than max_pending_samples events came while it ran; the live weights have learned them"
                .into()
        });
        let mut done = Adaptation::new(Loop::Background, Outcome::Cancelled);
        done.version = self.lora.version();
        Ok(done.note(format!("cancelled: {why}")))
    }

    /// Makes the accepted weights the active generation of the hot-swap manager; an ensemble has no single one.
    pub(super) fn publish(&self, back: &Back) -> Result<()> {
        if back.slow.len() > 1 || back.quiet {
            return Ok(());
        }
        let layers = back.slow[0].learners.iter().map(|l| Arc::clone(l.layer()));
        let modules = self.lora.names().iter().cloned().zip(layers).collect();
        let adapter = Adapter { modules, ..self.lora.origin() };
        self.hot.set_active(Arc::new(adapter), false).map(drop)
    }
}

fn outcome(decision: Decision) -> Outcome {
    match decision {
        Decision::Accept => Outcome::Accepted,
        Decision::Keep => Outcome::Kept,
        Decision::RollBack => Outcome::RolledBack,
    }
}
