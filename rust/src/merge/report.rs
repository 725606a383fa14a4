//! What a merge did to each module, from Gram quantities.

use std::ops::Range;

use nalgebra::DMatrix;
use serde::Serialize;

use super::spec::Parent;
use crate::algebra::{Factors, Grams, Stack};
use crate::kernels::Kernels;

/// One module's figures.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ModuleReport {
    /// Module name.
    pub name: String,
    /// Method.
    pub method: String,
    /// Names of the parents that took part.
    pub parents: Vec<String>,
    /// Their ranks.
    pub rank_in: Vec<usize>,
    /// Rank of the result.
    pub rank_out: usize,
    /// `|merged|` before truncation (Frobenius).
    pub norm: f64,
    /// `|D_i|`.
    pub norms: Vec<f64>,
    /// Share of `|merged|^2` that the rank holds.
    pub energy_kept: f64,
    /// `|merged - truncated| / |merged|`.
    pub error: f64,
    /// Cosines of the parents' deltas; none where one is zero.
    pub cosines: Vec<Vec<Option<f64>>>,
    /// `|P (merged - D_i) Q| / |D_i|` with the projections on parent i's column and row space; none for a zero one.
    pub interference: Vec<Option<f64>>,
    /// Factors of the parents' deltas, where the method is a sum of them.
    pub coefficients: Option<Vec<f64>>,
    /// Share of entries where parents differ in sign; only in a full report.
    pub sign_conflict: Option<f64>,
    /// Time of the module.
    pub seconds: f64,
    /// Bytes that its work took at most, inputs and result not counted.
    #[serde(rename = "peak_bytes")]
    pub bytes: usize,
    /// What should be known of how it went.
    pub notes: Vec<String>,
}

/// A merge's figures.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whose definitions.
    pub semantics: String,
    /// Time of the whole.
    pub seconds: f64,
    /// Most that any module took, inputs and result not counted.
    pub peak_bytes: usize,
    /// Module by module.
    pub modules: Vec<ModuleReport>,
}

/// `<i, j> / |i||j|`, none where one is zero.
pub(crate) fn cosine(products: &DMatrix<f64>, i: usize, j: usize) -> Option<f64> {
    let size = (products[(i, i)] * products[(j, j)]).sqrt();
    (size > 0.0).then(|| (products[(i, j)] / size).clamp(-1.0, 1.0))
}

/// The parents as a stack: rows, Grams, whose rows they are, inner products of the deltas.
pub(crate) struct Seen<'a> {
    pub stack: &'a Stack,
    pub grams: &'a Grams,
    pub groups: &'a [Range<usize>],
    pub products: &'a DMatrix<f64>,
}

impl Seen<'_> {
    /// For a result that is the stack with other coefficients.
    pub fn exact(&self, _k: &Kernels, parents: &[Parent<'_>], coef: &[f64], rank: usize) -> ModuleReport {
        let all = 0..coef.len();
        let norm2 = self.grams.inner(coef, &all, &all).max(0.0);
        let mut with = self.grams.b.clone();
        for (mut row, c) in with.row_iter_mut().zip(coef) {
            row *= *c;
        }
        self.report(parents, &self.grams.a, &with, norm2, norm2, rank)
    }

    /// For a truncated result whose rows are known combinations of the stack's.
    pub fn truncated(&self, k: &Kernels, parents: &[Parent<'_>], made: &Factors) -> ModuleReport {
        if made.mix_a.is_empty() {
            return self.apart(k, parents, made);
        }
        let (with_a, with_b) = (&made.mix_a * &self.grams.a, &made.mix_b * &self.grams.b);
        self.report(parents, &with_a, &with_b, made.norm2, made.kept2, made.rank)
    }

    /// For a result of rows that must be compared with the stack's anew.
    pub fn apart(&self, k: &Kernels, parents: &[Parent<'_>], made: &Factors) -> ModuleReport {
        let against = |rows: &[f32], stack: &[f32], n: usize| {
            let rank = self.stack.rank();
            // Column-major (rank, rows) as the kernel fills it row by row of the result.
            let mut out = DMatrix::zeros(rank, made.rank);
            k.products_of_rows(rows, stack, n, out.as_mut_slice());
            out.transpose()
        };
        let with_a = against(&made.a, &self.stack.a, self.stack.n_in);
        let with_b = against(&made.b, &self.stack.b, self.stack.n_out);
        self.report(parents, &with_a, &with_b, made.norm2, made.kept2, made.rank)
    }

    /// `with_a`, `with_b`: products of the result's rows with the stack's, (rows, rank).
    fn report(
        &self,
        parents: &[Parent<'_>],
        with_a: &DMatrix<f64>,
        with_b: &DMatrix<f64>,
        norm2: f64,
        kept2: f64,
        rank: usize,
    ) -> ModuleReport {
        let m = parents.len();
        let norms: Vec<f64> = (0..m).map(|i| self.products[(i, i)].max(0.0).sqrt()).collect();
        let lost = (norm2 - kept2).max(0.0);
        let interference = (0..m)
            .map(|i| (norms[i] > 0.0).then(|| self.interference(i, with_a, with_b) / norms[i]))
            .collect();
        ModuleReport {
            parents: parents.iter().map(|p| p.name.to_owned()).collect(),
            rank_in: parents.iter().map(|p| p.layer.rank()).collect(),
            rank_out: rank,
            norm: norm2.sqrt(),
            energy_kept: if norm2 > 0.0 { 1.0 - lost / norm2 } else { 1.0 },
            error: if norm2 > 0.0 { (lost / norm2).sqrt() } else { 0.0 },
            cosines: (0..m).map(|i| (0..m).map(|j| cosine(self.products, i, j)).collect()).collect(),
            norms,
            interference,
            ..ModuleReport::default()
        }
    }

    /// `|P (merged - D_i) Q|` in an orthonormal basis of the parent's rows.
    fn interference(&self, i: usize, with_a: &DMatrix<f64>, with_b: &DMatrix<f64>) -> f64 {
        let (rows, n) = (self.groups[i].start, self.groups[i].len());
        let own = |g: &DMatrix<f64>| g.view((rows, rows), (n, n)).clone_owned();
        let (ga, gb) = (own(&self.grams.a), own(&self.grams.b));
        // B_i (merged - D_i) A_i^T, (n, n)
        let mut inside = with_b.columns(rows, n).transpose() * with_a.columns(rows, n);
        let mut scaled = gb.clone();
        for (mut column, c) in scaled.column_iter_mut().zip(&self.stack.coef[rows..rows + n]) {
            column *= *c;
        }
        inside -= scaled * &ga;
        whiten(&gb, &mut inside);
        let mut turned = inside.transpose();
        whiten(&ga, &mut turned);
        turned.norm()
    }
}

/// `L^-1 m` for `g = L L^T`; rows that depend on earlier ones add no direction.
fn whiten(g: &DMatrix<f64>, m: &mut DMatrix<f64>) {
    let n = g.nrows();
    let floor = (0..n).map(|i| g[(i, i)]).fold(0.0, f64::max) * 1e-11;
    let mut l = g.clone();
    for j in 0..n {
        let pivot = l[(j, j)] - (0..j).map(|p| l[(j, p)] * l[(j, p)]).sum::<f64>();
        if pivot <= floor {
            for i in j..n {
                l[(i, j)] = 0.0;
            }
            m.row_mut(j).fill(0.0);
            continue;
        }
        let pivot = pivot.sqrt();
        l[(j, j)] = pivot;
        for i in j + 1..n {
            let dot: f64 = (0..j).map(|p| l[(i, p)] * l[(j, p)]).sum();
            l[(i, j)] = (l[(i, j)] - dot) / pivot;
        }
    }
    for mut column in m.column_iter_mut() {
        for j in 0..n {
            let pivot = l[(j, j)];
            if pivot == 0.0 {
                column[j] = 0.0;
                continue;
            }
            let dot: f64 = (0..j).map(|p| l[(j, p)] * column[p]).sum();
            column[j] = (column[j] - dot) / pivot;
        }
    }
}
