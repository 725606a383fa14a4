//! A data-aware A, once: from the first inputs, which are then learned again.

use std::sync::Arc;

use super::background::Task;
use super::gather::concerns;
use super::records::{kind, pack};
use super::result::{Adaptation, Loop, Outcome};
use super::{Accepted, Back, Sona};
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::layer::Layer;
use crate::learn::{Learner, basis};
use crate::rng::Rng;

/// How an A came about.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Started {
    /// From the window's inputs, not from inputs that were given.
    pub from_events: bool,
    /// Mean `|u|^2` that each module's A was scaled to.
    pub units: Vec<Option<f64>>,
}

/// Stream of the basis's draws.
const STREAM: u64 = 1 << 62;

impl Sona {
    /// Chooses A from the window's inputs and learns the window again on it.
    pub(super) fn warm_up_from(&self, back: &mut Back, task: Task) -> Result<Adaptation> {
        let inputs = |m: usize| {
            let of = task.taken.iter().filter(|p| !p.held_out && concerns(p.sample.module, m as u32));
            of.flat_map(|p| p.sample.x.iter().copied()).collect::<Vec<_>>()
        };
        let mut notes = Vec::new();
        let mut learners = Vec::new();
        for (m, live) in task.live[0].iter().enumerate() {
            let x = inputs(m);
            match self.fitted(live, &x, m) {
                Ok((learner, held)) => {
                    let n = x.len() / live.layer().in_features();
                    let name = &self.lora.names()[m];
                    notes.push(format!("{name}: A holds {:.1} % of the energy of {n} inputs", 100.0 * held));
                    learners.push(learner);
                }
                Err(e) => {
                    notes.push(format!("{}: A stays as it was: {e}", self.lora.names()[m]));
                    learners.push(blank(live));
                }
            }
        }
        self.start_over(back, learners, Some(task), notes, true)
    }

    /// A learner with an A chosen from inputs, which has learned nothing.
    fn fitted(&self, live: &Learner, x: &[f32], module: usize) -> Result<(Learner, f64)> {
        if x.is_empty() {
            return Err(Error::config("warmup_inputs", "no input of this module", "some"));
        }
        let mut learner = blank(live);
        let mut rng = Rng::new(self.settings.seed, STREAM + module as u64);
        let held = basis::fit(&mut learner, self.kernels, x, &mut rng, &mut |_, _| Ok(()))?;
        Ok((learner, held))
    }

    /// Chooses A from unlabelled inputs now; what was learned so far is learned again as far as it is in the
    /// window. Returns the least share of the inputs' energy that a module's A holds.
    ///
    /// # Errors
    /// Inputs that do not fit, or a loop whose B is not zero and whose events have left the window.
    pub fn warm_up(&self, x: &[f32]) -> Result<f64> {
        let _inside = self.gate.enter();
        let back = &mut *self.back();
        if back.slow.iter().any(|a| a.events.iter().any(|n| *n > 0) || a.learners.iter().any(learned)) {
            let got = "a loop that has consolidated, or began with trained weights";
            return Err(Error::config("warm_up", got, "one that has not: deep_optimize moves A later"));
        }
        if !self.inner().complete {
            let got = "a loop whose events have left the window";
            return Err(Error::config("warm_up", got, "one that can learn all of them again"));
        }
        let live = self.lora.inspect(<[Learner]>::to_vec);
        let width = live[0].layer().in_features();
        if live.iter().any(|l| l.layer().in_features() != width) {
            return Err(Error::config("warm_up", "modules of different input widths", "modules of one"));
        }
        let mut least = 1.0f64;
        let mut learners = Vec::new();
        for (m, live) in live.iter().enumerate() {
            let n_in = live.layer().in_features();
            if x.is_empty() || !x.len().is_multiple_of(n_in) {
                return Err(Error::shape("X", format!("{} numbers", x.len()), format!("(n, {n_in})")));
            }
            let (learner, held) = self.fitted(live, x, m)?;
            least = least.min(held);
            learners.push(learner);
        }
        let task = back.task.take();
        self.start_over(back, learners, task, Vec::new(), false)?;
        Ok(least)
    }

    /// Lets learners without history serve, once the window is learned again on them.
    pub(super) fn start_over(
        &self,
        back: &mut Back,
        learners: Vec<Learner>,
        task: Option<Task>,
        notes: Vec<String>,
        from_events: bool,
    ) -> Result<Adaptation> {
        let payload = pack(
            &Started { from_events, units: learners.iter().map(|l| l.basis_unit).collect() },
            learners.iter().map(|l| &*l.master().a),
        )?;
        {
            let inner = &mut *self.inner();
            if let Some(task) = task {
                inner.window.put_back(task.taken);
            }
            inner.taken_through = Some(0);
            inner.overflowed = false;
        }
        let members = self.members.load_full();
        let mut done = Adaptation::new(Loop::Background, Outcome::WarmedUp);
        let record = Some((kind::STARTED, &payload[..]));
        let served = self.serve(&members, vec![learners.clone()], record);
        if served.is_err() {
            self.inner().taken_through = None;
        }
        let Some(version) = served? else {
            let mut inner = self.inner();
            drop(inner.record(kind::CANCELLED, &[]));
            inner.stats.counts.cancelled += 1;
            inner.taken_through = None;
            inner.overflowed = false;
            done.outcome = Outcome::Cancelled;
            return Ok(done.note("cancelled: more than max_pending_samples events came while A was chosen"));
        };
        back.slow = vec![Accepted::new(learners)];
        back.warm = true;
        done.applied = true;
        done.version = version;
        done.samples_used = self.inner().window.trainable();
        done.notes.extend(notes.into_iter().map(Into::into));
        Ok(done)
    }
}

fn learned(l: &Learner) -> bool {
    !l.master().b.is_zero()
}

/// The same A with a B of zeros, and rules without history.
pub(super) fn blank(live: &Learner) -> Learner {
    let layer = live.layer();
    let b = Factor::zeros(layer.rank(), layer.out_features(), layer.b.dtype());
    let (a, b) = ((*layer.a).clone(), b);
    Learner::new(Arc::new(Layer::new(a, b, layer.alpha, layer.rslora).expect("its own shape")))
}
