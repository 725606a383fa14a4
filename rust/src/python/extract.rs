//! Adapters out of two sets of weights.

use std::collections::HashMap;
use std::path::PathBuf;

use pyo3::prelude::*;

use super::array::input;
use super::long::long_call;
use super::merge::{Made, json};
use crate::algebra::Keep;
use crate::error::{Error, Result};
use crate::format::shards::Model;
use crate::kernels::Kernels;
use crate::merge::{ExtractOptions, Pair, extract_arrays, extract_files};

/// Names, dtypes and shapes of a model's tensors; `arg` is what errors call it.
#[pyfunction]
pub(super) fn list_tensors(
    py: Python<'_>,
    path: PathBuf,
    arg: &str,
) -> PyResult<Vec<(String, String, Vec<usize>)>> {
    Ok(py.detach(|| -> Result<_> {
        let model = Model::open(&path, arg)?;
        let mut out: Vec<_> = model
            .names()
            .filter_map(|n| model.find(n))
            .map(|at| model.entry(at))
            .map(|e| (e.name.clone(), e.dtype.to_string(), e.shape.clone()))
            .collect();
        out.sort();
        Ok(out)
    })?)
}

fn options(keep: &str, value: f64, max_rank: usize, dtype: &str, seed: u64) -> Result<ExtractOptions> {
    let keep = match keep {
        "rank" => Keep::Rank(value as usize),
        "energy" => Keep::Energy(value),
        "max_error" => Keep::MaxError(value),
        other => return Err(Error::config("keep", other, "rank, energy or max_error")),
    };
    Ok(ExtractOptions { keep, max_rank, dtype: dtype.parse()?, seed })
}

/// From two models on disk: `modules` maps the modules wanted to whether they lie as (in, out).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn extract_from_files(
    py: Python<'_>,
    tuned: PathBuf,
    base: PathBuf,
    modules: HashMap<String, bool>,
    keep: &str,
    value: f64,
    max_rank: usize,
    dtype: &str,
    seed: u64,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<Made> {
    let (o, k) = (options(keep, value, max_rank, dtype, seed)?, Kernels::detect()?);
    let (adapter, report) = long_call(py, "extract", progress, cancel, move |tick| {
        let mut choose = |m: &str| Ok(modules.get(m).copied());
        extract_files(k, [&tuned, &base], o, &mut choose, tick)
    })?;
    Ok((adapter.into(), json(&report)?))
}

/// name, `W_tuned`, `W_base`, whether they lie as (in, out).
type PairTuple<'py> = (String, Bound<'py, PyAny>, Bound<'py, PyAny>, bool);

/// From matrices in memory, float32 where they lie so.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn extract_from_arrays(
    py: Python<'_>,
    pairs: Vec<PairTuple<'_>>,
    keep: &str,
    value: f64,
    max_rank: usize,
    dtype: &str,
    seed: u64,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<Made> {
    let (o, k) = (options(keep, value, max_rank, dtype, seed)?, Kernels::detect()?);
    let mut read = Vec::with_capacity(pairs.len());
    for (name, tuned, base, transposed) in &pairs {
        let t = input(&format!("tuned, module {name}"), tuned, None, true)?;
        let rows = t
            .rows
            .ok_or_else(|| Error::shape(format!("tuned, module {name}"), "one dimension", "a matrix"))?;
        let cols = t.as_slice().len() / rows;
        let b = input(&format!("base, module {name}"), base, Some(cols), true)?;
        read.push((name, t, b, cols, *transposed));
    }
    let pairs: Vec<Pair<'_>> = read
        .iter()
        .map(|(name, t, b, cols, transposed)| Pair {
            name: (*name).clone(),
            tuned: t.as_slice(),
            base: b.as_slice(),
            cols: *cols,
            transposed: *transposed,
        })
        .collect();
    let (adapter, report) =
        long_call(py, "extract", progress, cancel, |tick| extract_arrays(k, &pairs, o, tick))?;
    Ok((adapter.into(), json(&report)?))
}
