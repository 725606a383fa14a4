//! One factor of a LoRA layer: owns its numbers and hides how they lie in memory.
//!
//! Outside, a factor is `rank` rows of `len` numbers. Inside it is one cache-line-aligned stream in the tile
//! order of [`kernels`](crate::kernels): never slower when warm, and read front to back when cold.

mod order;

use std::io::{self, Write};
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels::{Geometry, Kernels, TILE, prefetch_pages};
use crate::mapping;

pub use order::Bits;

/// One cache line; a `Vec` of them is aligned without any `unsafe`.
#[derive(Clone, Copy, Pod, Zeroable, PartialEq)]
#[repr(C, align(64))]
struct Line([u64; 8]);

/// Calls `$body` with `$w` bound to the typed slice of `$factor`.
macro_rules! typed {
    ($factor:expr, $w:ident => $body:expr) => {
        match $factor.dtype {
            Dtype::F32 => {
                let $w: &[f32] = $factor.slice();
                $body
            }
            Dtype::F16 => {
                let $w: &[f16] = $factor.slice();
                $body
            }
            Dtype::Bf16 => {
                let $w: &[bf16] = $factor.slice();
                $body
            }
        }
    };
}

/// A `(rank, len)` matrix stored for the kernels.
#[derive(Clone, PartialEq)]
pub struct Factor {
    geometry: Geometry,
    dtype: Dtype,
    lines: Vec<Line>,
}

impl std::fmt::Debug for Factor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Factor({} x {}, {})", self.rank(), self.len(), self.dtype)
    }
}

// `typed!` converts to f32 from each of the three types, f32 among them.
#[allow(clippy::useless_conversion)]
impl Factor {
    /// All zeros.
    pub fn zeros(rank: usize, len: usize, dtype: Dtype) -> Self {
        let geometry = Geometry { rank, len };
        let bytes = geometry.stored() * dtype.size();
        // Written now: zeroed pages of the system would be faulted in by the first event instead.
        let mut lines = vec![Line([0; 8]); bytes.div_ceil(64)];
        std::hint::black_box(&mut lines).fill(Line([0; 8]));
        Factor { geometry, dtype, lines }
    }

    /// From f32 rows, `rows[r * len + c]`, rounded to nearest even where the dtype is narrower.
    pub fn from_rows(rows: &[f32], rank: usize, len: usize, dtype: Dtype) -> Self {
        assert_eq!(rows.len(), rank * len);
        let mut f = Self::zeros(rank, len, dtype);
        match dtype {
            Dtype::F32 => f.fill(|r, c| rows[r * len + c]),
            Dtype::F16 => f.fill(|r, c| f16::from_f32(rows[r * len + c])),
            Dtype::Bf16 => f.fill(|r, c| bf16::from_f32(rows[r * len + c])),
        }
        f
    }

    /// From little-endian stored bits of a `(rank, len)` matrix, or of its transpose `(len, rank)`.
    ///
    /// # Errors
    /// When the byte count does not fit the shape.
    pub fn from_bits(bits: &[u8], rank: usize, len: usize, dtype: Dtype, transposed: bool) -> Result<Self> {
        if bits.len() != rank * len * dtype.size() {
            return Err(Error::shape(
                "factor",
                format!("{} bytes", bits.len()),
                format!("{rank} x {len} of {dtype}"),
            ));
        }
        match Self::read(&mut &*bits, rank, len, dtype, transposed) {
            Ok((factor, _)) => Ok(factor),
            Err(e) => Err(Error::io("factor", e)),
        }
    }

    /// [`Factor::from_bits`] of bits that come piece by piece, and whether all numbers are finite.
    ///
    /// # Errors
    /// Those of `bits`.
    pub fn read(
        bits: &mut dyn Bits,
        rank: usize,
        len: usize,
        dtype: Dtype,
        transposed: bool,
    ) -> io::Result<(Self, bool)> {
        let geometry = Geometry { rank, len };
        let count = (geometry.stored() * dtype.size()).div_ceil(64);
        let mut lines: Vec<Line> = Vec::with_capacity(count);
        // Before the first touch, which zeroing is.
        mapping::prepare(lines.spare_capacity_mut());
        lines.resize(count, Line([0; 8]));
        let finite = order::pack(geometry, dtype, bits, transposed, bytemuck::cast_slice_mut(&mut lines))?;
        Ok((Factor { geometry, dtype, lines }, finite))
    }

    /// Little-endian stored bits of the `(rank, len)` matrix, or of its transpose.
    pub fn to_bits(&self, transposed: bool) -> Vec<u8> {
        let bytes = self.rank() * self.len() * self.dtype.size();
        let mut out = mapping::reserve(bytes).unwrap_or_else(|| Vec::with_capacity(bytes));
        self.write_bits(transposed, &mut out).expect("memory takes what is written to it");
        out
    }

    /// Writes what [`Factor::to_bits`] gives, some kilobytes at a time.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_bits(&self, transposed: bool, out: &mut dyn Write) -> io::Result<()> {
        order::unpack(self.geometry, self.dtype, bytemuck::cast_slice(&self.lines), transposed, out)
    }

    /// f32 values, `(rank, len)` row-major, or `(len, rank)` when `transposed`.
    pub fn to_f32(&self, transposed: bool) -> Vec<f32> {
        let (rank, len) = (self.rank(), self.len());
        let mut out = vec![0f32; rank * len];
        typed!(self, w => self.each_run(|r, c, at, n| {
            for i in 0..n {
                let to = if transposed { (c + i) * rank + r } else { r * len + c + i };
                out[to] = w[at + i].into();
            }
        }));
        out
    }

    /// Appends the f32 values, `(rank, len)` row-major.
    pub fn append_rows(&self, out: &mut Vec<f32>) {
        let (len, start) = (self.len(), out.len());
        out.resize(start + self.rank() * len, 0.0);
        let out = &mut out[start..];
        match self.dtype {
            Dtype::F32 => {
                let w: &[f32] = self.slice();
                self.each_run(|r, c, at, n| out[r * len + c..][..n].copy_from_slice(&w[at..at + n]));
            }
            Dtype::F16 => {
                let w: &[f16] = self.slice();
                self.each_run(|r, c, at, n| w[at..at + n].convert_to_f32_slice(&mut out[r * len + c..][..n]));
            }
            Dtype::Bf16 => {
                let w: &[bf16] = self.slice();
                self.each_run(|r, c, at, n| w[at..at + n].convert_to_f32_slice(&mut out[r * len + c..][..n]));
            }
        }
    }

    /// Visits stored runs as `(row, first column, position, count)`.
    fn each_run(&self, mut f: impl FnMut(usize, usize, usize, usize)) {
        for r in 0..self.rank() {
            for t in 0..self.geometry.tiles() {
                f(r, t * TILE, self.geometry.at(r, t), TILE.min(self.len() - t * TILE));
            }
        }
    }

    fn fill<E: Pod>(&mut self, value: impl Fn(usize, usize) -> E) {
        let (g, len) = (self.geometry, self.len());
        let w: &mut [E] = &mut bytemuck::cast_slice_mut(&mut self.lines)[..g.stored()];
        for r in 0..g.rank {
            for t in 0..g.tiles() {
                let at = g.at(r, t);
                for i in 0..TILE.min(len - t * TILE) {
                    w[at + i] = value(r, t * TILE + i);
                }
            }
        }
    }

    #[inline]
    fn slice<E: Pod>(&self) -> &[E] {
        &bytemuck::cast_slice(&self.lines)[..self.geometry.stored()]
    }

    /// The stored f32 stream, for element-wise updates in place (padding included, and must stay zero).
    ///
    /// # Panics
    /// When the dtype is not f32.
    pub fn stream(&self) -> &[f32] {
        assert_eq!(self.dtype, Dtype::F32, "stream of a narrow factor");
        self.slice()
    }

    /// The stored f32 stream, writable; see [`Factor::stream`].
    pub fn stream_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.dtype, Dtype::F32, "stream of a narrow factor");
        let n = self.geometry.stored();
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..n]
    }

    /// Rows.
    pub fn rank(&self) -> usize {
        self.geometry.rank
    }

    /// Columns.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.geometry.len
    }

    /// Rank and length as the kernels want them.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Stored dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes resident: rows padded to 16 columns, the whole rounded up to a cache line.
    pub fn memory_bytes(&self) -> usize {
        self.lines.len() * 64
    }

    /// Whether every stored number is zero (of either sign).
    pub fn is_zero(&self) -> bool {
        typed!(self, w => w.iter().all(|&v| f32::from(v) == 0.0))
    }

    /// Whether every stored number is finite.
    pub fn is_finite(&self) -> bool {
        // Padding is zero.
        order::is_finite(self.dtype, bytemuck::cast_slice(&self.lines))
    }

    /// A copy in another dtype (round to nearest even).
    pub fn cast(&self, dtype: Dtype) -> Factor {
        if dtype == self.dtype {
            return self.clone();
        }
        Factor::from_rows(&self.to_f32(false), self.rank(), self.len(), dtype)
    }

    /// Takes the values of an f32 factor of the same shape, rounded to nearest even.
    ///
    /// # Panics
    /// When shapes differ or `master` is not f32.
    pub fn encode(&mut self, master: &Factor) {
        assert_eq!(self.geometry, master.geometry);
        let n = self.geometry.stored();
        let from = master.stream();
        match self.dtype {
            Dtype::F32 => self.lines.copy_from_slice(&master.lines),
            Dtype::F16 => {
                let to: &mut [f16] = &mut bytemuck::cast_slice_mut(&mut self.lines)[..n];
                to.convert_from_f32_slice(from);
            }
            Dtype::Bf16 => {
                let to: &mut [bf16] = &mut bytemuck::cast_slice_mut(&mut self.lines)[..n];
                to.convert_from_f32_slice(from);
            }
        }
    }

    /// Starts fetching a factor that is needed soon.
    #[inline]
    pub fn prefetch(&self) {
        typed!(self, w => prefetch_pages(w));
    }

    /// `out[r] = <row r, x>`.
    #[inline]
    pub fn dots(&self, k: &Kernels, x: &[f32], out: &mut [f32]) {
        typed!(self, w => k.dots(w, self.geometry, x, out));
    }

    /// `y (+)= sum_r coef[r] row r`.
    #[inline]
    pub fn combine(&self, k: &Kernels, coef: &[f32], y: &mut [f32], add: bool) {
        typed!(self, w => k.combine(w, self.geometry, coef, y, add));
    }

    /// `u = s X W^T`.
    #[inline]
    pub fn dots_batch(&self, k: &Kernels, x: &[f32], u: &mut [f32], s: f32) {
        typed!(self, w => k.dots_batch(w, self.geometry, x, u, s));
    }

    /// `y (+)= u W`.
    #[inline]
    pub fn combine_batch(&self, k: &Kernels, u: &[f32], y: &mut [f32], add: bool) {
        typed!(self, w => k.combine_batch(w, self.geometry, u, y, add));
    }

    /// `row r += coef[r] v`; f32 only.
    #[inline]
    pub fn rank1(&mut self, k: &Kernels, coef: &[f32], v: &[f32]) {
        let g = self.geometry;
        k.rank1(self.stream_mut(), g, coef, v);
    }

    /// `row r += sum_m coef[m][r] v[m]` over a batch; f32 only.
    #[inline]
    pub fn outer_batch(&mut self, k: &Kernels, coef: &[f32], v: &[f32]) {
        let g = self.geometry;
        k.outer_batch(self.stream_mut(), g, coef, v);
    }

    /// One sweep `e = target - u W; row r += k[r] e`; `target` becomes `e`; returns `|e|^2`. f32 only.
    #[inline]
    pub fn fit_sweep(&mut self, kn: &Kernels, u: &[f32], k: &[f32], target: &mut [f32]) -> f32 {
        let g = self.geometry;
        kn.fit_sweep(self.stream_mut(), g, u, k, target)
    }
}

/// A factor shared between versions; writers copy it first when somebody still reads it.
pub type SharedFactor = Arc<Factor>;
