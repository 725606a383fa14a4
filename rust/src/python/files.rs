//! Reading and writing adapter files.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;

use super::adapter::PyAdapter;
use super::adapter_file::{LimitsTuple, limits_of, orientation_of};
use super::array::input;
use crate::adapter::Adapter;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::format::{self, LoadOptions, PeftOptions};
use crate::layer::Layer;

type Loaded = (PyAdapter, Vec<String>, Vec<String>);

fn packed(loaded: format::Loaded) -> Result<Loaded> {
    Ok((PyAdapter::from(Adapter::from_parts(&loaded.parts)?), loaded.unused, loaded.notes))
}

/// Every format that is read: name, and what it is known by.
#[pyfunction]
pub(super) fn adapter_file_formats() -> Vec<(&'static str, &'static str)> {
    format::FORMATS.iter().map(|row| (row.name, row.known_by)).collect()
}

/// Every kind of variant that can be given up by name.
#[pyfunction]
pub(super) fn adapter_file_kinds() -> Vec<String> {
    format::variant_kinds().into_iter().collect()
}

/// Reads any known format: the adapter without the variants that `allow` drops, the names of unused
/// tensors, and notes.
#[pyfunction]
#[pyo3(signature = (path, mmap, strict, limits=None, alpha=None, orientation=None, allow=None))]
#[allow(clippy::too_many_arguments)]
pub(super) fn load(
    py: Python<'_>,
    path: PathBuf,
    mmap: bool,
    strict: bool,
    limits: Option<LimitsTuple>,
    alpha: Option<f64>,
    orientation: Option<&str>,
    allow: Option<Vec<String>>,
) -> PyResult<Loaded> {
    let orientation = orientation_of(orientation)?;
    let opts = LoadOptions { mmap, strict, limits: limits_of(limits), alpha, orientation, packed: false };
    let allow = allow.unwrap_or_default();
    Ok(py.detach(|| format::load_without(&path, &opts, &allow).and_then(packed))?)
}

/// The same from the bytes of a single file.
#[pyfunction]
pub(super) fn from_bytes(py: Python<'_>, data: &[u8], strict: bool) -> PyResult<Loaded> {
    Ok(py.detach(|| format::from_bytes(data, strict).and_then(packed))?)
}

/// name, A (rank, in), B (out, rank), alpha.
type FactorTuple<'py> = (String, Bound<'py, PyAny>, Bound<'py, PyAny>, f64);

/// An adapter from factors in PEFT's orientation, float32, stored as `dtype`.
#[pyfunction]
pub(super) fn adapter_from_factors(
    modules: Vec<FactorTuple<'_>>,
    use_rslora: bool,
    dtype: &str,
) -> PyResult<PyAdapter> {
    let dtype: Dtype = dtype.parse()?;
    let mut layers = Vec::with_capacity(modules.len());
    for (name, a, b, alpha) in modules {
        let (arg_a, arg_b) = (format!("lora_a of {name}"), format!("lora_b of {name}"));
        let a = input(&arg_a, &a, None, true)?;
        let rank = a.rows.ok_or_else(|| Error::shape(&arg_a, "one dimension", "(rank, in_features)"))?;
        let b = input(&arg_b, &b, Some(rank), true)?;
        let n_out = b.rows.ok_or_else(|| Error::shape(&arg_b, "one dimension", "(out_features, rank)"))?;
        for (arg, v) in [(&arg_a, &a), (&arg_b, &b)] {
            if v.as_slice().iter().any(|v| !v.is_finite()) {
                return Err(Error::non_finite(arg).into());
            }
        }
        let columns = b.as_slice();
        let rows: Vec<f32> = (0..rank * n_out).map(|i| columns[i % n_out * rank + i / n_out]).collect();
        let layer = Layer::new(
            Factor::from_rows(a.as_slice(), rank, a.as_slice().len() / rank, dtype),
            Factor::from_rows(&rows, rank, n_out, dtype),
            alpha,
            use_rslora,
        )?;
        if layers.iter().any(|(n, _)| *n == name) {
            return Err(Error::config("modules", format!("{name:?} twice"), "each module once").into());
        }
        layers.push((name, Arc::new(layer)));
    }
    Ok(PyAdapter::from(Adapter { modules: layers, ..Adapter::default() }))
}

/// Writes a single safetensors file through a temporary sibling and a rename.
#[pyfunction]
pub(super) fn save_single(py: Python<'_>, adapter: &PyAdapter, path: PathBuf) -> PyResult<()> {
    let adapter = &adapter.inner;
    Ok(py.detach(|| format::save_single(&path, &adapter.to_parts()))?)
}

/// Writes bytes through a temporary sibling and a rename.
#[pyfunction]
pub(super) fn write_file(py: Python<'_>, path: PathBuf, data: &[u8]) -> PyResult<()> {
    Ok(py.detach(|| format::atomic::write(&path, |out| out.write_all(data)))?)
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
