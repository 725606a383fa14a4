//! Matrices as rows of blocks, checked.

use super::BlockType;
use crate::error::{Error, Result};

/// No type has an f16 scale for larger numbers; the squares of the searches are finite up to here.
const LARGEST: f32 = 1e9;

fn check_width(kind: BlockType, arg: &str, rows: usize, cols: usize) -> Result<usize> {
    let per_row = kind.row_bytes(cols).ok_or_else(|| {
        let want = format!("rows of a multiple of {} numbers for {kind}", kind.elements());
        Error::shape(arg, format!("({rows}, {cols})"), want)
    })?;
    per_row.checked_mul(rows).ok_or_else(|| Error::shape(arg, format!("({rows}, {cols})"), "fewer numbers"))
}

/// Quantises `(rows, cols)` numbers, row-major, along their rows; the bytes are those of llama.cpp.
///
/// # Errors
/// `Shape` when the rows are not whole blocks; `NonFinite` for NaN or infinity, and for numbers so large that
/// the scale of their block has no f16 (llama.cpp writes an infinite scale there, or zeros).
pub fn quantize_rows(kind: BlockType, arg: &str, x: &[f32], rows: usize, cols: usize) -> Result<Vec<u8>> {
    let bytes = check_width(kind, arg, rows, cols)?;
    if Some(x.len()) != rows.checked_mul(cols) {
        return Err(Error::shape(arg, format!("{} numbers", x.len()), format!("({rows}, {cols})")));
    }
    if x.iter().any(|v| !v.is_finite()) {
        return Err(Error::non_finite(arg));
    }
    Error::check_memory(arg, Some(bytes))?;
    let too_large = |i: usize| Error::NonFinite {
        arg: arg.into(),
        detail: format!(
            " once quantised: row {} holds numbers too large for a {kind} scale (an f16)",
            i * kind.elements() / cols
        ),
    };
    if let Some(i) = x.iter().position(|v| v.abs() > LARGEST) {
        return Err(too_large(i / kind.elements()));
    }
    let mut out = vec![0; bytes];
    kind.quantize(x, &mut out);
    match kind.first_non_finite(&out) {
        Some(block) => Err(too_large(block)),
        None => Ok(out),
    }
}

/// Checks that `bytes` are `(rows, cols)` numbers.
///
/// # Errors
/// `Shape` when the rows are not whole blocks or the bytes are not that many.
pub fn check_blocks(kind: BlockType, arg: &str, bytes: &[u8], rows: usize, cols: usize) -> Result<()> {
    let want = check_width(kind, "shape", rows, cols)?;
    if bytes.len() != want {
        let shape = format!("{want}: ({rows}, {cols}) of {kind}");
        return Err(Error::shape(arg, format!("{} bytes", bytes.len()), shape));
    }
    Ok(())
}

/// Checks the scales of whole blocks.
///
/// # Errors
/// `NonFinite` for an infinite or NaN one.
pub fn check_finite(kind: BlockType, arg: &str, bytes: &[u8]) -> Result<()> {
    match kind.first_non_finite(bytes) {
        Some(block) => {
            Err(Error::NonFinite { arg: arg.into(), detail: format!(" in the scale of block {block}") })
        }
        None => Ok(()),
    }
}

/// The numbers of `(rows, cols)` quantised blocks, row-major.
///
/// # Errors
/// As [`check_blocks`] and [`check_finite`].
pub fn dequantize_rows(
    kind: BlockType,
    arg: &str,
    bytes: &[u8],
    rows: usize,
    cols: usize,
) -> Result<Vec<f32>> {
    check_blocks(kind, arg, bytes, rows, cols)?;
    check_finite(kind, arg, bytes)?;
    Error::check_memory(arg, (rows * cols).checked_mul(4))?;
    let mut out = vec![0.0; rows * cols];
    kind.dequantize(bytes, &mut out);
    Ok(out)
}
