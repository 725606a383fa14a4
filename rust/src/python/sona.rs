//! `Sona`: the three loops for Python; the public class subclasses it and adds text, threads and files.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyList, PyString};

use super::adaptation::PyAdaptation;
use super::adapter::PyAdapter;
use super::array::{input, new_rows, new_vector, output, read_only};
use super::bandit::PyChoice;
use super::calls;
use super::error::{ConfigError, FeedbackError};
use super::feedback::{extract, wrap};
use super::micro_lora::PyMicroLora;
use super::swap::PyHotSwap;
use crate::adapter::Adapter;
use crate::journal::{Fsync, Options, Retain};
use crate::sona::{Event, Forgotten, Settings, Sona, config_of};

/// The compiled part of `microlora.sona.SonaLoop`.
#[pyclass(name = "Sona", module = "microlora._core", frozen, subclass)]
pub(super) struct PySona {
    inner: Arc<Sona>,
    shapes: Vec<(usize, usize)>,
}

impl PySona {
    fn find(&self, module: Option<&str>) -> PyResult<usize> {
        match module {
            Some(name) => Ok(self.inner.lora().find(name)?),
            None if self.shapes.len() == 1 => Ok(0),
            None => Err(ConfigError::new_err(format!(
                "module: missing, expected one of {} (only a loop with one module may leave it out)",
                self.inner.lora().names().join(", ")
            ))),
        }
    }

    fn with_json(adapter: Adapter, config_json: Option<String>, metadata_json: Option<String>) -> PyAdapter {
        PyAdapter::from(Adapter { config_json, metadata_json, ..adapter })
    }

    /// Rows by the members that they belong to.
    fn mixed<'py>(
        &self,
        py: Python<'py>,
        m: usize,
        x: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        add: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (n_in, n_out) = self.shapes[m];
        let x = input("x", x, Some(n_in), true)?;
        let sona = &self.inner;
        if let (None, None) = (x.rows, out) {
            return new_vector(py, n_out, |y| sona.forward(m, x.as_slice(), y, false));
        }
        let all = |y: &mut [f32]| -> PyResult<()> {
            if !sona.lora().kernels().all_finite(x.as_slice()) {
                return Err(crate::Error::non_finite("x").into());
            }
            for (x, y) in x.as_slice().chunks_exact(n_in).zip(y.chunks_exact_mut(n_out)) {
                sona.forward(m, x, y, add)?;
            }
            Ok(())
        };
        match out {
            Some(out) => {
                let mut y = output(out, &x, x.rows, n_out)?;
                all(y.as_mut_slice())?;
                Ok(out.clone())
            }
            None => {
                let (array, mut y) = new_rows(py, x.rows.unwrap_or(1), n_out)?;
                all(y.as_mut_slice())?;
                Ok(array)
            }
        }
    }
}

#[pymethods]
impl PySona {
    /// Three loops over a learner; accepted versions go to ``manager``.
    #[new]
    #[pyo3(signature = (lora, manager, settings_json))]
    fn new(
        lora: &Bound<'_, PyMicroLora>,
        manager: &Bound<'_, PyHotSwap>,
        settings_json: &str,
    ) -> PyResult<Self> {
        let lora = Arc::clone(lora.get().inner());
        let hot = Arc::clone(manager.get().inner());
        let shapes = (0..lora.names().len()).map(|m| lora.shape(m)).collect();
        let inner = Sona::new(lora, hot, Settings::from_json(settings_json)?)?;
        Ok(PySona { inner: Arc::new(inner), shapes })
    }

    /// Learns from one event at once, and keeps it for the background loop.
    ///
    /// Args:
    ///     x: float32 (in_features,): the layer's input. A text goes through the encoder.
    ///     feedback: A `Target`, `Gradient`, `Reward`, `Preference` or `Contrastive`; with a text, the response
    ///         (a text) or one of these.
    ///     quality: How good, 0 to 1. Targets under ``quality_threshold`` are passed over, others weigh
    ///         ``(quality - threshold) / (1 - threshold)``; other feedback is never dropped.
    ///     module: Name of the module that it is about; None: every module.
    ///     base: float32 (out_features,): output of the frozen layer for this x.
    ///
    /// Returns:
    ///     What was done; ``notes`` says why something was skipped.
    #[pyo3(signature = (x, feedback, quality = None, module = None, base = None))]
    fn instant_adapt<'py>(
        slf: &Bound<'py, Self>,
        x: &Bound<'py, PyAny>,
        feedback: &Bound<'py, PyAny>,
        quality: Option<&Bound<'py, PyAny>>,
        module: Option<&str>,
        base: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        if x.is_instance_of::<PyString>() {
            if base.is_some() {
                return Err(ConfigError::new_err(
                    "base: got one with a text, expected None (it is the text's vector)",
                ));
            }
            return slf.call_method1("_adapt_text", (x, feedback, quality, module));
        }
        let this = slf.get();
        let (sona, shapes) = (&this.inner, &this.shapes);
        let at = module.map(|name| sona.lora().find(name)).transpose()?;
        let feedback = extract(feedback)?;
        let (n_in, n_out) = shapes[at.unwrap_or(0)];
        let x = input("x", x, Some(n_in), false)?;
        let base = base.map(|b| input("base", b, Some(n_out), false)).transpose()?;
        let event = Event {
            x: x.as_slice(),
            feedback: &feedback.get().inner,
            quality: quality.map(rating).transpose()?,
            module: at,
            base: base.as_ref().map(|b| b.as_slice()),
        };
        let done = sona.instant(event)?;
        Ok(Bound::new(py, PyAdaptation(done))?.into_any())
    }

    /// What the live adapter adds to its layer's output; see `MicroLoRA.forward`.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let m = self.find(module)?;
        if self.inner.settings().is_ensemble() {
            return self.mixed(py, m, x, out, false);
        }
        calls::forward(py, &(&**self.inner.lora(), m), self.shapes[m], x, out)
    }

    /// ``out += dY(x)`` in place; see `MicroLoRA.forward_add`.
    #[pyo3(signature = (x, module = None, out = None))]
    fn forward_add<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        module: Option<&str>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let m = self.find(module)?;
        if self.inner.settings().is_ensemble() && out.is_some() {
            return self.mixed(py, m, x, out, true).map(drop);
        }
        calls::forward_add(py, &(&**self.inner.lora(), m), self.shapes[m], x, out)
    }

    /// Module names, in order.
    fn modules(&self) -> Vec<String> {
        self.inner.lora().names().to_vec()
    }

    /// One turn of the background loop, where one is due.
    ///
    /// Args:
    ///     force: Do not wait for the interval or for enough samples.
    ///
    /// Returns:
    ///     What it came to; None where no turn was due.
    #[pyo3(signature = (force = false))]
    fn maybe_background(&self, py: Python<'_>, force: bool) -> PyResult<Option<PyAdaptation>> {
        // Letting the interpreter's lock go costs milliseconds where other threads are busy with Python.
        if !force && !self.inner.may_be_due() {
            return Ok(None);
        }
        Ok(py.detach(|| self.inner.maybe_background(force))?.map(PyAdaptation))
    }

    /// Serves the background loop without the interpreter's lock, until `stop_background`.
    ///
    /// Args:
    ///     callback: Gets the result of every turn; False ends the loop.
    fn run_background(&self, py: Python<'_>, callback: Py<PyAny>) -> PyResult<()> {
        let mut raised: Option<PyErr> = None;
        let sona = &self.inner;
        py.detach(|| {
            sona.run_background(&mut |done| {
                Python::attach(|py| match callback.call1(py, (PyAdaptation(done),)) {
                    Ok(go_on) => !go_on.is(PyBool::new(py, false)),
                    Err(e) => {
                        raised = Some(e);
                        false
                    }
                })
            })
        })?;
        raised.map_or(Ok(()), Err)
    }

    /// Ends `run_background` soon.
    fn stop_background(&self) {
        self.inner.stop_background();
    }

    /// Waits until no turn is under way and lets none begin: for a fork.
    fn pause(&self, py: Python<'_>) {
        py.detach(|| self.inner.gate.close());
    }

    /// Ends a pause; ``child`` says that this is a forked child.
    #[pyo3(signature = (child = false))]
    fn resume(&self, child: bool) {
        if child {
            self.inner.gate.open_in_child();
        } else {
            self.inner.gate.open();
        }
    }

    /// Counts, times (microseconds, of the core's own work) and sizes; None where nothing was measured.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let report = py.detach(|| self.inner.report());
        let text = serde_json::to_string(&report).map_err(|e| ConfigError::new_err(e.to_string()))?;
        py.import("json")?.call_method1("loads", (text,))
    }

    /// The reservoir's samples: ``(event, x, feedback, base, module, quality, weight)`` each.
    #[pyo3(signature = (held_out))]
    fn samples<'py>(&self, py: Python<'py>, held_out: bool) -> PyResult<Bound<'py, PyList>> {
        let all = py.detach(|| self.inner.samples(held_out));
        let list = PyList::empty(py);
        for s in all {
            let array = |v: Vec<f32>| {
                let n = v.len();
                read_only(py, v, &[n])
            };
            let module = s.module.map(|m| self.inner.lora().names()[m as usize].clone());
            let base = s.base.map(array).transpose()?;
            list.append((s.event, array(s.x)?, wrap(py, s.feedback)?, base, module, s.quality, s.weight))?;
        }
        Ok(list)
    }

    /// Loss of the live weights, or of an adapter's, on the held-out samples; None while there are none.
    #[pyo3(signature = (adapter = None))]
    fn evaluate(&self, py: Python<'_>, adapter: Option<&Bound<'_, PyAdapter>>) -> PyResult<Option<f64>> {
        let adapter = adapter.map(|a| a.get().inner.clone());
        Ok(py.detach(|| self.inner.evaluate(adapter.as_ref()))?)
    }

    /// Lets a trained adapter serve where its held-out loss passes the gate.
    #[pyo3(signature = (adapter, samples_used, gate = true))]
    fn install(
        &self,
        py: Python<'_>,
        adapter: &Bound<'_, PyAdapter>,
        samples_used: usize,
        gate: bool,
    ) -> PyResult<PyAdaptation> {
        let adapter = adapter.get().inner.clone();
        Ok(PyAdaptation(py.detach(|| self.inner.install(&adapter, samples_used, gate))?))
    }

    /// The live weights, with these settings attached; of an ensemble the first member's.
    #[pyo3(signature = (config_json = None, metadata_json = None))]
    fn adapter(&self, config_json: Option<String>, metadata_json: Option<String>) -> PyAdapter {
        Self::with_json(self.inner.lora().adapter(), config_json, metadata_json)
    }

    /// The last accepted weights.
    #[pyo3(signature = (config_json = None, metadata_json = None))]
    fn consolidated(
        &self,
        py: Python<'_>,
        config_json: Option<String>,
        metadata_json: Option<String>,
    ) -> PyAdapter {
        Self::with_json(py.detach(|| self.inner.consolidated()), config_json, metadata_json)
    }

    /// The live weights of every member with its centroid, float32 (in_features,); one without, if it is alone.
    fn ensemble<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for (adapter, centroid) in self.inner.ensemble() {
            let n = centroid.len();
            list.append((Py::new(py, PyAdapter::from(adapter))?, read_only(py, centroid, &[n])?))?;
        }
        Ok(list)
    }

    /// Chooses A from unlabelled inputs, float32 (n, in_features), before anything is consolidated.
    ///
    /// Returns:
    ///     The share of their energy that A holds (the least of the modules).
    fn warm_up(&self, py: Python<'_>, x: &Bound<'_, PyAny>) -> PyResult<f64> {
        let x = input("X", x, Some(self.shapes[0].0), true)?;
        let x = x.as_slice();
        Ok(py.detach(|| self.inner.warm_up(x))?)
    }

    /// Chooses one of some named arms for an input: bottleneck LinUCB (arXiv 1003.0146).
    ///
    /// Args:
    ///     x: float32 (in_features,).
    ///     arms: Their names.
    ///     module: Whose bottleneck to choose by; None takes the first.
    #[pyo3(signature = (x, arms, module = None))]
    fn choose(&self, x: &Bound<'_, PyAny>, arms: Vec<String>, module: Option<&str>) -> PyResult<PyChoice> {
        let m = module.map_or(Ok(0), |name| self.inner.lora().find(name))?;
        let x = input("x", x, Some(self.shapes[m].0), false)?;
        let arms: Vec<&str> = arms.iter().map(String::as_str).collect();
        Ok(PyChoice(self.inner.choose(m, x.as_slice(), &arms)?))
    }

    /// Says what a choice earned.
    ///
    /// Args:
    ///     choice: Its ``id``.
    ///     reward: A finite number.
    ///
    /// Returns:
    ///     The reward that was expected.
    fn reward(&self, choice: u64, reward: f64) -> PyResult<f64> {
        Ok(self.inner.reward(choice, reward)?.expected)
    }

    /// ``(arm, propensity, reward)`` of the last choices that were settled.
    fn choices(&self) -> Vec<(String, f64, f64)> {
        self.inner.choices()
    }

    /// The whole loop as bytes.
    #[pyo3(signature = (config_json = None))]
    fn to_bytes<'py>(&self, py: Python<'py>, config_json: Option<String>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = py.detach(|| self.inner.to_bytes(config_json))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Goes on from the bytes of a loop with the same modules, shapes and settings.
    fn restore(&self, py: Python<'_>, data: &[u8]) -> PyResult<()> {
        Ok(py.detach(|| self.inner.restore(data))?)
    }

    /// Opens a state directory, and from now on writes there.
    ///
    /// Args:
    ///     dir: The directory; made where there is none.
    ///     config_json: The settings that go into the state.
    ///     journal: ``(fsync, value, segment_bytes, retain_bytes)``; None does not journal. ``fsync`` is
    ///         ``"never"``, ``"always"``, ``"events"`` (every ``value``) or ``"interval"`` (``value`` seconds).
    ///
    /// Returns:
    ///     What was found, as JSON.
    #[pyo3(signature = (dir, config_json, journal = None))]
    fn open_dir(
        &self,
        py: Python<'_>,
        dir: PathBuf,
        config_json: Option<String>,
        journal: Option<(String, f64, usize, Option<u64>)>,
    ) -> PyResult<String> {
        let options = journal.map(|(fsync, value, segment_bytes, retain)| -> PyResult<Options> {
            let fsync = match fsync.as_str() {
                "never" => Fsync::Never,
                "always" => Fsync::Always,
                "events" => Fsync::Events(value as u32),
                "interval" => Fsync::Interval(Duration::from_secs_f64(value)),
                other => {
                    return Err(ConfigError::new_err(format!(
                        "fsync: got {other:?}, expected never, always, events or interval"
                    )));
                }
            };
            let retain = retain.map_or(Retain::All, Retain::Bytes);
            Ok(Options { fsync, segment_bytes, retain })
        });
        let options = options.transpose()?;
        let opened = py.detach(|| self.inner.open(&dir, options, config_json))?;
        serde_json::to_string(&opened).map_err(|e| ConfigError::new_err(e.to_string()))
    }

    /// Saves the state in its directory; returns its bytes.
    fn checkpoint(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(py.detach(|| self.inner.checkpoint())?)
    }

    /// Writes the journal through to the disk.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.inner.sync())?)
    }

    /// Leaves the state directory; the journal is synced first.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.inner.close())?)
    }

    /// Takes an event out of what was learned from it.
    ///
    /// Args:
    ///     event: Its number.
    ///     how: ``"replay"``, ``"downdate"``, or None for the first of them that is possible.
    ///
    /// Returns:
    ///     Which it was.
    #[pyo3(signature = (event, how = None))]
    fn forget(&self, py: Python<'_>, event: u64, how: Option<&str>) -> PyResult<&'static str> {
        let how = match how {
            None => None,
            Some("replay") => Some(Forgotten::Replay),
            Some("downdate") => Some(Forgotten::Downdate),
            Some(other) => {
                return Err(ConfigError::new_err(format!(
                    "how: got {other:?}, expected replay, downdate or None"
                )));
            }
        };
        Ok(py.detach(|| self.inner.forget(event, how))?.as_str())
    }

    /// What the journal holds, as JSON.
    fn audit_json(&self, py: Python<'_>) -> PyResult<String> {
        let all = py.detach(|| self.inner.audit())?;
        serde_json::to_string(&all).map_err(|e| ConfigError::new_err(e.to_string()))
    }

    /// Whether forward adds anything; learning goes on.
    #[getter]
    fn get_enabled(&self) -> bool {
        self.inner.lora().enabled()
    }

    #[setter]
    fn set_enabled(&self, enabled: bool) {
        self.inner.lora().set_enabled(enabled);
    }

    /// Version of the live learner: counts every change of its weights.
    #[getter]
    fn version(&self) -> u64 {
        self.inner.lora().version()
    }
}

/// A quality: a number from 0 to 1.
fn rating(quality: &Bound<'_, PyAny>) -> PyResult<f32> {
    let refused = || {
        let got = quality.repr().map_or_else(|_| "something".into(), |r| r.to_string());
        FeedbackError::new_err(format!("quality: got {got}, expected a number from 0 to 1"))
    };
    if quality.is_instance_of::<PyBool>() || quality.is_instance_of::<PyString>() {
        return Err(refused());
    }
    let value: f64 = quality.extract().map_err(|_| refused())?;
    if value.is_nan() {
        return Err(
            crate::Error::NonFinite { arg: "quality".into(), detail: ", expected 0 to 1".into() }.into()
        );
    }
    if (0.0..=1.0).contains(&value) { Ok(value as f32) } else { Err(refused()) }
}

/// The configuration that a loop's state was saved with, as JSON.
#[pyfunction]
pub(super) fn sona_config(data: &[u8]) -> PyResult<Option<String>> {
    Ok(config_of(data)?)
}
