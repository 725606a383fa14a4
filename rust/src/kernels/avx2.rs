//! 256-bit vectors: AVX2, FMA and F16C.

use std::arch::x86_64::*;

use super::vector::Vector;

/// Eight lanes in a `ymm` register.
#[derive(Clone, Copy)]
pub(crate) struct Ymm(__m256);

#[inline(always)]
unsafe fn hadd128(s: __m128) -> f32 {
    // SAFETY: SSE is part of x86-64; SSE3 comes with AVX2.
    unsafe {
        let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)))
    }
}

/// Sums of four 128-bit vectors.
#[inline(always)]
pub(crate) unsafe fn sum4_128(v: [__m128; 4]) -> [f32; 4] {
    // SAFETY: SSE is part of x86-64.
    unsafe {
        let lo = _mm_add_ps(_mm_unpacklo_ps(v[0], v[1]), _mm_unpackhi_ps(v[0], v[1]));
        let hi = _mm_add_ps(_mm_unpacklo_ps(v[2], v[3]), _mm_unpackhi_ps(v[2], v[3]));
        let s = _mm_add_ps(_mm_movelh_ps(lo, hi), _mm_movehl_ps(hi, lo));
        let mut out = [0.0; 4];
        _mm_storeu_ps(out.as_mut_ptr(), s);
        out
    }
}

#[inline(always)]
pub(crate) unsafe fn fold256(v: __m256) -> __m128 {
    // SAFETY: AVX2 is present, by the contract of `Vector`.
    unsafe { _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)) }
}

// SAFETY: unaligned loads and stores of 8 elements; the table below is handed out only after detection.
unsafe impl Vector for Ymm {
    const W: usize = 8;
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: AVX2 is present, by contract; so in every method below.
        Ymm(unsafe { _mm256_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: 8 readable elements, by contract.
        Ymm(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: 8 readable elements, by contract.
        Ymm(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: 8 readable elements, by contract. A bf16 is the upper half of an f32.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            Ymm(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: 8 writable elements, by contract.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: FMA is present, by contract.
        Ymm(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: by contract.
        Ymm(unsafe { _mm256_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: by contract.
        Ymm(unsafe { _mm256_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: by contract.
        unsafe { hadd128(fold256(self.0)) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: by contract.
        unsafe { sum4_128([fold256(v[0].0), fold256(v[1].0), fold256(v[2].0), fold256(v[3].0)]) }
    }
}

super::isa_table!(Ymm, Isa::Avx2, #[target_feature(enable = "avx2,fma,f16c")]);
