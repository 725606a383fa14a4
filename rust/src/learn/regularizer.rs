//! What a penalty against forgetting may do to a training step; `ewc` implements it.

use crate::error::Result;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;

/// Per-sample gradients of one module's batch, in the pieces that backward computes anyway.
#[derive(Clone, Copy)]
pub struct Samples<'a> {
    /// Inputs, `(n, in)`.
    pub x: &'a [f32],
    /// dL/dy of each sample, not divided by n, `(n, out)`.
    pub g: &'a [f32],
    /// `s x A`, `(n, rank)`.
    pub u: &'a [f32],
    /// `s g B^T`, `(n, rank)`.
    pub w: &'a [f32],
}

impl<'a> Samples<'a> {
    /// The first `some` of `all` samples.
    pub(crate) fn first(self, some: usize, all: usize) -> Self {
        let cut = |v: &'a [f32]| &v[..v.len() / all * some];
        Samples { x: cut(self.x), g: cut(self.g), u: cut(self.u), w: cut(self.w) }
    }
}

/// A pair of factors: A's and B's.
pub type Pair<'a> = (&'a Factor, &'a Factor);

/// A penalty that remembers earlier tasks. Layers are always the f32 weights.
pub trait Regularizer {
    /// Whether it pulls at all: an anchor exists and lambda is above 0.
    fn is_active(&self) -> bool;

    /// Whether its gradient belongs to the loss (otherwise [`Regularizer::proximal`] acts after the step).
    fn in_gradient(&self) -> bool;

    /// `ga += weight dOmega/dA`, `gb += weight dOmega/dB` for one module.
    ///
    /// # Errors
    /// A gradient that overflows.
    fn add_gradient(
        &mut self,
        k: &Kernels,
        module: usize,
        layer: &Layer,
        weight: f64,
        gradient: (&mut Factor, &mut Factor),
    ) -> Result<()>;

    /// The implicit step towards the anchor, after the optimiser's.
    fn proximal(&self, module: usize, lr: f64, layer: &mut Layer);

    /// Adds per-sample importance to the open batch.
    ///
    /// # Errors
    /// Numbers that are not finite.
    fn observe(&mut self, k: &Kernels, module: usize, samples: Samples<'_>) -> Result<()>;

    /// Closes the open batch of `n` samples.
    ///
    /// # Errors
    /// Sums that are not finite.
    fn seen(&mut self, n: usize) -> Result<()>;

    /// Drops the open batch.
    fn discard(&mut self);

    /// Whether it follows the path of the weights ([`Regularizer::path`]).
    fn uses_path(&self) -> bool;

    /// One step of the weights along the mean loss gradient (penalty excluded).
    fn path(&mut self, module: usize, gradient: Pair<'_>, before: Pair<'_>, after: Pair<'_>);
}
