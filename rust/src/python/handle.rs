//! A module of a learner, found once: calls skip the name lookup.

use std::sync::Arc;

use pyo3::prelude::*;

use super::adapter::{factor_array, raw_pair};
use super::array::read_only;
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
    #[pyo3(signature = (x, out = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        calls::forward(py, &self.lora, self.module, self.shape, x, out)
    }

    #[pyo3(signature = (x, out))]
    fn forward_add<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
    ) -> PyResult<()> {
        calls::forward_add(py, &self.lora, self.module, self.shape, x, Some(out))
    }

    fn delta_weight<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let (layer, k) = (self.layer(), self.lora.kernels());
        let delta = py.detach(|| layer.delta_weight(k));
        let array = read_only(py, delta, &[layer.out_features(), layer.in_features()])?;
        array.call_method1("setflags", (true,))?;
        Ok(array)
    }

    #[getter]
    fn name(&self) -> &str {
        &self.lora.names()[self.module]
    }

    #[getter]
    fn lora_a<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        factor_array(py, &self.layer().a, false)
    }

    #[getter]
    fn lora_b<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        factor_array(py, &self.layer().b, true)
    }

    fn raw<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        raw_pair(py, &self.layer())
    }

    #[getter]
    fn rank(&self) -> usize {
        self.layer().rank()
    }

    #[getter]
    fn alpha(&self) -> f64 {
        self.layer().alpha
    }

    #[getter]
    fn scaling(&self) -> f32 {
        self.layer().scaling()
    }

    #[getter]
    fn in_features(&self) -> usize {
        self.shape.0
    }

    #[getter]
    fn out_features(&self) -> usize {
        self.shape.1
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.layer().a.dtype().as_str()
    }

    #[getter]
    fn pending(&self) -> u64 {
        self.lora.pending(self.module)
    }

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
