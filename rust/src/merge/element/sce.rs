//! SCE (FuseChat, arXiv 2408.07990): select positions by variance, calculate weights, erase minority signs.

use std::ops::Range;

use super::super::spec::Semantics;
use super::elect::{Join, Vote};
use super::threshold::{Numbers, bytes, largest, share_of};
use super::{Context, Method, below};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::learn::basis::Tick;
use crate::rng::Rng;

/// The variance over parents of every entry.
struct Variances<'a, 'c, 't, 'u> {
    c: &'a Context<'c>,
    tick: &'t mut Tick<'u>,
}

impl Numbers for Variances<'_, '_, '_, '_> {
    fn count(&self) -> usize {
        self.c.deltas.entries()
    }

    fn sample(&self, n: usize, rng: &mut Rng) -> Vec<f32> {
        let (d, [rows, cols]) = (self.c.deltas, self.c.shape());
        let columns = d.columns(0..d.len());
        let mut out = [0.0];
        let mut one = || {
            let (row, col) = (below(rng, rows), below(rng, cols));
            let x: Vec<f32> = (0..d.len()).map(|i| d.entry(i, &columns[i], row, col)).collect();
            self.c.k.variance(&x.chunks_exact(1).collect::<Vec<_>>(), &mut out);
            out[0]
        };
        (0..n).map(|_| one()).collect()
    }

    fn each(&mut self, f: &mut dyn FnMut(&[f32])) -> Result<()> {
        let (d, k) = (self.c.deltas, self.c.k);
        let mut out = d.buffer();
        d.stream(k, 0..d.len(), self.tick, &mut |_, tiles| {
            out.truncate(tiles[0].len());
            k.variance(&tiles.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut out);
            f(&out);
            Ok(())
        })
    }

    fn bytes(&self) -> [usize; 2] {
        let d = self.c.deltas;
        [4 * d.cols() * (0..d.len()).map(|i| d.rank(i)).sum::<usize>(), (d.len() + 1) * d.block_bytes()]
    }
}

struct Sce {
    /// Least variance of a position that is kept.
    least: f32,
    join: Join,
    variance: Vec<f32>,
}

/// Clears the positions below the least variance in every parent.
fn select(k: &Kernels, least: f32, variance: &mut Vec<f32>, parents: &mut [Vec<f32>]) {
    variance.resize(parents[0].len(), 0.0);
    k.variance(&parents.iter().map(Vec::as_slice).collect::<Vec<_>>(), variance);
    for parent in parents {
        k.keep_above(variance, least, parent);
    }
}

impl Method for Sce {
    fn block(&mut self, k: &Kernels, _: Range<usize>, parents: &mut [Vec<f32>], out: &mut [f32]) {
        select(k, self.least, &mut self.variance, parents);
        self.join.join(k, &parents.iter().map(Vec::as_slice).collect::<Vec<_>>(), out);
    }

    fn bytes(&self) -> usize {
        4 * self.variance.capacity()
    }
}

/// Positions of equal variance stay or go together, so one parent, or equal ones, come out as they are.
pub(crate) fn prepare<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    let keep = share_of(c.spec.density, c.deltas.entries());
    let least = if keep == 0 {
        f32::INFINITY
    } else if keep == c.deltas.entries() {
        0.0
    } else {
        let mut numbers = Variances { c, tick: &mut *tick };
        c.held(bytes(&numbers, 1));
        largest(c.k, &mut numbers, &[keep])?[0]
    };
    let mut variance = c.deltas.buffer();
    let mut energy = vec![0.0f64; c.deltas.len()];
    c.deltas.stream(c.k, 0..c.deltas.len(), tick, &mut |_, tiles| {
        select(c.k, least, &mut variance, tiles);
        energy.iter_mut().zip(tiles).for_each(|(e, t)| *e += c.k.sum_squares(t));
        Ok(())
    })?;
    c.held((c.deltas.len() + 1) * c.deltas.block_bytes());
    let all: f64 = energy.iter().sum();
    let share = |e: &f64| if all > 0.0 { (e / all) as f32 } else { 0.0 };
    let weights: Vec<f32> = energy.iter().map(share).collect();
    let join = Join::Elect(Vote {
        votes: vec![1.0; energy.len()],
        sizes: weights.clone(),
        weights,
        frequency: false,
        normalize: c.spec.semantics == Semantics::Mergekit,
        lam: c.spec.lam as f32,
    });
    Ok(Box::new(Sce { least, join, variance }))
}
