//! `ReplayMemory`: rows of earlier tasks that training goes on with.

use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::array::read_only;
use super::dataset::{Rows, Target, integers};
use crate::error::Error;
use crate::learn::train::Workspace;
use crate::learn::{ReplayMemory, ReplaySettings};

/// A uniform draw of the rows of earlier tasks.
#[pyclass(name = "ReplayMemory", module = "microlora._core", frozen)]
pub(super) struct PyReplayMemory {
    inner: Mutex<ReplayMemory>,
}

impl PyReplayMemory {
    // No call holds this lock while it waits for the GIL, so it may be waited for with the GIL held.
    pub fn lock(&self) -> MutexGuard<'_, ReplayMemory> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn array<'py>(&self, py: Python<'py>, v: fn(&ReplayMemory) -> &[f32]) -> PyResult<Bound<'py, PyAny>> {
        let memory = self.lock().clone();
        let (rows, v) = (memory.kept().rows(), v(&memory).to_vec());
        let width = v.len().checked_div(rows).unwrap_or(0);
        read_only(py, v, &[rows, width])
    }
}

#[pymethods]
impl PyReplayMemory {
    /// An empty memory.
    #[new]
    #[pyo3(signature = (*, capacity, label_weight, logit_weight, seed))]
    fn new(capacity: usize, label_weight: f64, logit_weight: f64, seed: u64) -> PyResult<Self> {
        let settings = ReplaySettings { capacity, label_weight, logit_weight, seed };
        Ok(PyReplayMemory { inner: Mutex::new(ReplayMemory::new(settings)?) })
    }

    fn __len__(&self) -> usize {
        self.lock().kept().rows()
    }

    /// Rows that are kept at most.
    #[getter]
    fn capacity(&self) -> usize {
        self.lock().settings().capacity
    }

    /// Rows that were offered so far.
    #[getter]
    fn seen(&self) -> u64 {
        self.lock().seen()
    }

    /// Resident bytes of the rows.
    #[getter]
    fn memory_bytes(&self) -> usize {
        self.lock().memory_bytes()
    }

    /// Number of each row in the stream.
    #[getter]
    fn places<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        let places: Vec<i64> = self.lock().kept().places.iter().map(|p| *p as i64).collect();
        places.into_pyarray(py)
    }

    /// Inputs.
    #[getter]
    fn x<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, |m| &m.kept().x)
    }

    /// Wanted outputs less base, or labels.
    #[getter]
    fn y<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let labels = self.lock().kept().labels.clone();
        if labels.is_empty() {
            return self.array(py, |m| &m.kept().targets);
        }
        Ok(labels.into_pyarray(py).into_any())
    }

    /// What the adapter answered.
    #[getter]
    fn outputs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.array(py, |m| &m.kept().outputs)
    }

    /// Weight of each row's loss.
    #[getter]
    fn weights<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        let weights = self.lock().kept().weights.clone();
        weights.into_pyarray(py)
    }

    /// Shows rows as the next of the stream.
    #[pyo3(signature = (target, x, y, rows=None, *, modules=None, weights=None, base=None))]
    #[allow(clippy::too_many_arguments)]
    fn offer(
        &self,
        py: Python<'_>,
        target: &Bound<'_, PyAny>,
        x: &Bound<'_, PyAny>,
        y: &Bound<'_, PyAny>,
        rows: Option<&Bound<'_, PyAny>>,
        modules: Option<Vec<String>>,
        weights: Option<&Bound<'_, PyAny>>,
        base: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let target = Target::of(target)?;
        let held = Rows::of(x, y, base, weights)?;
        let trainee = target.trainee(modules, held.widths())?;
        let order: Vec<usize> = match rows {
            None => (0..held.rows).collect(),
            Some(rows) => integers("rows", rows)?
                .into_iter()
                .map(|row| usize::try_from(row).map_err(|_| Error::config("rows", row, "rows from 0")))
                .collect::<Result<_, _>>()?,
        };
        let data = held.data();
        py.detach(|| self.lock().offer(&*trainee, &data, &order, &mut Workspace::default()))?;
        Ok(())
    }

    /// Refuses rows that cannot stand beside those that are kept.
    #[pyo3(signature = (target, x, y, *, modules=None))]
    fn check(
        &self,
        target: &Bound<'_, PyAny>,
        x: &Bound<'_, PyAny>,
        y: &Bound<'_, PyAny>,
        modules: Option<Vec<String>>,
    ) -> PyResult<()> {
        let target = Target::of(target)?;
        let held = Rows::of(x, y, None, None)?;
        let trainee = target.trainee(modules, held.widths())?;
        let memory = self.lock().clone();
        memory.check(&*trainee, &held.data())?;
        Ok(())
    }

    /// The same rows and draws in another object.
    fn copy(&self) -> Self {
        PyReplayMemory { inner: Mutex::new(self.lock().clone()) }
    }

    /// Rows, settings and where the draws stand.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.lock().to_bytes()?))
    }

    /// Goes on where ``to_bytes`` stood.
    fn restore(&self, data: &[u8]) -> PyResult<()> {
        self.lock().restore(data)?;
        Ok(())
    }
}
