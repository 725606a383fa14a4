//! The block types, and the one table that says what each is.
//!
//! | type | elements | bytes | fields, in order (f16 little-endian) | value |
//! |---|---|---|---|---|
//! | `q8_0` | 32 | 34 | d f16; qs 32 x i8 | `d q` |
//! | `q6_k` | 256 | 210 | ql 128; qh 64; scales 16 x i8; d f16 | `d sc (q - 32)` |
//! | `q5_k` | 256 | 176 | d f16; dmin f16; scales 12; qh 32; qs 128 | `d sc q - dmin m` |
//! | `q4_k` | 256 | 144 | d f16; dmin f16; scales 12; qs 128 | `d sc q - dmin m` |
//! | `q4_1` | 32 | 20 | d f16; m f16; qs 16 | `d q + m` |
//! | `q4_0` | 32 | 18 | d f16; qs 16 | `d (q - 8)` |

use std::fmt;
use std::str::FromStr;

use super::{q4_0, q4_1, q4_k, q5_k, q6_k, q8_0};
use crate::error::Error;

/// How the numbers of one quantised factor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockType {
    /// 8 bits, one scale per 32.
    Q8_0,
    /// 6 bits, scales of 8 bits per 16 under one per 256.
    Q6K,
    /// 5 bits, scales and minima of 6 bits per 32 under one of each per 256.
    Q5K,
    /// 4 bits, scales and minima of 6 bits per 32 under one of each per 256.
    Q4K,
    /// 4 bits, scale and minimum per 32.
    Q4_1,
    /// 4 bits, one scale per 32.
    Q4_0,
}

/// What there is to know about one type. The functions work on one block.
pub struct BlockRow {
    /// The type.
    pub kind: BlockType,
    /// Public name.
    pub name: &'static str,
    /// Number of the type in ggml and in GGUF files.
    pub ggml: u32,
    /// Numbers per block.
    pub elements: usize,
    /// Bytes per block.
    pub bytes: usize,
    /// Byte offsets of the f16 fields.
    pub halves: &'static [usize],
    /// `elements` finite numbers to `bytes` bytes.
    pub quantize: fn(&[f32], &mut [u8]),
    /// `bytes` bytes to `elements` numbers.
    pub dequantize: fn(&[u8], &mut [f32]),
}

/// Every type, most exact first; indexed by the enum.
pub static BLOCKS: [BlockRow; 6] = [
    BlockRow {
        kind: BlockType::Q8_0,
        name: "q8_0",
        ggml: 8,
        elements: 32,
        bytes: 34,
        halves: &[0],
        quantize: q8_0::quantize,
        dequantize: q8_0::dequantize,
    },
    BlockRow {
        kind: BlockType::Q6K,
        name: "q6_k",
        ggml: 14,
        elements: 256,
        bytes: 210,
        halves: &[208],
        quantize: q6_k::quantize,
        dequantize: q6_k::dequantize,
    },
    BlockRow {
        kind: BlockType::Q5K,
        name: "q5_k",
        ggml: 13,
        elements: 256,
        bytes: 176,
        halves: &[0, 2],
        quantize: q5_k::quantize,
        dequantize: q5_k::dequantize,
    },
    BlockRow {
        kind: BlockType::Q4K,
        name: "q4_k",
        ggml: 12,
        elements: 256,
        bytes: 144,
        halves: &[0, 2],
        quantize: q4_k::quantize,
        dequantize: q4_k::dequantize,
    },
    BlockRow {
        kind: BlockType::Q4_1,
        name: "q4_1",
        ggml: 3,
        elements: 32,
        bytes: 20,
        halves: &[0, 2],
        quantize: q4_1::quantize,
        dequantize: q4_1::dequantize,
    },
    BlockRow {
        kind: BlockType::Q4_0,
        name: "q4_0",
        ggml: 2,
        elements: 32,
        bytes: 18,
        halves: &[0],
        quantize: q4_0::quantize,
        dequantize: q4_0::dequantize,
    },
];

impl BlockType {
    /// Every type, most exact first.
    pub const ALL: [BlockType; 6] =
        [BlockType::Q8_0, BlockType::Q6K, BlockType::Q5K, BlockType::Q4K, BlockType::Q4_1, BlockType::Q4_0];

    /// The row of the table.
    #[inline]
    pub fn row(self) -> &'static BlockRow {
        &BLOCKS[self as usize]
    }

    /// The public name: `q8_0`, `q6_k`, ...
    pub fn as_str(self) -> &'static str {
        self.row().name
    }

    /// Numbers per block.
    #[inline]
    pub fn elements(self) -> usize {
        self.row().elements
    }

    /// Bytes per block.
    #[inline]
    pub fn block_bytes(self) -> usize {
        self.row().bytes
    }

    /// Number of the type in ggml and in GGUF files.
    pub fn ggml(self) -> u32 {
        self.row().ggml
    }

    /// The type with this number in ggml, if it is one of ours.
    pub fn from_ggml(number: u32) -> Option<BlockType> {
        BLOCKS.iter().find(|r| r.ggml == number).map(|r| r.kind)
    }

    /// Whether rows of `cols` numbers are whole blocks.
    pub fn fits(self, cols: usize) -> bool {
        cols > 0 && cols.is_multiple_of(self.elements())
    }

    /// Bytes of a row of `cols` numbers, or `None` where they are not whole blocks or too many.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !self.fits(cols) {
            return None;
        }
        (cols / self.elements()).checked_mul(self.block_bytes())
    }

    /// Quantises whole blocks; the numbers must be finite. See [`quantize_rows`](super::quantize_rows) for the
    /// checked way.
    ///
    /// # Panics
    /// When the lengths do not agree.
    pub fn quantize(self, x: &[f32], out: &mut [u8]) {
        let row = self.row();
        assert_eq!(x.len() % row.elements, 0);
        assert_eq!(x.len() / row.elements * row.bytes, out.len());
        for (x, out) in x.chunks_exact(row.elements).zip(out.chunks_exact_mut(row.bytes)) {
            (row.quantize)(x, out);
        }
    }

    /// Dequantises whole blocks.
    ///
    /// # Panics
    /// When the lengths do not agree.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        let row = self.row();
        assert_eq!(out.len() % row.elements, 0);
        assert_eq!(out.len() / row.elements * row.bytes, bytes.len());
        for (bytes, out) in bytes.chunks_exact(row.bytes).zip(out.chunks_exact_mut(row.elements)) {
            (row.dequantize)(bytes, out);
        }
    }

    /// Index of the first block with a scale that is infinite or NaN.
    pub fn first_non_finite(self, bytes: &[u8]) -> Option<usize> {
        let row = self.row();
        let bad = |block: &[u8]| row.halves.iter().any(|&at| block[at + 1] & 0x7c == 0x7c);
        bytes.chunks_exact(row.bytes).position(bad)
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for BlockType {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let names = || BLOCKS.iter().map(|r| r.name).collect::<Vec<_>>().join(", ");
        let found = BLOCKS.iter().find(|r| r.name == s).map(|r| r.kind);
        found.ok_or_else(|| Error::config("type", format!("{s:?}"), format!("one of {}", names())))
    }
}
