//! Matrices that are too large to be there at once: read in blocks of rows, as often as needed.

use std::ops::Range;

use crate::error::Result;

/// Numbers in a block: a few of them stay in the second-level cache.
const BLOCK: usize = 48 << 10;
/// Rows that the batch kernels take at once.
const STEP: usize = 6;
/// More rows than this gain nothing.
const MOST: usize = 96;

/// A matrix (rows = out_features, cols = in_features) that can be read in blocks of rows, any number of times.
pub trait Tiles {
    /// Rows: out_features.
    fn rows(&self) -> usize;

    /// Columns: in_features.
    fn cols(&self) -> usize;

    /// Writes the rows from `first` on, as many as `out` holds, row-major.
    ///
    /// Readers ask for the blocks of [`blocks`]; each block must come with the same bits every time.
    ///
    /// # Errors
    /// What the source of the numbers runs into.
    fn tile(&mut self, first: usize, out: &mut [f32]) -> Result<()>;
}

/// A matrix that is in memory.
#[derive(Clone, Copy, Debug)]
pub struct Dense<'a> {
    data: &'a [f32],
    cols: usize,
}

impl<'a> Dense<'a> {
    /// Row-major numbers.
    ///
    /// # Panics
    /// When the length is no multiple of `cols`.
    pub fn new(data: &'a [f32], cols: usize) -> Self {
        assert!(cols > 0 && data.len().is_multiple_of(cols), "{} numbers in rows of {cols}", data.len());
        Dense { data, cols }
    }
}

impl Tiles for Dense<'_> {
    fn rows(&self) -> usize {
        self.data.len() / self.cols
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn tile(&mut self, first: usize, out: &mut [f32]) -> Result<()> {
        out.copy_from_slice(&self.data[first * self.cols..][..out.len()]);
        Ok(())
    }
}

/// Rows of one block of a matrix of this shape; the last block may be lower.
pub fn block_rows(rows: usize, cols: usize) -> usize {
    let fit = (BLOCK / cols.max(1)).clamp(STEP, MOST);
    (fit / STEP * STEP).min(rows.max(1))
}

/// The blocks that a matrix is read in, top to bottom. One partition for every pass, so that a number that is
/// computed twice has the same bits both times.
pub fn blocks(rows: usize, cols: usize) -> impl Iterator<Item = Range<usize>> {
    let height = block_rows(rows, cols);
    (0..rows).step_by(height).map(move |first| first..(first + height).min(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_row_once_and_stay_small() {
        for rows in [1, 5, 6, 7, 96, 97, 1000] {
            for cols in [1, 16, 768, 4096, 30_000] {
                let all: Vec<_> = blocks(rows, cols).collect();
                assert_eq!(all[0].start, 0);
                assert_eq!(all.last().map(|b| b.end), Some(rows));
                assert!(
                    all.windows(2).all(|w| w[0].end == w[1].start && w[0].len() == block_rows(rows, cols))
                );
                assert!(block_rows(rows, cols) * cols <= BLOCK.max(STEP * cols));
            }
        }
    }
}
