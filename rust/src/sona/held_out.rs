//! The loss on events that no loop trains on: what the gate judges by.

use super::gather::{Gathered, Shape};
use super::members::Members;
use super::window::Pending;
use super::{Back, Sona};
use crate::adapter::Adapter;
use crate::error::Result;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::Learner;
use crate::learn::consolidate::Rows;
use crate::learn::feedback::Output;

/// A mean that is still a sum.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    pub loss: f64,
    pub weight: f64,
    pub rows: usize,
}

impl Sum {
    pub fn add(&mut self, other: Sum) {
        self.loss += other.loss;
        self.weight += other.weight;
        self.rows += other.rows;
    }

    /// `None` where nothing had a loss.
    pub fn mean(self) -> Option<f64> {
        (self.weight > 0.0 && self.loss.is_finite()).then(|| self.loss / self.weight)
    }
}

/// Loss of every row at `base + sum_k mix_k u B_k`. Rows without one (a zero output has no angle) are left out.
fn each(k: &Kernels, rows: &Rows, bs: &[&Factor], mix: &[f32], mut told: impl FnMut(usize, f64)) {
    let (mut delta, mut part, mut y) = (vec![0.0; rows.out], vec![0.0; rows.out], vec![0.0; rows.out]);
    for (i, u) in rows.u.chunks_exact(rows.rank.max(1)).enumerate() {
        delta.fill(0.0);
        for (b, &w) in bs.iter().zip(&mix[i * bs.len()..]).filter(|(_, w)| **w > 0.0) {
            b.combine(k, u, &mut part, false);
            k.axpy(w, &part, &mut delta);
        }
        y.copy_from_slice(&rows.base[i * rows.out..(i + 1) * rows.out]);
        k.axpy(1.0, &delta, &mut y);
        let at = Output { y: &y, delta: &delta };
        let loss = rows.feedback[i].evaluate(k, at, rows.advantage[i], None);
        if let Some(loss) = loss.filter(|l| !l.is_nan()) {
            told(i, f64::from(loss));
        }
    }
}

/// Weighted sum of the losses of [`each`].
fn losses(k: &Kernels, rows: &Rows, bs: &[&Factor], mix: &[f32]) -> Sum {
    let mut sum = Sum::default();
    each(k, rows, bs, mix, |i, loss| {
        let weight = f64::from(rows.weight[i]);
        sum.add(Sum { loss: weight * loss, weight, rows: 1 });
    });
    sum
}

/// How accepted weights do on events that they have not seen, beside no weights at all.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Contrast {
    n: f64,
    /// Sum and squares of (loss under the weights less loss under none).
    worse: f64,
    squares: f64,
    /// Sum of losses under none.
    none: f64,
}

/// Standard errors of the mean that count as more than chance.
const CERTAIN: f64 = 2.0;

impl Contrast {
    pub fn add(&mut self, k: &Kernels, rows: &Rows, b: &Factor, familiar: &[bool]) {
        let n = rows.event.len();
        let mut none = vec![f64::NAN; n];
        each(k, rows, &[b], &vec![0.0; n], |i, loss| none[i] = loss);
        each(k, rows, &[b], &vec![1.0; n], |i, loss| {
            if none[i].is_nan() || !familiar[i] {
                return;
            }
            let worse = loss - none[i];
            self.n += 1.0;
            self.worse += worse;
            self.squares += worse * worse;
            self.none += none[i];
        });
    }

    /// Mean losses under the weights and under none, where the first is the greater by more than chance and by
    /// more than `tolerance`.
    pub fn contradicts(&self, tolerance: f64) -> Option<(f64, f64)> {
        if self.n < 2.0 {
            return None;
        }
        let (mean, none) = (self.worse / self.n, self.none / self.n);
        let variance = (self.squares / self.n - mean * mean).max(0.0) * self.n / (self.n - 1.0);
        let certain = mean > CERTAIN * (variance / self.n).sqrt();
        (certain && mean > tolerance * none).then_some((none + mean, none))
    }
}

/// Held-out rows of every module, laid out once.
pub(super) struct HeldOut(Vec<Gathered>);

impl Sona {
    /// The reservoir's held-out samples and those of a window.
    pub(super) fn held_out(&self, back: &Back, taken: &[Pending], layers: &[&Layer]) -> HeldOut {
        let (outs, ensemble) = (self.outs(), self.settings.is_ensemble());
        let of = |(m, layer): (usize, &&Layer)| {
            let shape = Shape { module: m as u32, layer, outs: &outs };
            let mut g = Gathered::new(&shape);
            back.reservoir.part(true).iter().for_each(|e| g.entry(&shape, &e));
            taken.iter().filter(|p| p.held_out).for_each(|p| g.pending(&shape, p));
            g.finish(self.kernels, &shape, ensemble)
        };
        HeldOut(layers.iter().enumerate().map(of).collect())
    }

    /// Loss under members' B, `bs[member][module]`.
    pub(super) fn held_out_loss(&self, held: &HeldOut, members: &Members, bs: &[Vec<&Factor>]) -> Sum {
        let mut sum = Sum::default();
        for (m, g) in held.0.iter().enumerate() {
            let mix = self.mixing(members, &g.inputs, g.rows.event.len());
            let bs: Vec<&Factor> = bs.iter().map(|b| b[m]).collect();
            sum.add(losses(self.kernels, &g.rows, &bs, &mix));
        }
        sum
    }

    /// The live weights' loss on all held-out samples, or an adapter's; `None` while there are none.
    ///
    /// # Errors
    /// An adapter of other modules or shapes.
    pub fn evaluate(&self, adapter: Option<&Adapter>) -> Result<Option<f64>> {
        let _inside = self.gate.enter();
        let back = self.back();
        let window: Vec<Pending> = self.inner().window.iter().filter(|p| p.held_out).cloned().collect();
        let names = self.lora.names();
        let Some(adapter) = adapter else {
            let members = self.members.load_full();
            let masters: Vec<_> = members.loras.iter().map(|l| l.masters()).collect();
            let layers: Vec<&Layer> = masters[0].iter().map(|l| &**l).collect();
            let held = self.held_out(&back, &window, &layers);
            let bs: Vec<Vec<&Factor>> = masters.iter().map(|m| m.iter().map(|l| &*l.b).collect()).collect();
            return Ok(self.held_out_loss(&held, &members, &bs).mean());
        };
        let of = |name: &String| adapter.layer(name).map(|l| l.cast(crate::Dtype::F32));
        let layers = names.iter().map(of).collect::<Result<Vec<_>>>()?;
        for (m, layer) in layers.iter().enumerate() {
            let (got, want) = ((layer.in_features(), layer.out_features()), self.lora.shape(m));
            if got != want {
                return Err(crate::Error::shape(&names[m], format!("{got:?}"), format!("{want:?}")));
            }
        }
        let refs: Vec<&Layer> = layers.iter().collect();
        let held = self.held_out(&back, &window, &refs);
        let one = Members::one(self.lora.clone());
        Ok(self.held_out_loss(&held, &one, &[refs.iter().map(|l| &*l.b).collect()]).mean())
    }
}

/// B of every module of learners.
pub(super) fn masters(learners: &[Learner]) -> Vec<&Factor> {
    learners.iter().map(|l| &*l.master().b).collect()
}
