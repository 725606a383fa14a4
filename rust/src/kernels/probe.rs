//! What the machine can do at most: reads of a footprint and chains of FMAs, with the kernels' own vectors.
//! For benches only; nothing in the library calls them.

use super::vector::Vector;

/// Independent chains: enough for two pipes of latency 4, few enough for 16 registers.
const CHAINS: usize = 12;
/// Vectors read per turn.
const READS: usize = 8;

/// Reads every whole stretch of 8 vectors of `x` once; the sum keeps the loads alive.
///
/// # Safety
/// The ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn read<V: Vector>(x: &[f32]) -> f32 {
    // SAFETY: each chunk holds READS * W elements.
    unsafe {
        let mut acc = [V::splat(0.0); READS];
        for chunk in x.chunks_exact(READS * V::W) {
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = acc.add(V::load(chunk.as_ptr().add(i * V::W)));
            }
        }
        let mut s = acc[0];
        for acc in &acc[1..] {
            s = s.add(*acc);
        }
        s.sum()
    }
}

/// `turns` FMAs on each of the register-only chains; returns the floating point operations done.
/// `seed` (0 in use) keeps the compiler from folding the chains.
///
/// # Safety
/// The ISA of `V` is present.
#[inline(always)]
pub(crate) unsafe fn fma_chains<V: Vector>(turns: usize, seed: f32) -> f64 {
    // SAFETY: registers only.
    unsafe {
        let (b, c) = (V::splat(1.0 - seed), V::splat(seed));
        let mut acc = [V::splat(seed); CHAINS];
        for _ in 0..turns {
            for acc in &mut acc {
                *acc = acc.fma(b, c);
            }
            std::hint::black_box(());
        }
        let mut s = acc[0];
        for acc in &acc[1..] {
            s = s.add(*acc);
        }
        f64::from(s.sum()) + (2 * V::W * CHAINS * turns) as f64
    }
}
