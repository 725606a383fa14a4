//! DARE (arXiv 2311.03099): drop entries at random, scale up the rest.

use super::super::spec::Semantics;
use super::elect::Join;
use super::mask::{Bits, bernoulli};
use super::{Context, Method, Thin, Thinned};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::learn::basis::Tick;

/// The entries kept of each parent, and their factor.
pub(super) struct Kept {
    pub bits: Vec<Bits>,
    pub scale: Vec<f32>,
}

impl Thin for Kept {
    fn thin(&mut self, k: &Kernels, parent: usize, row: usize, x: &mut [f32]) {
        k.keep_bits(self.bits[parent].row(row), self.scale[parent], x);
    }

    fn bytes(&self) -> usize {
        self.bits.iter().map(Bits::bytes).sum()
    }
}

impl Kept {
    /// Factors that keep each parent's sum of magnitudes (mergekit's rescaling); 0 where nothing was kept.
    pub fn keep_l1(&mut self, c: &Context<'_>, tick: &mut Tick<'_>) -> Result<()> {
        let [_, cols] = c.shape();
        c.held(self.bytes() + c.deltas.block_bytes());
        for (i, bits) in self.bits.iter().enumerate() {
            let (mut all, mut kept) = (0.0, 0.0);
            c.deltas.stream(c.k, i..i + 1, tick, &mut |block, tiles| {
                for (j, row) in block.zip(tiles[0].chunks_exact_mut(cols)) {
                    all += c.k.sum_magnitudes(row);
                    c.k.keep_bits(bits.row(j), 1.0, row);
                    kept += c.k.sum_magnitudes(row);
                }
                Ok(())
            })?;
            self.scale[i] = if kept > 0.0 { (all / kept) as f32 } else { 0.0 };
        }
        Ok(())
    }
}

/// Each entry kept with probability `density`, by the stream of its module and parent.
fn drop_some(c: &Context<'_>, tick: &mut Tick<'_>) -> Result<Kept> {
    let mut bits = Vec::with_capacity(c.parents.len());
    for (i, p) in c.parents.iter().enumerate() {
        tick(i, c.parents.len())?;
        bits.push(bernoulli(c.spec.seed, c.module, p.name, c.shape(), c.spec.density));
    }
    let mut kept = Kept { scale: vec![(1.0 / c.spec.density) as f32; bits.len()], bits };
    if c.spec.semantics == Semantics::Mergekit {
        kept.keep_l1(c, tick)?;
    }
    Ok(kept)
}

/// A weighted sum of what is left.
pub(crate) fn prepare<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(Thinned { thin: drop_some(c, tick)?, join: Join::sum(c.parents, c.spec) }))
}

/// TIES' election and mean of what is left.
pub(crate) fn prepare_ties<'a>(c: &Context<'a>, tick: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    Ok(Box::new(Thinned { thin: drop_some(c, tick)?, join: Join::elect(c.parents, c.spec) }))
}
