//! The background loop: a consolidation in small pieces, so that it can stop at its budget and go on later.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::familiar::familiar;
use super::finish::Decision;
use super::gather::{Gathered, Shape, gram};
use super::held_out::{Contrast, Sum, masters};
use super::members::Members;
use super::records::{Ended, kind};
use super::result::{Adaptation, Loop, Outcome};
use super::window::Pending;
use super::{Accepted, Back, Sona};
use crate::error::Result;
use crate::factor::Factor;
use crate::learn::consolidate::{self, Problem, Run, Side, Verdict};
use crate::learn::{Feedback, Learner, Rule, TargetLoss};
use crate::replay::PatternBank;

/// A consolidation under way.
pub(super) struct Task {
    pub spent: Duration,
    /// Its window.
    pub taken: Vec<Pending>,
    /// The live learners as the window left them, `[member][module]`.
    pub live: Vec<Vec<Learner>>,
    /// The same as they were last accepted; a new member starts where its nearest stood.
    pub slow: Vec<Accepted>,
    /// Patterns with this window counted in.
    pub bank: PatternBank,
    /// Patterns that became one: the first number now means a new one.
    pub merged: Vec<(usize, usize)>,
    pub members: Members,
    /// Member of each event of the window.
    pub route: Vec<usize>,
    /// Member and module of each piece of work, and how far it is.
    jobs: Vec<(usize, usize)>,
    at: usize,
    run: Option<Run>,
    /// New B, `[member][module]`; the live one where nothing was learned.
    pub candidates: Vec<Vec<Arc<Factor>>>,
    /// What the window adds to the Grams, `[member][module]`.
    pub grams: Vec<Vec<Vec<f64>>>,
    /// Events of the window, `[member][module]`.
    pub events: Vec<Vec<u64>>,
    used: usize,
    pub notes: Vec<String>,
    /// Loss on the window (which the accepted weights have not seen) of the accepted weights, and of none.
    contrast: Contrast,
    /// A is to be chosen, nothing is merged.
    pub warm_up: bool,
}

/// Events of contradicting windows in a row after which they are believed.
const CHANGE_OF_MIND: u64 = 256;

impl Sona {
    /// One turn of the background loop, where one is due (or `force`): up to `max_ms` of work. `None`: not due.
    /// A turn that stops at its budget goes on with the next call.
    ///
    /// # Errors
    /// A journal that cannot be written.
    pub fn maybe_background(&self, force: bool) -> Result<Option<Adaptation>> {
        let _inside = self.gate.enter();
        self.tend_journal()?;
        let back = &mut *self.back();
        let started = Instant::now();
        if back.task.is_none() && !self.begin(back, force)? {
            return Ok(None);
        }
        let budget = self.settings.max_ms.map(|ms| Duration::from_secs_f64(ms / 1e3));
        loop {
            let outcome = self.advance(back);
            if let Some(task) = &mut back.task {
                if outcome.is_err() {
                    let task = back.task.take().expect("it is there");
                    return self.cancel(task, outcome.err().map(|e| e.to_string())).map(Some);
                }
                if budget.is_some_and(|b| started.elapsed() >= b) {
                    task.spent += started.elapsed();
                    let mut done = Adaptation::new(Loop::Background, Outcome::GoesOn);
                    done.latency_ns = started.elapsed().as_nanos() as u64;
                    return Ok(Some(done.note("max_ms is used up: the next call goes on")));
                }
                continue;
            }
            let mut done = outcome?.expect("a task that is gone has a result");
            done.latency_ns += started.elapsed().as_nanos() as u64;
            let mut inner = self.inner();
            inner.stats.counts.turn(&done);
            inner.stats.background.add(done.latency_ns);
            return Ok(Some(done));
        }
    }

    /// Whether a turn may be due; waits for nobody, and says yes where another thread is at work.
    pub fn may_be_due(&self) -> bool {
        let Ok(back) = self.back.try_lock() else { return true };
        let Ok(inner) = self.inner.try_lock() else { return true };
        back.task.is_some() || self.is_due(&back, &inner, false) || inner.recorder.is_some()
    }

    fn is_due(&self, back: &Back, inner: &super::Inner, force: bool) -> bool {
        let s = &self.settings;
        let interval = Duration::from_secs_f64(s.background_interval_ms / 1e3);
        if !force && back.started.is_some_and(|t| t.elapsed() < interval) {
            return false;
        }
        let least = if back.warm { s.background_min_samples } else { s.warmup_inputs };
        if inner.window.trainable() < if force && back.warm { 1 } else { least } {
            return false;
        }
        let held = inner.window.len() - inner.window.trainable() + back.reservoir.part(true).len();
        !back.warm || s.holdout == 0.0 || held >= s.gate_min_samples || force
    }

    /// Serves [`Sona::maybe_background`] until [`Sona::stop_background`]; `told` gets every finished turn and
    /// ends the loop by returning false.
    ///
    /// # Errors
    /// As [`Sona::maybe_background`].
    pub fn run_background(&self, told: &mut dyn FnMut(Adaptation) -> bool) -> Result<()> {
        // Short naps: a stop is noticed soon, whatever the interval.
        let nap = Duration::from_millis(1)
            .max(Duration::from_secs_f64((self.settings.background_interval_ms / 1e3 / 8.0).min(0.02)));
        while !self.stop.load(Ordering::Relaxed) {
            match self.maybe_background(false)? {
                Some(done) if done.outcome == Outcome::GoesOn => {
                    std::thread::sleep(Duration::from_micros(200))
                }
                Some(done) => {
                    if !told(done) {
                        break;
                    }
                }
                None => std::thread::sleep(nap),
            }
        }
        self.stop.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Ends [`Sona::run_background`] within its nap.
    pub fn stop_background(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Takes the window where a turn is due.
    fn begin(&self, back: &mut Back, force: bool) -> Result<bool> {
        let inner = &mut *self.inner();
        if !self.is_due(back, inner, force) {
            return Ok(false);
        }
        let warm_up = !back.warm;
        self.begin_now(back, inner, warm_up)?;
        Ok(true)
    }

    /// Takes the window and what the live learners are at this event.
    pub(super) fn begin_now(&self, back: &mut Back, inner: &mut super::Inner, warm_up: bool) -> Result<()> {
        inner.record(kind::BEGIN, &[&[u8::from(warm_up)]])?;
        let up_to = inner.next - 1;
        let members = (*self.members.load_full()).clone();
        let live = members.loras.iter().map(|l| l.inspect(<[Learner]>::to_vec)).collect::<Vec<_>>();
        let taken = inner.window.take();
        inner.taken_through = Some(up_to);
        inner.overflowed = false;
        back.started = Some(Instant::now());
        back.task = Some(Task {
            spent: Duration::ZERO,
            taken,
            live,
            slow: back.slow.clone(),
            bank: back.bank.clone(),
            merged: Vec::new(),
            members,
            route: Vec::new(),
            jobs: Vec::new(),
            at: 0,
            run: None,
            candidates: Vec::new(),
            grams: Vec::new(),
            events: Vec::new(),
            used: 0,
            notes: Vec::new(),
            contrast: Contrast::default(),
            warm_up,
        });
        Ok(())
    }

    /// A piece of work of the task; a result where the task is done (and gone).
    fn advance(&self, back: &mut Back) -> Result<Option<Adaptation>> {
        let mut task = back.task.take().expect("a task is under way");
        if task.warm_up {
            return self.warm_up_from(back, task).map(Some);
        }
        if task.jobs.is_empty() {
            self.prepare(&mut task)?;
            back.task = Some(task);
            return Ok(None);
        }
        if task.at == task.jobs.len() {
            return self.judge(back, task).map(Some);
        }
        let step = self.work(back, &mut task);
        back.task = Some(task);
        step.map(|()| None)
    }

    /// All the work of a task at once, up to the gate.
    pub(super) fn work_out(&self, back: &Back, task: &mut Task) -> Result<()> {
        self.prepare(task)?;
        while task.at < task.jobs.len() {
            self.work(back, task)?;
        }
        Ok(())
    }

    /// A piece of the job that the task is at.
    fn work(&self, back: &Back, task: &mut Task) -> Result<()> {
        let (member, module) = task.jobs[task.at];
        match task.run.take() {
            None => self.start_job(back, task, member, module).map(|run| task.run = run),
            Some(mut run) => match run.advance() {
                Ok(None) => {
                    task.run = Some(run);
                    Ok(())
                }
                Ok(Some(done)) => {
                    task.candidates[member][module] = Arc::new(done.b);
                    task.used = task.used.max(done.used);
                    task.notes.extend(done.notes);
                    task.at += 1;
                    Ok(())
                }
                Err(e) => Err(e),
            },
        }
    }

    /// Counts the window's patterns, and gives new ones a member where there is an ensemble.
    pub(super) fn prepare(&self, task: &mut Task) -> Result<()> {
        let same_width = |x: &[f32]| x.len() == self.lora.shape(0).0;
        for p in task.taken.iter().filter(|p| !p.held_out && same_width(&p.sample.x)) {
            // Members keep their patterns: once there are as many as there may be, they only count.
            if !(self.settings.is_ensemble() && task.bank.len() == task.bank.capacity()) {
                task.bank.observe(&p.sample.x, p.sample.quality);
                task.merged.extend(task.bank.merged());
            }
        }
        if self.settings.is_ensemble() {
            self.spawn_members(task)?;
        }
        let k = self.kernels;
        task.route = task.taken.iter().map(|p| task.members.nearest(k, &p.sample.x)).collect();
        let of = |learners: &Vec<Learner>| learners.iter().map(|l| Arc::clone(&l.master().b)).collect();
        task.candidates = task.live.iter().map(of).collect();
        task.grams = task.slow.iter().map(|a| a.grams.iter().map(|g| vec![0.0; g.len()]).collect()).collect();
        task.events = task.slow.iter().map(|a| vec![0; a.events.len()]).collect();
        let modules = self.lora.names().len();
        task.jobs = (0..task.live.len()).flat_map(|i| (0..modules).map(move |m| (i, m))).collect();
        Ok(())
    }

    /// A member for every pattern; a new one starts as the member whose inputs are nearest.
    fn spawn_members(&self, task: &mut Task) -> Result<()> {
        let count = task.bank.len();
        if count < 2 {
            return Ok(());
        }
        let width = self.lora.shape(0).0;
        for i in task.members.loras.len()..count {
            let centroid = &task.bank.centroids()[i * width..(i + 1) * width];
            let near = task.members.nearest(self.kernels, centroid);
            let lora = &task.members.loras[near];
            let new = crate::MicroLora::from_adapter(&lora.adapter(), self.settings.seed, *lora.settings())?;
            task.members.loras.push(Arc::new(new));
            task.live.push(task.live[near].clone());
            task.slow.push(Accepted::new(task.slow[near].learners.clone()));
        }
        task.members.centroids.clear();
        for c in task.bank.centroids()[..count * width].chunks_exact(width) {
            // The bank holds running means of directions, members hold directions.
            let norm = self.kernels.dot(c, c).sqrt().max(f32::MIN_POSITIVE);
            task.members.centroids.extend(c.iter().map(|v| v / norm));
        }
        Ok(())
    }

    fn start_job(&self, back: &Back, task: &mut Task, member: usize, module: usize) -> Result<Option<Run>> {
        let outs = self.outs();
        let live = &task.live[member][module];
        let layer = Arc::clone(live.master());
        let shape = Shape { module: module as u32, layer: &layer, outs: &outs };
        let mut window = Gathered::new(&shape);
        for (p, _) in task.taken.iter().zip(&task.route).filter(|(p, r)| !p.held_out && **r == member) {
            window.pending(&shape, p);
        }
        let window = window.finish(self.kernels, &shape, false);
        if window.rows.event.is_empty() {
            task.at += 1;
            return Ok(None);
        }
        let mut replay = Gathered::new(&shape);
        if self.settings.reservoir_capacity > 0 {
            let mut x = Vec::new();
            for e in back.reservoir.part(false).iter() {
                if task.members.loras.len() > 1 {
                    x.clear();
                    e.push_x(&mut x);
                    if task.members.nearest(self.kernels, &x) != member {
                        continue;
                    }
                }
                replay.entry(&shape, &e);
            }
        }
        let replay = replay.finish(self.kernels, &shape, false);
        let known = familiar(&replay, &window);
        let (window, replay) = (window.rows, replay.rows);
        task.contrast.add(self.kernels, &window, &task.slow[member].learners[module].master().b, &known);
        let added = gram(&window);
        let known = |q: &&f32| !q.is_nan();
        let n = window.quality.iter().filter(known).count();
        let mean = window.quality.iter().filter(known).map(|q| f64::from(*q)).sum::<f64>() / n as f64;
        let accepted = &task.slow[member];
        let (sum, rated) = accepted.quality;
        let mut slow = Side {
            b: Arc::clone(&accepted.learners[module].master().b),
            gram: accepted.grams[module].clone(),
            events: accepted.events[module],
            quality: (rated > 0).then(|| sum / rated as f64),
        };
        let fast = Side {
            b: Arc::clone(&layer.b),
            gram: added.clone(),
            events: window.event.len() as u64,
            quality: (n > 0).then_some(mean),
        };
        let mut prior = 0.0;
        if self.accumulates(&task.taken) && self.strategy.name == consolidate::STRATEGIES[0].name {
            // The recursion has the accepted events in it, and the window: it is what to start from, and each of
            // its events counts as much as one of the window.
            slow.b = Arc::clone(&layer.b);
            slow.gram.iter_mut().zip(&added).for_each(|(g, w)| *g += w);
            slow.events += window.event.len() as u64;
            prior = slow.events as f64 / window.event.len() as f64;
        }
        task.events[member][module] = window.event.len() as u64;
        task.grams[member][module] = added;
        let s = &self.settings;
        let unit = live.rls.as_ref().map_or_else(
            || self.lora.settings().instant.rho * live.basis_unit.unwrap_or(1.0),
            |rls| rls.ridge,
        );
        let settings = consolidate::Settings {
            strategy: if s.is_ensemble() { &consolidate::STRATEGIES[0] } else { self.strategy },
            steps: s.consolidation_steps,
            logit_weight: s.logit_weight,
            replay_ratio: s.replay_ratio,
            ewc_lambda: s.ewc_lambda,
            prior,
            best_share: s.best_share,
            quality_threshold: s.quality_threshold,
            ridge: unit,
        };
        let problem = Problem { settings, slow, fast, snapshots: Vec::new(), window, replay };
        Run::new(self.kernels, problem).map(Some)
    }

    /// Whether the instant rule has kept these events in its state: recursive least squares that forget nothing, and
    /// nothing but targets of squared error. Other feedback moves B as a gradient step does.
    fn accumulates(&self, taken: &[Pending]) -> bool {
        let instant = &self.lora.settings().instant;
        let squared = |f: &Feedback| matches!(f, Feedback::Target { loss: TargetLoss::Mse, .. });
        instant.rule != Rule::Nlms
            && instant.forgetting == 1.0
            && taken.iter().all(|p| p.held_out || squared(&p.sample.feedback))
    }

    /// The gate: held-out loss of the accepted, the live and the candidate weights.
    pub(super) fn judge(&self, back: &mut Back, task: Task) -> Result<Adaptation> {
        let layers: Vec<_> = task.live[0].iter().map(|l| &**l.master()).collect();
        // A window on which the accepted weights do worse than none, on inputs like those that they were accepted
        // for, says the opposite of what was learned: a poisoned stream and a change of mind look the same, so it
        // has no vote in its own case. What goes on for long is believed.
        let contradiction = match self.settings.holdout > 0.0 && back.contradicted < CHANGE_OF_MIND {
            true => task.contrast.contradicts(self.settings.gate_tolerance),
            false => None,
        };
        let contradicts = contradiction.is_some();
        let held = self.held_out(back, if contradicts { &[] } else { &task.taken }, &layers);
        let now = self.members.load_full();
        let slow: Vec<_> = back.slow.iter().map(|a| masters(&a.learners)).collect();
        let live: Vec<_> = task.live[..now.loras.len()].iter().map(|l| masters(l)).collect();
        let new: Vec<Vec<&Factor>> =
            task.candidates.iter().map(|c| c.iter().map(|b| &**b).collect()).collect();
        let slow = self.held_out_loss(&held, &now, &slow);
        let live = self.held_out_loss(&held, &now, &live);
        let candidate = self.held_out_loss(&held, &task.members, &new);
        let gate = consolidate::Gate {
            tolerance: self.settings.gate_tolerance,
            min_samples: self.settings.gate_min_samples,
        };
        let verdict = gate.judge(slow.mean(), live.mean(), candidate.mean(), candidate.rows);
        let mean = |s: Sum| s.mean().unwrap_or(f64::NAN);
        let mut notes: Vec<String> = Vec::new();
        if let Some((accepted, none)) = contradiction {
            notes.push(format!(
                "the window contradicts what was accepted: its loss is {accepted:.4e} under the accepted weights \
                 and {none:.4e} without them"
            ));
        }
        let decision = match verdict {
            verdict if contradicts && verdict != Verdict::Unmeasured => {
                notes.push(format!(
                    "taken back, live held-out loss {:.4e}: the last accepted weights ({:.4e}) serve again",
                    mean(live),
                    mean(slow)
                ));
                Decision::RollBack
            }
            Verdict::Accept => Decision::Accept,
            Verdict::KeepLive => {
                notes.push(format!(
                    "refused: held-out loss {:.4e} against {:.4e} of the live weights, which stay",
                    mean(candidate),
                    mean(live)
                ));
                Decision::Keep
            }
            // Squares of few events fit their noise, and the recursion needs more of them: taking them away
            // would keep it there. Only what says the opposite of what was learned is taken away.
            Verdict::RollBack if self.accumulates(&task.taken) => {
                notes.push(format!(
                    "refused: held-out loss {:.4e} against {:.4e} of the last accepted weights; the live weights \
                     ({:.4e}) go on, for nothing contradicts them and more events will tell",
                    mean(candidate),
                    mean(slow),
                    mean(live)
                ));
                Decision::Keep
            }
            Verdict::RollBack => {
                notes.push(format!(
                    "refused: held-out loss {:.4e} (live {:.4e}) against {:.4e} of the last accepted weights, \
                     which serve again",
                    mean(candidate),
                    mean(live),
                    mean(slow)
                ));
                Decision::RollBack
            }
            Verdict::Unmeasured => {
                let n = candidate.rows;
                notes.push(format!("not gated: {n} held-out samples, {} are wanted", gate.min_samples));
                Decision::Accept
            }
        };
        let (loss_before, loss_after) = match decision {
            Decision::Accept => (live.mean(), candidate.mean()),
            Decision::Keep => (live.mean(), live.mean()),
            Decision::RollBack => (live.mean(), slow.mean()),
        };
        let ended = Ended {
            decision,
            loss_before,
            loss_after,
            used: if decision == Decision::Accept { task.used } else { 0 },
            ungated: verdict == Verdict::Unmeasured,
            distrusted: contradicts && verdict != Verdict::Unmeasured,
            members: task.members.loras.len(),
        };
        notes.extend(task.notes.iter().cloned());
        let mut done = self.finish(back, task, &ended)?;
        done.notes.splice(0..0, notes.into_iter().map(Into::into));
        Ok(done)
    }
}
