//! A look at a weights file that builds nothing: what every tensor is and holds, broken or not.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};

use super::container;
use super::source;
use super::tensor::{Tensor, TensorDtype};
use super::{AdapterParts, Limits, LoadOptions};
use crate::error::{Error, Result};
use crate::kernels::Kernels;

/// What the numbers of one tensor are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Frobenius norm of the finite numbers.
    pub norm: f64,
    /// Largest magnitude of the finite numbers.
    pub max_abs: f64,
    /// How many are NaN.
    pub nan: u64,
    /// How many are infinite.
    pub inf: u64,
    /// How many are zero.
    pub zeros: u64,
    /// Whether every one is an f16 as well.
    pub fits_f16: bool,
    /// Whether every one is a bf16 as well.
    pub fits_bf16: bool,
}

/// A file's tensors as they lie in it; no name has a meaning yet.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// In the order of their bytes.
    pub tensors: Vec<Tensor>,
    /// Of the header.
    pub metadata: BTreeMap<String, String>,
    /// Why the container cannot be read, in its reader's words; there are no tensors then.
    pub damage: Option<String>,
}

/// Looks into a safetensors file. A broken one is a scan with `damage`, not an error.
///
/// # Errors
/// The file cannot be opened or read.
pub fn scan(path: &Path, limits: &Limits) -> Result<Scan> {
    let broken = |e: Error| match e {
        Error::Io { .. } => Err(e),
        other => Ok(Scan { damage: Some(other.to_string()), ..Scan::default() }),
    };
    fs::metadata(path).map_err(|e| Error::io(path, e))?;
    let file = path.display().to_string();
    let opts = LoadOptions { limits: *limits, ..LoadOptions::default() };
    let bytes = match source::open(path, &opts) {
        Ok(bytes) => bytes,
        Err(e) => return broken(e),
    };
    let head = &bytes[..bytes.len().min(64)];
    match source::sniff(head, &file).and_then(|()| container::parse_within(&bytes, &file, limits)) {
        Ok(found) => Ok(Scan { tensors: found.tensors, metadata: found.metadata, damage: None }),
        Err(e) => broken(e),
    }
}

impl Scan {
    /// The content of a file that a reader understood, under PEFT's names.
    pub fn of(parts: &AdapterParts) -> Self {
        let factors = parts.modules.iter().flat_map(|m| {
            [(&m.a, "lora_A"), (&m.b, "lora_B")]
                .map(|(t, which)| Tensor { name: format!("{}.{which}.weight", m.path), ..t.clone() })
        });
        let tensors = factors.chain(parts.extra.iter().cloned()).collect();
        Scan { tensors, metadata: parts.header.clone(), damage: None }
    }
}

/// Looks at every number; `None` for a dtype whose numbers are not looked at.
pub fn stats(tensor: &Tensor) -> Option<Stats> {
    let mut s = Stats { fits_f16: true, fits_bf16: true, ..Stats::default() };
    let mut sum = 0.0f64;
    let mut see = |v: f64| {
        if v.is_finite() {
            sum += v * v;
            s.max_abs = s.max_abs.max(v.abs());
            s.zeros += u64::from(v == 0.0);
            if s.fits_f16 || s.fits_bf16 {
                let narrow = v as f32;
                let exact = f64::from(narrow) == v;
                s.fits_f16 &= exact && is_f16(narrow.to_bits());
                s.fits_bf16 &= exact && narrow.to_bits() & 0xffff == 0;
            }
        } else {
            s.nan += u64::from(v.is_nan());
            s.inf += u64::from(v.is_infinite());
        }
    };
    each(tensor, &mut see)?;
    s.norm = sum.sqrt();
    Some(s)
}

/// Hands every number of a float tensor to `see`.
fn each(tensor: &Tensor, see: &mut impl FnMut(f64)) -> Option<()> {
    let data = &tensor.data[..];
    match tensor.dtype {
        TensorDtype::F64 => data.as_chunks::<8>().0.iter().for_each(|c| see(f64::from_le_bytes(*c))),
        TensorDtype::F32 => data.as_chunks::<4>().0.iter().for_each(|c| see(f32::from_le_bytes(*c).into())),
        TensorDtype::F16 => data.as_chunks::<2>().0.iter().for_each(|c| see(f16::from_le_bytes(*c).to_f64())),
        TensorDtype::BF16 => {
            data.as_chunks::<2>().0.iter().for_each(|c| see(bf16::from_le_bytes(*c).to_f64()));
        }
        _ => return None,
    }
    Some(())
}

/// Whether a finite f32 is an f16 without rounding.
fn is_f16(bits: u32) -> bool {
    let (exponent, mantissa) = ((bits >> 23) & 0xff, bits & 0x7f_ffff);
    match exponent {
        0 => mantissa == 0,
        103..=112 => (mantissa | 0x80_0000) & ((1 << (126 - exponent)) - 1) == 0,
        113..=142 => mantissa & 0x1fff == 0,
        _ => false,
    }
}

/// `|B A|_F` without the scaling: from the Gram matrices, in f64, never the product itself.
///
/// A is (rank, inputs), B (outputs, rank); further dimensions of a convolution are columns of A and must be
/// 1 in B. With `experts` both have one dimension more in front, and the result is the norm over all experts.
/// What is not finite counts as zero. `None` where the shapes do not fit or the numbers are not floats.
///
/// # Errors
/// `MICROLORA_ISA` names no ISA of this machine.
pub fn delta_norm(a: &Tensor, b: &Tensor, experts: bool) -> Result<Option<f64>> {
    let lead = usize::from(experts);
    let (Some(&rank), Some([outputs, columns, rest @ ..])) = (a.shape.get(lead), b.shape.get(lead..)) else {
        return Ok(None);
    };
    let groups = if experts { a.shape[0] } else { 1 };
    let inputs: usize = a.shape[lead + 1..].iter().product();
    let fits = *columns == rank && rest.iter().all(|&d| d == 1) && a.shape[..lead] == b.shape[..lead];
    if !fits || groups * rank * inputs * outputs == 0 {
        return Ok(None);
    }
    let (Some(x), Some(y)) = (finite(a), finite(b)) else { return Ok(None) };
    let k = Kernels::detect()?;
    let (mut gram_a, mut gram_b) = (vec![0.0; rank * rank], vec![0.0; rank * rank]);
    let mut turned = vec![0.0f32; rank * outputs];
    let mut total = 0.0;
    for (x, y) in x.chunks_exact(rank * inputs).zip(y.chunks_exact(rank * outputs)) {
        for (at, row) in y.chunks_exact(rank).enumerate() {
            row.iter().enumerate().for_each(|(r, v)| turned[r * outputs + at] = *v);
        }
        k.gram_of_rows(x, inputs, &mut gram_a);
        k.gram_of_rows(&turned, *outputs, &mut gram_b);
        total += gram_a.iter().zip(&gram_b).map(|(p, q)| p * q).sum::<f64>();
    }
    Ok(Some(total.max(0.0).sqrt()))
}

/// The numbers as f32, what is not finite as zero.
fn finite(tensor: &Tensor) -> Option<Vec<f32>> {
    let mut out = Vec::with_capacity(tensor.shape.iter().product());
    each(tensor, &mut |v| out.push(if (v as f32).is_finite() { v as f32 } else { 0.0 }))?;
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor::new("t", TensorDtype::F32, shape.to_vec(), data).unwrap()
    }

    #[test]
    fn every_f32_pattern_near_the_edges_of_f16_is_judged_as_rounding_judges() {
        for exponent in 100..146u32 {
            for mantissa in [0, 1, 0x1000, 0x2000, 0x4000, 0x6000, 0x40_0000, 0x7f_e000, 0x7f_ffff, 0x20_0000]
            {
                for sign in [0, 1 << 31] {
                    let bits = sign | exponent << 23 | mantissa;
                    let v = f32::from_bits(bits);
                    assert_eq!(is_f16(bits), f16::from_f32(v).to_f32() == v, "{v:e}");
                }
            }
        }
        assert!(is_f16(0) && is_f16(1 << 31) && !is_f16(1));
    }

    #[test]
    fn numbers_are_counted() {
        let s = stats(&f32s(&[7], &[3.0, -4.0, 0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]));
        let want =
            Stats { norm: 5.0, max_abs: 4.0, nan: 1, inf: 2, zeros: 2, fits_f16: true, fits_bf16: true };
        assert_eq!(s, Some(want));
        let s = stats(&f32s(&[1], &[1.0 + f32::EPSILON])).unwrap();
        assert!(!s.fits_f16 && !s.fits_bf16);
        let ints = Tensor::new("t", TensorDtype::I32, vec![1], vec![0; 4]).unwrap();
        assert_eq!(stats(&ints), None);
    }

    #[test]
    fn norms_of_deltas_are_those_of_the_product() {
        let (a, b) = (f32s(&[2, 3], &[1., 2., 3., -1., 0., 4.]), f32s(&[2, 2], &[1., 2., 0.5, -1.]));
        // B A = [[-1, 2, 11], [1.5, 1, -2.5]]
        let want = (1.0f64 + 4.0 + 121.0 + 2.25 + 1.0 + 6.25).sqrt();
        let got = delta_norm(&a, &b, false).unwrap().unwrap();
        assert!((got - want).abs() < 1e-12 * want, "{got} {want}");
        let two = delta_norm(
            &f32s(&[2, 2, 3], &[a_values(), a_values()].concat()),
            &f32s(&[2, 2, 2], &[[1., 2., 0.5, -1.]; 2].concat()),
            true,
        );
        assert!((two.unwrap().unwrap() - want * 2f64.sqrt()).abs() < 1e-12 * want);
        assert_eq!(delta_norm(&a, &f32s(&[2, 3], &[0.; 6]), false).unwrap(), None);
        assert_eq!(delta_norm(&a, &f32s(&[4], &[0.; 4]), false).unwrap(), None);
    }

    fn a_values() -> [f32; 6] {
        [1., 2., 3., -1., 0., 4.]
    }

    #[test]
    fn damage_is_told_in_the_readers_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        for (bytes, word) in [
            (&b"\x80\x04pickle"[..], "pickle"),
            (&[9, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'], "truncated"),
            (b"GGUF....", "GGUF"),
        ] {
            fs::write(&path, bytes).unwrap();
            let s = scan(&path, &Limits::default()).unwrap();
            assert!(s.damage.as_ref().is_some_and(|d| d.contains(word)), "{:?}", s.damage);
        }
        assert!(matches!(scan(&dir.path().join("no"), &Limits::default()), Err(Error::Io { .. })));
    }
}
