//! A data-aware A: the top right singular vectors of unlabelled inputs (the idea of EVA, arXiv 2410.07170).
//!
//! Not centred: the mean direction acts as the bias. Scaled so that the mean of `|s x A|^2` over the inputs is
//! 1, which gives the RLS prior one unit for every adapter.

use std::sync::Arc;

use nalgebra::{DMatrix, SymmetricEigen};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::rng::Rng;

use super::learner::{Learner, Touched};

/// Up to this many inputs the Gram matrix of the inputs is decomposed exactly.
const EXACT: usize = 512;
/// Extra columns and passes of the subspace iteration beyond it (Halko et al., arXiv 0909.4061).
const OVERSAMPLE: usize = 8;
const PASSES: usize = 8;
/// Singular values below this share of the largest carry no direction.
const RANK_TOLERANCE: f64 = 1e-6;
/// How well the new rows must span the old ones before a learned B may be carried over.
const SPAN_TOLERANCE: f64 = 1e-5;

/// Inputs within these are squared without overflow or underflow in f32.
const MAX_NORM2: f64 = 1e36;
const MIN_NORM: f64 = 1e-12;

/// Told of progress as (inputs seen, inputs in all); an error stops the work before anything changed.
pub type Tick<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// Inputs between two ticks: a few milliseconds of work.
const TICK_ROWS: usize = 256;

/// Replaces A by the principal directions of `x` (`n` rows). Returns the share of `|X|^2` they hold.
///
/// # Errors
/// Fewer inputs than ranks, non-finite or all-zero inputs, pending gradients, or an adapter that has learned
/// something the new A cannot express.
pub(crate) fn fit(
    learner: &mut Learner,
    k: &Kernels,
    x: &[f32],
    rng: &mut Rng,
    tick: &mut Tick<'_>,
) -> Result<f64> {
    let layer = Arc::clone(learner.master());
    let (rank, width) = (layer.rank(), layer.in_features());
    let n = x.len() / width;
    if n < rank {
        return Err(Error::shape("X", format!("({n}, {width})"), format!("at least {rank} rows, the rank")));
    }
    if learner.gradients.as_ref().is_some_and(|g| g.count > 0) {
        let got = "gradients pending for the present A";
        return Err(Error::config("fit_input_basis", got, "apply_updates or restore first"));
    }
    let total: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    if !total.is_finite() {
        return Err(Error::non_finite("X"));
    }
    if total == 0.0 {
        return Err(Error::Feedback("X: every input is zero, so there is no direction to find".into()));
    }
    let norm = (total / n as f64).sqrt();
    if total > MAX_NORM2 || norm < MIN_NORM {
        let got = format!("rows of norm {norm:.1e}");
        return Err(Error::config("X", got, "rows whose squares float32 holds: norms from 1e-12 to 1e15"));
    }
    let (mut rows, kept) =
        if n <= EXACT { exact(k, x, width, rank, tick)? } else { iterate(k, x, width, rank, rng, tick)? };
    let held: f64 = kept.iter().sum::<f64>() / total;
    complete(k, &mut rows, width, rank, rng);

    let scale = (f64::from(layer.scaling()).powi(-2) * n as f64 / kept.iter().sum::<f64>()).sqrt() as f32;
    k.scale(scale, &mut rows);
    if !(scale.is_finite() && scale > 0.0) {
        return Err(Error::config("alpha", layer.alpha, "a scaling that is not zero"));
    }
    let b = if layer.b.is_zero() { None } else { Some(carry_over(k, &layer, &rows)?) };
    let [most_a, most_b] = learner.limits();
    let fits = |v: &[f32], most: f64| v.iter().all(|v| f64::from(v.abs()) < most);
    if !(fits(&rows, most_a) && b.as_ref().is_none_or(|b| fits(b.stream(), most_b))) {
        let want =
            format!("larger inputs: the basis of these overflows {} weights", learner.layer().a.dtype());
        return Err(Error::config("X", format!("rows of norm {norm:.1e}"), want));
    }
    drop(layer);
    learner.edit(Touched { a: true, b: b.is_some() }, |layer| {
        layer.a = Factor::from_rows(&rows, rank, width, Dtype::F32).into();
        if let Some(b) = b {
            layer.b = b.into();
        }
    });
    learner.rls = None;
    learner.gradients = None;
    learner.basis_unit = Some(1.0);
    learner.refresh_bounds();
    Ok(held.min(1.0))
}

/// Unit rows, and the squared singular value of each.
type Directions = (Vec<f32>, Vec<f64>);

/// Top right singular vectors through the n x n Gram matrix of the inputs, with their squared singular values.
fn exact(k: &Kernels, x: &[f32], width: usize, rank: usize, tick: &mut Tick<'_>) -> Result<Directions> {
    let n = x.len() / width;
    tick(0, n)?;
    let row = |i: usize| &x[i * width..(i + 1) * width];
    let mut gram = DMatrix::zeros(n, n);
    for i in 0..n {
        for j in 0..=i {
            let v = f64::from(k.dot(row(i), row(j)));
            gram[(i, j)] = v;
            gram[(j, i)] = v;
        }
    }
    tick(n, n)?;
    let eigen = SymmetricEigen::new(gram);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    let top = eigen.eigenvalues[order[0]];
    let mut rows = Vec::with_capacity(rank * width);
    let mut kept = Vec::new();
    for &i in order.iter().take(rank) {
        let value = eigen.eigenvalues[i];
        if value <= top * RANK_TOLERANCE * RANK_TOLERANCE {
            break;
        }
        let mut v = vec![0.0f32; width];
        for j in 0..n {
            k.axpy((eigen.eigenvectors[(j, i)] / value.sqrt()) as f32, row(j), &mut v);
        }
        rows.extend(v);
        kept.push(value);
    }
    Ok((rows, kept))
}

/// The same by subspace iteration on `X^T X` for many inputs.
fn iterate(
    k: &Kernels,
    x: &[f32],
    width: usize,
    rank: usize,
    rng: &mut Rng,
    tick: &mut Tick<'_>,
) -> Result<Directions> {
    let n = x.len() / width;
    let q = (rank + OVERSAMPLE).min(width);
    let mut basis = DMatrix::from_fn(width, q, |_, _| f64::from(rng.symmetric(1.0))).qr().q();
    let mut small = DMatrix::zeros(q, q);
    for pass in 0..=PASSES {
        let rows: Vec<Vec<f32>> =
            (0..q).map(|j| basis.column(j).iter().map(|&v| v as f32).collect()).collect();
        let mut product = vec![vec![0.0f32; width]; q];
        small.fill(0.0);
        for (i, x) in x.chunks_exact(width).enumerate() {
            if i % TICK_ROWS == 0 {
                tick(pass * n + i, (PASSES + 1) * n)?;
            }
            let c: Vec<f32> = rows.iter().map(|r| k.dot(r, x)).collect();
            for (p, &c) in product.iter_mut().zip(&c) {
                k.axpy(c, x, p);
            }
            for i in 0..q {
                for j in 0..q {
                    small[(i, j)] += f64::from(c[i]) * f64::from(c[j]);
                }
            }
        }
        if pass < PASSES {
            basis = DMatrix::from_fn(width, q, |i, j| f64::from(product[j][i])).qr().q();
        }
    }
    tick((PASSES + 1) * n, (PASSES + 1) * n)?;
    let eigen = SymmetricEigen::new(small);
    let mut order: Vec<usize> = (0..q).collect();
    order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    let top = eigen.eigenvalues[order[0]];
    let (mut rows, mut kept) = (Vec::with_capacity(rank * width), Vec::new());
    for &i in order.iter().take(rank) {
        let value = eigen.eigenvalues[i];
        if value <= top * RANK_TOLERANCE * RANK_TOLERANCE {
            break;
        }
        let v = &basis * eigen.eigenvectors.column(i);
        rows.extend(v.iter().map(|&v| v as f32));
        kept.push(value);
    }
    Ok((rows, kept))
}

/// Fills up to `rank` rows with random directions orthogonal to those there, where the inputs span fewer.
fn complete(k: &Kernels, rows: &mut Vec<f32>, width: usize, rank: usize, rng: &mut Rng) {
    let mut tries = 0;
    while rows.len() < rank * width {
        let mut v: Vec<f32> = (0..width).map(|_| rng.symmetric(1.0)).collect();
        for _ in 0..2 {
            for r in rows.chunks_exact(width) {
                k.axpy(-k.dot(&v, r), r, &mut v);
            }
        }
        let norm = k.dot(&v, &v).sqrt();
        tries += 1;
        // With rank above the width no orthogonal direction is left: any unit vector will do.
        if norm > 1e-3 || tries > 16 * rank {
            k.scale(1.0 / norm.max(f32::MIN_POSITIVE), &mut v);
            rows.extend(v);
        }
    }
}

/// `B' = M^T B` with `M = A pinv(A')`, so that the delta stays; refused where A' does not span A.
fn carry_over(k: &Kernels, layer: &Layer, rows: &[f32]) -> Result<Factor> {
    let (rank, width, n_out) = (layer.rank(), layer.in_features(), layer.out_features());
    let old = layer.a.to_f32(false);
    let row = |m: &'static str, i: usize| -> &[f32] {
        let m = if m == "old" { &old[..] } else { rows };
        &m[i * width..(i + 1) * width]
    };
    let cross = DMatrix::from_fn(rank, rank, |i, j| f64::from(k.dot(row("old", i), row("new", j))));
    let gram = DMatrix::from_fn(rank, rank, |i, j| f64::from(k.dot(row("new", i), row("new", j))));
    let refuse = || {
        let want = "an adapter that has not learned yet, or inputs whose basis spans its A (restore an older snapshot, or make a new one)";
        Error::config("fit_input_basis", "an adapter whose B is not zero", want)
    };
    let inverse = gram.try_inverse().ok_or_else(refuse)?;
    let m = cross * inverse;
    let (mut miss, mut all) = (0.0, 0.0);
    for i in 0..rank {
        let mut v = row("old", i).to_vec();
        for j in 0..rank {
            k.axpy(-m[(i, j)] as f32, row("new", j), &mut v);
        }
        miss += f64::from(k.dot(&v, &v));
        all += f64::from(k.dot(row("old", i), row("old", i)));
    }
    if miss > SPAN_TOLERANCE * SPAN_TOLERANCE * all {
        return Err(refuse());
    }
    let mut b = vec![0.0f32; rank * n_out];
    for (j, out) in b.chunks_exact_mut(n_out).enumerate() {
        let coef: Vec<f32> = (0..rank).map(|i| m[(i, j)] as f32).collect();
        layer.b.combine(k, &coef, out, false);
    }
    Ok(Factor::from_rows(&b, rank, n_out, Dtype::F32))
}
