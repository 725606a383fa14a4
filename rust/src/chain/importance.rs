//! Importance of a chain's weights for data it has learned: per-sample gradients over model labels.

use std::sync::{Mutex, PoisonError};

use super::{Chain, Pass};
use crate::error::{Error, Result};
use crate::ewc::Ewc;
use crate::ewc::fisher::Labels;
use crate::learn::Regularizer;
use crate::learn::train::{Data, Targets, Tick, Trainee, Workspace, evaluate};

/// Rows that run at once.
const BLOCK: usize = 256;

impl Chain {
    /// Runs forward and as many backwards as the Fisher has passes over all rows, into `ewc`, which is locked
    /// block by block.
    ///
    /// # Errors
    /// Data that do not fit, or a row that is not finite: nothing is counted then. A row whose squares overflow,
    /// or a tick that refuses: blocks of 256 rows before it are counted.
    pub fn accumulate_importance(
        &self,
        data: &Data<'_>,
        ewc: &Mutex<Ewc>,
        pass: &mut Pass,
        tick: &mut Tick<'_>,
    ) -> Result<()> {
        self.check(data)?;
        let masters = self.lora.masters();
        ewc.lock().unwrap_or_else(PoisonError::into_inner).check_same(self.lora.names(), &masters)?;
        // All rows are looked at before the first is counted.
        evaluate(self, data, &mut Workspace::default(), &mut |_, _| Ok(()))?;
        let (n_in, n_out) = (self.in_features(), self.out_features());
        for first in (0..data.rows).step_by(BLOCK) {
            tick(first, data.rows)?;
            let last = (first + BLOCK).min(data.rows);
            let x = &data.x[first * n_in..last * n_in];
            let labels = match data.y {
                Targets::Values(y) => Labels::Targets(&y[first * n_out..last * n_out]),
                Targets::Labels(y) => Labels::Classes(&y[first..last]),
            };
            let outcome = self.importance_of(x, labels, last - first, ewc, pass);
            pass.hold = false;
            pass.clear();
            if let Err(e) = outcome {
                return Err(match e {
                    Error::Sample { arg, row, reason, .. } => {
                        Error::Sample { arg, row: first + row, reason, steps_done: 0 }
                    }
                    other => other,
                });
            }
        }
        tick(data.rows, data.rows)
    }

    fn importance_of(
        &self,
        x: &[f32],
        labels: Labels<'_>,
        n: usize,
        ewc: &Mutex<Ewc>,
        pass: &mut Pass,
    ) -> Result<()> {
        // The learner's lock is never taken inside the consolidation's: its version is had before.
        let (k, version) = (self.lora.kernels(), self.version());
        let z = self.forward_tape(k, &version, x, true, pass)?;
        let ewc = &mut *ewc.lock().unwrap_or_else(PoisonError::into_inner);
        let passes = ewc.passes(&z, self.out_features(), labels);
        pass.give(z);
        let passes = passes?;
        let mut run = || -> Result<()> {
            for c in 0..passes.count() {
                let mut g = pass.take(n * self.out_features());
                passes.gradient(c, &mut g);
                // With checkpoints a backward gives up its segments, so that forward has to lay them anew.
                pass.hold = self.segment == 1;
                self.backward(k, &version, x, g, pass, None, Some((&mut *ewc, n)))?;
                if self.segment > 1 && c + 1 < passes.count() {
                    let again = self.forward_tape(k, &version, x, true, pass)?;
                    pass.give(again);
                }
            }
            Ok(())
        };
        match run() {
            Ok(()) => ewc.seen(n),
            Err(e) => {
                ewc.discard();
                Err(e)
            }
        }
    }
}
