//! Rows of per-sample gradients that wait to be multiplied together.

use super::Statistic;
use super::accumulator::Dims;
use crate::kernels::Kernels;
use crate::learn::Samples;

/// Rows already squared (or made absolute), with which of them begin a sample.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub x: Vec<f32>,
    pub g: Vec<f32>,
    pub u: Vec<f32>,
    pub w: Vec<f32>,
    /// Sample that each row belongs to.
    pub owner: Vec<u32>,
    pub rows: usize,
    pub samples: u32,
}

impl Buffer {
    pub fn new(dims: Dims, rows: usize) -> Self {
        Buffer {
            x: vec![0.0; rows * dims.n_in],
            g: vec![0.0; rows * dims.n_out],
            u: vec![0.0; rows * dims.rank],
            w: vec![0.0; rows * dims.rank],
            owner: vec![0; rows],
            rows: 0,
            samples: 0,
        }
    }

    /// Writes one row behind the counted ones.
    pub fn put(&mut self, k: &Kernels, dims: Dims, statistic: Statistic, at: usize, row: &Samples<'_>) {
        let Dims { rank, n_in, n_out } = dims;
        let map = |from: &[f32], to: &mut [f32]| match statistic {
            Statistic::Magnitudes => from.iter().zip(to).for_each(|(v, to)| *to = v.abs()),
            _ => k.squares(from, to),
        };
        map(row.x, &mut self.x[at * n_in..][..n_in]);
        map(row.g, &mut self.g[at * n_out..][..n_out]);
        map(row.u, &mut self.u[at * rank..][..rank]);
        map(row.w, &mut self.w[at * rank..][..rank]);
    }
}
