//! GGUF adapters: names, row order, writing.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::prelude::*;

use super::adapter_file::PyAdapterFile;
use super::long::long_call;
use crate::format::AdapterParts;
use crate::format::gguf::{self, Encoding, GgufOptions, Place, Target};

/// Whether llama.cpp interleaves the rows of q and k of an architecture; None where that is not known.
#[pyfunction]
pub(super) fn gguf_interleaves(architecture: &str) -> Option<bool> {
    gguf::order::interleaves(architecture)
}

/// The file with the model's names and row order: `places` maps a module to its path and its heads.
#[pyfunction]
pub(super) fn gguf_translate(
    file: &PyAdapterFile,
    places: BTreeMap<String, Place>,
) -> PyResult<PyAdapterFile> {
    let inner = gguf::translate(file.inner.clone(), &places, &file.file)?;
    Ok(PyAdapterFile { inner, file: file.file.clone() })
}

/// The file with llama.cpp's names and row order, as they are.
#[pyfunction]
pub(super) fn gguf_keep_names(file: &PyAdapterFile) -> PyAdapterFile {
    PyAdapterFile { inner: gguf::keep_names(file.inner.clone()), file: file.file.clone() }
}

/// The one alpha that a file of these modules gets; other scalings are folded into B.
#[pyfunction]
pub(super) fn gguf_alpha(file: &PyAdapterFile, modules: Vec<String>) -> PyResult<f64> {
    let chosen = file.inner.parts.modules.iter().filter(|m| modules.contains(&m.path));
    Ok(f64::from(gguf::common_alpha(chosen)? as f32))
}

/// Writes the modules that have a target (base tensor, heads); returns notes.
#[pyfunction]
#[pyo3(signature = (file, path, architecture, targets, dtype, tokens, config_json, progress, cancel))]
#[allow(clippy::too_many_arguments)]
pub(super) fn save_gguf(
    py: Python<'_>,
    file: &PyAdapterFile,
    path: PathBuf,
    architecture: &str,
    targets: BTreeMap<String, (String, Option<usize>)>,
    dtype: &str,
    tokens: Option<Vec<u32>>,
    config_json: Option<String>,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<Vec<String>> {
    let encoding: Encoding = dtype.parse()?;
    let targets = targets.into_iter().map(|(m, (tensor, heads))| (m, Target { tensor, heads })).collect();
    let opts = GgufOptions { architecture, targets: &targets, encoding, tokens: tokens.as_deref() };
    let parts = AdapterParts { config_json, ..file.inner.parts.clone() };
    long_call(py, "convert", progress, cancel, |tick| gguf::save(&path, &parts, &opts, tick))
}
