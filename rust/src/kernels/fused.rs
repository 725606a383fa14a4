//! `round(w + s sum_r b_r a_r)` in one order of operations, so that every ISA gives the same bits.
//!
//! A product of two f32 is exact in f64, so a fused multiply-add and a product with a sum round alike. The
//! terms are added by rising r, then scaled, then added to w, all in f64, and rounded once to nearest even.

use bytemuck::Pod;
use half::{bf16, f16};

use super::TILE;
use super::geometry::Geometry;
use super::vector::Vector;

/// Rows whose sums are kept in registers together.
const ROWS: usize = 4;
/// Bytes of the factor that rows pass over together: half of a small L1.
const PANEL: usize = 16 << 10;

/// A weight as a base model stores it.
pub trait Weight: Pod {
    /// The number in f64, exactly. Only for finite numbers.
    fn widen(self) -> f64;
    /// The nearest number of this type, ties to even; infinity beyond its range.
    fn narrow(x: f64) -> Self;
    /// Whether it is neither NaN nor infinity.
    fn finite(self) -> bool;
}

/// `|x|` rounded to `P` bits, ties to even, on the grid of a type whose smallest normal number is `2^LOW`.
/// Beside a number `53 - P` binades higher, f64 has no finer grid than that: the addition rounds. Numbers beyond
/// every narrow type stay beyond it.
#[inline(always)]
fn round_to<const P: u64, const LOW: i64>(x: f64) -> f64 {
    const BEYOND: f64 = f64::from_bits((1023 + 300) << 52);
    let x = x.abs().min(BEYOND);
    let lowest = (((1023 + LOW) as u64 + 53 - P) << 52) as i64;
    let high = (x.to_bits() as i64 & (0x7ff << 52)) + ((53 - P) << 52) as i64;
    let high = f64::from_bits(high.max(lowest) as u64);
    (x + high) - high
}

/// The sign of x as the highest of 16 bits.
#[inline(always)]
fn sign(x: f64) -> u32 {
    (x.to_bits() >> 48) as u32 & 0x8000
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn narrow(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.to_bits() & 0x7f80_0000 != 0x7f80_0000
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn widen(self) -> f64 {
        f64::from(f32::from_bits(u32::from(self.to_bits()) << 16))
    }
    #[inline(always)]
    fn narrow(x: f64) -> bf16 {
        let bits = (round_to::<8, -126>(x) as f32).to_bits();
        bf16::from_bits((bits >> 16 | sign(x)) as u16)
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.to_bits() & 0x7f80 != 0x7f80
    }
}

impl Weight for f16 {
    #[inline(always)]
    fn widen(self) -> f64 {
        // The exponent of f32 is 112 higher; the product also normalises subnormals, exactly.
        const UP: f32 = f32::from_bits((127 + 112) << 23);
        let h = u32::from(self.to_bits());
        let magnitude = f32::from_bits((h & 0x7fff) << 13) * UP;
        f64::from(f32::from_bits(magnitude.to_bits() | (h & 0x8000) << 16))
    }
    #[inline(always)]
    fn narrow(x: f64) -> f16 {
        // The other way: back to the exponent of f16, whose subnormals are some of f32's.
        const DOWN: f32 = f32::from_bits((127 - 112) << 23);
        let bits = (round_to::<11, -14>(x) as f32 * DOWN).to_bits() >> 13;
        f16::from_bits((bits.min(0x7c00) | sign(x)) as u16)
    }
    #[inline(always)]
    fn finite(self) -> bool {
        self.to_bits() & 0x7c00 != 0x7c00
    }
}

/// A delta in factors: `delta[i][j] = scale sum_r rows[i][r] columns[r][j]`.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// `(n, rank)`, row-major: some rows of the weight.
    pub rows: &'a [f32],
    /// `(rank, len)` as a factor stores it.
    pub columns: &'a [f32],
    /// Rank and length of `columns`.
    pub geometry: Geometry,
    /// Scaling, with its sign.
    pub scale: f64,
}

/// Two or one vectors of f64 sums for each of some rows.
#[inline(always)]
fn sums<const R: usize, const N: usize, const FUSED: bool>(
    p: &Product<'_>,
    row: usize,
    at: usize,
) -> [[f64; N]; R] {
    let (g, mut acc) = (p.geometry, [[0.0f64; N]; R]);
    let (tile, from) = (at / TILE, at % TILE);
    let rows: [&[f32]; R] = std::array::from_fn(|q| &p.rows[(row + q) * g.rank..(row + q + 1) * g.rank]);
    for r in 0..g.rank {
        let at = g.at(r, tile) + from;
        let x: &[f32; N] = p.columns[at..at + N].try_into().expect("a tile");
        for q in 0..R {
            let c = f64::from(rows[q][r]);
            for i in 0..N {
                let x = f64::from(x[i]);
                acc[q][i] = if FUSED { c.mul_add(x, acc[q][i]) } else { c * x + acc[q][i] };
            }
        }
    }
    acc
}

/// The tile at `x`, padded with zeros where fewer than `N` numbers are left. A whole one is no call of `memcpy`.
#[inline(always)]
fn tile_of<E: Weight, const N: usize>(x: &[E]) -> [E; N] {
    <[E; N]>::try_from(x).unwrap_or_else(|_| {
        let mut tile = [E::zeroed(); N];
        tile[..x.len()].copy_from_slice(x);
        tile
    })
}

/// The other way.
#[inline(always)]
fn put<E: Weight, const N: usize>(tile: &[E; N], x: &mut [E]) {
    match <&mut [E; N]>::try_from(&mut *x) {
        Ok(whole) => *whole = *tile,
        Err(_) => x.copy_from_slice(&tile[..x.len()]),
    }
}

/// Rounds one row of a tile: `out = round(w + d)` and, when asked, `back = round(out - d)`.
#[inline(always)]
fn finish<E: Weight, const N: usize>(
    acc: &[f64; N],
    scale: f64,
    w: &[E],
    out: &mut [E],
    back: Option<&mut [E]>,
) {
    let mut tile = tile_of::<E, N>(w);
    let (mut delta, mut sum) = (*acc, [E::zeroed(); N]);
    for i in 0..N {
        delta[i] *= scale;
        sum[i] = E::narrow(tile[i].widen() + delta[i]);
    }
    put(&sum, out);
    if let Some(back) = back {
        for i in 0..N {
            tile[i] = E::narrow(sum[i].widen() - delta[i]);
        }
        put(&tile, back);
    }
}

#[inline(always)]
fn group<E: Weight, const R: usize, const N: usize, const FUSED: bool>(
    p: &Product<'_>,
    row: usize,
    (from, to): (usize, usize),
    w: &[E],
    out: &mut [E],
    back: &mut Option<&mut [E]>,
) {
    let len = p.geometry.len;
    for at in (from..to).step_by(N) {
        let acc = sums::<R, N, FUSED>(p, row, at);
        let n = N.min(len - at);
        for (q, acc) in acc.iter().enumerate() {
            let here = (row + q) * len + at..(row + q) * len + at + n;
            let back = back.as_mut().map(|b| &mut b[here.clone()]);
            finish::<E, N>(acc, p.scale, &w[here.clone()], &mut out[here], back);
        }
    }
}

#[inline(always)]
fn body<E: Weight, const N: usize, const FUSED: bool>(
    p: &Product<'_>,
    w: &[E],
    out: &mut [E],
    mut back: Option<&mut [E]>,
) {
    let (rank, len) = (p.geometry.rank, p.geometry.len);
    let rows = p.rows.len() / rank;
    let panel = (PANEL / (size_of::<f32>() * rank * TILE)).max(1) * TILE;
    for from in (0..len).step_by(panel) {
        let span = (from, len.min(from + panel));
        let whole = rows - rows % ROWS;
        for row in (0..whole).step_by(ROWS) {
            group::<E, ROWS, N, FUSED>(p, row, span, w, out, &mut back);
        }
        for row in whole..rows {
            group::<E, 1, N, FUSED>(p, row, span, w, out, &mut back);
        }
    }
}

/// `out = round(w + delta)`; `back`, when asked for, `= round(out - delta)`.
#[inline(always)]
pub(crate) fn fuse<E: Weight, V: Vector>(p: &Product<'_>, w: &[E], out: &mut [E], back: Option<&mut [E]>) {
    match (V::FUSED, V::W) {
        (false, _) => body::<E, 8, false>(p, w, out, back),
        (true, 16) => body::<E, 16, true>(p, w, out, back),
        (true, _) => body::<E, 8, true>(p, w, out, back),
    }
}
