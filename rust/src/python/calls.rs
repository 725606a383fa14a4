//! The read path from Python: one row keeps the GIL, a long batch lets it go between signal checks.

use std::sync::Arc;

use pyo3::prelude::*;

use super::array::{Input, Output, input, new_rows, new_vector, output};
use super::error::ConfigError;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::micro_lora::MicroLora;

/// Multiply-adds below which releasing the GIL costs more than it gives (about 100 us of work).
const DETACH_WORK: usize = 4_000_000;
/// Multiply-adds between two looks at pending signals (tens of milliseconds).
const SIGNAL_WORK: usize = 1_000_000_000;

/// `dY(x)` into a new array or `out`.
#[inline]
pub(super) fn forward<'py>(
    py: Python<'py>,
    lora: &MicroLora,
    module: usize,
    (n_in, n_out): (usize, usize),
    x: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let x = input("x", x, Some(n_in), true)?;
    match (x.rows, out) {
        (None, None) => new_vector(py, n_out, |y| lora.forward(module, x.as_slice(), y, false)),
        (None, Some(out)) => {
            let mut y = output(out, &x, None, n_out)?;
            lora.forward(module, x.as_slice(), y.as_mut_slice(), false)?;
            Ok(out.clone())
        }
        (Some(rows), None) => {
            let (array, mut y) = new_rows(py, rows, n_out)?;
            batch(py, lora, module, &x, &mut y, false)?;
            Ok(array)
        }
        (Some(rows), Some(out)) => {
            let mut y = output(out, &x, Some(rows), n_out)?;
            batch(py, lora, module, &x, &mut y, false)?;
            Ok(out.clone())
        }
    }
}

/// `out += dY(x)`.
#[inline]
pub(super) fn forward_add<'py>(
    py: Python<'py>,
    lora: &MicroLora,
    module: usize,
    (n_in, n_out): (usize, usize),
    x: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<()> {
    let Some(out) = out else {
        return Err(ConfigError::new_err("out: missing, expected the array that dY is added to"));
    };
    let x = input("x", x, Some(n_in), true)?;
    let mut y = output(out, &x, x.rows, n_out)?;
    match x.rows {
        None => Ok(lora.forward(module, x.as_slice(), y.as_mut_slice(), true)?),
        Some(_) => batch(py, lora, module, &x, &mut y, true),
    }
}

fn batch(
    py: Python<'_>,
    lora: &MicroLora,
    module: usize,
    x: &Input<'_>,
    y: &mut Output<'_>,
    add: bool,
) -> PyResult<()> {
    let (layer, enabled) = lora.layer(module);
    rows(py, lora.kernels(), &layer, enabled, x.as_slice(), y, add)
}

/// All rows on one version of the weights.
pub(super) fn rows(
    py: Python<'_>,
    k: &Kernels,
    layer: &Arc<Layer>,
    enabled: bool,
    x: &[f32],
    y: &mut Output<'_>,
    add: bool,
) -> PyResult<()> {
    let y = y.as_mut_slice();
    if !enabled {
        if !k.all_finite(x) {
            return Err(crate::Error::non_finite("x").into());
        }
        if !add {
            y.fill(0.0);
        }
        return Ok(());
    }
    let (n_in, n_out) = (layer.in_features(), layer.out_features());
    let work = layer.rank() * (n_in + n_out);
    if x.len() / n_in * work < DETACH_WORK {
        return Ok(layer.forward_rows(k, x, y, add)?);
    }
    // Every bottleneck is checked before the first number is written: a refused batch leaves y as it was.
    let (rank, step) = (layer.rank(), (SIGNAL_WORK / work).max(1));
    let mut u = vec![0.0; x.len() / n_in * rank];
    for (i, (x, u)) in x.chunks(step * n_in).zip(u.chunks_mut(step * rank)).enumerate() {
        py.detach(|| layer.down_rows(k, x, u, i * step))?;
        py.check_signals()?;
    }
    for (u, y) in u.chunks(step * rank).zip(y.chunks_mut(step * n_out)) {
        py.detach(|| layer.up_rows(k, u, y, add));
        py.check_signals()?;
    }
    Ok(())
}

/// `s B^T A` as a new array `(out_features, in_features)`.
pub(super) fn delta_weight<'py>(py: Python<'py>, k: &Kernels, layer: &Layer) -> PyResult<Bound<'py, PyAny>> {
    let (array, mut w) = new_rows(py, layer.out_features(), layer.in_features())?;
    let w = w.as_mut_slice();
    py.detach(|| layer.add_delta(k, w, 1.0));
    Ok(array)
}
