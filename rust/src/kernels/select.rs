//! Choosing among entries, for merges on streamed deltas: plain loops, compiled once per ISA.
//!
//! Sums of f32 multiply and add without fusing, sums of f64 go through eight lanes in one order: every ISA gives
//! the same bits.

use super::Kernels;

/// Columns that are worked on at once: sums stay in registers or L1.
const SPAN: usize = 64;
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
    let mut count = 0;
    let groups = x.chunks_exact(SPAN);
    let rest = groups.remainder();
    for g in groups {
        let g: &[f32; SPAN] = g.try_into().expect("a whole group");
        let mut above = 0u32;
        let mut flags = [0u8; SPAN];
        for (flag, v) in flags.iter_mut().zip(g) {
            let v = v.abs();
            above += u32::from(v > hi);
            *flag = u8::from(v >= lo) & u8::from(v <= hi);
        }
        count += above as usize;
        // Eight flags at a time: few lie inside, and they are found without looking at the others.
        for (flags, g) in flags.chunks_exact(8).zip(g.chunks_exact(8)) {
            let mut word = u64::from_le_bytes(flags.try_into().expect("eight flags"));
            while word != 0 {
                inside.push(g[word.trailing_zeros() as usize / 8].abs());
                word &= word - 1;
            }
        }
    }
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

/// `SPAN` columns of a row from `from` on, zeros beyond its end.
#[inline(always)]
fn span(row: &[f32], from: usize) -> [f32; SPAN] {
    let mut out = [0.0; SPAN];
    let n = SPAN.min(row.len() - from);
    out[..n].copy_from_slice(&row[from..from + n]);
    out
}

/// `v` where `keep`, else 0, without a branch that the compiler could turn into two masked stores.
#[inline(always)]
fn only(keep: bool, v: f32) -> f32 {
    f32::from_bits(v.to_bits() & u32::from(keep).wrapping_neg())
}

/// Calls `$body` for each stretch of columns, `$get` being the columns of a row: whole ones in place.
macro_rules! by_span {
    ($out:expr, |$get:ident, $to:ident| $body:block) => {
        let n = $out.len();
        let mut from = 0;
        while from + SPAN <= n {
            let $get = |row: &[f32]| -> [f32; SPAN] { row[from..from + SPAN].try_into().expect("a whole span") };
            let $to: &mut [f32] = &mut $out[from..from + SPAN];
            $body
            from += SPAN;
        }
        if from < n {
            let $get = |row: &[f32]| span(row, from);
            let $to: &mut [f32] = &mut $out[from..];
            $body
        }
    };
}

/// Per column: the sign of `sum votes x`, then the sum of the entries that have it; a draw is positive.
#[inline(always)]
pub(crate) fn elect(e: &Election<'_>, rows: &[&[f32]], out: &mut [f32]) {
    by_span!(out, |get, to| {
        let mut sign = [0.0f32; SPAN];
        for (row, &vote) in rows.iter().zip(e.votes) {
            let x = get(row);
            if e.frequency {
                for i in 0..SPAN {
                    sign[i] += only(x[i] > 0.0, vote) - only(x[i] < 0.0, vote);
                }
            } else {
                for i in 0..SPAN {
                    sign[i] += vote * x[i];
                }
            }
        }
        let (mut sum, mut weight) = ([0.0f32; SPAN], [0.0f32; SPAN]);
        for (((row, &vote), &w), &size) in rows.iter().zip(e.votes).zip(e.weights).zip(e.sizes) {
            let x = get(row);
            // An entry under a negative vote stands for the other sign.
            let side = if vote < 0.0 { -1.0f32 } else { 1.0 };
            for i in 0..SPAN {
                let v = side * x[i];
                let same = (v != 0.0) & ((v > 0.0) == (sign[i] >= 0.0));
                sum[i] += only(same, w * x[i]);
                weight[i] += only(same, size);
            }
        }
        if e.normalize {
            for i in 0..SPAN {
                let mean = sum[i] / weight[i];
                sum[i] = if weight[i] > 0.0 { mean } else { 0.0 };
            }
        }
        for (to, sum) in to.iter_mut().zip(sum) {
            *to = e.lam * sum;
        }
    });
}

/// `lam sum c_k f_k x_k / sum c_k f_k` per column, 0 where nothing weighs; `f_k` is a row of its own.
#[inline(always)]
pub(crate) fn ratio(rows: &[&[f32]], f: &[&[f32]], c: &[f32], lam: f32, out: &mut [f32]) {
    by_span!(out, |get, to| {
        let (mut sum, mut weight) = ([0.0f32; SPAN], [0.0f32; SPAN]);
        for ((row, f), &c) in rows.iter().zip(f).zip(c) {
            let (x, f) = (get(row), get(f));
            for i in 0..SPAN {
                let w = c * f[i];
                sum[i] += w * x[i];
                weight[i] += w;
            }
        }
        for i in 0..SPAN {
            let mean = sum[i] / weight[i];
            sum[i] = if weight[i] > 0.0 { mean } else { 0.0 };
        }
        for (to, sum) in to.iter_mut().zip(sum) {
            *to = lam * sum;
        }
    });
}

/// `m` times the variance over rows per column, relative to the first row: rows that are equal give exactly 0.
#[inline(always)]
pub(crate) fn variance(rows: &[&[f32]], out: &mut [f32]) {
    let share = 1.0 / rows.len() as f32;
    by_span!(out, |get, to| {
        let first = get(rows[0]);
        let mut mean = [0.0f32; SPAN];
        for row in &rows[1..] {
            let x = get(row);
            for i in 0..SPAN {
                mean[i] += x[i] - first[i];
            }
        }
        let mut sum = [0.0f32; SPAN];
        for i in 0..SPAN {
            mean[i] *= share;
            sum[i] = mean[i] * mean[i];
        }
        for row in &rows[1..] {
            let x = get(row);
            for i in 0..SPAN {
                let d = (x[i] - first[i]) - mean[i];
                sum[i] += d * d;
            }
        }
        to.copy_from_slice(&sum[..to.len()]);
    });
}

/// Columns where two rows have opposite signs, and columns that are not all zero.
#[inline(always)]
pub(crate) fn conflicts(rows: &[&[f32]]) -> [usize; 2] {
    let n = rows.first().map_or(0, |r| r.len());
    let mut counts = [0usize; 2];
    for from in (0..n).step_by(SPAN) {
        let (mut most, mut least) = ([0.0f32; SPAN], [0.0f32; SPAN]);
        for row in rows {
            let x = span(row, from);
            for i in 0..SPAN {
                most[i] = if x[i] > most[i] { x[i] } else { most[i] };
                least[i] = if x[i] < least[i] { x[i] } else { least[i] };
            }
        }
        let (mut opposite, mut some) = (0u32, 0u32);
        for (&most, &least) in most.iter().zip(&least) {
            opposite += u32::from(most > 0.0) & u32::from(least < 0.0);
            some += u32::from(most > 0.0) | u32::from(least < 0.0);
        }
        counts[0] += opposite as usize;
        counts[1] += some as usize;
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
    let mut sum = 0.0;
    for i in 0..LANES {
        sum += (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]);
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
        super::need("elect sizes", e.sizes.len(), rows.len());
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
