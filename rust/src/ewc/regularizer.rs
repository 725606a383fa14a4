//! `Ewc` as the training loop sees it.

use super::Ewc;
use crate::error::Result;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::regularizer::{Pair, Regularizer, Samples};

impl Regularizer for Ewc {
    fn is_active(&self) -> bool {
        Ewc::is_active(self)
    }

    fn in_gradient(&self) -> bool {
        self.uses_gradient()
    }

    fn add_gradient(
        &mut self,
        k: &Kernels,
        module: usize,
        layer: &Layer,
        ga: &mut Factor,
        gb: &mut Factor,
    ) -> Result<()> {
        Ewc::add_gradient(self, k, module, layer, ga, gb)
    }

    fn proximal(&self, module: usize, lr: f64, layer: &mut Layer) {
        Ewc::proximal(self, module, lr, layer);
    }

    fn observe(&mut self, k: &Kernels, module: usize, samples: Samples<'_>) -> Result<()> {
        Ewc::observe(self, k, module, &samples)
    }

    fn seen(&mut self, n: usize) -> Result<()> {
        Ewc::seen(self, n)
    }

    fn discard(&mut self) {
        Ewc::discard(self);
    }

    fn uses_path(&self) -> bool {
        Ewc::uses_path(self)
    }

    fn path(&mut self, module: usize, gradient: Pair<'_>, before: Pair<'_>, after: Pair<'_>) {
        Ewc::path(self, module, gradient.0, gradient.1, before, after);
    }
}
