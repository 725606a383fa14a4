//! Algebra of `(rank, rank)` matrices in f64, row-major and symmetric.

use nalgebra::{Cholesky, DMatrix};

/// Share of the mean diagonal that is added where a matrix is singular: far above the noise of f32 sums, so that a
/// direction nobody saw hardly moves.
const JITTER: f64 = 1e-4;

/// Inverse of a positive semi-definite matrix whose pivots mean nothing below `noise` of its largest diagonal;
/// `None` where it is zero or not finite.
///
/// Where a pivot is lost, `X = (M + jitter)^-1` and then `2 X - X M X` (Schulz 1933), which takes the jitter's
/// bias off the directions that are there: `(jitter / eigenvalue)^2` is left.
pub(super) fn inverse(m: &[f64], r: usize, noise: f64) -> Option<Vec<f64>> {
    let mut a = DMatrix::from_row_slice(r, r, m);
    let top = a.diagonal().iter().fold(0.0f64, |t, &v| t.max(v));
    if !(top > 0.0 && a.iter().all(|v| v.is_finite())) {
        return None;
    }
    let sound = |a: &DMatrix<f64>| {
        let l = Cholesky::new(a.clone())?;
        let least = l.l_dirty().diagonal().iter().fold(f64::INFINITY, |t, &v| t.min(v));
        (least * least > noise * top).then_some(l.inverse())
    };
    if let Some(inverse) = sound(&a) {
        return Some(inverse.as_slice().to_vec());
    }
    let jitter = JITTER * a.trace() / r as f64;
    (0..r).for_each(|i| a[(i, i)] += jitter);
    let x = sound(&a)?.as_slice().to_vec();
    let corrected = product(&product(&x, m, r), &x, r);
    Some(x.iter().zip(corrected).map(|(x, c)| 2.0 * x - c).collect())
}

/// `a b`.
pub(super) fn product(a: &[f64], b: &[f64], r: usize) -> Vec<f64> {
    let mut out = vec![0.0; r * r];
    for i in 0..r {
        for q in 0..r {
            let c = a[i * r + q];
            for j in 0..r {
                out[i * r + j] += c * b[q * r + j];
            }
        }
    }
    out
}

/// `<a, b>` in f64.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
