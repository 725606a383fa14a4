//! `Ewc` as the training loop sees it.

use super::settings::Step;
use super::{Ewc, Path};
use crate::error::Result;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::regularizer::{Pair, Regularizer, Samples};

impl Regularizer for Ewc {
    fn is_active(&self) -> bool {
        self.settings.lambda > 0.0 && self.modules.iter().any(|m| m.memory.is_set())
    }

    fn in_gradient(&self) -> bool {
        self.settings.step == Step::Gradient
    }

    fn add_gradient(
        &mut self,
        k: &Kernels,
        module: usize,
        layer: &Layer,
        weight: f64,
        gradient: (&mut Factor, &mut Factor),
    ) -> Result<()> {
        if self.settings.lambda > 0.0 && self.in_gradient() {
            self.modules[module].memory.add_gradient(
                k,
                self.settings.lambda * weight,
                layer,
                gradient.0,
                gradient.1,
            );
        }
        Ok(())
    }

    /// `th <- (th + lr lambda F th*) / (1 + lr lambda F)` after the optimiser's step, where the settings ask
    /// for it: stable whatever lambda.
    fn proximal(&self, module: usize, lr: f64, layer: &mut Layer) {
        if self.settings.step == Step::Proximal && self.settings.lambda > 0.0 {
            self.modules[module].memory.proximal(lr * self.settings.lambda, layer);
        }
    }

    /// Adds rows to the open batch; a sample may have several, one per outcome of the exact Fisher, with g
    /// scaled by the root of its probability. After an error the batch should be discarded.
    fn observe(&mut self, k: &Kernels, module: usize, samples: Samples<'_>) -> Result<()> {
        self.modules[module].seen.observe(k, &samples)
    }

    /// Closes the open batch in every module that observed; nothing is closed in an error.
    fn seen(&mut self, n: usize) -> Result<()> {
        self.modules.iter().try_for_each(|m| m.seen.check_close(n))?;
        let counted = self.modules.iter_mut().filter_map(|m| m.seen.close(n)).max();
        if let Some(c) = counted {
            self.samples += c;
            self.ignored += n as u64 - c;
        }
        Ok(())
    }

    fn discard(&mut self) {
        self.staged = None;
        for m in &mut self.modules {
            m.seen.discard();
        }
    }

    fn uses_path(&self) -> bool {
        self.settings.kind.row().path
    }

    fn path(&mut self, module: usize, gradient: Pair<'_>, before: Pair<'_>, after: Pair<'_>) {
        let step = Path { gradient: gradient.into(), before: before.into(), after: after.into() };
        self.modules[module].memory.path(&step);
    }
}
