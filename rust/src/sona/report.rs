//! What the loops have counted and measured, as a value.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::Sona;
use crate::learn::Learner;

/// Everything there is to know of the loops from outside; times in microseconds, of the core's own work.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Events that came.
    pub instant_count: u64,
    /// Events that changed weights.
    pub instant_applied: u64,
    /// Events that did not, by reason.
    pub skipped: BTreeMap<String, u64>,
    /// Mean time of an event.
    pub instant_avg_latency_us: Option<f64>,
    /// Median.
    pub instant_p50_us: Option<f64>,
    /// 99th percentile.
    pub instant_p99_us: Option<f64>,
    /// 99.9th percentile.
    pub instant_p999_us: Option<f64>,
    /// Steps of NLMS.
    pub nlms_steps: u64,
    /// Of them, those that were halved before their loss fell.
    pub nlms_halvings: u64,
    /// Events of which no step lowered the loss.
    pub refused_steps: u64,
    /// Consolidations that came to an end.
    pub background_count: u64,
    /// Mean time of a turn.
    pub background_avg_latency_us: Option<f64>,
    /// 99th percentile of it.
    pub background_p99_us: Option<f64>,
    /// Consolidations that are served.
    pub accepted: u64,
    /// Those that the gate refused.
    pub refused: u64,
    /// Of them, those where the live weights stayed as they were.
    pub kept: u64,
    /// Of them, those where the last accepted weights came back.
    pub rolled_back: u64,
    /// Refused ones since the last that was accepted.
    pub refused_in_a_row: u64,
    /// Consolidations kept without a judgement.
    pub unmeasured: u64,
    /// Consolidations that were given up.
    pub cancelled: u64,
    /// Deep runs that came to an end.
    pub deep_count: u64,
    /// Of them, those that the gate refused.
    pub deep_refused: u64,
    /// Events in the window.
    pub pending_samples: usize,
    /// Events that left it unconsolidated.
    pub overflowed_samples: u64,
    /// Sum of qualities since the last deep run; an event without one counts 1.
    pub accumulated_quality: f64,
    /// Events that had a quality, and their mean, least and most.
    pub quality_count: u64,
    /// Mean.
    pub quality_mean: Option<f64>,
    /// Least.
    pub quality_min: Option<f64>,
    /// Most.
    pub quality_max: Option<f64>,
    /// Samples to train on.
    pub reservoir_samples: usize,
    /// Samples of the gate.
    pub held_out_samples: usize,
    /// Patterns of inputs.
    pub patterns: usize,
    /// Members that serve.
    pub members: usize,
    /// Held-out loss of the first consolidation that measured it.
    pub heldout_loss_first: Option<f64>,
    /// Of the last.
    pub heldout_loss_last: Option<f64>,
    /// The least of all.
    pub heldout_loss_least: Option<f64>,
    /// Moving average of losses before events were learned from.
    pub prequential_loss: Option<f64>,
    /// Their mean over the first events.
    pub prequential_loss_first: Option<f64>,
    /// Whether A was chosen from inputs, or need not be.
    pub warmed_up: bool,
    /// Inputs that the warm-up still waits for.
    pub warmup_left: usize,
    /// Whether a consolidation waits for its next turn.
    pub consolidating: bool,
    /// Version of the live weights.
    pub version: u64,
    /// Number of the version that the manager serves.
    pub generation: u64,
    /// Number of the last event.
    pub events: u64,
    /// Bytes on disk of the journal.
    pub journal_bytes: u64,
    /// Resident bytes by part.
    pub bytes: BTreeMap<&'static str, usize>,
}

impl Sona {
    /// Counts, times and sizes.
    pub fn report(&self) -> Report {
        let _inside = self.gate.enter();
        let members = self.members.load_full();
        let mut r = Report {
            members: members.loras.len(),
            version: members.loras.iter().map(|l| l.version()).max().unwrap_or(0),
            generation: self.hot.generation(),
            ..Report::default()
        };
        r.bytes.insert("adapter", members.loras.iter().map(|l| l.memory_bytes()).sum());
        {
            let back = self.back();
            let (train, held) = (back.reservoir.part(false), back.reservoir.part(true));
            (r.reservoir_samples, r.held_out_samples) = (train.len(), held.len());
            r.patterns = back.bank.len();
            (r.warmed_up, r.consolidating) = (back.warm, back.task.is_some());
            let served: Vec<_> = members.loras.iter().flat_map(|l| l.masters()).collect();
            // What is accepted and served still is held once.
            let apart = |l: &&Learner| !served.iter().any(|s| Arc::ptr_eq(&s.b, &l.master().b));
            let learners = back.slow.iter().flat_map(|a| &a.learners);
            let grams: usize = back.slow.iter().flat_map(|a| &a.grams).map(|g| 8 * g.len()).sum();
            let slow = learners.filter(apart).map(Learner::memory_bytes).sum::<usize>() + grams;
            r.bytes.insert("accepted", slow);
            r.bytes.insert("reservoir", back.reservoir.memory_bytes());
            r.bytes.insert("patterns", back.bank.memory_bytes());
        }
        let inner = self.inner();
        let c = &inner.stats.counts;
        let (instant, background) = inner.stats.times();
        let measured = |n: u64, v: f64| (n > 0).then_some(v);
        r.instant_count = c.instant;
        r.instant_applied = c.applied;
        r.skipped = c.skipped.iter().cloned().collect();
        if c.held_out > 0 {
            r.skipped.insert("held out".into(), c.held_out);
        }
        r.instant_avg_latency_us = measured(instant.count, instant.mean_us);
        r.instant_p50_us = measured(instant.count, instant.p50_us);
        r.instant_p99_us = measured(instant.count, instant.p99_us);
        r.instant_p999_us = measured(instant.count, instant.p999_us);
        (r.nlms_halvings, r.nlms_steps) = c.halved;
        r.refused_steps = c.refused_steps;
        r.background_count = c.background;
        r.background_avg_latency_us = measured(background.count, background.mean_us);
        r.background_p99_us = measured(background.count, background.p99_us);
        (r.accepted, r.refused, r.rolled_back) = (c.accepted, c.kept + c.rolled_back, c.rolled_back);
        r.kept = c.kept;
        (r.refused_in_a_row, r.unmeasured, r.cancelled) = (c.refused_in_a_row, c.unmeasured, c.cancelled);
        (r.deep_count, r.deep_refused) = (c.deep, c.deep_refused);
        r.pending_samples = inner.window.len();
        r.overflowed_samples = c.dropped;
        r.accumulated_quality = c.accumulated_quality;
        let (n, sum, least, most) = c.qualities;
        r.quality_count = n;
        r.quality_mean = measured(n, sum / n as f64);
        (r.quality_min, r.quality_max) = (measured(n, least), measured(n, most));
        (r.heldout_loss_first, r.heldout_loss_last, r.heldout_loss_least) = c.held_out_loss;
        r.prequential_loss = measured(c.prequential.0, c.prequential.1);
        r.prequential_loss_first = measured(c.first_prequential.0, c.first_prequential.1);
        if !r.warmed_up {
            r.warmup_left = self.settings.warmup_inputs.saturating_sub(inner.window.trainable());
        }
        r.journal_bytes = inner.recorder.as_ref().map_or(0, |r| r.journal.bytes());
        r.events = inner.next - 1;
        r.bytes.insert("window", inner.window.memory_bytes());
        r.bytes.insert("statistics", inner.stats.memory_bytes());
        r
    }

    /// Resident bytes of all parts.
    pub fn memory_bytes(&self) -> usize {
        self.report().bytes.values().sum()
    }
}
