//! All arithmetic that needs `unsafe`: one table of primitives per instruction set, chosen once.
//!
//! [`Kernels`] can only be had by detection, so holding one is the proof that its ISA is present. Its safe
//! methods check lengths; below them bodies are written once ([`single`], [`batch`], [`update`], [`quant`]) and instantiated per ISA.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::OnceLock;

use bytemuck::Pod;
use half::{bf16, f16};

use crate::error::{Error, Result};

mod batch;
mod elementwise;
mod fused;
mod geometry;
mod outer;
mod probe;
mod quant;
mod quant_batch;
mod quant_blocks;
mod quant_single;
mod scalar;
mod select;
mod single;
mod table;
mod update;
mod vector;
mod wide;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

pub use elementwise::AdamStep;
pub use fused::{Product, Weight};
pub use geometry::Geometry;
pub use quant::{Anatomy, Packed, ROWS as QUANT_ROWS};
pub use select::Election;

/// Columns of a tile: the widest vector, and a cache line of f32.
pub const TILE: usize = 16;
/// Rows of a group: as many accumulators as hide the FMA latency.
pub const GROUP: usize = 8;

/// Pages that [`prefetch_pages`] asks for at most.
const PAGES: usize = 12;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust; the definition.
    Scalar,
    /// AVX2 + FMA + F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
}

impl Isa {
    /// The name that `MICROLORA_ISA` takes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

type Dots<E> = unsafe fn(*const E, Geometry, *const f32, *mut f32);
type Combine<E> = unsafe fn(*const E, Geometry, *const f32, *mut f32, bool);
type DotsBatch<E> = unsafe fn(*const E, Geometry, *const f32, usize, *mut f32, f32);
type CombineBatch<E> = unsafe fn(*const E, Geometry, *const f32, usize, *mut f32, bool);
type Fuse<E> = unsafe fn(&Product<'_>, &[E], &mut [E], Option<&mut [E]>);
type Pull = unsafe fn(f32, &[f32], &[f32], &[f32], &mut [f32]);
type MovedRows = unsafe fn(Geometry, [&[f32]; 2], &[f32], [&mut [f32]; 2], bool);
type AdamW = unsafe fn(&AdamStep, &mut [f32], &mut [f32], &mut [f32], &mut [f32]);
type Momentum = unsafe fn([f32; 4], &mut [f32], &mut [f32], &mut [f32]);
type ProductsOfRows = unsafe fn(&[f32], &[f32], usize, &mut [f64], bool);
type MixRows = unsafe fn(&[f64], usize, &[f32], usize, &mut [f32]);
type RlsGain = unsafe fn(&mut [f64], &[f32], f64, &mut [f64], &mut [f32]) -> f64;

/// Read-path primitives for one stored element type.
struct Reads<E> {
    dots: Dots<E>,
    combine: Combine<E>,
    dots_batch: DotsBatch<E>,
    combine_batch: CombineBatch<E>,
    fuse: Fuse<E>,
}

/// Element types that a factor can be stored in.
#[allow(private_interfaces, private_bounds)]
pub trait Stored: Pod + vector::Element {
    #[doc(hidden)]
    fn reads(k: &Kernels) -> &Reads<Self>;
}

/// The primitives of one instruction set.
pub struct Kernels {
    isa: Isa,
    f32: Reads<f32>,
    f16: Reads<f16>,
    bf16: Reads<bf16>,
    rank1: unsafe fn(*mut f32, Geometry, *const f32, *const f32),
    fit_sweep: unsafe fn(*mut f32, Geometry, *const f32, *const f32, *mut f32) -> f32,
    outer_batch: unsafe fn(*mut f32, Geometry, *const f32, *const f32, usize),
    squares: unsafe fn(&[f32], &mut [f32]),
    products: unsafe fn(&[f32], &[f32], &mut [f32]),
    pull: Pull,
    moved_rows: MovedRows,
    adamw: AdamW,
    momentum: Momentum,
    dot: unsafe fn(&[f32], &[f32]) -> f32,
    axpy: unsafe fn(f32, &[f32], &mut [f32]),
    scale: unsafe fn(f32, &mut [f32]),
    step_and_clear: unsafe fn(f32, &mut [f32], &mut [f32]),
    all_finite: unsafe fn(&[f32]) -> bool,
    rls_gain: RlsGain,
    products_of_rows: ProductsOfRows,
    mix_rows: MixRows,
    select: select::Select,
    quant: quant::Quant,
    probe_read: unsafe fn(&[f32]) -> f32,
    probe_fma: unsafe fn(usize, f32) -> f64,
}

macro_rules! stored {
    ($($ty:ident),*) => {$(
        #[allow(private_interfaces)]
        impl Stored for $ty {
            fn reads(k: &Kernels) -> &Reads<Self> {
                &k.$ty
            }
        }
    )*};
}
stored!(f32, f16, bf16);

use table::isa_table;

/// Length check of the safe wrappers: they are called with sizes that the core has already matched, so a
/// mismatch is a bug of ours and stops loudly.
#[inline(always)]
fn need(what: &'static str, got: usize, want: usize) {
    assert!(got == want, "kernel {what}: got {got} elements, expected {want}");
}

/// Asks for one line of each of the first pages of `w`, so that a factor that comes next starts on its way
/// (address translation most of all). Does nothing for factors that fit in L1.
#[inline(always)]
pub fn prefetch_pages<E: Stored>(w: &[E]) {
    #[cfg(target_arch = "x86_64")]
    if size_of_val(w) >= geometry::PREFETCH_FROM {
        let from = w.as_ptr().cast::<i8>();
        for page in 0..PAGES.min(size_of_val(w) >> 12) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: SSE is part of x86-64; a prefetch never faults, and the address lies in `w`.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(from.add(page << 12)) };
        }
    }
}

impl Kernels {
    /// The best table for this machine, or the one that `MICROLORA_ISA` names; chosen once per process.
    ///
    /// # Errors
    /// When `MICROLORA_ISA` names an ISA that does not exist or that this machine lacks.
    pub fn detect() -> Result<&'static Kernels> {
        static CHOICE: OnceLock<std::result::Result<&'static Kernels, (String, String)>> = OnceLock::new();
        CHOICE
            .get_or_init(|| match std::env::var("MICROLORA_ISA") {
                Ok(name) if !name.is_empty() => {
                    let have: Vec<_> = Self::available().map(|k| k.isa.as_str()).collect();
                    Self::available()
                        .find(|k| k.isa.as_str() == name)
                        .ok_or_else(|| (name, format!("one of {} on this machine", have.join(", "))))
                }
                _ => Ok(Self::available().last().expect("scalar is always there")),
            })
            .as_ref()
            .copied()
            .map_err(|(got, want)| Error::config("MICROLORA_ISA", got, want))
    }

    /// Every table that this machine can run, slowest first.
    pub fn available() -> impl Iterator<Item = &'static Kernels> {
        let mut all: Vec<&'static Kernels> = vec![&scalar::TABLE];
        #[cfg(target_arch = "x86_64")]
        {
            // Keep these lists equal to the `target_feature` lists of avx2.rs and avx512.rs.
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                all.push(&avx2::TABLE);
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                all.push(&avx512::TABLE);
            }
        }
        all.into_iter()
    }

    /// The table of one ISA, if this machine has it.
    pub fn for_isa(isa: Isa) -> Option<&'static Kernels> {
        Self::available().find(|k| k.isa == isa)
    }

    /// Which instruction set this table uses.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// `out[r] = <row r of w, x>`.
    #[inline]
    pub fn dots<E: Stored>(&self, w: &[E], g: Geometry, x: &[f32], out: &mut [f32]) {
        need("dots w", w.len(), g.stored());
        need("dots x", x.len(), g.len);
        need("dots out", out.len(), g.rank);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (E::reads(self).dots)(w.as_ptr(), g, x.as_ptr(), out.as_mut_ptr()) }
    }

    /// `y = sum_r coef[r] row r` (`y +=` when `add`).
    #[inline]
    pub fn combine<E: Stored>(&self, w: &[E], g: Geometry, coef: &[f32], y: &mut [f32], add: bool) {
        need("combine w", w.len(), g.stored());
        need("combine coef", coef.len(), g.rank);
        need("combine y", y.len(), g.len);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (E::reads(self).combine)(w.as_ptr(), g, coef.as_ptr(), y.as_mut_ptr(), add) }
    }

    /// `u = s X w^T` for `rows` rows; `x` is `(rows, len)`, `u` is `(rows, rank)`.
    #[inline]
    pub fn dots_batch<E: Stored>(&self, w: &[E], g: Geometry, x: &[f32], u: &mut [f32], s: f32) {
        need("dots_batch w", w.len(), g.stored());
        let rows = u.len() / g.rank;
        need("dots_batch u", u.len(), rows * g.rank);
        need("dots_batch x", x.len(), rows * g.len);
        if g.len == 0 {
            // The block kernels start their sums from the first columns.
            return u.fill(0.0);
        }
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (E::reads(self).dots_batch)(w.as_ptr(), g, x.as_ptr(), rows, u.as_mut_ptr(), s) }
    }

    /// `y (+)= u w` for `rows` rows; `u` is `(rows, rank)`, `y` is `(rows, len)`.
    #[inline]
    pub fn combine_batch<E: Stored>(&self, w: &[E], g: Geometry, u: &[f32], y: &mut [f32], add: bool) {
        need("combine_batch w", w.len(), g.stored());
        let rows = u.len() / g.rank;
        need("combine_batch u", u.len(), rows * g.rank);
        need("combine_batch y", y.len(), rows * g.len);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (E::reads(self).combine_batch)(w.as_ptr(), g, u.as_ptr(), rows, y.as_mut_ptr(), add) }
    }

    /// `out = round(w + delta)` in f64, rounded once to nearest even; `back`, where there is one, becomes
    /// `round(out - delta)`. The bits are the same on every ISA. `w` is row-major with `geometry.len` columns.
    pub fn fuse<E: Stored>(&self, p: &Product<'_>, w: &[E], out: &mut [E], back: Option<&mut [E]>) {
        let (g, rows) = (p.geometry, p.rows.len() / p.geometry.rank);
        need("fuse rows", p.rows.len(), rows * g.rank);
        need("fuse columns", p.columns.len(), g.stored());
        need("fuse w", w.len(), rows * g.len);
        need("fuse out", out.len(), w.len());
        if let Some(back) = &back {
            need("fuse back", back.len(), w.len());
        }
        // SAFETY: the table exists only where its ISA does; the bodies are safe code.
        unsafe { (E::reads(self).fuse)(p, w, out, back) }
    }

    /// `row r += coef[r] v`.
    #[inline]
    pub fn rank1(&self, w: &mut [f32], g: Geometry, coef: &[f32], v: &[f32]) {
        need("rank1 w", w.len(), g.stored());
        need("rank1 coef", coef.len(), g.rank);
        need("rank1 v", v.len(), g.len);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (self.rank1)(w.as_mut_ptr(), g, coef.as_ptr(), v.as_ptr()) }
    }

    /// One sweep: `e = target - u w`, `row r += k[r] e`; `target` becomes `e`. Returns `|e|^2`.
    #[inline]
    pub fn fit_sweep(&self, w: &mut [f32], g: Geometry, u: &[f32], k: &[f32], target: &mut [f32]) -> f32 {
        need("fit_sweep w", w.len(), g.stored());
        need("fit_sweep u", u.len(), g.rank);
        need("fit_sweep k", k.len(), g.rank);
        need("fit_sweep target", target.len(), g.len);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (self.fit_sweep)(w.as_mut_ptr(), g, u.as_ptr(), k.as_ptr(), target.as_mut_ptr()) }
    }

    /// `row r += sum_m coef[m][r] v[m]`; `coef` is `(rows, rank)`, `v` is `(rows, len)`.
    #[inline]
    pub fn outer_batch(&self, w: &mut [f32], g: Geometry, coef: &[f32], v: &[f32]) {
        need("outer_batch w", w.len(), g.stored());
        let rows = coef.len() / g.rank;
        need("outer_batch coef", coef.len(), rows * g.rank);
        need("outer_batch v", v.len(), rows * g.len);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (self.outer_batch)(w.as_mut_ptr(), g, coef.as_ptr(), v.as_ptr(), rows) }
    }

    /// `out = x x`.
    #[inline]
    pub fn squares(&self, x: &[f32], out: &mut [f32]) {
        need("squares out", out.len(), x.len());
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.squares)(x, out) }
    }

    /// `out = a b`.
    #[inline]
    pub fn products(&self, a: &[f32], b: &[f32], out: &mut [f32]) {
        need("products b", b.len(), a.len());
        need("products out", out.len(), a.len());
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.products)(a, b, out) }
    }

    /// `g += c f (w - anchor)`.
    #[inline]
    pub fn pull(&self, c: f32, f: &[f32], w: &[f32], anchor: &[f32], g: &mut [f32]) {
        for n in [f.len(), w.len(), anchor.len()] {
            need("pull", n, g.len());
        }
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.pull)(c, f, w, anchor, g) }
    }

    /// Row-major `[(w - th) d, th d]` of two packed f32 factors with one weight per column; `swap` gives
    /// `[w d, (w - th) d]`.
    #[inline]
    pub fn moved_rows(
        &self,
        g: Geometry,
        [w, th]: [&[f32]; 2],
        d: &[f32],
        [first, second]: [&mut [f32]; 2],
        swap: bool,
    ) {
        need("moved_rows w", w.len(), g.stored());
        need("moved_rows th", th.len(), g.stored());
        need("moved_rows d", d.len(), g.len);
        need("moved_rows first", first.len(), g.rank * g.len);
        need("moved_rows second", second.len(), g.rank * g.len);
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.moved_rows)(g, [w, th], d, [first, second], swap) }
    }

    /// One AdamW step on `w` from the gradient sum `g`, which is cleared; `m` and `v` are the moments.
    #[inline]
    pub fn adamw(&self, s: &AdamStep, g: &mut [f32], m: &mut [f32], v: &mut [f32], w: &mut [f32]) {
        for n in [g.len(), m.len(), v.len()] {
            need("adamw", n, w.len());
        }
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.adamw)(s, g, m, v, w) }
    }

    /// `m = beta m + gradient g + decay w`, `w -= lr m`, `g = 0`, with `[gradient, beta, decay, lr]`.
    #[inline]
    pub fn momentum(&self, s: [f32; 4], g: &mut [f32], m: &mut [f32], w: &mut [f32]) {
        for n in [g.len(), m.len()] {
            need("momentum", n, w.len());
        }
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.momentum)(s, g, m, w) }
    }

    /// `<a, b>`.
    #[inline]
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        need("dot b", b.len(), a.len());
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.dot)(a, b) }
    }

    /// `y += c x`.
    #[inline]
    pub fn axpy(&self, c: f32, x: &[f32], y: &mut [f32]) {
        need("axpy y", y.len(), x.len());
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.axpy)(c, x, y) }
    }

    /// `y = c y`.
    #[inline]
    pub fn scale(&self, c: f32, y: &mut [f32]) {
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.scale)(c, y) }
    }

    /// `w += c g`, then `g = 0`.
    #[inline]
    pub fn step_and_clear(&self, c: f32, g: &mut [f32], w: &mut [f32]) {
        need("step_and_clear w", w.len(), g.len());
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.step_and_clear)(c, g, w) }
    }

    /// Whether every element is finite.
    #[inline]
    pub fn all_finite(&self, x: &[f32]) -> bool {
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.all_finite)(x) }
    }

    /// All inner products of rows of `n` columns, in f64: `out[i * q + j] = <x_i, y_j>`. The same bits on
    /// every ISA.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn products_of_rows(&self, x: &[f32], y: &[f32], n: usize, out: &mut [f64]) {
        let (p, q) = (x.len() / n, y.len() / n);
        need("products_of_rows x", x.len(), p * n);
        need("products_of_rows y", y.len(), q * n);
        need("products_of_rows out", out.len(), p * q);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (self.products_of_rows)(x, y, n, out, false) }
    }

    /// [`Kernels::products_of_rows`] of rows with themselves, in half the time.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn gram_of_rows(&self, x: &[f32], n: usize, out: &mut [f64]) {
        let p = x.len() / n;
        need("gram_of_rows x", x.len(), p * n);
        need("gram_of_rows out", out.len(), p * p);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (self.products_of_rows)(x, x, n, out, true) }
    }

    /// `out_i = sum_q coef[i * k + q] m_q` for rows of `n` columns: f64 inside, rounded once, the same bits on
    /// every ISA.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn mix_rows(&self, coef: &[f64], m: &[f32], n: usize, out: &mut [f32]) {
        let (k, rows) = (m.len() / n, out.len() / n);
        need("mix_rows m", m.len(), k * n);
        need("mix_rows out", out.len(), rows * n);
        need("mix_rows coef", coef.len(), rows * k);
        // SAFETY: lengths checked above; the table exists only where its ISA does.
        unsafe { (self.mix_rows)(coef, k, m, n, out) }
    }

    /// One recursive-least-squares step on P (f64, r x r, symmetric); writes the gain `k`, returns `u.k`.
    /// Haykin, Adaptive Filter Theory, ch. 13; `phi` is the forgetting factor.
    #[inline]
    pub fn rls_gain(&self, p: &mut [f64], u: &[f32], phi: f64, pu: &mut [f64], k: &mut [f32]) -> f64 {
        need("rls_gain p", p.len(), u.len() * u.len());
        need("rls_gain pu", pu.len(), u.len());
        need("rls_gain k", k.len(), u.len());
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.rls_gain)(p, u, phi, pu, k) }
    }

    /// For benches: reads `x` once, front to back; the returned sum keeps the loads alive.
    pub fn probe_read(&self, x: &[f32]) -> f32 {
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.probe_read)(x) }
    }

    /// For benches: `turns` rounds of register-only FMA chains; returns the floating point operations done.
    pub fn probe_fma(&self, turns: usize) -> f64 {
        // SAFETY: the table exists only where its ISA does.
        unsafe { (self.probe_fma)(turns, std::hint::black_box(0.0)) }
    }
}
