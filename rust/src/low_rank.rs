//! The read path of a layer, whatever its factors are stored in: `dY = s (x A) B`.

use std::sync::Arc;

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::parallel;

/// Ranks up to this need no heap for the bottleneck `u`.
const STACK_RANK: usize = 64;

/// A factor as the read path sees it: `rank` rows of `len` numbers.
#[allow(clippy::len_without_is_empty)]
pub trait Half: Sync {
    /// Rows.
    fn rank(&self) -> usize;
    /// Columns.
    fn len(&self) -> usize;
    /// Starts fetching a factor that is needed soon.
    fn prefetch(&self);
    /// `out[r] = <row r, x>`.
    fn dots(&self, k: &Kernels, x: &[f32], out: &mut [f32]);
    /// `y (+)= sum_r coef[r] row r`.
    fn combine(&self, k: &Kernels, coef: &[f32], y: &mut [f32], add: bool);
    /// `u = s X W^T`.
    fn dots_batch(&self, k: &Kernels, x: &[f32], u: &mut [f32], s: f32);
    /// `y (+)= u W`.
    fn combine_batch(&self, k: &Kernels, u: &[f32], y: &mut [f32], add: bool);
}

impl Half for Factor {
    #[inline]
    fn rank(&self) -> usize {
        self.rank()
    }
    #[inline]
    fn len(&self) -> usize {
        self.len()
    }
    #[inline]
    fn prefetch(&self) {
        self.prefetch();
    }
    #[inline]
    fn dots(&self, k: &Kernels, x: &[f32], out: &mut [f32]) {
        self.dots(k, x, out);
    }
    #[inline]
    fn combine(&self, k: &Kernels, coef: &[f32], y: &mut [f32], add: bool) {
        self.combine(k, coef, y, add);
    }
    #[inline]
    fn dots_batch(&self, k: &Kernels, x: &[f32], u: &mut [f32], s: f32) {
        self.dots_batch(k, x, u, s);
    }
    #[inline]
    fn combine_batch(&self, k: &Kernels, u: &[f32], y: &mut [f32], add: bool) {
        self.combine_batch(k, u, y, add);
    }
}

/// Two factors and a scaling.
pub trait LowRank: Send + Sync {
    /// What the factors are.
    type Half: Half;

    /// A: `(rank, in_features)`.
    fn half_a(&self) -> &Self::Half;
    /// B, rank-major: `(rank, out_features)`.
    fn half_b(&self) -> &Self::Half;
    /// `s`.
    fn scaling(&self) -> f32;

    /// Rank r.
    #[inline]
    fn rank(&self) -> usize {
        self.half_a().rank()
    }

    /// Width of x.
    #[inline]
    fn in_features(&self) -> usize {
        self.half_a().len()
    }

    /// Width of y.
    #[inline]
    fn out_features(&self) -> usize {
        self.half_b().len()
    }

    /// Numbers in both factors, padding not counted.
    #[inline]
    fn param_count(&self) -> usize {
        self.rank() * (self.in_features() + self.out_features())
    }

    /// `y = dY(x)`, or `y += dY(x)` when `add`.
    ///
    /// # Errors
    /// Wrong lengths; NaN or infinity in `x` (seen on the bottleneck `u`, so `y` is still untouched).
    #[inline]
    fn forward(&self, k: &Kernels, x: &[f32], y: &mut [f32], add: bool) -> Result<()> {
        check("x", x.len(), self.in_features())?;
        check("out", y.len(), self.out_features())?;
        self.half_b().prefetch();
        let s = self.scaling();
        with_scratch(self.rank(), |u| {
            self.half_a().dots(k, x, u);
            let mut bad = false;
            for u in u.iter_mut() {
                *u *= s;
                bad |= !u.is_finite();
            }
            if bad {
                return Err(Error::non_finite("x"));
            }
            self.half_b().combine(k, u, y, add);
            Ok(())
        })
    }

    /// `forward` for `(rows, in)` to `(rows, out)`, both row-major and contiguous.
    ///
    /// # Errors
    /// As [`LowRank::forward`]; on a non-finite row nothing of `y` is written.
    fn forward_rows(&self, k: &Kernels, x: &[f32], y: &mut [f32], add: bool) -> Result<()> {
        let rows = x.len() / self.in_features();
        check("x", x.len(), rows * self.in_features())?;
        check("out", y.len(), rows * self.out_features())?;
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
    fn down_rows(&self, k: &Kernels, x: &[f32], u: &mut [f32], first: usize) -> Result<()> {
        let (n_in, rank, s) = (self.in_features(), self.rank(), self.scaling());
        match threads(x.len() / n_in, self.param_count()) {
            None => self.half_a().dots_batch(k, x, u, s),
            Some((pool, block)) => pool.install(|| {
                let parts = u.par_chunks_mut(block * rank).zip(x.par_chunks(block * n_in));
                parts.for_each(|(u, x)| self.half_a().dots_batch(k, x, u, s));
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
    fn up_rows(&self, k: &Kernels, u: &[f32], y: &mut [f32], add: bool) {
        let (n_out, rank) = (self.out_features(), self.rank());
        match threads(u.len() / rank, self.param_count()) {
            None => self.half_b().combine_batch(k, u, y, add),
            Some((pool, block)) => pool.install(|| {
                let parts = y.par_chunks_mut(block * n_out).zip(u.par_chunks(block * rank));
                parts.for_each(|(y, u)| self.half_b().combine_batch(k, u, y, add));
            }),
        }
    }
}

/// Runs `f` on a zeroed scratch of `n` floats, on the stack for usual ranks.
#[inline]
fn with_scratch<R>(n: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    if n <= STACK_RANK { f(&mut [0.0; STACK_RANK][..n]) } else { f(&mut vec![0.0; n]) }
}

/// The pool for a batch, with rows per thread: whole blocks of the batch kernels (6 rows).
fn threads(rows: usize, params: usize) -> Option<(Arc<ThreadPool>, usize)> {
    let pool = parallel::pool_for(rows * params)?;
    let block = rows.div_ceil(pool.current_num_threads()).next_multiple_of(6);
    Some((pool, block))
}

#[inline]
fn check(arg: &str, got: usize, want: usize) -> Result<()> {
    if got == want { Ok(()) } else { Err(Error::shape(arg, format!("({got},)"), format!("({want},)"))) }
}
