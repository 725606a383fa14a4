//! The gate: a candidate is kept only where samples that nothing was trained on say so.

/// Losses below this are the rounding of outputs of unit length in f32, and are not compared.
pub const EPSILON: f64 = 1e-12;

/// When a candidate is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gate {
    /// Relative rise of the held-out loss that is still accepted.
    pub tolerance: f64,
    /// Fewest held-out samples that count as a measurement.
    pub min_samples: usize,
}

/// What the gate says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The candidate becomes live and slow.
    Accept,
    /// The candidate is refused; the live weights are no worse than slow and stay.
    KeepLive,
    /// The candidate is refused and the live weights are worse than slow: live goes back to slow.
    RollBack,
    /// Too few held-out samples, or none with a loss.
    Unmeasured,
}

impl Gate {
    /// Judges mean held-out losses over `n` samples, as [`mean_loss`](super::mean_loss) gives them.
    ///
    /// Before is the lesser of slow and live where finite. The candidate passes at most at
    /// `before * (1 + tolerance) + EPSILON`; live passes against slow in the same way. A loss that is not finite
    /// passes against nothing; without a finite loss before, any finite candidate passes.
    pub fn judge(&self, slow: Option<f64>, live: Option<f64>, candidate: Option<f64>, n: usize) -> Verdict {
        let (Some(candidate), true) = (candidate, n >= self.min_samples) else { return Verdict::Unmeasured };
        let finite = |v: Option<f64>| v.filter(|v| v.is_finite());
        let (slow, live) = (finite(slow), finite(live));
        let passes = |after: f64, before: Option<f64>| {
            let most = before.map_or(f64::INFINITY, |b| b * (1.0 + self.tolerance) + EPSILON);
            after.is_finite() && after <= most
        };
        let before = match (slow, live) {
            (Some(slow), Some(live)) => Some(slow.min(live)),
            (one, other) => one.or(other),
        };
        if passes(candidate, before) {
            Verdict::Accept
        } else if live.is_some_and(|live| passes(live, slow)) {
            Verdict::KeepLive
        } else {
            Verdict::RollBack
        }
    }
}
