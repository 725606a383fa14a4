//! Methods in factor space: coefficients of the parents' deltas from their inner products, then one stack.

use std::cell::RefCell;
use std::ops::Range;

use nalgebra::DMatrix;

use super::method::Run;
use super::report::{ModuleReport, Seen, cosine};
use super::spec::{Parent, Semantics, Spec};
use super::store::{Stored, store, store_rows};
use crate::algebra::{Factors, Grams, Keep, Stack, refactor_with};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
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
    /// What should be known of how it went.
    pub notes: RefCell<Vec<String>>,
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

    /// Puts something into the report.
    pub fn note(&self, text: &str) {
        self.notes.borrow_mut().push(text.to_owned());
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
    let pieces = Pieces { spec, weights: &weights, products: &products, notes: RefCell::default() };
    let dtype = super::dtype_of(spec, &layers);
    let shape = (stack.n_in, stack.n_out);
    let seen = Seen { stack: &stack, grams: &grams, groups: &groups, products: &products };
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
                let stored = concatenated(k, parents, &groups, &coefficients, &stack, dtype, rank.max(used))?;
                let mut report = seen.exact(k, parents, &coef, stored.layer.rank());
                (stored.told(&mut report), report)
            } else {
                let made = refactor_with(k, &stack, &grams, &coef, Keep::Rank(rank))?;
                let mut report = seen.truncated(k, parents, &made);
                (store(k, made, shape, rank, dtype)?.told(&mut report), report)
            };
            report.coefficients = Some(coefficients);
            report.notes.extend(pieces.notes.take());
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
            let made = if stack.rank() <= rank {
                whole(&moved, inner.inner(&coef, &(0..coef.len()), &(0..coef.len())))
            } else {
                refactor_with(k, &moved, &inner, &coef, Keep::Rank(rank))?
            };
            let mut report = seen.apart(k, parents, &made);
            report.bytes += stack.bytes() + moved.bytes() + 3 * inner.bytes() + regmean::bytes(parents);
            Ok((store(k, made, shape, rank, dtype)?.told(&mut report), report))
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
    k: &Kernels,
    parents: &[Parent<'_>],
    groups: &[Range<usize>],
    coefficients: &[f64],
    stack: &Stack,
    dtype: Dtype,
    rank: usize,
) -> Result<Stored> {
    let used: Vec<usize> = (0..parents.len()).filter(|&i| coefficients[i] != 0.0).collect();
    let scale = |i: usize| coefficients[i] * parents[i].layer.exact_scaling();
    let largest = used.iter().map(|&i| scale(i).abs()).fold(0.0, f64::max);
    if largest == 0.0 {
        let (a, b) = (vec![0.0; rank * stack.n_in], vec![0.0; rank * stack.n_out]);
        return store_rows(k, &a, &b, rank, 1.0, dtype);
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
    store_rows(k, &a, &b, rank, largest, dtype)
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
