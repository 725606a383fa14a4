//! Gram matrices of a stack's rows: all inner products and norms of changes come from them.

use std::ops::Range;

use nalgebra::DMatrix;

use super::Stack;
use crate::kernels::Kernels;

/// `a = A A^T` and `b = B B^T` of a stack, f64, without its coefficients.
#[derive(Clone, Debug)]
pub struct Grams {
    /// `(rank, rank)`.
    pub a: DMatrix<f64>,
    /// `(rank, rank)`.
    pub b: DMatrix<f64>,
}

impl Grams {
    /// Both matrices of `stack`.
    pub fn of(k: &Kernels, stack: &Stack) -> Self {
        Grams { a: Self::rows(k, &stack.a, stack.n_in), b: Self::rows(k, &stack.b, stack.n_out) }
    }

    /// The Gram matrix of rows of `n` columns.
    pub fn rows(k: &Kernels, rows: &[f32], n: usize) -> DMatrix<f64> {
        let rank = rows.len() / n;
        let mut out = DMatrix::zeros(rank, rank);
        k.gram_of_rows(rows, n, out.as_mut_slice());
        out
    }

    /// `<D_i, D_j>` of two groups of rows: `sum_pq c_p c_q (a_p . a_q) (b_p . b_q)`.
    pub fn inner(&self, coef: &[f64], i: &Range<usize>, j: &Range<usize>) -> f64 {
        let mut sum = 0.0;
        for q in j.clone() {
            let mut column = 0.0;
            for p in i.clone() {
                column += coef[p] * self.a[(p, q)] * self.b[(p, q)];
            }
            sum += coef[q] * column;
        }
        sum
    }

    /// All inner products between groups of rows.
    pub fn products(&self, coef: &[f64], groups: &[Range<usize>]) -> DMatrix<f64> {
        let m = groups.len();
        let mut out = DMatrix::zeros(m, m);
        for i in 0..m {
            for j in 0..=i {
                let v = self.inner(coef, &groups[i], &groups[j]);
                out[(i, j)] = v;
                out[(j, i)] = v;
            }
        }
        out
    }

    /// Bytes of both.
    pub fn bytes(&self) -> usize {
        8 * (self.a.len() + self.b.len())
    }
}
