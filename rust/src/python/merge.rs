//! Merging and its relatives: adapters and a plan in, an adapter and a report out.

use std::collections::HashMap;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde::de::DeserializeOwned;

use super::adapter::PyAdapter;
use super::array::input;
use super::long::long_call;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::merge::{self, Gram, METHODS, PEFT_METHODS, Source, Statistics};

pub(super) type Made = (PyAdapter, String);

fn plan_of<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::config("plan", e, "a plan of this version"))
}

pub(super) fn json<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::config("report", e, "numbers that JSON holds"))
}

fn numbers(arg: &str, values: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    let values = input(arg, values, None, true)?;
    if values.as_slice().iter().any(|v| !v.is_finite()) {
        return Err(Error::non_finite(arg).into());
    }
    Ok(values.as_slice().to_vec())
}

/// `{module: {"gram": {"dense": ...} | {"diag": ..., "low": ...}, "importance": (a, c)}}` of one parent.
fn statistics(name: &str, of: &Bound<'_, PyDict>) -> PyResult<HashMap<String, Statistics>> {
    let mut out = HashMap::new();
    for (module, facts) in of.iter() {
        let (module, facts) = (module.extract::<String>()?, facts.cast_into::<PyDict>()?);
        let mut found = Statistics::default();
        let arg = |what: &str| format!("statistics of {name}, {module}: {what}");
        if let Some(gram) = facts.get_item("gram")? {
            let gram = gram.cast_into::<PyDict>()?;
            let take = |key: &str| gram.get_item(key)?.map(|v| numbers(&arg(key), &v)).transpose();
            found.gram = match (take("dense")?, take("diag")?, take("low")?) {
                (Some(dense), _, _) => Some(Gram::Dense(dense)),
                (None, Some(diag), Some(low)) => Some(Gram::Low { diag, low }),
                _ => None,
            };
        }
        if let Some(pair) = facts.get_item("importance")? {
            let (a, c): (Bound<'_, PyAny>, Bound<'_, PyAny>) = pair.extract()?;
            found.importance = Some((numbers(&arg("a"), &a)?, numbers(&arg("c"), &c)?));
        }
        out.insert(module, found);
    }
    Ok(out)
}

/// Merges `(name, adapter)` pairs by a plan (JSON); returns the adapter and the report (JSON).
#[pyfunction]
pub(super) fn merge_adapters(
    py: Python<'_>,
    parents: Vec<(String, Bound<'_, PyAdapter>)>,
    known: Vec<Option<Bound<'_, PyDict>>>,
    plan: &str,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<Made> {
    let plan: merge::Plan = plan_of(plan)?;
    let mut sources = Vec::with_capacity(parents.len());
    for (i, (name, adapter)) in parents.into_iter().enumerate() {
        let statistics = known.get(i).and_then(Option::as_ref).map(|s| statistics(&name, s)).transpose()?;
        sources.push(Source {
            adapter: adapter.get().inner.clone(),
            statistics: statistics.unwrap_or_default(),
            name,
        });
    }
    let k = Kernels::detect()?;
    let (adapter, report) =
        long_call(py, "merge", progress, cancel, move |tick| merge::merge(k, &sources, &plan, tick))?;
    Ok((adapter.into(), json(&report)?))
}

/// The table of methods: one dict each.
#[pyfunction]
pub(super) fn merge_methods(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let out = PyList::empty(py);
    let ours = METHODS.iter().map(|m| (m, vec!["exact", "mergekit"]));
    let rows = ours.chain(PEFT_METHODS.iter().map(|m| (m, vec!["peft"])));
    for (m, semantics) in rows {
        let row = PyDict::new(py);
        row.set_item("name", m.name)?;
        row.set_item("family", m.family.as_str())?;
        row.set_item("formula", m.formula)?;
        row.set_item("paper", m.paper)?;
        row.set_item("when", m.when)?;
        row.set_item("laws", m.laws)?;
        let params = PyDict::new(py);
        for (name, default) in m.params {
            params.set_item(name, default)?;
        }
        row.set_item("params", params)?;
        row.set_item("default_weights", m.weights.as_str())?;
        row.set_item("semantics", semantics)?;
        let most = (m.parents.1 != usize::MAX).then_some(m.parents.1);
        row.set_item("parents", (m.parents.0, most))?;
        out.append(row)?;
    }
    Ok(out)
}

/// The mask that random methods lay on one parent: `rows` lists of `cols` bools.
#[pyfunction]
pub(super) fn merge_mask(
    seed: u64,
    module: &str,
    parent: &str,
    rows: usize,
    cols: usize,
    density: f64,
) -> PyResult<Vec<Vec<bool>>> {
    if !(density > 0.0 && density <= 1.0) {
        return Err(Error::config("density", density, "a number in (0, 1]").into());
    }
    let flat = merge::mask(seed, module, parent, rows, cols, density);
    Ok(flat.chunks(cols.max(1)).map(<[bool]>::to_vec).collect())
}

/// Fewer ranks by a plan (JSON); returns the adapter and the report (JSON).
#[pyfunction]
pub(super) fn resize(
    py: Python<'_>,
    adapter: &Bound<'_, PyAdapter>,
    plan: &str,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<Made> {
    let plan: merge::ResizePlan = plan_of(plan)?;
    let (adapter, k) = (adapter.get().inner.clone(), Kernels::detect()?);
    let (made, report) =
        long_call(py, "resize", progress, cancel, move |tick| merge::resize(k, &adapter, &plan, tick))?;
    Ok((made.into(), json(&report)?))
}

/// Two adapters against each other, as JSON.
#[pyfunction]
pub(super) fn diff(py: Python<'_>, a: &Bound<'_, PyAdapter>, b: &Bound<'_, PyAdapter>) -> PyResult<String> {
    let (a, b, k) = (a.get().inner.clone(), b.get().inner.clone(), Kernels::detect()?);
    Ok(json(&py.detach(move || merge::diff(k, &a, &b))?)?)
}

/// The exact sum of adapters, each times a number.
#[pyfunction]
pub(super) fn combine(py: Python<'_>, terms: Vec<(Bound<'_, PyAdapter>, f64)>) -> PyResult<PyAdapter> {
    let (terms, k): (Vec<_>, _) =
        (terms.into_iter().map(|(a, c)| (a.get().inner.clone(), c)).collect(), Kernels::detect()?);
    let made =
        py.detach(move || merge::combine(k, &terms.iter().map(|(a, c)| (a, *c)).collect::<Vec<_>>()))?;
    Ok(made.into())
}

/// One adapter after another as one.
#[pyfunction]
pub(super) fn compose(
    py: Python<'_>,
    adapters: Vec<Bound<'_, PyAdapter>>,
    residual: bool,
) -> PyResult<PyAdapter> {
    let (adapters, k): (Vec<_>, _) =
        (adapters.into_iter().map(|a| a.get().inner.clone()).collect(), Kernels::detect()?);
    let made = py.detach(move || merge::sequential(k, &adapters.iter().collect::<Vec<_>>(), residual))?;
    Ok(made.into())
}
