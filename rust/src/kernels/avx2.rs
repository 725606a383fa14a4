//! 256-bit vectors: AVX2, FMA and F16C.

use std::arch::x86_64::*;

use super::vector::{Bytes32, Eight, Vector};

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

#[inline(always)]
pub(crate) unsafe fn fold256(v: __m256) -> __m128 {
    // SAFETY: AVX2 is present, by the contract of `Vector`.
    unsafe { _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)) }
}

/// Per 128-bit lane, the sums of that lane of four vectors, in order.
#[inline(always)]
unsafe fn quads(v: [Ymm; 4]) -> __m256 {
    // SAFETY: AVX2 is present, by the contract of `Vector`.
    unsafe {
        let pair = |a: Ymm, b: Ymm| _mm256_add_ps(_mm256_unpacklo_ps(a.0, b.0), _mm256_unpackhi_ps(a.0, b.0));
        let (lo, hi) = (pair(v[0], v[1]), pair(v[2], v[3]));
        let (lo, hi) = (_mm256_castps_pd(lo), _mm256_castps_pd(hi));
        let (even, odd) = (_mm256_unpacklo_pd(lo, hi), _mm256_unpackhi_pd(lo, hi));
        _mm256_add_ps(_mm256_castpd_ps(even), _mm256_castpd_ps(odd))
    }
}

// SAFETY: unaligned loads and stores of 8 elements; the table below is handed out only after detection.
unsafe impl Vector for Ymm {
    const W: usize = 8;
    type Wide = Ymm2;
    type Bytes = Y8;
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
    unsafe fn load_i8(p: *const u8) -> Self {
        // SAFETY: 8 readable bytes, by contract.
        Ymm(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn load_plane(p: *const u8, i: usize) -> Self {
        // SAFETY: 32 readable bytes, by contract. The byte goes to the top of its lane, sign and all.
        unsafe {
            let b = _mm256_loadu_si256(p.cast());
            let top = _mm256_set1_epi32(0xff00_0000u32 as i32);
            let v = match i {
                0 => _mm256_slli_epi32::<24>(b),
                1 => _mm256_and_si256(_mm256_slli_epi32::<16>(b), top),
                2 => _mm256_and_si256(_mm256_slli_epi32::<8>(b), top),
                _ => _mm256_and_si256(b, top),
            };
            Ymm(_mm256_cvtepi32_ps(v))
        }
    }
    #[inline(always)]
    unsafe fn widen(b: Y8, i: usize) -> Self {
        // SAFETY: by contract; registers only.
        unsafe {
            let half = if i < 2 { _mm256_castsi256_si128(b.0) } else { _mm256_extracti128_si256::<1>(b.0) };
            let part = if i.is_multiple_of(2) { half } else { _mm_unpackhi_epi64(half, half) };
            Ymm(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(part)))
        }
    }
    #[inline(always)]
    unsafe fn halves(p: *const u8) -> [f32; 8] {
        // SAFETY: 16 readable bytes, by contract; the array is 32 bytes wide.
        unsafe {
            let mut out = [0.0; 8];
            Self::load_f16(p.cast()).store(out.as_mut_ptr());
            out
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
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: by contract.
        Ymm(unsafe { _mm256_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: by contract.
        unsafe { hadd128(fold256(self.0)) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: by contract; the array is 16 bytes wide.
        unsafe {
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), fold256(quads(v)));
            out
        }
    }
    #[inline(always)]
    unsafe fn sum8(v: [Self; 8]) -> [f32; 8] {
        // SAFETY: by contract; the array is 32 bytes wide.
        unsafe {
            let (a, b) = (quads([v[0], v[1], v[2], v[3]]), quads([v[4], v[5], v[6], v[7]]));
            let s = _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
            let mut out = [0.0; 8];
            _mm256_storeu_ps(out.as_mut_ptr(), s);
            out
        }
    }
    #[inline(always)]
    unsafe fn sum16(v: [Self; 16]) -> [f32; 16] {
        // SAFETY: by contract.
        unsafe {
            let low = Self::sum8([v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]]);
            let high = Self::sum8([v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]]);
            let mut out = [0.0; 16];
            out[..8].copy_from_slice(&low);
            out[8..].copy_from_slice(&high);
            out
        }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}

/// Eight f64 lanes in two registers.
#[derive(Clone, Copy)]
pub(crate) struct Ymm2(__m256d, __m256d);

// SAFETY: unaligned loads and stores of 8 f32; the table below is handed out only after detection.
unsafe impl Eight for Ymm2 {
    #[inline(always)]
    unsafe fn splat(v: f64) -> Self {
        // SAFETY: AVX2 is present, by contract; so in every method below.
        unsafe { Ymm2(_mm256_set1_pd(v), _mm256_set1_pd(v)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: 8 readable elements, by contract.
        unsafe { Ymm2(_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p.add(4)))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: 8 writable elements, by contract.
        unsafe {
            _mm_storeu_ps(p, _mm256_cvtpd_ps(self.0));
            _mm_storeu_ps(p.add(4), _mm256_cvtpd_ps(self.1));
        }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: by contract.
        unsafe { Ymm2(_mm256_fmadd_pd(self.0, b.0, c.0), _mm256_fmadd_pd(self.1, b.1, c.1)) }
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
            _mm256_storeu_pd(out.as_mut_ptr(), self.0);
            _mm256_storeu_pd(out.as_mut_ptr().add(4), self.1);
            out
        }
    }
}

/// Thirty-two bytes in a `ymm` register.
#[derive(Clone, Copy)]
pub(crate) struct Y8(pub(super) __m256i);

// SAFETY: unaligned loads of as many bytes as the trait says; the tables are handed out only after detection.
unsafe impl Bytes32 for Y8 {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: 32 readable bytes and AVX2, by contract; so in every method below.
        Y8(unsafe { _mm256_loadu_si256(p.cast()) })
    }
    #[inline(always)]
    unsafe fn load_nibbles(p: *const u8) -> Self {
        // SAFETY: 16 readable bytes, by contract.
        unsafe {
            let b = _mm_loadu_si128(p.cast());
            Y8(_mm256_set_m128i(_mm_srli_epi16::<4>(b), b)).down::<0>(15)
        }
    }
    #[inline(always)]
    unsafe fn down<const N: i32>(self, mask: u8) -> Self {
        // SAFETY: by contract. Shifted in pairs of bytes: what came from the neighbour is masked off.
        Y8(unsafe { _mm256_and_si256(_mm256_srli_epi16::<N>(self.0), _mm256_set1_epi8(mask as i8)) })
    }
    #[inline(always)]
    unsafe fn up<const N: i32>(self, mask: u8) -> Self {
        // SAFETY: as `down`.
        Y8(unsafe { _mm256_and_si256(_mm256_slli_epi16::<N>(self.0), _mm256_set1_epi8(mask as i8)) })
    }
    #[inline(always)]
    unsafe fn pick(self, mask: u8, value: u8) -> Self {
        // SAFETY: by contract.
        unsafe {
            let bit = _mm256_set1_epi8(mask as i8);
            let has = _mm256_cmpeq_epi8(_mm256_and_si256(self.0, bit), bit);
            Y8(_mm256_and_si256(has, _mm256_set1_epi8(value as i8)))
        }
    }
    #[inline(always)]
    unsafe fn or(self, b: Self) -> Self {
        // SAFETY: by contract.
        Y8(unsafe { _mm256_or_si256(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn minus(self, v: u8) -> Self {
        // SAFETY: by contract.
        Y8(unsafe { _mm256_sub_epi8(self.0, _mm256_set1_epi8(v as i8)) })
    }
}

super::isa_table!(Ymm, Isa::Avx2, #[target_feature(enable = "avx2,fma,f16c")]);
