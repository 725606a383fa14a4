//! What one turn of a loop did.

use std::borrow::Cow;

/// Which of the three loops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// One event.
    Instant,
    /// A consolidation.
    Background,
    /// A training run.
    Deep,
}

impl Loop {
    /// The public name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Loop::Instant => "instant",
            Loop::Background => "background",
            Loop::Deep => "deep",
        }
    }
}

/// What a consolidation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The candidate serves.
    Accepted,
    /// The candidate was refused, the live weights passed the gate by themselves.
    Kept,
    /// The candidate and the live weights were refused: the last accepted weights serve again.
    RolledBack,
    /// Work is left for the next call.
    GoesOn,
    /// Given up, because its window no longer fits what came meanwhile.
    Cancelled,
    /// A was chosen from the first inputs.
    WarmedUp,
    /// Nothing of these: an instant event.
    Event,
}

impl Outcome {
    /// The public name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Accepted => "accepted",
            Outcome::Kept => "kept",
            Outcome::RolledBack => "rolled_back",
            Outcome::GoesOn => "goes_on",
            Outcome::Cancelled => "cancelled",
            Outcome::WarmedUp => "warmed_up",
            Outcome::Event => "event",
        }
    }
}

/// Result of one turn.
#[derive(Clone, Debug)]
pub struct Adaptation {
    /// Whether weights changed by it.
    pub applied: bool,
    /// Which loop.
    pub loop_type: Loop,
    /// What a consolidation came to.
    pub outcome: Outcome,
    /// Time that it took, nanoseconds.
    pub latency_ns: u64,
    /// Loss before less loss after: of the event, or of the held-out samples. NaN where not measured.
    pub quality_delta: f64,
    /// Loss before.
    pub loss_before: Option<f64>,
    /// Loss after.
    pub loss_after: Option<f64>,
    /// Samples that it learned from.
    pub samples_used: usize,
    /// Whether it was let through without a judgement, for want of held-out samples.
    pub ungated: bool,
    /// What there is to say, and why something was skipped.
    pub notes: Vec<Cow<'static, str>>,
    /// Number of the event.
    pub event: Option<u64>,
    /// Version of the live learner afterwards.
    pub version: u64,
}

impl Adaptation {
    pub(crate) fn new(loop_type: Loop, outcome: Outcome) -> Self {
        Adaptation {
            applied: false,
            loop_type,
            outcome,
            latency_ns: 0,
            quality_delta: f64::NAN,
            loss_before: None,
            loss_after: None,
            samples_used: 0,
            ungated: false,
            notes: Vec::new(),
            event: None,
            version: 0,
        }
    }

    pub(crate) fn note(mut self, text: impl Into<Cow<'static, str>>) -> Self {
        self.notes.push(text.into());
        self
    }
}
