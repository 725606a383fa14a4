//! One LoRA layer: two factors and a scaling. Immutable for readers; the learner edits a copy of its own.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::{Factor, SharedFactor};
use crate::kernels::Kernels;
use crate::low_rank::LowRank;

/// `dY = s (x A) B`, with A as `rank` rows of `in_features` and B as `rank` rows of `out_features`.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// A: `(rank, in_features)`.
    pub a: SharedFactor,
    /// B, rank-major: `(rank, out_features)`; PEFT's `lora_B` is its transpose.
    pub b: SharedFactor,
    /// `alpha` as configured.
    pub alpha: f64,
    /// Whether the scaling is `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub rslora: bool,
}

impl LowRank for Layer {
    type Half = Factor;
    #[inline]
    fn half_a(&self) -> &Factor {
        &self.a
    }
    #[inline]
    fn half_b(&self) -> &Factor {
        &self.b
    }
    #[inline]
    fn scaling(&self) -> f32 {
        self.scaling()
    }
}

impl Layer {
    /// Puts two factors together.
    ///
    /// # Errors
    /// When their ranks differ, a dimension is zero or alpha is not finite.
    pub fn new(
        a: impl Into<SharedFactor>,
        b: impl Into<SharedFactor>,
        alpha: f64,
        rslora: bool,
    ) -> Result<Self> {
        let (a, b) = (a.into(), b.into());
        if a.rank() != b.rank() {
            return Err(Error::shape(
                "lora_b",
                format!("rank {}", b.rank()),
                format!("rank {} as lora_a", a.rank()),
            ));
        }
        if a.rank() == 0 || a.len() == 0 || b.len() == 0 {
            let got = format!("rank {}, in {}, out {}", a.rank(), a.len(), b.len());
            return Err(Error::shape("layer", got, "every dimension at least 1"));
        }
        if !alpha.is_finite() {
            return Err(Error::config("alpha", alpha, "a finite number"));
        }
        Ok(Layer { a, b, alpha, rslora })
    }

    /// Rank r.
    #[inline]
    pub fn rank(&self) -> usize {
        self.a.rank()
    }

    /// Width of x.
    #[inline]
    pub fn in_features(&self) -> usize {
        self.a.len()
    }

    /// Width of y.
    #[inline]
    pub fn out_features(&self) -> usize {
        self.b.len()
    }

    /// `alpha / rank`, or `alpha / sqrt(rank)` (rsLoRA, arXiv 2312.03732).
    #[inline]
    pub fn scaling(&self) -> f32 {
        self.exact_scaling() as f32
    }

    /// [`Layer::scaling`] before it is rounded to f32.
    #[inline]
    pub fn exact_scaling(&self) -> f64 {
        let r = self.rank() as f64;
        self.alpha / if self.rslora { r.sqrt() } else { r }
    }

    /// Numbers in both factors, padding not counted.
    pub fn param_count(&self) -> usize {
        self.rank() * (self.in_features() + self.out_features())
    }

    /// Resident bytes of both factors, padding counted.
    pub fn memory_bytes(&self) -> usize {
        self.a.memory_bytes() + self.b.memory_bytes()
    }

    /// See [`LowRank::forward`].
    ///
    /// # Errors
    /// Wrong lengths; NaN or infinity in `x`, with `y` untouched.
    #[inline]
    pub fn forward(&self, k: &Kernels, x: &[f32], y: &mut [f32], add: bool) -> Result<()> {
        LowRank::forward(self, k, x, y, add)
    }

    /// See [`LowRank::forward_rows`].
    ///
    /// # Errors
    /// As [`Layer::forward`]; on a non-finite row nothing of `y` is written.
    pub fn forward_rows(&self, k: &Kernels, x: &[f32], y: &mut [f32], add: bool) -> Result<()> {
        LowRank::forward_rows(self, k, x, y, add)
    }

    /// See [`LowRank::down_rows`].
    ///
    /// # Errors
    /// A row whose bottleneck is not finite.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn down_rows(&self, k: &Kernels, x: &[f32], u: &mut [f32], first: usize) -> Result<()> {
        LowRank::down_rows(self, k, x, u, first)
    }

    /// See [`LowRank::up_rows`].
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn up_rows(&self, k: &Kernels, u: &[f32], y: &mut [f32], add: bool) {
        LowRank::up_rows(self, k, u, y, add);
    }

    /// `w += sign * delta`, for `w` row-major `(out_features, in_features)`.
    ///
    /// # Panics
    /// When `w` has another size (bindings check first).
    pub fn add_delta(&self, k: &Kernels, w: &mut [f32], sign: f32) {
        let (n_in, rank) = (self.in_features(), self.rank());
        assert_eq!(w.len(), self.out_features() * n_in);
        let s = sign * self.scaling();
        let columns = self.b.to_f32(true);
        let mut u = vec![0.0; rank];
        for (row, b) in w.chunks_exact_mut(n_in).zip(columns.chunks_exact(rank)) {
            for (u, b) in u.iter_mut().zip(b) {
                *u = s * b;
            }
            self.a.combine(k, &u, row, true);
        }
    }

    /// A copy with both factors in `dtype`.
    pub fn cast(&self, dtype: Dtype) -> Layer {
        Layer { a: self.a.cast(dtype).into(), b: self.b.cast(dtype).into(), ..self.clone() }
    }
}
