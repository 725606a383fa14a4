//! `Bandit` for Python: choices among named arms, and their rewards.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PySequence, PyString};

use super::array::input;
use super::error::{ConfigError, DTypeError};
use super::micro_lora::PyMicroLora;
use crate::learn::bandit::{self, BanditSettings, Choice, LiveBandit};
use crate::micro_lora::MicroLora;

/// id, arm, name, propensity, scores.
type Fields = (u64, usize, String, f64, Vec<f64>);

/// What a bandit chose.
#[pyclass(name = "Choice", module = "microlora._core", frozen)]
pub(super) struct PyChoice(pub Choice);

#[pymethods]
impl PyChoice {
    /// Number of the choice, from 1; the reward names it.
    #[getter]
    fn id(&self) -> u64 {
        self.0.id
    }
    /// Position of the chosen arm in the arms that were asked for.
    #[getter]
    fn arm(&self) -> usize {
        self.0.arm
    }
    /// Name of the chosen arm.
    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }
    /// Probability that this arm would be chosen here.
    #[getter]
    fn propensity(&self) -> f64 {
        self.0.propensity
    }
    /// Expected reward plus exploration bonus of every arm that was asked for.
    #[getter]
    fn scores(&self) -> Vec<f64> {
        self.0.scores.clone()
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<PyChoice>().is_ok_and(|o| o.get().0 == self.0)
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (Fields,))> {
        let c = slf.get().0.clone();
        let fields = (c.id, c.arm, c.name, c.propensity, c.scores);
        Ok((slf.get_type().getattr("_from_fields")?, (fields,)))
    }

    /// What pickling calls.
    #[staticmethod]
    fn _from_fields(fields: Fields) -> Self {
        let (id, arm, name, propensity, scores) = fields;
        PyChoice(Choice { id, arm, name, propensity, scores })
    }

    fn __repr__(&self) -> String {
        let Choice { id, arm, name, propensity, .. } = &self.0;
        format!("Choice(id={id}, arm={arm}, name={name:?}, propensity={propensity:.4})")
    }
}

/// Bottleneck LinUCB on one module of a learner.
#[pyclass(name = "Bandit", module = "microlora._core", frozen)]
pub(super) struct PyBandit {
    lora: Arc<MicroLora>,
    inner: Mutex<LiveBandit>,
    width: usize,
}

/// A setting that is a number.
fn number(arg: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    value.extract().map_err(|_| wanted(arg, value, "a number"))
}

/// A setting that counts something.
fn count<'py, T: FromPyObjectOwned<'py>>(arg: &str, value: &Bound<'py, PyAny>) -> PyResult<T> {
    value.extract().map_err(|_| wanted(arg, value, "a whole number, 0 or above"))
}

#[cold]
fn wanted(arg: &str, value: &Bound<'_, PyAny>, want: &str) -> PyErr {
    let got = value.repr().map_or_else(|_| "something else".to_owned(), |r| r.to_string());
    ConfigError::new_err(format!("{arg}: got {got}, expected {want}"))
}

/// Names of arms; one string alone would be taken for its letters.
fn names<'py>(arms: &Bound<'py, PyAny>) -> PyResult<Vec<Bound<'py, PyString>>> {
    let refuse = |got: &Bound<'_, PyAny>| {
        let kind = got.get_type();
        DTypeError::new_err(format!("arms: got {kind}, expected a list of names (str)"))
    };
    let text = |item: Bound<'py, PyAny>| item.cast_into::<PyString>().map_err(|e| refuse(&e.into_inner()));
    if let Ok(list) = arms.cast::<PyList>() {
        return list.iter().map(text).collect();
    }
    if arms.is_instance_of::<PyString>() || arms.cast::<PySequence>().is_err() {
        return Err(refuse(arms));
    }
    arms.try_iter()?.map(|item| text(item?)).collect()
}

fn find(lora: &MicroLora, module: Option<&str>) -> PyResult<usize> {
    match module {
        Some(name) => Ok(lora.find(name)?),
        None if lora.names().len() == 1 => Ok(0),
        None => {
            let want = format!("one of {}", lora.names().join(", "));
            Err(crate::Error::config("module", "nothing", want).into())
        }
    }
}

impl PyBandit {
    // No call waits for the GIL with this lock held.
    fn lock(&self) -> MutexGuard<'_, LiveBandit> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl PyBandit {
    #[new]
    #[pyo3(signature = (lora, module = None, *, alpha = None, ridge = None, epsilon = None, max_arms = None,
        max_open = None, history = None, seed = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        lora: &Bound<'_, PyMicroLora>,
        module: Option<&str>,
        alpha: Option<&Bound<'_, PyAny>>,
        ridge: Option<&Bound<'_, PyAny>>,
        epsilon: Option<&Bound<'_, PyAny>>,
        max_arms: Option<&Bound<'_, PyAny>>,
        max_open: Option<&Bound<'_, PyAny>>,
        history: Option<&Bound<'_, PyAny>>,
        seed: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let d = BanditSettings::default();
        let settings = BanditSettings {
            alpha: alpha.map_or(Ok(d.alpha), |v| number("alpha", v))?,
            ridge: ridge.map_or(Ok(d.ridge), |v| number("ridge", v))?,
            epsilon: epsilon.map_or(Ok(d.epsilon), |v| number("epsilon", v))?,
            max_arms: max_arms.map_or(Ok(d.max_arms), |v| count("max_arms", v))?,
            max_open: max_open.map_or(Ok(d.max_open), |v| count("max_open", v))?,
            history: history.map_or(Ok(d.history), |v| count("history", v))?,
            seed: seed.map_or(Ok(d.seed), |v| count("seed", v))?,
        };
        let lora = Arc::clone(lora.get().inner());
        let m = find(&lora, module)?;
        let inner = LiveBandit::new(&lora, m, settings)?;
        let width = lora.shape(m).0;
        Ok(PyBandit { lora, inner: Mutex::new(inner), width })
    }

    /// Chooses one of the named arms for an input.
    #[pyo3(signature = (x, arms))]
    fn choose(&self, x: &Bound<'_, PyAny>, arms: &Bound<'_, PyAny>) -> PyResult<PyChoice> {
        let names = names(arms)?;
        let arms = names.iter().map(|n| n.to_str()).collect::<PyResult<Vec<_>>>()?;
        let x = input("x", x, Some(self.width), false)?;
        Ok(PyChoice(self.lock().choose(&self.lora, x.as_slice(), &arms)?))
    }

    /// Gives a choice its reward; returns the reward that was expected.
    #[pyo3(signature = (choice, reward))]
    fn reward(&self, choice: &Bound<'_, PyAny>, reward: &Bound<'_, PyAny>) -> PyResult<f64> {
        let refuse = |arg: &str, v: &Bound<'_, PyAny>, want: &str| {
            DTypeError::new_err(format!("{arg}: got {}, expected {want}", v.get_type()))
        };
        let id = match choice.cast::<PyChoice>() {
            Ok(c) => c.get().0.id,
            Err(_) => choice.extract().map_err(|_| refuse("choice", choice, "a Choice, or its id"))?,
        };
        let reward: f64 = reward.extract().map_err(|_| refuse("reward", reward, "a number"))?;
        Ok(self.lock().reward(id, reward)?.expected)
    }

    /// The latest rewarded choices, oldest first: ``(id, name of the arm, propensity, reward)``.
    fn log(&self) -> Vec<(u64, String, f64, f64)> {
        let live = self.lock();
        let b = live.bandit();
        b.log().map(|l| (l.id, b.arm_name(l.arm).to_owned(), l.propensity, l.reward)).collect()
    }

    /// ``{name: (rewards, mean reward)}`` of every arm that was ever asked for; NaN without a reward.
    fn arms<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        for (name, count, total) in self.lock().bandit().arms() {
            out.set_item(name, (count, total / count as f64))?;
        }
        Ok(out)
    }

    /// Everything as safetensors bytes.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = bandit::to_bytes(&self.lock())?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Takes what `to_bytes` gave, on a module of the same shape.
    #[staticmethod]
    #[pyo3(signature = (lora, data, module = None))]
    fn from_bytes(
        lora: &Bound<'_, PyMicroLora>,
        data: &Bound<'_, PyAny>,
        module: Option<&str>,
    ) -> PyResult<Self> {
        let Ok(data) = data.cast::<PyBytes>() else {
            return Err(DTypeError::new_err(format!("data: got {}, expected bytes", data.get_type())));
        };
        let lora = Arc::clone(lora.get().inner());
        let m = find(&lora, module)?;
        let inner = bandit::from_bytes(&lora, m, data.as_bytes())?;
        let width = lora.shape(m).0;
        Ok(PyBandit { lora, inner: Mutex::new(inner), width })
    }

    /// Settings, by name.
    #[getter]
    fn settings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let live = self.lock();
        let (s, out) = (live.bandit().settings(), PyDict::new(py));
        for (name, v) in [("alpha", s.alpha), ("ridge", s.ridge), ("epsilon", s.epsilon)] {
            out.set_item(name, v)?;
        }
        for (name, v) in [("max_arms", s.max_arms), ("max_open", s.max_open), ("history", s.history)] {
            out.set_item(name, v)?;
        }
        out.set_item("seed", s.seed)?;
        Ok(out)
    }

    /// Name of the module that it reads.
    #[getter]
    fn module(&self) -> &str {
        &self.lora.names()[self.lock().module()]
    }

    /// Choices that wait for a reward.
    #[getter]
    fn waiting(&self) -> usize {
        self.lock().bandit().waiting()
    }

    /// Choices that were given up because more than ``max_open`` waited.
    #[getter]
    fn dropped(&self) -> u64 {
        self.lock().bandit().dropped()
    }

    /// How often the arms were learned again because the module's A had changed.
    #[getter]
    fn restarts(&self) -> u64 {
        self.lock().bandit().restarts()
    }

    /// Bytes resident: arms, waiting choices and log.
    #[getter]
    fn memory_bytes(&self) -> usize {
        self.lock().memory_bytes()
    }
}

/// What another policy would have earned on logged choices.
#[pyfunction]
#[pyo3(signature = (propensities, rewards, probabilities))]
pub(super) fn off_policy(
    propensities: &Bound<'_, PyAny>,
    rewards: &Bound<'_, PyAny>,
    probabilities: &Bound<'_, PyAny>,
) -> PyResult<BTreeMap<&'static str, f64>> {
    let read = |arg: &str, v: &Bound<'_, PyAny>| -> PyResult<Vec<f64>> {
        let refuse = |_| {
            let kind = v.get_type();
            DTypeError::new_err(format!("{arg}: got {kind}, expected a sequence of numbers"))
        };
        v.extract().map_err(refuse)
    };
    let e = bandit::off_policy(
        &read("propensities", propensities)?,
        &read("rewards", rewards)?,
        &read("probabilities", probabilities)?,
    )?;
    Ok(BTreeMap::from([
        ("ips", e.ips),
        ("ips_error", e.ips_error),
        ("snips", e.snips),
        ("snips_error", e.snips_error),
        ("weight", e.weight),
        ("effective", e.effective),
        ("events", e.events as f64),
    ]))
}
