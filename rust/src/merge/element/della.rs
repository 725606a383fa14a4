//! DELLA (arXiv 2406.11617): as DARE, but the larger an entry within its row, the likelier it stays.

use super::super::spec::Semantics;
use super::dare::Kept;
use super::elect::Join;
use super::mask::{Bits, generator};
use super::{Context, Method, Thin, Thinned};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::learn::basis::Tick;

/// Bits of a magnitude that one turn of the sort looks at.
const DIGIT: u32 = 11;

/// Probabilities that rise linearly with the rank of the magnitude in its row: `lowest + step rank`, rank 0 the
/// smallest, equal magnitudes from left to right.
struct Odds {
    lowest: f64,
    step: f64,
    /// Keys (magnitude, column) of a row, twice.
    keys: [Vec<u64>; 2],
}

impl Odds {
    fn new(c: &Context<'_>) -> Self {
        let half =
            if c.spec.semantics == Semantics::Mergekit { c.spec.epsilon } else { c.spec.epsilon / 2.0 };
        let cols = c.deltas.cols();
        let (lowest, step) = match cols {
            1 => (c.spec.density, 0.0),
            n => (c.spec.density - half, 2.0 * half / (n - 1) as f64),
        };
        Odds { lowest, step, keys: [vec![0; cols], vec![0; cols]] }
    }

    fn bytes(&self) -> usize {
        8 * (self.keys[0].len() + self.keys[1].len())
    }

    /// Calls `f` with each column and its probability, smallest magnitude first.
    fn each(&mut self, row: &[f32], mut f: impl FnMut(usize, f64)) {
        for (i, (key, v)) in self.keys[0].iter_mut().zip(row).enumerate() {
            *key = u64::from(v.abs().to_bits()) << 32 | i as u64;
        }
        // Three stable turns over 31 bits.
        for turn in 0..3 {
            let [from, to] = &mut self.keys;
            let digit = |key: u64| (key >> (32 + turn * DIGIT)) as usize & ((1 << DIGIT) - 1);
            let mut start = [0u32; 1 << DIGIT];
            for key in from.iter() {
                start[digit(*key)] += 1;
            }
            let mut sum = 0;
            for s in &mut start {
                (*s, sum) = (sum, sum + *s);
            }
            for key in from.iter() {
                let at = &mut start[digit(*key)];
                to[*at as usize] = *key;
                *at += 1;
            }
            self.keys.swap(0, 1);
        }
        for (rank, key) in self.keys[0].iter().enumerate() {
            f((*key & 0xffff_ffff) as usize, self.lowest + self.step * rank as f64);
        }
    }
}

/// Entries kept, each over its own probability.
struct Scaled {
    kept: Vec<Bits>,
    odds: Odds,
    factors: Vec<f32>,
}

impl Thin for Scaled {
    fn thin(&mut self, k: &Kernels, parent: usize, row: usize, x: &mut [f32]) {
        let factors = &mut self.factors;
        self.odds.each(x, |i, p| factors[i] = (1.0 / p) as f32);
        k.keep_bits(self.kept[parent].row(row), 1.0, x);
        x.iter_mut().zip(factors).for_each(|(x, f)| *x *= *f);
    }

    fn bytes(&self) -> usize {
        self.kept.iter().map(Bits::bytes).sum::<usize>() + self.odds.bytes() + 4 * self.factors.len()
    }
}

fn thinned<'a>(c: &Context<'a>, join: Join, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    let [rows, cols] = c.shape();
    let mut odds = Odds::new(c);
    let mut chance = vec![0.0f64; cols];
    let mut kept = Vec::with_capacity(c.parents.len());
    for (i, p) in c.parents.iter().enumerate() {
        let mut rng = generator(c.spec.seed, c.module, p.name);
        let mut bits = Bits::none(rows, cols);
        c.deltas.stream(c.k, i..i + 1, tick, &mut |block, tiles| {
            for (j, row) in block.zip(tiles[0].chunks_exact(cols)) {
                odds.each(row, |i, p| chance[i] = p);
                bits.fill(j, cols, |i| f64::from(rng.uniform()) < chance[i]);
            }
            Ok(())
        })?;
        kept.push(bits);
    }
    let held: usize = kept.iter().map(Bits::bytes).sum();
    c.held(held + odds.bytes() + 8 * cols + c.deltas.block_bytes());
    if c.spec.semantics == Semantics::Mergekit {
        let mut thin = Kept { scale: vec![1.0; kept.len()], bits: kept };
        thin.keep_l1(c, tick)?;
        return Ok(Box::new(Thinned { thin, join }));
    }
    Ok(Box::new(Thinned { thin: Scaled { kept, odds, factors: vec![0.0; cols] }, join }))
}

/// TIES' election and mean of what is left.
pub(crate) fn prepare<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    thinned(c, Join::elect(c.parents, c.spec), tick)
}

/// A weighted sum of what is left.
pub(crate) fn prepare_linear<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    thinned(c, Join::sum(c.parents, c.spec), tick)
}
