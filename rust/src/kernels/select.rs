//! Choosing among entries, for merges on streamed deltas: plain loops, compiled once per ISA.
//!
//! Sums of f32 multiply and add without fusing, sums of f64 go through eight lanes in one order: every ISA gives
//! the same bits.

use super::Kernels;

/// Columns that an election works on at once: its sums stay in registers or L1.
const SPAN: usize = 64;
/// Entries tested together for lying in a bracket.
const GROUP: usize = 16;
/// f64 lanes of a sum.
const LANES: usize = 8;

type Ratio = unsafe fn(&[&[f32]], &[&[f32]], &[f32], f32, &mut [f32]);

/// One ISA's instantiations.
#[derive(Clone, Copy)]
pub(super) struct Select {
    pub bracket: unsafe fn(&[f32], [f32; 2], &mut Vec<f32>) -> usize,
    pub keep_band: unsafe fn([f32; 2], &mut [f32]),
    pub keep_bits: unsafe fn(&[u64], f32, &mut [f32]),
    pub keep_above: unsafe fn(&[f32], f32, &mut [f32]),
    pub elect: unsafe fn(&Election<'_>, &[&[f32]], &mut [f32]),
    pub ratio: Ratio,
    pub variance: unsafe fn(&[&[f32]], &mut [f32]),
    pub conflicts: unsafe fn(&[&[f32]]) -> [usize; 2],
    pub sum_squares: unsafe fn(&[f32]) -> f64,
    pub sum_magnitudes: unsafe fn(&[f32]) -> f64,
}

/// How [`Kernels::elect`] chooses a sign per column, and what it makes of the entries that have it.
#[derive(Clone, Copy, Debug)]
pub struct Election<'a> {
    /// Votes of each row, times its entry (or its entry's sign).
    pub votes: &'a [f32],
    /// Weights of each row in the sum.
    pub weights: &'a [f32],
    /// What each row counts in the divisor, where it agrees.
    pub sizes: &'a [f32],
    /// Whether signs are counted instead of values added up.
    pub frequency: bool,
    /// Whether the sum is divided by the sizes that are in it.
    pub normalize: bool,
    /// Factor on the result.
    pub lam: f32,
}

/// Entries with `|x| > hi`; those with `lo <= |x| <= hi` are appended to `inside`.
#[inline(always)]
pub(crate) fn bracket(x: &[f32], [lo, hi]: [f32; 2], inside: &mut Vec<f32>) -> usize {
    let mut above = [0u32; GROUP];
    let groups = x.chunks_exact(GROUP);
    let rest = groups.remainder();
    for g in groups {
        let mut any = 0u32;
        for i in 0..GROUP {
            let v = g[i].abs();
            above[i] += u32::from(v > hi);
            any |= u32::from(v >= lo) & u32::from(v <= hi);
        }
        if any != 0 {
            inside.extend(g.iter().map(|v| v.abs()).filter(|v| *v >= lo && *v <= hi));
        }
    }
    let mut count: usize = above.iter().map(|&c| c as usize).sum();
    for v in rest.iter().map(|v| v.abs()) {
        count += usize::from(v > hi);
        if v >= lo && v <= hi {
            inside.push(v);
        }
    }
    count
}

/// `x = 0` where not `lo <= |x| <= hi`.
#[inline(always)]
pub(crate) fn keep_band([lo, hi]: [f32; 2], x: &mut [f32]) {
    for x in x {
        let v = x.abs();
        *x = if v >= lo && v <= hi { *x } else { 0.0 };
    }
}

/// `x = c x` where the bit is set, else 0; bit i % 64 of word i / 64.
#[inline(always)]
pub(crate) fn keep_bits(bits: &[u64], c: f32, x: &mut [f32]) {
    for (x, &word) in x.chunks_mut(64).zip(bits) {
        for (half, x) in x.chunks_mut(32).enumerate() {
            let word = (word >> (32 * half)) as u32;
            for (i, x) in x.iter_mut().enumerate() {
                *x = if word >> i & 1 != 0 { *x * c } else { 0.0 };
            }
        }
    }
}

/// `x = 0` where `key < least`.
#[inline(always)]
pub(crate) fn keep_above(key: &[f32], least: f32, x: &mut [f32]) {
    for (x, &key) in x.iter_mut().zip(key) {
        *x = if key >= least { *x } else { 0.0 };
    }
}

/// Per column: the sign of `sum votes x`, then the sum of the entries that have it; a draw is positive.
#[inline(always)]
pub(crate) fn elect(e: &Election<'_>, rows: &[&[f32]], out: &mut [f32]) {
    for (at, out) in out.chunks_mut(SPAN).enumerate() {
        let (from, n) = (at * SPAN, out.len());
        let mut sign = [0.0f32; SPAN];
        for (row, &vote) in rows.iter().zip(e.votes) {
            let row = &row[from..from + n];
            if e.frequency {
                for (s, &x) in sign.iter_mut().zip(row) {
                    let one = if x > 0.0 { vote } else { -vote };
                    *s += if x != 0.0 { one } else { 0.0 };
                }
            } else {
                for (s, &x) in sign.iter_mut().zip(row) {
                    *s += vote * x;
                }
            }
        }
        let (mut sum, mut weight) = ([0.0f32; SPAN], [0.0f32; SPAN]);
        for (((row, &vote), &w), &size) in rows.iter().zip(e.votes).zip(e.weights).zip(e.sizes) {
            let row = &row[from..from + n];
            // An entry under a negative vote stands for the other sign.
            let side = if vote < 0.0 { -1.0f32 } else { 1.0 };
            for (((sum, weight), &s), &x) in sum.iter_mut().zip(&mut weight).zip(&sign).zip(row) {
                let v = side * x;
                let same = ((v > 0.0) & (s >= 0.0)) | ((v < 0.0) & (s < 0.0));
                *sum += if same { w * x } else { 0.0 };
                *weight += if same { size } else { 0.0 };
            }
        }
        if e.normalize {
            for ((out, sum), weight) in out.iter_mut().zip(sum).zip(weight) {
                *out = if weight > 0.0 { e.lam * (sum / weight) } else { 0.0 };
            }
        } else {
            for (out, sum) in out.iter_mut().zip(sum) {
                *out = e.lam * sum;
            }
        }
    }
}

/// `lam sum c_k f_k x_k / sum c_k f_k` per column, 0 where nothing weighs; `f_k` is a row of its own.
#[inline(always)]
pub(crate) fn ratio(rows: &[&[f32]], f: &[&[f32]], c: &[f32], lam: f32, out: &mut [f32]) {
    for (at, out) in out.chunks_mut(SPAN).enumerate() {
        let (from, n) = (at * SPAN, out.len());
        let (mut sum, mut weight) = ([0.0f32; SPAN], [0.0f32; SPAN]);
        for ((row, f), &c) in rows.iter().zip(f).zip(c) {
            let (row, f) = (&row[from..from + n], &f[from..from + n]);
            for (((sum, weight), &x), &f) in sum.iter_mut().zip(&mut weight).zip(row).zip(f) {
                let w = c * f;
                *sum += w * x;
                *weight += w;
            }
        }
        for ((out, sum), weight) in out.iter_mut().zip(sum).zip(weight) {
            *out = if weight > 0.0 { lam * (sum / weight) } else { 0.0 };
        }
    }
}

/// `m` times the variance over rows per column, relative to the first row: rows that are equal give exactly 0.
#[inline(always)]
pub(crate) fn variance(rows: &[&[f32]], out: &mut [f32]) {
    let share = 1.0 / rows.len() as f32;
    for (at, out) in out.chunks_mut(SPAN).enumerate() {
        let (from, n) = (at * SPAN, out.len());
        let first = &rows[0][from..from + n];
        let mut mean = [0.0f32; SPAN];
        for row in &rows[1..] {
            for ((mean, &x), &x0) in mean.iter_mut().zip(&row[from..from + n]).zip(first) {
                *mean += x - x0;
            }
        }
        for mean in &mut mean {
            *mean *= share;
        }
        for (out, mean) in out.iter_mut().zip(&mean) {
            *out = mean * mean;
        }
        for row in &rows[1..] {
            for (((out, &mean), &x), &x0) in out.iter_mut().zip(&mean).zip(&row[from..from + n]).zip(first) {
                let d = (x - x0) - mean;
                *out += d * d;
            }
        }
    }
}

/// Columns where two rows have opposite signs, and columns that are not all zero.
#[inline(always)]
pub(crate) fn conflicts(rows: &[&[f32]]) -> [usize; 2] {
    let n = rows.first().map_or(0, |r| r.len());
    let mut counts = [0usize; 2];
    let mut from = 0;
    while from < n {
        let width = SPAN.min(n - from);
        let (mut most, mut least) = ([0.0f32; SPAN], [0.0f32; SPAN]);
        for row in rows {
            for ((most, least), &x) in most.iter_mut().zip(&mut least).zip(&row[from..from + width]) {
                *most = if x > *most { x } else { *most };
                *least = if x < *least { x } else { *least };
            }
        }
        let (mut opposite, mut some) = (0u32, 0u32);
        for (&most, &least) in most.iter().zip(&least) {
            opposite += u32::from(most > 0.0) & u32::from(least < 0.0);
            some += u32::from(most > 0.0) | u32::from(least < 0.0);
        }
        counts[0] += opposite as usize;
        counts[1] += some as usize;
        from += width;
    }
    counts
}

/// A sum in f64 of what `f` makes of each entry.
#[inline(always)]
fn total(x: &[f32], f: impl Fn(f64) -> f64) -> f64 {
    let mut acc = [[0.0f64; LANES]; 4];
    let groups = x.chunks_exact(4 * LANES);
    let rest = groups.remainder();
    for g in groups {
        for (q, acc) in acc.iter_mut().enumerate() {
            for (acc, &x) in acc.iter_mut().zip(&g[q * LANES..(q + 1) * LANES]) {
                *acc += f(f64::from(x));
            }
        }
    }
    let lanes: [f64; LANES] = std::array::from_fn(|i| (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]));
    let mut sum = 0.0;
    for v in lanes {
        sum += v;
    }
    for &x in rest {
        sum += f(f64::from(x));
    }
    sum
}

/// `sum x^2` in f64, where no f32 overflows; not finite exactly when an entry is not.
#[inline(always)]
pub(crate) fn sum_squares(x: &[f32]) -> f64 {
    total(x, |v| v * v)
}

/// `sum |x|` in f64.
#[inline(always)]
pub(crate) fn sum_magnitudes(x: &[f32]) -> f64 {
    total(x, f64::abs)
}

/// One ISA's wrappers of the bodies above, as `SELECT`.
macro_rules! select_table {
    ($(#[$attr:meta])*) => {
        mod selection {
            use crate::kernels::select::{self, Election, Select};

            $(#[$attr])*
            unsafe fn bracket(x: &[f32], range: [f32; 2], inside: &mut Vec<f32>) -> usize {
                select::bracket(x, range, inside)
            }
            $(#[$attr])*
            unsafe fn keep_band(range: [f32; 2], x: &mut [f32]) {
                select::keep_band(range, x)
            }
            $(#[$attr])*
            unsafe fn keep_bits(bits: &[u64], c: f32, x: &mut [f32]) {
                select::keep_bits(bits, c, x)
            }
            $(#[$attr])*
            unsafe fn keep_above(key: &[f32], least: f32, x: &mut [f32]) {
                select::keep_above(key, least, x)
            }
            $(#[$attr])*
            unsafe fn elect(e: &Election<'_>, rows: &[&[f32]], out: &mut [f32]) {
                select::elect(e, rows, out)
            }
            $(#[$attr])*
            unsafe fn ratio(rows: &[&[f32]], f: &[&[f32]], c: &[f32], lam: f32, out: &mut [f32]) {
                select::ratio(rows, f, c, lam, out)
            }
            $(#[$attr])*
            unsafe fn variance(rows: &[&[f32]], out: &mut [f32]) {
                select::variance(rows, out)
            }
            $(#[$attr])*
            unsafe fn conflicts(rows: &[&[f32]]) -> [usize; 2] {
                select::conflicts(rows)
            }
            $(#[$attr])*
            unsafe fn sum_squares(x: &[f32]) -> f64 {
                select::sum_squares(x)
            }
            $(#[$attr])*
            unsafe fn sum_magnitudes(x: &[f32]) -> f64 {
                select::sum_magnitudes(x)
            }

            pub(super) const SELECT: Select = Select {
                bracket,
                keep_band,
                keep_bits,
                keep_above,
                elect,
                ratio,
                variance,
                conflicts,
                sum_squares,
                sum_magnitudes,
            };
        }
    };
}
pub(super) use select_table;

/// Every row as long as the result.
fn check(what: &'static str, rows: &[&[f32]], n: usize) {
    for row in rows {
        super::need(what, row.len(), n);
    }
}

impl Kernels {
    /// Counts `|x| > hi` and appends the magnitudes with `lo <= |x| <= hi` to `inside`.
    #[inline]
    pub fn bracket(&self, x: &[f32], range: [f32; 2], inside: &mut Vec<f32>) -> usize {
        // SAFETY: the table exists only where its ISA does; so below.
        unsafe { (self.select.bracket)(x, range, inside) }
    }

    /// `x = 0` where not `lo <= |x| <= hi`.
    #[inline]
    pub fn keep_band(&self, range: [f32; 2], x: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.select.keep_band)(range, x) }
    }

    /// `x = c x` where bit `i % 64` of word `i / 64` is set, else 0.
    #[inline]
    pub fn keep_bits(&self, bits: &[u64], c: f32, x: &mut [f32]) {
        super::need("keep_bits bits", bits.len(), x.len().div_ceil(64));
        // SAFETY: as above.
        unsafe { (self.select.keep_bits)(bits, c, x) }
    }

    /// `x = 0` where `key < least`.
    #[inline]
    pub fn keep_above(&self, key: &[f32], least: f32, x: &mut [f32]) {
        super::need("keep_above key", key.len(), x.len());
        // SAFETY: as above.
        unsafe { (self.select.keep_above)(key, least, x) }
    }

    /// Per column: the sign of `sum votes_k x_k` (or of `sum votes_k sign(x_k)`), then the weighted sum, or
    /// mean, of the entries with that sign; an entry under a negative vote stands for the other sign. A draw is
    /// positive.
    ///
    /// # Panics
    /// When lengths do not fit.
    #[inline]
    pub fn elect(&self, e: &Election<'_>, rows: &[&[f32]], out: &mut [f32]) {
        super::need("elect votes", e.votes.len(), rows.len());
        super::need("elect weights", e.weights.len(), rows.len());
        check("elect row", rows, out.len());
        // SAFETY: as above.
        unsafe { (self.select.elect)(e, rows, out) }
    }

    /// `lam sum c_k f_k x_k / sum c_k f_k` per column, 0 where the weights are.
    ///
    /// # Panics
    /// When lengths do not fit.
    #[inline]
    pub fn ratio(&self, rows: &[&[f32]], f: &[&[f32]], c: &[f32], lam: f32, out: &mut [f32]) {
        super::need("ratio f", f.len(), rows.len());
        super::need("ratio c", c.len(), rows.len());
        check("ratio row", rows, out.len());
        check("ratio f", f, out.len());
        // SAFETY: as above.
        unsafe { (self.select.ratio)(rows, f, c, lam, out) }
    }

    /// The number of rows times their variance, per column.
    ///
    /// # Panics
    /// When there is no row, or lengths do not fit.
    #[inline]
    pub fn variance(&self, rows: &[&[f32]], out: &mut [f32]) {
        assert!(!rows.is_empty(), "kernel variance: no rows");
        check("variance row", rows, out.len());
        // SAFETY: as above.
        unsafe { (self.select.variance)(rows, out) }
    }

    /// Columns where two rows have opposite signs, and columns that are not all zero.
    ///
    /// # Panics
    /// When rows differ in length.
    #[inline]
    pub fn conflicts(&self, rows: &[&[f32]]) -> [usize; 2] {
        check("conflicts row", rows, rows.first().map_or(0, |r| r.len()));
        // SAFETY: as above.
        unsafe { (self.select.conflicts)(rows) }
    }

    /// `sum x^2` in f64; not finite exactly when an entry is not.
    #[inline]
    pub fn sum_squares(&self, x: &[f32]) -> f64 {
        // SAFETY: as above.
        unsafe { (self.select.sum_squares)(x) }
    }

    /// `sum |x|` in f64.
    #[inline]
    pub fn sum_magnitudes(&self, x: &[f32]) -> f64 {
        // SAFETY: as above.
        unsafe { (self.select.sum_magnitudes)(x) }
    }
}
