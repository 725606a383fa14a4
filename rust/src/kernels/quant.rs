//! Blocks of quantised numbers: the matrix that the kernels take, and the table of their bodies.
//!
//! A matrix of `rows` rows of blocks lies as one stream: groups of up to [`ROWS`] rows; in a group, columns of
//! blocks; in a column the heads of its rows, then their codes. It is never a matrix of f32 in memory.

use super::quant_batch::{Apart, Job, TakeApart};
use super::{Kernels, need};
use crate::quant::BlockType;

pub use super::quant_blocks::Anatomy;

/// Rows of a group.
pub const ROWS: usize = 4;

type Dots = unsafe fn(*const u8, [usize; 2], *const f32, *mut f32, bool);
/// Bodies over blocks of one type.
pub(super) struct OverBlocks {
    pub dots: Dots,
    pub combine: Dots,
    pub take_apart: TakeApart,
}

/// Bodies of one ISA.
pub(super) struct Quant {
    /// One per type, in the order of the enum.
    pub over: [OverBlocks; 6],
    pub apart: Apart,
}

/// One ISA's instantiations, as `QUANT`.
macro_rules! quant_table {
    (@type $name:ident, $b:ident, $v:ty, $(#[$attr:meta])*) => {
        mod $name {
            use super::super::*;
            use $crate::kernels::quant::OverBlocks;
            use $crate::kernels::quant_blocks::$b;
            use $crate::kernels::{quant_batch, quant_single};

            $(#[$attr])*
            unsafe fn dots(w: *const u8, shape: [usize; 2], x: *const f32, out: *mut f32, add: bool) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant_single::dots::<$v, $b>(w, shape, x, out, add) }
            }
            $(#[$attr])*
            unsafe fn combine(w: *const u8, shape: [usize; 2], c: *const f32, y: *mut f32, add: bool) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant_single::combine::<$v, $b>(w, shape, c, y, add) }
            }
            $(#[$attr])*
            unsafe fn take_apart(
                base: *const u8, height: usize, columns: [usize; 2], to: *mut f32, stride: usize,
            ) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant_batch::take_apart::<$v, $b>(base, height, columns, to, stride) }
            }

            pub(super) const OVER: OverBlocks = OverBlocks { dots, combine, take_apart };
        }
    };
    ($v:ty, $(#[$attr:meta])*) => {
        mod quantised {
            use super::*;
            use $crate::kernels::quant::{Quant, quant_table};
            use $crate::kernels::quant_batch::{self, Apart, Rows};

            quant_table!(@type q8_0, Q8_0, $v, $(#[$attr])*);
            quant_table!(@type q6_k, Q6K, $v, $(#[$attr])*);
            quant_table!(@type q5_k, Q5K, $v, $(#[$attr])*);
            quant_table!(@type q4_k, Q4K, $v, $(#[$attr])*);
            quant_table!(@type q4_1, Q4_1, $v, $(#[$attr])*);
            quant_table!(@type q4_0, Q4_0, $v, $(#[$attr])*);

            $(#[$attr])*
            unsafe fn dots(
                t: *const f32, shape: [usize; 3], x: Rows<*const f32>, u: Rows<*mut f32>, s: f32, add: bool,
            ) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant_batch::dots::<$v>(t, shape, x, u, s, add) }
            }
            $(#[$attr])*
            unsafe fn combine(
                t: *const f32, shape: [usize; 3], u: Rows<*const f32>, y: Rows<*mut f32>, add: bool,
            ) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant_batch::combine::<$v>(t, shape, u, y, add) }
            }

            pub(super) const QUANT: Quant = Quant {
                over: [q8_0::OVER, q6_k::OVER, q5_k::OVER, q4_k::OVER, q4_1::OVER, q4_0::OVER],
                apart: Apart { dots, combine },
            };
        }
    };
}
pub(super) use quant_table;

/// A packed matrix as the kernels take it.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    kind: BlockType,
    shape: [usize; 2],
    bytes: &'a [u8],
}

impl<'a> Packed<'a> {
    /// `rows` rows of `cols` numbers.
    ///
    /// # Panics
    /// When the bytes are not that many, or `cols` is not whole blocks.
    #[inline]
    pub fn new(kind: BlockType, rows: usize, cols: usize, bytes: &'a [u8]) -> Self {
        let anatomy = Anatomy::of(kind);
        assert!(cols.is_multiple_of(kind.elements()));
        need("packed", bytes.len(), rows * (cols / kind.elements()) * (anatomy.head + anatomy.codes));
        Packed { kind, shape: [rows, cols], bytes }
    }
}

impl Kernels {
    /// `out[r] = <row r of w, x>` (`out[r] +=` when `add`).
    #[inline]
    pub fn quant_dots(&self, w: Packed<'_>, x: &[f32], out: &mut [f32], add: bool) {
        need("quant_dots x", x.len(), w.shape[1]);
        need("quant_dots out", out.len(), w.shape[0]);
        let over = &self.quant.over[w.kind as usize];
        // SAFETY: lengths checked here and by `Packed`; the table exists only where its ISA does. So below.
        unsafe { (over.dots)(w.bytes.as_ptr(), w.shape, x.as_ptr(), out.as_mut_ptr(), add) }
    }

    /// `y = sum_r coef[r] row r` (`y +=` when `add`).
    #[inline]
    pub fn quant_combine(&self, w: Packed<'_>, coef: &[f32], y: &mut [f32], add: bool) {
        need("quant_combine coef", coef.len(), w.shape[0]);
        need("quant_combine y", y.len(), w.shape[1]);
        let over = &self.quant.over[w.kind as usize];
        // SAFETY: as above.
        unsafe { (over.combine)(w.bytes.as_ptr(), w.shape, coef.as_ptr(), y.as_mut_ptr(), add) }
    }

    /// `u = s X w^T` (`u +=` when `add`); `x` is `(n, cols)`, `u` is `(n, rows)`.
    #[inline]
    pub fn quant_dots_batch(&self, w: Packed<'_>, x: &[f32], u: &mut [f32], s: f32, add: bool) {
        let n = u.len() / w.shape[0];
        need("quant_dots_batch u", u.len(), n * w.shape[0]);
        need("quant_dots_batch x", x.len(), n * w.shape[1]);
        // SAFETY: as above.
        unsafe { self.job(w).dots_batch(x.as_ptr(), n, u.as_mut_ptr(), s, add) }
    }

    /// `Y = u w` (`Y +=` when `add`); `u` is `(n, rows)`, `y` is `(n, cols)`.
    #[inline]
    pub fn quant_combine_batch(&self, w: Packed<'_>, u: &[f32], y: &mut [f32], add: bool) {
        let n = u.len() / w.shape[0];
        need("quant_combine_batch u", u.len(), n * w.shape[0]);
        need("quant_combine_batch y", y.len(), n * w.shape[1]);
        // SAFETY: as above.
        unsafe { self.job(w).combine_batch(u.as_ptr(), n, y.as_mut_ptr(), add) }
    }

    fn job(&self, w: Packed<'_>) -> Job<'_> {
        let [rows, cols] = w.shape;
        let take_apart = self.quant.over[w.kind as usize].take_apart;
        Job {
            w: w.bytes.as_ptr(),
            rows,
            cols,
            per_row: w.bytes.len() / rows,
            take_apart,
            apart: &self.quant.apart,
        }
    }
}
