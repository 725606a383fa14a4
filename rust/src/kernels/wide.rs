//! f32 rows in f64 arithmetic: inner products of all pairs of rows, and combinations of rows.
//!
//! Eight lanes and one order of additions whatever the ISA, so that a merge gives the same bits everywhere.

use super::vector::{Eight, Vector};

/// Lanes of [`Eight`].
const W: usize = 8;
/// Columns between two sums into the result: rows of a block stay in L1.
const CHUNK: usize = 1024;

/// `out[i][j] += <x_i, y_j>` for `R` x `C` rows over `n` columns, `n` a multiple of 8; rows lie `ld` apart.
#[inline(always)]
unsafe fn block<V: Vector, const R: usize, const C: usize>(
    x: [*const f32; R],
    y: [*const f32; C],
    n: usize,
    out: &mut [[f64; C]; R],
) {
    // SAFETY: the caller gives n readable elements behind every pointer.
    unsafe {
        let mut acc = [[V::Wide::splat(0.0); C]; R];
        let mut t = 0;
        while t < n {
            let mut b = [V::Wide::splat(0.0); C];
            for (b, y) in b.iter_mut().zip(y) {
                *b = V::Wide::load(y.add(t));
            }
            for (acc, x) in acc.iter_mut().zip(x) {
                let a = V::Wide::load(x.add(t));
                for (acc, b) in acc.iter_mut().zip(b) {
                    *acc = a.add_exact_product(b, *acc);
                }
            }
            t += W;
        }
        for (out, acc) in out.iter_mut().zip(acc) {
            for (out, acc) in out.iter_mut().zip(acc) {
                *out += acc.sum();
            }
        }
    }
}

/// Pairs of `R` rows of x and `C` rows of y over columns `from..to`.
#[inline(always)]
unsafe fn pairs<V: Vector, const R: usize, const C: usize>(
    x: &[f32],
    y: &[f32],
    n: usize,
    [i, j]: [usize; 2],
    [from, to]: [usize; 2],
) -> [[f64; C]; R] {
    let mut out = [[0.0; C]; R];
    let full = (to - from) / W * W;
    // SAFETY: rows i..i + R of x and j..j + C of y have n columns each, and from <= to <= n.
    unsafe {
        let at = |m: &[f32], row: usize| m.as_ptr().add(row * n + from);
        let xs: [*const f32; R] = std::array::from_fn(|r| at(x, i + r));
        let ys: [*const f32; C] = std::array::from_fn(|c| at(y, j + c));
        block::<V, R, C>(xs, ys, full, &mut out);
        let rest = to - from - full;
        if rest > 0 {
            let tail = |p: *const f32| {
                let mut t = [0.0f32; W];
                t[..rest].copy_from_slice(std::slice::from_raw_parts(p.add(full), rest));
                t
            };
            let (tx, ty): ([[f32; W]; R], [[f32; W]; C]) = (xs.map(tail), ys.map(tail));
            block::<V, R, C>(
                std::array::from_fn(|r| tx[r].as_ptr()),
                std::array::from_fn(|c| ty[c].as_ptr()),
                W,
                &mut out,
            );
        }
    }
    out
}

/// `out[i * q + j] = <x_i, y_j>` in f64 for the rows of x (`p` of them) and y (`q`), `n` columns each.
/// With `symmetric` x and y are the same, and only half is computed.
///
/// # Safety
/// The ISA of `V` is present; lengths are as said.
#[inline(always)]
pub(crate) unsafe fn products_of_rows<V: Vector>(
    x: &[f32],
    y: &[f32],
    n: usize,
    out: &mut [f64],
    symmetric: bool,
) {
    let (p, q) = (x.len() / n, y.len() / n);
    out.fill(0.0);
    let size = if V::W == 16 { 4 } else { 2 };
    let mut from = 0;
    while from < n {
        let span = [from, (from + CHUNK).min(n)];
        let mut i = 0;
        while i < p {
            let rows = (p - i).min(size);
            let last = if symmetric { (i + rows).min(q) } else { q };
            let mut j = 0;
            while j < last {
                // SAFETY: the block's rows exist: i + rows <= p, j + columns <= q.
                unsafe {
                    if rows == 4 && j + 4 <= q {
                        add::<4, 4>(out, q, [i, j], pairs::<V, 4, 4>(x, y, n, [i, j], span));
                        j += 4;
                    } else if rows >= 2 && j + 2 <= q {
                        for r in (0..rows).step_by(2) {
                            let at = [i + r, j];
                            if r + 2 <= rows {
                                add::<2, 2>(out, q, at, pairs::<V, 2, 2>(x, y, n, at, span));
                            } else {
                                add::<1, 2>(out, q, at, pairs::<V, 1, 2>(x, y, n, at, span));
                            }
                        }
                        j += 2;
                    } else {
                        for r in 0..rows {
                            let at = [i + r, j];
                            add::<1, 1>(out, q, at, pairs::<V, 1, 1>(x, y, n, at, span));
                        }
                        j += 1;
                    }
                }
            }
            i += rows;
        }
        from = span[1];
    }
    if symmetric {
        for i in 0..p {
            for j in i + 1..q {
                out[i * q + j] = out[j * q + i];
            }
        }
    }
}

#[inline(always)]
fn add<const R: usize, const C: usize>(out: &mut [f64], q: usize, [i, j]: [usize; 2], part: [[f64; C]; R]) {
    for (r, part) in part.iter().enumerate() {
        for (c, v) in part.iter().enumerate() {
            out[(i + r) * q + j + c] += v;
        }
    }
}

/// `R` rows of the result over the `C` registers of columns that start at `t`.
#[inline(always)]
unsafe fn mix_block<V: Vector, const R: usize, const C: usize>(
    coef: [&[f64]; R],
    m: *const f32,
    ld: usize,
    out: [*mut f32; R],
) {
    // SAFETY: the caller gives coef[r].len() rows of C registers at m, ld apart, and as many columns in out.
    unsafe {
        let mut acc = [[V::Wide::splat(0.0); C]; R];
        for q in 0..coef[0].len() {
            let mut v = [V::Wide::splat(0.0); C];
            for (c, v) in v.iter_mut().enumerate() {
                *v = V::Wide::load(m.add(q * ld + c * W));
            }
            for (acc, coef) in acc.iter_mut().zip(coef) {
                let s = V::Wide::splat(coef[q]);
                for (acc, v) in acc.iter_mut().zip(v) {
                    *acc = v.fma(s, *acc);
                }
            }
        }
        for (acc, out) in acc.iter().zip(out) {
            for (c, acc) in acc.iter().enumerate() {
                acc.store(out.add(c * W));
            }
        }
    }
}

/// `out_i = sum_q coef[i][q] m_q`, f64 inside, rounded once: rows of `n` columns, `coef` is `(rows of out, k)`.
///
/// # Safety
/// The ISA of `V` is present; lengths are as said.
#[inline(always)]
pub(crate) unsafe fn mix_rows<V: Vector>(coef: &[f64], k: usize, m: &[f32], n: usize, out: &mut [f32]) {
    let rows = out.len() / n;
    let (size, wide) = if V::W == 16 { (4, 4) } else { (2, 2) };
    let mut t = 0;
    while t < n {
        let left = n - t;
        let mut tail = Vec::new();
        // SAFETY: columns t.. of the rows of m; a partial register goes through a padded copy.
        let (from, ld, registers) = unsafe {
            if left >= W {
                (m.as_ptr().add(t), n, (left / W).min(wide))
            } else {
                tail.resize(k * W, 0.0f32);
                for (row, to) in m.chunks_exact(n).zip(tail.chunks_exact_mut(W)) {
                    to[..left].copy_from_slice(&row[t..]);
                }
                (tail.as_ptr(), W, 1)
            }
        };
        let registers = if registers == wide { wide } else { 1 };
        let mut i = 0;
        while i < rows {
            let height = if rows - i >= size { size } else { 1 };
            let mut last = [[0.0f32; W]; 4];
            let whole = left >= W;
            // SAFETY: i + height <= rows; whole registers lie in out, the partial one in `last`.
            unsafe {
                let base = out.as_mut_ptr();
                let scratch = last.as_mut_ptr().cast::<f32>();
                let to = |r: usize| if whole { base.add((i + r) * n + t) } else { scratch.add(r * W) };
                let c = |r: usize| &coef[(i + r) * k..(i + r + 1) * k];
                match (height, registers) {
                    (4, 4) => {
                        mix_block::<V, 4, 4>([c(0), c(1), c(2), c(3)], from, ld, [to(0), to(1), to(2), to(3)])
                    }
                    (4, _) => {
                        mix_block::<V, 4, 1>([c(0), c(1), c(2), c(3)], from, ld, [to(0), to(1), to(2), to(3)])
                    }
                    (2, 2) => mix_block::<V, 2, 2>([c(0), c(1)], from, ld, [to(0), to(1)]),
                    (2, _) => mix_block::<V, 2, 1>([c(0), c(1)], from, ld, [to(0), to(1)]),
                    (_, 4) => mix_block::<V, 1, 4>([c(0)], from, ld, [to(0)]),
                    (_, 2) => mix_block::<V, 1, 2>([c(0)], from, ld, [to(0)]),
                    _ => mix_block::<V, 1, 1>([c(0)], from, ld, [to(0)]),
                }
            }
            if !whole {
                for r in 0..height {
                    out[(i + r) * n + t..(i + r + 1) * n].copy_from_slice(&last[r][..left]);
                }
            }
            i += height;
        }
        t += if left >= W { registers * W } else { left };
    }
}
