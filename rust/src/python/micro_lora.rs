//! `MicroLora`: the live learner for Python; the public class subclasses it and adds settings and files.

use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use super::adapter::{PyAdapter, PySnapshot};
use super::array::{input, weight};
use super::calls;
use super::error::{ConfigError, DTypeError};
use super::feedback::extract;
use super::handle::ModuleHandle;
use super::long::long_call;
use super::step::PyStepResult;
use crate::learn::Instant;
use crate::micro_lora::{MicroLora, ModuleSpec, Settings};

/// rule, train, forgetting, rho, mu, kappa, baseline_rate, max_grad_norm.
type InstantTuple = (String, String, f64, f64, Option<f32>, f32, f64, Option<f32>);
/// name, in_features, out_features, rank, alpha.
type ModuleTuple = (String, usize, usize, usize, f64);

/// The compiled part of `microlora.MicroLoRA`.
#[pyclass(name = "MicroLora", module = "microlora._core", frozen, subclass)]
pub(super) struct PyMicroLora {
    inner: Arc<MicroLora>,
    shapes: Vec<(usize, usize)>,
}

impl PyMicroLora {
    pub fn inner(&self) -> &Arc<MicroLora> {
        &self.inner
    }

    #[inline]
    fn find(&self, module: Option<&str>) -> PyResult<usize> {
        match module {
            Some(name) => Ok(self.inner.find(name)?),
            None if self.shapes.len() == 1 => Ok(0),
            None => Err(ConfigError::new_err(format!(
                "module: missing, expected one of {} (only an adapter with one module may leave it out)",
                self.inner.names().join(", ")
            ))),
        }
    }
}

#[pymethods]
impl PyMicroLora {
    /// From module tuples, or from an adapter's weights.
    #[new]
    #[pyo3(signature = (modules, *, use_rslora, dtype, seed, dropout, instant))]
    fn new(
        modules: &Bound<'_, PyAny>,
        use_rslora: bool,
        dtype: &str,
        seed: u64,
        dropout: f32,
        instant: InstantTuple,
    ) -> PyResult<Self> {
        let (rule, train, forgetting, rho, mu, kappa, baseline_rate, max_grad_norm) = instant;
        let (rule, train) = (rule.parse()?, train.parse()?);
        let instant = Instant { rule, train, forgetting, rho, mu, kappa, baseline_rate, max_grad_norm };
        let settings = Settings { dropout, instant };
        let inner = if let Ok(adapter) = modules.cast::<PyAdapter>() {
            MicroLora::from_adapter(&adapter.get().inner, seed, settings)?
        } else {
            let dtype = dtype.parse()?;
            let specs: Vec<ModuleSpec> = modules
                .extract::<Vec<ModuleTuple>>()?
                .into_iter()
                .map(|(name, in_features, out_features, rank, alpha)| ModuleSpec {
                    name,
                    in_features,
                    out_features,
                    rank,
                    alpha,
                    rslora: use_rslora,
                    dtype,
                })
                .collect();
            MicroLora::new(&specs, seed, settings)?
        };
        let shapes = (0..inner.names().len()).map(|m| inner.shape(m)).collect();
        Ok(PyMicroLora { inner: Arc::new(inner), shapes })
    }

    /// What the module adds to its layer's output: ``dY = s (x A) B``.
    ///
    /// Args:
    ///     x: float32 (in_features,) or (n, in_features). Float32 C-contiguous arrays are read in place,
    ///         other floating point is copied; a batch may release the GIL.
    ///     module: Name of the module; None where there is only one.
    ///     out: float32 (out_features,) or (n, out_features) to fill: C-contiguous, writable, apart from
    ///         ``x``.
    ///
    /// Returns:
    ///     ``out``, or a new float32 array of that shape; exact zeros while B is zero or ``enabled`` is
    ///     False.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let m = self.find(module)?;
        calls::forward(py, &(&*self.inner, m), self.shapes[m], x, out)
    }

    /// ``out += dY(x)``: adds the module's part to the layer's output in place.
    ///
    /// Args:
    ///     x: float32 (in_features,) or (n, in_features).
    ///     module: Name of the module; None where there is only one.
    ///     out: float32 (out_features,) or (n, out_features), needed: C-contiguous, writable, apart from
    ///         ``x``.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward_add<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let m = self.find(module)?;
        calls::forward_add(py, &(&*self.inner, m), self.shapes[m], x, out)
    }

    /// ``dY(x)`` of several modules that read the same input, all of one version of the weights.
    ///
    /// Args:
    ///     x: float32 (in_features,) or (n, in_features).
    ///     modules: Their names; None takes those there are of q_proj, k_proj and v_proj, else of gate_proj
    ///         and up_proj.
    ///
    /// Returns:
    ///     ``{module: float32 (out_features,) or (n, out_features)}``.
    #[pyo3(signature = (x, modules = None))]
    fn forward_all<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        modules: Option<Vec<String>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let names = self.inner.names();
        let found = calls::shared(modules, |n| self.inner.find(n), || names.join(", "))?;
        let (layers, enabled) = self.inner.layers(&found);
        let of: Vec<_> = found.iter().zip(layers).map(|(&m, layer)| (names[m].as_str(), layer)).collect();
        calls::forward_all(py, self.inner.kernels(), &of, enabled, x)
    }

    fn __getitem__(&self, module: &Bound<'_, PyAny>) -> PyResult<ModuleHandle> {
        let Ok(name) = module.extract::<&str>() else {
            let kind = module.get_type();
            return Err(DTypeError::new_err(format!("module: got {kind}, expected a module's name")));
        };
        Ok(ModuleHandle::new(&self.inner, self.inner.find(name)?))
    }

    fn __contains__(&self, module: &str) -> bool {
        self.inner.find(module).is_ok()
    }

    fn __len__(&self) -> usize {
        self.shapes.len()
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        PyList::new(py, self.inner.names())?.call_method0("__iter__")
    }

    /// Module names, in order.
    fn modules(&self) -> Vec<String> {
        self.inner.names().to_vec()
    }

    /// Learns from one event by a closed form; the next ``forward`` sees it.
    ///
    /// Args:
    ///     x: float32 (in_features,): the layer's input.
    ///     feedback: A `Target`, `Gradient`, `Reward`, `Preference` or `Contrastive`.
    ///     module: Name of the module; None where there is only one.
    ///     base: float32 (out_features,): output of the frozen layer for this x (for embeddings: x itself),
    ///         so that feedback is about ``base + dY``; without it feedback is about dY alone.
    ///
    /// Returns:
    ///     What was done; an event that teaches nothing is skipped, with the reason.
    #[pyo3(signature = (x, feedback, module = None, base = None))]
    fn instant(
        &self,
        x: &Bound<'_, PyAny>,
        feedback: &Bound<'_, PyAny>,
        module: Option<&str>,
        base: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyStepResult> {
        let m = self.find(module)?;
        let feedback = extract(feedback)?;
        let x = input("x", x, Some(self.shapes[m].0), false)?;
        let base = base.map(|b| input("base", b, Some(self.shapes[m].1), false)).transpose()?;
        let base = base.as_ref().map(|b| b.as_slice());
        Ok(PyStepResult(self.inner.instant(m, x.as_slice(), &feedback.get().inner, base)?))
    }

    /// Adds one event's gradient to the module's pending sum; the weights wait for `apply_updates`.
    ///
    /// Args:
    ///     x: float32 (in_features,): the layer's input.
    ///     feedback: As in `instant`.
    ///     module: Name of the module; None where there is only one.
    ///     base: float32 (out_features,): output of the frozen layer; see `instant`.
    ///
    /// Returns:
    ///     Loss and gradient norms of the event.
    #[pyo3(signature = (x, feedback, module = None, base = None))]
    fn adapt(
        &self,
        x: &Bound<'_, PyAny>,
        feedback: &Bound<'_, PyAny>,
        module: Option<&str>,
        base: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyStepResult> {
        let m = self.find(module)?;
        let feedback = extract(feedback)?;
        let x = input("x", x, Some(self.shapes[m].0), false)?;
        let base = base.map(|b| input("base", b, Some(self.shapes[m].1), false)).transpose()?;
        let base = base.as_ref().map(|b| b.as_slice());
        Ok(PyStepResult(self.inner.adapt(m, x.as_slice(), &feedback.get().inner, base)?))
    }

    /// ``W -= lr * mean`` of the pending gradients of every module, then forgets them.
    ///
    /// Args:
    ///     lr: Learning rate, 0 or above.
    ///     max_grad_norm: Scale the mean gradients of all modules together down to this norm.
    ///
    /// Returns:
    ///     How many events were applied.
    #[pyo3(signature = (lr, max_grad_norm = None))]
    fn apply_updates(&self, lr: f64, max_grad_norm: Option<f64>) -> PyResult<u64> {
        Ok(self.inner.apply_updates(lr, max_grad_norm)?)
    }

    /// Sets A to the top right singular vectors of unlabelled inputs (the idea of EVA, arXiv 2410.07170).
    ///
    /// Args:
    ///     x: float32 (n, in_features), n at least the rank.
    ///     module: Name of the module; None where there is only one.
    ///     progress: Called with ``(done, total, message)`` between steps.
    ///     cancel: A `CancelToken`; once it is set, nothing changes.
    ///
    /// Returns:
    ///     The share of ``|x|^2`` that the rank holds, 0 to 1.
    #[pyo3(signature = (x, module = None, progress = None, cancel = None))]
    fn fit_input_basis(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        module: Option<&str>,
        progress: Option<Py<PyAny>>,
        cancel: Option<Py<PyAny>>,
    ) -> PyResult<f64> {
        let m = self.find(module)?;
        let x = input("X", x, Some(self.shapes[m].0), true)?;
        let x = x.as_slice();
        long_call(py, "fit_input_basis", progress, cancel, |tick| self.inner.fit_input_basis(m, x, tick))
    }

    /// The change of the layer's weight, ``s (A B)^T``, in the orientation of torch and PEFT.
    #[pyo3(signature = (module = None))]
    fn delta_weight<'py>(&self, py: Python<'py>, module: Option<&str>) -> PyResult<Bound<'py, PyAny>> {
        let m = self.find(module)?;
        calls::delta_weight(py, self.inner.kernels(), &self.inner.layer(m).0)
    }

    /// ``w += delta_weight()`` in place, without the array between.
    ///
    /// Args:
    ///     w: float32 (out_features, in_features), C-contiguous and writable: the base layer's weight.
    ///     module: Name of the module; None where there is only one.
    #[pyo3(signature = (w, module = None))]
    fn fuse_into(&self, py: Python<'_>, w: &Bound<'_, PyAny>, module: Option<&str>) -> PyResult<()> {
        self.add_delta(py, w, module, 1.0)
    }

    /// ``w -= delta_weight()`` in place: undoes `fuse_into` to 1e-6 of ``max(|w|, |delta|)``.
    #[pyo3(signature = (w, module = None))]
    fn unfuse_from(&self, py: Python<'_>, w: &Bound<'_, PyAny>, module: Option<&str>) -> PyResult<()> {
        self.add_delta(py, w, module, -1.0)
    }

    /// Weights and learner state, with these settings attached.
    #[pyo3(signature = (config_json = None, metadata_json = None))]
    fn snapshot(
        slf: &Bound<'_, Self>,
        config_json: Option<String>,
        metadata_json: Option<String>,
    ) -> PyResult<Py<PySnapshot>> {
        let mut inner = slf.get().inner.snapshot();
        inner.adapter.config_json = config_json;
        inner.adapter.metadata_json = metadata_json;
        let adapter = PyAdapter::from(inner.adapter.clone());
        Py::new(slf.py(), PyClassInitializer::from(adapter).add_subclass(PySnapshot { inner }))
    }

    /// Goes back to a snapshot, or takes an adapter's weights.
    ///
    /// Args:
    ///     source: A value with the same modules, shapes, ranks, alphas and dtypes.
    fn restore(&self, source: &Bound<'_, PyAny>) -> PyResult<()> {
        if let Ok(s) = source.cast::<PySnapshot>() {
            return Ok(self.inner.restore(&s.get().inner)?);
        }
        match source.cast::<PyAdapter>() {
            Ok(a) => Ok(self.inner.restore_adapter(&a.get().inner)?),
            Err(_) => {
                let kind = source.get_type();
                Err(DTypeError::new_err(format!("source: got {kind}, expected a Snapshot or an Adapter")))
            }
        }
    }

    /// The present weights, with these settings attached.
    #[pyo3(signature = (config_json = None, metadata_json = None))]
    fn adapter(&self, config_json: Option<String>, metadata_json: Option<String>) -> PyAdapter {
        let adapter = self.inner.adapter();
        PyAdapter::from(crate::adapter::Adapter { config_json, metadata_json, ..adapter })
    }

    /// What forward reads: the weights in ``dtype``, while learning goes on in float32.
    fn set_storage(&self, dtype: &str) -> PyResult<()> {
        self.inner.set_storage(dtype.parse()?);
        Ok(())
    }

    /// Numbers in all factors.
    #[getter]
    fn param_count(&self) -> usize {
        self.inner.param_count()
    }

    /// Bytes resident now: weights, float32 masters, RLS state and pending gradients.
    #[getter]
    fn memory_bytes(&self) -> usize {
        self.inner.memory_bytes()
    }

    /// Counts every change of the weights.
    #[getter]
    fn version(&self) -> u64 {
        self.inner.version()
    }

    /// Whether ``forward`` gives the adapter's output; while False zeros. Learning goes on.
    #[getter]
    fn get_enabled(&self) -> bool {
        self.inner.enabled()
    }

    #[setter]
    fn set_enabled(&self, enabled: &Bound<'_, PyAny>) -> PyResult<()> {
        let Ok(on) = enabled.extract::<bool>() else {
            let kind = enabled.get_type();
            return Err(DTypeError::new_err(format!("enabled: got {kind}, expected True or False")));
        };
        self.inner.set_enabled(on);
        Ok(())
    }

    /// Events by kind: instant, adapt, apply, skipped.
    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let c = self.inner.counters();
        let out = PyDict::new(py);
        for (name, n) in
            [("instant", c.instant), ("adapt", c.adapt), ("apply", c.apply), ("skipped", c.skipped)]
        {
            out.set_item(name, n)?;
        }
        Ok(out)
    }

    fn __hash__(&self) -> PyResult<u64> {
        Err(PyTypeError::new_err("unhashable: a MicroLoRA changes as it learns; hash its adapter() instead"))
    }
}

impl PyMicroLora {
    fn add_delta(
        &self,
        py: Python<'_>,
        w: &Bound<'_, PyAny>,
        module: Option<&str>,
        sign: f32,
    ) -> PyResult<()> {
        let (m, k) = (self.find(module)?, self.inner.kernels());
        let (layer, (n_in, n_out)) = (self.inner.layer(m).0, self.shapes[m]);
        let mut w = weight(w, n_out, n_in)?;
        let w = w.as_mut_slice();
        if !k.all_finite(w) {
            return Err(crate::Error::non_finite("w").into());
        }
        py.detach(|| layer.add_delta(k, w, sign));
        Ok(())
    }
}
