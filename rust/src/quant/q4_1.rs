//! `q4_1`: d f16; m f16; 16 bytes, element j in the low and j + 16 in the high nibble. `x = d q + m`.

use super::{half_at, inverse, put_half, truncate};

pub(super) fn quantize(x: &[f32], out: &mut [u8]) {
    let (mut low, mut high) = (f32::MAX, -f32::MAX);
    for &v in x {
        low = if v < low { v } else { low };
        high = if v > high { v } else { high };
    }
    let d = (high - low) / 15.0;
    let id = inverse(d);
    put_half(out, 0, d);
    put_half(out, 2, low);
    let code = |v: f32| i32::from(truncate((v - low) * id + 0.5) as i8).min(15) as u8;
    for j in 0..16 {
        out[4 + j] = code(x[j]) | code(x[j + 16]) << 4;
    }
}

pub(super) fn dequantize(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for j in 0..16 {
        let q = block[4 + j];
        out[j] = f32::from(q & 15) * d + m;
        out[j + 16] = f32::from(q >> 4) * d + m;
    }
}
