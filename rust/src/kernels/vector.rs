//! The two small traits that kernel bodies are generic over: a SIMD vector and a stored element.

use bytemuck::Pod;
use half::{bf16, f16};

/// A register of f32 lanes.
///
/// # Safety
/// Every method may only run on a CPU that has the vector's instruction set; pointers must be valid for
/// `W` elements (`load*`: reads, `store`: writes). Alignment is not required.
#[allow(clippy::missing_safety_doc)]
pub(crate) unsafe trait Vector: Copy {
    /// Lanes.
    const W: usize;
    /// Whether a fused multiply-add is one instruction.
    const FUSED: bool = true;
    /// Eight f64 lanes of the same instruction set.
    type Wide: Eight;
    /// Thirty-two bytes of the same instruction set.
    type Bytes: Bytes32;
    unsafe fn splat(v: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn load_f16(p: *const u16) -> Self;
    unsafe fn load_bf16(p: *const u16) -> Self;
    /// `W` signed bytes.
    unsafe fn load_i8(p: *const u8) -> Self;
    /// The `i`-th `W` of 32 signed bytes that lie in planes: byte `4 l + k` is number `8 k + l`. Times 2^24.
    unsafe fn load_plane(p: *const u8, i: usize) -> Self;
    /// The `i`-th `W` of 32 signed bytes.
    unsafe fn widen(b: Self::Bytes, i: usize) -> Self;
    /// Eight f16 at `p`.
    unsafe fn halves(p: *const u8) -> [f32; 8];
    unsafe fn store(self, p: *mut f32);
    /// `self * b + c`, fused where the ISA fuses.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn sum(self) -> f32;
    /// Horizontal sums of four, eight or sixteen vectors at once, by transposing additions.
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4];
    unsafe fn sum8(v: [Self; 8]) -> [f32; 8];
    unsafe fn sum16(v: [Self; 16]) -> [f32; 16];
    /// Asks for the cache line of `p`; never faults.
    unsafe fn prefetch(p: *const u8);

    /// `out[i]` = the sum of the lanes of `v[i]`, for `n` vectors.
    #[inline(always)]
    unsafe fn sums(v: *const Self, n: usize, out: *mut f32) {
        // SAFETY: the caller gives n vectors and n writable elements of out.
        unsafe {
            let mut i = 0;
            while i + 16 <= n {
                out.add(i)
                    .cast::<[f32; 16]>()
                    .write_unaligned(Self::sum16(v.add(i).cast::<[Self; 16]>().read()));
                i += 16;
            }
            while i + 8 <= n {
                out.add(i)
                    .cast::<[f32; 8]>()
                    .write_unaligned(Self::sum8(v.add(i).cast::<[Self; 8]>().read()));
                i += 8;
            }
            while i + 4 <= n {
                out.add(i)
                    .cast::<[f32; 4]>()
                    .write_unaligned(Self::sum4(v.add(i).cast::<[Self; 4]>().read()));
                i += 4;
            }
            while i < n {
                *out.add(i) = (*v.add(i)).sum();
                i += 1;
            }
        }
    }
}

/// Eight lanes of f64, loaded from and stored to f32; every ISA gives the same bits.
///
/// # Safety
/// As [`Vector`]; pointers must be valid for 8 elements.
#[allow(clippy::missing_safety_doc)]
pub(crate) unsafe trait Eight: Copy {
    unsafe fn splat(v: f64) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// `self * b + c` where the product is exact, as that of two widened f32 is: fused or not, one rounding.
    unsafe fn add_exact_product(self, b: Self, c: Self) -> Self;
    unsafe fn lanes(self) -> [f64; 8];

    /// The sum of the lanes, in one order.
    #[inline(always)]
    unsafe fn sum(self) -> f64 {
        // SAFETY: registers only.
        let a = unsafe { self.lanes() };
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
}

/// Thirty-two bytes in registers: the codes of one part of a block.
///
/// # Safety
/// As [`Vector`]; `load` reads 32 bytes, `load_nibbles` 16.
#[allow(clippy::missing_safety_doc)]
pub(crate) unsafe trait Bytes32: Copy {
    unsafe fn load(p: *const u8) -> Self;
    /// The low nibbles of 16 bytes, then the high ones.
    unsafe fn load_nibbles(p: *const u8) -> Self;
    /// `(self >> N) & mask`; `mask` has no bit that comes from a neighbour.
    unsafe fn down<const N: i32>(self, mask: u8) -> Self;
    /// `(self << N) & mask`; as `down`.
    unsafe fn up<const N: i32>(self, mask: u8) -> Self;
    /// `value` where `self` has the one bit of `mask`, else 0.
    unsafe fn pick(self, mask: u8, value: u8) -> Self;
    unsafe fn or(self, b: Self) -> Self;
    unsafe fn minus(self, v: u8) -> Self;
}

/// A stored number that widens to f32 on load.
///
/// # Safety
/// `load` reads `V::W` elements from `p`.
#[allow(clippy::missing_safety_doc)]
pub(crate) unsafe trait Element: Pod {
    unsafe fn load<V: Vector>(p: *const Self) -> V;
}

// SAFETY: each `load` forwards the caller's promise (W readable elements, ISA present) to the vector.
unsafe impl Element for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const f32) -> V {
        // SAFETY: forwarded from the caller.
        unsafe { V::load(p) }
    }
}

// SAFETY: f16 is a transparent u16.
unsafe impl Element for f16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const f16) -> V {
        // SAFETY: forwarded from the caller.
        unsafe { V::load_f16(p.cast()) }
    }
}

// SAFETY: bf16 is a transparent u16.
unsafe impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const bf16) -> V {
        // SAFETY: forwarded from the caller.
        unsafe { V::load_bf16(p.cast()) }
    }
}
