//! `StepResult` for Python.

use pyo3::prelude::*;

use crate::learn::StepResult;

/// A result as pickle holds it.
type Fields =
    ((String, Option<f32>, Option<f32>, f32, f32, f32), (u32, Option<f32>, bool, Option<String>, u64));

/// What one call of `instant` or `adapt` did.
#[pyclass(name = "StepResult", module = "microlora", frozen)]
pub(super) struct PyStepResult(pub StepResult);

#[pymethods]
impl PyStepResult {
    /// Which rule ran.
    #[getter]
    fn rule(&self) -> &str {
        &self.0.rule
    }
    /// Loss of this event before the step, in the units of its feedback; None for a bare gradient.
    #[getter]
    fn loss_before(&self) -> Option<f32> {
        self.0.loss_before
    }
    /// Loss of this event after the step; None for a bare gradient, or where nothing was applied.
    #[getter]
    fn loss_after(&self) -> Option<f32> {
        self.0.loss_after
    }
    /// Frobenius norm of dL/dA of this event; 0 where A is not trained.
    #[getter]
    fn grad_norm_a(&self) -> f32 {
        self.0.grad_norm_a
    }
    /// Frobenius norm of dL/dB of this event.
    #[getter]
    fn grad_norm_b(&self) -> f32 {
        self.0.grad_norm_b
    }
    /// Share of the output error that the step removes: ``u.k`` of RLS, ``eta |u|^2`` of NLMS.
    #[getter]
    fn step(&self) -> f32 {
        self.0.step
    }
    /// How often NLMS halved its step before the loss fell.
    #[getter]
    fn halvings(&self) -> u32 {
        self.0.halvings
    }
    /// Mean reward before this event; None for other feedback.
    #[getter]
    fn baseline(&self) -> Option<f32> {
        self.0.baseline
    }
    /// Whether weights (``instant``) or pending gradients (``adapt``) changed.
    #[getter]
    fn applied(&self) -> bool {
        self.0.applied
    }
    /// Why nothing was applied; None where something was.
    #[getter]
    fn reason(&self) -> Option<&str> {
        self.0.reason.as_deref()
    }
    /// Version of the learner after the step.
    #[getter]
    fn version(&self) -> u64 {
        self.0.version
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<PyStepResult>().is_ok_and(|o| o.get().0 == self.0)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Fields,))> {
        let r = &slf.get().0;
        let fields = (
            (r.rule.to_string(), r.loss_before, r.loss_after, r.grad_norm_a, r.grad_norm_b, r.step),
            (r.halvings, r.baseline, r.applied, r.reason.as_ref().map(ToString::to_string), r.version),
        );
        Ok((slf.get_type().getattr("_from_fields")?, (fields,)))
    }

    /// What pickling calls.
    #[staticmethod]
    fn _from_fields(fields: Fields) -> Self {
        let ((rule, loss_before, loss_after, grad_norm_a, grad_norm_b, step), rest) = fields;
        let (halvings, baseline, applied, reason, version) = rest;
        let (rule, reason) = (rule.into(), reason.map(Into::into));
        PyStepResult(StepResult {
            rule,
            loss_before,
            loss_after,
            grad_norm_a,
            grad_norm_b,
            step,
            halvings,
            baseline,
            applied,
            reason,
            version,
        })
    }

    fn __repr__(&self) -> String {
        let r = &self.0;
        let loss = |l: Option<f32>| l.map_or("None".into(), |l| format!("{l:.6}"));
        let reason = r.reason.as_ref().map_or(String::new(), |w| format!(", reason={w:?}"));
        format!(
            "StepResult(rule={:?}, applied={}, loss_before={}, loss_after={}, step={:.4}, version={}{reason})",
            r.rule,
            if r.applied { "True" } else { "False" },
            loss(r.loss_before),
            loss(r.loss_after),
            r.step,
            r.version
        )
    }
}
