//! `Optimizer` and `evaluate`: training over arrays.

use std::sync::{Mutex, MutexGuard, PoisonError};

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::anchor::Anchor;
use super::dataset::{Rows, Target, integers};
use super::error::ConfigError;
use super::long::long_call;
use super::micro_lora::PyMicroLora;
use super::replay_memory::PyReplayMemory;
use crate::error::Error;
use crate::learn::train::{Past, Plan, Workspace, evaluate as core_evaluate, step_pending, train};
use crate::learn::{Method, OptimSettings, Optimizer, StepOptions};

struct Inner {
    optimizer: Optimizer,
    workspace: Workspace,
}

/// Moments of one training run.
#[pyclass(name = "Optimizer", module = "microlora._core", frozen)]
pub(super) struct PyOptimizer {
    inner: Mutex<Inner>,
}

type Losses<'py> = Bound<'py, PyArray1<f32>>;

fn positive(arg: &str, v: usize) -> PyResult<usize> {
    if v > 0 { Ok(v) } else { Err(ConfigError::new_err(format!("{arg}: got 0, expected 1 or more"))) }
}

impl PyOptimizer {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl PyOptimizer {
    /// Fresh moments for the modules of a learner or chain.
    #[new]
    #[pyo3(signature = (lora, kind, *, momentum=0.9, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, lora_plus_ratio=1.0))]
    fn new(
        lora: &Bound<'_, PyAny>,
        kind: &str,
        momentum: f64,
        betas: (f64, f64),
        eps: f64,
        weight_decay: f64,
        lora_plus_ratio: f64,
    ) -> PyResult<Self> {
        let method = match kind {
            "sgd" => Method::Sgd,
            "momentum" => Method::Momentum { beta: momentum },
            "adamw" => Method::AdamW { betas: betas.into(), eps },
            _ => {
                let text = format!("kind: got {kind:?}, expected sgd, momentum or adamw");
                return Err(ConfigError::new_err(text));
            }
        };
        let masters = match Target::of(lora)? {
            Target::Lora(l) => l.inner().masters(),
            Target::Chain(c) => c.inner().lora().masters(),
        };
        let shapes = masters.iter().map(|l| [l.in_features(), l.out_features(), l.rank()]).collect();
        let settings = OptimSettings { method, weight_decay, lora_plus_ratio };
        let optimizer = Optimizer::new(shapes, settings)?;
        Ok(PyOptimizer { inner: Mutex::new(Inner { optimizer, workspace: Workspace::default() }) })
    }

    /// The rule.
    #[getter]
    fn kind(&self) -> &'static str {
        match self.lock().optimizer.settings.method {
            Method::Sgd => "sgd",
            Method::Momentum { .. } => "momentum",
            Method::AdamW { .. } => "adamw",
        }
    }

    /// Steps taken.
    #[getter]
    fn steps(&self) -> u64 {
        self.lock().optimizer.steps
    }

    /// Resident bytes of the moments.
    #[getter]
    fn memory_bytes(&self) -> usize {
        self.lock().optimizer.memory_bytes()
    }

    /// Most bytes of a chain's activations that were alive at once.
    #[getter]
    fn peak_activation_bytes(&self) -> usize {
        self.lock().workspace.peak_activation_bytes()
    }

    /// One step along the mean of the pending gradients.
    #[pyo3(signature = (lora, lr, *, max_grad_norm=None, ewc=None, ewc_every=1))]
    fn step(
        &self,
        lora: &Bound<'_, PyMicroLora>,
        lr: f64,
        max_grad_norm: Option<f64>,
        ewc: Option<&Bound<'_, PyAny>>,
        ewc_every: usize,
    ) -> PyResult<(u64, f64)> {
        let mut anchor = Anchor::of(ewc, lora.get().inner())?;
        let every = positive("ewc_every", ewc_every)?;
        let inner = &mut *self.lock();
        let penalty = StepOptions::penalty_weight(inner.optimizer.steps, every);
        let at = StepOptions { lr, max_grad_norm, penalty };
        let done = step_pending(lora.get().inner(), &mut inner.optimizer, anchor.get(), at)?;
        Ok((done.events, done.grad_norm))
    }

    /// Steps over rows in a given order.
    #[pyo3(signature = (target, x, y, order, lrs, *, batch_size, accumulation=1, modules=None, weights=None,
        base=None, max_grad_norm=None, ewc=None, ewc_every=1, accumulate_fisher=false, replay=None, progress=None,
        cancel=None))]
    #[allow(clippy::too_many_arguments)]
    fn train<'py>(
        &self,
        py: Python<'py>,
        target: &Bound<'py, PyAny>,
        x: &Bound<'py, PyAny>,
        y: &Bound<'py, PyAny>,
        order: &Bound<'py, PyAny>,
        lrs: Vec<f64>,
        batch_size: usize,
        accumulation: usize,
        modules: Option<Vec<String>>,
        weights: Option<&Bound<'py, PyAny>>,
        base: Option<&Bound<'py, PyAny>>,
        max_grad_norm: Option<f64>,
        ewc: Option<&Bound<'py, PyAny>>,
        ewc_every: usize,
        accumulate_fisher: bool,
        replay: Option<&Bound<'py, PyReplayMemory>>,
        progress: Option<Py<PyAny>>,
        cancel: Option<Py<PyAny>>,
    ) -> PyResult<(Losses<'py>, Losses<'py>)> {
        let target = Target::of(target)?;
        let rows = Rows::of(x, y, base, weights)?;
        let trainee = target.trainee(modules, rows.widths())?;
        let order: Vec<usize> = integers("order", order)?
            .into_iter()
            .map(|row| usize::try_from(row).map_err(|_| Error::config("order", row, "rows from 0")))
            .collect::<Result<_, _>>()?;
        let plan = Plan {
            order: &order,
            lrs: &lrs,
            batch: positive("batch_size", batch_size)?,
            accumulation: positive("accumulation", accumulation)?,
            max_grad_norm,
            penalty_every: positive("ewc_every", ewc_every)?,
            observe: accumulate_fisher,
        };
        if accumulate_fisher && ewc.is_none() {
            return Err(ConfigError::new_err("accumulate_fisher: got True without ewc, expected ewc="));
        }
        let mut anchor = Anchor::of(ewc, trainee.lora())?;
        let data = rows.data();
        // A copy that shares the rows, so that no lock is held while a tick waits for the GIL.
        let mut memory = replay.map(|r| r.get().lock().clone());
        let log = long_call(py, "training", progress, cancel, |tick| {
            let inner = &mut *self.lock();
            let (optimizer, workspace) = (&mut inner.optimizer, &mut inner.workspace);
            let past = Past { anchor: anchor.get(), replay: memory.as_mut() };
            train(&*trainee, &data, &plan, optimizer, past, workspace, tick)
        });
        if let (Some(replay), Some(memory)) = (replay, &memory) {
            replay.get().lock().drew(memory);
        }
        let log = log?;
        Ok((log.losses.into_pyarray(py), log.grad_norms.into_pyarray(py)))
    }

    /// Moments, counts and settings.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.lock().optimizer.to_bytes()?))
    }

    /// Goes on where ``to_bytes`` stood.
    fn restore(&self, data: &[u8]) -> PyResult<()> {
        self.lock().optimizer.restore(data)?;
        Ok(())
    }
}

/// Loss of every row; nothing is learned.
#[pyfunction]
#[pyo3(signature = (target, x, y, *, modules=None, weights=None, base=None, progress=None, cancel=None))]
#[allow(clippy::too_many_arguments)]
pub(super) fn evaluate<'py>(
    py: Python<'py>,
    target: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    y: &Bound<'py, PyAny>,
    modules: Option<Vec<String>>,
    weights: Option<&Bound<'py, PyAny>>,
    base: Option<&Bound<'py, PyAny>>,
    progress: Option<Py<PyAny>>,
    cancel: Option<Py<PyAny>>,
) -> PyResult<Losses<'py>> {
    let target = Target::of(target)?;
    let rows = Rows::of(x, y, base, weights)?;
    let trainee = target.trainee(modules, rows.widths())?;
    let data = rows.data();
    let losses = long_call(py, "evaluation", progress, cancel, |tick| {
        core_evaluate(&*trainee, &data, &mut Workspace::default(), tick)
    })?;
    Ok(losses.into_pyarray(py))
}
