//! `q5_k`: d f16; dmin f16; 12 bytes of scales; qh 32 bytes (bit j: fifth bit of part j); 128 bytes of nibbles
//! as in `q4_k`. `x = d sc q - dmin m`.

use super::min_scale::{self, Search};

const SEARCH: Search = Search { top: 31, start: -0.5, steps: 15 };

pub(super) fn quantize(x: &[f32], out: &mut [u8]) {
    let (head, rest) = out.split_at_mut(16);
    let (qh, qs) = rest.split_at_mut(32);
    let codes = min_scale::quantize(&SEARCH, x, head);
    qh.fill(0);
    for (j, (q, c)) in qs.chunks_exact_mut(32).zip(codes.chunks_exact(64)).enumerate() {
        for l in 0..32 {
            q[l] = (c[l] & 15) | c[l + 32] << 4;
            qh[l] |= (c[l] >> 4) << (2 * j) | (c[l + 32] >> 4) << (2 * j + 1);
        }
    }
}

pub(super) fn dequantize(block: &[u8], out: &mut [f32]) {
    let (scales, mins) = min_scale::products(block);
    let qh = &block[16..48];
    for (j, (q, y)) in block[48..176].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        for l in 0..32 {
            let (low, high) = (qh[l] >> (2 * j) & 1, qh[l] >> (2 * j + 1) & 1);
            y[l] = scales[2 * j] * f32::from(q[l] & 15 | low << 4) - mins[2 * j];
            y[l + 32] = scales[2 * j + 1] * f32::from(q[l] >> 4 | high << 4) - mins[2 * j + 1];
        }
    }
}
