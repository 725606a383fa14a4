//! Rows of A and B of several layers, one under the other, each pair with a coefficient.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::layer::Layer;

/// `D = sum_r coef[r] b_r^T a_r`, exact: concatenation is addition.
#[derive(Clone, Debug, Default)]
pub struct Stack {
    /// Width of x.
    pub n_in: usize,
    /// Width of y.
    pub n_out: usize,
    /// `(rank, n_in)`, row-major.
    pub a: Vec<f32>,
    /// `(rank, n_out)`, row-major.
    pub b: Vec<f32>,
    /// One coefficient per row.
    pub coef: Vec<f64>,
}

impl Stack {
    /// An empty stack: the zero matrix.
    pub fn new(n_in: usize, n_out: usize) -> Self {
        Stack { n_in, n_out, ..Stack::default() }
    }

    /// The layers' changes weighted by `weights`, with the rows of each.
    ///
    /// # Errors
    /// Layers of different shapes.
    pub fn of(layers: &[&Layer], weights: &[f64]) -> Result<(Self, Vec<Range<usize>>)> {
        let first = layers.first().ok_or_else(|| Error::config("adapters", "none", "at least one"))?;
        let mut stack = Stack::new(first.in_features(), first.out_features());
        let rows: usize = layers.iter().map(|l| l.rank()).sum();
        stack.a.reserve_exact(rows * stack.n_in);
        stack.b.reserve_exact(rows * stack.n_out);
        let mut ranges = Vec::with_capacity(layers.len());
        for (layer, &weight) in layers.iter().zip(weights) {
            let start = stack.rank();
            stack.push(layer, weight)?;
            ranges.push(start..stack.rank());
        }
        Ok((stack, ranges))
    }

    /// Adds `weight` times a layer's change.
    ///
    /// # Errors
    /// A layer of another shape.
    pub fn push(&mut self, layer: &Layer, weight: f64) -> Result<()> {
        let (got, want) = ((layer.in_features(), layer.out_features()), (self.n_in, self.n_out));
        if got != want {
            let show = |(i, o): (usize, usize)| format!("in {i}, out {o}");
            return Err(Error::shape("layer", show(got), show(want)));
        }
        layer.a.append_rows(&mut self.a);
        layer.b.append_rows(&mut self.b);
        let c = weight * layer.exact_scaling();
        self.coef.resize(self.coef.len() + layer.rank(), c);
        Ok(())
    }

    /// Rows.
    pub fn rank(&self) -> usize {
        self.coef.len()
    }

    /// Bytes of the rows.
    pub fn bytes(&self) -> usize {
        4 * (self.a.capacity() + self.b.capacity()) + 8 * self.coef.capacity()
    }
}
