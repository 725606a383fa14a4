//! Bodies that change B: a rank-1 step, and the fused sweep of the recursive-least-squares learner.

use super::TILE;
use super::geometry::{Geometry, padded, unpad, with_height};
use super::vector::Vector;

#[inline(always)]
unsafe fn rank1_group<V: Vector, const H: usize>(w: *mut f32, len: usize, coef: *const f32, v: *const f32) {
    // SAFETY: the caller gives a whole writable group of w, H elements of coef and len of v.
    unsafe {
        let mut c = [V::splat(0.0); H];
        for (r, c) in c.iter_mut().enumerate() {
            *c = V::splat(*coef.add(r));
        }
        let full = len / TILE;
        for t in 0..full {
            rank1_tile::<V, H>(w.add(t * H * TILE), &c, v.add(t * TILE));
        }
        if !len.is_multiple_of(TILE) {
            let tail = padded(v.add(full * TILE), len - full * TILE);
            rank1_tile::<V, H>(w.add(full * H * TILE), &c, tail.as_ptr());
        }
    }
}

#[inline(always)]
unsafe fn rank1_tile<V: Vector, const H: usize>(w: *mut f32, c: &[V; H], v: *const f32) {
    let mut half = 0;
    while half < TILE {
        // SAFETY: the caller gives one tile of w (H rows) and of v.
        unsafe {
            let vv = V::load(v.add(half));
            for (r, &c) in c.iter().enumerate() {
                let p = w.add(r * TILE + half);
                vv.fma(c, V::load(p)).store(p);
            }
        }
        half += V::W;
    }
}

/// `row r += coef[r] * v` for every row; the padding stays zero.
///
/// # Safety
/// `w` holds `g.stored()` writable elements, `coef` `g.rank`, `v` `g.len`; the ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn rank1<V: Vector>(w: *mut f32, g: Geometry, coef: *const f32, v: *const f32) {
    let mut row = 0;
    while row < g.rank {
        let (start, height) = g.group(row);
        // SAFETY: as in `dots`.
        unsafe { with_height!(height, rank1_group::<V>(w.add(start), g.len, coef.add(row), v)) };
        row += height;
    }
}

/// One sweep over B: `e = target - u B` and `B += k^T e`, each stretch of columns while it is in L1.
/// `target` is overwritten with the error `e`; returns `|e|^2`.
///
/// # Safety
/// `w` holds `g.stored()` writable elements, `u` and `k` `g.rank`, `target` `g.len` writable.
#[inline(always)]
pub(crate) unsafe fn fit_sweep<V: Vector>(
    w: *mut f32,
    g: Geometry,
    u: *const f32,
    k: *const f32,
    target: *mut f32,
) -> f32 {
    // SAFETY: every access below lies in tile `tile` of row `row`, both in range.
    unsafe {
        let mut loss = V::splat(0.0);
        let full = g.len / TILE;
        let mut tile = 0;
        while tile + 4 <= full {
            loss = fit_tiles::<V, 4>(w, g, u, k, target.add(tile * TILE), tile, loss);
            tile += 4;
        }
        while tile < full {
            loss = fit_tiles::<V, 1>(w, g, u, k, target.add(tile * TILE), tile, loss);
            tile += 1;
        }
        if g.rest() > 0 {
            let last = target.add(full * TILE);
            let mut tail = padded(last, g.rest());
            loss = fit_tiles::<V, 1>(w, g, u, k, tail.as_mut_ptr(), full, loss);
            unpad(&tail, last, g.rest());
        }
        loss.sum()
    }
}

#[inline(always)]
unsafe fn fit_tiles<V: Vector, const C: usize>(
    w: *mut f32,
    g: Geometry,
    u: *const f32,
    k: *const f32,
    target: *mut f32,
    tile: usize,
    mut loss: V,
) -> V {
    let per = TILE / V::W;
    // SAFETY: the caller gives C tiles from `tile` in every row of w and in target.
    unsafe {
        let zero = V::splat(0.0);
        // [tile][half]: a vector of 8 lanes needs both halves, one of 16 lanes only the first.
        let mut y = [[zero; 2]; C];
        let mut row = 0;
        while row < g.rank {
            let (_, height) = g.group(row);
            let base = w.add(g.at(row, tile));
            for r in 0..height {
                let c = V::splat(*u.add(row + r));
                for (t, y) in y.iter_mut().enumerate() {
                    for (h, y) in y.iter_mut().enumerate().take(per) {
                        *y = V::load(base.add((t * height + r) * TILE + h * V::W)).fma(c, *y);
                    }
                }
            }
            row += height;
        }
        for (t, y) in y.iter_mut().enumerate() {
            for (h, y) in y.iter_mut().enumerate().take(per) {
                let p = target.add(t * TILE + h * V::W);
                *y = V::load(p).sub(*y);
                y.store(p);
                loss = y.fma(*y, loss);
            }
        }
        row = 0;
        while row < g.rank {
            let (_, height) = g.group(row);
            let base = w.add(g.at(row, tile));
            for r in 0..height {
                let c = V::splat(*k.add(row + r));
                for (t, y) in y.iter().enumerate() {
                    for (h, y) in y.iter().enumerate().take(per) {
                        let p = base.add((t * height + r) * TILE + h * V::W);
                        y.fma(c, V::load(p)).store(p);
                    }
                }
            }
            row += height;
        }
        loss
    }
}
