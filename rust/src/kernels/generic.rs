//! Kernel bodies, written once over [`Vector`] and [`Element`]; each ISA file instantiates them.
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
    const fn group(self, row: usize) -> (usize, usize) {
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
}

/// The last, partial tile of a vector, padded with zeros on the stack.
#[inline(always)]
unsafe fn padded_tail(x: *const f32, len: usize) -> [f32; TILE] {
    let mut tail = [0.0f32; TILE];
    let full = len / TILE * TILE;
    for (i, t) in tail.iter_mut().enumerate().take(len - full) {
        // SAFETY: full + i < len, and x is valid for len elements.
        *t = unsafe { *x.add(full + i) };
    }
    tail
}

/// Calls `$body!(H)` with the group's height as a constant.
macro_rules! with_height {
    ($h:expr, $f:ident :: <$v:ty, $e:ty> ( $($a:expr),* )) => {
        match $h {
            8 => $f::<$v, $e, 8>($($a),*),
            7 => $f::<$v, $e, 7>($($a),*),
            6 => $f::<$v, $e, 6>($($a),*),
            5 => $f::<$v, $e, 5>($($a),*),
            4 => $f::<$v, $e, 4>($($a),*),
            3 => $f::<$v, $e, 3>($($a),*),
            2 => $f::<$v, $e, 2>($($a),*),
            _ => $f::<$v, $e, 1>($($a),*),
        }
    };
}

/// `acc[set][row] += tile . x` for `T` tiles from `tile`; sets break the FMA latency chain.
#[inline(always)]
unsafe fn dots_tiles<V: Vector, E: Element, const H: usize, const T: usize, const SETS: usize>(
    w: *const E,
    x: *const f32,
    acc: &mut [[V; H]; SETS],
) {
    let per = TILE / V::W;
    for t in 0..T {
        for half in 0..per {
            // SAFETY: the caller gives T readable tiles of w and of x.
            unsafe {
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
unsafe fn dots_group_sets<V: Vector, E: Element, const H: usize, const T: usize, const SETS: usize>(
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
            dots_tiles::<V, E, H, T, SETS>(w.add(t * H * TILE), x.add(t * TILE), &mut acc);
            t += T;
        }
        while t < full {
            dots_tiles::<V, E, H, 1, SETS>(w.add(t * H * TILE), x.add(t * TILE), &mut acc);
            t += 1;
        }
        if len % TILE != 0 {
            let tail = padded_tail(x, len);
            dots_tiles::<V, E, H, 1, SETS>(w.add(full * H * TILE), tail.as_ptr(), &mut acc);
        }
        let mut s = acc[0];
        for set in acc.iter().skip(1) {
            for r in 0..H {
                s[r] = s[r].add(set[r]);
            }
        }
        let mut r = 0;
        while r + 4 <= H {
            let four = V::sum4([s[r], s[r + 1], s[r + 2], s[r + 3]]);
            for (i, v) in four.into_iter().enumerate() {
                *out.add(r + i) = v;
            }
            r += 4;
        }
        while r < H {
            *out.add(r) = s[r].sum();
            r += 1;
        }
    }
}

#[inline(always)]
unsafe fn dots_group<V: Vector, E: Element, const H: usize>(
    w: *const E,
    len: usize,
    x: *const f32,
    out: *mut f32,
) {
    // Enough independent chains to hide the FMA latency, within the registers of the ISA.
    // SAFETY: forwarded from the caller.
    unsafe {
        match (V::W, H) {
            (16, 4..) => dots_group_sets::<V, E, H, 2, 2>(w, len, x, out),
            (16, 2..) => dots_group_sets::<V, E, H, 4, 4>(w, len, x, out),
            (16, _) => dots_group_sets::<V, E, H, 8, 8>(w, len, x, out),
            (_, 5..) => dots_group_sets::<V, E, H, 1, 1>(w, len, x, out),
            (_, 3..) => dots_group_sets::<V, E, H, 1, 2>(w, len, x, out),
            (_, 2) => dots_group_sets::<V, E, H, 2, 4>(w, len, x, out),
            (_, _) => dots_group_sets::<V, E, H, 4, 8>(w, len, x, out),
        }
    }
}

/// `out[r] = <row r, x>` for every row.
///
/// # Safety
/// `w` holds `g.stored()` elements, `x` `g.len`, `out` `g.rank`; the ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn dots<V: Vector, E: Element>(w: *const E, g: Geometry, x: *const f32, out: *mut f32) {
    let mut row = 0;
    while row < g.rank {
        let (start, height) = g.group(row);
        // SAFETY: start is a group's first element; height rows of out are left.
        unsafe { with_height!(height, dots_group::<V, E>(w.add(start), g.len, x, out.add(row))) };
        row += height;
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
    // SAFETY: the caller gives a whole group of w, H elements of coef and len writable elements of y.
    unsafe {
        let mut c = [V::splat(0.0); H];
        for (r, c) in c.iter_mut().enumerate() {
            *c = V::splat(*coef.add(r));
        }
        let full = len / TILE;
        for t in 0..full {
            combine_tile::<V, E, H>(w.add(t * H * TILE), &c, y.add(t * TILE), add);
        }
        if len % TILE != 0 {
            let mut tail = if add { padded_tail(y, len) } else { [0.0; TILE] };
            combine_tile::<V, E, H>(w.add(full * H * TILE), &c, tail.as_mut_ptr(), add);
            for i in 0..len - full * TILE {
                *y.add(full * TILE + i) = tail[i];
            }
        }
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
    let mut row = 0;
    while row < g.rank {
        let (start, height) = g.group(row);
        // SAFETY: as in `dots`; y is read only after it was written or when the caller asked to add.
        unsafe { with_height!(height, combine_group::<V, E>(w.add(start), g.len, coef.add(row), y, add)) };
        add = true;
        row += height;
    }
}

#[inline(always)]
unsafe fn rank1_group<V: Vector, E: Element, const H: usize>(
    w: *mut f32,
    len: usize,
    coef: *const f32,
    v: *const f32,
) {
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
        if len % TILE != 0 {
            let tail = padded_tail(v, len);
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
        unsafe { with_height!(height, rank1_group::<V, f32>(w.add(start), g.len, coef.add(row), v)) };
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
        if g.len % TILE != 0 {
            let mut tail = padded_tail(target, g.len);
            loss = fit_tiles::<V, 1>(w, g, u, k, tail.as_mut_ptr(), full, loss);
            for i in 0..g.len - full * TILE {
                *target.add(full * TILE + i) = tail[i];
            }
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
