//! What a deep run made: gated like everything else, then served.

use std::sync::Arc;

use nalgebra::DMatrix;

use super::gather::{Gathered, Shape, gram};
use super::held_out::masters;
use super::members::Members;
use super::records::kind;
use super::result::{Adaptation, Loop, Outcome};
use super::{Accepted, Back, Sona};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::learn::consolidate::{Gate, Verdict};
use crate::learn::rls::Rls;
use crate::learn::{Learner, Rule};
use crate::replay::PatternBank;

impl Sona {
    /// Lets a trained adapter serve, if its held-out loss passes the gate (or `gate` is off). Events that wait
    /// in the window are learned again on it; an ensemble becomes one adapter.
    ///
    /// # Errors
    /// Other modules or shapes. Nothing changes then.
    pub fn install(&self, adapter: &Adapter, samples_used: usize, gate: bool) -> Result<Adaptation> {
        let _inside = self.gate.enter();
        self.lora.check_same(adapter)?;
        let started = std::time::Instant::now();
        let back = &mut *self.back();
        if let Some(task) = back.task.take() {
            // Its events are in the live weights, and wait for the next turn.
            self.cancel(task, None)?;
        }
        let mut done = Adaptation::new(Loop::Deep, Outcome::Accepted);
        let held: Vec<_> = self.inner().window.iter().filter(|p| p.held_out).cloned().collect();
        let members = self.members.load_full();
        let loss = |members: &Members, all: &[Vec<Learner>]| {
            let layers: Vec<_> = all[0].iter().map(|l| &**l.master()).collect();
            let rows = self.held_out(back, &held, &layers);
            self.held_out_loss(&rows, members, &all.iter().map(|l| masters(l)).collect::<Vec<_>>())
        };
        let live: Vec<Vec<Learner>> = members.loras.iter().map(|l| l.inspect(<[Learner]>::to_vec)).collect();
        let slow: Vec<_> = back.slow.iter().map(|a| a.learners.clone()).collect();
        let names = self.lora.names().iter();
        let new = names
            .map(|n| adapter.layer(n).map(|l| Learner::new(Arc::clone(l))))
            .collect::<Result<Vec<_>>>()?;
        let one = Members::one(Arc::clone(&self.lora));
        let new_loss = loss(&one, std::slice::from_ref(&new));
        let (live_loss, slow_loss) = (loss(&members, &live), loss(&members, &slow));
        let judge =
            Gate { tolerance: self.settings.gate_tolerance, min_samples: self.settings.gate_min_samples };
        let mean = |s: super::held_out::Sum| s.mean().unwrap_or(f64::NAN);
        let verdict = judge.judge(slow_loss.mean(), live_loss.mean(), new_loss.mean(), new_loss.rows);
        done.loss_before = live_loss.mean();
        if gate && matches!(verdict, Verdict::KeepLive | Verdict::RollBack) {
            done.outcome = Outcome::Kept;
            done.loss_after = done.loss_before;
            done.quality_delta = 0.0;
            done.version = self.lora.version();
            done = done.note(format!(
                "refused: held-out loss {:.4e} against {:.4e} of the live and {:.4e} of the accepted weights",
                mean(new_loss),
                mean(live_loss),
                mean(slow_loss)
            ));
        } else {
            if verdict == Verdict::Unmeasured && gate {
                let (n, least) = (new_loss.rows, judge.min_samples);
                done = done.note(format!("not gated: {n} held-out samples, {least} are wanted"));
            }
            done.loss_after = new_loss.mean();
            done.quality_delta = mean(live_loss) - mean(new_loss);
            done.samples_used = samples_used;
            done.applied = true;
            let bytes = crate::format::to_bytes(&adapter.to_parts())?;
            done.version = self.serve_trained(back, new, Some((kind::DEEP, &bytes)))?;
        }
        done.latency_ns = started.elapsed().as_nanos() as u64;
        self.inner().stats.counts.turn(&done);
        Ok(done)
    }

    /// Serves learners with new factors; their rules know as much as the reservoir does.
    pub(super) fn serve_trained(
        &self,
        back: &mut Back,
        mut learners: Vec<Learner>,
        record: Option<(u8, &[u8])>,
    ) -> Result<u64> {
        let outs = self.outs();
        let mut accepted = Accepted::new(learners.clone());
        for (m, learner) in learners.iter_mut().enumerate() {
            let layer = Arc::clone(learner.master());
            let shape = Shape { module: m as u32, layer: &layer, outs: &outs };
            let mut rows = Gathered::new(&shape);
            let part = back.reservoir.part(false);
            part.iter().for_each(|e| rows.entry(&shape, &e));
            let rows = rows.finish(self.kernels, &shape, false).rows;
            let kept = rows.event.len().max(1) as f64;
            // The reservoir stands for all events that were offered to it.
            let stands_for = (part.seen() as f64 / part.len().max(1) as f64).max(1.0);
            let mut total = gram(&rows);
            let mean = (0..rows.rank).map(|i| total[i * rows.rank + i]).sum::<f64>() / kept;
            total.iter_mut().for_each(|g| *g *= stands_for);
            learner.basis_unit = (mean > 0.0).then_some(mean);
            let instant = &self.lora.settings().instant;
            if instant.rule != Rule::Nlms && mean > 0.0 {
                learner.rls = confident(&total, rows.rank, instant.rho * mean);
            }
            accepted.events[m] = (rows.event.len() as f64 * stands_for).round() as u64;
            accepted.grams[m] = total;
        }
        accepted.learners.clone_from(&learners);
        let one = Members::one(Arc::clone(&self.lora));
        let version = loop {
            {
                let mut inner = self.inner();
                inner.taken_through = Some(0);
                inner.overflowed = false;
            }
            // Events that leave a full window meanwhile have to be missed: the run was long, they are few.
            if let Some(version) = self.serve(&one, vec![learners.clone()], record)? {
                break version;
            }
        };
        accepted.quality = back.slow.iter().fold((0.0, 0), |(s, n), a| (s + a.quality.0, n + a.quality.1));
        back.slow = vec![accepted];
        back.warm = true;
        if self.settings.is_ensemble() {
            back.bank = PatternBank::new(back.bank.capacity(), back.bank.threshold(), back.bank.width())?;
        }
        self.answer_again(back);
        if let Err(e) = self.publish(back) {
            debug_assert!(false, "{e}");
        }
        Ok(version)
    }
}

/// RLS state that has seen inputs with this Gram matrix: `P = (ridge I + G)^-1`.
fn confident(gram: &[f64], rank: usize, ridge: f64) -> Option<Rls> {
    let g = DMatrix::from_row_slice(rank, rank, gram) + DMatrix::identity(rank, rank) * ridge;
    let p = g.cholesky()?.inverse();
    Some(Rls { p: p.iter().copied().collect(), ridge })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confidence_is_that_of_a_learner_that_saw_the_inputs() {
        let u = [[1.0f64, 2.0], [0.5, -1.0], [3.0, 0.25]];
        let mut gram = vec![0.0; 4];
        for u in &u {
            for i in 0..2 {
                for j in 0..2 {
                    gram[2 * i + j] += u[i] * u[j];
                }
            }
        }
        let rls = confident(&gram, 2, 0.5).unwrap();
        let mut p = vec![2.0, 0.0, 0.0, 2.0];
        let k = crate::kernels::Kernels::detect().unwrap();
        let (mut pu, mut gain) = (vec![0.0; 2], vec![0.0; 2]);
        for u in &u {
            k.rls_gain(&mut p, &u.map(|v| v as f32), 1.0, &mut pu, &mut gain);
        }
        for (a, b) in rls.p.iter().zip(&p) {
            assert!((a - b).abs() < 1e-9, "{:?} {p:?}", rls.p);
        }
    }
}
