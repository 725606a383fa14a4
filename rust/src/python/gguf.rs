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

/// The file with the modules of each group (experts, in order) as one module of kind "experts".
#[pyfunction]
pub(super) fn gguf_stack(
    file: &PyAdapterFile,
    groups: BTreeMap<String, Vec<String>>,
) -> PyResult<PyAdapterFile> {
    let inner = gguf::stack(file.inner.clone(), &groups, &file.file)?;
    Ok(PyAdapterFile { inner, file: file.file.clone() })
}

/// The one alpha that a file of these modules gets; other scalings are folded into B.
#[pyfunction]
pub(super) fn gguf_alpha(file: &PyAdapterFile, modules: Vec<String>) -> PyResult<f64> {
    let chosen = file.inner.parts.modules.iter().filter(|m| modules.contains(&m.path));
    Ok(f64::from(gguf::common_alpha(chosen)? as f32))
}

/// Factors of these modules whose blocks a file of that dtype cannot hold as they are, each with the reason.
#[pyfunction]
pub(super) fn gguf_lost_blocks(
    file: &PyAdapterFile,
    modules: Vec<String>,
    dtype: &str,
) -> PyResult<Vec<String>> {
    let Some(quantized) = &file.inner.quantized else { return Ok(Vec::new()) };
    let chosen = file.inner.parts.modules.iter().filter(|m| modules.contains(&m.path));
    let chosen: Vec<_> = chosen.cloned().collect();
    Ok(gguf::lost_blocks(&chosen, quantized, dtype.parse()?)?)
}

/// Writes the modules that have a target (base tensor, heads); returns notes.
#[pyfunction]
#[pyo3(signature = (file, path, architecture, targets, dtype, drop_blocks, tokens, config_json, progress, cancel))]
#[allow(clippy::too_many_arguments)]
pub(super) fn save_gguf(
    py: Python<'_>,
    file: &PyAdapterFile,
    path: PathBuf,
    architecture: &str,
    targets: BTreeMap<String, (String, Option<usize>)>,
    dtype: &str,
    drop_blocks: bool,
    tokens: Option<Vec<u32>>,
    config_json: Option<String>,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<Vec<String>> {
    let encoding: Encoding = dtype.parse()?;
    let targets = targets.into_iter().map(|(m, (tensor, heads))| (m, Target { tensor, heads })).collect();
    let quantized = file.inner.quantized.as_deref().unwrap_or_default();
    let tokens = tokens.as_deref();
    let opts = GgufOptions { architecture, targets: &targets, encoding, tokens, quantized, drop_blocks };
    let parts = AdapterParts { config_json, ..file.inner.parts.clone() };
    long_call(py, "convert", progress, cancel, |tick| gguf::save(&path, &parts, &opts, tick))
}
