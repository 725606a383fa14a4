//! The read path from Python: one row keeps the GIL, a long batch lets it go between signal checks.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::array::{Input, Output, input, new_rows, new_vector, output};
use super::error::ConfigError;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::low_rank::LowRank;
use crate::micro_lora::MicroLora;

/// Multiply-adds below which releasing the GIL costs more than it gives (about 100 us of work).
const DETACH_WORK: usize = 4_000_000;
/// Multiply-adds between two looks at pending signals (tens of milliseconds).
const SIGNAL_WORK: usize = 1_000_000_000;

/// Modules that read the same input in a transformer block.
const SHARED_INPUT: [&[&str]; 2] = [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"]];

/// Where a call reads the weights of its module.
pub(super) trait Weights {
    /// A version of them.
    type Layer: LowRank;
    /// The kernels to run.
    fn kernels(&self) -> &'static Kernels;
    /// `dY(x)` of one row.
    fn row(&self, x: &[f32], y: &mut [f32], add: bool) -> crate::Result<()>;
    /// One version for a whole batch, and whether it is to give anything but zeros.
    fn version(&self) -> (Arc<Self::Layer>, bool);
}

/// A module of a learner.
impl Weights for (&MicroLora, usize) {
    type Layer = Layer;

    fn kernels(&self) -> &'static Kernels {
        self.0.kernels()
    }

    #[inline]
    fn row(&self, x: &[f32], y: &mut [f32], add: bool) -> crate::Result<()> {
        self.0.forward(self.1, x, y, add)
    }

    fn version(&self) -> (Arc<Layer>, bool) {
        self.0.layer(self.1)
    }
}

/// A layer that never changes.
impl<L: LowRank> Weights for (&'static Kernels, &Arc<L>) {
    type Layer = L;

    fn kernels(&self) -> &'static Kernels {
        self.0
    }

    #[inline]
    fn row(&self, x: &[f32], y: &mut [f32], add: bool) -> crate::Result<()> {
        self.1.forward(self.0, x, y, add)
    }

    fn version(&self) -> (Arc<L>, bool) {
        (Arc::clone(self.1), true)
    }
}

/// `dY(x)` into a new array or `out`.
#[inline]
pub(super) fn forward<'py>(
    py: Python<'py>,
    weights: &impl Weights,
    (n_in, n_out): (usize, usize),
    x: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let x = input("x", x, Some(n_in), true)?;
    match (x.rows, out) {
        (None, None) => new_vector(py, n_out, |y| weights.row(x.as_slice(), y, false)),
        (None, Some(out)) => {
            let mut y = output(out, &x, None, n_out)?;
            weights.row(x.as_slice(), y.as_mut_slice(), false)?;
            Ok(out.clone())
        }
        (Some(rows), None) => {
            let (array, mut y) = new_rows(py, rows, n_out)?;
            batch(py, weights, &x, &mut y, false)?;
            Ok(array)
        }
        (Some(rows), Some(out)) => {
            let mut y = output(out, &x, Some(rows), n_out)?;
            batch(py, weights, &x, &mut y, false)?;
            Ok(out.clone())
        }
    }
}

/// `out += dY(x)`.
#[inline]
pub(super) fn forward_add<'py>(
    py: Python<'py>,
    weights: &impl Weights,
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
        None => Ok(weights.row(x.as_slice(), y.as_mut_slice(), true)?),
        Some(_) => batch(py, weights, &x, &mut y, true),
    }
}

fn batch(
    py: Python<'_>,
    weights: &impl Weights,
    x: &Input<'_>,
    y: &mut Output<'_>,
    add: bool,
) -> PyResult<()> {
    let (layer, enabled) = weights.version();
    rows(py, weights.kernels(), &layer, enabled, x.as_slice(), y, add)
}

/// What `find` gives for the modules of a `forward_all`: those named, or the first group that shares its input.
pub(super) fn shared<T>(
    modules: Option<Vec<String>>,
    find: impl Fn(&str) -> crate::Result<T>,
    have: impl FnOnce() -> String,
) -> PyResult<Vec<T>> {
    let found: Vec<T> = match modules {
        Some(names) => names.iter().map(|n| find(n)).collect::<Result<_, _>>()?,
        None => SHARED_INPUT
            .iter()
            .map(|group| group.iter().filter_map(|n| find(n).ok()).collect::<Vec<_>>())
            .find(|found| !found.is_empty())
            .unwrap_or_default(),
    };
    if found.is_empty() {
        return Err(ConfigError::new_err(format!(
            "modules: missing, expected names among {} that share their input (q/k/v and gate/up are found by themselves)",
            have()
        )));
    }
    Ok(found)
}

/// `{module: dY(x)}` of modules of one version, which must take inputs of one width.
pub(super) fn forward_all<'py, L: LowRank>(
    py: Python<'py>,
    k: &Kernels,
    modules: &[(&str, Arc<L>)],
    enabled: bool,
    x: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyDict>> {
    let (first, width) = (modules[0].0, modules[0].1.in_features());
    if let Some((name, layer)) = modules.iter().find(|(_, l)| l.in_features() != width) {
        return Err(ConfigError::new_err(format!(
            "modules: {name} takes {} features and {first} takes {width}, expected modules that share their input",
            layer.in_features()
        )));
    }
    let x = input("x", x, Some(width), true)?;
    let result = PyDict::new(py);
    for (name, layer) in modules {
        let n_out = layer.out_features();
        let y = match x.rows {
            None if enabled => new_vector(py, n_out, |y| layer.forward(k, x.as_slice(), y, false))?,
            many => {
                let (array, mut y) = new_rows(py, many.unwrap_or(1), n_out)?;
                rows(py, k, layer, enabled, x.as_slice(), &mut y, false)?;
                if many.is_none() { array.call_method1("reshape", (n_out,))? } else { array }
            }
        };
        result.set_item(name, y)?;
    }
    Ok(result)
}

/// All rows on one version of the weights.
pub(super) fn rows<L: LowRank>(
    py: Python<'_>,
    k: &Kernels,
    layer: &Arc<L>,
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
