//! A module of a learner, found once: calls skip the name lookup.

use std::sync::Arc;

use pyo3::prelude::*;

use super::adapter::{factor_array, raw_pair};
use super::calls;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::micro_lora::MicroLora;

/// One module of a `MicroLoRA`.
#[pyclass(module = "microlora", frozen)]
pub(super) struct ModuleHandle {
    lora: Arc<MicroLora>,
    module: usize,
    shape: (usize, usize),
}

impl ModuleHandle {
    pub(super) fn new(lora: &Arc<MicroLora>, module: usize) -> Self {
        ModuleHandle { lora: Arc::clone(lora), module, shape: lora.shape(module) }
    }

    fn layer(&self) -> Arc<Layer> {
        self.lora.layer(self.module).0
    }

    /// Runs a measurement on the present weights.
    pub(super) fn probe<R>(&self, f: impl FnOnce(&Kernels, &Layer) -> R) -> R {
        f(self.lora.kernels(), &self.layer())
    }
}

#[pymethods]
impl ModuleHandle {
    /// ``dY(x)``; see `MicroLora.forward`, without the lookup of a name.
    #[pyo3(signature = (x, out = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        calls::forward(py, &(&*self.lora, self.module), self.shape, x, out)
    }

    /// ``out += dY(x)``; see `MicroLora.forward_add`.
    #[pyo3(signature = (x, out))]
    fn forward_add<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
    ) -> PyResult<()> {
        calls::forward_add(py, &(&*self.lora, self.module), self.shape, x, Some(out))
    }

    /// float32 (out_features, in_features): the change of the weight, ``s (A B)^T``, a new array.
    fn delta_weight<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        calls::delta_weight(py, self.lora.kernels(), &self.layer())
    }

    /// Name of the module.
    #[getter]
    fn name(&self) -> &str {
        &self.lora.names()[self.module]
    }

    /// A as float32 (rank, in_features), C-contiguous, a read-only copy.
    #[getter]
    fn lora_a<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        factor_array(py, &self.layer().a, false)
    }

    /// B as float32 (out_features, rank), C-contiguous, a read-only copy.
    #[getter]
    fn lora_b<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        factor_array(py, &self.layer().b, true)
    }

    /// Stored bits of A (rank, in_features) and B (out_features, rank); bf16 comes as uint16.
    fn raw<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        raw_pair(py, &self.layer())
    }

    /// Rank r of the update.
    #[getter]
    fn rank(&self) -> usize {
        self.layer().rank()
    }

    /// Numerator of the scaling.
    #[getter]
    fn alpha(&self) -> f64 {
        self.layer().alpha
    }

    /// ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA (arXiv 2312.03732).
    #[getter]
    fn scaling(&self) -> f32 {
        self.layer().scaling()
    }

    /// Width of x.
    #[getter]
    fn in_features(&self) -> usize {
        self.shape.0
    }

    /// Width of the output.
    #[getter]
    fn out_features(&self) -> usize {
        self.shape.1
    }

    /// Storage dtype of A.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.layer().a.dtype().as_str()
    }

    /// Events of ``adapt`` that wait for ``apply_updates``.
    #[getter]
    fn pending(&self) -> u64 {
        self.lora.pending(self.module)
    }

    /// Ridge constant that this module's RLS started from; None before its first event.
    #[getter]
    fn ridge(&self) -> Option<f64> {
        self.lora.ridge(self.module)
    }

    fn __repr__(&self) -> String {
        let l = self.layer();
        format!(
            "ModuleHandle({:?}, {} -> {}, rank={}, scaling={})",
            self.name(),
            self.shape.0,
            self.shape.1,
            l.rank(),
            l.scaling()
        )
    }
}
