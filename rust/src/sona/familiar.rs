//! Which inputs are like those that were accepted: only about these can a window contradict what was learned.
//!
//! Hotelling's T^2 in the bottleneck, `u^T S^-1 u` with `S` the accepted inputs' `mean u u^T`, and the share of the
//! input that A sees, `|u|^2 / |x|^2` (the two statistics of Jackson and Mudholkar, 1979).

use nalgebra::{DMatrix, DVector};

use super::gather::Gathered;

/// Fewest accepted inputs to compare with.
const LEAST: usize = 16;
/// Accepted inputs that count as unlike the others, on each side.
const TAIL: f64 = 0.05;
/// Share of the mean variance that every direction has at least.
const FLOOR: f64 = 1e-3;

/// For every row of a window whether it is like the accepted rows; all are, where there are too few of those.
pub(super) fn familiar(accepted: &Gathered, window: &Gathered) -> Vec<bool> {
    let all = vec![true; window.rows.event.len()];
    let (n, r) = (accepted.rows.event.len(), accepted.rows.rank);
    if n < LEAST || r == 0 {
        return all;
    }
    let u = |g: &Gathered, i: usize| {
        DVector::from_iterator(r, g.rows.u[i * r..(i + 1) * r].iter().map(|v| f64::from(*v)))
    };
    let mut s = DMatrix::zeros(r, r);
    for i in 0..n {
        let u = u(accepted, i);
        s.ger(1.0 / n as f64, &u, &u, 1.0);
    }
    let floor = FLOOR * s.trace() / r as f64;
    let Some(s) = (s + DMatrix::identity(r, r) * floor).cholesky() else { return all };
    let of = |g: &Gathered, i: usize| {
        let u = u(g, i);
        let seen = u.norm_squared() / f64::from(g.x2[i]).max(f64::MIN_POSITIVE);
        (u.dot(&s.solve(&u)), seen)
    };
    let (mut far, mut seen): (Vec<f64>, Vec<f64>) = (0..n).map(|i| of(accepted, i)).unzip();
    far.sort_by(f64::total_cmp);
    seen.sort_by(f64::total_cmp);
    let tail = (TAIL * n as f64) as usize;
    let (farthest, least) = (far[n - 1 - tail], seen[tail]);
    let like = |i| {
        let (far, seen) = of(window, i);
        far <= farthest && seen >= least
    };
    (0..all.len()).map(like).collect()
}
