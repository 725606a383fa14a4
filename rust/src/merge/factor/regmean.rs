//! RegMean (Jin et al., arXiv 2212.09849): the merge that fits every parent's outputs on its own inputs best.
//!
//! `D = (sum w_i D_i G_i) (sum w_i G_i)^-1` minimises `sum w_i tr((D - D_i) G_i (D - D_i)^T)`. In factor space
//! only A changes, `A_i G_i G^-1`, so the rank stays the sum of the ranks.

use std::ops::Range;

use nalgebra::{DMatrix, DVector};

use crate::algebra::Stack;
use crate::error::{Error, Result};
use crate::merge::spec::{Gram, Parent, Spec};

/// Share of the mean diagonal that is added to every Gram: inputs that no parent saw take the weighted mean, and
/// inputs that hardly occur cannot blow up (1e-6 made rows 100 times too large, and truncation spend rank on them).
const RIDGE: f64 = 1e-2;

/// A parent's `G`, shrunk and with its ridge: a diagonal, and what lies beside it.
struct Moments<'a> {
    diag: DVector<f64>,
    beside: Beside<'a>,
    rho: f64,
}

enum Beside<'a> {
    /// The whole matrix; its diagonal counts in `diag` only.
    Dense(&'a [f32]),
    /// Rows whose products are what lies beside the diagonal, with their own part of the diagonal.
    Low(DMatrix<f64>, DVector<f64>),
}

impl Moments<'_> {
    /// `v G` for rows v.
    fn apply(&self, v: &DMatrix<f64>) -> DMatrix<f64> {
        let mut out;
        match &self.beside {
            Beside::Dense(g) => {
                let d = self.diag.len();
                let g = DMatrix::from_fn(d, d, |i, j| if i == j { 0.0 } else { f64::from(g[i * d + j]) });
                out = v * g * self.rho;
                for (j, mut column) in out.column_iter_mut().enumerate() {
                    column.axpy(self.diag[j], &v.column(j), 1.0);
                }
            }
            Beside::Low(low, own) => {
                out = (v * low.transpose()) * low * self.rho;
                for (j, mut column) in out.column_iter_mut().enumerate() {
                    column.axpy(self.diag[j] - self.rho * own[j], &v.column(j), 1.0);
                }
            }
        }
        out
    }
}

/// The rows `A_i G_i (sum w_k G_k)^-1` of all parents, in their order.
///
/// # Errors
/// A parent without a Gram or with one of another width; weights that leave no positive matrix.
pub(crate) fn transform(
    stack: &Stack,
    groups: &[Range<usize>],
    parents: &[Parent<'_>],
    spec: &Spec,
) -> Result<Vec<f32>> {
    let d = stack.n_in;
    let moments = parents.iter().map(|p| moments(p, d, spec.rho)).collect::<Result<Vec<_>>>()?;
    let ridge = RIDGE * moments.iter().map(|m| m.diag.mean()).sum::<f64>() / moments.len() as f64;
    let moments: Vec<Moments<'_>> =
        moments.into_iter().map(|m| Moments { diag: m.diag.add_scalar(ridge), ..m }).collect();
    let mut right = DMatrix::zeros(stack.rank(), d);
    for (rows, m) in groups.iter().zip(&moments) {
        let a = DMatrix::from_fn(rows.len(), d, |i, j| f64::from(stack.a[(rows.start + i) * d + j]));
        right.rows_mut(rows.start, rows.len()).copy_from(&m.apply(&a));
    }
    let weights: Vec<f64> = parents.iter().map(|p| p.weight).collect();
    let solved = solve(&moments, &weights, right).ok_or_else(|| {
        let want = "weights and Grams whose sum is positive definite: regmean takes weights of 0 and above";
        Error::config("weights", format!("{weights:?}"), want)
    })?;
    let mut out = Vec::with_capacity(stack.a.len());
    for i in 0..stack.rank() {
        out.extend((0..d).map(|j| solved[(i, j)] as f32));
    }
    Ok(out)
}

fn moments<'a>(p: &Parent<'a>, d: usize, rho: f64) -> Result<Moments<'a>> {
    let wrong = |got: String| {
        Error::shape(format!("statistics of {}", p.name), got, format!("a Gram of {d} features"))
    };
    match p.statistics.and_then(|s| s.gram.as_ref()) {
        None => Err(wrong("no Gram".into())),
        Some(Gram::Dense(g)) => {
            if g.len() != d * d {
                return Err(wrong(format!("{} numbers", g.len())));
            }
            let diag = DVector::from_fn(d, |i, _| f64::from(g[i * d + i]));
            Ok(Moments { diag, beside: Beside::Dense(g), rho })
        }
        Some(Gram::Low { diag, low }) => {
            if diag.len() != d || low.len() % d != 0 {
                return Err(wrong(format!("{} features", diag.len())));
            }
            let rows = DMatrix::from_fn(low.len() / d, d, |i, j| f64::from(low[i * d + j]));
            let own = DVector::from_fn(d, |j, _| rows.column(j).norm_squared());
            let diag = DVector::from_fn(d, |j, _| f64::from(diag[j]));
            Ok(Moments { diag, beside: Beside::Low(rows, own), rho })
        }
    }
}

/// `right (sum w_k G_k)^-1`: Cholesky where a matrix is whole, Woodbury's identity where all are low-rank.
fn solve(moments: &[Moments<'_>], weights: &[f64], right: DMatrix<f64>) -> Option<DMatrix<f64>> {
    let d = right.ncols();
    let mut diag = DVector::zeros(d);
    for (m, w) in moments.iter().zip(weights) {
        diag.axpy(*w, &m.diag, 1.0);
    }
    let all_low = moments.iter().all(|m| matches!(m.beside, Beside::Low(..)));
    if !all_low {
        let mut g = DMatrix::from_diagonal(&diag);
        for (m, w) in moments.iter().zip(weights) {
            let c = w * m.rho;
            match &m.beside {
                Beside::Dense(rows) => {
                    for j in 0..d {
                        for i in (0..d).filter(|&i| i != j) {
                            g[(i, j)] += c * f64::from(rows[i * d + j]);
                        }
                    }
                }
                Beside::Low(low, own) => {
                    g += low.transpose() * low * c;
                    for j in 0..d {
                        g[(j, j)] -= c * own[j];
                    }
                }
            }
        }
        return Some(g.cholesky()?.solve(&right.transpose()).transpose());
    }
    let mut rows = Vec::new();
    for (m, w) in moments.iter().zip(weights) {
        if let Beside::Low(low, own) = &m.beside {
            let c = w * m.rho;
            if c < 0.0 {
                return None;
            }
            diag.axpy(-c, own, 1.0);
            rows.extend(low.row_iter().map(|r| r * c.sqrt()));
        }
    }
    if diag.iter().any(|v| !(*v > 0.0)) {
        return None;
    }
    let scaled = |m: &DMatrix<f64>| DMatrix::from_fn(m.nrows(), d, |i, j| m[(i, j)] / diag[j]);
    if rows.is_empty() {
        return Some(scaled(&right));
    }
    let u = DMatrix::from_rows(&rows);
    let (ud, rd) = (scaled(&u), scaled(&right));
    let inner = DMatrix::identity(u.nrows(), u.nrows()) + &ud * u.transpose();
    let middle = inner.cholesky()?.solve(&(&u * rd.transpose()));
    Some(rd - middle.transpose() * ud)
}

/// Bytes that [`transform`] takes at most.
pub(crate) fn bytes(parents: &[Parent<'_>]) -> usize {
    let d = parents[0].layer.in_features();
    let rank: usize = parents.iter().map(|p| p.layer.rank()).sum();
    let whole =
        parents.iter().any(|p| matches!(p.statistics.and_then(|s| s.gram.as_ref()), Some(Gram::Dense(_))));
    let low: usize = parents
        .iter()
        .filter_map(|p| p.statistics?.gram.as_ref())
        .map(|g| match g {
            Gram::Dense(_) => 0,
            Gram::Low { low, .. } => low.len(),
        })
        .sum();
    8 * (3 * rank * d + 2 * low + if whole { 2 * d * d } else { 0 })
}
