//! Plain loops over slices, compiled once per ISA (the compiler vectorises them inside the ISA's wrappers).

use super::TILE;
use super::geometry::Geometry;

/// `<a, b>` with 16 independent f32 partial sums.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; 16];
    let (ca, cb) = (a.chunks_exact(16), b.chunks_exact(16));
    let mut tail = 0.0;
    for (x, y) in ca.remainder().iter().zip(cb.remainder()) {
        tail += x * y;
    }
    for (x, y) in ca.zip(cb) {
        for i in 0..16 {
            acc[i] = x[i].mul_add(y[i], acc[i]);
        }
    }
    acc.iter().sum::<f32>() + tail
}

/// `y += c x`.
#[inline(always)]
pub(crate) fn axpy(c: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(c, *y);
    }
}

/// `y = c y`.
#[inline(always)]
pub(crate) fn scale(c: f32, y: &mut [f32]) {
    for y in y {
        *y *= c;
    }
}

/// `w += c g` and `g = 0`, in one pass.
#[inline(always)]
pub(crate) fn step_and_clear(c: f32, g: &mut [f32], w: &mut [f32]) {
    for (w, g) in w.iter_mut().zip(g) {
        *w = g.mul_add(c, *w);
        *g = 0.0;
    }
}

/// Whether every element is finite.
#[inline(always)]
pub(crate) fn all_finite(x: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let mut bad = 0u32;
    for v in x {
        bad |= u32::from(v.to_bits() & EXPONENT == EXPONENT);
    }
    bad == 0
}

/// Columns of P whose sums stay in registers.
const BLOCK: usize = 8;

/// `BLOCK` columns of `p^T u` from column `from` on, with four sets of sums to hide the latency.
#[inline(always)]
fn columns(p: &[f64], r: usize, u: &[f32], from: usize) -> [f64; BLOCK] {
    let mut acc = [[0.0f64; BLOCK]; 4];
    let (rows, us) = (p.chunks_exact(4 * r), u.chunks_exact(4));
    let (last_rows, last_us) = (rows.remainder().chunks_exact(r), us.remainder());
    for (rows, us) in rows.zip(us) {
        for (q, acc) in acc.iter_mut().enumerate() {
            let (row, u) = (&rows[q * r + from..q * r + from + BLOCK], f64::from(us[q]));
            for (acc, p) in acc.iter_mut().zip(row) {
                *acc = p.mul_add(u, *acc);
            }
        }
    }
    for (row, &u) in last_rows.zip(last_us) {
        for (acc, p) in acc[0].iter_mut().zip(&row[from..from + BLOCK]) {
            *acc = p.mul_add(f64::from(u), *acc);
        }
    }
    std::array::from_fn(|i| (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]))
}

/// One step of recursive least squares on the inverse correlation P (row-major, r x r, f64):
/// `Pu = P u`, `k = Pu / (phi + u.Pu)`, `P = (P - Pu Pu^T / (phi + u.Pu)) / phi`. Returns `u.k`.
/// P stays exactly symmetric, because `pu[i] * pu[j]` commutes.
#[inline(always)]
pub(crate) fn rls_gain(p: &mut [f64], u: &[f32], phi: f64, pu: &mut [f64], k: &mut [f32]) -> f64 {
    let r = u.len();
    let mut blocks = pu.chunks_exact_mut(BLOCK);
    for (i, block) in (&mut blocks).enumerate() {
        block.copy_from_slice(&columns(p, r, u, i * BLOCK));
    }
    for (i, pu) in blocks.into_remainder().iter_mut().enumerate() {
        let column = r - r % BLOCK + i;
        *pu = p.chunks_exact(r).zip(u).map(|(row, &u)| row[column] * f64::from(u)).sum();
    }
    let upu: f64 = pu.iter().zip(u).map(|(p, &u)| p * f64::from(u)).sum();
    let inv = 1.0 / (phi + upu);
    for (k, pu) in k.iter_mut().zip(pu.iter()) {
        *k = (pu * inv) as f32;
    }
    let (forget, shrink) = (1.0 / phi, -inv / phi);
    let pu: &[f64] = pu;
    for (row, &pi) in p.chunks_exact_mut(r).zip(pu) {
        for (p, pj) in row.iter_mut().zip(pu.iter()) {
            *p = (pi * pj).mul_add(shrink, *p * forget);
        }
    }
    upu * inv
}

/// `out = x x`.
#[inline(always)]
pub(crate) fn squares(x: &[f32], out: &mut [f32]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o = x * x;
    }
}

/// `out = a b`.
#[inline(always)]
pub(crate) fn products(a: &[f32], b: &[f32], out: &mut [f32]) {
    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
        *o = a * b;
    }
}

/// `g += c f (w - anchor)`: the gradient of a quadratic penalty with a diagonal importance.
#[inline(always)]
pub(crate) fn pull(c: f32, f: &[f32], w: &[f32], anchor: &[f32], g: &mut [f32]) {
    for (((g, f), w), t) in g.iter_mut().zip(f).zip(w).zip(anchor) {
        *g = (c * f).mul_add(w - t, *g);
    }
}

/// Row-major `first = (w - th) d` and `second = th d` of two packed factors, with one weight per column;
/// `swap` gives `first = w d` and `second = (w - th) d`.
#[inline(always)]
pub(crate) fn moved_rows(
    g: Geometry,
    [w, th]: [&[f32]; 2],
    d: &[f32],
    [first, second]: [&mut [f32]; 2],
    swap: bool,
) {
    for r in 0..g.rank {
        for t in 0..g.tiles() {
            let (at, column) = (g.at(r, t), t * TILE);
            let n = TILE.min(g.len - column);
            let (w, th, d) = (&w[at..at + n], &th[at..at + n], &d[column..column + n]);
            let to = r * g.len + column;
            let (first, second) = (&mut first[to..to + n], &mut second[to..to + n]);
            for i in 0..n {
                let moved = (w[i] - th[i]) * d[i];
                let (a, b) = if swap { (w[i] * d[i], moved) } else { (moved, th[i] * d[i]) };
                (first[i], second[i]) = (a, b);
            }
        }
    }
}

/// Numbers of one AdamW step, the same for every weight.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Factor that makes the gradient sum a (clipped) mean.
    pub gradient: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `1 - lr weight_decay`.
    pub keep: f32,
    /// `lr / (1 - beta1^t)`.
    pub rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    pub unbias: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

/// One AdamW step (Loshchilov and Hutter, arXiv 1711.05101) in one pass; the gradient sum is cleared.
#[inline(always)]
pub(crate) fn adamw(s: &AdamStep, g: &mut [f32], m: &mut [f32], v: &mut [f32], w: &mut [f32]) {
    let (left1, left2) = (1.0 - s.beta1, 1.0 - s.beta2);
    for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
        let d = s.gradient * *g;
        *m = (d - *m).mul_add(left1, *m);
        *v = (d * d).mul_add(left2, s.beta2 * *v);
        let root = v.sqrt().mul_add(s.unbias, s.eps);
        *w = s.keep.mul_add(*w, -s.rate * *m / root);
        *g = 0.0;
    }
}

/// One step with momentum as torch's SGD: `m = beta m + d + wd w`, `w -= lr m`; the gradient sum is cleared.
#[inline(always)]
pub(crate) fn momentum([gradient, beta, decay, lr]: [f32; 4], g: &mut [f32], m: &mut [f32], w: &mut [f32]) {
    for ((w, g), m) in w.iter_mut().zip(g).zip(m) {
        let d = gradient.mul_add(*g, decay * *w);
        *m = beta.mul_add(*m, d);
        *w = (-lr).mul_add(*m, *w);
        *g = 0.0;
    }
}
