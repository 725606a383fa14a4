//! `StepResult` for Python.

use pyo3::prelude::*;

use crate::learn::StepResult;

#[pyclass(name = "StepResult", module = "microlora", frozen)]
pub(super) struct PyStepResult(pub StepResult);

#[pymethods]
impl PyStepResult {
    #[getter]
    fn rule(&self) -> &'static str {
        self.0.rule
    }
    #[getter]
    fn loss_before(&self) -> Option<f32> {
        self.0.loss_before
    }
    #[getter]
    fn loss_after(&self) -> Option<f32> {
        self.0.loss_after
    }
    #[getter]
    fn grad_norm_a(&self) -> f32 {
        self.0.grad_norm_a
    }
    #[getter]
    fn grad_norm_b(&self) -> f32 {
        self.0.grad_norm_b
    }
    #[getter]
    fn step(&self) -> f32 {
        self.0.step
    }
    #[getter]
    fn halvings(&self) -> u32 {
        self.0.halvings
    }
    #[getter]
    fn baseline(&self) -> Option<f32> {
        self.0.baseline
    }
    #[getter]
    fn applied(&self) -> bool {
        self.0.applied
    }
    #[getter]
    fn reason(&self) -> Option<&'static str> {
        self.0.reason
    }
    #[getter]
    fn version(&self) -> u64 {
        self.0.version
    }

    fn __repr__(&self) -> String {
        let r = &self.0;
        let loss = |l: Option<f32>| l.map_or("None".into(), |l| format!("{l:.6}"));
        let reason = r.reason.map_or(String::new(), |w| format!(", reason={w:?}"));
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
