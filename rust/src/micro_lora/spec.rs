//! What a new module is made from, and how its weights start.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::layer::Layer;
use crate::rng::Rng;

/// What a new module is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleSpec {
    /// Module name.
    pub name: String,
    /// Width of x.
    pub in_features: usize,
    /// Width of y.
    pub out_features: usize,
    /// Rank.
    pub rank: usize,
    /// Scaling numerator.
    pub alpha: f64,
    /// Scaling by `sqrt(rank)`.
    pub rslora: bool,
    /// Storage dtype.
    pub dtype: Dtype,
}

/// A stream of its own for each module, so that its A does not depend on its neighbours (FNV-1a).
fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// `A ~ U(-1/sqrt(in), 1/sqrt(in))` (kaiming uniform with a = sqrt 5, as PEFT), `B = 0`.
pub(super) fn fresh_layer(spec: &ModuleSpec, seed: u64) -> Result<Layer> {
    // Draws, A and B in their layout, and the bottleneck's matrix of a later RLS.
    let padded = |n: usize| n.checked_next_multiple_of(16)?.checked_mul(spec.rank)?.checked_mul(4);
    let sizes = [padded(spec.in_features), padded(spec.in_features), padded(spec.out_features)];
    let rls = spec.rank.checked_mul(spec.rank).and_then(|n| n.checked_mul(8));
    let bytes = sizes.into_iter().chain([rls]).try_fold(0usize, |sum, n| sum.checked_add(n?));
    Error::check_memory(&spec.name, bytes)?;
    let mut rng = Rng::new(seed, stream_of(&spec.name));
    let bound = 1.0 / (spec.in_features as f32).sqrt();
    let a: Vec<f32> = (0..spec.rank * spec.in_features).map(|_| rng.symmetric(bound)).collect();
    Layer::new(
        Factor::from_rows(&a, spec.rank, spec.in_features, spec.dtype),
        Factor::zeros(spec.rank, spec.out_features, spec.dtype),
        spec.alpha,
        spec.rslora,
    )
}
