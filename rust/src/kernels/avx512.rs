//! 512-bit vectors: AVX-512 F, BW, DQ and VL.

use std::arch::x86_64::*;

use super::avx2::{Y8, Ymm, fold256};
use super::vector::{Eight, Vector};

/// Sixteen lanes in a `zmm` register.
#[derive(Clone, Copy)]
pub(crate) struct Zmm(__m512);

#[inline(always)]
unsafe fn fold512(v: __m512) -> __m128 {
    // SAFETY: AVX-512F/DQ is present, by the contract of `Vector`.
    unsafe { fold256(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))) }
}

/// Per 128-bit lane, the sums of that lane of four vectors, in order.
#[inline(always)]
unsafe fn quads(v: [Zmm; 4]) -> __m512 {
    // SAFETY: AVX-512F is present, by the contract of `Vector`.
    unsafe {
        let pair = |a: Zmm, b: Zmm| _mm512_add_ps(_mm512_unpacklo_ps(a.0, b.0), _mm512_unpackhi_ps(a.0, b.0));
        let (lo, hi) = (pair(v[0], v[1]), pair(v[2], v[3]));
        let (lo, hi) = (_mm512_castps_pd(lo), _mm512_castps_pd(hi));
        let (even, odd) = (_mm512_unpacklo_pd(lo, hi), _mm512_unpackhi_pd(lo, hi));
        _mm512_add_ps(_mm512_castpd_ps(even), _mm512_castpd_ps(odd))
    }
}

/// Adds neighbouring 128-bit lanes: `[a0 + a1, a2 + a3, b0 + b1, b2 + b3]`.
#[inline(always)]
unsafe fn lanes(a: __m512, b: __m512) -> __m512 {
    // SAFETY: AVX-512F is present, by the contract of `Vector`.
    unsafe {
        _mm512_add_ps(
            _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
        )
    }
}

// SAFETY: unaligned loads and stores of 16 elements; the table below is handed out only after detection.
unsafe impl Vector for Zmm {
    const W: usize = 16;
    type Wide = Zmm64;
    type Bytes = Y8;
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: AVX-512 is present, by contract; so in every method below.
        Zmm(unsafe { _mm512_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: 16 readable elements, by contract.
        Zmm(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self {
        // SAFETY: 16 readable elements, by contract.
        Zmm(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self {
        // SAFETY: 16 readable elements, by contract. A bf16 is the upper half of an f32.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Zmm(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: 16 readable bytes, by contract.
        Zmm(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_plane(p: *const u8, i: usize) -> Self {
        // SAFETY: 32 readable bytes, by contract. A shuffle inside of lanes: cheaper than widening across them.
        unsafe {
            let b = _mm512_broadcast_i64x4(_mm256_loadu_si256(p.cast()));
            let of = |k: i64| k << 24 | 0x80_8080 | (k + 4) << 56 | 0x80_8080 << 32;
            let (low, high) = (of(2 * i as i64), of(2 * i as i64 + 1));
            let (low2, high2) = (low + 0x0800_0000_0800_0000, high + 0x0800_0000_0800_0000);
            let to_top = _mm512_set_epi64(high2, high, high2, high, low2, low, low2, low);
            Zmm(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(b, to_top)))
        }
    }
    #[inline(always)]
    unsafe fn widen(b: Y8, i: usize) -> Self {
        // SAFETY: by contract; registers only.
        unsafe {
            let half = if i == 0 { _mm256_castsi256_si128(b.0) } else { _mm256_extracti128_si256::<1>(b.0) };
            Zmm(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(half)))
        }
    }
    #[inline(always)]
    unsafe fn halves(p: *const u8) -> [f32; 8] {
        // SAFETY: 16 readable bytes, by contract; AVX2 and F16C come with this table.
        unsafe { Ymm::halves(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: 16 writable elements, by contract.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: by contract.
        Zmm(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: by contract.
        Zmm(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: by contract.
        Zmm(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: by contract.
        Zmm(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: by contract.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: by contract; the array is 16 bytes wide.
        unsafe {
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), fold512(quads(v)));
            out
        }
    }
    #[inline(always)]
    unsafe fn sum8(v: [Self; 8]) -> [f32; 8] {
        // SAFETY: by contract; the array is 32 bytes wide.
        unsafe {
            let s = lanes(quads([v[0], v[1], v[2], v[3]]), quads([v[4], v[5], v[6], v[7]]));
            let mut out = [0.0; 8];
            _mm256_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps256(lanes(s, s)));
            out
        }
    }
    #[inline(always)]
    unsafe fn sum16(v: [Self; 16]) -> [f32; 16] {
        // SAFETY: by contract; the array is 64 bytes wide.
        unsafe {
            let a = lanes(quads([v[0], v[1], v[2], v[3]]), quads([v[4], v[5], v[6], v[7]]));
            let b = lanes(quads([v[8], v[9], v[10], v[11]]), quads([v[12], v[13], v[14], v[15]]));
            let mut out = [0.0; 16];
            _mm512_storeu_ps(out.as_mut_ptr(), lanes(a, b));
            out
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// Eight f64 lanes in a `zmm` register.
#[derive(Clone, Copy)]
pub(crate) struct Zmm64(__m512d);

// SAFETY: unaligned loads and stores of 8 f32; the table below is handed out only after detection.
unsafe impl Eight for Zmm64 {
    #[inline(always)]
    unsafe fn splat(v: f64) -> Self {
        // SAFETY: AVX-512 is present, by contract; so in every method below.
        Zmm64(unsafe { _mm512_set1_pd(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: 8 readable elements, by contract.
        Zmm64(unsafe { _mm512_cvtps_pd(_mm256_loadu_ps(p)) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: 8 writable elements, by contract.
        unsafe { _mm256_storeu_ps(p, _mm512_cvtpd_ps(self.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: by contract.
        Zmm64(unsafe { _mm512_fmadd_pd(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn add_exact_product(self, b: Self, c: Self) -> Self {
        // SAFETY: by contract.
        unsafe { self.fma(b, c) }
    }
    #[inline(always)]
    unsafe fn lanes(self) -> [f64; 8] {
        // SAFETY: the array is 64 bytes wide.
        unsafe {
            let mut out = [0.0; 8];
            _mm512_storeu_pd(out.as_mut_ptr(), self.0);
            out
        }
    }
}

super::isa_table!(
    Zmm,
    Isa::Avx512,
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
);
