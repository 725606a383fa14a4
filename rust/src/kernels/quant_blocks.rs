//! The block types as the kernels see them: how to take a block apart, and how its codes become numbers.
//!
//! In memory a block is a head (its scales) and codes. Every number is `scale code + offset`, with one scale
//! per 32 elements or per 16, so that only codes pass through registers element by element.

use super::vector::{Bytes32, Vector};
use crate::quant::BlockType;

/// Elements of a span: those that share an offset.
pub(super) const SPAN: usize = 32;

/// Where the head of a block lies among its bytes in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Anatomy {
    /// First byte of the head: 0, or where the codes end.
    pub head_at: usize,
    /// Bytes of the head.
    pub head: usize,
    /// Bytes of the codes.
    pub codes: usize,
    /// Whether the 32 codes lie in planes: number `8 k + l` at byte `4 l + k`, so that they widen within lanes.
    pub planes: bool,
}

impl Anatomy {
    /// How a block of this type is taken apart.
    pub const fn of(kind: BlockType) -> Self {
        const fn anatomy<B: Block>() -> Anatomy {
            Anatomy { head_at: B::HEAD_AT, head: B::HEAD, codes: B::CODES, planes: B::PLANES }
        }
        match kind {
            BlockType::Q8_0 => anatomy::<Q8_0>(),
            BlockType::Q6K => anatomy::<Q6K>(),
            BlockType::Q5K => anatomy::<Q5K>(),
            BlockType::Q4K => anatomy::<Q4K>(),
            BlockType::Q4_1 => anatomy::<Q4_1>(),
            BlockType::Q4_0 => anatomy::<Q4_0>(),
        }
    }
}

/// Scales of one block, `S` of them, and offsets per span where the type has any (`O` is 0 where not).
#[derive(Clone, Copy)]
pub(super) struct Head<const S: usize, const O: usize> {
    scale: [f32; S],
    offset: [f32; O],
}

impl<const S: usize, const O: usize> Head<S, O> {
    const ZERO: Self = Head { scale: [0.0; S], offset: [0.0; O] };
}

/// What the kernels ask of a head.
pub(super) trait Scales: Copy {
    /// Whether numbers have an offset.
    const OFFSETS: bool;
    /// Of each 16 elements of the span.
    fn scale(&self, span: usize, half: usize) -> f32;
    /// Of the span.
    fn offset(&self, span: usize) -> f32;
}

impl<const S: usize, const O: usize> Scales for Head<S, O> {
    const OFFSETS: bool = O > 0;
    #[inline(always)]
    fn scale(&self, span: usize, half: usize) -> f32 {
        // 1 (one span), 8 (one per span) or 16 (two per span).
        self.scale[if S == 16 { 2 * span + half } else { span }]
    }
    #[inline(always)]
    fn offset(&self, span: usize) -> f32 {
        if O > 0 { self.offset[span] } else { 0.0 }
    }
}

/// One block type.
///
/// # Safety
/// `heads` reads `R * HEAD` bytes (16 at least), `span` and `vector` those of the codes of one block.
#[allow(clippy::missing_safety_doc)]
pub(super) unsafe trait Block {
    const ELEMENTS: usize;
    const HEAD_AT: usize;
    const HEAD: usize;
    const CODES: usize;
    /// Spans whose codes lie in the same bytes: the loop over them is unrolled.
    const TOGETHER: usize;
    /// See [`Anatomy::planes`].
    const PLANES: bool = false;
    /// Whether each half of a span has a scale of its own.
    const HALVES: bool = false;
    type Head: Scales;
    /// Codes of a span: in registers, or where they lie when they are bytes already.
    type Codes<V: Vector>: Copy;

    /// Heads of `R` blocks that lie one after another, each times its coefficient.
    unsafe fn heads<V: Vector, const R: usize>(p: *const u8, coef: &[f32; R]) -> [Self::Head; R];
    /// Codes of span `s` of unit `unit` (a unit is `TOGETHER` spans).
    unsafe fn span<V: Vector>(codes: *const u8, unit: usize, s: usize) -> Self::Codes<V>;
    /// The `i`-th `V::W` codes.
    unsafe fn vector<V: Vector>(codes: Self::Codes<V>, i: usize) -> V;
}

/// Heads of a type that has a scale only, in units of `unit`.
#[inline(always)]
unsafe fn scale_heads<V: Vector, const R: usize>(
    p: *const u8,
    unit: f32,
    coef: &[f32; R],
) -> [Head<1, 0>; R] {
    const { assert!(R <= 8) };
    // SAFETY: forwarded from the caller.
    let d = unsafe { V::halves(p) };
    let mut heads = [Head::ZERO; R];
    for r in 0..R {
        heads[r].scale[0] = d[r] * unit * coef[r];
    }
    heads
}

pub(super) struct Q8_0;

// SAFETY: the layout of the table in quant/types.rs; tested against it block by block.
unsafe impl Block for Q8_0 {
    const ELEMENTS: usize = 32;
    const HEAD_AT: usize = 0;
    const HEAD: usize = 2;
    const CODES: usize = 32;
    const TOGETHER: usize = 1;
    const PLANES: bool = true;
    type Head = Head<1, 0>;
    type Codes<V: Vector> = *const u8;

    #[inline(always)]
    unsafe fn heads<V: Vector, const R: usize>(p: *const u8, coef: &[f32; R]) -> [Self::Head; R] {
        // SAFETY: forwarded from the caller.
        unsafe { scale_heads::<V, R>(p, 1.0 / 16_777_216.0, coef) }
    }
    #[inline(always)]
    unsafe fn span<V: Vector>(codes: *const u8, _: usize, _: usize) -> *const u8 {
        codes
    }
    #[inline(always)]
    unsafe fn vector<V: Vector>(codes: *const u8, i: usize) -> V {
        // SAFETY: 32 codes of one byte; the heads undo the factor.
        unsafe { V::load_plane(codes, i) }
    }
}

pub(super) struct Q4_0;

// SAFETY: as above.
unsafe impl Block for Q4_0 {
    const ELEMENTS: usize = 32;
    const HEAD_AT: usize = 0;
    const HEAD: usize = 2;
    const CODES: usize = 16;
    const TOGETHER: usize = 1;
    type Head = Head<1, 0>;
    type Codes<V: Vector> = V::Bytes;

    #[inline(always)]
    unsafe fn heads<V: Vector, const R: usize>(p: *const u8, coef: &[f32; R]) -> [Self::Head; R] {
        // SAFETY: forwarded from the caller.
        unsafe { scale_heads::<V, R>(p, 1.0, coef) }
    }
    #[inline(always)]
    unsafe fn span<V: Vector>(codes: *const u8, _: usize, _: usize) -> V::Bytes {
        // SAFETY: 16 bytes of nibbles.
        unsafe { V::Bytes::load_nibbles(codes).minus(8) }
    }
    #[inline(always)]
    unsafe fn vector<V: Vector>(codes: V::Bytes, i: usize) -> V {
        // SAFETY: registers only.
        unsafe { V::widen(codes, i) }
    }
}

pub(super) struct Q4_1;

// SAFETY: as above.
unsafe impl Block for Q4_1 {
    const ELEMENTS: usize = 32;
    const HEAD_AT: usize = 0;
    const HEAD: usize = 4;
    const CODES: usize = 16;
    const TOGETHER: usize = 1;
    type Head = Head<1, 1>;
    type Codes<V: Vector> = V::Bytes;

    #[inline(always)]
    unsafe fn heads<V: Vector, const R: usize>(p: *const u8, coef: &[f32; R]) -> [Self::Head; R] {
        const { assert!(R <= 4) };
        // SAFETY: forwarded from the caller.
        let f = unsafe { V::halves(p) };
        let mut heads = [Head::ZERO; R];
        for r in 0..R {
            heads[r] = Head { scale: [f[2 * r] * coef[r]], offset: [f[2 * r + 1] * coef[r]] };
        }
        heads
    }
    #[inline(always)]
    unsafe fn span<V: Vector>(codes: *const u8, _: usize, _: usize) -> V::Bytes {
        // SAFETY: 16 bytes of nibbles.
        unsafe { V::Bytes::load_nibbles(codes) }
    }
    #[inline(always)]
    unsafe fn vector<V: Vector>(codes: V::Bytes, i: usize) -> V {
        // SAFETY: registers only.
        unsafe { V::widen(codes, i) }
    }
}

/// Head of `q4_k` and `q5_k`: d, dmin, and 12 bytes that hold eight scales and eight minima of 6 bits.
#[inline(always)]
unsafe fn min_scale_head<V: Vector>(p: *const u8, coef: f32) -> Head<8, 8> {
    // SAFETY: 16 readable bytes; `codes` is as wide as the loads.
    unsafe {
        let halves = V::halves(p);
        let word = |i: usize| p.add(4 + 4 * i).cast::<u32>().read_unaligned();
        let (a, b, c) = (word(0), word(1), word(2));
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let scales = pair(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
        let mins = pair(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
        let codes = [scales, mins];
        let mut wide = [0.0f32; 16];
        for i in 0..16 / V::W {
            let v: V = V::load_i8(codes.as_ptr().cast::<u8>().add(i * V::W));
            v.store(wide.as_mut_ptr().add(i * V::W));
        }
        let (d, dmin) = (halves[0], halves[1]);
        let mut head = Head::ZERO;
        for j in 0..8 {
            head.scale[j] = d * wide[j] * coef;
            head.offset[j] = -(dmin * wide[8 + j]) * coef;
        }
        head
    }
}

#[inline(always)]
unsafe fn min_scale_heads<V: Vector, const R: usize>(p: *const u8, coef: &[f32; R]) -> [Head<8, 8>; R] {
    let mut heads = [Head::ZERO; R];
    for r in 0..R {
        // SAFETY: the caller gives R heads of 16 bytes.
        heads[r] = unsafe { min_scale_head::<V>(p.add(16 * r), coef[r]) };
    }
    heads
}

pub(super) struct Q4K;

// SAFETY: as above.
unsafe impl Block for Q4K {
    const ELEMENTS: usize = 256;
    const HEAD_AT: usize = 0;
    const HEAD: usize = 16;
    const CODES: usize = 128;
    const TOGETHER: usize = 2;
    type Head = Head<8, 8>;
    type Codes<V: Vector> = V::Bytes;

    #[inline(always)]
    unsafe fn heads<V: Vector, const R: usize>(p: *const u8, coef: &[f32; R]) -> [Self::Head; R] {
        // SAFETY: forwarded from the caller.
        unsafe { min_scale_heads::<V, R>(p, coef) }
    }
    #[inline(always)]
    unsafe fn span<V: Vector>(codes: *const u8, unit: usize, s: usize) -> V::Bytes {
        // SAFETY: 32 bytes per unit: low nibbles first, high ones after.
        unsafe {
            let q = V::Bytes::load(codes.add(32 * unit));
            if s == 0 { q.down::<0>(15) } else { q.down::<4>(15) }
        }
    }
    #[inline(always)]
    unsafe fn vector<V: Vector>(codes: V::Bytes, i: usize) -> V {
        // SAFETY: registers only.
        unsafe { V::widen(codes, i) }
    }
}

pub(super) struct Q5K;

// SAFETY: as above.
unsafe impl Block for Q5K {
    const ELEMENTS: usize = 256;
    const HEAD_AT: usize = 0;
    const HEAD: usize = 16;
    const CODES: usize = 160;
    const TOGETHER: usize = 2;
    type Head = Head<8, 8>;
    type Codes<V: Vector> = V::Bytes;

    #[inline(always)]
    unsafe fn heads<V: Vector, const R: usize>(p: *const u8, coef: &[f32; R]) -> [Self::Head; R] {
        // SAFETY: forwarded from the caller.
        unsafe { min_scale_heads::<V, R>(p, coef) }
    }
    #[inline(always)]
    unsafe fn span<V: Vector>(codes: *const u8, unit: usize, s: usize) -> V::Bytes {
        // SAFETY: 32 bytes of fifth bits (bit j: span j), then nibbles as in `q4_k`.
        unsafe {
            let fifth = V::Bytes::load(codes).pick(1 << (2 * unit + s), 16);
            let q = V::Bytes::load(codes.add(32 + 32 * unit));
            if s == 0 { q.down::<0>(15).or(fifth) } else { q.down::<4>(15).or(fifth) }
        }
    }
    #[inline(always)]
    unsafe fn vector<V: Vector>(codes: V::Bytes, i: usize) -> V {
        // SAFETY: registers only.
        unsafe { V::widen(codes, i) }
    }
}

pub(super) struct Q6K;

// SAFETY: as above.
unsafe impl Block for Q6K {
    const ELEMENTS: usize = 256;
    const HEAD_AT: usize = 192;
    const HEAD: usize = 18;
    const CODES: usize = 192;
    const TOGETHER: usize = 4;
    const HALVES: bool = true;
    type Head = Head<16, 0>;
    type Codes<V: Vector> = V::Bytes;

    #[inline(always)]
    unsafe fn heads<V: Vector, const R: usize>(p: *const u8, coef: &[f32; R]) -> [Self::Head; R] {
        let mut heads = [Head::ZERO; R];
        for r in 0..R {
            // SAFETY: the caller gives R heads of 16 scales and d; the f16 are read from 16 bytes before the end.
            unsafe {
                let p = p.add(18 * r);
                let d = V::halves(p.add(2))[7];
                for i in 0..16 / V::W {
                    let scale = V::load_i8(p.add(i * V::W)).mul(V::splat(d)).mul(V::splat(coef[r]));
                    scale.store(heads[r].scale.as_mut_ptr().add(i * V::W));
                }
            }
        }
        heads
    }
    #[inline(always)]
    unsafe fn span<V: Vector>(codes: *const u8, unit: usize, s: usize) -> V::Bytes {
        // SAFETY: a unit is 128 elements: 64 bytes of nibbles and 32 of top bits, which lie after all nibbles.
        unsafe {
            let top = V::Bytes::load(codes.add(128 + 32 * unit));
            let low = V::Bytes::load(codes.add(64 * unit + 32 * (s % 2)));
            let q = match s {
                0 => low.down::<0>(15).or(top.up::<4>(0x30)),
                1 => low.down::<0>(15).or(top.up::<2>(0x30)),
                2 => low.down::<4>(15).or(top.down::<0>(0x30)),
                _ => low.down::<4>(15).or(top.down::<2>(0x30)),
            };
            q.minus(32)
        }
    }
    #[inline(always)]
    unsafe fn vector<V: Vector>(codes: V::Bytes, i: usize) -> V {
        // SAFETY: registers only.
        unsafe { V::widen(codes, i) }
    }
}
