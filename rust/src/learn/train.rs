//! The training loop: batches in a given order, one optimiser step each, over modules or a chain.

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::micro_lora::MicroLora;

use super::accumulate::Gradients;
use super::batch::{self, BadRow, Batch, Replayed, Rows};
use super::gathered::Gathered;
use super::optim::Optimizer;
use super::regularizer::{Regularizer, Samples};
use super::replay_memory::ReplayMemory;
use super::update::StepOptions;

/// What each row should give.
#[derive(Clone, Copy)]
pub enum Targets<'a> {
    /// Wanted outputs, `(n, out)`.
    Values(&'a [f32]),
    /// Classes, `(n,)`.
    Labels(&'a [i64]),
}

/// A data set as the loop sees it: row-major, whole.
#[derive(Clone, Copy)]
pub struct Data<'a> {
    /// Inputs, `(n, in)`.
    pub x: &'a [f32],
    /// Targets.
    pub y: Targets<'a>,
    /// Outputs of the frozen layers, `(n, out)`.
    pub base: Option<&'a [f32]>,
    /// Weight of each row's loss.
    pub weights: Option<&'a [f32]>,
    /// Rows.
    pub rows: usize,
    /// The last rows of x and y are of earlier tasks, without base and weights above; batches only.
    pub replayed: Option<Replayed<'a>>,
}

impl Data<'_> {
    /// Rows that are of this data set.
    pub fn fresh(&self) -> usize {
        self.rows - self.replayed.map_or(0, |r| r.rows())
    }
}

/// What earlier tasks say in a step.
#[derive(Default)]
pub struct Past<'a> {
    /// A penalty on the weights.
    pub anchor: Option<&'a mut dyn Regularizer>,
    /// Rows that join every batch, as many as it has.
    pub replay: Option<&'a mut ReplayMemory>,
}

/// How the loop runs.
#[derive(Clone, Copy)]
pub struct Plan<'a> {
    /// Rows in the order of their visit.
    pub order: &'a [usize],
    /// One learning rate per step.
    pub lrs: &'a [f64],
    /// Rows of a batch.
    pub batch: usize,
    /// Batches of a step.
    pub accumulation: usize,
    /// Global norm to clip to.
    pub max_grad_norm: Option<f64>,
    /// The penalty acts in every n-th step, n-fold.
    pub penalty_every: usize,
    /// Whether the batches' squared gradients go into the importance.
    pub observe: bool,
}

/// Buffers of a run, kept between calls.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(crate) sums: Vec<Option<Box<Gradients>>>,
    pub(crate) rows: Rows,
    pub(crate) losses: Vec<f32>,
    pub(crate) pass: crate::chain::Pass,
    gathered: Gathered,
}

impl Workspace {
    /// Empties the sums, one place per module.
    pub fn prepare(&mut self, lora: &MicroLora) {
        self.sums.resize_with(lora.names().len(), || None);
        self.clear();
    }

    fn clear(&mut self) {
        self.sums.iter_mut().flatten().for_each(|s| s.clear());
    }

    /// Mean gradients of the modules that have any.
    pub fn means(&self) -> Vec<Gradients> {
        let of = |s: &Gradients| {
            let mut mean = s.clone();
            let scale = 1.0 / s.count.max(1) as f32;
            mean.a.stream_mut().iter_mut().for_each(|v| *v *= scale);
            mean.b.stream_mut().iter_mut().for_each(|v| *v *= scale);
            mean.magnitude.iter_mut().for_each(|v| *v *= scale);
            mean
        };
        self.sums.iter().flatten().map(|s| of(s)).collect()
    }

    /// Mean of the last batch's losses.
    pub fn mean_loss(&self) -> f32 {
        let sum: f64 = self.losses.iter().map(|&l| f64::from(l)).sum();
        (sum / self.losses.len().max(1) as f64) as f32
    }

    /// Most activation bytes alive at once in a chain's forward and backward: stored inputs, bottlenecks,
    /// outputs and gradients between layers. A single layer keeps x, which the caller holds, and rank numbers
    /// a row.
    pub fn peak_activation_bytes(&self) -> usize {
        self.pass.peak_bytes()
    }
}

/// What can be trained: some modules of a learner on their own, or a chain of layers.
pub trait Trainee: Sync {
    /// The learner that holds the weights.
    fn lora(&self) -> &MicroLora;

    /// Refuses data whose widths do not fit.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Config`] that names the argument.
    fn check(&self, data: &Data<'_>) -> Result<()>;

    /// Losses of a batch into `ws.losses`; with `learn`, gradients are added to `ws.sums` and, where given,
    /// per-sample importance to the open batch of `observe`.
    ///
    /// # Errors
    /// The first row that cannot be used; sums are unusable then.
    fn run(
        &self,
        k: &Kernels,
        batch: Data<'_>,
        learn: bool,
        ws: &mut Workspace,
        observe: Option<&mut dyn Regularizer>,
    ) -> Result<(), BadRow>;

    /// Names of the modules that answer to an input side by side; none for a chain, which answers once.
    fn modules(&self) -> Vec<String>;

    /// Answers of the adapter to rows `(n, in)`: `(n, out)`, with as many blocks as there are modules per row.
    ///
    /// # Errors
    /// The first row that is not finite.
    fn outputs(&self, k: &Kernels, x: &[f32], ws: &mut Workspace) -> Result<Vec<f32>, BadRow>;
}

/// Modules that each learn the same targets from the same inputs.
pub struct Modules<'a> {
    /// The learner.
    pub lora: &'a MicroLora,
    /// Which of its modules.
    pub modules: Vec<usize>,
}

impl Trainee for Modules<'_> {
    fn lora(&self) -> &MicroLora {
        self.lora
    }

    fn check(&self, data: &Data<'_>) -> Result<()> {
        let Targets::Values(y) = data.y else {
            return Err(Error::config("y", "labels", "target vectors (labels need a chain with a head)"));
        };
        if self.modules.is_empty() {
            return Err(Error::config("modules", "nothing", "at least one module"));
        }
        for &m in &self.modules {
            let (n_in, n_out) = self.lora.shape(m);
            let check = |arg: &str, len: usize, width: usize| {
                if len == data.rows * width {
                    return Ok(());
                }
                let got = format!("({}, {})", data.rows, len / data.rows.max(1));
                let want = format!("({}, {width}) for {}", data.rows, self.lora.names()[m]);
                Err(Error::shape(arg, got, want))
            };
            check("x", data.x.len(), n_in)?;
            check("y", y.len(), n_out)?;
            data.base.map_or(Ok(()), |b| check("base", b.len(), n_out))?;
        }
        Ok(())
    }

    fn run(
        &self,
        k: &Kernels,
        batch: Data<'_>,
        learn: bool,
        ws: &mut Workspace,
        mut observe: Option<&mut dyn Regularizer>,
    ) -> Result<(), BadRow> {
        let Targets::Values(target) = batch.y else { unreachable!("checked") };
        let Data { x, base, weights, replayed, .. } = batch;
        let rows = Batch { x, target, base, weights, replayed };
        let (layers, _) = self.lora.layers(&self.modules);
        let (mut mean, mut offset) = (vec![0.0f32; batch.fresh()], 0);
        for (layer, &m) in layers.iter().zip(&self.modules) {
            if learn {
                let sums = ws.sums[m].get_or_insert_with(|| Box::new(Gradients::new(layer)));
                batch::accumulate(k, layer, rows, offset, &mut ws.rows, &mut ws.losses, sums)?;
                if let Some(e) = observe.as_deref_mut() {
                    let s = Samples { x, g: &ws.rows.g, u: &ws.rows.u, w: &ws.rows.w };
                    let s = s.first(batch.fresh(), batch.rows);
                    e.observe(k, m, s).map_err(|_| batch::unsquared(batch.fresh(), s))?;
                }
            } else {
                batch::squared_error(k, layer, rows, offset, &mut ws.rows, &mut ws.losses)?;
            }
            for (mean, loss) in mean.iter_mut().zip(&ws.losses) {
                *mean += loss / layers.len() as f32;
            }
            offset += layer.out_features();
        }
        ws.losses = mean;
        Ok(())
    }

    fn modules(&self) -> Vec<String> {
        self.modules.iter().map(|&m| self.lora.names()[m].clone()).collect()
    }

    fn outputs(&self, k: &Kernels, x: &[f32], ws: &mut Workspace) -> Result<Vec<f32>, BadRow> {
        let (layers, _) = self.lora.layers(&self.modules);
        let stride: usize = layers.iter().map(|l| l.out_features()).sum();
        let rows = x.len() / layers[0].in_features();
        let (mut out, mut offset) = (vec![0.0f32; rows * stride], 0);
        for layer in &layers {
            ws.rows.down(k, layer, x)?;
            let width = layer.out_features();
            let mut y = vec![0.0f32; rows * width];
            layer.b.combine_batch(k, &ws.rows.u, &mut y, true);
            for (to, from) in out.chunks_exact_mut(stride).zip(y.chunks_exact(width)) {
                to[offset..offset + width].copy_from_slice(from);
            }
            offset += width;
        }
        Ok(out)
    }
}

/// What a run measured, one number per step.
#[derive(Clone, Debug, Default)]
pub struct Log {
    /// Mean loss of the step's rows before the step, penalty not counted.
    pub losses: Vec<f32>,
    /// Norm of the mean gradient before clipping.
    pub grad_norms: Vec<f32>,
}

/// Called between steps with (done, total).
pub type Tick<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// Steps between two ticks: tens of microseconds each, so that signals wait for milliseconds at most.
const TICK: usize = 64;

pub(super) fn check_data(trainee: &dyn Trainee, data: &Data<'_>) -> Result<()> {
    if data.rows == 0 || data.x.is_empty() {
        return Err(Error::shape("x", "(0, n)", "at least one row"));
    }
    let rows = |arg: &str, got: usize| {
        if got == data.rows {
            Ok(())
        } else {
            Err(Error::shape(arg, format!("({got},)"), format!("({},)", data.rows)))
        }
    };
    if let Targets::Labels(y) = data.y {
        rows("y", y.len())?;
    }
    if let Some(w) = data.weights {
        rows("weights", w.len())?;
        if let Some(row) = w.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
            return Err(Error::config(format!("weights[{row}]"), w[row], "a finite number, 0 or above"));
        }
    }
    trainee.check(data)
}

/// Runs the plan's steps. Weights change step by step; a refused row stops before its step.
///
/// # Errors
/// Data, a memory or a plan that do not fit, a row that cannot be learned from, a step that would overflow, a
/// tick that refuses. What earlier steps did stays done.
pub fn train(
    trainee: &dyn Trainee,
    data: &Data<'_>,
    plan: &Plan<'_>,
    opt: &mut Optimizer,
    past: Past<'_>,
    ws: &mut Workspace,
    tick: &mut Tick<'_>,
) -> Result<Log> {
    check_data(trainee, data)?;
    let Past { mut anchor, replay } = past;
    let mut replay = replay.filter(|r| r.acts());
    if let Some(memory) = &replay {
        memory.check(trainee, data)?;
    }
    let (lora, k) = (trainee.lora(), trainee.lora().kernels());
    let per_step = plan.batch.saturating_mul(plan.accumulation);
    let steps = plan.order.len().div_ceil(per_step.max(1));
    if plan.lrs.len() != steps {
        return Err(Error::shape("lrs", format!("({},)", plan.lrs.len()), format!("({steps},)")));
    }
    if let Some(row) = plan.order.iter().find(|r| **r >= data.rows) {
        return Err(Error::config("order", row, format!("rows below {}", data.rows)));
    }
    for &lr in plan.lrs {
        StepOptions { lr, max_grad_norm: plan.max_grad_norm, penalty: 1.0 }.validate()?;
    }
    opt.check(lora)?;
    let mut log = Log::default();
    ws.prepare(lora);
    tick(0, steps)?;
    for (step, order) in plan.order.chunks(per_step).enumerate() {
        let mut sum = 0.0f64;
        for (i, part) in order.chunks(plan.batch).enumerate() {
            let mut gathered = std::mem::take(&mut ws.gathered);
            gathered.fill(data, part);
            if let Some(memory) = replay.as_deref_mut() {
                gathered.join(memory, part.len());
            }
            let observer = anchor.as_deref_mut().filter(|_| plan.observe);
            let outcome = trainee.run(k, gathered.view(data), true, ws, observer.map(|e| e as _));
            ws.gathered = gathered;
            if let Err(bad) = outcome {
                ws.clear();
                if let Some(e) = anchor.as_deref_mut().filter(|_| plan.observe) {
                    e.discard();
                }
                if bad.row >= part.len() {
                    let detail = " in the loss of a stored row: the weights have grown too large".into();
                    return Err(Error::NonFinite { arg: "replay".into(), detail });
                }
                let row = order[i * plan.batch + bad.row];
                let (arg, reason) = (bad.arg.to_string(), bad.reason.to_string());
                return Err(Error::Sample { arg, row, reason, steps_done: step });
            }
            sum += ws.losses.iter().map(|&l| f64::from(l)).sum::<f64>();
        }
        let penalty = StepOptions::penalty_weight(opt.steps, plan.penalty_every);
        let at = StepOptions { lr: plan.lrs[step], max_grad_norm: plan.max_grad_norm, penalty };
        let done = lora.edit(|learners| {
            let reborrowed = anchor.as_deref_mut().map(|e| e as &mut dyn Regularizer);
            let done = super::update::update(k, learners, &mut ws.sums, opt, reborrowed, at)?;
            Ok((true, done))
        });
        let done = match done {
            Ok(done) => done,
            Err(e) => {
                ws.clear();
                if let Some(e) = anchor.as_deref_mut().filter(|_| plan.observe) {
                    e.discard();
                }
                return Err(e);
            }
        };
        if let Some(e) = anchor.as_deref_mut().filter(|_| plan.observe) {
            e.seen(order.len())?;
        }
        log.losses.push((sum / order.len() as f64) as f32);
        log.grad_norms.push(done.grad_norm as f32);
        if (step + 1) % TICK == 0 || step + 1 == steps {
            tick(step + 1, steps)?;
        }
    }
    Ok(log)
}

/// Rows that run at once where nothing is learned.
pub(super) const BLOCK: usize = 256;

/// Loss of every row; nothing is learned.
///
/// # Errors
/// Data that do not fit, a row whose loss is not finite, a tick that refuses.
pub fn evaluate(
    trainee: &dyn Trainee,
    data: &Data<'_>,
    ws: &mut Workspace,
    tick: &mut Tick<'_>,
) -> Result<Vec<f32>> {
    check_data(trainee, data)?;
    let k = trainee.lora().kernels();
    let mut losses = Vec::with_capacity(data.rows);
    let order: Vec<usize> = (0..data.rows).collect();
    for part in order.chunks(BLOCK) {
        tick(part[0], data.rows)?;
        let mut gathered = std::mem::take(&mut ws.gathered);
        gathered.fill(data, part);
        let outcome = trainee.run(k, gathered.view(data), false, ws, None);
        ws.gathered = gathered;
        outcome.map_err(|bad| BadRow { row: part[0] + bad.row, ..bad })?;
        losses.extend_from_slice(&ws.losses);
    }
    tick(data.rows, data.rows)?;
    Ok(losses)
}

/// The step of `Optimizer.step`: the mean of the gradients that `adapt` left pending.
///
/// # Errors
/// As [`train`]; pending gradients and weights are as they were then.
pub fn step_pending(
    lora: &MicroLora,
    opt: &mut Optimizer,
    anchor: Option<&mut dyn Regularizer>,
    at: StepOptions,
) -> Result<super::StepOutcome> {
    let at = at.validate()?;
    opt.check(lora)?;
    let k = lora.kernels();
    lora.edit(|learners| {
        // The penalty is added to the sums, so they are copied where a refusal must find them whole.
        let keep = anchor.as_ref().is_some_and(|e| e.is_active() || e.uses_path());
        let mut sums: Vec<_> = learners.iter_mut().map(|l| l.gradients.take()).collect();
        let saved = keep.then(|| sums.clone());
        let outcome = super::update::update(k, learners, &mut sums, opt, anchor, at);
        if let (Err(_), Some(saved)) = (&outcome, saved) {
            sums = saved;
        }
        for (learner, sums) in learners.iter_mut().zip(sums) {
            learner.gradients = sums;
        }
        let outcome = outcome?;
        Ok((outcome.events > 0, outcome))
    })
}

impl Optimizer {
    /// Refuses a learner of other shapes than it was made for.
    ///
    /// # Errors
    /// [`Error::Config`] on `lora`.
    pub fn check(&self, lora: &MicroLora) -> Result<()> {
        let shape = |l: &Layer| [l.in_features(), l.out_features(), l.rank()];
        let got: Vec<_> = lora.masters().iter().map(|l| shape(l)).collect();
        if got == self.shapes {
            return Ok(());
        }
        Err(Error::config("lora", format!("shapes {got:?}"), format!("{:?} of this optimizer", self.shapes)))
    }
}
