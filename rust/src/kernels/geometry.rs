//! How a factor lies in memory, and the pieces that all bodies share.
//!
//! A factor of `rank` rows and `len` columns lies as one linear stream: groups of up to [`GROUP`] rows;
//! in a group, tiles of [`TILE`] columns; in a tile, its rows one after another, zero-padded at the end of
//! a row. So `x` (or `y`) is touched once per group, and a cold adapter is read front to back.

use super::vector::{Element, Vector};
use super::{GROUP, TILE};

/// Rank and row length of a factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Rows.
    pub rank: usize,
    /// Columns.
    pub len: usize,
}

impl Geometry {
    /// Tiles in a row, the last one perhaps partly padding.
    pub const fn tiles(self) -> usize {
        self.len.div_ceil(TILE)
    }

    /// Stored elements, padding included.
    pub const fn stored(self) -> usize {
        self.rank * self.tiles() * TILE
    }

    /// Start and height of the group that holds `row`.
    #[inline(always)]
    pub(super) const fn group(self, row: usize) -> (usize, usize) {
        let first = row - row % GROUP;
        let left = self.rank - first;
        (first * self.tiles() * TILE, if left < GROUP { left } else { GROUP })
    }

    /// Position of the 16 columns of `tile` in `row`.
    #[inline(always)]
    pub const fn at(self, row: usize, tile: usize) -> usize {
        let (start, height) = self.group(row);
        start + (tile * height + row % GROUP) * TILE
    }

    /// Columns in the last, partial tile; 0 when every tile is full.
    #[inline(always)]
    pub(super) const fn rest(self) -> usize {
        self.len % TILE
    }
}

/// Bytes between the prefetch and the load: about one page and a half, so that the next page's translation
/// is under way in time. Measured on cold adapters: 4 to 6 KiB is best, for f16 most of all.
pub(super) const AHEAD: usize = 6144;

/// Factors from this size on are read with prefetches; smaller ones live in L1 when they are warm.
pub(super) const PREFETCH_FROM: usize = 24 << 10;

/// Whether a factor is long enough for prefetches to pay.
#[inline(always)]
pub(super) fn is_long<E>(g: Geometry) -> bool {
    g.stored() * size_of::<E>() >= PREFETCH_FROM
}

/// Asks for the lines that lie [`AHEAD`] of a tile of `H` rows.
#[inline(always)]
pub(super) unsafe fn prefetch_tile<V: Vector, E: Element, const H: usize>(w: *const E) {
    let bytes = H * TILE * size_of::<E>();
    let mut line = 0;
    while line < bytes {
        // SAFETY: a prefetch reads nothing and never faults; the address is formed by wrapping arithmetic.
        unsafe { V::prefetch(w.cast::<u8>().wrapping_add(AHEAD + line)) };
        line += 64;
    }
}

/// The first `n` elements at `x`, padded with zeros to a tile on the stack.
#[inline(always)]
pub(super) unsafe fn padded(x: *const f32, n: usize) -> [f32; TILE] {
    let mut tile = [0.0f32; TILE];
    for (i, t) in tile.iter_mut().enumerate().take(n) {
        // SAFETY: the caller gives n readable elements.
        *t = unsafe { *x.add(i) };
    }
    tile
}

/// Writes the first `n` elements of a stack tile back.
#[inline(always)]
pub(super) unsafe fn unpad(tile: &[f32; TILE], y: *mut f32, n: usize) {
    for (i, t) in tile.iter().enumerate().take(n) {
        // SAFETY: the caller gives n writable elements.
        unsafe { *y.add(i) = *t };
    }
}

/// Calls `$f` with the group's height as a constant.
macro_rules! with_height {
    ($h:expr, $f:ident :: <$($g:ty),*> ( $($a:expr),* )) => {
        match $h {
            8 => $f::<$($g),*, 8>($($a),*),
            7 => $f::<$($g),*, 7>($($a),*),
            6 => $f::<$($g),*, 6>($($a),*),
            5 => $f::<$($g),*, 5>($($a),*),
            4 => $f::<$($g),*, 4>($($a),*),
            3 => $f::<$($g),*, 3>($($a),*),
            2 => $f::<$($g),*, 2>($($a),*),
            _ => $f::<$($g),*, 1>($($a),*),
        }
    };
}
pub(super) use with_height;
