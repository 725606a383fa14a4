//! Importance of a chain's weights for data it has learned: per-sample gradients over model labels.

use super::{Chain, Pass};
use crate::error::{Error, Result};
use crate::ewc::Ewc;
use crate::ewc::fisher::Labels;
use crate::learn::train::{Data, Targets, Tick, Trainee};

/// Rows that run at once.
const BLOCK: usize = 256;

impl Chain {
    /// Runs forward and as many backwards as the Fisher has passes over all rows, into `ewc`.
    ///
    /// # Errors
    /// Data that do not fit, a row that is not finite (its block is not counted), a tick that refuses.
    pub fn accumulate_importance(
        &self,
        data: &Data<'_>,
        ewc: &mut Ewc,
        pass: &mut Pass,
        tick: &mut Tick<'_>,
    ) -> Result<()> {
        self.check(data)?;
        ewc.check_same(&self.lora)?;
        let (n_in, n_out) = (self.in_features(), self.out_features());
        for first in (0..data.rows).step_by(BLOCK) {
            tick(first, data.rows)?;
            let last = (first + BLOCK).min(data.rows);
            let x = &data.x[first * n_in..last * n_in];
            let labels = match data.y {
                Targets::Values(y) => Labels::Targets(&y[first * n_out..last * n_out]),
                Targets::Labels(y) => Labels::Classes(&y[first..last]),
            };
            let outcome = self.importance_of(x, labels, ewc, pass);
            pass.hold = false;
            pass.clear();
            if let Err(e) = outcome {
                ewc.discard();
                return Err(match e {
                    Error::Sample { arg, row, reason, .. } => {
                        Error::Sample { arg, row: first + row, reason, steps_done: 0 }
                    }
                    other => other,
                });
            }
            ewc.seen(last - first)?;
        }
        tick(data.rows, data.rows)
    }

    fn importance_of(&self, x: &[f32], labels: Labels<'_>, ewc: &mut Ewc, pass: &mut Pass) -> Result<()> {
        let (k, version) = (self.lora.kernels(), self.version());
        let z = self.forward_tape(k, &version, x, true, pass)?;
        let passes = ewc.passes(&z, self.out_features(), labels);
        pass.give(z);
        let passes = passes?;
        for c in 0..passes.count() {
            let mut g = pass.take(x.len() / self.in_features() * self.out_features());
            passes.gradient(c, &mut g);
            // With checkpoints a backward gives up its segments, so that forward has to lay them anew.
            pass.hold = self.segment == 1;
            self.backward(k, &version, x, g, pass, None, Some(&mut *ewc))?;
            if self.segment > 1 && c + 1 < passes.count() {
                let again = self.forward_tape(k, &version, x, true, pass)?;
                pass.give(again);
            }
        }
        Ok(())
    }
}
