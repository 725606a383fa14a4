//! Importance of a chain's weights for data it has learned: per-sample gradients over model labels.

use super::{Chain, Head, Pass};
use crate::error::Result;
use crate::learn::Regularizer;
use crate::learn::batch::BadRow;
use crate::learn::train::{Data, Targets, Tick, Trainee};
use crate::rng::Rng;

/// Whose labels the squared gradients are taken for (Kunstner et al., arXiv 1905.12558).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Labels {
    /// All classes, weighted by the model's probabilities; mse: unit Gaussian noise on every output.
    Exact,
    /// One label drawn from the model per sample.
    Sample,
    /// The observed label.
    Empirical,
    /// None: the gradient of `|z|^2` (memory aware synapses, arXiv 1711.09601).
    Output,
}

/// Rows that run at once.
const BLOCK: usize = 256;

impl Chain {
    /// Runs forward and as many backwards as the labels need over all rows, into `anchor`.
    ///
    /// # Errors
    /// Data that do not fit, a row that is not finite (its batch is dropped), a tick that refuses.
    pub fn accumulate_importance(
        &self,
        data: &Data<'_>,
        labels: Labels,
        rng: &mut Rng,
        anchor: &mut dyn Regularizer,
        pass: &mut Pass,
        tick: &mut Tick<'_>,
    ) -> Result<()> {
        self.check(data)?;
        let (n_in, n_out) = (self.in_features(), self.out_features());
        for first in (0..data.rows).step_by(BLOCK) {
            tick(first, data.rows)?;
            let last = (first + BLOCK).min(data.rows);
            let x = &data.x[first * n_in..last * n_in];
            let y = match data.y {
                Targets::Values(y) => Targets::Values(&y[first * n_out..last * n_out]),
                Targets::Labels(y) => Targets::Labels(&y[first..last]),
            };
            if let Err(bad) = self.block(x, y, labels, rng, anchor, pass) {
                pass.clear();
                anchor.discard();
                return Err(BadRow { row: first + bad.row, ..bad }.into());
            }
            anchor.seen(last - first)?;
        }
        tick(data.rows, data.rows)
    }

    fn block(
        &self,
        x: &[f32],
        y: Targets<'_>,
        labels: Labels,
        rng: &mut Rng,
        anchor: &mut dyn Regularizer,
        pass: &mut Pass,
    ) -> Result<(), BadRow> {
        let (k, version) = (self.lora.kernels(), self.version());
        let n_out = self.out_features();
        let mut z = self.forward_tape(k, &version, x, true, pass)?;
        let passes = match labels {
            Labels::Exact => n_out,
            _ => 1,
        };
        if self.head == Head::CrossEntropy && labels != Labels::Output {
            z.chunks_exact_mut(n_out).for_each(|row| {
                super::head::softmax(row);
            });
        }
        for c in 0..passes {
            let mut g = pass.copy(&z);
            for (i, row) in g.chunks_exact_mut(n_out).enumerate() {
                self.label_gradient(row, i, c, y, labels, rng);
            }
            // With checkpoints a backward gives up its segments, so that forward has to lay them anew.
            pass.hold = self.segment == 1;
            let outcome = self.backward(k, &version, x, g, pass, None, Some(&mut *anchor));
            pass.hold = false;
            outcome?;
            if self.segment > 1 && c + 1 < passes {
                let again = self.forward_tape(k, &version, x, true, pass)?;
                pass.give(again);
            }
        }
        pass.give(z);
        pass.clear();
        Ok(())
    }

    /// `row` holds probabilities (cross-entropy) or outputs (mse) and becomes a per-sample gradient.
    fn label_gradient(
        &self,
        row: &mut [f32],
        i: usize,
        c: usize,
        y: Targets<'_>,
        labels: Labels,
        rng: &mut Rng,
    ) {
        match (self.head, labels) {
            (_, Labels::Output) => row.iter_mut().for_each(|v| *v *= 2.0),
            (Head::CrossEntropy, Labels::Exact) => {
                let root = row[c].sqrt();
                row[c] -= 1.0;
                row.iter_mut().for_each(|v| *v *= root);
            }
            (Head::CrossEntropy, Labels::Sample) => {
                let mut left = rng.uniform();
                let drawn = row.iter().position(|p| {
                    left -= p;
                    left < 0.0
                });
                row[drawn.unwrap_or(row.len() - 1)] -= 1.0;
            }
            (Head::CrossEntropy, Labels::Empirical) => {
                if let Targets::Labels(y) = y {
                    row[y[i] as usize] -= 1.0;
                }
            }
            (Head::Mse, Labels::Exact) => {
                row.fill(0.0);
                row[c] = 1.0;
            }
            // Signs have the second moments of unit Gaussian noise.
            (Head::Mse, Labels::Sample) => {
                row.iter_mut().for_each(|v| *v = if rng.uniform() < 0.5 { -1.0 } else { 1.0 });
            }
            (Head::Mse, Labels::Empirical) => {
                if let Targets::Values(t) = y {
                    let t = &t[i * row.len()..(i + 1) * row.len()];
                    row.iter_mut().zip(t).for_each(|(v, t)| *v -= t);
                }
            }
        }
    }
}
