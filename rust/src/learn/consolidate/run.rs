//! A consolidation in slices: merge, one pass over all samples, then Newton steps in the bottleneck.
//!
//! Every column of B has the same curvature `H = sum c u u^T`, so a step is `D = -H^-1 grad` with an
//! `rank x rank` inverse: exact for squared errors, Gauss-Newton with a curvature bound for the others. Where there
//! are others, the objective is evaluated after the step and the step halved until it does not rise.

use std::ops::Range;

use super::general::{self, Sample, Sums};
use super::objective::{Block, Part, Quadratic, mirror};
use super::strategy::{Mix, Plan};
use super::{Outcome, Problem, check, solve};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;

/// Multiply-adds of a slice: 64 rows at rank 16 and 768 outputs, tens of microseconds.
const SLICE: usize = 64 * 16 * 768;
/// Rows of a slice, whatever their width.
const ROWS: Range<usize> = 4..65;
/// After this many halvings a step is not worth its evaluation.
const HALVINGS: u32 = 8;
/// A pivot of the curvature below this share is rounding of the samples.
const NOISE: f64 = 1e-7;

/// Where a run stands.
enum Phase {
    Merge,
    /// Quadratic terms, from this sample on (window first).
    Read(usize),
    /// General terms at the current B, from this one on.
    Gather(usize),
    Solve,
    /// General losses at the trial, from this one on.
    Trial(usize),
    Done,
}

/// A step that is being tried.
struct Trial {
    /// The whole step, `(rank, out)`.
    d: Factor,
    /// `H d` of the quadratic part.
    hd: Factor,
    /// `<g, d>` and `<d, H d>` of the quadratic part.
    slope: f64,
    bend: f64,
    /// Share that is tried.
    share: f32,
    halvings: u32,
    /// B at that share, and its general loss so far.
    b: Factor,
    loss: f64,
}

/// A consolidation under way.
pub struct Run {
    k: &'static Kernels,
    problem: Problem,
    plan: Plan,
    phase: Phase,
    b: Factor,
    quadratic: Quadratic,
    general: Vec<Sample>,
    sums: Sums,
    trial: Option<Trial>,
    steps: usize,
    block: Block,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Run({}, {} steps)", self.problem.settings.strategy.name, self.steps)
    }
}

impl Run {
    /// Checks a problem and plans it.
    ///
    /// # Errors
    /// A setting out of its range; sides or samples whose shapes do not fit, or that are not finite.
    pub fn new(k: &'static Kernels, problem: Problem) -> Result<Run> {
        check::problem(&problem)?;
        let plan = (problem.settings.strategy.plan)(&problem);
        Ok(Run::with(k, problem, plan))
    }

    /// A run of a plan that is already made.
    pub(super) fn with(k: &'static Kernels, problem: Problem, plan: Plan) -> Run {
        let (rank, out) = (problem.slow.b.rank(), problem.slow.b.len());
        let general = general::samples(&problem, &plan);
        Run {
            k,
            phase: Phase::Merge,
            b: Factor::clone(&problem.slow.b),
            quadratic: Quadratic::new(rank, out),
            general,
            sums: empty(rank, out),
            trial: None,
            steps: 0,
            block: Block::default(),
            problem,
            plan,
        }
    }

    /// Does one slice, tens of microseconds at rank 16 and 768 outputs; `None`: call again, now or later.
    ///
    /// # Errors
    /// A sample or a step that overflows float32; the sides are untouched, as always.
    pub fn advance(&mut self) -> Result<Option<Outcome>> {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Done) {
            Phase::Merge => self.merge(),
            Phase::Read(at) => self.read(at),
            Phase::Gather(at) => self.gather(at),
            Phase::Solve => self.solve()?,
            Phase::Trial(at) => self.try_step(at),
            Phase::Done => return self.finish().map(Some),
        };
        match self.phase {
            Phase::Done => self.finish().map(Some),
            _ => Ok(None),
        }
    }

    /// Rows of a slice.
    fn slice(&self) -> usize {
        (SLICE / (self.b.rank() * self.b.len()).max(1)).clamp(ROWS.start, ROWS.end - 1)
    }

    fn merge(&mut self) -> Phase {
        let (rank, out) = (self.b.rank(), self.b.len());
        let slow = &self.problem.slow;
        let sides = std::iter::once(&self.problem.fast).chain(&self.problem.snapshots);
        for (mix, side) in self.plan.mix.iter().zip(sides) {
            // A side that is slow itself, or has no share, leaves the bits of the start alone.
            if *mix == Mix::Share(0.0) || side.b == slow.b {
                continue;
            }
            let mut away = Factor::clone(&side.b);
            self.k.axpy(-1.0, slow.b.stream(), away.stream_mut());
            let (share, away) = match mix {
                Mix::Share(share) => (*share as f32, away),
                Mix::Matrix(m) => {
                    let mut mixed = vec![0.0; rank * out];
                    self.k.mix_rows(m, &away.to_f32(false), out, &mut mixed);
                    (1.0, Factor::from_rows(&mixed, rank, out, Dtype::F32))
                }
            };
            self.k.axpy(share, away.stream(), self.b.stream_mut());
        }
        match self.trains() && self.problem.settings.steps > 0 {
            true => Phase::Read(0),
            false => Phase::Done,
        }
    }

    fn trains(&self) -> bool {
        let counts = |coefs: &[f32]| coefs.iter().any(|&c| c > 0.0);
        counts(&self.plan.window) || counts(&self.plan.replay) || self.plan.logit > 0.0
    }

    fn read(&mut self, at: usize) -> Phase {
        let (window, replay) = (&self.problem.window, &self.problem.replay);
        let (part, rows, from) = match at < window.len() {
            true => (Part::Window, window, at),
            false => (Part::Replay, replay, at - window.len()),
        };
        let until = (from + self.slice()).min(rows.len());
        self.quadratic.add(self.k, &self.b, rows, part, &self.plan, from..until, &mut self.block);
        let next = at + until - from;
        if next < window.len() + replay.len() {
            return Phase::Read(next);
        }
        let (b, slow) = (self.b.to_f32(false), self.problem.slow.b.to_f32(false));
        self.quadratic.close(self.k, &b, &slow, &self.plan);
        self.next_step()
    }

    /// Where a step begins.
    fn next_step(&self) -> Phase {
        if self.general.is_empty() { Phase::Solve } else { Phase::Gather(0) }
    }

    fn gather(&mut self, at: usize) -> Phase {
        if at == 0 {
            self.sums = empty(self.b.rank(), self.b.len());
        }
        let until = (at + self.slice()).min(self.general.len());
        let some = &mut self.general[at..until];
        general::gather(self.k, &self.b, &self.problem, some, &mut self.sums, &mut self.block);
        if until < self.general.len() { Phase::Gather(until) } else { Phase::Solve }
    }

    fn solve(&mut self) -> Result<Phase> {
        let (rank, out) = (self.b.rank(), self.b.len());
        mirror(&mut self.sums.h, rank);
        let h: Vec<f64> = self.quadratic.h.iter().zip(&self.sums.h).map(|(a, b)| a + b).collect();
        let mut g = self.quadratic.g.clone();
        self.k.axpy(1.0, self.sums.g.stream(), g.stream_mut());
        if !self.k.all_finite(g.stream()) || !self.sums.loss.is_finite() || h.iter().any(|h| !h.is_finite()) {
            self.phase = Phase::Solve;
            return Err(check::blame(&self.problem));
        }
        let Some(mut inverse) = solve::inverse(&h, rank, NOISE) else { return Ok(Phase::Done) };
        inverse.iter_mut().for_each(|v| *v = -*v);
        let rows = g.to_f32(false);
        let mut d = vec![0.0; rank * out];
        self.k.mix_rows(&inverse, &rows, out, &mut d);
        let step = Factor::from_rows(&d, rank, out, Dtype::F32);
        if self.general.is_empty() {
            // Quadratic all through: this is the minimum, and further steps would only round.
            self.k.axpy(1.0, step.stream(), self.b.stream_mut());
            self.steps += 1;
            return Ok(Phase::Done);
        }
        let mut hd = vec![0.0; rank * out];
        self.k.mix_rows(&self.quadratic.h, &d, out, &mut hd);
        self.trial = Some(Trial {
            slope: solve::dot(self.quadratic.g.stream(), step.stream()),
            bend: solve::dot(&d, &hd),
            hd: Factor::from_rows(&hd, rank, out, Dtype::F32),
            d: step,
            share: 1.0,
            halvings: 0,
            b: self.b.clone(),
            loss: 0.0,
        });
        Ok(Phase::Trial(0))
    }

    fn try_step(&mut self, at: usize) -> Phase {
        let until = (at + self.slice()).min(self.general.len());
        let Some(t) = &mut self.trial else { return Phase::Done };
        if at == 0 {
            t.b.clone_from(&self.b);
            self.k.axpy(t.share, t.d.stream(), t.b.stream_mut());
            t.loss = 0.0;
        }
        let some = &self.general[at..until];
        t.loss += general::losses(self.k, &t.b, &self.problem, some, &mut self.block);
        if until < self.general.len() {
            return Phase::Trial(until);
        }
        let share = f64::from(t.share);
        let rise = share * t.slope + 0.5 * share * share * t.bend + t.loss - self.sums.loss;
        if rise <= 0.0 {
            std::mem::swap(&mut self.b, &mut t.b);
            self.k.axpy(t.share, t.hd.stream(), self.quadratic.g.stream_mut());
            self.steps += 1;
            return if self.steps < self.problem.settings.steps { self.next_step() } else { Phase::Done };
        }
        if t.halvings == HALVINGS {
            self.plan.notes.push(format!("no step after {} lowers the objective", self.steps));
            return Phase::Done;
        }
        t.halvings += 1;
        t.share *= 0.5;
        Phase::Trial(0)
    }

    fn finish(&self) -> Result<Outcome> {
        if !self.b.is_finite() {
            let detail = ": the merge or a step overflows float32".into();
            return Err(Error::NonFinite { arg: "fast".into(), detail });
        }
        let mut notes = self.plan.notes.clone();
        let silent = general::silent(&self.general);
        if silent > 0 {
            notes.push(format!("{silent} samples gave an output of zero, which has no direction"));
        }
        Ok(Outcome { b: self.b.clone(), used: self.used(), idle: self.plan.idle, notes })
    }

    /// Samples with a say, where a step was taken.
    fn used(&self) -> usize {
        if self.steps == 0 {
            return 0;
        }
        let count = |coefs: &[f32]| coefs.iter().filter(|c| **c > 0.0).count();
        match self.plan.logit > 0.0 {
            true => count(&self.plan.window) + self.problem.replay.len(),
            false => count(&self.plan.window) + count(&self.plan.replay),
        }
    }
}

fn empty(rank: usize, out: usize) -> Sums {
    Sums { loss: 0.0, g: Factor::zeros(rank, out, Dtype::F32), h: vec![0.0; rank * rank] }
}
