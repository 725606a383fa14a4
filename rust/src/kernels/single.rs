//! Bodies for one input row: `dots` (x against every row of A) and `combine` (the weighted sum of B's rows).

use super::geometry::{Geometry, is_long, padded, prefetch_tile, unpad, with_height};
use super::vector::{Element, Vector};
use super::{GROUP, TILE};

/// `acc[set][row] += tile . x` for `T` tiles; sets break the FMA latency chain.
#[inline(always)]
unsafe fn dots_tiles<
    V: Vector,
    E: Element,
    const H: usize,
    const T: usize,
    const SETS: usize,
    const P: bool,
>(
    w: *const E,
    x: *const f32,
    acc: &mut [[V; H]; SETS],
) {
    let per = TILE / V::W;
    for t in 0..T {
        // SAFETY: the caller gives T readable tiles of w and of x.
        unsafe {
            if P {
                prefetch_tile::<V, E, H>(w.add(t * H * TILE));
            }
            for half in 0..per {
                let xv = V::load(x.add(t * TILE + half * V::W));
                let set = (t * per + half) % SETS;
                for r in 0..H {
                    let wv: V = E::load(w.add((t * H + r) * TILE + half * V::W));
                    acc[set][r] = wv.fma(xv, acc[set][r]);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn dots_sets<
    V: Vector,
    E: Element,
    const H: usize,
    const T: usize,
    const SETS: usize,
    const P: bool,
>(
    w: *const E,
    len: usize,
    x: *const f32,
    out: *mut f32,
) {
    // SAFETY: the caller gives a whole group of w, len elements of x and H writable elements of out.
    unsafe {
        let mut acc = [[V::splat(0.0); H]; SETS];
        let full = len / TILE;
        let mut t = 0;
        while t + T <= full {
            dots_tiles::<V, E, H, T, SETS, P>(w.add(t * H * TILE), x.add(t * TILE), &mut acc);
            t += T;
        }
        while t < full {
            dots_tiles::<V, E, H, 1, SETS, P>(w.add(t * H * TILE), x.add(t * TILE), &mut acc);
            t += 1;
        }
        if !len.is_multiple_of(TILE) {
            let tail = padded(x.add(full * TILE), len - full * TILE);
            dots_tiles::<V, E, H, 1, SETS, false>(w.add(full * H * TILE), tail.as_ptr(), &mut acc);
        }
        let mut sums = acc[0];
        for set in acc.iter().skip(1) {
            for r in 0..H {
                sums[r] = sums[r].add(set[r]);
            }
        }
        V::sums(sums.as_ptr(), H, out);
    }
}

/// Enough independent chains to hide the FMA latency, within the registers of the ISA.
#[inline(always)]
unsafe fn dots_group<V: Vector, E: Element, const H: usize>(
    w: *const E,
    len: usize,
    x: *const f32,
    out: *mut f32,
) {
    // SAFETY: forwarded from the caller.
    unsafe {
        match (V::W, H) {
            (16, 4..) => dots_sets::<V, E, H, 2, 2, false>(w, len, x, out),
            (16, 2..) => dots_sets::<V, E, H, 4, 4, false>(w, len, x, out),
            (16, _) => dots_sets::<V, E, H, 8, 8, false>(w, len, x, out),
            (_, 5..) => dots_sets::<V, E, H, 1, 1, false>(w, len, x, out),
            (_, 3..) => dots_sets::<V, E, H, 1, 2, false>(w, len, x, out),
            (_, 2) => dots_sets::<V, E, H, 2, 4, false>(w, len, x, out),
            (_, _) => dots_sets::<V, E, H, 4, 8, false>(w, len, x, out),
        }
    }
}

/// A full group of a long factor, with prefetches.
#[inline(always)]
unsafe fn dots_long<V: Vector, E: Element>(w: *const E, len: usize, x: *const f32, out: *mut f32) {
    // SAFETY: forwarded from the caller.
    unsafe {
        if V::W == TILE {
            dots_sets::<V, E, GROUP, 2, 2, true>(w, len, x, out);
        } else {
            dots_sets::<V, E, GROUP, 1, 1, true>(w, len, x, out);
        }
    }
}

/// `out[r] = <row r, x>` for every row.
///
/// # Safety
/// `w` holds `g.stored()` elements, `x` `g.len`, `out` `g.rank`; the ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn dots<V: Vector, E: Element>(w: *const E, g: Geometry, x: *const f32, out: *mut f32) {
    let long = is_long::<E>(g);
    let mut row = 0;
    while row < g.rank {
        let (start, height) = g.group(row);
        // SAFETY: start is a group's first element; height rows of out are left.
        unsafe {
            if long && height == GROUP {
                dots_long::<V, E>(w.add(start), g.len, x, out.add(row));
            } else {
                with_height!(height, dots_group::<V, E>(w.add(start), g.len, x, out.add(row)));
            }
        }
        row += height;
    }
}

#[inline(always)]
unsafe fn combine_tile<V: Vector, E: Element, const H: usize>(
    w: *const E,
    c: &[V; H],
    y: *mut f32,
    add: bool,
) {
    let mut half = 0;
    while half < TILE {
        // SAFETY: the caller gives one tile of w (H rows) and of y.
        unsafe {
            let mut acc = if add { V::load(y.add(half)) } else { V::splat(0.0) };
            for (r, &c) in c.iter().enumerate() {
                let wv: V = E::load(w.add(r * TILE + half));
                acc = wv.fma(c, acc);
            }
            acc.store(y.add(half));
        }
        half += V::W;
    }
}

#[inline(always)]
unsafe fn combine_sweep<V: Vector, E: Element, const H: usize, const P: bool>(
    w: *const E,
    len: usize,
    coef: *const f32,
    y: *mut f32,
    add: bool,
) {
    // SAFETY: the caller gives a whole group of w, H elements of coef and len writable elements of y.
    unsafe {
        let mut c = [V::splat(0.0); H];
        for (r, c) in c.iter_mut().enumerate() {
            *c = V::splat(*coef.add(r));
        }
        let full = len / TILE;
        for t in 0..full {
            if P {
                prefetch_tile::<V, E, H>(w.add(t * H * TILE));
            }
            combine_tile::<V, E, H>(w.add(t * H * TILE), &c, y.add(t * TILE), add);
        }
        let rest = len - full * TILE;
        if rest > 0 {
            let mut tail = if add { padded(y.add(full * TILE), rest) } else { [0.0; TILE] };
            combine_tile::<V, E, H>(w.add(full * H * TILE), &c, tail.as_mut_ptr(), add);
            unpad(&tail, y.add(full * TILE), rest);
        }
    }
}

#[inline(always)]
unsafe fn combine_group<V: Vector, E: Element, const H: usize>(
    w: *const E,
    len: usize,
    coef: *const f32,
    y: *mut f32,
    add: bool,
) {
    // SAFETY: forwarded from the caller.
    unsafe { combine_sweep::<V, E, H, false>(w, len, coef, y, add) }
}

/// `y = sum_r coef[r] * row r` (`y +=` when `add`).
///
/// # Safety
/// `w` holds `g.stored()` elements, `coef` `g.rank`, `y` `g.len` writable; the ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn combine<V: Vector, E: Element>(
    w: *const E,
    g: Geometry,
    coef: *const f32,
    y: *mut f32,
    mut add: bool,
) {
    let long = is_long::<E>(g);
    let mut row = 0;
    while row < g.rank {
        let (start, height) = g.group(row);
        // SAFETY: as in `dots`; y is read only after it was written or when the caller asked to add.
        unsafe {
            let (w, c) = (w.add(start), coef.add(row));
            if long && height == GROUP {
                combine_sweep::<V, E, GROUP, true>(w, g.len, c, y, add);
            } else {
                with_height!(height, combine_group::<V, E>(w, g.len, c, y, add));
            }
        }
        add = true;
        row += height;
    }
}
