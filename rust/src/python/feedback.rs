//! Feedback classes: immutable values, checked when they are made.

use std::sync::Arc;

use pyo3::PyClass;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::array::{input, is_number, read_only};
use super::error::{DTypeError, FeedbackError};
use crate::learn::{Feedback, TargetLoss};

/// Base of all feedback; made only through its subclasses.
#[pyclass(name = "FeedbackBase", module = "microlora._core", frozen, subclass)]
pub(super) struct PyFeedback {
    pub inner: Arc<Feedback>,
}

impl PyFeedback {
    fn array<'py>(py: Python<'py>, v: &[f32]) -> PyResult<Bound<'py, PyAny>> {
        read_only(py, v.to_vec(), &[v.len()])
    }
}

/// The feedback of an argument, or what to pass instead.
pub(super) fn extract<'a, 'py>(x: &'a Bound<'py, PyAny>) -> PyResult<&'a Bound<'py, PyFeedback>> {
    x.cast::<PyFeedback>().map_err(|_| {
        if is_number(x) {
            FeedbackError::new_err(
                "feedback: a bare number has no direction to move the output in. Pass Target(t) for what was wanted \
                 (it teaches about ten times as much), or Reward(r, response=e) with the embedding that earned it",
            )
        } else {
            let kind = x.get_type();
            DTypeError::new_err(format!(
                "feedback: got {kind}, expected Target, Gradient, Reward, Preference or Contrastive"
            ))
        }
    })
}

fn vector(arg: &str, x: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    Ok(input(arg, x, None, false)?.as_slice().to_vec())
}

#[pymethods]
impl PyFeedback {
    /// Width of the output that this feedback is about.
    #[getter]
    fn width(&self) -> usize {
        self.inner.width()
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<PyFeedback>().is_ok_and(|o| o.get().inner == self.inner)
    }

    fn __repr__(&self) -> String {
        let n = self.inner.width();
        match &*self.inner {
            Feedback::Target { loss, .. } => format!("Target(<{n}>, loss={:?})", loss.as_str()),
            Feedback::Gradient { .. } => format!("Gradient(<{n}>)"),
            Feedback::Reward { reward, .. } => format!("Reward({reward}, response=<{n}>)"),
            Feedback::Preference { p, beta, .. } => format!("Preference(<{n}>, <{n}>, p={p}, beta={beta})"),
            Feedback::Contrastive { rows, width, tau } => {
                format!("Contrastive(<{n}>, <{} x {n}>, tau={tau})", rows.len() / width - 1)
            }
        }
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyTuple>)> {
        let py = slf.py();
        let a = |v: &[f32]| PyFeedback::array(py, v);
        let args = match &*slf.get().inner {
            Feedback::Target { target, loss } => (a(target)?, loss.as_str()).into_pyobject(py)?.into_any(),
            Feedback::Gradient { gradient } => (a(gradient)?,).into_pyobject(py)?.into_any(),
            Feedback::Reward { reward, response } => (*reward, a(response)?).into_pyobject(py)?.into_any(),
            Feedback::Preference { chosen, rejected, p, beta } => {
                (a(chosen)?, a(rejected)?, *p, *beta).into_pyobject(py)?.into_any()
            }
            Feedback::Contrastive { rows, width, tau } => {
                let negatives = read_only(py, rows[*width..].to_vec(), &[rows.len() / width - 1, *width])?;
                (a(&rows[..*width])?, negatives, *tau).into_pyobject(py)?.into_any()
            }
        };
        Ok((slf.get_type().into_any(), args.cast_into::<PyTuple>()?))
    }
}

macro_rules! child {
    ($name:ident, $public:literal, $doc:literal) => {
        #[doc = $doc]
        #[pyclass(name = $public, module = "microlora", frozen, extends = PyFeedback)]
        pub(super) struct $name;
    };
}
child!(
    PyTarget,
    "Target",
    "The output that was wanted: ``base + dY``, or ``dY`` itself where no ``base`` is passed with it.\n\nLoss: ``1/2 |y - t|^2`` summed over features (\"mse\"), or ``1 - cos(y, t)`` (\"cosine\")."
);
child!(
    PyGradient,
    "Gradient",
    "The gradient of a loss of your own with respect to the layer's output, ``dL/dy``."
);
child!(
    PyReward,
    "Reward",
    "A score, with the embedding of the response that earned it.\n\nLoss: ``1/2 (e . dY - kappa (R - b))^2`` with the unit response e and the running mean b of rewards."
);
child!(
    PyPreference,
    "Preference",
    "One response was preferred to another (Bradley and Terry 1952), on cosines with the output.\n\nLoss: ``-p log sigmoid(m) - (1 - p) log sigmoid(-m)``, ``m = beta (cos(y, chosen) - cos(y, rejected))``."
);
child!(
    PyContrastive,
    "Contrastive",
    "The right answer among wrong ones: InfoNCE (arXiv 1807.03748) on cosines with the output.\n\nLoss: ``-log softmax(cos(y, .) / tau)`` of the positive."
);

fn with<T>(child: T, inner: Feedback) -> PyClassInitializer<T>
where
    T: PyClass<BaseType = PyFeedback>,
{
    PyClassInitializer::from(PyFeedback { inner: Arc::new(inner) }).add_subclass(child)
}

/// A value of the core as its Python class; shared, not copied.
pub(super) fn wrap(py: Python<'_>, inner: Arc<Feedback>) -> PyResult<Py<PyAny>> {
    macro_rules! made {
        ($child:expr) => {
            Ok(Py::new(py, PyClassInitializer::from(PyFeedback { inner }).add_subclass($child))?.into_any())
        };
    }
    match &*inner {
        Feedback::Target { .. } => made!(PyTarget),
        Feedback::Gradient { .. } => made!(PyGradient),
        Feedback::Reward { .. } => made!(PyReward),
        Feedback::Preference { .. } => made!(PyPreference),
        Feedback::Contrastive { .. } => made!(PyContrastive),
    }
}

/// Getters that read one variant of the base.
macro_rules! field {
    ($slf:ident, $variant:ident { $($f:ident),+ } => $body:expr) => {
        match &*$slf.as_super().get().inner {
            Feedback::$variant { $($f,)+ .. } => $body,
            _ => unreachable!("a subclass holds its own variant"),
        }
    };
}

#[pymethods]
impl PyTarget {
    #[new]
    #[pyo3(signature = (t, loss = "mse"))]
    fn new(t: &Bound<'_, PyAny>, loss: &str) -> PyResult<PyClassInitializer<Self>> {
        let loss: TargetLoss = loss.parse()?;
        Ok(with(PyTarget, Feedback::target(vector("t", t)?, loss)?))
    }
    /// float32 (out_features,), read-only: the target; of unit length with the cosine loss.
    #[getter]
    fn t<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        field!(slf, Target { target } => PyFeedback::array(slf.py(), target))
    }
    /// How the output is compared with it.
    #[getter]
    fn loss(slf: &Bound<'_, Self>) -> &'static str {
        field!(slf, Target { loss } => loss.as_str())
    }
}

#[pymethods]
impl PyGradient {
    #[new]
    fn new(g: &Bound<'_, PyAny>) -> PyResult<PyClassInitializer<Self>> {
        Ok(with(PyGradient, Feedback::gradient(vector("g", g)?)?))
    }
    /// float32 (out_features,), read-only: the gradient.
    #[getter]
    fn g<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        field!(slf, Gradient { gradient } => PyFeedback::array(slf.py(), gradient))
    }
}

#[pymethods]
impl PyReward {
    #[new]
    #[pyo3(signature = (r, response = None))]
    fn new(r: f32, response: Option<&Bound<'_, PyAny>>) -> PyResult<PyClassInitializer<Self>> {
        let Some(response) = response else {
            return Err(FeedbackError::new_err(
                "response: missing; a scalar has no direction to move the output in. Pass response=, the embedding \
                 that earned the reward, or use Target(t), which teaches about ten times as much",
            ));
        };
        Ok(with(PyReward, Feedback::reward(r, vector("response", response)?)?))
    }
    /// The reward.
    #[getter]
    fn r(slf: &Bound<'_, Self>) -> f32 {
        field!(slf, Reward { reward } => *reward)
    }
    /// float32 (out_features,), read-only: direction of the response, of unit length.
    #[getter]
    fn response<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        field!(slf, Reward { response } => PyFeedback::array(slf.py(), response))
    }
}

#[pymethods]
impl PyPreference {
    #[new]
    #[pyo3(signature = (chosen, rejected, p = 1.0, beta = 20.0))]
    fn new(
        chosen: &Bound<'_, PyAny>,
        rejected: &Bound<'_, PyAny>,
        p: f32,
        beta: f32,
    ) -> PyResult<PyClassInitializer<Self>> {
        let (c, r) = (vector("chosen", chosen)?, vector("rejected", rejected)?);
        Ok(with(PyPreference, Feedback::preference(c, r, p, beta)?))
    }
    /// float32 (out_features,), read-only, of unit length.
    #[getter]
    fn chosen<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        field!(slf, Preference { chosen } => PyFeedback::array(slf.py(), chosen))
    }
    /// float32 (out_features,), read-only, of unit length.
    #[getter]
    fn rejected<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        field!(slf, Preference { rejected } => PyFeedback::array(slf.py(), rejected))
    }
    /// Probability that ``chosen`` is the better one.
    #[getter]
    fn p(slf: &Bound<'_, Self>) -> f32 {
        field!(slf, Preference { p } => *p)
    }
    /// Inverse temperature.
    #[getter]
    fn beta(slf: &Bound<'_, Self>) -> f32 {
        field!(slf, Preference { beta } => *beta)
    }
}

#[pymethods]
impl PyContrastive {
    #[new]
    #[pyo3(signature = (positive, negatives, tau = 0.05))]
    fn new(
        positive: &Bound<'_, PyAny>,
        negatives: &Bound<'_, PyAny>,
        tau: f32,
    ) -> PyResult<PyClassInitializer<Self>> {
        let p = vector("positive", positive)?;
        let n = input("negatives", negatives, Some(p.len()), true)?.as_slice().to_vec();
        Ok(with(PyContrastive, Feedback::contrastive(p, n, tau)?))
    }
    /// float32 (out_features,), read-only, of unit length.
    #[getter]
    fn positive<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        field!(slf, Contrastive { rows, width } => PyFeedback::array(slf.py(), &rows[..*width]))
    }
    /// float32 (k, out_features), read-only, rows of unit length.
    #[getter]
    fn negatives<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        field!(slf, Contrastive { rows, width } => {
            read_only(slf.py(), rows[*width..].to_vec(), &[rows.len() / width - 1, *width])
        })
    }
    /// Temperature.
    #[getter]
    fn tau(slf: &Bound<'_, Self>) -> f32 {
        field!(slf, Contrastive { tau } => *tau)
    }
}
