//! Sums of outer products over a batch: how gradients, Fisher sums and penalties reach a factor.

use super::TILE;
use super::geometry::{Geometry, padded, with_height};
use super::vector::Vector;

/// A batch as the bodies see it: `n` rows of coefficients (`rank` apart) and of vectors (`len` apart).
#[derive(Clone, Copy)]
struct Rows {
    coef: *const f32,
    rank: usize,
    v: *const f32,
    len: usize,
    n: usize,
}

/// Adds to `R` rows of `C` vectors at once; tiles lie `stride` apart. Sums stay in registers over the batch.
#[inline(always)]
unsafe fn block<V: Vector, const R: usize, const C: usize>(w: *mut f32, stride: usize, rows: Rows) {
    // SAFETY: the caller gives R rows in C vectors of w, R coefficients and C vectors in each row of the batch.
    unsafe {
        let at = |r: usize, c: usize| w.add(c * V::W / TILE * stride + r * TILE + c * V::W % TILE);
        let mut acc = [[V::splat(0.0); C]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (c, acc) in acc.iter_mut().enumerate() {
                *acc = V::load(at(r, c));
            }
        }
        for m in 0..rows.n {
            let mut v = [V::splat(0.0); C];
            for (c, v) in v.iter_mut().enumerate() {
                *v = V::load(rows.v.add(m * rows.len + c * V::W));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let s = V::splat(*rows.coef.add(m * rows.rank + r));
                for (acc, v) in acc.iter_mut().zip(v) {
                    *acc = v.fma(s, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (c, acc) in acc.iter().enumerate() {
                acc.store(at(r, c));
            }
        }
    }
}

/// One group of `H` rows over all columns.
#[inline(always)]
unsafe fn group<V: Vector, const H: usize>(w: *mut f32, rows: Rows) {
    let (full, rest) = (rows.len / TILE, rows.len % TILE);
    let tiles = if V::W == TILE { 2 } else { 1 };
    let mut t = 0;
    // SAFETY: t + tiles <= full; the tail goes through a stack tile.
    unsafe {
        while t + tiles <= full {
            columns::<V, H, 2>(w.add(t * H * TILE), Rows { v: rows.v.add(t * TILE), ..rows });
            t += tiles;
        }
        while t < full {
            columns::<V, H, 1>(w.add(t * H * TILE), Rows { v: rows.v.add(t * TILE), ..rows });
            t += 1;
        }
        if rest > 0 {
            for m in 0..rows.n {
                let tail = padded(rows.v.add(m * rows.len + full * TILE), rest);
                let one = Rows { coef: rows.coef.add(m * rows.rank), v: tail.as_ptr(), n: 1, ..rows };
                if V::W == TILE {
                    columns::<V, H, 1>(w.add(full * H * TILE), one);
                } else {
                    columns::<V, H, 2>(w.add(full * H * TILE), one);
                }
            }
        }
    }
}

/// `C` vectors of columns in all `H` rows; 16 registers hold half a group at a time.
#[inline(always)]
unsafe fn columns<V: Vector, const H: usize, const C: usize>(w: *mut f32, rows: Rows) {
    // SAFETY: forwarded from the caller; r + 4 <= H.
    unsafe {
        if V::W == TILE {
            return block::<V, H, C>(w, H * TILE, rows);
        }
        let mut r = 0;
        while r + 4 <= H {
            let part = Rows { coef: rows.coef.add(r), ..rows };
            block::<V, 4, C>(w.add(r * TILE), H * TILE, part);
            r += 4;
        }
        while r < H {
            let part = Rows { coef: rows.coef.add(r), ..rows };
            block::<V, 1, C>(w.add(r * TILE), H * TILE, part);
            r += 1;
        }
    }
}

/// `row r += sum_m coef[m][r] v[m]` for `n` rows of `coef` and `v`; the padding stays zero.
///
/// # Safety
/// `w` holds `g.stored()` writable elements, `coef` `n * g.rank`, `v` `n * g.len`; the ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn outer_batch<V: Vector>(
    w: *mut f32,
    g: Geometry,
    coef: *const f32,
    v: *const f32,
    n: usize,
) {
    let mut row = 0;
    while row < g.rank {
        let (start, height) = g.group(row);
        // SAFETY: the group starts in w, and every row of coef has `height` elements from `row`.
        unsafe {
            let rows = Rows { coef: coef.add(row), rank: g.rank, v, len: g.len, n };
            with_height!(height, group::<V>(w.add(start), rows));
        }
        row += height;
    }
}
