//! `q4_k`: d f16; dmin f16; 12 bytes of scales; 128 bytes, per 64 elements the first 32 in the low nibbles and
//! the next 32 in the high ones. `x = d sc q - dmin m`.

use super::min_scale::{self, Search};

const SEARCH: Search = Search { top: 15, start: -1.0, steps: 20 };

pub(super) fn quantize(x: &[f32], out: &mut [u8]) {
    let (head, qs) = out.split_at_mut(16);
    let codes = min_scale::quantize(&SEARCH, x, head);
    for (q, c) in qs.chunks_exact_mut(32).zip(codes.chunks_exact(64)) {
        for l in 0..32 {
            q[l] = c[l] | c[l + 32] << 4;
        }
    }
}

pub(super) fn dequantize(block: &[u8], out: &mut [f32]) {
    let (scales, mins) = min_scale::products(block);
    for (j, (q, y)) in block[16..144].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        for l in 0..32 {
            y[l] = scales[2 * j] * f32::from(q[l] & 15) - mins[2 * j];
            y[l + 32] = scales[2 * j + 1] * f32::from(q[l] >> 4) - mins[2 * j + 1];
        }
    }
}
