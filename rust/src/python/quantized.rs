//! `QuantizedAdapter`: an adapter whose factors stay in blocks.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::adapter::PyAdapter;
use super::adapter_file::{LimitsTuple, PyAdapterFile, limits_of, orientation_of};
use super::calls;
use super::error::{ConfigError, DTypeError};
use crate::adapter::Adapter;
use crate::error::Error;
use crate::format::{self, LoadOptions};
use crate::kernels::Kernels;
use crate::low_rank::LowRank;
use crate::quant::{QuantAdapter, QuantLayer, Side, SideTypes};

/// An immutable quantised adapter.
#[pyclass(name = "QuantizedAdapter", module = "microlora._core", frozen, subclass)]
pub(super) struct PyQuantizedAdapter {
    inner: QuantAdapter,
    index: HashMap<String, usize>,
    kernels: &'static Kernels,
}

impl PyQuantizedAdapter {
    fn wrap(inner: QuantAdapter) -> crate::Result<Self> {
        let index = inner.modules.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect();
        Ok(PyQuantizedAdapter { inner, index, kernels: Kernels::detect()? })
    }

    fn find(&self, module: &str) -> crate::Result<usize> {
        match self.index.get(module) {
            Some(&i) => Ok(i),
            None => Err(self.inner.layer(module).err().unwrap_or_else(|| Error::non_finite("module"))),
        }
    }

    #[inline]
    fn at(&self, module: Option<&str>) -> PyResult<&std::sync::Arc<QuantLayer>> {
        let i = match module {
            Some(name) => self.find(name)?,
            None if self.inner.modules.len() == 1 => 0,
            None => {
                return Err(ConfigError::new_err(format!(
                    "module: missing, expected one of {} (only an adapter with one module may leave it out)",
                    self.modules().join(", ")
                )));
            }
        };
        Ok(&self.inner.modules[i].1)
    }

    /// As a file would hold it, without its numbers.
    pub fn loaded(&self) -> format::Loaded {
        let quantized = Some(self.inner.to_parts());
        format::Loaded { parts: self.inner.rest.clone(), quantized, ..format::Loaded::default() }
    }

    fn bytes(&self) -> crate::Result<Vec<u8>> {
        format::quantized_to_bytes(&self.inner.rest, &self.inner.to_parts())
    }
}

fn along(side: &Side) -> &'static str {
    match side {
        Side::Blocks(_) => "features",
        Side::BlocksAlongRank(_) => "rank",
        Side::Plain(_) => "",
    }
}

fn from_loaded(loaded: &format::Loaded) -> crate::Result<PyQuantizedAdapter> {
    let modules = loaded.quantized.as_deref().unwrap_or_default();
    PyQuantizedAdapter::wrap(QuantAdapter::from_parts(&loaded.parts, modules)?)
}

#[pymethods]
impl PyQuantizedAdapter {
    /// Wraps another quantised adapter (shared, not copied) or its bytes.
    #[new]
    fn new(source: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(other) = source.cast::<PyQuantizedAdapter>() {
            return Ok(Self::wrap(other.get().inner.clone())?);
        }
        let bytes = source.cast::<PyBytes>().map_err(|_| {
            let kind = source.get_type();
            DTypeError::new_err(format!("source: got {kind}, expected a QuantizedAdapter or its bytes"))
        })?;
        Ok(from_loaded(&format::quantized_from_bytes(bytes.as_bytes())?)?)
    }

    /// Quantises an adapter: `{module: (type of A, type of B)}`; `b_along_rank` lays the blocks of B as GGUF does.
    #[staticmethod]
    #[pyo3(signature = (adapter, types, b_along_rank = false))]
    fn quantize(
        py: Python<'_>,
        adapter: &PyAdapter,
        types: HashMap<String, (String, String)>,
        b_along_rank: bool,
    ) -> PyResult<Self> {
        let adapter = &adapter.inner;
        if let Some(name) = types.keys().find(|n| adapter.modules.iter().all(|(m, _)| m != *n)) {
            return Err(adapter.layer(name).map(|_| ()).unwrap_err().into());
        }
        let of = |module: &str| {
            let (a, b) = types.get(module).ok_or_else(|| {
                Error::config("types", format!("none for {module:?}"), "types of A and B for every module")
            })?;
            Ok(SideTypes { a: a.parse()?, b: b.parse()?, b_along_rank })
        };
        Ok(Self::wrap(py.detach(|| QuantAdapter::quantize(adapter, of))?)?)
    }

    /// The plain adapter: float32 where a factor was quantised.
    fn dequantize(&self, py: Python<'_>) -> PyResult<PyAdapter> {
        Ok(PyAdapter::from(py.detach(|| self.inner.dequantize())?))
    }

    /// The adapter as the bytes of a single safetensors file; the same content gives the same bytes.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.bytes()?))
    }

    /// Writes the single file through a temporary sibling and a rename.
    fn save_single(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| format::save_quantized(&path, &self.inner.rest, &self.inner.to_parts()))?)
    }

    /// ``dY(x)``; see `MicroLora.forward`.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let layer = self.at(module)?;
        calls::forward(py, &(self.kernels, layer), (layer.in_features(), layer.out_features()), x, out)
    }

    /// ``out += dY(x)``; see `MicroLora.forward_add`.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward_add<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let layer = self.at(module)?;
        calls::forward_add(py, &(self.kernels, layer), (layer.in_features(), layer.out_features()), x, out)
    }

    /// ``{module: dY(x)}`` of modules that read the same input; see `MicroLora.forward_all`.
    #[pyo3(signature = (x, modules = None))]
    fn forward_all<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        modules: Option<Vec<String>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let found = calls::shared(modules, |n| self.find(n), || self.modules().join(", "))?;
        let of: Vec<_> = found
            .into_iter()
            .map(|m| {
                let (name, layer) = &self.inner.modules[m];
                (name.as_str(), layer.clone())
            })
            .collect();
        calls::forward_all(py, self.kernels, &of, true, x)
    }

    /// Module names, in order.
    fn modules(&self) -> Vec<String> {
        self.inner.modules.iter().map(|(n, _)| n.clone()).collect()
    }

    /// `(in_features, out_features, rank, alpha, use_rslora, type of A, type of B)` of a module.
    fn describe(
        &self,
        module: &str,
    ) -> PyResult<(usize, usize, usize, f64, bool, &'static str, &'static str)> {
        let l = self.inner.layer(module)?;
        let (a, b) = (l.a.kind().as_str(), l.b.kind().as_str());
        Ok((l.in_features(), l.out_features(), l.rank(), l.alpha, l.rslora, a, b))
    }

    /// Which way the blocks of A and B lie: "features", "rank", or "" where there are none.
    fn along(&self, module: &str) -> PyResult<(&'static str, &'static str)> {
        let l = self.inner.layer(module)?;
        Ok((along(&l.a), along(&l.b)))
    }

    /// Numbers in all factors.
    #[getter]
    fn param_count(&self) -> usize {
        self.inner.param_count()
    }

    /// Bytes resident: blocks and plain factors as they lie in memory, and extra tensors.
    #[getter]
    fn memory_bytes(&self) -> usize {
        self.inner.memory_bytes()
    }

    /// Settings as JSON, or None.
    #[getter]
    fn config_json(&self) -> Option<&str> {
        self.inner.rest.config_json.as_deref()
    }

    /// Metadata as JSON, or None.
    #[getter]
    fn metadata_json(&self) -> Option<&str> {
        self.inner.rest.metadata_json.as_deref()
    }

    /// The same weights with other settings.
    #[pyo3(signature = (config_json, metadata_json))]
    fn with_json(&self, config_json: Option<String>, metadata_json: Option<String>) -> PyResult<Self> {
        let mut inner = self.inner.clone();
        (inner.rest.config_json, inner.rest.metadata_json) = (config_json, metadata_json);
        Ok(Self::wrap(inner)?)
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<PyQuantizedAdapter>().is_ok_and(|o| o.get().inner == self.inner)
    }

    fn __hash__(&self) -> PyResult<u64> {
        let mut h = DefaultHasher::new();
        self.bytes()?.hash(&mut h);
        Ok(h.finish())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((slf.get_type().into_any(), (slf.get().to_bytes(slf.py())?,)))
    }
}

/// An adapter of either kind.
#[derive(IntoPyObject)]
pub(super) enum AnyAdapter {
    Plain(PyAdapter),
    Quantized(PyQuantizedAdapter),
}

/// Reads any known format, quantised adapters included: the adapter, the names of unused tensors, and notes.
#[pyfunction]
#[pyo3(signature = (path, mmap, strict, limits=None, alpha=None, orientation=None, allow=None))]
#[allow(clippy::too_many_arguments)]
pub(super) fn load_any(
    py: Python<'_>,
    path: PathBuf,
    mmap: bool,
    strict: bool,
    limits: Option<LimitsTuple>,
    alpha: Option<f64>,
    orientation: Option<&str>,
    allow: Option<Vec<String>>,
) -> PyResult<(AnyAdapter, Vec<String>, Vec<String>)> {
    let orientation = orientation_of(orientation)?;
    let opts = LoadOptions { mmap, strict, limits: limits_of(limits), alpha, orientation, packed: true };
    let (value, loaded) = py.detach(|| {
        let loaded = format::read(&path, &opts)?;
        any_of(loaded, &path.display().to_string(), &allow.unwrap_or_default())
    })?;
    let notes = loaded.notes.iter().cloned().chain(loaded.block_note()).collect();
    Ok((value, loaded.unused, notes))
}

/// What a file's content runs as, and the rest of it.
fn any_of(
    loaded: format::Loaded,
    file: &str,
    allow: &[String],
) -> crate::Result<(AnyAdapter, format::Loaded)> {
    let loaded = loaded.runnable(file, allow)?;
    let value = match &loaded.quantized {
        Some(_) => AnyAdapter::Quantized(from_loaded(&loaded)?),
        None => AnyAdapter::Plain(PyAdapter::from(Adapter::from_parts(&loaded.parts)?)),
    };
    Ok((value, loaded))
}

/// The adapter of a GGUF file that was read, its blocks as they are.
#[pyfunction]
#[pyo3(signature = (file, allow=None))]
pub(super) fn gguf_adapter(
    py: Python<'_>,
    file: &PyAdapterFile,
    allow: Option<Vec<String>>,
) -> PyResult<AnyAdapter> {
    let of = || any_of(file.inner.clone(), &file.file, &allow.unwrap_or_default());
    Ok(py.detach(of)?.0)
}
