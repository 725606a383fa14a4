//! Register-blocked bodies for several input rows: each weight is loaded once per block of rows.

use std::mem::MaybeUninit;

use super::geometry::{Geometry, padded, unpad};
use super::vector::{Element, Vector};
use super::{GROUP, TILE, single};

/// Tiles of X that stay in L1 while the rows of W pass by (6 rows of 48 tiles are 18 KiB).
const CHUNK: usize = 48;
/// Rows of W whose partial sums wait in memory for one common reduction.
pub(super) const WAITING: usize = 2 * GROUP;

/// Partial sums of `M` rows of X against up to [`WAITING`] rows of W.
pub(super) type Partial<V, const M: usize> = [[MaybeUninit<V>; WAITING]; M];

/// A stretch of X: `tiles` full tiles of rows that lie `ldx` apart.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    pub x: *const f32,
    pub ldx: usize,
    pub tiles: usize,
}

/// `acc[m][at + r] (+)= <row r, x_m>` for `M` rows of X and `R` rows of W that start at `w` (rows `TILE`
/// apart, tiles `stride` apart); starts from zero when `fresh`. With `P` it asks for the next `M` rows of X.
#[inline(always)]
pub(super) unsafe fn dots_block<V: Vector, E: Element, const M: usize, const R: usize, const P: bool>(
    w: *const E,
    stride: usize,
    xs: Stretch,
    sums: &mut Partial<V, M>,
    at: usize,
    fresh: bool,
) {
    // SAFETY: the caller gives M rows of the stretch, its tiles in R rows of w, at + R <= WAITING, and sums
    // that were written before unless `fresh`.
    unsafe {
        let mut acc = [[V::splat(0.0); R]; M];
        if !fresh {
            for (acc, sums) in acc.iter_mut().zip(sums.iter()) {
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = sums[at + r].assume_init();
                }
            }
        }
        for t in 0..xs.tiles {
            let wt = w.add(t * stride);
            let mut half = 0;
            while half < TILE {
                let mut xv = [V::splat(0.0); M];
                for (m, xv) in xv.iter_mut().enumerate() {
                    if P {
                        V::prefetch(xs.x.add(m * xs.ldx + t * TILE + half).wrapping_add(M * xs.ldx).cast());
                    }
                    *xv = V::load(xs.x.add(m * xs.ldx + t * TILE + half));
                }
                for r in 0..R {
                    let wv: V = E::load(wt.add(r * TILE + half));
                    for m in 0..M {
                        acc[m][r] = wv.fma(xv[m], acc[m][r]);
                    }
                }
                half += V::W;
            }
        }
        for (acc, sums) in acc.iter().zip(sums.iter_mut()) {
            for (r, acc) in acc.iter().enumerate() {
                sums[at + r].write(*acc);
            }
        }
    }
}

/// The stretch against `n` rows of W from `first` on.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn dots_stretch<V: Vector, E: Element, const M: usize>(
    w: *const E,
    g: Geometry,
    first: usize,
    n: usize,
    tile: usize,
    xs: Stretch,
    sums: &mut Partial<V, M>,
) {
    let mut row = first;
    while row < first + n {
        let height = (g.rank - row).min(GROUP);
        // SAFETY: at(row, tile) is a tile of a group; its rows are TILE apart, its tiles height * TILE.
        unsafe {
            let base = w.add(g.at(row, tile));
            let (stride, at) = (height * TILE, row - first);
            let mut r = 0;
            let by_eight = V::W == TILE && M <= 3 && height == GROUP;
            if by_eight {
                dots_block::<V, E, M, 8, false>(base, stride, xs, sums, at, tile == 0);
                r = GROUP;
            }
            if !by_eight && height >= 4 && row == 0 {
                dots_block::<V, E, M, 4, true>(base, stride, xs, sums, 0, tile == 0);
                r = 4;
            }
            while r + 4 <= height {
                dots_block::<V, E, M, 4, false>(base.add(r * TILE), stride, xs, sums, at + r, tile == 0);
                r += 4;
            }
            while r < height {
                dots_block::<V, E, M, 1, false>(base.add(r * TILE), stride, xs, sums, at + r, tile == 0);
                r += 1;
            }
        }
        row += height;
    }
}

/// `u[m] = s x_m W^T` for `M` rows.
#[inline(always)]
unsafe fn dots_rows<V: Vector, E: Element, const M: usize>(
    w: *const E,
    g: Geometry,
    x: *const f32,
    u: *mut f32,
    s: f32,
) {
    let full = g.len / TILE;
    let mut first = 0;
    while first < g.rank {
        let n = (g.rank - first).min(WAITING);
        let mut sums: Partial<V, M> = [[MaybeUninit::uninit(); WAITING]; M];
        // SAFETY: the stretches cover every tile once, so all n sums of each row are written before use.
        unsafe {
            let mut t = 0;
            while t < full {
                let tiles = (full - t).min(CHUNK);
                let xs = Stretch { x: x.add(t * TILE), ldx: g.len, tiles };
                dots_stretch::<V, E, M>(w, g, first, n, t, xs, &mut sums);
                t += tiles;
            }
            if g.rest() > 0 {
                let tails: [[f32; TILE]; M] =
                    std::array::from_fn(|m| padded(x.add(m * g.len + full * TILE), g.rest()));
                let xs = Stretch { x: tails.as_ptr().cast(), ldx: TILE, tiles: 1 };
                dots_stretch::<V, E, M>(w, g, first, n, full, xs, &mut sums);
            }
            for (m, sums) in sums.iter().enumerate() {
                let mut out = [0.0; WAITING];
                V::sums(sums.as_ptr().cast(), n, out.as_mut_ptr());
                for (r, v) in out.iter().enumerate().take(n) {
                    *u.add(m * g.rank + first + r) = s * v;
                }
            }
        }
        first += n;
    }
}

/// `u[m] = s x_m W^T` for `rows` rows of X; `u` is `(rows, rank)`.
///
/// # Safety
/// `w` holds `g.stored()` elements, `x` `rows * g.len`, `u` `rows * g.rank` writable; the ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn dots_batch<V: Vector, E: Element>(
    w: *const E,
    g: Geometry,
    x: *const f32,
    rows: usize,
    u: *mut f32,
    s: f32,
) {
    let block = if V::W == TILE { 6 } else { 3 };
    let mut m = 0;
    while m < rows {
        let n = (rows - m).min(block);
        // SAFETY: m + n <= rows.
        unsafe {
            let (x, u) = (x.add(m * g.len), u.add(m * g.rank));
            match n {
                6 => dots_rows::<V, E, 6>(w, g, x, u, s),
                5 => dots_rows::<V, E, 5>(w, g, x, u, s),
                4 => dots_rows::<V, E, 4>(w, g, x, u, s),
                3 => dots_rows::<V, E, 3>(w, g, x, u, s),
                2 => dots_rows::<V, E, 2>(w, g, x, u, s),
                _ => {
                    single::dots::<V, E>(w, g, x, u);
                    for r in 0..g.rank {
                        *u.add(r) *= s;
                    }
                }
            }
        }
        m += n;
    }
}

/// `y_m (+)= sum_r u[m][r] row r` for `M` rows and the columns of `C` vectors.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn combine_block<V: Vector, E: Element, const M: usize, const C: usize>(
    w: *const E,
    g: Geometry,
    tile: usize,
    u: *const f32,
    y: *mut f32,
    ldy: usize,
    add: bool,
) {
    let per = TILE / V::W;
    // SAFETY: the caller gives C * W columns from `tile` in every row of w, and in M rows of y (ldy apart).
    unsafe {
        let mut acc = [[V::splat(0.0); C]; M];
        if add {
            for (m, acc) in acc.iter_mut().enumerate() {
                for (c, acc) in acc.iter_mut().enumerate() {
                    *acc = V::load(y.add(m * ldy + c * V::W));
                }
            }
        }
        let mut row = 0;
        while row < g.rank {
            let height = (g.rank - row).min(super::GROUP);
            let base = w.add(g.at(row, tile));
            for r in 0..height {
                let mut wv = [V::splat(0.0); C];
                for (c, wv) in wv.iter_mut().enumerate() {
                    *wv = E::load(base.add(((c / per) * height + r) * TILE + (c % per) * V::W));
                }
                for m in 0..M {
                    let s = V::splat(*u.add(m * g.rank + row + r));
                    for c in 0..C {
                        acc[m][c] = wv[c].fma(s, acc[m][c]);
                    }
                }
            }
            row += height;
        }
        for (m, acc) in acc.iter().enumerate() {
            for (c, acc) in acc.iter().enumerate() {
                acc.store(y.add(m * ldy + c * V::W));
            }
        }
    }
}

#[inline(always)]
unsafe fn combine_rows<V: Vector, E: Element, const M: usize, const C: usize>(
    w: *const E,
    g: Geometry,
    u: *const f32,
    y: *mut f32,
    add: bool,
) {
    let tiles = C * V::W / TILE;
    let full = g.len / TILE;
    let mut t = 0;
    // SAFETY: t + tiles <= full, so the columns lie in w and y; the tail goes through stack tiles.
    unsafe {
        while t + tiles <= full {
            combine_block::<V, E, M, C>(w, g, t, u, y.add(t * TILE), g.len, add);
            t += tiles;
        }
        while t < full {
            combine_one_tile::<V, E, M>(w, g, t, u, y.add(t * TILE), g.len, add);
            t += 1;
        }
        if g.rest() > 0 {
            let mut tails = [[0.0f32; TILE]; M];
            for (m, tail) in tails.iter_mut().enumerate().take(if add { M } else { 0 }) {
                *tail = padded(y.add(m * g.len + full * TILE), g.rest());
            }
            combine_one_tile::<V, E, M>(w, g, full, u, tails.as_mut_ptr().cast(), TILE, add);
            for (m, tail) in tails.iter().enumerate() {
                unpad(tail, y.add(m * g.len + full * TILE), g.rest());
            }
        }
    }
}

#[inline(always)]
unsafe fn combine_one_tile<V: Vector, E: Element, const M: usize>(
    w: *const E,
    g: Geometry,
    tile: usize,
    u: *const f32,
    y: *mut f32,
    ldy: usize,
    add: bool,
) {
    // SAFETY: forwarded from the caller; a tile is one vector of 16 lanes or two of 8.
    unsafe {
        if V::W == TILE {
            combine_block::<V, E, M, 1>(w, g, tile, u, y, ldy, add);
        } else {
            combine_block::<V, E, M, 2>(w, g, tile, u, y, ldy, add);
        }
    }
}

/// `y_m (+)= u_m W` for `rows` rows; `u` is `(rows, rank)`, `y` is `(rows, len)`.
///
/// # Safety
/// `w` holds `g.stored()` elements, `u` `rows * g.rank`, `y` `rows * g.len` writable; the ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn combine_batch<V: Vector, E: Element>(
    w: *const E,
    g: Geometry,
    u: *const f32,
    rows: usize,
    y: *mut f32,
    add: bool,
) {
    let block = if V::W == TILE { 6 } else { 3 };
    let mut m = 0;
    while m < rows {
        let n = (rows - m).min(block);
        // SAFETY: m + n <= rows.
        unsafe {
            let (u, y) = (u.add(m * g.rank), y.add(m * g.len));
            match n {
                6 => combine_rows::<V, E, 6, 4>(w, g, u, y, add),
                5 => combine_rows::<V, E, 5, 4>(w, g, u, y, add),
                4 => combine_rows::<V, E, 4, 4>(w, g, u, y, add),
                3 => combine_rows::<V, E, 3, 4>(w, g, u, y, add),
                2 => combine_rows::<V, E, 2, 4>(w, g, u, y, add),
                _ => single::combine::<V, E>(w, g, u, y, add),
            }
        }
        m += n;
    }
}
