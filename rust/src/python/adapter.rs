//! `Adapter` and `Snapshot`: values over the core's own.

use std::hash::{DefaultHasher, Hash, Hasher};

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::array::read_only;
use super::error::DTypeError;
use crate::adapter::Adapter;
use crate::dtype::Dtype;
use crate::factor::Factor;
use crate::layer::Layer;
use crate::snapshot::Snapshot;

/// An immutable adapter.
#[pyclass(name = "Adapter", module = "microlora._core", frozen, subclass)]
pub(super) struct PyAdapter {
    pub inner: Adapter,
}

impl From<Adapter> for PyAdapter {
    fn from(inner: Adapter) -> Self {
        PyAdapter { inner }
    }
}

/// `lora_a` (rank, in) or `lora_b` (out, rank), read-only float32.
pub(super) fn factor_array<'py>(
    py: Python<'py>,
    f: &Factor,
    transposed: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let shape = if transposed { [f.len(), f.rank()] } else { [f.rank(), f.len()] };
    read_only(py, f.to_f32(transposed), &shape)
}

/// The stored bits: float32, float16, or uint16 for bfloat16.
fn raw_array<'py>(py: Python<'py>, f: &Factor, transposed: bool) -> PyResult<Bound<'py, PyAny>> {
    let shape = if transposed { [f.len(), f.rank()] } else { [f.rank(), f.len()] };
    let dtype = match f.dtype() {
        Dtype::F32 => "<f4",
        Dtype::F16 => "<f2",
        Dtype::Bf16 => "<u2",
    };
    let bytes: Bound<'_, PyArray1<u8>> = f.to_bits(transposed).into_pyarray(py);
    let array = bytes.call_method1("view", (dtype,))?.call_method1("reshape", (shape.to_vec(),))?;
    array.call_method1("setflags", (false,))?;
    Ok(array)
}

/// Both factors' stored bits in PEFT's shapes.
pub(super) fn raw_pair<'py>(
    py: Python<'py>,
    layer: &Layer,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    Ok((raw_array(py, &layer.a, false)?, raw_array(py, &layer.b, true)?))
}

#[pymethods]
impl PyAdapter {
    /// Wraps another adapter (shared, not copied) or our single-file bytes.
    #[new]
    fn new(source: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(other) = source.cast::<PyAdapter>() {
            return Ok(PyAdapter { inner: other.get().inner.clone() });
        }
        let bytes = source.cast::<PyBytes>().map_err(|_| {
            DTypeError::new_err(format!(
                "source: got {}, expected an Adapter or its bytes",
                source.get_type()
            ))
        })?;
        let parts = crate::format::from_bytes(bytes.as_bytes(), true)?.parts;
        Ok(PyAdapter { inner: Adapter::from_parts(&parts)? })
    }

    /// The adapter as the bytes of a single safetensors file; the same content gives the same bytes.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &crate::format::to_bytes(&self.inner.to_parts())?))
    }

    /// Module names, in order.
    fn modules(&self) -> Vec<String> {
        self.inner.modules.iter().map(|(n, _)| n.clone()).collect()
    }

    /// `(in_features, out_features, rank, alpha, use_rslora, dtype of A, dtype of B)` of a module.
    fn describe(
        &self,
        module: &str,
    ) -> PyResult<(usize, usize, usize, f64, bool, &'static str, &'static str)> {
        let l = self.inner.layer(module)?;
        let (a, b) = (l.a.dtype().as_str(), l.b.dtype().as_str());
        Ok((l.in_features(), l.out_features(), l.rank(), l.alpha, l.rslora, a, b))
    }

    /// A of a module: float32 (rank, in_features), C-contiguous, a read-only copy.
    fn lora_a<'py>(&self, py: Python<'py>, module: &str) -> PyResult<Bound<'py, PyAny>> {
        factor_array(py, &self.inner.layer(module)?.a, false)
    }

    /// B of a module: float32 (out_features, rank), C-contiguous, a read-only copy.
    fn lora_b<'py>(&self, py: Python<'py>, module: &str) -> PyResult<Bound<'py, PyAny>> {
        factor_array(py, &self.inner.layer(module)?.b, true)
    }

    /// Stored bits of A (rank, in_features) and B (out_features, rank); bf16 comes as uint16.
    fn raw<'py>(&self, py: Python<'py>, module: &str) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        raw_pair(py, self.inner.layer(module)?)
    }

    /// Numbers in all factors.
    #[getter]
    fn param_count(&self) -> usize {
        self.inner.param_count()
    }

    /// Bytes resident: factors as they lie in memory (rows padded to 16 numbers), and extra tensors.
    #[getter]
    fn memory_bytes(&self) -> usize {
        self.inner.memory_bytes()
    }

    /// Settings as JSON, or None where the file carried none.
    #[getter]
    fn config_json(&self) -> Option<&str> {
        self.inner.config_json.as_deref()
    }

    /// Metadata as JSON, or None where the file carried none.
    #[getter]
    fn metadata_json(&self) -> Option<&str> {
        self.inner.metadata_json.as_deref()
    }

    /// The text of the ``adapter_config.json`` it was read from, or None.
    #[getter]
    fn peft_config(&self) -> Option<&str> {
        self.inner.peft_config.as_deref()
    }

    /// Name to `(dtype, shape)` of every tensor that is not a factor.
    fn extra_tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        for t in &self.inner.extra {
            out.set_item(&t.name, (t.dtype.to_string(), t.shape.clone()))?;
        }
        Ok(out)
    }

    /// Bytes of one extra tensor.
    fn extra_bytes<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let found = self.inner.extra.iter().find(|t| t.name == name);
        let t = found.ok_or_else(|| {
            crate::adapter::unknown_module(name, self.inner.extra.iter().map(|t| t.name.as_str()))
        })?;
        Ok(PyBytes::new(py, &t.data))
    }

    /// The same weights with other settings.
    #[pyo3(signature = (config_json, metadata_json))]
    fn with_json(&self, config_json: Option<String>, metadata_json: Option<String>) -> PyAdapter {
        PyAdapter { inner: Adapter { config_json, metadata_json, ..self.inner.clone() } }
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<PyAdapter>().is_ok_and(|o| o.get().inner == self.inner)
    }

    fn __hash__(&self) -> PyResult<u64> {
        let mut h = DefaultHasher::new();
        crate::format::to_bytes(&self.inner.to_parts())?.hash(&mut h);
        Ok(h.finish())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((slf.get_type().into_any(), (slf.get().to_bytes(slf.py())?,)))
    }
}

/// An adapter with what its learner remembered.
#[pyclass(name = "Snapshot", module = "microlora._core", frozen, subclass, extends = PyAdapter)]
pub(super) struct PySnapshot {
    pub inner: Snapshot,
}

#[pymethods]
impl PySnapshot {
    /// Wraps another snapshot (shared, not copied) or its bytes.
    #[new]
    fn new(source: &Bound<'_, PyAny>) -> PyResult<PyClassInitializer<Self>> {
        let inner = match source.cast::<PySnapshot>() {
            Ok(other) => other.get().inner.clone(),
            Err(_) => {
                let bytes = source.cast::<PyBytes>().map_err(|_| {
                    DTypeError::new_err(format!(
                        "source: got {}, expected a Snapshot or its bytes",
                        source.get_type()
                    ))
                })?;
                Snapshot::from_bytes(bytes.as_bytes())?
            }
        };
        let adapter = PyAdapter { inner: inner.adapter.clone() };
        Ok(PyClassInitializer::from(adapter).add_subclass(PySnapshot { inner }))
    }

    /// Weights and learner state as bytes; the constructor takes them back.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.inner.to_bytes()?))
    }

    /// Version of the learner when the snapshot was taken.
    #[getter]
    fn version(&self) -> u64 {
        self.inner.version
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> PyResult<bool> {
        match other.cast::<PySnapshot>() {
            Ok(o) => Ok(o.get().inner.to_bytes()? == self.inner.to_bytes()?),
            Err(_) => Ok(false),
        }
    }

    fn __hash__(&self) -> PyResult<u64> {
        let mut h = DefaultHasher::new();
        self.inner.to_bytes()?.hash(&mut h);
        Ok(h.finish())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((slf.get_type().into_any(), (slf.get().to_bytes(slf.py())?,)))
    }
}
