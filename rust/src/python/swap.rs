//! `HotSwap`: generations of an adapter for Python; the public class subclasses it and adds files and threads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::adapter::{PyAdapter, factor_array};
use super::calls;
use super::error::{ConfigError, DTypeError};
use super::long::long_call;
use crate::adapter::Adapter;
use crate::error::Error;
use crate::layer::Layer;
use crate::swap::{Generation, HotSwap, Swapped};

/// Frees a value without the GIL; whether there was one. Locks are only ever taken with the GIL held, so that
/// none is held by another thread when a process forks.
fn free<T: Send>(py: Python<'_>, value: Option<T>) -> bool {
    let some = value.is_some();
    py.detach(|| drop(value));
    some
}

/// Frees what a change let go of, and gives the numbers before and after.
fn settle(py: Python<'_>, done: Swapped) -> (u64, u64) {
    let numbers = (done.old, done.new);
    py.detach(|| drop(done));
    numbers
}

fn shape(layer: &Layer) -> (usize, usize) {
    (layer.in_features(), layer.out_features())
}

/// The layer of a module by name, or the only one.
fn layer_of<'a>(generation: &'a Generation, module: Option<&str>) -> PyResult<&'a Arc<Layer>> {
    let Some(name) = module else {
        let mut names = generation.names();
        return match (names.next(), names.next()) {
            (Some(only), None) => Ok(generation.layer(only)?),
            (None, _) => Err(generation.lacks("").into()),
            _ => Err(ConfigError::new_err(format!(
                "module: missing, expected one of {} (only an adapter with one module may leave it out)",
                generation.names().collect::<Vec<_>>().join(", ")
            ))),
        };
    };
    Ok(generation.layer(name)?)
}

fn forward_all<'py>(
    py: Python<'py>,
    swap: &HotSwap,
    generation: &Generation,
    x: &Bound<'py, PyAny>,
    modules: Option<Vec<String>>,
) -> PyResult<Bound<'py, PyDict>> {
    let list = || generation.names().collect::<Vec<_>>().join(", ");
    let find = |name: &str| {
        generation.layer(name)?;
        let mut names = generation.names();
        Ok(names.position(|n| n == name).expect("it has a layer"))
    };
    let found = calls::shared(modules, find, list)?;
    let names: Vec<&str> = generation.names().collect();
    let of = |&m: &usize| Ok((names[m], Arc::clone(generation.layer(names[m])?)));
    let of = found.iter().map(of).collect::<crate::Result<Vec<_>>>()?;
    calls::forward_all(py, swap.kernels(), &of, true, x)
}

/// The compiled part of `microlora.HotSwapManager`.
#[pyclass(name = "HotSwap", module = "microlora._core", frozen, subclass)]
pub(super) struct PyHotSwap {
    inner: Arc<HotSwap>,
}

impl PyHotSwap {
    pub fn inner(&self) -> &Arc<HotSwap> {
        &self.inner
    }

    fn adapter(adapter: Option<Arc<Adapter>>) -> Option<PyAdapter> {
        adapter.map(|a| PyAdapter::from((*a).clone()))
    }
}

#[pymethods]
impl PyHotSwap {
    /// A manager without an adapter.
    #[new]
    #[pyo3(signature = (*, keep_previous))]
    fn new(keep_previous: bool) -> PyResult<Self> {
        Ok(PyHotSwap { inner: Arc::new(HotSwap::new(keep_previous)?) })
    }

    /// What the module adds to its layer's output: ``dY = s (x A) B``, of the active generation.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let generation = self.inner.load();
        let layer = layer_of(&generation, module)?;
        calls::forward(py, &(self.inner.kernels(), layer), shape(layer), x, out)
    }

    /// ``out += dY(x)`` of the active generation.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward_add<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let generation = self.inner.load();
        let layer = layer_of(&generation, module)?;
        calls::forward_add(py, &(self.inner.kernels(), layer), shape(layer), x, out)
    }

    /// ``dY(x)`` of several modules that read the same input, all of one generation.
    #[pyo3(signature = (x, modules = None))]
    fn forward_all<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        modules: Option<Vec<String>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        forward_all(py, &self.inner, &self.inner.load(), x, modules)
    }

    fn __getitem__(&self, module: &Bound<'_, PyAny>) -> PyResult<SwapHandle> {
        let Ok(name) = module.extract::<&str>() else {
            let kind = module.get_type();
            return Err(DTypeError::new_err(format!("module: got {kind}, expected a module's name")));
        };
        Ok(SwapHandle { slot: self.inner.slot(name)?, swap: Arc::clone(&self.inner), name: name.into() })
    }

    fn __contains__(&self, module: &str) -> bool {
        self.inner.load().layer(module).is_ok()
    }

    fn __len__(&self) -> usize {
        self.inner.load().names().len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        PyList::new(py, self.modules())?.call_method0("__iter__")
    }

    /// Module names of the active generation, in order.
    fn modules(&self) -> Vec<String> {
        self.inner.load().names().map(String::from).collect()
    }

    /// Number of the active generation: 0 before the first adapter, one more with every change.
    #[getter]
    fn generation(&self) -> u64 {
        self.inner.generation()
    }

    /// Generations that are not freed: the active one, the one before, and older ones that readers hold.
    #[getter]
    fn live_generations(&self) -> usize {
        self.inner.live_generations()
    }

    /// Whether the generation before the active one is kept for `rollback`.
    #[getter]
    fn keep_previous(&self) -> bool {
        self.inner.keep_previous()
    }

    #[setter]
    fn set_keep_previous(&self, py: Python<'_>, keep: bool) {
        free(py, self.inner.set_keep_previous(keep));
    }

    /// Lets go of what is kept for `rollback`; whether there was anything.
    fn forget_previous(&self, py: Python<'_>) -> bool {
        free(py, self.inner.forget_previous())
    }

    /// Lets the standby go; whether there was one.
    fn discard_standby(&self, py: Python<'_>) -> bool {
        free(py, self.inner.discard_standby())
    }

    /// Whether a preparation or a change is under way.
    #[getter]
    fn is_swapping(&self) -> bool {
        self.inner.activity.is_busy()
    }

    fn _begin(&self) {
        self.inner.activity.begin();
    }

    fn _end(&self) {
        self.inner.activity.end();
    }

    fn _active(&self) -> Option<PyAdapter> {
        Self::adapter(self.inner.pin().adapter().cloned())
    }

    fn _previous(&self) -> Option<PyAdapter> {
        Self::adapter(self.inner.previous())
    }

    fn _standby(&self) -> Option<PyAdapter> {
        Self::adapter(self.inner.standby())
    }

    /// Looks an adapter over before it may serve; reads every number, without the GIL.
    #[pyo3(signature = (adapter, reshape, progress = None, cancel = None))]
    fn _check(
        &self,
        py: Python<'_>,
        adapter: &PyAdapter,
        reshape: bool,
        progress: Option<Py<PyAny>>,
        cancel: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let (swap, adapter) = (&self.inner, &adapter.inner);
        long_call(py, "checking the adapter", progress, cancel, |tick| swap.check(adapter, reshape, tick))
    }

    /// Whether ``expected`` is the active generation.
    fn _expect(&self, expected: u64) -> PyResult<()> {
        Ok(self.inner.expect(expected)?)
    }

    /// The exchange, for an adapter that `_check` has seen.
    fn _publish(
        &self,
        py: Python<'_>,
        adapter: &PyAdapter,
        expected: Option<u64>,
        reshape: bool,
    ) -> PyResult<(u64, u64)> {
        Ok(settle(py, self.inner.publish(Arc::new(adapter.inner.clone()), expected, reshape)?))
    }

    /// Number for a preparation that starts now.
    fn _ticket(&self) -> u64 {
        self.inner.ticket()
    }

    /// Lets an adapter that `_check` has seen stand by.
    fn _install(&self, py: Python<'_>, adapter: &PyAdapter, ticket: u64, reshape: bool) -> PyResult<()> {
        free(py, self.inner.install(Arc::new(adapter.inner.clone()), ticket, reshape)?);
        Ok(())
    }

    fn _swap(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        Ok(settle(py, self.inner.swap()?))
    }

    fn _rollback(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        Ok(settle(py, self.inner.rollback()?))
    }
}

/// One module of a `HotSwapManager`, found once; every call reads the generation that is active then.
#[pyclass(module = "microlora", frozen)]
pub(super) struct SwapHandle {
    swap: Arc<HotSwap>,
    slot: usize,
    name: String,
}

impl SwapHandle {
    /// Runs `f` on the module's layer in the active generation.
    #[inline]
    fn with<R>(&self, f: impl FnOnce(&Arc<Layer>) -> PyResult<R>) -> PyResult<R> {
        let generation = self.swap.load();
        match generation.slot(self.slot) {
            Some(layer) => f(layer),
            None => Err(generation.lacks(&self.name).into()),
        }
    }
}

#[pymethods]
impl SwapHandle {
    /// ``dY(x)`` of the active generation; see `HotSwap.forward`, without the lookup of a name.
    #[pyo3(signature = (x, out = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.with(|l| calls::forward(py, &(self.swap.kernels(), l), shape(l), x, out))
    }

    /// ``out += dY(x)`` of the active generation.
    #[pyo3(signature = (x, out))]
    fn forward_add<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
    ) -> PyResult<()> {
        self.with(|l| calls::forward_add(py, &(self.swap.kernels(), l), shape(l), x, Some(out)))
    }

    /// float32 (out_features, in_features): the change of the weight, ``s (A B)^T``, a new array.
    fn delta_weight<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.with(|l| calls::delta_weight(py, self.swap.kernels(), l))
    }

    /// Name of the module.
    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    /// A as float32 (rank, in_features), C-contiguous, a read-only copy.
    #[getter]
    fn lora_a<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.with(|l| factor_array(py, &l.a, false))
    }

    /// B as float32 (out_features, rank), C-contiguous, a read-only copy.
    #[getter]
    fn lora_b<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.with(|l| factor_array(py, &l.b, true))
    }

    /// Rank r of the update.
    #[getter]
    fn rank(&self) -> PyResult<usize> {
        self.with(|l| Ok(l.rank()))
    }

    /// ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA (arXiv 2312.03732).
    #[getter]
    fn scaling(&self) -> PyResult<f32> {
        self.with(|l| Ok(l.scaling()))
    }

    /// Width of x.
    #[getter]
    fn in_features(&self) -> PyResult<usize> {
        self.with(|l| Ok(l.in_features()))
    }

    /// Width of the output.
    #[getter]
    fn out_features(&self) -> PyResult<usize> {
        self.with(|l| Ok(l.out_features()))
    }

    fn __repr__(&self) -> String {
        let generation = self.swap.load();
        let what = generation.slot(self.slot).map_or_else(
            || "not in it".into(),
            |l| format!("{} -> {}, rank={}", l.in_features(), l.out_features(), l.rank()),
        );
        format!("SwapHandle({:?}, generation {}: {what})", self.name, generation.number())
    }
}

/// One generation, held until it is released.
#[pyclass(name = "Generation", module = "microlora._core", frozen, subclass, weakref)]
pub(super) struct PyGeneration {
    swap: Arc<HotSwap>,
    number: u64,
    held: Mutex<Option<Arc<Generation>>>,
}

impl PyGeneration {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Generation>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self) -> PyResult<Arc<Generation>> {
        self.lock().clone().ok_or_else(|| {
            let reason = format!("generation {}: was released, expected one that is pinned", self.number);
            Error::Swap { reason, generation: self.swap.generation() }.into()
        })
    }
}

#[pymethods]
impl PyGeneration {
    /// Pins the active generation of a manager.
    #[new]
    fn new(manager: &PyHotSwap) -> Self {
        let (swap, held) = (Arc::clone(&manager.inner), manager.inner.pin());
        PyGeneration { swap, number: held.number(), held: Mutex::new(Some(held)) }
    }

    /// Its number.
    #[getter]
    fn number(&self) -> u64 {
        self.number
    }

    fn _adapter(&self) -> PyResult<Option<PyAdapter>> {
        Ok(PyHotSwap::adapter(self.get()?.adapter().cloned()))
    }

    /// Module names, in order.
    fn modules(&self) -> PyResult<Vec<String>> {
        Ok(self.get()?.names().map(String::from).collect())
    }

    /// ``dY(x)`` of this generation; see `HotSwap.forward`.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let generation = self.get()?;
        let layer = layer_of(&generation, module)?;
        calls::forward(py, &(self.swap.kernels(), layer), shape(layer), x, out)
    }

    /// ``out += dY(x)`` of this generation.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward_add<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let generation = self.get()?;
        let layer = layer_of(&generation, module)?;
        calls::forward_add(py, &(self.swap.kernels(), layer), shape(layer), x, out)
    }

    /// ``dY(x)`` of several modules that read the same input.
    #[pyo3(signature = (x, modules = None))]
    fn forward_all<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        modules: Option<Vec<String>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        forward_all(py, &self.swap, &*self.get()?, x, modules)
    }

    /// Lets go of the generation; calls that are running on it finish.
    fn release(&self, py: Python<'_>) {
        let held = self.lock().take();
        free(py, held);
    }

    /// Whether `release` was called.
    #[getter]
    fn released(&self) -> bool {
        self.lock().is_none()
    }
}

/// Medians and 99th percentiles in nanoseconds without Python, for benches.
#[pyfunction]
pub(super) fn probe_swap<'py>(
    py: Python<'py>,
    adapter: &PyAdapter,
    readers: usize,
    swapping: bool,
    seconds: f64,
) -> PyResult<Bound<'py, PyDict>> {
    let adapter = Arc::new(adapter.inner.clone());
    let p = py.detach(|| crate::probe::swap_ns(&adapter, readers, swapping, seconds))?;
    let out = PyDict::new(py);
    for (name, (median, p99)) in [("swap", p.swap), ("free", p.free), ("read", p.read)] {
        out.set_item(name, median)?;
        out.set_item(format!("{name}_p99"), p99)?;
    }
    out.set_item("swaps_per_second", p.swaps_per_second)?;
    Ok(out)
}
