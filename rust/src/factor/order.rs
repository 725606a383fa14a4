//! Between a file's order of a matrix, row by row, and the kernels' order, tile by tile.
//!
//! Both directions stream: a matrix passes through some kilobytes that stay in the cache, checked on the way.

use std::io::{self, Write};

use bytemuck::{Pod, bytes_of, pod_read_unaligned};

use crate::dtype::Dtype;
use crate::kernels::{GROUP, Geometry, TILE};

/// Bytes that are taken or given at once, where a tile or a group of rows is smaller: a part of a level-2 cache.
const CHUNK: usize = 128 << 10;

/// The bits of a matrix, little-endian, taken front to back.
pub trait Bits {
    /// The next `n` bytes.
    ///
    /// # Errors
    /// Those of the file they are read from, or its end.
    fn take(&mut self, n: usize) -> io::Result<&[u8]>;
}

impl Bits for &[u8] {
    fn take(&mut self, n: usize) -> io::Result<&[u8]> {
        self.split_off(..n).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// Stores a `(rank, len)` matrix, or its transpose `(len, rank)`, in tile order; false when a number is not finite.
pub(super) fn pack(
    g: Geometry,
    dtype: Dtype,
    bits: &mut dyn Bits,
    transposed: bool,
    out: &mut [u8],
) -> io::Result<bool> {
    match dtype.size() {
        4 => pack_words::<u32>(g, dtype, bits, transposed, out),
        _ => pack_words::<u16>(g, dtype, bits, transposed, out),
    }
}

fn pack_words<W: Pod>(
    g: Geometry,
    dtype: Dtype,
    bits: &mut dyn Bits,
    transposed: bool,
    out: &mut [u8],
) -> io::Result<bool> {
    let size = size_of::<W>();
    let mut finite = true;
    if transposed {
        for tiles in chunks_of_tiles(g, size) {
            let first = tiles.start * TILE;
            let columns = g.len.min(tiles.end * TILE) - first;
            let chunk = bits.take(columns * g.rank * size)?;
            finite &= is_finite(dtype, chunk);
            for (t, columns) in tiles.zip(chunk.chunks(TILE * g.rank * size)) {
                columns_in::<W>(g, t, columns, out);
            }
        }
        return Ok(finite);
    }
    for first in (0..g.rank).step_by(GROUP) {
        let height = GROUP.min(g.rank - first);
        let chunk = bits.take(height * g.len * size)?;
        finite &= is_finite(dtype, chunk);
        for t in 0..g.tiles() {
            let n = TILE.min(g.len - t * TILE) * size;
            for r in 0..height {
                let from = &chunk[(r * g.len + t * TILE) * size..][..n];
                out[g.at(first + r, t) * size..][..n].copy_from_slice(from);
            }
        }
    }
    Ok(finite)
}

/// Writes what [`pack`] stored, in the file's order.
pub(super) fn unpack(
    g: Geometry,
    dtype: Dtype,
    stored: &[u8],
    transposed: bool,
    out: &mut dyn Write,
) -> io::Result<()> {
    match dtype.size() {
        4 => unpack_words::<u32>(g, stored, transposed, out),
        _ => unpack_words::<u16>(g, stored, transposed, out),
    }
}

fn unpack_words<W: Pod>(g: Geometry, stored: &[u8], transposed: bool, out: &mut dyn Write) -> io::Result<()> {
    let size = size_of::<W>();
    let mut buffer = Vec::new();
    if transposed {
        for tiles in chunks_of_tiles(g, size) {
            let columns = g.len.min(tiles.end * TILE) - tiles.start * TILE;
            buffer.resize(columns * g.rank * size, 0);
            for (t, columns) in tiles.zip(buffer.chunks_mut(TILE * g.rank * size)) {
                columns_out::<W>(g, t, stored, columns);
            }
            out.write_all(&buffer)?;
        }
        return Ok(());
    }
    for first in (0..g.rank).step_by(GROUP) {
        let height = GROUP.min(g.rank - first);
        buffer.resize(height * g.len * size, 0);
        for t in 0..g.tiles() {
            let n = TILE.min(g.len - t * TILE) * size;
            for r in 0..height {
                let from = &stored[g.at(first + r, t) * size..][..n];
                buffer[(r * g.len + t * TILE) * size..][..n].copy_from_slice(from);
            }
        }
        out.write_all(&buffer)?;
    }
    Ok(())
}

/// Ranges of tiles whose columns are about [`CHUNK`] bytes.
fn chunks_of_tiles(g: Geometry, size: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let many = (CHUNK / (TILE * g.rank.max(1) * size)).max(1);
    (0..g.tiles()).step_by(many).map(move |first| first..g.tiles().min(first + many))
}

/// Stores up to 16 columns, each `rank` numbers one after another, as tile `t` of every row.
fn columns_in<W: Pod>(g: Geometry, t: usize, columns: &[u8], out: &mut [u8]) {
    let (size, step) = (size_of::<W>(), g.rank * size_of::<W>());
    for first in (0..g.rank).step_by(GROUP) {
        let height = GROUP.min(g.rank - first);
        let to = &mut out[g.at(first, t) * size..][..height * TILE * size];
        let from = &columns[first * size..];
        if height == GROUP && columns.len() == TILE * step {
            // Constant sizes: the compiler makes shuffles of registers of it.
            let block: [[W; GROUP]; TILE] =
                std::array::from_fn(|c| pod_read_unaligned(&from[c * step..][..GROUP * size]));
            let rows: [[W; TILE]; GROUP] = std::array::from_fn(|r| std::array::from_fn(|c| block[c][r]));
            rows.iter()
                .zip(to.chunks_exact_mut(TILE * size))
                .for_each(|(r, to)| to.copy_from_slice(bytes_of(r)));
            continue;
        }
        for (c, column) in from.chunks(step).enumerate() {
            for r in 0..height {
                to[(r * TILE + c) * size..][..size].copy_from_slice(&column[r * size..][..size]);
            }
        }
    }
}

/// The inverse of [`columns_in`].
fn columns_out<W: Pod>(g: Geometry, t: usize, stored: &[u8], columns: &mut [u8]) {
    let (size, step) = (size_of::<W>(), g.rank * size_of::<W>());
    let whole = columns.len() == TILE * step;
    for first in (0..g.rank).step_by(GROUP) {
        let height = GROUP.min(g.rank - first);
        let from = &stored[g.at(first, t) * size..][..height * TILE * size];
        let to = &mut columns[first * size..];
        if height == GROUP && whole {
            let block: [[W; TILE]; GROUP] =
                std::array::from_fn(|r| pod_read_unaligned(&from[r * TILE * size..][..TILE * size]));
            for c in 0..TILE {
                let column: [W; GROUP] = std::array::from_fn(|r| block[r][c]);
                to[c * step..][..GROUP * size].copy_from_slice(bytes_of(&column));
            }
            continue;
        }
        for (c, column) in to.chunks_mut(step).enumerate() {
            for r in 0..height {
                column[r * size..][..size].copy_from_slice(&from[(r * TILE + c) * size..][..size]);
            }
        }
    }
}

/// Whether no number has an exponent of all ones. Without an early exit, so that it runs in vectors.
pub(super) fn is_finite(dtype: Dtype, bits: &[u8]) -> bool {
    let half = |mask: u16| {
        let v = bits.as_chunks::<2>().0.iter().map(|&c| u16::from_le_bytes(c) & mask);
        !v.fold(false, |bad, v| bad | (v == mask))
    };
    match dtype {
        Dtype::F16 => half(0x7c00),
        Dtype::Bf16 => half(0x7f80),
        Dtype::F32 => {
            let v = bits.as_chunks::<4>().0.iter().map(|&c| u32::from_le_bytes(c) & 0x7f80_0000);
            !v.fold(false, |bad, v| bad | (v == 0x7f80_0000))
        }
    }
}
