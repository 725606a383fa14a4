//! One LoRA layer: two factors and a scaling. Immutable for readers; the learner edits a copy of its own.

use std::sync::Arc;

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::{Factor, SharedFactor};
use crate::kernels::Kernels;
use crate::parallel;

/// Ranks up to this need no heap for the bottleneck `u`.
const STACK_RANK: usize = 64;

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

/// Runs `f` on a zeroed scratch of `n` floats, on the stack for usual ranks.
#[inline]
fn with_scratch<R>(n: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    if n <= STACK_RANK { f(&mut [0.0; STACK_RANK][..n]) } else { f(&mut vec![0.0; n]) }
}

impl Layer {
    /// Puts two factors together.
    ///
    /// # Errors
    /// When their ranks differ, a dimension is zero or alpha is not finite.
    pub fn new(a: Factor, b: Factor, alpha: f64, rslora: bool) -> Result<Self> {
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
        Ok(Layer { a: a.into(), b: b.into(), alpha, rslora })
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

    /// `y = dY(x)`, or `y += dY(x)` when `add`.
    ///
    /// # Errors
    /// Wrong lengths; NaN or infinity in `x` (seen on the bottleneck `u`, so `y` is still untouched).
    #[inline]
    pub fn forward(&self, k: &Kernels, x: &[f32], y: &mut [f32], add: bool) -> Result<()> {
        self.check("x", x.len(), self.in_features())?;
        self.check("out", y.len(), self.out_features())?;
        self.b.prefetch();
        let s = self.scaling();
        with_scratch(self.rank(), |u| {
            self.a.dots(k, x, u);
            let mut bad = false;
            for u in u.iter_mut() {
                *u *= s;
                bad |= !u.is_finite();
            }
            if bad {
                return Err(Error::non_finite("x"));
            }
            self.b.combine(k, u, y, add);
            Ok(())
        })
    }

    /// `forward` for `(rows, in)` to `(rows, out)`, both row-major and contiguous.
    ///
    /// # Errors
    /// As [`Layer::forward`]; on a non-finite row nothing of `y` is written.
    pub fn forward_rows(&self, k: &Kernels, x: &[f32], y: &mut [f32], add: bool) -> Result<()> {
        let rows = x.len() / self.in_features();
        self.check("x", x.len(), rows * self.in_features())?;
        self.check("out", y.len(), rows * self.out_features())?;
        let mut u = vec![0.0; rows * self.rank()];
        self.down_rows(k, x, &mut u, 0)?;
        self.up_rows(k, &u, y, add);
        Ok(())
    }

    /// First half of a batch: `u = s x A`, `(rows, rank)`; `first` is the number of the first row, for errors.
    ///
    /// # Errors
    /// A row whose bottleneck is not finite.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn down_rows(&self, k: &Kernels, x: &[f32], u: &mut [f32], first: usize) -> Result<()> {
        let (n_in, rank, s) = (self.in_features(), self.rank(), self.scaling());
        match self.threads(x.len() / n_in) {
            None => self.a.dots_batch(k, x, u, s),
            Some((pool, block)) => pool.install(|| {
                let parts = u.par_chunks_mut(block * rank).zip(x.par_chunks(block * n_in));
                parts.for_each(|(u, x)| self.a.dots_batch(k, x, u, s));
            }),
        }
        if k.all_finite(u) {
            return Ok(());
        }
        let row = first + u.iter().position(|v| !v.is_finite()).unwrap_or(0) / rank;
        Err(Error::NonFinite { arg: "x".into(), detail: format!(" in row {row}") })
    }

    /// Second half of a batch: `y = u B`, or `y += u B`.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn up_rows(&self, k: &Kernels, u: &[f32], y: &mut [f32], add: bool) {
        let (n_out, rank) = (self.out_features(), self.rank());
        match self.threads(u.len() / rank) {
            None => self.b.combine_batch(k, u, y, add),
            Some((pool, block)) => pool.install(|| {
                let parts = y.par_chunks_mut(block * n_out).zip(u.par_chunks(block * rank));
                parts.for_each(|(y, u)| self.b.combine_batch(k, u, y, add));
            }),
        }
    }

    /// The pool for a batch, with rows per thread: whole blocks of the batch kernels (6 rows).
    fn threads(&self, rows: usize) -> Option<(Arc<ThreadPool>, usize)> {
        let pool = parallel::pool_for(rows * self.param_count())?;
        let block = rows.div_ceil(pool.current_num_threads()).next_multiple_of(6);
        Some((pool, block))
    }

    #[inline]
    fn check(&self, arg: &str, got: usize, want: usize) -> Result<()> {
        if got == want { Ok(()) } else { Err(Error::shape(arg, format!("({got},)"), format!("({want},)"))) }
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
