//! `q6_k`: ql 128 bytes; qh 64; scales 16 x i8; d f16, last. `x = d sc (q - 32)`, a scale per 16 elements.
//!
//! Per half of 128, for l in 0..32: the low nibbles of ql[l] and ql[l + 32] hold elements l and l + 32, the
//! high ones l + 64 and l + 96; qh[l] holds the two top bits of the four, lowest first.

use super::{half_at, nearest, put_half};

const PARTS: usize = 16;
const PART: usize = 16;
/// Below this a part counts as zero.
const EPS: f32 = 1e-15;

/// Sums `w x l` and `w l l` with weights `x^2` under one inverse scale.
#[inline]
fn sums(x: &[f32], inverse: f32) -> (f32, f32) {
    let (mut xl, mut ll) = (0f32, 0f32);
    for &v in x {
        let l = code(v, inverse) as f32;
        let w = v * v;
        xl += w * v * l;
        ll += w * l * l;
    }
    (xl, ll)
}

#[inline]
fn code(v: f32, inverse: f32) -> i32 {
    nearest(inverse * v).clamp(-32, 31)
}

/// Fits one part: codes of the best inverse scale into `codes` (offset by 32), returns the scale.
fn fit(x: &[f32], codes: &mut [u8]) -> f32 {
    let m = x.iter().fold(0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    if m.abs() < EPS {
        codes.fill(0);
        return 0.0;
    }
    let mut chosen = -32.0 / m;
    let (xl, ll) = sums(x, chosen);
    let mut scale = if ll == 0.0 { 0.0 } else { xl / ll };
    let mut best = scale * xl;
    for step in (-9..=9).filter(|&s| s != 0) {
        let inverse = -(32.0 + 0.1 * step as f32) / m;
        let (xl, ll) = sums(x, inverse);
        if ll > 0.0 && xl * xl > best * ll {
            scale = xl / ll;
            best = scale * xl;
            chosen = inverse;
        }
    }
    for (c, &v) in codes.iter_mut().zip(x) {
        *c = (code(v, chosen) + 32) as u8;
    }
    scale
}

pub(super) fn quantize(x: &[f32], out: &mut [u8]) {
    let mut codes = [0u8; PARTS * PART];
    let mut fitted = [0f32; PARTS];
    let mut largest = 0f32;
    for (j, (x, c)) in x.chunks_exact(PART).zip(codes.chunks_exact_mut(PART)).enumerate() {
        fitted[j] = fit(x, c);
        largest = if fitted[j].abs() > largest.abs() { fitted[j] } else { largest };
    }
    if largest.abs() < EPS {
        out.fill(0);
        return;
    }
    let inverse = -128.0 / largest;
    let d = put_half(out, 208, 1.0 / inverse);
    for j in 0..PARTS {
        let scale = nearest(inverse * fitted[j]).min(127) as i8;
        out[192 + j] = scale as u8;
        let scale = d * f32::from(scale);
        // A scale that rounds to zero keeps the codes of the search.
        if scale == 0.0 {
            continue;
        }
        for i in j * PART..(j + 1) * PART {
            codes[i] = (nearest(x[i] / scale).clamp(-32, 31) + 32) as u8;
        }
    }
    for (half, c) in codes.chunks_exact(128).enumerate() {
        let (ql, qh) = (64 * half, 128 + 32 * half);
        for l in 0..32 {
            let (a, b, c, d) = (c[l], c[l + 32], c[l + 64], c[l + 96]);
            out[ql + l] = (a & 15) | (c & 15) << 4;
            out[ql + l + 32] = (b & 15) | (d & 15) << 4;
            out[qh + l] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6;
        }
    }
}

pub(super) fn dequantize(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (half, y) in out.chunks_exact_mut(128).enumerate() {
        let (ql, qh) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
        let scales = &block[192 + 8 * half..][..8];
        for l in 0..32 {
            let q = [
                ql[l] & 15 | (qh[l] & 3) << 4,
                ql[l + 32] & 15 | (qh[l] >> 2 & 3) << 4,
                ql[l] >> 4 | (qh[l] >> 4 & 3) << 4,
                ql[l + 32] >> 4 | (qh[l] >> 6) << 4,
            ];
            for (k, q) in q.into_iter().enumerate() {
                let scale = d * f32::from(scales[2 * k + l / 16] as i8);
                y[32 * k + l] = scale * (f32::from(q) - 32.0);
            }
        }
    }
}
