//! The definition: eight independent f32 sums in plain Rust. Compiles on every architecture.

use half::{bf16, f16};

use super::vector::{Bytes32, Eight, Vector};

/// Eight lanes as an array.
#[derive(Clone, Copy)]
pub(crate) struct F32x8([f32; 8]);

// SAFETY: plain loads and stores of 8 elements, as the trait asks of the caller; no ISA is needed.
unsafe impl Vector for F32x8 {
    const W: usize = 8;
    const FUSED: bool = false;
    type Wide = F64x8;
    type Bytes = U8x32;
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        F32x8([v; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: 8 readable elements, by contract.
        F32x8(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: 8 readable elements, by contract.
        F32x8(unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|b| f16::from_bits(b).to_f32_const()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: 8 readable elements, by contract.
        F32x8(unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|b| bf16::from_bits(b).to_f32_const()))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: 8 readable bytes, by contract.
        F32x8(unsafe { p.cast::<[i8; 8]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_plane(p: *const u8, i: usize) -> Self {
        // SAFETY: 32 readable bytes, by contract.
        let b = unsafe { p.cast::<[i8; 32]>().read_unaligned() };
        F32x8(std::array::from_fn(|l| f32::from(b[4 * l + i]) * 16_777_216.0))
    }
    #[inline(always)]
    unsafe fn widen(b: U8x32, i: usize) -> Self {
        F32x8(std::array::from_fn(|l| f32::from(b.0[8 * i + l] as i8)))
    }
    #[inline(always)]
    unsafe fn halves(p: *const u8) -> [f32; 8] {
        // SAFETY: 16 readable bytes, by contract.
        unsafe { Self::load_f16(p.cast()).0 }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: 8 writable elements, by contract.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // Multiply then add: without FMA hardware a fused call would go through libm.
        F32x8(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        F32x8(std::array::from_fn(|i| self.0[i] + b.0[i]))
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        F32x8(std::array::from_fn(|i| self.0[i] - b.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        F32x8(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let a = self.0;
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: `sum` reads registers only.
        v.map(|v| unsafe { v.sum() })
    }
    #[inline(always)]
    unsafe fn sum8(v: [Self; 8]) -> [f32; 8] {
        // SAFETY: `sum` reads registers only.
        v.map(|v| unsafe { v.sum() })
    }
    #[inline(always)]
    unsafe fn sum16(v: [Self; 16]) -> [f32; 16] {
        // SAFETY: `sum` reads registers only.
        v.map(|v| unsafe { v.sum() })
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

/// Eight f64 lanes as an array.
#[derive(Clone, Copy)]
pub(crate) struct F64x8([f64; 8]);

// SAFETY: plain loads and stores of 8 elements, as the trait asks of the caller; no ISA is needed.
unsafe impl Eight for F64x8 {
    #[inline(always)]
    unsafe fn splat(v: f64) -> Self {
        F64x8([v; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: 8 readable elements, by contract.
        F64x8(unsafe { p.cast::<[f32; 8]>().read_unaligned() }.map(f64::from))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: 8 writable elements, by contract.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(self.0.map(|v| v as f32)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // One rounding as on the other ISAs, even where it goes through libm.
        F64x8(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn add_exact_product(self, b: Self, c: Self) -> Self {
        F64x8(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn lanes(self) -> [f64; 8] {
        self.0
    }
}

/// Thirty-two bytes as an array.
#[derive(Clone, Copy)]
pub(crate) struct U8x32([u8; 32]);

// SAFETY: plain loads of as many bytes as the trait asks of the caller; no ISA is needed.
unsafe impl Bytes32 for U8x32 {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: 32 readable bytes, by contract.
        U8x32(unsafe { p.cast::<[u8; 32]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_nibbles(p: *const u8) -> Self {
        // SAFETY: 16 readable bytes, by contract.
        let b = unsafe { p.cast::<[u8; 16]>().read_unaligned() };
        U8x32(std::array::from_fn(|i| if i < 16 { b[i] & 15 } else { b[i - 16] >> 4 }))
    }
    #[inline(always)]
    unsafe fn down<const N: i32>(self, mask: u8) -> Self {
        U8x32(self.0.map(|b| b >> N & mask))
    }
    #[inline(always)]
    unsafe fn up<const N: i32>(self, mask: u8) -> Self {
        U8x32(self.0.map(|b| b << N & mask))
    }
    #[inline(always)]
    unsafe fn pick(self, mask: u8, value: u8) -> Self {
        U8x32(self.0.map(|b| if b & mask != 0 { value } else { 0 }))
    }
    #[inline(always)]
    unsafe fn or(self, b: Self) -> Self {
        U8x32(std::array::from_fn(|i| self.0[i] | b.0[i]))
    }
    #[inline(always)]
    unsafe fn minus(self, v: u8) -> Self {
        U8x32(self.0.map(|b| b.wrapping_sub(v)))
    }
}

super::isa_table!(F32x8, Isa::Scalar,);
