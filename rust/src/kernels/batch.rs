//! Register-blocked bodies for several input rows: each weight is loaded once per block of rows.

use super::TILE;
use super::geometry::Geometry;
use super::vector::{Element, Vector};

/// `u[m][r] = s <row r, x_m>` for `M` rows of X and `R` rows of W that start at `w` (rows `TILE` apart,
/// tiles `stride` apart).
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn dots_block<V: Vector, E: Element, const M: usize, const R: usize>(
    w: *const E,
    stride: usize,
    len: usize,
    x: *const f32,
    u: *mut f32,
    ldu: usize,
    s: f32,
) {
    // SAFETY: the caller gives M rows of len elements of x (contiguous), all tiles of R rows of w, and
    // M rows of at least R writable elements of u, ldu apart.
    unsafe {
        let mut acc = [[V::splat(0.0); R]; M];
        let full = len / TILE;
        for t in 0..full {
            let wt = w.add(t * stride);
            let mut half = 0;
            while half < TILE {
                let mut xv = [V::splat(0.0); M];
                for (m, xv) in xv.iter_mut().enumerate() {
                    *xv = V::load(x.add(m * len + t * TILE + half));
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
        if !len.is_multiple_of(TILE) {
            let wt = w.add(full * stride);
            for m in 0..M {
                let mut tail = [0.0f32; TILE];
                for i in 0..len - full * TILE {
                    tail[i] = *x.add(m * len + full * TILE + i);
                }
                let mut half = 0;
                while half < TILE {
                    let xv = V::load(tail.as_ptr().add(half));
                    for r in 0..R {
                        let wv: V = E::load(wt.add(r * TILE + half));
                        acc[m][r] = wv.fma(xv, acc[m][r]);
                    }
                    half += V::W;
                }
            }
        }
        for (m, acc) in acc.iter().enumerate() {
            let mut r = 0;
            while r + 4 <= R {
                let four = V::sum4([acc[r], acc[r + 1], acc[r + 2], acc[r + 3]]);
                for (i, v) in four.into_iter().enumerate() {
                    *u.add(m * ldu + r + i) = s * v;
                }
                r += 4;
            }
            while r < R {
                *u.add(m * ldu + r) = s * acc[r].sum();
                r += 1;
            }
        }
    }
}

/// `u = s x W^T` for `M` rows; registers decide how many rows of W go together.
#[inline(always)]
unsafe fn dots_rows<V: Vector, E: Element, const M: usize>(
    w: *const E,
    g: Geometry,
    x: *const f32,
    u: *mut f32,
    s: f32,
) {
    let mut row = 0;
    while row < g.rank {
        let height = (g.rank - row).min(super::GROUP);
        // SAFETY: at(row, 0) starts a group; sub-blocks of its rows are TILE apart, tiles height * TILE.
        unsafe {
            let base = w.add(g.at(row, 0));
            let stride = height * TILE;
            let mut r = 0;
            while r + 4 <= height {
                dots_block::<V, E, M, 4>(base.add(r * TILE), stride, g.len, x, u.add(row + r), g.rank, s);
                r += 4;
            }
            while r < height {
                dots_block::<V, E, M, 1>(base.add(r * TILE), stride, g.len, x, u.add(row + r), g.rank, s);
                r += 1;
            }
        }
        row += height;
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
    let mut m = 0;
    // SAFETY: m + block <= rows in each branch.
    unsafe {
        if V::W == 16 {
            while m + 6 <= rows {
                dots_rows::<V, E, 6>(w, g, x.add(m * g.len), u.add(m * g.rank), s);
                m += 6;
            }
        }
        while m + 3 <= rows {
            dots_rows::<V, E, 3>(w, g, x.add(m * g.len), u.add(m * g.rank), s);
            m += 3;
        }
        while m < rows {
            dots_rows::<V, E, 1>(w, g, x.add(m * g.len), u.add(m * g.rank), s);
            m += 1;
        }
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
    // SAFETY: t + tiles <= full, so the columns lie in w and y; the tail goes through a stack tile.
    unsafe {
        while t + tiles <= full {
            combine_block::<V, E, M, C>(w, g, t, u, y.add(t * TILE), g.len, add);
            t += tiles;
        }
        while t < full {
            if V::W == TILE {
                combine_block::<V, E, M, 1>(w, g, t, u, y.add(t * TILE), g.len, add);
            } else {
                combine_block::<V, E, M, 2>(w, g, t, u, y.add(t * TILE), g.len, add);
            }
            t += 1;
        }
        let rest = g.len - full * TILE;
        if rest > 0 {
            for m in 0..M {
                let ym = y.add(m * g.len + full * TILE);
                let mut tail = [0.0f32; TILE];
                if add {
                    for (i, t) in tail.iter_mut().enumerate().take(rest) {
                        *t = *ym.add(i);
                    }
                }
                let um = u.add(m * g.rank);
                if V::W == TILE {
                    combine_block::<V, E, 1, 1>(w, g, full, um, tail.as_mut_ptr(), TILE, add);
                } else {
                    combine_block::<V, E, 1, 2>(w, g, full, um, tail.as_mut_ptr(), TILE, add);
                }
                for (i, t) in tail.iter().enumerate().take(rest) {
                    *ym.add(i) = *t;
                }
            }
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
    let mut m = 0;
    // SAFETY: m + block <= rows in each branch.
    unsafe {
        while m + 6 <= rows {
            let (u, y) = (u.add(m * g.rank), y.add(m * g.len));
            if V::W == TILE {
                combine_rows::<V, E, 6, 4>(w, g, u, y, add);
            } else {
                combine_rows::<V, E, 6, 2>(w, g, u, y, add);
            }
            m += 6;
        }
        while m + 3 <= rows {
            let (u, y) = (u.add(m * g.rank), y.add(m * g.len));
            if V::W == TILE {
                combine_rows::<V, E, 3, 4>(w, g, u, y, add);
            } else {
                combine_rows::<V, E, 3, 2>(w, g, u, y, add);
            }
            m += 3;
        }
        while m < rows {
            combine_rows::<V, E, 1, 4>(w, g, u.add(m * g.rank), y.add(m * g.len), add);
            m += 1;
        }
    }
}
