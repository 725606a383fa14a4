//! A matrix of blocks that is never expanded: rows of blocks, packed for the kernels.

use bytemuck::{Pod, Zeroable};

use super::BlockType;
use crate::error::{Error, Result};
use crate::kernels::{Anatomy, Kernels, Packed, QUANT_ROWS};

/// One cache line; a `Vec` of them is aligned without any `unsafe`.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// `rows` rows of `cols` numbers, quantised along their rows.
///
/// Blocks lie in the order of the [`kernels`](crate::kernels): each is taken apart into its head and its codes, and
/// the codes of some types are put in another order; the bytes of the file come back exactly.
#[derive(Clone, PartialEq)]
pub struct QuantMatrix {
    kind: BlockType,
    rows: usize,
    cols: usize,
    lines: Vec<Line>,
}

impl std::fmt::Debug for QuantMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantMatrix({} x {}, {})", self.rows, self.cols, self.kind)
    }
}

impl QuantMatrix {
    /// From blocks as a file has them: row after row. `arg` is the name that errors carry.
    ///
    /// # Errors
    /// `Shape` when a dimension is zero, the rows are not whole blocks or the bytes not that many; `NonFinite`
    /// for an infinite or NaN scale; `Memory`.
    pub fn from_bytes(kind: BlockType, arg: &str, bytes: &[u8], rows: usize, cols: usize) -> Result<Self> {
        let shape = || format!("({rows}, {cols})");
        let per_row = kind.row_bytes(cols).filter(|_| rows > 0).ok_or_else(|| {
            let want = format!("one row at least of a multiple of {} numbers for {kind}", kind.elements());
            Error::shape(arg, shape(), want)
        })?;
        if per_row.checked_mul(rows) != Some(bytes.len()) {
            let want = match per_row.checked_mul(rows) {
                Some(n) => format!("{n}: {} of {kind}", shape()),
                None => format!("a size that can be addressed, not {}", shape()),
            };
            return Err(Error::shape(arg, format!("{} bytes", bytes.len()), want));
        }
        if let Some(block) = kind.first_non_finite(bytes) {
            let (row, block) = (block / (cols / kind.elements()), block % (cols / kind.elements()));
            let detail = format!(" in the scale of block {block} of row {row}");
            return Err(Error::NonFinite { arg: arg.into(), detail });
        }
        let count = bytes.len().div_ceil(64);
        Error::check_memory(arg, count.checked_mul(64))?;
        let mut matrix = QuantMatrix { kind, rows, cols, lines: vec![Line([0; 8]); count] };
        let to: &mut [u8] = bytemuck::cast_slice_mut(&mut matrix.lines);
        each_piece(kind, rows, cols, |file, packed, n, planes| {
            let (from, to) = (&bytes[file..file + n], &mut to[packed..packed + n]);
            if planes {
                (0..32).for_each(|e| to[plane(e)] = from[e]);
            } else {
                to.copy_from_slice(from);
            }
        });
        Ok(matrix)
    }

    /// Quantises `(rows, cols)` numbers, row-major.
    ///
    /// # Errors
    /// Those of [`quantize_rows`](super::quantize_rows).
    pub fn quantize(kind: BlockType, arg: &str, x: &[f32], rows: usize, cols: usize) -> Result<Self> {
        Self::from_bytes(kind, arg, &super::quantize_rows(kind, arg, x, rows, cols)?, rows, cols)
    }

    /// The blocks as a file has them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; self.stored()];
        let from = self.packed_bytes();
        each_piece(self.kind, self.rows, self.cols, |file, packed, n, planes| {
            let (from, to) = (&from[packed..packed + n], &mut out[file..file + n]);
            if planes {
                (0..32).for_each(|e| to[e] = from[plane(e)]);
            } else {
                to.copy_from_slice(from);
            }
        });
        out
    }

    /// The numbers, row-major, as the definition of the type has them.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        self.kind.dequantize(&self.to_bytes(), &mut out);
        out
    }

    fn stored(&self) -> usize {
        self.rows * (self.cols / self.kind.elements()) * self.kind.block_bytes()
    }

    fn packed_bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.stored()]
    }

    #[inline]
    fn packed(&self) -> Packed<'_> {
        Packed::new(self.kind, self.rows, self.cols, self.packed_bytes())
    }

    /// The type of its blocks.
    pub fn kind(&self) -> BlockType {
        self.kind
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes resident: the blocks, rounded up to a cache line.
    pub fn memory_bytes(&self) -> usize {
        self.lines.len() * 64
    }

    /// Starts fetching a matrix that is needed soon.
    #[inline]
    pub fn prefetch(&self) {
        // The order of bytes is no matter here, only where they are.
        crate::kernels::prefetch_pages::<f32>(bytemuck::cast_slice(&self.lines));
    }

    /// `out[r] = <row r, x>` (`out[r] +=` when `add`).
    #[inline]
    pub fn dots(&self, k: &Kernels, x: &[f32], out: &mut [f32], add: bool) {
        k.quant_dots(self.packed(), x, out, add);
    }

    /// `y (+)= sum_r coef[r] row r`.
    #[inline]
    pub fn combine(&self, k: &Kernels, coef: &[f32], y: &mut [f32], add: bool) {
        k.quant_combine(self.packed(), coef, y, add);
    }

    /// `u (+)= s X W^T`; `x` is `(n, cols)`, `u` is `(n, rows)`.
    pub fn dots_batch(&self, k: &Kernels, x: &[f32], u: &mut [f32], s: f32, add: bool) {
        k.quant_dots_batch(self.packed(), x, u, s, add);
    }

    /// `y (+)= u W`; `u` is `(n, rows)`, `y` is `(n, cols)`.
    pub fn combine_batch(&self, k: &Kernels, u: &[f32], y: &mut [f32], add: bool) {
        k.quant_combine_batch(self.packed(), u, y, add);
    }
}

/// Where the code of element `e` lies among 32 codes in planes.
#[inline(always)]
const fn plane(e: usize) -> usize {
    4 * (e % 8) + e / 8
}

/// Visits heads and codes of all blocks as `(position in the file, position in memory, bytes, in planes)`.
fn each_piece(kind: BlockType, rows: usize, cols: usize, mut f: impl FnMut(usize, usize, usize, bool)) {
    let (Anatomy { head_at, head, codes, planes }, size) = (Anatomy::of(kind), kind.block_bytes());
    let codes_at = if head_at == 0 { head } else { 0 };
    let blocks = cols / kind.elements();
    for first in (0..rows).step_by(QUANT_ROWS) {
        let height = (rows - first).min(QUANT_ROWS);
        for block in 0..blocks {
            let base = (first * blocks + block * height) * size;
            for r in 0..height {
                let file = ((first + r) * blocks + block) * size;
                f(file + head_at, base + r * head, head, false);
                f(file + codes_at, base + height * head + r * codes, codes, planes);
            }
        }
    }
}
