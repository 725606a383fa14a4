//! `Ewc` for Python, and the penalty as training takes it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::array::{input, read_only};
use super::chain::PyChain;
use super::dataset::Rows;
use super::error::DTypeError;
use super::feedback::extract;
use super::long::long_call;
use super::micro_lora::PyMicroLora;
use super::step::PyStepResult;
use crate::chain::Pass;
use crate::ewc::{Ewc, EwcSettings, Kind};
use crate::factor::Factor;
use crate::format::{Tensor, TensorDtype};
use crate::kernels::Kernels;
use crate::learn::Regularizer;
use crate::micro_lora::MicroLora;

/// Name, shape and float32 bytes of a tensor that travels along.
type Extra<'py> = Vec<(String, Vec<usize>, Bound<'py, PyBytes>)>;
/// A read-only array of A's layout and one of B's.
type Arrays<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

/// The compiled part of `microlora.EwcPlusPlus`.
#[pyclass(name = "Ewc", module = "microlora._core", frozen, subclass)]
pub(super) struct PyEwc {
    pub inner: Arc<Mutex<Ewc>>,
    lora: Arc<MicroLora>,
}

// No call holds this lock while it waits for the GIL, so it may be waited for with the GIL held.
pub(super) fn lock(inner: &Mutex<Ewc>) -> MutexGuard<'_, Ewc> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PyEwc {
    fn find(&self, module: Option<&str>) -> PyResult<usize> {
        match module {
            Some(name) => Ok(self.lora.find(name)?),
            None if self.lora.names().len() == 1 => Ok(0),
            None => Err(crate::Error::config(
                "module",
                "nothing",
                format!("one of {}", self.lora.names().join(", ")),
            )
            .into()),
        }
    }

    fn kernels(&self) -> &'static Kernels {
        self.lora.kernels()
    }
}

/// A in (rank, in) and B in PEFT's (out, rank).
fn arrays<'py>(py: Python<'py>, [a, b]: &[Factor; 2]) -> PyResult<Arrays<'py>> {
    let b = read_only(py, b.to_f32(true), &[b.len(), b.rank()])?;
    Ok((read_only(py, a.to_f32(false), &[a.rank(), a.len()])?, b))
}

#[pymethods]
impl PyEwc {
    #[new]
    #[pyo3(signature = (lora, *, ewc_lambda, kind, gamma, fisher, fisher_normalize, fisher_decay, step, anchors,
        fisher_samples, seed))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        lora: &Bound<'_, PyMicroLora>,
        ewc_lambda: Option<f64>,
        kind: &str,
        gamma: f64,
        fisher: &str,
        fisher_normalize: &str,
        fisher_decay: Option<f64>,
        step: &str,
        anchors: &str,
        fisher_samples: Option<u64>,
        seed: u64,
    ) -> PyResult<Self> {
        let kind: Kind = kind.parse()?;
        let settings = EwcSettings {
            lambda: ewc_lambda.unwrap_or(kind.row().lambda),
            kind,
            gamma,
            fisher: fisher.parse()?,
            normalize: fisher_normalize.parse()?,
            decay: fisher_decay,
            step: step.parse()?,
            anchors: anchors.parse()?,
            samples: fisher_samples,
            seed,
        };
        let lora = Arc::clone(lora.get().inner());
        Ok(PyEwc { inner: Arc::new(Mutex::new(Ewc::new(&lora, settings)?)), lora })
    }

    /// `MicroLora.adapt` on its learner, and the squares of the same gradient, in one pass.
    #[pyo3(signature = (x, feedback, module = None, base = None))]
    fn adapt(
        &self,
        x: &Bound<'_, PyAny>,
        feedback: &Bound<'_, PyAny>,
        module: Option<&str>,
        base: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<PyStepResult> {
        let m = self.find(module)?;
        let (n_in, n_out) = self.lora.shape(m);
        let feedback = extract(feedback)?;
        let x = input("x", x, Some(n_in), false)?;
        let base = base.map(|b| input("base", b, Some(n_out), false)).transpose()?;
        let base = base.as_ref().map(|b| b.as_slice());
        let feedback = &feedback.get().inner;
        Ok(PyStepResult(self.lora.adapt_observed(m, x.as_slice(), feedback, base, Some(&self.inner))?))
    }

    /// One event; whether it was counted.
    #[pyo3(signature = (x, feedback, module, base))]
    fn observe_event(
        &self,
        x: &Bound<'_, PyAny>,
        feedback: &Bound<'_, PyAny>,
        module: Option<&str>,
        base: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<bool> {
        let m = self.find(module)?;
        let (n_in, n_out) = self.lora.shape(m);
        let feedback = extract(feedback)?;
        let x = input("x", x, Some(n_in), false)?;
        let base = base.map(|b| input("base", b, Some(n_out), false)).transpose()?;
        let base = base.as_ref().map(|b| b.as_slice());
        Ok(self.lora.observe(m, x.as_slice(), &feedback.get().inner, base, &self.inner)?.applied)
    }

    /// A batch of per-sample gradients, one array per pass; without any the gradients of `|y|^2`.
    #[pyo3(signature = (x, passes, module, base))]
    fn observe_batch(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        passes: Option<Vec<Bound<'_, PyAny>>>,
        module: Option<&str>,
        base: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let m = self.find(module)?;
        let (n_in, n_out) = self.lora.shape(m);
        let x = input("x", x, Some(n_in), true)?;
        let base = base.map(|b| input("base", b, Some(n_out), true)).transpose()?;
        let x = x.as_slice();
        let masters = self.lora.masters();
        let k = self.kernels();
        let Some(passes) = passes else {
            let base = base.as_ref().map(|b| b.as_slice());
            return Ok(py.detach(|| lock(&self.inner).observe_outputs(k, m, &masters[m], x, base))?);
        };
        let rows: Vec<_> =
            passes.iter().map(|g| input("feedback", g, Some(n_out), true)).collect::<PyResult<_>>()?;
        for g in &rows {
            let (got, want) = (g.as_slice().len() / n_out, x.len() / n_in);
            if got != want {
                let want = format!("({want}, {n_out}), a row for each of x");
                return Err(crate::Error::shape("feedback", format!("({got}, {n_out})"), want).into());
            }
        }
        let rows: Vec<&[f32]> = rows.iter().map(|g| g.as_slice()).collect();
        Ok(py.detach(|| lock(&self.inner).close_one(k, m, &masters[m], x, &rows))?)
    }

    /// A batch through a chain, over the labels that the settings ask for.
    #[pyo3(signature = (chain, x, y, progress = None, cancel = None))]
    fn observe_chain<'py>(
        &self,
        py: Python<'py>,
        chain: &Bound<'py, PyChain>,
        x: &Bound<'py, PyAny>,
        y: &Bound<'py, PyAny>,
        progress: Option<Py<PyAny>>,
        cancel: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let chain = chain.get().inner();
        let rows = Rows::of(x, y, None, None)?;
        let data = rows.data();
        long_call(py, "accumulate_fisher", progress, cancel, |tick| {
            chain.accumulate_importance(&data, &self.inner, &mut Pass::default(), tick)
        })
    }

    /// ``lambda Omega`` at the learner's present weights.
    fn penalty(&self) -> f64 {
        let masters = self.lora.masters();
        lock(&self.inner).penalty(self.kernels(), &masters)
    }

    /// Gradient of the penalty: ``{module: (of A (rank, in), of B (out, rank))}``.
    fn penalty_grad<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (masters, k, out) = (self.lora.masters(), self.kernels(), PyDict::new(py));
        for (m, (name, layer)) in self.lora.names().iter().zip(&masters).enumerate() {
            let gradient = lock(&self.inner).penalty_gradient(k, m, layer);
            out.set_item(name, arrays(py, &gradient)?)?;
        }
        Ok(out)
    }

    /// Ends the running task: its importance joins the earlier ones, the anchor moves to the present weights.
    fn start_new_task(&self) -> PyResult<()> {
        let masters = self.lora.masters();
        Ok(lock(&self.inner).start_new_task(self.kernels(), &masters)?)
    }

    /// Means of squares of the running task; None without samples or for kinds that keep none.
    fn task_fisher<'py>(&self, py: Python<'py>, module: Option<&str>) -> PyResult<Option<Arrays<'py>>> {
        let m = self.find(module)?;
        let fisher = lock(&self.inner).task_fisher(self.kernels(), m);
        fisher.map(|f| arrays(py, &f)).transpose()
    }

    /// Means of x^2 (in,) and g^2 (out,) over all samples so far, and their number.
    fn moments<'py>(
        &self,
        py: Python<'py>,
        module: Option<&str>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>, u64)> {
        let m = self.find(module)?;
        let ([a, c], n) = lock(&self.inner).moments(self.kernels(), m);
        let array = |v: Vec<f64>| {
            let n = v.len();
            read_only(py, v.into_iter().map(|v| v as f32).collect(), &[n])
        };
        Ok((array(a)?, array(c)?, n))
    }

    /// The state as safetensors bytes, with float32 tensors and a text that travel along.
    fn export<'py>(
        &self,
        py: Python<'py>,
        extra: Extra<'py>,
        note: Option<&str>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let tensors = extra
            .into_iter()
            .map(|(name, shape, data)| Tensor::new(name, TensorDtype::F32, shape, data.as_bytes().to_vec()))
            .collect::<crate::Result<Vec<_>>>()?;
        let bytes = lock(&self.inner).export(self.kernels(), &tensors, note)?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Takes ``export``'s bytes; returns what travelled along.
    fn restore<'py>(
        &self,
        py: Python<'py>,
        data: &Bound<'py, PyAny>,
    ) -> PyResult<(Extra<'py>, Option<String>)> {
        let (extra, note) = lock(&self.inner).import(bytes_of(data)?)?;
        let tensors = extra.into_iter().map(|t| (t.name, t.shape, PyBytes::new(py, &t.data)));
        Ok((tensors.collect(), note))
    }

    /// Settings of a state as JSON.
    #[staticmethod]
    fn settings_of(data: &Bound<'_, PyAny>) -> PyResult<String> {
        Ok(EwcSettings::of_state(bytes_of(data)?)?.to_json())
    }

    /// Settings as JSON.
    #[getter]
    fn settings_json(&self) -> String {
        lock(&self.inner).settings().to_json()
    }

    /// Tasks closed so far.
    #[getter]
    fn task_count(&self) -> u64 {
        lock(&self.inner).task_count()
    }

    /// Samples of the running task that were counted.
    #[getter]
    fn n_samples(&self) -> u64 {
        lock(&self.inner).samples()
    }

    /// Samples of the running task beyond ``fisher_samples``.
    #[getter]
    fn ignored_samples(&self) -> u64 {
        lock(&self.inner).ignored()
    }

    /// Largest F over all weights.
    #[getter]
    fn max_importance(&self) -> f64 {
        lock(&self.inner).max_importance()
    }

    /// Whether the penalty pulls: a task is closed and lambda is above 0.
    #[getter]
    fn is_active(&self) -> bool {
        lock(&self.inner).is_active()
    }

    /// Bytes resident, summed over modules.
    #[getter]
    fn memory_bytes(&self) -> usize {
        lock(&self.inner).memory_bytes()
    }
}

fn bytes_of<'a>(data: &'a Bound<'_, PyAny>) -> PyResult<&'a [u8]> {
    match data.cast::<PyBytes>() {
        Ok(bytes) => Ok(bytes.as_bytes()),
        Err(_) => Err(DTypeError::new_err(format!("data: got {}, expected bytes", data.get_type()))),
    }
}
