//! Plain loops over slices, compiled once per ISA (the compiler vectorises them inside the ISA's wrappers).

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

/// One step of recursive least squares on the inverse correlation P (row-major, r x r, f64):
/// `Pu = P u`, `k = Pu / (phi + u.Pu)`, `P = (P - Pu Pu^T / (phi + u.Pu)) / phi`. Returns `u.k`.
/// P stays exactly symmetric, because `pu[i] * pu[j]` commutes.
#[inline(always)]
pub(crate) fn rls_gain(p: &mut [f64], u: &[f32], phi: f64, pu: &mut [f64], k: &mut [f32]) -> f64 {
    let r = u.len();
    pu.fill(0.0);
    for (row, &u) in p.chunks_exact(r).zip(u) {
        let u = f64::from(u);
        for (pu, p) in pu.iter_mut().zip(row) {
            *pu = p.mul_add(u, *pu);
        }
    }
    let upu: f64 = pu.iter().zip(u).map(|(p, &u)| p * f64::from(u)).sum();
    let inv = 1.0 / (phi + upu);
    for (k, pu) in k.iter_mut().zip(pu.iter()) {
        *k = (pu * inv) as f32;
    }
    let forget = 1.0 / phi;
    for (i, row) in p.chunks_exact_mut(r).enumerate() {
        let pi = pu[i];
        for (p, pj) in row.iter_mut().zip(pu.iter()) {
            *p = (*p - pi * pj * inv) * forget;
        }
    }
    upu * inv
}
