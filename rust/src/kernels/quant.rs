//! Bodies over blocks of quantised numbers: codes become f32 in registers, never a matrix in memory.
//!
//! A matrix of `rows` rows of blocks lies as one stream: groups of up to [`ROWS`] rows; in a group, columns of
//! blocks; in a column the heads of its rows, then their codes. Batches take a stretch of a group apart once,
//! into a buffer that stays in L1, for many rows of x.

use std::mem::MaybeUninit;

use super::batch::{Partial, Stretch, dots_block};
use super::quant_blocks::{Block, SPAN, Scales};
use super::vector::Vector;
use super::{Kernels, TILE, need};
use crate::quant::BlockType;

pub use super::quant_blocks::Anatomy;

/// Rows of a group.
pub const ROWS: usize = 4;
/// Columns that a batch takes apart at once: 8 KiB of f32 per group.
const STRETCH: usize = 512;
/// Rows of x that share what was taken apart; with a stretch of columns they fit in L2.
const BATCH: usize = 24;
/// Bytes between the prefetch and the load, and from which size on there are prefetches at all.
const AHEAD: usize = 2048;
const PREFETCH_FROM: usize = 24 << 10;

/// Where the rows of one pass lie: `R` of a group of `height`.
#[derive(Clone, Copy)]
struct Run {
    heads: *const u8,
    codes: *const u8,
    /// Bytes from one column of blocks to the next.
    step: usize,
    /// Columns of blocks.
    blocks: usize,
    prefetch: bool,
}

impl Run {
    /// Rows from `r` on of the group of `height` at `base`.
    #[inline(always)]
    unsafe fn new<B: Block>(base: *const u8, height: usize, r: usize, cols: usize, prefetch: bool) -> Self {
        // SAFETY: the caller gives a whole group; r < height.
        let (heads, codes) = unsafe { (base.add(r * B::HEAD), base.add(height * B::HEAD + r * B::CODES)) };
        let step = height * (B::HEAD + B::CODES);
        Run { heads, codes, step, blocks: cols / B::ELEMENTS, prefetch }
    }

    /// Heads and codes of one column of blocks.
    #[inline(always)]
    unsafe fn at<V: Vector>(self, block: usize) -> (*const u8, *const u8) {
        let at = block * self.step;
        // SAFETY: block < blocks; a prefetch never faults and its address wraps.
        unsafe {
            if self.prefetch {
                let mut line = 0;
                while line < self.step {
                    V::prefetch(self.heads.wrapping_add(at + AHEAD + line));
                    line += 64;
                }
            }
            (self.heads.add(at), self.codes.add(at))
        }
    }
}

/// Rows of a matrix in passes of [`ROWS`] or of one, each with its run and its first row.
macro_rules! passes {
    ($B:ident, $w:expr, $rows:expr, $cols:expr, ($run:ident, $row:ident) => $four:expr, $one:expr) => {{
        let per_row = $cols / $B::ELEMENTS * ($B::HEAD + $B::CODES);
        let prefetch = $rows * per_row >= PREFETCH_FROM;
        let mut first = 0;
        while first < $rows {
            let height = ($rows - first).min(ROWS);
            let base = $w.add(first * per_row);
            if height == ROWS {
                let ($run, $row) = (Run::new::<$B>(base, height, 0, $cols, prefetch), first);
                $four;
            } else {
                for r in 0..height {
                    let ($run, $row) = (Run::new::<$B>(base, height, r, $cols, false), first + r);
                    $one;
                }
            }
            first += height;
        }
    }};
}

/// `<row r, x>` of `R` rows.
#[inline(always)]
unsafe fn dots_run<V: Vector, B: Block, const R: usize>(run: Run, x: *const f32) -> [f32; R] {
    let (vectors, halves) = (SPAN / V::W, if B::HALVES { 2 } else { 1 });
    // SAFETY: the caller gives a run of R rows and as many x as it has columns.
    unsafe {
        let mut acc = [V::splat(0.0); R];
        for block in 0..run.blocks {
            let (heads, codes) = run.at::<V>(block);
            let heads = B::heads::<V, R>(heads, &[1.0; R]);
            for unit in 0..B::ELEMENTS / (SPAN * B::TOGETHER) {
                for s in 0..B::TOGETHER {
                    let span = unit * B::TOGETHER + s;
                    let x = x.add(block * B::ELEMENTS + span * SPAN);
                    let mut xv = [V::splat(0.0); 4];
                    for i in 0..vectors {
                        xv[i] = V::load(x.add(i * V::W));
                    }
                    let mut total = xv[0];
                    if B::Head::OFFSETS {
                        for i in 1..vectors {
                            total = total.add(xv[i]);
                        }
                    }
                    for r in 0..R {
                        let span_codes = B::span::<V>(codes.add(r * B::CODES), unit, s);
                        for half in 0..halves {
                            let (from, n) = (half * vectors / halves, vectors / halves);
                            let mut part = B::vector::<V>(span_codes, from).mul(xv[from]);
                            for i in from + 1..from + n {
                                part = B::vector::<V>(span_codes, i).fma(xv[i], part);
                            }
                            acc[r] = part.fma(V::splat(heads[r].scale(span, half)), acc[r]);
                        }
                        if B::Head::OFFSETS {
                            acc[r] = total.fma(V::splat(heads[r].offset(span)), acc[r]);
                        }
                    }
                }
            }
        }
        let mut out = [0.0; R];
        V::sums(acc.as_ptr(), R, out.as_mut_ptr());
        out
    }
}

#[inline(always)]
unsafe fn put(sums: &[f32], out: *mut f32, s: f32, add: bool) {
    for (r, v) in sums.iter().enumerate() {
        // SAFETY: the caller gives as many writable elements of out as there are sums.
        unsafe { *out.add(r) = if add { *out.add(r) + s * v } else { s * v } };
    }
}

/// `out[r] = <row r, x>` (`out[r] +=` when `add`).
///
/// # Safety
/// `w` holds a packed matrix of `rows` rows of `cols`, `x` `cols`, `out` `rows` writable; the ISA of `V` is present.
#[inline(always)]
pub(super) unsafe fn dots<V: Vector, B: Block>(
    w: *const u8,
    [rows, cols]: [usize; 2],
    x: *const f32,
    out: *mut f32,
    add: bool,
) {
    // SAFETY: a run lies in w, its rows from `row` on in out.
    unsafe {
        passes!(
            B,
            w,
            rows,
            cols,
            (run, row) => put(&dots_run::<V, B, ROWS>(run, x), out.add(row), 1.0, add),
            put(&dots_run::<V, B, 1>(run, x), out.add(row), 1.0, add)
        );
    }
}

/// `y (+)= sum_r coef[r] row r` over `R` rows.
#[inline(always)]
unsafe fn combine_run<V: Vector, B: Block, const R: usize>(
    run: Run,
    coef: *const f32,
    y: *mut f32,
    add: bool,
) {
    let (vectors, halves) = (SPAN / V::W, if B::HALVES { 2 } else { 1 });
    // SAFETY: the caller gives a run of R rows, R elements of coef and as many y as the run has columns.
    unsafe {
        let coef: [f32; R] = coef.cast::<[f32; R]>().read_unaligned();
        for block in 0..run.blocks {
            let (heads, codes) = run.at::<V>(block);
            let heads = B::heads::<V, R>(heads, &coef);
            for unit in 0..B::ELEMENTS / (SPAN * B::TOGETHER) {
                for s in 0..B::TOGETHER {
                    let span = unit * B::TOGETHER + s;
                    let y = y.add(block * B::ELEMENTS + span * SPAN);
                    let mut offset = 0.0;
                    for head in &heads {
                        offset += head.offset(span);
                    }
                    let mut acc = [V::splat(offset); 4];
                    for i in 0..if add { vectors } else { 0 } {
                        let before = V::load(y.add(i * V::W));
                        acc[i] = if B::Head::OFFSETS { before.add(acc[i]) } else { before };
                    }
                    for r in 0..R {
                        let span_codes = B::span::<V>(codes.add(r * B::CODES), unit, s);
                        for i in 0..vectors {
                            let scale = V::splat(heads[r].scale(span, i * halves / vectors));
                            acc[i] = B::vector::<V>(span_codes, i).fma(scale, acc[i]);
                        }
                    }
                    for i in 0..vectors {
                        acc[i].store(y.add(i * V::W));
                    }
                }
            }
        }
    }
}

/// `y = sum_r coef[r] row r` (`y +=` when `add`).
///
/// # Safety
/// As [`dots`], with `rows` elements of `coef` and `cols` writable ones of `y`.
#[inline(always)]
pub(super) unsafe fn combine<V: Vector, B: Block>(
    w: *const u8,
    [rows, cols]: [usize; 2],
    coef: *const f32,
    y: *mut f32,
    add: bool,
) {
    // SAFETY: a run lies in w, its rows from `row` on in coef; y is read only once it was written, or to add.
    unsafe {
        passes!(
            B,
            w,
            rows,
            cols,
            (run, row) => combine_run::<V, B, ROWS>(run, coef.add(row), y, add || row > 0),
            combine_run::<V, B, 1>(run, coef.add(row), y, add || row > 0)
        );
    }
}

/// What a batch takes apart at once: tiles of 16 columns, each with the rows of its group one after another.
type Apart = [MaybeUninit<f32>; ROWS * STRETCH];

/// Takes the columns `[from, from + n)` of a group of `height` rows apart; gives the tiles.
#[inline(always)]
unsafe fn take_apart<V: Vector, B: Block>(
    base: *const u8,
    height: usize,
    [from, n]: [usize; 2],
    to: &mut Apart,
) -> *const f32 {
    let to: *mut f32 = to.as_mut_ptr().cast();
    let (vectors, halves) = (SPAN / V::W, if B::HALVES { 2 } else { 1 });
    // SAFETY: the caller gives a group and columns of it that are whole blocks, at most STRETCH.
    unsafe {
        for r in 0..height {
            let run = Run::new::<B>(base, height, r, n, false);
            for block in 0..run.blocks {
                let (heads, codes) = run.at::<V>(from / B::ELEMENTS + block);
                let [head] = B::heads::<V, 1>(heads, &[1.0]);
                for unit in 0..B::ELEMENTS / (SPAN * B::TOGETHER) {
                    for s in 0..B::TOGETHER {
                        let span = unit * B::TOGETHER + s;
                        let codes = B::span::<V>(codes, unit, s);
                        let at = block * B::ELEMENTS + span * SPAN;
                        for i in 0..vectors {
                            let column = at + i * V::W;
                            let scale = V::splat(head.scale(span, i * halves / vectors));
                            // Two roundings, as the definition of the type has them.
                            let mut v = B::vector::<V>(codes, i).mul(scale);
                            if B::Head::OFFSETS {
                                v = v.add(V::splat(head.offset(span)));
                            }
                            v.store(to.add((column / TILE * height + r) * TILE + column % TILE));
                        }
                    }
                }
            }
        }
    }
    to
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
    // SAFETY: the caller gives a stretch of `height` rows taken apart, M rows of x, `height` columns of M rows of u.
    unsafe {
        let mut sums: Partial<V, M> = [[MaybeUninit::uninit(); 2 * super::GROUP]; M];
        let stride = height * TILE;
        if height == ROWS {
            dots_block::<V, f32, M, ROWS, false>(tiles, stride, xs, &mut sums, 0, true);
        } else {
            for r in 0..height {
                dots_block::<V, f32, M, 1, false>(tiles.add(r * TILE), stride, xs, &mut sums, r, true);
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            let mut out = [0.0; ROWS];
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
                3 | 4 | 5 => $f::<$v, 3>($($a),*),
                _ => $f::<$v, 6>($($a),*),
            }
            $m += if left == 4 || left == 5 { 3 } else { left };
        }
    };
}

/// Does `$body` for every group of rows of a matrix.
macro_rules! groups {
    ($B:ident, $w:expr, $rows:expr, $cols:expr, ($base:ident, $first:ident, $height:ident) => $body:expr) => {{
        let per_row = $cols / $B::ELEMENTS * ($B::HEAD + $B::CODES);
        let mut $first = 0;
        while $first < $rows {
            let $height = ($rows - $first).min(ROWS);
            let $base = $w.add($first * per_row);
            $body;
            $first += $height;
        }
    }};
}

/// `u = s X w^T` (`u +=` when `add`) for `n` rows of X; `u` is `(n, rows)`.
///
/// # Safety
/// As [`dots`], with `n` times as many `x` and `u`.
#[inline(always)]
pub(super) unsafe fn dots_batch<V: Vector, B: Block>(
    w: *const u8,
    [rows, cols]: [usize; 2],
    x: *const f32,
    n: usize,
    u: *mut f32,
    s: f32,
    add: bool,
) {
    let mut apart: Apart = [MaybeUninit::uninit(); ROWS * STRETCH];
    for from in (0..n).step_by(BATCH) {
        let n = (n - from).min(BATCH);
        // SAFETY: rows from .. from + n of x and u; stretches of whole blocks inside of a group.
        unsafe {
            let (x, u) = (x.add(from * cols), u.add(from * rows));
            groups!(B, w, rows, cols, (base, first, height) => for column in (0..cols).step_by(STRETCH) {
                let width = (cols - column).min(STRETCH);
                let tiles = take_apart::<V, B>(base, height, [column, width], &mut apart);
                let add = add || column > 0;
                in_blocks!(n, m => dots_apart::<V>(
                    tiles,
                    height,
                    Stretch { x: x.add(m * cols + column), ldx: cols, tiles: width / TILE },
                    (u.add(m * rows + first), rows),
                    s,
                    add
                ));
            });
        }
    }
}

/// `Y = u w` (`Y +=` when `add`) for `n` rows; `u` is `(n, rows)`, `y` is `(n, cols)`.
///
/// # Safety
/// As [`combine`], with `n` times as many `u` and `y`.
#[inline(always)]
pub(super) unsafe fn combine_batch<V: Vector, B: Block>(
    w: *const u8,
    [rows, cols]: [usize; 2],
    u: *const f32,
    n: usize,
    y: *mut f32,
    add: bool,
) {
    let mut apart: Apart = [MaybeUninit::uninit(); ROWS * STRETCH];
    for from in (0..n).step_by(BATCH) {
        let n = (n - from).min(BATCH);
        for column in (0..cols).step_by(STRETCH) {
            let width = (cols - column).min(STRETCH);
            // SAFETY: rows from .. from + n of u and y; a stretch of whole blocks inside of each group.
            unsafe {
                let (u, y) = (u.add(from * rows), y.add(from * cols + column));
                groups!(B, w, rows, cols, (base, first, height) => {
                    let tiles = take_apart::<V, B>(base, height, [column, width], &mut apart);
                    let add = add || first > 0;
                    for t in (0..width / TILE).step_by(2) {
                        in_blocks!(n, m => combine_apart::<V>(
                            tiles.add(t * height * TILE),
                            height,
                            (u.add(m * rows + first), rows),
                            (y.add(m * cols + t * TILE), cols),
                            add
                        ));
                    }
                });
            }
        }
    }
}

type Dots = unsafe fn(*const u8, [usize; 2], *const f32, *mut f32, bool);
type DotsBatch = unsafe fn(*const u8, [usize; 2], *const f32, usize, *mut f32, f32, bool);
type CombineBatch = unsafe fn(*const u8, [usize; 2], *const f32, usize, *mut f32, bool);

/// Primitives over blocks of one type.
pub(super) struct OverBlocks {
    pub dots: Dots,
    pub combine: Dots,
    pub dots_batch: DotsBatch,
    pub combine_batch: CombineBatch,
}

/// One ISA's instantiations, as `QUANT`: one row per type in the order of the enum.
macro_rules! quant_table {
    (@type $name:ident, $b:ident, $v:ty, $(#[$attr:meta])*) => {
        mod $name {
            use super::super::*;
            use $crate::kernels::quant::{self, OverBlocks};
            use $crate::kernels::quant_blocks::$b;

            $(#[$attr])*
            unsafe fn dots(w: *const u8, shape: [usize; 2], x: *const f32, out: *mut f32, add: bool) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant::dots::<$v, $b>(w, shape, x, out, add) }
            }
            $(#[$attr])*
            unsafe fn combine(w: *const u8, shape: [usize; 2], c: *const f32, y: *mut f32, add: bool) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant::combine::<$v, $b>(w, shape, c, y, add) }
            }
            $(#[$attr])*
            unsafe fn dots_batch(
                w: *const u8, shape: [usize; 2], x: *const f32, n: usize, u: *mut f32, s: f32, add: bool,
            ) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant::dots_batch::<$v, $b>(w, shape, x, n, u, s, add) }
            }
            $(#[$attr])*
            unsafe fn combine_batch(
                w: *const u8, shape: [usize; 2], u: *const f32, n: usize, y: *mut f32, add: bool,
            ) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { quant::combine_batch::<$v, $b>(w, shape, u, n, y, add) }
            }

            pub(super) const OVER: OverBlocks = OverBlocks { dots, combine, dots_batch, combine_batch };
        }
    };
    ($v:ty, $(#[$attr:meta])*) => {
        mod quantised {
            use $crate::kernels::quant::{OverBlocks, quant_table};

            quant_table!(@type q8_0, Q8_0, $v, $(#[$attr])*);
            quant_table!(@type q6_k, Q6K, $v, $(#[$attr])*);
            quant_table!(@type q5_k, Q5K, $v, $(#[$attr])*);
            quant_table!(@type q4_k, Q4K, $v, $(#[$attr])*);
            quant_table!(@type q4_1, Q4_1, $v, $(#[$attr])*);
            quant_table!(@type q4_0, Q4_0, $v, $(#[$attr])*);

            pub(super) const QUANT: [OverBlocks; 6] =
                [q8_0::OVER, q6_k::OVER, q5_k::OVER, q4_k::OVER, q4_1::OVER, q4_0::OVER];
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
        let over = &self.quant[w.kind as usize];
        // SAFETY: lengths checked here and by `Packed`; the table exists only where its ISA does. So below.
        unsafe { (over.dots)(w.bytes.as_ptr(), w.shape, x.as_ptr(), out.as_mut_ptr(), add) }
    }

    /// `y = sum_r coef[r] row r` (`y +=` when `add`).
    #[inline]
    pub fn quant_combine(&self, w: Packed<'_>, coef: &[f32], y: &mut [f32], add: bool) {
        need("quant_combine coef", coef.len(), w.shape[0]);
        need("quant_combine y", y.len(), w.shape[1]);
        let over = &self.quant[w.kind as usize];
        // SAFETY: as above.
        unsafe { (over.combine)(w.bytes.as_ptr(), w.shape, coef.as_ptr(), y.as_mut_ptr(), add) }
    }

    /// `u = s X w^T` (`u +=` when `add`); `x` is `(n, cols)`, `u` is `(n, rows)`.
    #[inline]
    pub fn quant_dots_batch(&self, w: Packed<'_>, x: &[f32], u: &mut [f32], s: f32, add: bool) {
        let n = u.len() / w.shape[0];
        need("quant_dots_batch u", u.len(), n * w.shape[0]);
        need("quant_dots_batch x", x.len(), n * w.shape[1]);
        let over = &self.quant[w.kind as usize];
        // SAFETY: as above.
        unsafe { (over.dots_batch)(w.bytes.as_ptr(), w.shape, x.as_ptr(), n, u.as_mut_ptr(), s, add) }
    }

    /// `Y = u w` (`Y +=` when `add`); `u` is `(n, rows)`, `y` is `(n, cols)`.
    #[inline]
    pub fn quant_combine_batch(&self, w: Packed<'_>, u: &[f32], y: &mut [f32], add: bool) {
        let n = u.len() / w.shape[0];
        need("quant_combine_batch u", u.len(), n * w.shape[0]);
        need("quant_combine_batch y", y.len(), n * w.shape[1]);
        let over = &self.quant[w.kind as usize];
        // SAFETY: as above.
        unsafe { (over.combine_batch)(w.bytes.as_ptr(), w.shape, u.as_ptr(), n, y.as_mut_ptr(), add) }
    }
}
