//! The learning side of one module: f32 master weights, the readers' version of them, and rule state.

use std::cell::Cell;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::layer::Layer;

use super::accumulate::Gradients;
use super::feedback::Feedback;
use super::rls::Rls;
use super::settings::{Instant, Rule, Train};
use super::step::StepResult;
use super::{nlms, rls};

/// Weights and sums beyond this are refused before they can overflow f32.
pub(crate) const LIMIT: f64 = 1e18;
/// Squared bottlenecks below this underflow in f32: nothing can be learned from them.
pub(crate) const TINY: f64 = f32::MIN_POSITIVE as f64;
/// Largest number that f16 holds.
const F16_LIMIT: f64 = 65_504.0;

/// One module's weights and everything its learning rules remember.
#[derive(Debug)]
pub struct Learner {
    /// What readers see, in the storage dtype.
    read: Arc<Layer>,
    /// f32 weights to learn in, where the storage is narrower.
    master: Option<Arc<Layer>>,
    pub(crate) rls: Option<Rls>,
    /// Mean `|u|^2` that `fit_input_basis` arranged; sets the unit of the RLS prior.
    pub(crate) basis_unit: Option<f64>,
    pub(crate) gradients: Option<Box<Gradients>>,
    pub(crate) baseline: Baseline,
    /// DoRA's magnitude of each output (arXiv 2402.09353); set by a chain, which holds the base weights.
    pub(crate) magnitude: Option<Arc<Vec<f32>>>,
    /// Upper bounds of the largest |number| in A and B, kept without passes over them.
    pub(crate) bounds: [f64; 2],
}

/// Buffers of one event, so that the hot path does not allocate; each thread has its own.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    pub u: Vec<f32>,
    pub gain: Vec<f32>,
    pub pu: Vec<f64>,
    pub y: Vec<f32>,
    pub g: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// This thread's buffers, given back when dropped.
pub(crate) struct Buffers(pub Scratch);

impl Buffers {
    pub fn take() -> Self {
        Buffers(SCRATCH.take())
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        SCRATCH.set(std::mem::take(&mut self.0));
    }
}

/// Running mean of rewards that becomes a moving average of rate `rate`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Baseline {
    /// Rewards seen.
    pub count: u64,
    /// Their average; 0 before the first.
    pub value: f64,
}

impl Baseline {
    pub(crate) fn update(&mut self, reward: f32, rate: f64) {
        self.count += 1;
        let rate = rate.max(1.0 / self.count as f64);
        self.value += rate * (f64::from(reward) - self.value);
    }
}

/// One event as the rules see it; widths are already checked.
#[derive(Clone, Copy)]
pub(crate) struct Event<'a> {
    pub x: &'a [f32],
    pub feedback: &'a Feedback,
    pub base: Option<&'a [f32]>,
    /// Weight of its loss in the one-event update, above 0; a gradient that is accumulated is not scaled.
    pub weight: f32,
}

impl Clone for Learner {
    fn clone(&self) -> Self {
        self.frozen()
    }
}

impl Learner {
    /// A learner with no history.
    pub fn new(layer: Arc<Layer>) -> Self {
        let narrow = layer.a.dtype() != Dtype::F32 || layer.b.dtype() != Dtype::F32;
        let master = narrow.then(|| Arc::new(layer.cast(Dtype::F32)));
        let mut learner = Learner {
            read: layer,
            master,
            rls: None,
            basis_unit: None,
            gradients: None,
            baseline: Baseline::default(),
            magnitude: None,
            bounds: [0.0; 2],
        };
        learner.refresh_bounds();
        learner
    }

    /// As [`Learner::new`], with master weights that carry more than the storage dtype shows.
    pub fn with_master(layer: Arc<Layer>, master: Option<Arc<Layer>>) -> Self {
        let mut learner = Learner::new(layer);
        if let (Some(_), Some(m)) = (&learner.master, master) {
            learner.master = Some(m);
            learner.refresh_bounds();
        }
        learner
    }

    /// A copy for a snapshot: weights are shared, empty gradient sums are left out.
    pub(crate) fn frozen(&self) -> Learner {
        Learner {
            read: Arc::clone(&self.read),
            master: self.master.clone(),
            rls: self.rls.clone(),
            basis_unit: self.basis_unit,
            gradients: self.gradients.as_ref().filter(|g| g.count > 0).cloned(),
            baseline: self.baseline,
            magnitude: self.magnitude.clone(),
            bounds: self.bounds,
        }
    }

    /// The version readers use.
    #[inline]
    pub fn layer(&self) -> &Arc<Layer> {
        &self.read
    }

    /// The f32 weights that learning acts on.
    pub fn master(&self) -> &Arc<Layer> {
        self.master.as_ref().unwrap_or(&self.read)
    }

    /// Whether a separate f32 master exists.
    pub fn has_master(&self) -> bool {
        self.master.is_some()
    }

    /// Resident bytes: stored weights, f32 master, RLS state and pending gradients.
    pub fn memory_bytes(&self) -> usize {
        let master = self.master.as_ref().map_or(0, |m| m.memory_bytes());
        let rls = self.rls.as_ref().map_or(0, |r| r.p.len() * 8);
        let gradients = self.gradients.as_ref().map_or(0, |g| g.memory_bytes());
        let magnitude = self.magnitude.as_ref().map_or(0, |m| 4 * m.len());
        self.read.memory_bytes() + master + rls + gradients + magnitude
    }

    pub(crate) fn refresh_bounds(&mut self) {
        let top = |v: &[f32]| v.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let m = self.master();
        self.bounds = [f64::from(top(m.a.stream())), f64::from(top(m.b.stream()))];
    }

    /// Refuses an event whose numbers could pass [`LIMIT`]; `worst` maps the bounds to the largest of them.
    pub(crate) fn guard(&mut self, worst: impl Fn([f64; 2]) -> f64, arg: &str) -> Result<()> {
        if worst(self.bounds) < LIMIT {
            return Ok(());
        }
        self.refresh_bounds();
        if worst(self.bounds) < LIMIT {
            return Ok(());
        }
        Err(Error::NonFinite { arg: arg.into(), detail: ": the step would overflow float32".into() })
    }

    /// Largest numbers that A and B may hold in their storage dtypes.
    pub(crate) fn limits(&self) -> [f64; 2] {
        [&self.read.a, &self.read.b].map(|f| match f.dtype() {
            Dtype::F16 => F16_LIMIT,
            Dtype::F32 | Dtype::Bf16 => LIMIT,
        })
    }

    /// Refuses a step that moves A and B by up to `grow` where a weight could pass what its storage holds.
    pub(crate) fn guard_weights(&mut self, grow: [f64; 2], arg: &str) -> Result<()> {
        let limits = self.limits();
        let fits = |at: [f64; 2]| (0..2).all(|i| grow[i] == 0.0 || at[i] + grow[i] < limits[i]);
        if fits(self.bounds) {
            return Ok(());
        }
        self.refresh_bounds();
        if fits(self.bounds) {
            return Ok(());
        }
        let dtypes = [self.read.a.dtype(), self.read.b.dtype()];
        let kind = dtypes[usize::from(grow[1] != 0.0)];
        Err(Error::NonFinite { arg: arg.into(), detail: format!(": the step would overflow {kind} weights") })
    }

    /// Changes the f32 weights and brings the readers' version up to date. Readers that still hold the old
    /// version keep it: shared factors are copied before they are written.
    pub(crate) fn edit<R>(&mut self, factors: Touched, f: impl FnOnce(&mut Layer) -> R) -> R {
        match &mut self.master {
            None => f(Arc::make_mut(&mut self.read)),
            Some(master) => {
                let out = f(Arc::make_mut(master));
                let read = Arc::make_mut(&mut self.read);
                if factors.a {
                    Arc::make_mut(&mut read.a).encode(&master.a);
                }
                if factors.b {
                    Arc::make_mut(&mut read.b).encode(&master.b);
                }
                out
            }
        }
    }

    /// Stores what readers see in `dtype`; the f32 weights stay what they are.
    pub(crate) fn set_storage(&mut self, dtype: Dtype) {
        let master = Arc::clone(self.master());
        if dtype == Dtype::F32 {
            self.read = master;
            self.master = None;
        } else {
            self.read = Arc::new(master.cast(dtype));
            self.master = Some(master);
        }
    }

    /// Replaces the weights and forgets every rule's state.
    pub(crate) fn replace(&mut self, layer: Arc<Layer>) {
        let magnitude = self.magnitude.take();
        *self = Learner { magnitude, ..Learner::new(layer) };
    }

    /// `u = s x A`; returns `|u|^2`.
    pub(crate) fn bottleneck(&self, k: &Kernels, x: &[f32], u: &mut Vec<f32>) -> Result<f64> {
        let layer = self.master();
        u.resize(layer.rank(), 0.0);
        layer.a.dots(k, x, u);
        k.scale(layer.scaling(), u);
        let norm2: f64 = u.iter().map(|&u| f64::from(u) * f64::from(u)).sum();
        if norm2.is_finite() { Ok(norm2) } else { Err(Error::non_finite("x")) }
    }

    /// The one-event update.
    ///
    /// # Errors
    /// Non-finite `x` or `base`, feedback that the rule cannot use; nothing is changed then.
    pub(crate) fn instant(
        &mut self,
        k: &Kernels,
        settings: &Instant,
        event: Event<'_>,
    ) -> Result<StepResult> {
        if let Some(base) = event.base
            && !k.dot(base, base).is_finite()
        {
            return Err(Error::non_finite("base"));
        }
        // RLS measures its P with one A; where A moves too, everything is NLMS.
        let rls = settings.rule == Rule::Rls || (settings.rule == Rule::Auto && settings.train == Train::B);
        match (settings.rule, event.feedback) {
            (_, Feedback::Target { target, loss: super::TargetLoss::Mse }) if rls => {
                rls::step(self, k, settings, event, target)
            }
            (Rule::Rls, other) => Err(Error::Feedback(format!(
                "instant.rule is rls, which needs Target(t, loss=\"mse\"), not feedback with a {}",
                other.argument()
            ))),
            _ => nlms::step(self, k, settings, event),
        }
    }
}

/// Which factors an edit touched.
#[derive(Clone, Copy)]
pub(crate) struct Touched {
    pub a: bool,
    pub b: bool,
}
