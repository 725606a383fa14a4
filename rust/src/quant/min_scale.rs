//! What `q4_k` and `q5_k` share: eight parts of 32 with a scale and a minimum of 6 bits each, and their search.

use super::{half_at, nearest, put_half};

const PARTS: usize = 8;
const PART: usize = 32;

/// The search for the scale and minimum of one part.
pub(super) struct Search {
    /// Largest code.
    pub top: i32,
    /// Where the steps of the inverse scale start, relative to `top`.
    pub start: f32,
    /// Steps after the first, each 0.1.
    pub steps: i32,
}

/// Packs eight scales and eight minima of 6 bits into 12 bytes.
///
/// The first four of each lie in the low bits of bytes 0 to 3 and 4 to 7, the rest in the nibbles of bytes 8 to
/// 11 and the two top bits of bytes 0 to 7.
pub fn pack_scales(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    let mut out = [0; 12];
    for j in 0..4 {
        out[j] = scales[j] | (scales[j + 4] >> 4) << 6;
        out[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6;
        out[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4;
    }
    out
}

/// The eight scales and eight minima of 12 packed bytes.
#[inline]
pub fn unpack_scales(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for j in 0..4 {
        scales[j] = packed[j] & 63;
        mins[j] = packed[j + 4] & 63;
        scales[j + 4] = (packed[j + 8] & 15) | (packed[j] >> 6) << 4;
        mins[j + 4] = (packed[j + 8] >> 4) | (packed[j + 4] >> 6) << 4;
    }
    (scales, mins)
}

/// `d`, `dmin` and the products `d sc`, `dmin m` of the eight parts.
#[inline]
pub(super) fn products(block: &[u8]) -> ([f32; PARTS], [f32; PARTS]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, mins) = unpack_scales(block[4..16].try_into().expect("12 bytes"));
    (scales.map(|s| d * f32::from(s)), mins.map(|m| dmin * f32::from(m)))
}

/// Fits one part: codes into `codes`, returns scale and minimum (the latter as what is subtracted).
///
/// Weighted least squares over candidate inverse scales; the first is the plain one.
fn fit(s: &Search, x: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let mut squares = 0f32;
    for v in x {
        squares += v * v;
    }
    let mean = (squares / PART as f32).sqrt();
    let mut weights = [0f32; PART];
    for (w, v) in weights.iter_mut().zip(x) {
        *w = mean + v.abs();
    }
    let (mut low, mut high) = (x[0], x[0]);
    let mut sum_w = weights[0];
    let mut sum_x = sum_w * x[0];
    for (&v, &w) in x.iter().zip(&weights).skip(1) {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
        sum_w += w;
        sum_x += w * v;
    }
    if low > 0.0 {
        low = 0.0;
    }
    if high == low {
        codes.fill(0);
        return (0.0, -low);
    }
    let inverse = s.top as f32 / (high - low);
    let mut scale = 1.0 / inverse;
    let mut best = 0f32;
    for ((&v, &w), c) in x.iter().zip(&weights).zip(codes.iter_mut()) {
        let l = nearest(inverse * (v - low)).clamp(0, s.top);
        *c = l as u8;
        let off = scale * l as f32 + low - v;
        best += w * (off * off);
    }
    let mut tried = [0f32; PART];
    for step in 0..=s.steps {
        // `low` is the best minimum so far, not the smallest number: the search moves with its own success.
        let inverse = (s.start + 0.1 * step as f32 + s.top as f32) / (high - low);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0f32, 0f32, 0f32);
        for ((&v, &w), t) in x.iter().zip(&weights).zip(tried.iter_mut()) {
            let l = nearest(inverse * (v - low)).clamp(0, s.top) as f32;
            *t = l;
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * v;
        }
        let det = sum_w * sum_l2 - sum_l * sum_l;
        if !(det > 0.0) {
            continue;
        }
        let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / det;
        let mut this_low = (sum_l2 * sum_x - sum_l * sum_xl) / det;
        if this_low > 0.0 {
            this_low = 0.0;
            this_scale = sum_xl / sum_l2;
        }
        let mut error = 0f32;
        for ((&v, &w), &l) in x.iter().zip(&weights).zip(&tried) {
            let off = this_scale * l + this_low - v;
            error += w * (off * off);
        }
        if error < best {
            for (c, &l) in codes.iter_mut().zip(&tried) {
                *c = l as u8;
            }
            (best, scale, low) = (error, this_scale, this_low);
        }
    }
    (scale, -low)
}

/// Writes `d`, `dmin` and the packed scales (16 bytes), and returns the 256 codes under the stored values.
pub(super) fn quantize(s: &Search, x: &[f32], head: &mut [u8]) -> [u8; PARTS * PART] {
    let mut codes = [0u8; PARTS * PART];
    let (mut scales, mut mins) = ([0f32; PARTS], [0f32; PARTS]);
    let (mut max_scale, mut max_min) = (0f32, 0f32);
    for j in 0..PARTS {
        let at = j * PART..(j + 1) * PART;
        (scales[j], mins[j]) = fit(s, &x[at.clone()], &mut codes[at]);
        max_scale = if scales[j] > max_scale { scales[j] } else { max_scale };
        max_min = if mins[j] > max_min { mins[j] } else { max_min };
    }
    let six_bits = |values: [f32; PARTS], max: f32| {
        let inverse = if max > 0.0 { 63.0 / max } else { 0.0 };
        values.map(|v| (nearest(inverse * v) as u8).min(63))
    };
    let packed = pack_scales(&six_bits(scales, max_scale), &six_bits(mins, max_min));
    put_half(head, 0, max_scale / 63.0);
    put_half(head, 2, max_min / 63.0);
    head[4..16].copy_from_slice(&packed);
    let (scales, mins) = products(head);
    for j in 0..PARTS {
        // A scale that rounds to zero keeps the codes of the search.
        if scales[j] == 0.0 {
            continue;
        }
        for i in j * PART..(j + 1) * PART {
            codes[i] = nearest((x[i] + mins[j]) / scales[j]).clamp(0, s.top) as u8;
        }
    }
    codes
}
