//! Tensors as files hold them: a name, a dtype, a shape and bytes that are cheap to clone.

use std::io;

pub use ::safetensors::Dtype as TensorDtype;

use crate::dtype::Dtype;
use crate::error::{Error, Result};

pub use super::bytes::Bytes;

/// Columns from which rows padded to 16 take at most a quarter more.
const NARROW: usize = 64;

/// One named tensor, row-major and little-endian as in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Name: a key of the file, or `<module>.lora_a` / `<module>.lora_b` for factors.
    pub name: String,
    /// Element type.
    pub dtype: TensorDtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Content, exactly `byte_len(dtype, shape)` bytes.
    pub data: Bytes,
}

impl Tensor {
    /// A tensor whose byte count is checked against its dtype and shape.
    pub fn new(
        name: impl Into<String>,
        dtype: TensorDtype,
        shape: Vec<usize>,
        data: impl Into<Bytes>,
    ) -> Result<Self> {
        let tensor = Tensor { name: name.into(), dtype, shape, data: data.into() };
        tensor.check_len()?;
        Ok(tensor)
    }

    pub(crate) fn check_len(&self) -> Result<()> {
        match byte_len(self.dtype, &self.shape) {
            Some(want) if want == self.data.len() => Ok(()),
            want => Err(Error::shape(
                &self.name,
                format!("{} bytes", self.data.len()),
                match want {
                    Some(n) => format!("{n} bytes for {} {:?}", self.dtype, self.shape),
                    None => format!("a size that can be addressed, not {:?}", self.shape),
                },
            )),
        }
    }

    /// The dtype as one that a factor may be stored in, `None` for any other.
    pub fn factor_dtype(&self) -> Option<Dtype> {
        factor_dtype(self.dtype)
    }

    /// Puts a matrix, or its transpose, in the kernels' order; false when a number is not finite. Its bits are made
    /// again when somebody looks at them. Where padding would weigh more than the numbers it stays as it lies.
    ///
    /// # Errors
    /// Those of reading what was not read; a shape or dtype that no factor has is left as it is.
    pub(super) fn pack(&mut self, transposed: bool) -> io::Result<bool> {
        let (Some(dtype), &[rows, columns]) = (self.factor_dtype(), &self.shape[..]) else {
            self.data.settle()?;
            return Ok(self.is_finite());
        };
        let (rank, len) = if transposed { (columns, rows) } else { (rows, columns) };
        if len < NARROW || self.data.as_factor().is_some() {
            self.data.settle()?;
            return Ok(self.is_finite());
        }
        self.data.pack([rank, len], dtype, transposed)
    }

    /// True when no number is NaN or infinite. Meant for f32, f16 and bf16; others are taken as finite.
    pub fn is_finite(&self) -> bool {
        if let Some(f) = self.data.as_factor() {
            return f.is_finite();
        }
        let half = |mask: u16| {
            let exponent = |c: &[u8]| u16::from_le_bytes([c[0], c[1]]) & mask;
            !self.data.chunks_exact(2).fold(false, |bad, c| bad | (exponent(c) == mask))
        };
        match self.dtype {
            TensorDtype::F16 => half(0x7c00),
            TensorDtype::BF16 => half(0x7f80),
            TensorDtype::F32 => {
                let exponent = |c: &[u8]| u32::from_le_bytes([c[0], c[1], c[2], c[3]]) & 0x7f80_0000;
                !self.data.chunks_exact(4).fold(false, |bad, c| bad | (exponent(c) == 0x7f80_0000))
            }
            _ => true,
        }
    }
}

/// The dtype as one that the kernels run, `None` for any other.
pub(crate) fn factor_dtype(dtype: TensorDtype) -> Option<Dtype> {
    match dtype {
        TensorDtype::F32 => Some(Dtype::F32),
        TensorDtype::F16 => Some(Dtype::F16),
        TensorDtype::BF16 => Some(Dtype::Bf16),
        _ => None,
    }
}

impl From<Dtype> for TensorDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => TensorDtype::F32,
            Dtype::F16 => TensorDtype::F16,
            Dtype::Bf16 => TensorDtype::BF16,
        }
    }
}

/// Bytes of a tensor, `None` on overflow or when sub-byte elements do not fill whole bytes.
pub fn byte_len(dtype: TensorDtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factor_dtypes_go_both_ways() {
        for dtype in Dtype::ALL {
            let t = Tensor::new("t", dtype.into(), vec![3], vec![0; 3 * dtype.size()]).unwrap();
            assert_eq!(t.factor_dtype(), Some(dtype));
        }
        assert_eq!(Tensor::new("t", TensorDtype::I32, vec![], vec![0; 4]).unwrap().factor_dtype(), None);
    }

    #[test]
    fn byte_len_refuses_overflow() {
        assert_eq!(byte_len(TensorDtype::F32, &[2, 3]), Some(24));
        assert_eq!(byte_len(TensorDtype::F32, &[]), Some(4));
        assert_eq!(byte_len(TensorDtype::F32, &[usize::MAX, 2]), None);
        assert_eq!(byte_len(TensorDtype::F4, &[3]), None);
    }

    #[test]
    fn finite_looks_at_every_number() {
        for (dtype, one, inf, nan) in [
            (
                TensorDtype::F32,
                1f32.to_le_bytes().to_vec(),
                f32::INFINITY.to_le_bytes().to_vec(),
                f32::NAN.to_le_bytes().to_vec(),
            ),
            (TensorDtype::F16, vec![0, 0x3c], vec![0, 0x7c], vec![1, 0xfc]),
            (TensorDtype::BF16, vec![0x80, 0x3f], vec![0x80, 0xff], vec![0xc0, 0x7f]),
        ] {
            for bad in [&inf, &nan] {
                for at in 0..5 {
                    let mut data = one.repeat(5);
                    let t = Tensor::new("t", dtype, vec![5], data.clone()).unwrap();
                    assert!(t.is_finite());
                    data[at * one.len()..(at + 1) * one.len()].copy_from_slice(bad);
                    assert!(!Tensor::new("t", dtype, vec![5], data).unwrap().is_finite());
                }
            }
        }
    }

    #[test]
    fn new_checks_the_byte_count() {
        let err = Tensor::new("q_proj.lora_a", TensorDtype::F32, vec![2, 2], vec![0; 15]).unwrap_err();
        assert!(err.to_string().contains("q_proj.lora_a"), "{err}");
    }
}
