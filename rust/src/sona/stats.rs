//! What the loops count and time.

use std::borrow::Cow;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::result::{Adaptation, Loop, Outcome};

/// Longest time that is told apart, nanoseconds.
const LONGEST: u64 = 60_000_000_000;

/// Times with two significant digits.
#[derive(Debug)]
pub(super) struct Times(Histogram<u32>);

impl Times {
    pub fn new() -> Self {
        Times(Histogram::new_with_bounds(1, LONGEST, 2).expect("the bounds are in order"))
    }

    #[inline]
    pub fn add(&mut self, ns: u64) {
        self.0.saturating_record(ns.clamp(1, LONGEST));
    }

    pub fn memory_bytes(&self) -> usize {
        4 * self.0.distinct_values()
    }

    /// Count, mean and quantiles in microseconds.
    fn summary(&self) -> Summary {
        let us = |ns: f64| ns / 1e3;
        let at = |q: f64| us(self.0.value_at_quantile(q) as f64);
        Summary {
            count: self.0.len(),
            mean_us: us(self.0.mean()),
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: us(self.0.max() as f64),
        }
    }
}

/// Times of one loop, microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    /// Turns.
    pub count: u64,
    /// Mean.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// Longest.
    pub max_us: f64,
}

/// Counts that survive a restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub instant: u64,
    pub applied: u64,
    pub refused_steps: u64,
    pub held_out: u64,
    pub background: u64,
    pub accepted: u64,
    pub kept: u64,
    pub rolled_back: u64,
    pub cancelled: u64,
    pub unmeasured: u64,
    pub deep: u64,
    pub deep_refused: u64,
    pub dropped: u64,
    pub clamped_clock: u64,
    /// Events passed over, by reason.
    pub skipped: Vec<(String, u64)>,
    /// Sum of qualities since the last deep run.
    pub accumulated_quality: f64,
    /// Of all events that had a quality: how many, sum, least, most.
    pub qualities: (u64, f64, f64, f64),
    /// Moving average of the loss of events before they were learned from, and how many there were.
    pub prequential: (u64, f64),
    /// The same over the first events.
    pub first_prequential: (u64, f64),
    /// Held-out losses: of the first accepted state, of the last, and the least.
    pub held_out_loss: (Option<f64>, Option<f64>, Option<f64>),
    /// Steps of NLMS that had to be halved, and all NLMS steps.
    pub halved: (u64, u64),
    /// Refusals since the last acceptance.
    pub refused_in_a_row: u64,
}

/// Rate of the moving average of losses.
const PREQUENTIAL_RATE: f64 = 0.02;
/// Events that make up the first average.
const FIRST: u64 = 50;

impl Counts {
    pub fn skip(&mut self, reason: &str) {
        match self.skipped.iter_mut().find(|(r, _)| r == reason) {
            Some((_, n)) => *n += 1,
            None => self.skipped.push((reason.to_string(), 1)),
        }
    }

    /// The quality of an event that came, and whether it was kept.
    pub fn quality(&mut self, quality: Option<f32>, kept: bool) {
        if kept {
            self.accumulated_quality += quality.map_or(1.0, f64::from);
        }
        let Some(q) = quality.map(f64::from) else { return };
        let (n, sum, least, most) = &mut self.qualities;
        (*least, *most) = if *n == 0 { (q, q) } else { (least.min(q), most.max(q)) };
        *n += 1;
        *sum += q;
    }

    pub fn loss(&mut self, loss: f64) {
        let mean = |(n, value): &mut (u64, f64), rate: f64| {
            *n += 1;
            *value += rate.max(1.0 / *n as f64) * (loss - *value);
        };
        mean(&mut self.prequential, PREQUENTIAL_RATE);
        if self.first_prequential.0 < FIRST {
            mean(&mut self.first_prequential, 0.0);
        }
    }

    /// Counts what a consolidation or a deep run came to.
    pub fn turn(&mut self, a: &Adaptation) {
        match a.outcome {
            Outcome::GoesOn | Outcome::Event | Outcome::WarmedUp | Outcome::Cancelled => return,
            Outcome::Accepted | Outcome::Kept | Outcome::RolledBack if a.loop_type == Loop::Deep => {
                self.deep += 1;
                self.deep_refused += u64::from(a.outcome != Outcome::Accepted);
                if a.outcome == Outcome::Accepted {
                    self.accumulated_quality = 0.0;
                }
            }
            Outcome::Accepted | Outcome::Kept | Outcome::RolledBack => {
                self.background += 1;
                self.unmeasured += u64::from(a.ungated);
                match a.outcome {
                    Outcome::Accepted => self.accepted += 1,
                    Outcome::Kept => self.kept += 1,
                    _ => self.rolled_back += 1,
                }
                self.refused_in_a_row =
                    if a.outcome == Outcome::Accepted { 0 } else { self.refused_in_a_row + 1 };
            }
        }
        if let Some(loss) = a.loss_after {
            let (first, last, least) = &mut self.held_out_loss;
            first.get_or_insert(loss);
            *last = Some(loss);
            *least = Some(least.map_or(loss, |l| l.min(loss)));
        }
    }
}

/// Everything that is counted.
#[derive(Debug)]
pub(super) struct Stats {
    pub counts: Counts,
    pub instant: Times,
    pub background: Times,
}

impl Stats {
    pub fn new() -> Self {
        Stats { counts: Counts::default(), instant: Times::new(), background: Times::new() }
    }

    pub fn memory_bytes(&self) -> usize {
        self.instant.memory_bytes() + self.background.memory_bytes()
    }

    pub fn times(&self) -> (Summary, Summary) {
        (self.instant.summary(), self.background.summary())
    }
}

/// Why an event was not learned from.
pub(super) const UNDER_THRESHOLD: Cow<'static, str> = Cow::Borrowed("quality is under quality_threshold");
pub(super) const HELD_OUT: Cow<'static, str> =
    Cow::Borrowed("held out: kept for the gate, no loop trains on it (holdout)");
