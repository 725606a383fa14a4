//! The parents' changes `D_i = s_i B_i A_i`, a block of rows at a time.

use std::ops::Range;
use std::sync::Arc;

use super::super::spec::Parent;
use crate::algebra::{block_rows, blocks};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::SharedFactor;
use crate::kernels::Kernels;
use crate::learn::basis::Tick;
use crate::rng::Rng;

/// Entries of a change are at most `s |A| |B|`; where that is above this, one might leave the range of f32.
const LARGEST: f64 = 1e37;

/// One parent, ready to stream.
struct Delta {
    /// (rank, cols), f32.
    a: SharedFactor,
    /// (rows, rank): B transposed, times the scaling.
    b: Vec<f32>,
    /// Bytes beyond the parent's own.
    bytes: usize,
}

/// All parents of one module.
pub(crate) struct Deltas {
    rows: usize,
    cols: usize,
    all: Vec<Delta>,
}

/// Takes a block's rows and each parent's numbers there.
type Each<'a> = dyn FnMut(Range<usize>, &mut [Vec<f32>]) -> Result<()> + 'a;

impl Deltas {
    /// Scales and transposes B, widens A where it is narrow.
    ///
    /// # Errors
    /// Parents whose change may leave the range of f32.
    pub fn new(module: &str, parents: &[Parent<'_>]) -> Result<Self> {
        let (cols, rows) = (parents[0].layer.in_features(), parents[0].layer.out_features());
        let mut all = Vec::with_capacity(parents.len());
        for p in parents {
            let scale = p.layer.exact_scaling();
            let a = if p.layer.a.dtype() == Dtype::F32 {
                Arc::clone(&p.layer.a)
            } else {
                Arc::new(p.layer.a.cast(Dtype::F32))
            };
            let mut b = p.layer.b.to_f32(true);
            let norm = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            if !(scale.abs() * norm(&b) * norm(a.stream()) <= LARGEST) {
                let detail = format!(" in module {module}: the change overflows float32");
                return Err(Error::NonFinite { arg: format!("adapter {:?}", p.name), detail });
            }
            b.iter_mut().for_each(|v| *v = (f64::from(*v) * scale) as f32);
            let own = if Arc::ptr_eq(&a, &p.layer.a) { 0 } else { a.memory_bytes() };
            all.push(Delta { bytes: own + 4 * b.len(), a, b });
        }
        Ok(Deltas { rows, cols, all })
    }

    /// Rows: out_features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: in_features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Entries of one change.
    pub fn entries(&self) -> usize {
        self.rows * self.cols
    }

    /// Parents.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Rows of one parent's A.
    pub fn rank(&self, i: usize) -> usize {
        self.all[i].a.rank()
    }

    /// Bytes beyond the parents' own.
    pub fn bytes(&self) -> usize {
        self.all.iter().map(|d| d.bytes).sum()
    }

    /// Bytes of one block of one parent.
    pub fn block_bytes(&self) -> usize {
        4 * self.cols * block_rows(self.rows, self.cols)
    }

    /// A buffer for one block.
    pub fn buffer(&self) -> Vec<f32> {
        vec![0.0; self.block_bytes() / 4]
    }

    /// The rows from `first` on of parent `i`, as many as `out` holds.
    pub fn tile(&self, k: &Kernels, i: usize, first: usize, out: &mut [f32]) {
        let (d, n) = (&self.all[i], out.len() / self.cols);
        let rank = d.a.rank();
        d.a.combine_batch(k, &d.b[first * rank..(first + n) * rank], out, false);
    }

    /// Streams some parents together: `f` gets the block's rows and each parent's numbers.
    ///
    /// # Errors
    /// Those of `tick`, which is told (rows read, rows in all), and of `f`.
    pub fn stream(
        &self,
        k: &Kernels,
        parents: Range<usize>,
        tick: &mut Tick<'_>,
        f: &mut Each<'_>,
    ) -> Result<()> {
        let mut tiles: Vec<Vec<f32>> = parents.clone().map(|_| self.buffer()).collect();
        for block in blocks(self.rows, self.cols) {
            tick(block.start, self.rows)?;
            for (i, tile) in parents.clone().zip(&mut tiles) {
                tile.truncate(block.len() * self.cols);
                self.tile(k, i, block.start, tile);
            }
            f(block, &mut tiles)?;
        }
        Ok(())
    }

    /// Columns as rows, for [`Deltas::entry`]: A transposed, parent by parent.
    pub fn columns(&self, parents: Range<usize>) -> Vec<Vec<f32>> {
        self.all[parents].iter().map(|d| d.a.to_f32(true)).collect()
    }

    /// One entry of parent `i`, up to rounding; `columns` is its A transposed.
    pub fn entry(&self, i: usize, columns: &[f32], row: usize, col: usize) -> f32 {
        let d = &self.all[i];
        let rank = d.a.rank();
        let (b, a) = (&d.b[row * rank..(row + 1) * rank], &columns[col * rank..(col + 1) * rank]);
        let mut sums = [0.0f32; 4];
        for (b, a) in b.chunks(4).zip(a.chunks(4)) {
            sums.iter_mut().zip(b.iter().zip(a)).for_each(|(s, (b, a))| *s += b * a);
        }
        (sums[0] + sums[2]) + (sums[1] + sums[3])
    }

    /// Rows likely to span what the merge keeps: every A, or `most` random mixes of their rows by size.
    pub fn span(&self, k: &Kernels, most: usize, rng: &mut Rng) -> Vec<f32> {
        let all: usize = self.all.iter().map(|d| d.a.rank()).sum();
        let mut out = Vec::with_capacity(most.min(all) * self.cols);
        if all <= most {
            self.all.iter().for_each(|d| d.a.append_rows(&mut out));
            return out;
        }
        out.resize(most * self.cols, 0.0);
        for d in &self.all {
            let rank = d.a.rank();
            let mut size = vec![0.0f32; rank];
            for b in d.b.chunks_exact(rank) {
                size.iter_mut().zip(b).for_each(|(s, b)| *s += b * b);
            }
            let coef: Vec<f32> =
                (0..most * rank).map(|i| rng.symmetric(1.0) * size[i % rank].sqrt()).collect();
            d.a.combine_batch(k, &coef, &mut out, true);
        }
        out
    }
}
