//! Reading and writing adapter files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::prelude::*;

use super::adapter::PyAdapter;
use crate::adapter::Adapter;
use crate::format::{self, LoadOptions, PeftOptions};

type Loaded = (PyAdapter, Vec<String>, Vec<String>);

fn wrap(loaded: format::Loaded) -> PyResult<Loaded> {
    Ok((PyAdapter::from(Adapter::from_parts(&loaded.parts)?), loaded.unused, loaded.notes))
}

/// Reads a PEFT directory or a single file: the adapter, the names of unused tensors, and notes.
#[pyfunction]
pub(super) fn load(py: Python<'_>, path: PathBuf, mmap: bool, strict: bool) -> PyResult<Loaded> {
    wrap(py.detach(|| format::load(&path, &LoadOptions { mmap, strict }))?)
}

/// The same from the bytes of a single file.
#[pyfunction]
pub(super) fn from_bytes(py: Python<'_>, data: &[u8], strict: bool) -> PyResult<Loaded> {
    wrap(py.detach(|| format::from_bytes(data, strict))?)
}

/// Writes a single safetensors file through a temporary sibling and a rename.
#[pyfunction]
pub(super) fn save_single(py: Python<'_>, adapter: &PyAdapter, path: PathBuf) -> PyResult<()> {
    let adapter = &adapter.inner;
    Ok(py.detach(|| format::save_single(&path, &adapter.to_parts()))?)
}

/// Writes a directory that PEFT loads, each file through a temporary sibling and a rename.
#[pyfunction]
pub(super) fn save_peft(
    py: Python<'_>,
    adapter: &PyAdapter,
    path: PathBuf,
    layer_paths: Option<BTreeMap<String, Vec<String>>>,
    base_model: Option<String>,
) -> PyResult<()> {
    let adapter = &adapter.inner;
    let options = PeftOptions { layer_paths: layer_paths.as_ref(), base_model: base_model.as_deref() };
    Ok(py.detach(|| format::save_peft(&path, &adapter.to_parts(), &options))?)
}
