//! Block-quantised numbers in the layouts of ggml: codecs whose bytes are llama.cpp's, in safe Rust.
//!
//! One file per type, one row each in [`BLOCKS`]. Arithmetic is f32 in element order without contraction, as in
//! a build of ggml that has no FMA: the searches then take the same steps and give the same bytes.

mod adapter;
mod blocks;
mod layer;
mod matrix;
mod min_scale;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_k;
mod q6_k;
mod q8_0;
pub mod types;

pub use adapter::{QuantAdapter, SideTypes};
pub use blocks::{check_blocks, check_finite, dequantize_rows, quantize_rows};
pub use layer::{QuantLayer, Side, SideType};
pub use matrix::QuantMatrix;
pub use min_scale::{pack_scales, unpack_scales};
pub use types::{BLOCKS, BlockRow, BlockType};

use half::f16;

/// The f16 at byte `at`, widened.
#[inline]
pub fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Writes `v` at byte `at`, rounded to the nearest f16 (ties to even), and reads it back.
#[inline]
fn put_half(block: &mut [u8], at: usize, v: f32) -> f32 {
    let h = f16::from_f32(v);
    block[at..at + 2].copy_from_slice(&h.to_le_bytes());
    h.to_f32()
}

/// Nearest integer, ties to even, through the mantissa of a large float; defined for every bit pattern.
#[inline]
fn nearest(v: f32) -> i32 {
    (((v + 12_582_912.0).to_bits() & 0x007f_ffff) as i32) - 0x0040_0000
}

/// Truncation as x86 does it: what does not fit (an infinite quotient of subnormals) gives `i32::MIN`.
#[inline]
fn truncate(v: f32) -> i32 {
    if v > -2_147_483_904.0 && v < 2_147_483_648.0 { v as i32 } else { i32::MIN }
}

/// `1 / d`, and zero for a zero of either sign.
#[inline]
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}
