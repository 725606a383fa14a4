//! Methods in factor space: coefficients of the parents' deltas from their inner products, then one stack.

use std::ops::Range;

use nalgebra::DMatrix;

use super::method::Run;
use super::report::{ModuleReport, Seen, cosine};
use super::spec::{Parent, Semantics, Spec};
use crate::algebra::{Factors, Grams, Keep, Stack, refactor_with};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;

pub(crate) mod average;
pub(crate) mod karcher;
pub(crate) mod linear;
pub(crate) mod model_stock;
pub(crate) mod multislerp;
pub(crate) mod nuslerp;
pub(crate) mod regmean;
pub(crate) mod slerp;
mod sphere;

/// What a method sees: weights, and the inner products of the parents' deltas.
pub(crate) struct Pieces<'a> {
    pub spec: &'a Spec,
    pub weights: &'a [f64],
    pub products: &'a DMatrix<f64>,
}

impl Pieces<'_> {
    /// Parents.
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// `|D_i|`.
    pub fn norm(&self, i: usize) -> f64 {
        self.products[(i, i)].max(0.0).sqrt()
    }

    /// Cosine of two deltas, none where one is zero.
    pub fn cosine(&self, i: usize, j: usize) -> Option<f64> {
        cosine(self.products, i, j)
    }

    /// `<D_i, sum_j c_j D_j>`.
    pub fn product_with(&self, i: usize, c: &[f64]) -> f64 {
        c.iter().enumerate().map(|(j, c)| c * self.products[(i, j)]).sum()
    }

    /// `|sum_j c_j D_j|`.
    pub fn length(&self, c: &[f64]) -> f64 {
        (0..self.len()).map(|i| c[i] * self.product_with(i, c)).sum::<f64>().max(0.0).sqrt()
    }

    /// Weights relative to their sum.
    pub fn shares(&self) -> Result<Vec<f64>> {
        let sum: f64 = self.weights.iter().sum();
        Ok(self.weights.iter().map(|w| w / sum).collect())
    }
}

/// Merges one module.
pub(crate) fn merge(
    k: &Kernels,
    module: &str,
    parents: &[Parent<'_>],
    spec: &Spec,
) -> Result<(Layer, ModuleReport)> {
    let layers: Vec<&Layer> = parents.iter().map(|p| p.layer).collect();
    let (stack, groups) = Stack::of(&layers, &vec![1.0; layers.len()])?;
    let grams = Grams::of(k, &stack);
    let products = grams.products(&stack.coef, &groups);
    let weights: Vec<f64> = parents.iter().map(|p| p.weight).collect();
    let pieces = Pieces { spec, weights: &weights, products: &products };
    let dtype = super::dtype_of(spec, &layers);
    let mut seen = Seen { stack: &stack, grams: &grams, groups: &groups, products: &products };
    match spec.method.run {
        Run::Mix(mix) => {
            let mut coefficients = mix(&pieces)?;
            coefficients.iter_mut().for_each(|c| *c *= spec.lam);
            let coef = spread(&stack.coef, &groups, &coefficients);
            let used: usize =
                groups.iter().zip(&coefficients).filter(|(_, c)| **c != 0.0).map(|(g, _)| g.len()).sum();
            let rank = wanted(module, spec, &stack, groups.iter().map(Range::len).max().unwrap_or(1))?;
            let concat = used <= rank || spec.method.name == "cat";
            let (layer, mut report) = if concat {
                let layer = concatenated(parents, &groups, &coefficients, &stack, dtype, rank.max(used))?;
                let report = seen.exact(k, parents, &coef, layer.rank());
                (layer, report)
            } else {
                let made = refactor_with(k, &stack, &grams, &coef, Keep::Rank(rank))?;
                let report = seen.truncated(k, parents, &made);
                (layer_of(made, &stack, rank, dtype)?, report)
            };
            report.coefficients = Some(coefficients);
            report.bytes += stack.bytes() + 3 * grams.bytes();
            Ok((layer, report))
        }
        Run::RegMean => {
            let changed = regmean::transform(&stack, &groups, parents, spec)?;
            let coef =
                spread(&stack.coef, &groups, &weights.iter().map(|w| w * spec.lam).collect::<Vec<_>>());
            let moved = Stack {
                a: changed,
                coef: coef.clone(),
                n_in: stack.n_in,
                n_out: stack.n_out,
                b: stack.b.clone(),
            };
            let inner = Grams { a: Grams::rows(k, &moved.a, moved.n_in), b: grams.b.clone() };
            let rank = wanted(module, spec, &stack, groups.iter().map(Range::len).max().unwrap_or(1))?;
            let (made, alpha) = if stack.rank() <= rank {
                let norm2 = inner.inner(&coef, &(0..coef.len()), &(0..coef.len()));
                (whole(&moved, norm2), 1.0)
            } else {
                (refactor_with(k, &moved, &inner, &coef, Keep::Rank(rank))?, 1.0)
            };
            seen.stack = &stack;
            let mut report = seen.apart(k, parents, &made);
            report.bytes += stack.bytes() + moved.bytes() + 3 * inner.bytes() + regmean::bytes(parents);
            debug_assert_eq!(alpha, 1.0);
            Ok((layer_of(made, &stack, rank, dtype)?, report))
        }
        Run::Element(_) | Run::Peft(_) => unreachable!("an element-wise method in factor space"),
    }
}

/// The coefficients of the rows, times that of their parent.
fn spread(coef: &[f64], groups: &[Range<usize>], by: &[f64]) -> Vec<f64> {
    let mut out = coef.to_vec();
    for (group, by) in groups.iter().zip(by) {
        out[group.clone()].iter_mut().for_each(|c| *c *= by);
    }
    out
}

/// The rank of the result: as asked, else all rows, never above what the shape holds.
fn wanted(module: &str, spec: &Spec, stack: &Stack, largest: usize) -> Result<usize> {
    let (sum, most) = (stack.rank(), stack.n_in.min(stack.n_out));
    if spec.semantics == Semantics::Peft && spec.method.name == "svd" {
        return Ok(spec.rank.unwrap_or(largest).min(most));
    }
    match spec.rank {
        Some(rank) if rank > sum => {
            let want = format!("at most {sum}, the sum of the parents' ranks in module {module}");
            Err(Error::config("rank", rank, want))
        }
        Some(rank) => Ok(rank),
        None => Ok(sum.min(most)),
    }
}

/// `sum c_i D_i` by concatenation: A as it is, scalars in alpha, signs in B.
pub(crate) fn concatenated(
    parents: &[Parent<'_>],
    groups: &[Range<usize>],
    coefficients: &[f64],
    stack: &Stack,
    dtype: Dtype,
    rank: usize,
) -> Result<Layer> {
    let used: Vec<usize> = (0..parents.len()).filter(|&i| coefficients[i] != 0.0).collect();
    let scale = |i: usize| coefficients[i] * parents[i].layer.exact_scaling();
    let largest = used.iter().map(|&i| scale(i).abs()).fold(0.0, f64::max);
    if largest == 0.0 {
        let (a, b) = (Factor::zeros(rank, stack.n_in, dtype), Factor::zeros(rank, stack.n_out, dtype));
        return Layer::new(a, b, rank as f64, false);
    }
    let (mut a, mut b) = (Vec::with_capacity(rank * stack.n_in), Vec::with_capacity(rank * stack.n_out));
    for &i in &used {
        let rows = &groups[i];
        a.extend_from_slice(&stack.a[rows.start * stack.n_in..rows.end * stack.n_in]);
        let by = scale(i) / largest;
        let rows = &stack.b[rows.start * stack.n_out..rows.end * stack.n_out];
        b.extend(rows.iter().map(|&v| (f64::from(v) * by) as f32));
    }
    let rank = a.len() / stack.n_in;
    let (a, b) =
        (Factor::from_rows(&a, rank, stack.n_in, dtype), Factor::from_rows(&b, rank, stack.n_out, dtype));
    super::finite(&a, &b)?;
    Layer::new(a, b, largest * rank as f64, false)
}

/// All rows of a stack as they are, its coefficients in B.
fn whole(stack: &Stack, norm2: f64) -> Factors {
    let mut b = stack.b.clone();
    for (row, &c) in b.chunks_exact_mut(stack.n_out).zip(&stack.coef) {
        row.iter_mut().for_each(|v| *v = (f64::from(*v) * c) as f32);
    }
    Factors {
        rank: stack.rank(),
        a: stack.a.clone(),
        b,
        values: Vec::new(),
        norm2,
        kept2: norm2,
        mix_a: DMatrix::zeros(0, 0),
        mix_b: DMatrix::zeros(0, 0),
    }
}

/// A layer with scaling 1, filled up with zero rows to `rank`.
pub(crate) fn layer_of(made: Factors, stack: &Stack, rank: usize, dtype: Dtype) -> Result<Layer> {
    layer_of_shape(made, (stack.n_in, stack.n_out), rank, dtype)
}

/// [`layer_of`] for a shape.
pub(crate) fn layer_of_shape(
    made: Factors,
    (n_in, n_out): (usize, usize),
    rank: usize,
    dtype: Dtype,
) -> Result<Layer> {
    let (mut a, mut b) = (made.a, made.b);
    a.resize(rank * n_in, 0.0);
    b.resize(rank * n_out, 0.0);
    let (a, b) = (Factor::from_rows(&a, rank, n_in, dtype), Factor::from_rows(&b, rank, n_out, dtype));
    super::finite(&a, &b)?;
    Layer::new(a, b, rank as f64, false)
}
