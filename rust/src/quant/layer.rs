//! A layer whose factors are quantised, or one of them: the read path runs on the blocks.

use super::{BlockType, QuantMatrix};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::low_rank::{Half, LowRank};

/// How the numbers of one factor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SideType {
    /// Blocks of this type.
    Blocks(BlockType),
    /// Plain numbers.
    Plain(Dtype),
}

impl SideType {
    /// The public name.
    pub fn as_str(self) -> &'static str {
        match self {
            SideType::Blocks(kind) => kind.as_str(),
            SideType::Plain(dtype) => dtype.as_str(),
        }
    }
}

impl std::str::FromStr for SideType {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        if let Some(dtype) = Dtype::ALL.into_iter().find(|d| d.as_str() == s) {
            return Ok(SideType::Plain(dtype));
        }
        let names = || {
            let kinds = BlockType::ALL.map(BlockType::as_str).into_iter();
            kinds.chain(Dtype::ALL.map(Dtype::as_str)).collect::<Vec<_>>().join(", ")
        };
        let kind = BlockType::ALL.into_iter().find(|k| k.as_str() == s);
        kind.map(SideType::Blocks)
            .ok_or_else(|| Error::config("type", format!("{s:?}"), format!("one of {}", names())))
    }
}

/// One factor: `rank` rows of `len` numbers, whichever way its blocks lie.
#[derive(Clone, Debug, PartialEq)]
pub enum Side {
    /// Blocks along the features: `rank` rows.
    Blocks(QuantMatrix),
    /// Blocks along the rank, `len` rows: `lora_b` of a GGUF file.
    BlocksAlongRank(QuantMatrix),
    /// Not quantised.
    Plain(Factor),
}

impl Side {
    /// Quantises a factor, or casts it. `arg` is the name that errors carry.
    ///
    /// # Errors
    /// `Shape` when the type does not fit the width that its blocks lie along; numbers too large for its scales.
    pub fn quantize(arg: &str, f: &Factor, to: SideType, along_rank: bool) -> Result<Self> {
        let kind = match to {
            SideType::Plain(dtype) => {
                let cast = f.cast(dtype);
                if !cast.is_finite() {
                    let detail = format!(" once rounded to {dtype}");
                    return Err(Error::NonFinite { arg: arg.into(), detail });
                }
                return Ok(Side::Plain(cast));
            }
            SideType::Blocks(kind) => kind,
        };
        let [rows, cols] = if along_rank { [f.len(), f.rank()] } else { [f.rank(), f.len()] };
        let matrix = QuantMatrix::quantize(kind, arg, &f.to_f32(along_rank), rows, cols)?;
        Ok(if along_rank { Side::BlocksAlongRank(matrix) } else { Side::Blocks(matrix) })
    }

    /// How it is stored.
    pub fn kind(&self) -> SideType {
        match self {
            Side::Blocks(m) | Side::BlocksAlongRank(m) => SideType::Blocks(m.kind()),
            Side::Plain(f) => SideType::Plain(f.dtype()),
        }
    }

    /// Bytes resident.
    pub fn memory_bytes(&self) -> usize {
        match self {
            Side::Blocks(m) | Side::BlocksAlongRank(m) => m.memory_bytes(),
            Side::Plain(f) => f.memory_bytes(),
        }
    }

    /// The plain factor: f32 where it was quantised.
    pub fn dequantize(&self) -> Factor {
        match self {
            Side::Plain(f) => f.clone(),
            Side::Blocks(m) => Factor::from_rows(&m.dequantize(), m.rows(), m.cols(), Dtype::F32),
            Side::BlocksAlongRank(m) => {
                let (rank, len, numbers) = (m.cols(), m.rows(), m.dequantize());
                let rows: Vec<f32> = (0..rank * len).map(|i| numbers[i % len * rank + i / len]).collect();
                Factor::from_rows(&rows, rank, len, Dtype::F32)
            }
        }
    }
}

impl Half for Side {
    fn rank(&self) -> usize {
        match self {
            Side::Blocks(m) => m.rows(),
            Side::BlocksAlongRank(m) => m.cols(),
            Side::Plain(f) => f.rank(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Side::Blocks(m) => m.cols(),
            Side::BlocksAlongRank(m) => m.rows(),
            Side::Plain(f) => f.len(),
        }
    }

    fn prefetch(&self) {
        match self {
            Side::Blocks(m) | Side::BlocksAlongRank(m) => m.prefetch(),
            Side::Plain(f) => f.prefetch(),
        }
    }

    fn dots(&self, k: &Kernels, x: &[f32], out: &mut [f32]) {
        match self {
            Side::Blocks(m) => m.dots(k, x, out, false),
            Side::BlocksAlongRank(m) => m.combine(k, x, out, false),
            Side::Plain(f) => f.dots(k, x, out),
        }
    }

    fn combine(&self, k: &Kernels, coef: &[f32], y: &mut [f32], add: bool) {
        match self {
            Side::Blocks(m) => m.combine(k, coef, y, add),
            Side::BlocksAlongRank(m) => m.dots(k, coef, y, add),
            Side::Plain(f) => f.combine(k, coef, y, add),
        }
    }

    fn dots_batch(&self, k: &Kernels, x: &[f32], u: &mut [f32], s: f32) {
        match self {
            Side::Blocks(m) => m.dots_batch(k, x, u, s, false),
            Side::BlocksAlongRank(m) => {
                m.combine_batch(k, x, u, false);
                k.scale(s, u);
            }
            Side::Plain(f) => f.dots_batch(k, x, u, s),
        }
    }

    fn combine_batch(&self, k: &Kernels, u: &[f32], y: &mut [f32], add: bool) {
        match self {
            Side::Blocks(m) => m.combine_batch(k, u, y, add),
            Side::BlocksAlongRank(m) => m.dots_batch(k, u, y, 1.0, add),
            Side::Plain(f) => f.combine_batch(k, u, y, add),
        }
    }
}

/// `dY = s (x A) B` with factors that are quantised or plain.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantLayer {
    /// A: `rank` rows of `in_features`.
    pub a: Side,
    /// B: `rank` rows of `out_features`.
    pub b: Side,
    /// `alpha` as configured.
    pub alpha: f64,
    /// Whether the scaling is `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub rslora: bool,
}

impl QuantLayer {
    /// Puts two factors together.
    ///
    /// # Errors
    /// When their ranks differ, a dimension is zero or alpha is not finite.
    pub fn new(a: Side, b: Side, alpha: f64, rslora: bool) -> Result<Self> {
        if a.rank() != b.rank() {
            let want = format!("rank {} as lora_a", a.rank());
            return Err(Error::shape("lora_b", format!("rank {}", b.rank()), want));
        }
        if a.rank() == 0 || a.len() == 0 || b.len() == 0 {
            let got = format!("rank {}, in {}, out {}", a.rank(), a.len(), b.len());
            return Err(Error::shape("layer", got, "every dimension at least 1"));
        }
        if !alpha.is_finite() {
            return Err(Error::config("alpha", alpha, "a finite number"));
        }
        Ok(QuantLayer { a, b, alpha, rslora })
    }

    /// Resident bytes of both factors.
    pub fn memory_bytes(&self) -> usize {
        self.a.memory_bytes() + self.b.memory_bytes()
    }

    /// The plain layer.
    ///
    /// # Errors
    /// Those of [`Layer::new`].
    pub fn dequantize(&self) -> Result<Layer> {
        Layer::new(self.a.dequantize(), self.b.dequantize(), self.alpha, self.rslora)
    }
}

impl LowRank for QuantLayer {
    type Half = Side;

    fn half_a(&self) -> &Side {
        &self.a
    }

    fn half_b(&self) -> &Side {
        &self.b
    }

    fn scaling(&self) -> f32 {
        let r = self.rank() as f64;
        (self.alpha / if self.rslora { r.sqrt() } else { r }) as f32
    }
}
