//! Numbers of a factor in the type that is asked for.

use std::str::FromStr;

use half::{bf16, f16};

use super::super::tensor::{Bytes, Tensor, TensorDtype};
use super::container::{BF16_TYPE, F16_TYPE, F32_TYPE};
use crate::error::{Error, Result};
use crate::quant::{BlockType, quantize_rows};

/// Type of the tensors in a written file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As each tensor is; f32 where a scaling that is folded in would be rounded otherwise.
    Auto,
    /// One of f32, f16 and bf16.
    Plain(TensorDtype),
    /// Blocks, where rows are whole blocks; f16 elsewhere.
    Blocks(BlockType),
}

impl FromStr for Encoding {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "auto" => Ok(Encoding::Auto),
            "f32" => Ok(Encoding::Plain(TensorDtype::F32)),
            "f16" => Ok(Encoding::Plain(TensorDtype::F16)),
            "bf16" => Ok(Encoding::Plain(TensorDtype::BF16)),
            _ => match s.parse::<BlockType>() {
                Ok(kind) => Ok(Encoding::Blocks(kind)),
                Err(_) => {
                    let want = "auto, f32, f16, bf16, q8_0, q6_k, q5_k, q4_k, q4_1 or q4_0";
                    Err(Error::config("dtype", format!("{s:?}"), want))
                }
            },
        }
    }
}

/// A factor as it is written.
pub(super) struct Encoded {
    pub kind: u32,
    pub data: Bytes,
    /// Its rows are no whole blocks of the type asked for.
    pub fell_back: bool,
    /// The scaling folded in was rounded somewhere.
    pub rounded: bool,
    /// It was in blocks that do not go out as they are.
    pub opened: bool,
}

/// Encodes a factor times a number, along its last dimension.
pub(super) fn encode(t: &Tensor, encoding: Encoding, times: f64) -> Result<Encoded> {
    let columns = t.shape.last().copied().unwrap_or(0);
    let (encoding, fell_back) = match encoding {
        Encoding::Blocks(kind) if !kind.fits(columns) => (Encoding::Plain(TensorDtype::F16), true),
        other => (other, false),
    };
    let done =
        |dtype, data, rounded| Encoded { kind: number(dtype), data, fell_back, rounded, opened: false };
    let same = match encoding {
        Encoding::Auto => true,
        Encoding::Plain(dtype) => dtype == t.dtype,
        Encoding::Blocks(_) => false,
    };
    if same && times == 1.0 {
        return Ok(done(t.dtype, t.data.clone(), false));
    }
    let (numbers, rounded) = scaled(t, times);
    let numbers = finite(t, numbers, "times its share of the scaling")?;
    Ok(match encoding {
        Encoding::Auto => {
            let narrow = to_bits(&numbers, t.dtype);
            let exact = !rounded && widened(&narrow, t.dtype).eq(numbers.iter().copied());
            if exact {
                done(t.dtype, narrow.into(), false)
            } else {
                done(TensorDtype::F32, to_bits(&numbers, TensorDtype::F32).into(), rounded)
            }
        }
        Encoding::Plain(dtype) => {
            let bits = to_bits(&numbers, dtype);
            if widened(&bits, dtype).any(|v| !v.is_finite()) {
                return Err(too_large(t, &format!("as {}", dtype.to_string().to_lowercase())));
            }
            done(dtype, bits.into(), rounded)
        }
        Encoding::Blocks(kind) => {
            let data = quantize_rows(kind, &t.name, &numbers, numbers.len() / columns, columns)?;
            Encoded { kind: kind.ggml(), data: data.into(), fell_back, rounded, opened: false }
        }
    })
}

fn number(dtype: TensorDtype) -> u32 {
    match dtype {
        TensorDtype::F16 => F16_TYPE,
        TensorDtype::BF16 => BF16_TYPE,
        _ => F32_TYPE,
    }
}

/// The numbers times one, and whether any product was rounded.
fn scaled(t: &Tensor, times: f64) -> (Vec<f32>, bool) {
    let mut rounded = false;
    let product = |v: f32| {
        let exact = f64::from(v) * times;
        let near = exact as f32;
        rounded |= f64::from(near) != exact;
        near
    };
    let numbers = widened(&t.data, t.dtype).map(product).collect();
    (numbers, rounded)
}

fn finite(t: &Tensor, numbers: Vec<f32>, detail: &str) -> Result<Vec<f32>> {
    if numbers.iter().all(|v| v.is_finite()) { Ok(numbers) } else { Err(too_large(t, detail)) }
}

fn too_large(t: &Tensor, detail: &str) -> Error {
    Error::NonFinite { arg: t.name.clone(), detail: format!(" {detail}: a number is too large") }
}

/// Numbers of f32, f16 or bf16 bits.
fn widened(data: &[u8], dtype: TensorDtype) -> impl Iterator<Item = f32> + '_ {
    let size = if dtype == TensorDtype::F32 { 4 } else { 2 };
    data.chunks_exact(size).map(move |c| match dtype {
        TensorDtype::F16 => f16::from_le_bytes([c[0], c[1]]).to_f32(),
        TensorDtype::BF16 => bf16::from_le_bytes([c[0], c[1]]).to_f32(),
        _ => f32::from_le_bytes([c[0], c[1], c[2], c[3]]),
    })
}

fn to_bits(numbers: &[f32], dtype: TensorDtype) -> Vec<u8> {
    match dtype {
        TensorDtype::F16 => numbers.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        TensorDtype::BF16 => numbers.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}
