//! What one learning step did.

use std::borrow::Cow;

/// Outcome of `adapt` or `instant`.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// Which rule ran: `rls`, `nlms` or `accumulate`.
    pub rule: Cow<'static, str>,
    /// Loss of this event before the step; `None` where feedback has no loss (a bare gradient).
    pub loss_before: Option<f32>,
    /// Loss of this event after the step; `None` as above, or where nothing was applied.
    pub loss_after: Option<f32>,
    /// Norm of dL/dA for this event.
    pub grad_norm_a: f32,
    /// Norm of dL/dB for this event.
    pub grad_norm_b: f32,
    /// Step size: the share of the error removed (RLS: `u.k`, NLMS: `eta |u|^2`).
    pub step: f32,
    /// Halvings of the line check.
    pub halvings: u32,
    /// Reward baseline before this event; `None` for other feedback.
    pub baseline: Option<f32>,
    /// Whether weights or accumulated gradients changed.
    pub applied: bool,
    /// Why nothing was applied.
    pub reason: Option<Cow<'static, str>>,
    /// Version of the learner after the step.
    pub version: u64,
}

impl StepResult {
    pub(crate) fn new(rule: &'static str) -> Self {
        StepResult {
            rule: rule.into(),
            loss_before: None,
            loss_after: None,
            grad_norm_a: 0.0,
            grad_norm_b: 0.0,
            step: 0.0,
            halvings: 0,
            baseline: None,
            applied: false,
            reason: None,
            version: 0,
        }
    }

    pub(crate) fn skipped(mut self, reason: &'static str) -> Self {
        self.applied = false;
        self.reason = Some(reason.into());
        self
    }
}
