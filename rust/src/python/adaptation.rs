//! `AdaptationResult` for Python.

use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::sona::Adaptation;

/// Result of one turn of a loop.
#[pyclass(name = "AdaptationResult", module = "microlora", frozen)]
pub(super) struct PyAdaptation(pub Adaptation);

#[pymethods]
impl PyAdaptation {
    /// Whether weights changed.
    #[getter]
    fn applied(&self) -> bool {
        self.0.applied
    }
    /// ``"instant"``, ``"background"`` or ``"deep"``.
    #[getter]
    fn loop_type(&self) -> &'static str {
        self.0.loop_type.as_str()
    }
    /// What it came to: ``"event"``, ``"accepted"``, ``"kept"``, ``"rolled_back"``, ``"goes_on"``,
    /// ``"cancelled"`` or ``"warmed_up"``.
    #[getter]
    fn outcome(&self) -> &'static str {
        self.0.outcome.as_str()
    }
    /// Time that it took in the core, microseconds.
    #[getter]
    fn latency_us(&self) -> f64 {
        self.0.latency_ns as f64 / 1e3
    }
    /// Loss before less loss after, measured: of the event, or of the held-out samples. NaN where there is none.
    #[getter]
    fn quality_delta(&self) -> f64 {
        self.0.quality_delta
    }
    /// That loss before; None where it was not measured.
    #[getter]
    fn loss_before(&self) -> Option<f64> {
        self.0.loss_before
    }
    /// That loss after.
    #[getter]
    fn loss_after(&self) -> Option<f64> {
        self.0.loss_after
    }
    /// Samples that it learned from.
    #[getter]
    fn samples_used(&self) -> usize {
        self.0.samples_used
    }
    /// What there is to say, and why something was skipped.
    #[getter]
    fn notes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.notes.iter().map(|n| n.as_ref()))
    }
    /// Number of the event; None where none was kept.
    #[getter]
    fn event(&self) -> Option<u64> {
        self.0.event
    }
    /// Version of the live learner afterwards.
    #[getter]
    fn version(&self) -> u64 {
        self.0.version
    }

    fn __repr__(&self) -> String {
        let a = &self.0;
        let notes = if a.notes.is_empty() { String::new() } else { format!(", notes={:?}", a.notes) };
        format!(
            "AdaptationResult({}, {}, applied={}, quality_delta={:.4e}, samples_used={}, latency_us={:.1}{notes})",
            a.loop_type.as_str(),
            a.outcome.as_str(),
            if a.applied { "True" } else { "False" },
            a.quality_delta,
            a.samples_used,
            self.latency_us()
        )
    }
}
