//! Fusing adapters into the weights of a base model on disk.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pyo3::prelude::*;

use super::adapter::PyAdapter;
use super::long::long_call;
use crate::error::Error;
use crate::fuse::{self, FuseOptions, FuseReport};

/// The report as JSON.
fn to_json(report: &FuseReport) -> PyResult<String> {
    Ok(serde_json::to_string(report).map_err(|e| Error::format("report", e.to_string()))?)
}

/// Writes the base with the adapter's deltas added; the report as JSON.
#[pyfunction]
#[pyo3(signature = (base, adapter, out, sidecar, layer_paths, fan_in_fan_out, progress, cancel))]
#[allow(clippy::too_many_arguments)]
pub(super) fn fuse_model(
    py: Python<'_>,
    base: PathBuf,
    adapter: &PyAdapter,
    out: PathBuf,
    sidecar: Option<PathBuf>,
    layer_paths: Option<BTreeMap<String, Vec<String>>>,
    fan_in_fan_out: Option<bool>,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<String> {
    let adapter = &adapter.inner;
    let options =
        FuseOptions { sidecar: sidecar.as_deref(), layer_paths: layer_paths.as_ref(), fan_in_fan_out };
    let report =
        long_call(py, "fuse", progress, cancel, |tick| fuse::fuse(&base, adapter, &out, &options, tick))?;
    to_json(&report)
}

/// Writes the original weights of a fused model; the report as JSON.
#[pyfunction]
#[pyo3(signature = (fused, sidecar, out, progress, cancel))]
pub(super) fn unfuse_model(
    py: Python<'_>,
    fused: PathBuf,
    sidecar: PathBuf,
    out: PathBuf,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<String> {
    let report =
        long_call(py, "unfuse", progress, cancel, |tick| fuse::unfuse(&fused, &sidecar, &out, tick))?;
    to_json(&report)
}
