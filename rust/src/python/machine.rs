//! Instruction sets, threads, and what the machine can do at most.

use pyo3::prelude::*;

use super::handle::ModuleHandle;
use crate::kernels::Kernels;
use crate::probe;

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

/// The best of every instruction set.
fn best(py: Python<'_>, f: impl Fn(&Kernels) -> f64 + Send + Sync) -> f64 {
    py.detach(|| Kernels::available().map(f).fold(0.0, f64::max))
}

/// Read bandwidth in GB/s over a buffer of `bytes`, for benches.
#[pyfunction]
pub(super) fn probe_read_gbps(py: Python<'_>, bytes: usize, seconds: f64) -> f64 {
    best(py, |k| probe::read_gbps(k, bytes, seconds))
}

/// Peak of float32 fused multiply-adds in GFLOP/s, for benches.
#[pyfunction]
pub(super) fn probe_fma_gflops(py: Python<'_>, seconds: f64) -> f64 {
    best(py, |k| probe::fma_gflops(k, seconds))
}

/// Nanoseconds of one forward of a module without Python, for benches.
#[pyfunction]
pub(super) fn probe_forward_ns(py: Python<'_>, handle: &ModuleHandle, seconds: f64) -> f64 {
    handle.probe(|k, layer| py.detach(|| probe::forward_ns(k, layer, seconds)))
}

/// Lets large batches use up to `n` threads; 1, the default, is off.
#[pyfunction]
pub(super) fn set_num_threads(n: usize) -> PyResult<()> {
    Ok(crate::parallel::set_num_threads(n)?)
}

/// How many threads a large batch may use.
#[pyfunction]
pub(super) fn num_threads() -> usize {
    crate::parallel::num_threads()
}
