//! Bodies over blocks for several rows of x: a stretch of some rows is taken apart once, into a buffer that stays
//! in L1, for many rows of x.

use std::mem::MaybeUninit;

use super::TILE;
use super::batch::{Partial, Stretch, WAITING, dots_block};
use super::quant::ROWS;
use super::quant_blocks::{Block, SPAN, Scales};
use super::quant_single::{Run, put};
use super::vector::Vector;

/// Rows and columns that a batch takes apart at once: 16 KiB of f32. Columns are whole blocks of every type.
const SLAB: usize = WAITING;
const STRETCH: usize = 256;
/// Rows of x that share what was taken apart; with a stretch of columns they fit in L2.
const BATCH: usize = 24;

/// Takes the columns `[from, from + n)` of a group of `height` rows apart: tiles of 16 columns, each with `stride`
/// rows one after another, of which these are the first.
///
/// # Safety
/// `base` is a group, the columns are whole blocks of it, `to` has room for them; the ISA of `V` is present.
#[inline(always)]
pub(super) unsafe fn take_apart<V: Vector, B: Block>(
    base: *const u8,
    height: usize,
    [from, n]: [usize; 2],
    to: *mut f32,
    stride: usize,
) {
    let (vectors, halves) = (SPAN / V::W, if B::HALVES { 2 } else { 1 });
    // SAFETY: the caller gives a group, columns of it that are whole blocks, and room for them.
    unsafe {
        for r in 0..height {
            let run = Run::new::<B>(base, height, r, from + n);
            for block in from / B::ELEMENTS..run.blocks {
                let codes = run.codes(block);
                let [head] = run.one_head::<V, B>(block);
                for unit in 0..B::ELEMENTS / (SPAN * B::TOGETHER) {
                    for s in 0..B::TOGETHER {
                        let span = unit * B::TOGETHER + s;
                        let codes = B::span::<V>(codes, unit, s);
                        let at = block * B::ELEMENTS + span * SPAN - from;
                        for i in 0..vectors {
                            let column = at + i * V::W;
                            let scale = V::splat(head.scale(span, i * halves / vectors));
                            // Two roundings, as the definition of the type has them.
                            let mut v = B::vector::<V>(codes, i).mul(scale);
                            if B::Head::OFFSETS {
                                v = v.add(V::splat(head.offset(span)));
                            }
                            v.store(to.add((column / TILE * stride + r) * TILE + column % TILE));
                        }
                    }
                }
            }
        }
    }
}

/// `u[m] (+)= s <rows, x_m>` of one stretch for `M` rows of x; `u` rows lie `ldu` apart.
#[inline(always)]
unsafe fn dots_apart<V: Vector, const M: usize>(
    tiles: *const f32,
    height: usize,
    xs: Stretch,
    (u, ldu): (*mut f32, usize),
    s: f32,
    add: bool,
) {
    // SAFETY: the caller gives a stretch of `height` rows taken apart, M rows of x, `height` columns of M rows of u;
    // every sum is written before it is read.
    unsafe {
        let mut sums: Partial<V, M> = [[MaybeUninit::uninit(); SLAB]; M];
        let (stride, mut r) = (height * TILE, 0);
        while r + 4 <= height {
            dots_block::<V, f32, M, 4, false>(tiles.add(r * TILE), stride, xs, &mut sums, r, true);
            r += 4;
        }
        while r < height {
            dots_block::<V, f32, M, 1, false>(tiles.add(r * TILE), stride, xs, &mut sums, r, true);
            r += 1;
        }
        for (m, sums) in sums.iter().enumerate() {
            let mut out = [0.0; SLAB];
            V::sums(sums.as_ptr().cast(), height, out.as_mut_ptr());
            put(&out[..height], u.add(m * ldu), s, add);
        }
    }
}

/// `y_m (+)= sum_r u[m][r] row r` for the columns of two tiles of a stretch and `M` rows.
#[inline(always)]
unsafe fn combine_apart<V: Vector, const M: usize>(
    tiles: *const f32,
    height: usize,
    (u, ldu): (*const f32, usize),
    (y, ldy): (*mut f32, usize),
    add: bool,
) {
    let (vectors, per) = (2 * TILE / V::W, TILE / V::W);
    // SAFETY: the caller gives two tiles of `height` rows, M rows of `height` u and of 32 columns of y.
    unsafe {
        let mut acc = [[V::splat(0.0); 4]; M];
        if add {
            for (m, acc) in acc.iter_mut().enumerate() {
                for i in 0..vectors {
                    acc[i] = V::load(y.add(m * ldy + i * V::W));
                }
            }
        }
        for r in 0..height {
            let mut w = [V::splat(0.0); 4];
            for i in 0..vectors {
                w[i] = V::load(tiles.add((i / per * height + r) * TILE + i % per * V::W));
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let c = V::splat(*u.add(m * ldu + r));
                for i in 0..vectors {
                    acc[i] = w[i].fma(c, acc[i]);
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            for i in 0..vectors {
                acc[i].store(y.add(m * ldy + i * V::W));
            }
        }
    }
}

/// `y_m (+)= sum_r u[m][r] row r` for a stretch and `M` rows.
#[inline(always)]
unsafe fn combine_stretch<V: Vector, const M: usize>(
    tiles: *const f32,
    [height, width]: [usize; 2],
    u: Rows<*const f32>,
    (y, ldy): Rows<*mut f32>,
    add: bool,
) {
    for t in (0..width / TILE).step_by(2) {
        // SAFETY: two tiles of the stretch.
        unsafe { combine_apart::<V, M>(tiles.add(t * height * TILE), height, u, (y.add(t * TILE), ldy), add) }
    }
}

/// Calls `$f` with the number of rows as a constant: as many as the registers of the ISA allow, six at most.
macro_rules! in_blocks {
    ($n:expr, $m:ident => $f:ident :: <$v:ty> ( $($a:expr),* )) => {
        let most = if <$v>::W == TILE { 6 } else { 3 };
        let mut $m = 0;
        while $m < $n {
            let left = ($n - $m).min(most);
            match left {
                1 => $f::<$v, 1>($($a),*),
                2 => $f::<$v, 2>($($a),*),
                3..=5 => $f::<$v, 3>($($a),*),
                _ => $f::<$v, 6>($($a),*),
            }
            $m += if left == 4 || left == 5 { 3 } else { left };
        }
    };
}

/// Rows of one matrix: where they start and how far they lie apart.
pub(super) type Rows<P> = (P, usize);

/// `u[m] (+)= s <rows, x_m>` of one stretch of `width` columns and `n` rows of x.
///
/// # Safety
/// `tiles` is a stretch of `height` rows taken apart, `x` and `u` have `n` rows of `width` and `height`; the ISA
/// of `V` is present.
#[inline(always)]
pub(super) unsafe fn dots<V: Vector>(
    tiles: *const f32,
    [height, width, n]: [usize; 3],
    (x, ldx): Rows<*const f32>,
    (u, ldu): Rows<*mut f32>,
    s: f32,
    add: bool,
) {
    // SAFETY: rows m of n.
    unsafe {
        in_blocks!(n, m => dots_apart::<V>(
            tiles,
            height,
            Stretch { x: x.add(m * ldx), ldx, tiles: width / TILE },
            (u.add(m * ldu), ldu),
            s,
            add
        ));
    }
}

/// `y_m (+)= sum_r u[m][r] row r` of one stretch of `width` columns and `n` rows.
///
/// # Safety
/// As [`dots`], with `height` columns of `u` and `width` of `y`.
#[inline(always)]
pub(super) unsafe fn combine<V: Vector>(
    tiles: *const f32,
    [height, width, n]: [usize; 3],
    (u, ldu): Rows<*const f32>,
    (y, ldy): Rows<*mut f32>,
    add: bool,
) {
    // SAFETY: rows m of n; two tiles of the stretch at a time, whose width is whole spans.
    unsafe {
        in_blocks!(n, m => combine_stretch::<V>(tiles, [height, width], (u.add(m * ldu), ldu), (y.add(m * ldy), ldy), add));
    }
}

type DotsApart = unsafe fn(*const f32, [usize; 3], Rows<*const f32>, Rows<*mut f32>, f32, bool);
type CombineApart = unsafe fn(*const f32, [usize; 3], Rows<*const f32>, Rows<*mut f32>, bool);

/// What one ISA does with a stretch that was taken apart.
pub(super) struct Apart {
    pub dots: DotsApart,
    pub combine: CombineApart,
}

/// A packed matrix with the bodies of one ISA for its type.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub w: *const u8,
    pub rows: usize,
    pub cols: usize,
    /// Bytes of a row.
    pub per_row: usize,
    pub take_apart: TakeApart,
    pub apart: &'a Apart,
}

/// The base of a group, its rows, the first column and the number of columns, where to, and the rows of a tile.
pub(super) type TakeApart = unsafe fn(*const u8, usize, [usize; 2], *mut f32, usize);

impl Job<'_> {
    /// Takes `width` columns of `height` rows from `first` on apart, which is the first row of a group.
    unsafe fn take(&self, [first, height]: [usize; 2], columns: [usize; 2], to: &mut [f32; SLAB * STRETCH]) {
        for r in (0..height).step_by(ROWS) {
            // SAFETY: a group's first row lies in the matrix; a slab is as large as the buffer.
            unsafe {
                let (base, to) = (self.w.add((first + r) * self.per_row), to.as_mut_ptr().add(r * TILE));
                (self.take_apart)(base, (height - r).min(ROWS), columns, to, height);
            }
        }
    }

    /// `u = s X w^T` (`u +=` when `add`) for `n` rows of X; `u` is `(n, rows)`.
    ///
    /// # Safety
    /// `w` is a packed matrix, `x` and `u` have `n` rows; the ISA of the bodies is present.
    pub unsafe fn dots_batch(self, x: *const f32, n: usize, u: *mut f32, s: f32, add: bool) {
        let mut apart = [0.0f32; SLAB * STRETCH];
        let (rows, cols) = (self.rows, self.cols);
        for from in (0..n).step_by(BATCH) {
            let n = (n - from).min(BATCH);
            for first in (0..rows).step_by(SLAB) {
                let height = (rows - first).min(SLAB);
                for column in (0..cols).step_by(STRETCH) {
                    let width = (cols - column).min(STRETCH);
                    // SAFETY: rows from .. from + n of x and u; a stretch of whole blocks.
                    unsafe {
                        self.take([first, height], [column, width], &mut apart);
                        let (x, u) = (x.add(from * cols + column), u.add(from * rows + first));
                        let shape = [height, width, n];
                        (self.apart.dots)(apart.as_ptr(), shape, (x, cols), (u, rows), s, add || column > 0);
                    }
                }
            }
        }
    }

    /// `Y = u w` (`Y +=` when `add`) for `n` rows; `u` is `(n, rows)`, `y` is `(n, cols)`.
    ///
    /// # Safety
    /// As [`Job::dots_batch`].
    pub unsafe fn combine_batch(self, u: *const f32, n: usize, y: *mut f32, add: bool) {
        let mut apart = [0.0f32; SLAB * STRETCH];
        let (rows, cols) = (self.rows, self.cols);
        for from in (0..n).step_by(BATCH) {
            let n = (n - from).min(BATCH);
            for column in (0..cols).step_by(STRETCH) {
                let width = (cols - column).min(STRETCH);
                for first in (0..rows).step_by(SLAB) {
                    let height = (rows - first).min(SLAB);
                    // SAFETY: rows from .. from + n of u and y; a stretch of whole blocks.
                    unsafe {
                        self.take([first, height], [column, width], &mut apart);
                        let (u, y) = (u.add(from * rows + first), y.add(from * cols + column));
                        let shape = [height, width, n];
                        (self.apart.combine)(apart.as_ptr(), shape, (u, rows), (y, cols), add || first > 0);
                    }
                }
            }
        }
    }
}
