//! A stack as fewer rows: the truncated singular value decomposition of `D` from the Grams of its factors.
//!
//! With `D = B^T A`, `A A^T = L L^T` (Cholesky) and `S = L^T (B B^T) L = V diag(s^2) V^T`, the rows
//! `T = V^T L^T` give `T B = s u^T` and `diag(1 / s^2) T (B B^T) A = v^T`: no triangular solve, and nothing
//! blows up where rows are dependent. An error of `e |A|^2 |B|^2` in S, with e the rounding of f64, is harmless
//! while the sum is not far smaller than its parts; where parts cancel, Householder QR takes over.

use nalgebra::{DMatrix, SymmetricEigen};

use super::{Grams, Stack};
use crate::error::{Error, Result};
use crate::kernels::Kernels;

/// How much to keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keep {
    /// So many singular directions at most.
    Rank(usize),
    /// The fewest with at least this share of `|D|^2`.
    Energy(f64),
    /// The fewest with `|D - kept| <= x |D|` (Frobenius).
    MaxError(f64),
}

/// The largest part of a stack: `D ~ sum_r b_r^T a_r`, rows balanced by the root of their singular value.
#[derive(Clone, Debug)]
pub struct Factors {
    /// Rows; at least one, of zeros where D is zero.
    pub rank: usize,
    /// `(rank, n_in)`.
    pub a: Vec<f32>,
    /// `(rank, n_out)`.
    pub b: Vec<f32>,
    /// Singular values of D, largest first; f64 rounding below 1e-7 of the largest is cut off.
    pub values: Vec<f64>,
    /// `|D|^2` (Frobenius).
    pub norm2: f64,
    /// What of it was kept.
    pub kept2: f64,
    /// Rows of `a` as combinations of the stack's, (rank, stack rank); empty when made by QR.
    pub mix_a: DMatrix<f64>,
    /// Rows of `b` as combinations of the stack's, each times its coefficient.
    pub mix_b: DMatrix<f64>,
}

impl Factors {
    /// `|D - kept| / |D|`, 0 for a zero matrix.
    pub fn error(&self) -> f64 {
        if self.norm2 > 0.0 { ((self.norm2 - self.kept2).max(0.0) / self.norm2).sqrt() } else { 0.0 }
    }
}

/// Singular values below this share of the largest are rounding of the Grams.
const FLOOR: f64 = 1e-7;
/// Below this `|D|^2 / (|A|^2 |B|^2)` (spectral) parts cancel, and squares have lost too many digits: at the
/// limit singular values are off by at most about `sqrt(1e-16 sqrt(k) / 1e-2)`, 3e-7 of the largest.
const CANCELLED: f64 = 1e-2;

/// Parts that leave less than this of their norm have cancelled altogether.
const NOTHING: f64 = 1e-14;

/// The singular value decomposition of a stack, cut off as `keep` says.
///
/// # Errors
/// Numbers that are not finite.
pub fn refactor(k: &Kernels, stack: &Stack, keep: Keep) -> Result<Factors> {
    refactor_with(k, stack, &Grams::of(k, stack), &stack.coef, keep)
}

/// [`refactor`] with Grams that are there already and other coefficients.
///
/// # Errors
/// As [`refactor`].
pub fn refactor_with(k: &Kernels, stack: &Stack, grams: &Grams, coef: &[f64], keep: Keep) -> Result<Factors> {
    let rank = stack.rank();
    if rank == 0 {
        return Ok(zero(stack));
    }
    let mut gb = grams.b.clone();
    for j in 0..rank {
        for i in 0..rank {
            gb[(i, j)] *= coef[i] * coef[j];
        }
    }
    let scale = spectral(&grams.a) * spectral(&gb);
    if !scale.is_finite() {
        return Err(Error::non_finite("adapters"));
    }
    if scale == 0.0 {
        return Ok(zero(stack));
    }
    let l = cholesky(&grams.a);
    let core = l.transpose() * (&gb * &l);
    let (values2, v) = eigen(core);
    if values2[0] <= CANCELLED * scale {
        return by_qr(stack, coef, keep);
    }
    let (rank_out, norm2, kept2) = cut(&values2, keep);
    // T = V^T L^T, (rank_out, rank).
    let t = v.columns(0, rank_out).transpose() * l.transpose();
    let (mut mix_a, mut mix_b) = (&t * &gb, t);
    for r in 0..rank_out {
        let root = values2[r].powf(0.25);
        mix_a.row_mut(r).scale_mut(root / values2[r]);
        mix_b.row_mut(r).scale_mut(1.0 / root);
    }
    for (mut column, c) in mix_b.column_iter_mut().zip(coef) {
        column *= *c;
    }
    let a = mixed(k, &mix_a, &stack.a, stack.n_in);
    let b = mixed(k, &mix_b, &stack.b, stack.n_out);
    let values = values2.iter().map(|v| v.sqrt()).collect();
    Ok(Factors { rank: rank_out, a, b, values, norm2, kept2, mix_a, mix_b })
}

/// `mix rows` in f32.
fn mixed(k: &Kernels, mix: &DMatrix<f64>, rows: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![0.0; mix.nrows() * n];
    k.mix_rows(mix.transpose().as_slice(), rows, n, &mut out);
    out
}

/// One row of zeros.
fn zero(stack: &Stack) -> Factors {
    Factors {
        rank: 1,
        a: vec![0.0; stack.n_in],
        b: vec![0.0; stack.n_out],
        values: vec![0.0],
        norm2: 0.0,
        kept2: 0.0,
        mix_a: DMatrix::zeros(1, stack.rank()),
        mix_b: DMatrix::zeros(1, stack.rank()),
    }
}

/// L with `L L^T = g` up to rounding, for positive semi-definite g: as many columns as g has rank. The largest
/// pivot first, else the noise of dependent rows grows (Higham, Accuracy and Stability, ch. 10.3).
fn cholesky(g: &DMatrix<f64>) -> DMatrix<f64> {
    let n = g.nrows();
    let mut left: Vec<f64> = (0..n).map(|i| g[(i, i)]).collect();
    let floor = left.iter().copied().fold(0.0, f64::max) * f64::EPSILON * n as f64;
    let mut order: Vec<usize> = (0..n).collect();
    // Column-major in the order of pivots; column p starts at row p.
    let mut l = vec![0.0; n * n];
    let mut rank = 0;
    for j in 0..n {
        let best = (j..n).max_by(|&a, &b| left[a].total_cmp(&left[b])).unwrap_or(j);
        if left[best] <= floor {
            break;
        }
        if best != j {
            order.swap(j, best);
            left.swap(j, best);
            l.chunks_exact_mut(n).take(j).for_each(|column| column.swap(j, best));
        }
        let (done, rest) = l.split_at_mut(j * n);
        let column = &mut rest[j..n];
        let source = g.column(order[j]);
        for (x, &i) in column.iter_mut().zip(&order[j..]) {
            *x = source[i];
        }
        for p in done.chunks_exact(n) {
            let (c, below) = (p[j], &p[j..]);
            for (x, y) in column.iter_mut().zip(below) {
                *x -= c * y;
            }
        }
        let pivot = left[j].sqrt();
        column[0] = pivot;
        for (x, d) in column[1..].iter_mut().zip(&mut left[j + 1..]) {
            *x /= pivot;
            *d -= *x * *x;
        }
        rank = j + 1;
    }
    let mut out = DMatrix::zeros(n, rank);
    for (j, column) in l.chunks_exact(n).take(rank).enumerate() {
        for (row, &i) in order.iter().enumerate().skip(j) {
            out[(i, j)] = column[row];
        }
    }
    out
}

/// The largest eigenvalue of a positive semi-definite matrix, within a few percent (power iteration).
fn spectral(g: &DMatrix<f64>) -> f64 {
    let n = g.nrows();
    let start = (0..n).max_by(|&i, &j| g[(i, i)].total_cmp(&g[(j, j)])).unwrap_or(0);
    let mut v = g.column(start).clone_owned();
    let mut value = g[(start, start)];
    for _ in 0..8 {
        let norm = v.norm();
        if !(norm > 0.0 && norm.is_finite()) {
            break;
        }
        v /= norm;
        let next = g * &v;
        value = value.max(v.dot(&next));
        v = next;
    }
    if g.iter().all(|v| v.is_finite()) { value } else { f64::NAN }
}

/// Eigenvalues, largest first and never negative, with their vectors as columns.
fn eigen(s: DMatrix<f64>) -> (Vec<f64>, DMatrix<f64>) {
    let e = SymmetricEigen::new(s);
    let mut order: Vec<usize> = (0..e.eigenvalues.len()).collect();
    order.sort_by(|&i, &j| e.eigenvalues[j].total_cmp(&e.eigenvalues[i]));
    let values = order.iter().map(|&i| e.eigenvalues[i].max(0.0)).collect();
    (values, e.eigenvectors.select_columns(&order))
}

/// How many directions stay (at least 1), and the energy of all and of those.
fn cut(values2: &[f64], keep: Keep) -> (usize, f64, f64) {
    let real = values2.iter().take_while(|v| **v > FLOOR * FLOOR * values2[0]).count().max(1);
    let norm2: f64 = values2.iter().rev().sum();
    let fewest = |enough: &dyn Fn(f64) -> bool| {
        // Summed from the small end, so that what is dropped keeps its digits.
        let mut dropped = 0.0;
        let mut rank = values2.len();
        while rank > 1 && enough(dropped + values2[rank - 1]) {
            rank -= 1;
            dropped += values2[rank];
        }
        rank
    };
    let rank = match keep {
        Keep::Rank(r) => r.max(1),
        Keep::Energy(share) => fewest(&|dropped| dropped <= (1.0 - share) * norm2),
        Keep::MaxError(x) => fewest(&|dropped| dropped <= x * x * norm2),
    };
    let rank = rank.min(real);
    let dropped: f64 = values2[rank..].iter().rev().sum();
    (rank, norm2, norm2 - dropped)
}

/// The same through Householder QR of both factors in f64: no squares, so nothing is lost where parts cancel.
fn by_qr(stack: &Stack, coef: &[f64], keep: Keep) -> Result<Factors> {
    let rank = stack.rank();
    let wide = |rows: &[f32], n: usize, coef: Option<&[f64]>| {
        let c = |j: usize| coef.map_or(1.0, |c| c[j]);
        DMatrix::from_fn(n, rank, |i, j| c(j) * f64::from(rows[j * n + i])).qr()
    };
    let (qa, qb) = (wide(&stack.a, stack.n_in, None), wide(&stack.b, stack.n_out, Some(coef)));
    let core = qb.r() * qa.r().transpose();
    let (values2, v) = eigen(core.transpose() * &core);
    let parts = qa.r().norm_squared() * qb.r().norm_squared();
    if values2[0] <= NOTHING * NOTHING * parts {
        return Ok(zero(stack));
    }
    let (rank_out, norm2, kept2) = cut(&values2, keep);
    let v = v.columns(0, rank_out).clone_owned();
    let (mut right, mut left) = (qa.q() * &v, qb.q() * (core * v));
    for r in 0..rank_out {
        let root = values2[r].powf(0.25);
        right.column_mut(r).scale_mut(root);
        left.column_mut(r).scale_mut(1.0 / root);
    }
    let narrow = |m: &DMatrix<f64>| m.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    Ok(Factors {
        rank: rank_out,
        a: narrow(&right),
        b: narrow(&left),
        values: values2.iter().map(|v| v.sqrt()).collect(),
        norm2,
        kept2,
        mix_a: DMatrix::zeros(0, 0),
        mix_b: DMatrix::zeros(0, 0),
    })
}
