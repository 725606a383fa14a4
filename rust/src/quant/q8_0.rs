//! `q8_0`: d f16; 32 codes of 8 bits. `x = d q`.

use super::{half_at, inverse, put_half, truncate};

pub(super) fn quantize(x: &[f32], out: &mut [u8]) {
    let largest = x.iter().fold(0f32, |m, v| if v.abs() > m { v.abs() } else { m });
    // Codes use the scale before it is rounded to f16.
    let d = largest / 127.0;
    let id = inverse(d);
    put_half(out, 0, d);
    for (q, &v) in out[2..34].iter_mut().zip(x) {
        *q = truncate((v * id).round()) as u8;
    }
}

pub(super) fn dequantize(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (y, &q) in out.iter_mut().zip(&block[2..34]) {
        *y = f32::from(q as i8) * d;
    }
}
