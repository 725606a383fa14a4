//! Losses that are not quadratic: values, gradients and a bound of their curvature, evaluated at every step.

use super::objective::{BLOCK, Block, Part, curve, is_general};
use super::strategy::Plan;
use super::{Problem, Rows, check};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::learn::Feedback;
use crate::learn::feedback::Output;

/// A sample whose loss is evaluated at every step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    part: Part,
    row: usize,
    /// Coefficient of its loss.
    coef: f32,
    /// It had a loss at the current B; a sample without one is left out of the step.
    active: bool,
}

/// The samples that count and are not quadratic.
pub(super) fn samples(p: &Problem, plan: &Plan) -> Vec<Sample> {
    let of = |part, rows: &Rows, coefs: &[f32]| -> Vec<Sample> {
        let counts = |(row, &coef): (usize, &f32)| {
            (coef > 0.0 && is_general(&rows.feedback[row])).then_some(Sample {
                part,
                row,
                coef,
                active: true,
            })
        };
        coefs.iter().enumerate().filter_map(counts).collect()
    };
    let mut all = of(Part::Window, &p.window, &plan.window);
    all.extend(of(Part::Replay, &p.replay, &plan.replay));
    all
}

/// Sums over samples at one B.
#[derive(Clone)]
pub(super) struct Sums {
    pub loss: f64,
    /// Gradient, `(rank, out)`.
    pub g: Factor,
    /// Curvature, lower triangle of `(rank, rank)`.
    pub h: Vec<f64>,
}

/// A bound of the loss's curvature in y: the inverse of NLMS's step, `1 / |y|^2` of it where the loss sees only
/// directions. A reward is quadratic along a unit vector, so 1 bounds it without its cautious step.
fn curvature(f: &Feedback, y2: f32) -> f32 {
    match f {
        Feedback::Reward { .. } => 1.0,
        _ if f.is_angular() => 1.0 / (f.default_mu() * y2),
        _ => 1.0 / f.default_mu(),
    }
}

/// Outputs of the samples' adapter part at `b` into `block.delta`.
fn outputs(k: &Kernels, b: &Factor, p: &Problem, some: &[Sample], block: &mut Block) {
    block.u.clear();
    for s in some {
        let rows = of(p, s.part);
        block.u.extend_from_slice(&rows.u[s.row * rows.rank..(s.row + 1) * rows.rank]);
    }
    block.delta.resize(some.len() * b.len(), 0.0);
    b.combine_batch(k, &block.u, &mut block.delta, false);
}

fn of(p: &Problem, part: Part) -> &Rows {
    match part {
        Part::Window => &p.window,
        Part::Replay => &p.replay,
    }
}

/// Adds losses, gradients and curvature at `b`; marks samples that have no loss there.
pub(super) fn gather(
    k: &Kernels,
    b: &Factor,
    p: &Problem,
    all: &mut [Sample],
    sums: &mut Sums,
    block: &mut Block,
) {
    let (rank, out) = (b.rank(), b.len());
    for some in all.chunks_mut(BLOCK) {
        outputs(k, b, p, some, block);
        block.z.clear();
        block.z.resize(some.len() * out, 0.0);
        for (m, s) in some.iter_mut().enumerate() {
            let (rows, at) = (of(p, s.part), m * out..(m + 1) * out);
            let (delta, g) = (&block.delta[at.clone()], &mut block.z[at]);
            whole(&rows.base[s.row * out..(s.row + 1) * out], delta, &mut block.y);
            let here = Output { y: &block.y, delta };
            let f = &rows.feedback[s.row];
            let loss = f.evaluate(k, here, rows.advantage[s.row], Some(g));
            s.active = loss.is_some();
            let Some(loss) = loss else {
                g.fill(0.0);
                continue;
            };
            k.scale(s.coef, g);
            sums.loss += f64::from(s.coef) * f64::from(loss);
            let c = s.coef * curvature(f, k.dot(&block.y, &block.y));
            curve(&mut sums.h, f64::from(c), &block.u[m * rank..(m + 1) * rank]);
        }
        sums.g.outer_batch(k, &block.u, &block.z);
    }
}

/// Losses at `b` of the samples that had one; infinite where one has none any more or overflows.
pub(super) fn losses(k: &Kernels, b: &Factor, p: &Problem, all: &[Sample], block: &mut Block) -> f64 {
    let out = b.len();
    let mut sum = 0.0;
    for some in all.chunks(BLOCK) {
        outputs(k, b, p, some, block);
        for (s, delta) in some.iter().zip(block.delta.chunks_exact(out)).filter(|(s, _)| s.active) {
            let rows = of(p, s.part);
            whole(&rows.base[s.row * out..(s.row + 1) * out], delta, &mut block.y);
            let here = Output { y: &block.y, delta };
            let loss = rows.feedback[s.row].evaluate(k, here, rows.advantage[s.row], None);
            let loss = loss.filter(|l| l.is_finite()).map_or(f64::INFINITY, f64::from);
            sum += f64::from(s.coef) * loss;
        }
    }
    sum
}

/// How many samples have no loss at the current B.
pub(super) fn silent(all: &[Sample]) -> usize {
    all.iter().filter(|s| !s.active).count()
}

fn whole(base: &[f32], delta: &[f32], y: &mut Vec<f32>) {
    y.clear();
    y.extend(base.iter().zip(delta).map(|(b, d)| b + d));
}

/// Weighted mean of the samples' own losses at `y = base + u B`.
///
/// A gradient has no loss, and a zero output no angle: such samples are left out, and `None` means that there were
/// no others of a weight above 0. A loss that overflows makes the mean infinite, never NaN. Rows of another shape
/// than `b` have no mean either.
pub fn mean_loss(k: &Kernels, b: &Factor, rows: &Rows) -> Option<f64> {
    check::rows("rows", rows, (b.rank(), b.len())).ok()?;
    let (rank, out) = (b.rank(), b.len());
    let (mut sum, mut total) = (0.0, 0.0);
    let (mut delta, mut y) = (vec![0.0; BLOCK * out], Vec::new());
    for start in (0..rows.len()).step_by(BLOCK) {
        let n = BLOCK.min(rows.len() - start);
        b.combine_batch(k, &rows.u[start * rank..(start + n) * rank], &mut delta[..n * out], false);
        for (i, delta) in (start..start + n).zip(delta.chunks_exact(out)) {
            let weight = f64::from(rows.weight[i]);
            if weight == 0.0 || matches!(*rows.feedback[i], Feedback::Gradient { .. }) {
                continue;
            }
            whole(&rows.base[i * out..(i + 1) * out], delta, &mut y);
            let loss = rows.feedback[i].evaluate(k, Output { y: &y, delta }, rows.advantage[i], None);
            if let Some(loss) = loss {
                sum += weight * if loss.is_finite() { f64::from(loss) } else { f64::INFINITY };
                total += weight;
            }
        }
    }
    (total > 0.0).then(|| sum / total)
}
