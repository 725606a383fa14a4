//! `Ewc`: what earlier tasks needed, module by module, and the pull towards it.

use std::sync::Arc;

use super::accumulator::{Accumulator, Dims};
use super::fisher::{self, Labels, Passes};
use super::settings::{Anchors, EwcSettings, Normalize};
use super::{Boundary, Memory, Statistic};
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::{Feedback, Regularizer, Samples};
use crate::micro_lora::MicroLora;
use crate::rng::Rng;

/// One module's statistics and memory.
#[derive(Debug)]
pub(super) struct Module {
    pub name: String,
    pub scaling: f32,
    /// Weights that a memory is made afresh from (SI measures its first path from them).
    born: Arc<Layer>,
    pub seen: Accumulator,
    pub memory: Box<dyn Memory>,
}

/// Holds a learner near what its earlier tasks needed; modules are in the learner's order.
///
/// The layers that it is given are always the learner's f32 master weights.
#[derive(Debug)]
pub struct Ewc {
    pub(super) settings: EwcSettings,
    pub(super) modules: Vec<Module>,
    pub(super) tasks: u64,
    /// Samples of this task, and those beyond the cap.
    pub(super) samples: u64,
    pub(super) ignored: u64,
    pub(super) rng: Rng,
    /// Module of a staged event.
    pub(super) staged: Option<usize>,
    /// Work space of one event.
    scratch: Vec<f32>,
}

/// One event as `adapt` saw it.
#[derive(Clone, Copy)]
pub(crate) struct Observed<'a> {
    pub layer: &'a Layer,
    pub x: &'a [f32],
    /// `s x A`.
    pub u: &'a [f32],
    /// Observed `dL/dy`, and `s g B^T` of it.
    pub g: &'a [f32],
    pub w: &'a [f32],
    pub feedback: Option<&'a Feedback>,
    pub base: Option<&'a [f32]>,
}

fn make(name: &str, layer: &Arc<Layer>, settings: &EwcSettings) -> Module {
    let row = settings.kind.row();
    Module {
        name: name.to_owned(),
        scaling: layer.scaling(),
        born: Arc::clone(layer),
        seen: Accumulator::new(Dims::of(layer), row.statistic, settings.decay, settings.samples),
        memory: (row.make)(layer, settings),
    }
}

impl Ewc {
    /// Nothing to hold yet: the first task learns freely.
    ///
    /// # Errors
    /// Settings out of range.
    pub fn new(lora: &MicroLora, settings: EwcSettings) -> Result<Self> {
        let settings = settings.validate()?;
        let modules = lora.names().iter().zip(lora.masters()).map(|(n, l)| make(n, &l, &settings)).collect();
        let rng = Rng::new(settings.seed, 0x6577_635f_6c61_6265);
        let scratch = Vec::new();
        Ok(Ewc { settings, modules, tasks: 0, samples: 0, ignored: 0, rng, staged: None, scratch })
    }

    pub(super) fn fresh_modules(&self) -> Vec<Module> {
        self.modules.iter().map(|m| make(&m.name, &m.born, &self.settings)).collect()
    }

    /// Settings it was made with.
    pub fn settings(&self) -> &EwcSettings {
        &self.settings
    }

    /// Closed tasks.
    pub fn task_count(&self) -> u64 {
        self.tasks
    }

    /// Samples of this task that were counted.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Samples of this task beyond the cap.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Refuses a learner of other modules or shapes. Its layers come as an argument, because a learner's lock
    /// is always taken before a consolidation's.
    ///
    /// # Errors
    /// The first difference.
    pub fn check_same(&self, names: &[String], layers: &[Arc<Layer>]) -> Result<()> {
        if !self.modules.iter().map(|m| &m.name).eq(names) {
            let mine: Vec<_> = self.modules.iter().map(|m| m.name.as_str()).collect();
            return Err(Error::config("ewc", format!("modules {}", mine.join(", ")), names.join(", ")));
        }
        for (m, layer) in self.modules.iter().zip(layers) {
            if m.seen.dims != Dims::of(layer) || m.scaling != layer.scaling() {
                let text =
                    |d: Dims, s: f32| format!("{} -> {}, rank {}, scaling {s}", d.n_in, d.n_out, d.rank);
                let want = text(Dims::of(layer), layer.scaling());
                return Err(Error::shape(format!("ewc: {}", m.name), text(m.seen.dims, m.scaling), want));
            }
        }
        Ok(())
    }

    // -- the pull --

    /// The gradient of the penalty of one module in new factors, whatever the kind of step.
    pub fn penalty_gradient(&mut self, k: &Kernels, module: usize, layer: &Layer) -> [Factor; 2] {
        let [mut ga, mut gb] = Dims::of(layer).pair();
        if self.settings.lambda > 0.0 {
            self.modules[module].memory.add_gradient(k, self.settings.lambda, layer, &mut ga, &mut gb);
        }
        [ga, gb]
    }

    /// `lambda Omega` over all modules; exactly 0 before the first task is closed and at its anchor.
    pub fn penalty(&mut self, k: &Kernels, layers: &[Arc<Layer>]) -> f64 {
        let lambda = self.settings.lambda;
        if lambda == 0.0 {
            return 0.0;
        }
        self.modules.iter_mut().zip(layers).map(|(m, l)| lambda * m.memory.penalty(k, l)).sum()
    }

    /// The largest importance F; explicit steps are stable while `lambda F lr < 2`. For kind "delta" F is
    /// that of the weight change, `s^2 a_i c_j`; with several anchors this is an upper bound.
    pub fn max_importance(&self) -> f64 {
        self.modules.iter().map(|m| m.memory.max_importance()).fold(0.0, f64::max)
    }

    // -- samples, batch by batch --

    /// As [`Ewc::observe`], from inputs and output gradients alone.
    ///
    /// # Errors
    /// As [`Ewc::observe`].
    pub fn observe_gradients(
        &mut self,
        k: &Kernels,
        module: usize,
        layer: &Layer,
        x: &[f32],
        g: &[f32],
    ) -> Result<()> {
        let rank = layer.rank();
        let (rows, s) = (x.len() / layer.in_features(), layer.scaling());
        if rows == 0 || x.len() != rows * layer.in_features() || g.len() != rows * layer.out_features() {
            let got = format!("{} numbers", g.len());
            return Err(Error::shape("gradient", got, format!("({rows}, {})", layer.out_features())));
        }
        let (mut u, mut w) = (vec![0.0; rows * rank], vec![0.0; rows * rank]);
        layer.a.dots_batch(k, x, &mut u, s);
        layer.b.dots_batch(k, g, &mut w, s);
        self.observe(k, module, Samples { x, g, u: &u, w: &w })
    }

    /// One batch for kind "mas", which needs no labels: the gradient of `|y|^2`, `y = base + dY`.
    ///
    /// # Errors
    /// Shapes that do not fit, NaN, squares beyond f32. Nothing changes then.
    pub fn observe_outputs(
        &mut self,
        k: &Kernels,
        module: usize,
        layer: &Layer,
        x: &[f32],
        base: Option<&[f32]>,
    ) -> Result<()> {
        self.check_feedback(None)?;
        let rows = x.len() / layer.in_features();
        let mut g = vec![0.0; rows * layer.out_features()];
        layer.forward_rows(k, x, &mut g, false)?;
        if let Some(base) = base {
            if base.len() != g.len() {
                let want = format!("({rows}, {})", layer.out_features());
                return Err(Error::shape("base", format!("{} numbers", base.len()), want));
            }
            k.axpy(1.0, base, &mut g);
        }
        k.scale(2.0, &mut g);
        self.close_one(k, module, layer, x, &[&g])
    }

    /// One batch from inputs and passes of output gradients, whole or not at all.
    ///
    /// # Errors
    /// Shapes that do not fit, NaN, squares beyond f32. Nothing changes then.
    pub fn close_one(
        &mut self,
        k: &Kernels,
        module: usize,
        layer: &Layer,
        x: &[f32],
        passes: &[&[f32]],
    ) -> Result<()> {
        self.need_closed()?;
        let outcome = passes.iter().try_for_each(|g| self.observe_gradients(k, module, layer, x, g));
        match outcome {
            Ok(()) => self.seen(x.len() / layer.in_features()),
            Err(e) => {
                self.discard();
                Err(e)
            }
        }
    }

    /// Passes over a head's output rows, by the settings' Fisher (or of `|y|^2` for kind "mas").
    ///
    /// # Errors
    /// Labels that do not fit, NaN; another batch is open.
    pub fn passes(&mut self, y: &[f32], width: usize, labels: Labels<'_>) -> Result<Passes> {
        self.need_closed()?;
        if self.settings.kind.row().statistic == Statistic::Magnitudes {
            return Ok(Passes::of_norm(y, width));
        }
        Passes::of_head(self.settings.fisher, &mut self.rng, y, width, labels)
    }

    fn need_closed(&self) -> Result<()> {
        if self.modules.iter().any(|m| m.seen.is_open()) {
            return Err(Error::config("batch", "an open one", "none (training is in a step)"));
        }
        Ok(())
    }

    // -- single events --

    /// Refuses feedback that the settings' Fisher cannot use.
    pub(crate) fn check_feedback(&self, feedback: Option<&Feedback>) -> Result<()> {
        let free = self.settings.kind.row().statistic == Statistic::Magnitudes;
        match feedback {
            Some(f) if !free => fisher::check_feedback(self.settings.fisher, f),
            None if !free => {
                let kind = self.settings.kind;
                Err(Error::Feedback(format!("missing; only kind \"mas\" needs none, and this is {kind:?}")))
            }
            _ => Ok(()),
        }
    }

    /// Prepares one event; [`Ewc::commit`] counts it. Returns whether the event has anything to count.
    pub(crate) fn stage(&mut self, k: &Kernels, module: usize, e: &Observed<'_>) -> Result<bool> {
        self.staged = None;
        self.check_feedback(e.feedback)?;
        if self.modules[module].seen.is_full() {
            self.staged = Some(module);
            return Ok(true);
        }
        let row = |g, w| Samples { x: e.x, g, u: e.u, w };
        let statistic = self.settings.kind.row().statistic;
        let magnitudes = statistic == Statistic::Magnitudes;
        let seen = &mut self.modules[module].seen;
        let (layer, s) = (e.layer, e.layer.scaling());
        let (rank, n_out) = (layer.rank(), layer.out_features());
        let down = |g: &[f32], w: &mut [f32]| {
            layer.b.dots(k, g, w);
            k.scale(s, w);
        };
        let output = |twice: f32| {
            let mut y = vec![0.0; n_out];
            layer.b.combine(k, e.u, &mut y, false);
            if let Some(base) = e.base {
                k.axpy(1.0, base, &mut y);
            }
            k.scale(twice, &mut y);
            y
        };
        let mode = self.settings.fisher;
        match e.feedback {
            _ if magnitudes => {
                let (g, mut w) = (output(2.0), vec![0.0; rank]);
                down(&g, &mut w);
                seen.stage(k, &[row(&g, &w)])?;
            }
            Some(feedback) if fisher::takes_observed(mode, feedback) => seen.stage(k, &[row(e.g, e.w)])?,
            Some(Feedback::Target { .. }) if mode != super::Fisher::Sample => {
                // Unit Gaussian: c = 1 and E w_r^2 = s^2 |B_r|^2, no pass over outcomes.
                self.scratch.resize(n_out + rank, 1.0);
                let (ones, w) = self.scratch.split_at_mut(n_out);
                ones.fill(1.0);
                if statistic.needs_factors() {
                    row_norms(&layer.b, w);
                    k.scale(s, w);
                }
                seen.stage(k, &[row(ones, w)])?;
            }
            Some(feedback) => {
                let Some(rows) = fisher::event_rows(mode, &mut self.rng, k, feedback, &output(1.0)) else {
                    return Ok(false);
                };
                let mut w = vec![0.0; rows.len() / n_out * rank];
                layer.b.dots_batch(k, &rows, &mut w, s);
                let all: Vec<_> =
                    rows.chunks_exact(n_out).zip(w.chunks_exact(rank)).map(|(g, w)| row(g, w)).collect();
                seen.stage(k, &all)?;
            }
            None => seen.stage(k, &[row(e.g, e.w)])?,
        }
        self.staged = Some(module);
        Ok(true)
    }

    /// Counts the staged event.
    pub(crate) fn commit(&mut self, k: &Kernels) {
        let Some(module) = self.staged.take() else { return };
        let seen = &mut self.modules[module].seen;
        if seen.is_full() {
            self.ignored += 1;
        } else {
            seen.commit(k);
            self.samples += 1;
        }
    }

    /// Brings waiting events into the means.
    pub(super) fn flush(&mut self, k: &Kernels) {
        for m in &mut self.modules {
            m.seen.flush(k);
        }
    }

    // -- tasks --

    /// Ends a task: its importance joins the earlier ones, the anchor moves to the present weights, and the
    /// penalty with one anchor is exactly 0.
    ///
    /// # Errors
    /// Nothing was accumulated, and the kind measures samples ("l2" and "si" need none); an open batch;
    /// weights that are not finite. Nothing changes then.
    pub fn start_new_task(&mut self, k: &Kernels, layers: &[Arc<Layer>]) -> Result<()> {
        self.need_closed()?;
        let measures = self.settings.kind.row().statistic != Statistic::None;
        if measures && self.modules.iter().all(|m| m.seen.count() == 0) {
            return Err(Error::config(
                "start_new_task",
                "no samples since the last task",
                "accumulate_fisher (or adapt) on the task's data first; an anchor without importance holds nothing",
            ));
        }
        if let Some((m, _)) =
            self.modules.iter().zip(layers).find(|(_, l)| !(l.a.is_finite() && l.b.is_finite()))
        {
            return Err(Error::non_finite(format!("weights of {}", m.name)));
        }
        self.flush(k);
        let tasks: Vec<_> = self.modules.iter().zip(layers).map(|(m, l)| m.memory.task(&m.seen, l)).collect();
        let top = tasks.iter().map(super::Importance::max).fold(0.0, f64::max);
        let normalized = self.settings.normalize == Normalize::Max && top > 0.0;
        let at = Boundary {
            gamma: self.settings.gamma,
            online: self.settings.anchors == Anchors::Online,
            replace: self.settings.decay.is_some(),
            scale: normalized.then(|| 1.0 / top),
        };
        for ((m, task), layer) in self.modules.iter_mut().zip(tasks).zip(layers) {
            m.memory.consolidate(task, layer, &at);
            m.seen.next_task();
        }
        self.tasks += 1;
        (self.samples, self.ignored) = (0, 0);
        Ok(())
    }

    /// Means of `x^2` and `g^2` of one module over all samples of all tasks, and how many those are.
    pub fn moments(&mut self, k: &Kernels, module: usize) -> ([Vec<f64>; 2], u64) {
        let seen = &mut self.modules[module].seen;
        seen.flush(k);
        seen.all_moments()
    }

    /// Means of squares (kind "mas": of magnitudes) of the running task, in the layouts of A and B; `None`
    /// without samples or where the kind keeps none.
    pub fn task_fisher(&mut self, k: &Kernels, module: usize) -> Option<[Factor; 2]> {
        let seen = &mut self.modules[module].seen;
        seen.flush(k);
        seen.fisher()
    }

    /// Largest importance of the running task, before normalisation.
    pub fn task_importance(&mut self, k: &Kernels, layers: &[Arc<Layer>]) -> f64 {
        self.flush(k);
        let each = self.modules.iter().zip(layers).map(|(m, l)| m.memory.task(&m.seen, l).max());
        each.fold(0.0, f64::max)
    }

    /// Resident bytes; anchors count whole, though they share the learner's memory until its next step.
    pub fn memory_bytes(&self) -> usize {
        self.modules.iter().map(|m| m.seen.memory_bytes() + m.memory.memory_bytes()).sum()
    }
}

/// `|row r|` of a factor.
fn row_norms(f: &Factor, out: &mut [f32]) {
    let (w, g) = (f.stream(), f.geometry());
    for (r, out) in out.iter_mut().enumerate() {
        let mut acc = [0.0f32; crate::kernels::TILE];
        for t in 0..g.tiles() {
            let at = g.at(r, t);
            for (acc, v) in acc.iter_mut().zip(&w[at..at + crate::kernels::TILE]) {
                *acc += v * v;
            }
        }
        *out = acc.iter().sum::<f32>().sqrt();
    }
}
