//! `q4_0`: d f16; 16 bytes, element j in the low and j + 16 in the high nibble. `x = d (q - 8)`.

use super::{half_at, inverse, put_half, truncate};

pub(super) fn quantize(x: &[f32], out: &mut [u8]) {
    // The number of largest magnitude, the first of them: it becomes code 0.
    let m = x.iter().fold(0f32, |m, &v| if m.abs() < v.abs() { v } else { m });
    let d = m / -8.0;
    let id = inverse(d);
    put_half(out, 0, d);
    let code = |v: f32| i32::from(truncate(v * id + 8.5) as i8).min(15) as u8;
    for j in 0..16 {
        out[2 + j] = code(x[j]) | code(x[j + 16]) << 4;
    }
}

pub(super) fn dequantize(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for j in 0..16 {
        let q = block[2 + j];
        out[j] = (f32::from(q & 15) - 8.0) * d;
        out[j + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}
