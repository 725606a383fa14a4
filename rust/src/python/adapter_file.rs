//! `AdapterFile`: all that a file holds, whether it is run here or not.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::adapter::PyAdapter;
use super::quantized::PyQuantizedAdapter;
use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::format::{
    self, AdapterParts, Limits, LoadOptions, Loaded, ModuleKind, ModuleParts, Orientation, PeftOptions,
    Tensor, TensorDtype,
};

/// A file's content, immutable.
#[pyclass(name = "AdapterFile", module = "microlora._core", frozen, subclass)]
pub(super) struct PyAdapterFile {
    pub inner: Loaded,
    /// Where it came from, for messages.
    pub file: String,
}

/// path, kind, rank, alpha, use_rslora, A and B each as dtype and shape.
type ModuleRow = (String, &'static str, usize, f64, bool, (String, Vec<usize>), (String, Vec<usize>));
/// A tensor as Python hands it over: dtype, shape, bytes.
type RawTensor = (String, Vec<usize>, Vec<u8>);
/// path, kind, alpha, use_rslora, A, B.
type RawModule = (String, String, f64, bool, RawTensor, RawTensor);

/// (header bytes, tensors, total bytes, rank).
pub(super) type LimitsTuple = (usize, usize, u64, usize);

pub(super) fn limits_of(limits: Option<LimitsTuple>) -> Limits {
    limits.map_or_else(Limits::default, |(header_bytes, tensors, total_bytes, rank)| Limits {
        header_bytes,
        tensors,
        total_bytes,
        rank,
    })
}

pub(super) fn orientation_of(name: Option<&str>) -> Result<Option<Orientation>> {
    match name {
        None => Ok(None),
        Some("rank_first") => Ok(Some(Orientation::RankFirst)),
        Some("rank_last") => Ok(Some(Orientation::RankLast)),
        Some(other) => {
            Err(Error::config("orientation", format!("{other:?}"), "'rank_first', 'rank_last' or None"))
        }
    }
}

fn describe(t: &Tensor) -> (String, Vec<usize>) {
    (t.dtype.to_string(), t.shape.clone())
}

pub(super) fn dtype_of(name: &str) -> Result<TensorDtype> {
    serde_json::from_value(serde_json::Value::String(name.to_owned()))
        .map_err(|_| Error::config("dtype", format!("{name:?}"), "a dtype of safetensors such as F32"))
}

fn kind_of(name: &str) -> Result<ModuleKind> {
    [ModuleKind::Linear, ModuleKind::Embedding, ModuleKind::Conv, ModuleKind::Experts]
        .into_iter()
        .find(|k| k.as_str() == name)
        .ok_or_else(|| Error::config("kind", format!("{name:?}"), "linear, embedding, conv or experts"))
}

fn tensor(name: String, (dtype, shape, data): RawTensor) -> Result<Tensor> {
    Tensor::new(name, dtype_of(&dtype)?, shape, data)
}

#[pymethods]
impl PyAdapterFile {
    /// Another file's content, shared.
    #[new]
    fn new(source: &PyAdapterFile) -> Self {
        PyAdapterFile { inner: source.inner.clone(), file: source.file.clone() }
    }

    /// Reads any known format.
    #[staticmethod]
    #[pyo3(signature = (path, mmap, strict, limits=None, alpha=None, orientation=None))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        mmap: bool,
        strict: bool,
        limits: Option<LimitsTuple>,
        alpha: Option<f64>,
        orientation: Option<&str>,
    ) -> PyResult<Self> {
        let orientation = orientation_of(orientation)?;
        let opts = LoadOptions { mmap, strict, limits: limits_of(limits), alpha, orientation, packed: false };
        let inner = py.detach(|| format::read(&path, &opts))?;
        let inner = py.detach(|| inner.expanded())?;
        Ok(PyAdapterFile { inner, file: path.display().to_string() })
    }

    /// Content from Python: modules, tensors beside them (name, dtype, shape, bytes), and JSON texts.
    #[staticmethod]
    #[pyo3(signature = (modules, extra, config_json=None, metadata_json=None, peft_config=None, prefix=None))]
    fn build(
        modules: Vec<RawModule>,
        extra: Vec<(String, String, Vec<usize>, Vec<u8>)>,
        config_json: Option<String>,
        metadata_json: Option<String>,
        peft_config: Option<String>,
        prefix: Option<String>,
    ) -> PyResult<Self> {
        let modules = modules.into_iter().map(|(path, kind, alpha, use_rslora, a, b)| {
            let kind = kind_of(&kind)?;
            let (a, b) = (tensor(format!("{path}.lora_a"), a)?, tensor(format!("{path}.lora_b"), b)?);
            let at = if kind == ModuleKind::Experts { 1 } else { 0 };
            let rank = a.shape.get(at).copied().unwrap_or(0);
            Ok(ModuleParts { path, kind, alpha, rank, use_rslora, a, b })
        });
        let modules = modules.collect::<Result<_>>()?;
        let extra = extra.into_iter().map(|(name, dtype, shape, data)| tensor(name, (dtype, shape, data)));
        let extra = extra.collect::<Result<_>>()?;
        let parts = AdapterParts {
            modules,
            extra,
            config_json,
            metadata_json,
            peft_config,
            prefix,
            ..AdapterParts::default()
        };
        parts.check()?;
        let variants = format::peft_variants(&parts)?;
        Ok(PyAdapterFile { inner: Loaded { parts, variants, ..Loaded::default() }, file: "memory".into() })
    }

    /// An adapter as a file would hold it.
    #[staticmethod]
    fn of(adapter: &PyAdapter) -> Self {
        let parts = adapter.inner.to_parts();
        PyAdapterFile { inner: Loaded { parts, ..Loaded::default() }, file: "memory".into() }
    }

    /// A quantised adapter as a file would hold it.
    #[staticmethod]
    fn of_quantized(py: Python<'_>, adapter: &PyQuantizedAdapter) -> PyResult<Self> {
        let inner = py.detach(|| adapter.loaded().expanded())?;
        Ok(PyAdapterFile { inner, file: "memory".into() })
    }

    /// Name of the format it was read from; empty when it was built.
    #[getter]
    fn format(&self) -> &'static str {
        self.inner.format
    }

    /// Where it was read from.
    #[getter]
    fn file(&self) -> &str {
        &self.file
    }

    /// `(path, kind, rank, alpha, use_rslora, (dtype, shape) of A, (dtype, shape) of B)` of each module.
    fn rows(&self) -> Vec<ModuleRow> {
        let row = |m: &ModuleParts| {
            (m.path.clone(), m.kind.as_str(), m.rank, m.alpha, m.use_rslora, describe(&m.a), describe(&m.b))
        };
        self.inner.parts.modules.iter().map(row).collect()
    }

    /// Bytes of A and of B of the module at that place in [`rows`](Self::rows).
    fn factor_bytes<'py>(
        &self,
        py: Python<'py>,
        module: usize,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let m = self.inner.parts.modules.get(module);
        let m = m.ok_or_else(|| Error::config("module", module, "the number of a module"))?;
        Ok((PyBytes::new(py, &m.a.data), PyBytes::new(py, &m.b.data)))
    }

    /// `(name, dtype, shape)` of each tensor that is no factor.
    fn extra(&self) -> Vec<(String, String, Vec<usize>)> {
        let row = |t: &Tensor| (t.name.clone(), t.dtype.to_string(), t.shape.clone());
        self.inner.parts.extra.iter().map(row).collect()
    }

    /// Bytes of the tensor at that place in [`extra`](Self::extra).
    fn extra_bytes<'py>(&self, py: Python<'py>, tensor: usize) -> PyResult<Bound<'py, PyBytes>> {
        let t = self.inner.parts.extra.get(tensor);
        let t = t.ok_or_else(|| Error::config("tensor", tensor, "the number of a tensor"))?;
        Ok(PyBytes::new(py, &t.data))
    }

    /// `(kind, at, why)` of everything that is not plain LoRA on linear layers.
    fn variant_rows(&self) -> Vec<(String, String, String)> {
        self.inner.variants.iter().map(|v| (v.kind.clone(), v.at.clone(), v.why.clone())).collect()
    }

    /// Tensors and settings that nothing uses.
    #[getter]
    fn unused(&self) -> Vec<String> {
        self.inner.unused.clone()
    }

    /// What is worth knowing and no error.
    #[getter]
    fn notes(&self) -> Vec<String> {
        self.inner.notes.iter().cloned().chain(self.inner.block_note()).collect()
    }

    /// True where a factor or more is in blocks.
    #[getter]
    fn has_blocks(&self) -> bool {
        self.inner.quantized.is_some()
    }

    /// The text of `adapter_config.json`, where there was one.
    #[getter]
    fn peft_config(&self) -> Option<String> {
        self.inner.parts.peft_config.clone()
    }

    /// PEFT's prefix of keys, where it was repeated.
    #[getter]
    fn prefix(&self) -> Option<String> {
        self.inner.parts.prefix.clone()
    }

    /// Settings of ours, as JSON.
    #[getter]
    fn config_json(&self) -> Option<String> {
        self.inner.parts.config_json.clone()
    }

    /// Metadata of ours, as JSON.
    #[getter]
    fn metadata_json(&self) -> Option<String> {
        self.inner.parts.metadata_json.clone()
    }

    /// Other entries of a safetensors header.
    #[getter]
    fn header(&self) -> std::collections::BTreeMap<String, String> {
        self.inner.parts.header.clone()
    }

    /// SHA-256 of names, shapes, dtypes, scaling and data: 64 hex digits.
    fn fingerprint(&self, py: Python<'_>) -> PyResult<String> {
        Ok(py.detach(|| self.inner.fingerprint())?)
    }

    /// The fingerprint that the file says its weights have.
    #[getter]
    fn weights_sha256(&self) -> Option<String> {
        self.inner.weights_sha256.clone()
    }

    /// The adapter that runs: refused while a variant is left that `allow` does not drop by name.
    fn runnable(&self, allow: Vec<String>) -> PyResult<PyAdapter> {
        let loaded = self.inner.clone().runnable(&self.file, &allow)?;
        Ok(PyAdapter::from(Adapter::from_parts(&loaded.parts)?))
    }

    /// Writes all of it to one file of ours, through a temporary sibling and a rename. Variants of the
    /// kinds in `lost` are no longer said to be there. Blocks of linear layers stay blocks without `expand`.
    fn save_single(&self, py: Python<'_>, path: PathBuf, lost: Vec<String>, expand: bool) -> PyResult<()> {
        let mut loaded = self.inner.clone();
        loaded.variants.retain(|v| !lost.contains(&v.kind));
        Ok(py.detach(|| format::save_single_as_read(&path, &loaded, expand))?)
    }

    /// `(kind, at)` of what a PEFT directory cannot hold of it.
    fn lost_in_peft(&self) -> PyResult<Vec<(String, String)>> {
        Ok(self.inner.lost_in_peft()?.into_iter().map(|v| (v.kind.clone(), v.at.clone())).collect())
    }

    /// Writes a PEFT directory, without what [`lost_in_peft`](Self::lost_in_peft) lists.
    fn save_peft(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let parts = self.inner.peft_parts()?;
        Ok(py.detach(|| format::save_peft(&path, &parts, &PeftOptions::default()))?)
    }

    /// `(kind, at)` of what a format that is one key style cannot hold of it.
    fn lost_in(&self, format: &str, allow: Vec<String>) -> PyResult<Vec<(String, String)>> {
        Ok(format::losses(&self.inner, format, &allow)?)
    }

    /// Writes a format that is one key style, without what `allow` drops by name: notes.
    fn save_style(
        &self,
        py: Python<'_>,
        path: PathBuf,
        format: &str,
        allow: Vec<String>,
    ) -> PyResult<Vec<String>> {
        Ok(py.detach(|| format::save_style(&path, &self.inner, format, &allow))?)
    }

    /// The same content under the names that the base's modules have.
    fn resolved(&self, names: Vec<String>) -> PyResult<Self> {
        let mut inner = self.inner.clone();
        format::resolve_names(&mut inner, &names, &self.file)?;
        inner.weights_sha256 = None; // it is of the names in the file
        Ok(PyAdapterFile { inner, file: self.file.clone() })
    }

    /// The same content with packed experts as modules of their own.
    #[pyo3(signature = (experts=None))]
    fn unpacked(&self, experts: Option<usize>) -> PyResult<Self> {
        let parts = format::peft::unpack_experts(&self.inner.parts, experts)?;
        let variants = format::peft_variants(&parts)?;
        let inner = Loaded { parts, variants, weights_sha256: None, ..self.inner.clone() };
        Ok(PyAdapterFile { inner, file: self.file.clone() })
    }
}
