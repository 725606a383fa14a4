//! The live learner: many threads read while one learns, and every read sees one whole version.
//!
//! Weights are behind `Arc`s that a writer copies before it edits them when somebody else still holds them.
//! A single-row read holds the lock for its microsecond; a batch takes the `Arc`s and lets go at once. So no
//! lock is ever held for long, and a snapshot costs no copy until the next step.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::adapter::{Adapter, unknown_module};
use crate::error::{Error, Result};
use crate::ewc::Ewc;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::accumulate;
use crate::learn::learner::Event;
use crate::learn::{Feedback, Instant, Learner, StepResult, basis};
use crate::rng::Rng;

mod spec;
mod state;
mod training;

pub use spec::ModuleSpec;
use spec::fresh_layer;

/// Settings of a learner that are not weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// Share of inputs dropped in `adapt`.
    pub dropout: f32,
    /// The one-event rule.
    pub instant: Instant,
}

/// Events since the learner was made or restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Applied `instant` events.
    pub instant: u64,
    /// Accumulated `adapt` events.
    pub adapt: u64,
    /// Applied `apply_updates` calls.
    pub apply: u64,
    /// Events skipped, with a reason in their result.
    pub skipped: u64,
}

struct State {
    learners: Vec<Learner>,
    version: u64,
    enabled: bool,
    rng: Rng,
    counters: Counters,
}

/// A set of modules that learns while it serves.
pub struct MicroLora {
    kernels: &'static Kernels,
    settings: Settings,
    names: Vec<String>,
    /// Only where there are many names; a few are found faster by looking at each.
    index: HashMap<String, usize>,
    /// `(in_features, out_features)`; these never change.
    shapes: Vec<(usize, usize)>,
    /// What the file that it came from held besides the weights, without modules.
    origin: Adapter,
    state: RwLock<State>,
}

/// Up to this many names a scan beats a hash.
const SCAN: usize = 16;

impl MicroLora {
    /// Freshly initialised modules: outputs are exact zeros until something is learned.
    ///
    /// # Errors
    /// No modules, a name twice, a zero dimension, settings out of range, an unknown `MICROLORA_ISA`.
    pub fn new(specs: &[ModuleSpec], seed: u64, settings: Settings) -> Result<Self> {
        let layers = specs
            .iter()
            .map(|s| Ok((s.name.clone(), Arc::new(fresh_layer(s, seed)?))))
            .collect::<Result<Vec<_>>>()?;
        Self::with_layers(layers, seed, settings)
    }

    /// A learner that starts from an adapter's weights, with no history.
    ///
    /// # Errors
    /// As [`MicroLora::new`].
    pub fn from_adapter(adapter: &Adapter, seed: u64, settings: Settings) -> Result<Self> {
        let mut lora = Self::with_layers(adapter.modules.clone(), seed, settings)?;
        lora.origin = Adapter { modules: Vec::new(), ..adapter.clone() };
        Ok(lora)
    }

    fn with_layers(layers: Vec<(String, Arc<Layer>)>, seed: u64, settings: Settings) -> Result<Self> {
        settings.instant.validate()?;
        if !(0.0..1.0).contains(&settings.dropout) {
            return Err(Error::config("dropout", settings.dropout, "0 <= dropout < 1"));
        }
        if layers.is_empty() {
            return Err(Error::config("target_modules", "nothing", "at least one module"));
        }
        let mut index = HashMap::new();
        for (i, (name, _)) in layers.iter().enumerate() {
            if index.insert(name.clone(), i).is_some() {
                return Err(Error::config("target_modules", format!("{name:?} twice"), "each module once"));
            }
        }
        if index.len() <= SCAN {
            index.clear();
        }
        let (names, layers): (Vec<_>, Vec<_>) = layers.into_iter().unzip();
        let shapes = layers.iter().map(|l| (l.in_features(), l.out_features())).collect();
        let state = State {
            learners: layers.into_iter().map(Learner::new).collect(),
            version: 0,
            enabled: true,
            rng: Rng::new(seed, 0),
            counters: Counters::default(),
        };
        let origin = Adapter::default();
        Ok(MicroLora {
            kernels: Kernels::detect()?,
            settings,
            names,
            index,
            shapes,
            origin,
            state: RwLock::new(state),
        })
    }

    // A panic in a writer cannot leave half a version: edits are of copies or single sweeps.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Module names, in configuration order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Position of a module.
    ///
    /// # Errors
    /// An unknown name.
    #[inline]
    pub fn find(&self, name: &str) -> Result<usize> {
        let found = if self.names.len() <= SCAN {
            self.names.iter().position(|n| n == name)
        } else {
            self.index.get(name).copied()
        };
        found.ok_or_else(|| unknown_module(name, self.names.iter().map(String::as_str)))
    }

    /// The kernels this learner was made with.
    #[inline]
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// What the file that it came from held besides the weights, without modules.
    pub(crate) fn origin(&self) -> Adapter {
        self.origin.clone()
    }

    /// Settings it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// One row: `y = dY(x)`, or `y += dY(x)`. When disabled, `dY` is zero.
    ///
    /// # Errors
    /// Wrong lengths, non-finite x.
    #[inline]
    pub fn forward(&self, module: usize, x: &[f32], y: &mut [f32], add: bool) -> Result<()> {
        let state = self.read();
        if !state.enabled {
            if !self.kernels.all_finite(x) {
                return Err(Error::non_finite("x"));
            }
            if !add {
                y.fill(0.0);
            }
            return Ok(());
        }
        state.learners[module].layer().forward(self.kernels, x, y, add)
    }

    /// The present version of one module for a batch, and whether the adapter is enabled.
    pub fn layer(&self, module: usize) -> (Arc<Layer>, bool) {
        let state = self.read();
        (Arc::clone(state.learners[module].layer()), state.enabled)
    }

    /// Several modules of one and the same version.
    pub fn layers(&self, modules: &[usize]) -> (Vec<Arc<Layer>>, bool) {
        let state = self.read();
        (modules.iter().map(|&m| Arc::clone(state.learners[m].layer())).collect(), state.enabled)
    }

    /// The f32 weights that learning acts on, in the order of the names and of one version.
    pub fn masters(&self) -> Vec<Arc<Layer>> {
        self.read().learners.iter().map(|l| Arc::clone(l.master())).collect()
    }

    /// The f32 weights of a module, and the mean `|s x A|^2` that its basis was fitted to, where it was.
    pub fn bottleneck(&self, module: usize) -> (Arc<Layer>, Option<f64>) {
        let learner = &self.read().learners[module];
        (Arc::clone(learner.master()), learner.basis_unit)
    }

    /// `(in_features, out_features)` of a module.
    #[inline]
    pub fn shape(&self, module: usize) -> (usize, usize) {
        self.shapes[module]
    }

    /// Counts every change of the weights.
    pub fn version(&self) -> u64 {
        self.read().version
    }

    /// Events since the start or the last restore.
    pub fn counters(&self) -> Counters {
        self.read().counters
    }

    /// Whether forward adds anything.
    pub fn enabled(&self) -> bool {
        self.read().enabled
    }

    /// Turns the adapter's output on or off; learning is not affected.
    pub fn set_enabled(&self, enabled: bool) {
        self.write().enabled = enabled;
    }

    /// Numbers in all factors.
    pub fn param_count(&self) -> usize {
        self.read().learners.iter().map(|l| l.layer().param_count()).sum()
    }

    /// Resident bytes: weights, f32 masters, RLS state, pending gradients and tensors kept from a file.
    pub fn memory_bytes(&self) -> usize {
        self.origin.memory_bytes() + self.read().learners.iter().map(Learner::memory_bytes).sum::<usize>()
    }

    /// Pending `adapt` events of a module.
    pub fn pending(&self, module: usize) -> u64 {
        self.read().learners[module].gradients.as_ref().map_or(0, |g| g.count)
    }

    /// The ridge constant that the RLS of a module started from; `None` before its first event.
    pub fn ridge(&self, module: usize) -> Option<f64> {
        self.read().learners[module].rls.as_ref().map(|r| r.ridge)
    }

    pub(crate) fn check_event(
        &self,
        module: usize,
        x: &[f32],
        feedback: &Feedback,
        base: Option<&[f32]>,
    ) -> Result<()> {
        let (n_in, n_out) = self.shape(module);
        let check = |arg: &str, got: usize, want: usize| {
            if got == want {
                Ok(())
            } else {
                Err(Error::shape(arg, format!("({got},)"), format!("({want},)")))
            }
        };
        check("x", x.len(), n_in)?;
        check(feedback.argument(), feedback.width(), n_out)?;
        base.map_or(Ok(()), |b| check("base", b.len(), n_out))
    }

    /// One event by its closed form (RLS or NLMS); the weights change at once.
    ///
    /// # Errors
    /// Wrong widths, non-finite inputs, feedback the rule cannot use. Nothing changes then.
    pub fn instant(
        &self,
        module: usize,
        x: &[f32],
        feedback: &Feedback,
        base: Option<&[f32]>,
    ) -> Result<StepResult> {
        self.instant_event(module, Event { x, feedback, base, weight: 1.0 })
    }

    /// As [`MicroLora::instant`] for an event with a weight.
    pub(crate) fn instant_event(&self, module: usize, event: Event<'_>) -> Result<StepResult> {
        self.check_event(module, event.x, event.feedback, event.base)?;
        let state = &mut *self.write();
        let learner = &mut state.learners[module];
        let mut result = learner.instant(self.kernels, &self.settings.instant, event)?;
        if result.applied {
            state.version += 1;
            state.counters.instant += 1;
        } else {
            state.counters.skipped += 1;
        }
        result.version = state.version;
        Ok(result)
    }

    /// Adds one event's gradient to the pending sums; the weights do not change.
    ///
    /// # Errors
    /// Wrong widths, non-finite inputs. Nothing changes then.
    pub fn adapt(
        &self,
        module: usize,
        x: &[f32],
        feedback: &Feedback,
        base: Option<&[f32]>,
    ) -> Result<StepResult> {
        self.adapt_observed(module, x, feedback, base, None)
    }

    /// As [`MicroLora::adapt`]; the consolidation takes the squares of the same gradient in the same pass.
    /// Its lock is taken inside this learner's, as a training step does.
    ///
    /// # Errors
    /// As [`MicroLora::adapt`], and feedback that the consolidation cannot use. Nothing changes then.
    pub fn adapt_observed(
        &self,
        module: usize,
        x: &[f32],
        feedback: &Feedback,
        base: Option<&[f32]>,
        ewc: Option<&Mutex<Ewc>>,
    ) -> Result<StepResult> {
        self.check_event(module, x, feedback, base)?;
        let state = &mut *self.write();
        let learner = &mut state.learners[module];
        let mut dropped = Vec::new();
        let mut rng = None;
        let x = if self.settings.dropout > 0.0 {
            let (p, keep) = (self.settings.dropout, 1.0 / (1.0 - self.settings.dropout));
            let r = rng.insert(state.rng.clone());
            dropped.extend(x.iter().map(|&v| if r.uniform() < p { 0.0 } else { v * keep }));
            if !self.kernels.all_finite(x) {
                return Err(Error::non_finite("x"));
            }
            &dropped[..]
        } else {
            x
        };
        let event = Event { x, feedback, base, weight: 1.0 };
        let mut ewc = ewc.map(|e| e.lock().unwrap_or_else(PoisonError::into_inner));
        let watch = ewc.as_deref_mut().map(|ewc| accumulate::Watch { ewc, module, learns: true });
        let mut result = accumulate::accumulate(learner, self.kernels, &self.settings.instant, event, watch)?;
        if let Some(rng) = rng {
            state.rng = rng;
        }
        if result.applied {
            state.counters.adapt += 1;
        } else {
            state.counters.skipped += 1;
        }
        result.version = state.version;
        Ok(result)
    }

    /// Gives the squares of one event's gradient to a consolidation; the learner does not change.
    ///
    /// # Errors
    /// As [`MicroLora::adapt_observed`].
    pub fn observe(
        &self,
        module: usize,
        x: &[f32],
        feedback: &Feedback,
        base: Option<&[f32]>,
        ewc: &Mutex<Ewc>,
    ) -> Result<StepResult> {
        self.check_event(module, x, feedback, base)?;
        // A copy of the learner shares its weights: readers and writers go on meanwhile.
        let mut learner = self.read().learners[module].frozen();
        let ewc = &mut *ewc.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = Some(accumulate::Watch { ewc, module, learns: false });
        let event = Event { x, feedback, base, weight: 1.0 };
        accumulate::accumulate(&mut learner, self.kernels, &self.settings.instant, event, watch)
    }

    /// `w -= lr * mean pending gradient` on every module with pending events; returns how many events.
    ///
    /// # Errors
    /// A learning rate or clip that is not a number, a step that would overflow. Nothing changes then.
    pub fn apply_updates(&self, lr: f64, max_grad_norm: Option<f64>) -> Result<u64> {
        if !lr.is_finite() || lr < 0.0 {
            return Err(Error::config("lr", lr, "a finite number, 0 or above"));
        }
        if let Some(c) = max_grad_norm
            && !(c.is_finite() && c > 0.0)
        {
            return Err(Error::config("max_grad_norm", c, "a finite number above 0"));
        }
        let state = &mut *self.write();
        let mut lr = lr;
        if let Some(max) = max_grad_norm {
            let norm: f64 =
                state.learners.iter().map(|l| accumulate::mean_norm2(l, self.kernels)).sum::<f64>().sqrt();
            if norm > max {
                lr *= max / norm;
            }
        }
        for learner in &mut state.learners {
            accumulate::check_apply(learner, lr)?;
        }
        let mut events = 0;
        for learner in &mut state.learners {
            events += learner.gradients.as_ref().map_or(0, |g| g.count);
            accumulate::apply(learner, self.kernels, lr);
        }
        if events > 0 {
            state.version += 1;
            state.counters.apply += 1;
        }
        Ok(events)
    }

    /// Chooses A from unlabelled inputs; returns the share of their energy that the rank holds.
    ///
    /// # Errors
    /// See [`basis`]. Nothing changes then.
    pub fn fit_input_basis(&self, module: usize, x: &[f32], tick: &mut basis::Tick<'_>) -> Result<f64> {
        let (n_in, _) = self.shape(module);
        if x.is_empty() || !x.len().is_multiple_of(n_in) {
            return Err(Error::shape("X", format!("{} numbers", x.len()), format!("(n, {n_in})")));
        }
        loop {
            // The long part runs without the lock, on the version that it found.
            let (mut learner, mut rng) = {
                let state = self.read();
                (state.learners[module].clone(), state.rng.clone())
            };
            let before = Arc::clone(learner.master());
            let held = basis::fit(&mut learner, self.kernels, x, &mut rng, tick)?;
            let state = &mut *self.write();
            let now = &state.learners[module];
            if !Arc::ptr_eq(now.master(), &before) || now.gradients.as_ref().is_some_and(|g| g.count > 0) {
                continue;
            }
            state.learners[module] = learner;
            state.rng = rng;
            state.version += 1;
            return Ok(held);
        }
    }
}
