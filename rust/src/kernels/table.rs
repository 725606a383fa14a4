//! The macro that fills one ISA's table with instantiations of the generic bodies.

/// Instantiates every body for one vector type and fills that ISA's [`Kernels`].
macro_rules! isa_table {
    (@reads $name:ident, $e:ty, $v:ty, $(#[$attr:meta])*) => {
        mod $name {
            use super::*;

            $(#[$attr])*
            unsafe fn dots(w: *const $e, g: Geometry, x: *const f32, out: *mut f32) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { single::dots::<$v, $e>(w, g, x, out) }
            }
            $(#[$attr])*
            unsafe fn combine(w: *const $e, g: Geometry, c: *const f32, y: *mut f32, add: bool) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { single::combine::<$v, $e>(w, g, c, y, add) }
            }
            $(#[$attr])*
            unsafe fn dots_batch(w: *const $e, g: Geometry, x: *const f32, n: usize, u: *mut f32, s: f32) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { batch::dots_batch::<$v, $e>(w, g, x, n, u, s) }
            }
            $(#[$attr])*
            unsafe fn combine_batch(w: *const $e, g: Geometry, u: *const f32, n: usize, y: *mut f32, add: bool) {
                // SAFETY: same contract; the ISA is enabled here.
                unsafe { batch::combine_batch::<$v, $e>(w, g, u, n, y, add) }
            }
            $(#[$attr])*
            unsafe fn fuse(p: &Product<'_>, w: &[$e], out: &mut [$e], back: Option<&mut [$e]>) {
                fused::fuse::<$e, $v>(p, w, out, back)
            }

            pub(super) const READS: Reads<$e> = Reads { dots, combine, dots_batch, combine_batch, fuse };
        }
    };
    ($v:ty, $isa:expr, $(#[$attr:meta])*) => {
        use super::{AdamStep, Geometry, Isa, Kernels, Product, Reads};
        use super::{batch, elementwise, fused, outer, probe, single, update, wide};

        super::isa_table!(@reads reads_f32, f32, $v, $(#[$attr])*);
        super::isa_table!(@reads reads_f16, half::f16, $v, $(#[$attr])*);
        super::isa_table!(@reads reads_bf16, half::bf16, $v, $(#[$attr])*);
        super::select::select_table!($(#[$attr])*);
        super::quant::quant_table!($v, $(#[$attr])*);

        $(#[$attr])*
        unsafe fn rank1(w: *mut f32, g: Geometry, c: *const f32, v: *const f32) {
            // SAFETY: same contract; the ISA is enabled here.
            unsafe { update::rank1::<$v>(w, g, c, v) }
        }
        $(#[$attr])*
        unsafe fn fit_sweep(w: *mut f32, g: Geometry, u: *const f32, k: *const f32, t: *mut f32) -> f32 {
            // SAFETY: same contract; the ISA is enabled here.
            unsafe { update::fit_sweep::<$v>(w, g, u, k, t) }
        }
        $(#[$attr])*
        unsafe fn outer_batch(w: *mut f32, g: Geometry, c: *const f32, v: *const f32, n: usize) {
            // SAFETY: same contract; the ISA is enabled here.
            unsafe { outer::outer_batch::<$v>(w, g, c, v, n) }
        }
        $(#[$attr])*
        unsafe fn squares(x: &[f32], out: &mut [f32]) {
            elementwise::squares(x, out)
        }
        $(#[$attr])*
        unsafe fn products(a: &[f32], b: &[f32], out: &mut [f32]) {
            elementwise::products(a, b, out)
        }
        $(#[$attr])*
        unsafe fn pull(c: f32, f: &[f32], w: &[f32], t: &[f32], g: &mut [f32]) {
            elementwise::pull(c, f, w, t, g)
        }
        $(#[$attr])*
        unsafe fn moved_rows(g: Geometry, w: [&[f32]; 2], d: &[f32], out: [&mut [f32]; 2], swap: bool) {
            elementwise::moved_rows(g, w, d, out, swap)
        }
        $(#[$attr])*
        unsafe fn adamw(s: &AdamStep, g: &mut [f32], m: &mut [f32], v: &mut [f32], w: &mut [f32]) {
            elementwise::adamw(s, g, m, v, w)
        }
        $(#[$attr])*
        unsafe fn momentum(s: [f32; 4], g: &mut [f32], m: &mut [f32], w: &mut [f32]) {
            elementwise::momentum(s, g, m, w)
        }
        $(#[$attr])*
        unsafe fn dot(a: &[f32], b: &[f32]) -> f32 {
            elementwise::dot(a, b)
        }
        $(#[$attr])*
        unsafe fn axpy(c: f32, x: &[f32], y: &mut [f32]) {
            elementwise::axpy(c, x, y)
        }
        $(#[$attr])*
        unsafe fn scale(c: f32, y: &mut [f32]) {
            elementwise::scale(c, y)
        }
        $(#[$attr])*
        unsafe fn step_and_clear(c: f32, g: &mut [f32], w: &mut [f32]) {
            elementwise::step_and_clear(c, g, w)
        }
        $(#[$attr])*
        unsafe fn all_finite(x: &[f32]) -> bool {
            elementwise::all_finite(x)
        }
        $(#[$attr])*
        unsafe fn rls_gain(p: &mut [f64], u: &[f32], phi: f64, pu: &mut [f64], k: &mut [f32]) -> f64 {
            elementwise::rls_gain(p, u, phi, pu, k)
        }
        $(#[$attr])*
        unsafe fn products_of_rows(x: &[f32], y: &[f32], n: usize, out: &mut [f64], symmetric: bool) {
            // SAFETY: same contract; the ISA is enabled here.
            unsafe { wide::products_of_rows::<$v>(x, y, n, out, symmetric) }
        }
        $(#[$attr])*
        unsafe fn mix_rows(coef: &[f64], k: usize, m: &[f32], n: usize, out: &mut [f32]) {
            // SAFETY: same contract; the ISA is enabled here.
            unsafe { wide::mix_rows::<$v>(coef, k, m, n, out) }
        }
        $(#[$attr])*
        unsafe fn probe_read(x: &[f32]) -> f32 {
            // SAFETY: the ISA is enabled here.
            unsafe { probe::read::<$v>(x) }
        }
        $(#[$attr])*
        unsafe fn probe_fma(turns: usize, seed: f32) -> f64 {
            // SAFETY: the ISA is enabled here.
            unsafe { probe::fma_chains::<$v>(turns, seed) }
        }

        pub(super) static TABLE: Kernels = Kernels {
            isa: $isa,
            f32: reads_f32::READS,
            f16: reads_f16::READS,
            bf16: reads_bf16::READS,
            rank1,
            fit_sweep,
            outer_batch,
            squares,
            products,
            pull,
            moved_rows,
            adamw,
            momentum,
            dot,
            axpy,
            scale,
            step_and_clear,
            all_finite,
            rls_gain,
            products_of_rows,
            mix_rows,
            select: selection::SELECT,
            quant: quantised::QUANT,
            probe_read,
            probe_fma,
        };
    };
}
pub(super) use isa_table;
