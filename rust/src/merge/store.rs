//! Results as layers: in the range of their dtype, with what rounding to it costs.

use crate::algebra::{Factors, Grams, Stack};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;

use super::report::ModuleReport;

/// A layer, and how far rounding moved it.
pub(crate) struct Stored {
    pub layer: Layer,
    /// `|stored - meant|^2` (Frobenius).
    pub rounding2: f64,
}

impl Stored {
    /// Puts the rounding into a report's error.
    pub fn told(self, report: &mut ModuleReport) -> Layer {
        if report.norm > 0.0 && self.rounding2 > 0.0 {
            let rounding = self.rounding2.sqrt() / report.norm;
            report.error = report.error.hypot(rounding);
            let dtype = self.layer.a.dtype();
            report.notes.push(format!("rounding to {dtype} alone is an error of {rounding:.1e}"));
        }
        self.layer
    }
}

/// Factors as a layer with zero rows up to `rank`: scaling 1, in f16 that power of two that both factors fit best.
///
/// # Errors
/// Numbers beyond the range of `dtype`.
pub(crate) fn store(
    k: &Kernels,
    made: Factors,
    (n_in, n_out): (usize, usize),
    rank: usize,
    dtype: Dtype,
) -> Result<Stored> {
    let (mut a, mut b) = (made.a, made.b);
    a.resize(rank * n_in, 0.0);
    b.resize(rank * n_out, 0.0);
    let mut scale = 1.0;
    if dtype == Dtype::F16 {
        scale = to_one(&mut a) * to_one(&mut b);
    }
    store_rows(k, &a, &b, rank, scale, dtype)
}

/// Brings the largest magnitude into [1, 2) by a power of two, which rounds nothing; returns what was taken out.
fn to_one(rows: &mut [f32]) -> f64 {
    let most = rows.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    if !(most > 0.0 && most.is_finite()) {
        return 1.0;
    }
    let out = f64::from(most).log2().floor().exp2();
    rows.iter_mut().for_each(|v| *v = (f64::from(*v) / out) as f32);
    out
}

/// `scale` times the product of these rows.
///
/// # Errors
/// Numbers beyond the range of `dtype`.
pub(crate) fn store_rows(
    k: &Kernels,
    a: &[f32],
    b: &[f32],
    rank: usize,
    scale: f64,
    dtype: Dtype,
) -> Result<Stored> {
    let (n_in, n_out) = (a.len() / rank, b.len() / rank);
    let (fa, fb) = (Factor::from_rows(a, rank, n_in, dtype), Factor::from_rows(b, rank, n_out, dtype));
    if !(fa.is_finite() && fb.is_finite()) {
        return Err(Error::config("dtype", dtype, "one whose range holds the merged factors, such as f32"));
    }
    let mut rounding2 = 0.0;
    if dtype != Dtype::F32 {
        // stored - meant = B'^T (A' - A) + (B' - B)^T A
        let (qa, qb) = (fa.to_f32(false), fb.to_f32(false));
        let apart = |q: &[f32], p: &[f32]| q.iter().zip(p).map(|(q, p)| q - p).collect::<Vec<f32>>();
        let (da, db) = (apart(&qa, a), apart(&qb, b));
        let stack = Stack {
            n_in,
            n_out,
            a: [&da[..], a].concat(),
            b: [&qb[..], &db].concat(),
            coef: vec![scale; 2 * rank],
        };
        let all = 0..2 * rank;
        rounding2 = Grams::of(k, &stack).inner(&stack.coef, &all, &all).max(0.0);
    }
    let layer = Layer::new(fa, fb, scale * rank as f64, false)?;
    Ok(Stored { layer, rounding2 })
}
