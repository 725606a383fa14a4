//! What the machine can do, for tests and benches.

use pyo3::prelude::*;

use crate::kernels::Kernels;

/// The instruction set that adapters made now will use.
#[pyfunction]
pub(super) fn isa() -> PyResult<&'static str> {
    Ok(Kernels::detect()?.isa().as_str())
}

/// Every instruction set that this machine can run, slowest first.
#[pyfunction]
pub(super) fn available_isas() -> Vec<&'static str> {
    Kernels::available().map(|k| k.isa().as_str()).collect()
}
