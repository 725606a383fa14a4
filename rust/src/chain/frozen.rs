//! The frozen weight of one layer, and DoRA's norms over it.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;

/// `z = h W^T + b`, never trained. W lies as a factor of `out` rows, so that one copy serves both directions.
#[derive(Clone, Debug)]
pub struct Frozen {
    /// W: `(out, in)`.
    pub w: Factor,
    /// b: `(out,)`.
    pub bias: Option<Vec<f32>>,
    /// `|w_i|^2` of every row, for DoRA.
    norms2: Vec<f32>,
}

impl Frozen {
    /// Takes a weight `(out, in)`, row-major, and its bias.
    ///
    /// # Errors
    /// Sizes that do not fit, numbers that are not finite.
    pub fn new(arg: &str, w: &[f32], n_out: usize, n_in: usize, bias: Option<Vec<f32>>) -> Result<Self> {
        if w.len() != n_out * n_in || w.is_empty() {
            let got = format!("{} numbers", w.len());
            return Err(Error::shape(arg, got, format!("({n_out}, {n_in}), at least (1, 1)")));
        }
        if let Some(b) = &bias
            && b.len() != n_out
        {
            return Err(Error::shape(
                format!("{arg} bias"),
                format!("({},)", b.len()),
                format!("({n_out},)"),
            ));
        }
        let finite = |v: &[f32]| v.iter().all(|v| v.is_finite());
        if !finite(w) || !bias.as_deref().is_none_or(finite) {
            return Err(Error::non_finite(arg));
        }
        let norm2 = |row: &[f32]| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() as f32;
        let norms2 = w.chunks_exact(n_in).map(norm2).collect();
        Ok(Frozen { w: Factor::from_rows(w, n_out, n_in, Dtype::F32), bias, norms2 })
    }

    /// Width of the input.
    pub fn in_features(&self) -> usize {
        self.w.len()
    }

    /// Width of the output.
    pub fn out_features(&self) -> usize {
        self.w.rank()
    }

    /// Resident bytes.
    pub fn memory_bytes(&self) -> usize {
        self.w.memory_bytes() + 4 * (self.bias.as_ref().map_or(0, Vec::len) + self.norms2.len())
    }

    /// `|w_i + s (B A)_i|` of every row, from the factors: `|w|^2 + 2 s (W A^T . B)_i + s^2 (B (A A^T) . B)_i`
    /// (arXiv 2402.09353 gives the norm; the identity avoids the dense product).
    pub fn row_norms(&self, k: &Kernels, layer: &Layer) -> Vec<f32> {
        let (rank, s) = (layer.rank(), layer.scaling());
        let a = layer.a.to_f32(false);
        let b = layer.b.to_f32(true);
        // A W^T comes as (rank, out); A A^T as (rank, rank).
        let mut cross = vec![0.0; rank * self.out_features()];
        self.w.dots_batch(k, &a, &mut cross, 1.0);
        let mut gram = vec![0.0; rank * rank];
        layer.a.dots_batch(k, &a, &mut gram, 1.0);
        let n_out = self.out_features();
        self.norms2
            .iter()
            .zip(b.chunks_exact(rank))
            .enumerate()
            .map(|(i, (w2, b))| {
                let mut sum = f64::from(*w2);
                for (r, &br) in b.iter().enumerate() {
                    sum += 2.0 * f64::from(s) * f64::from(br) * f64::from(cross[r * n_out + i]);
                    let row = &gram[r * rank..(r + 1) * rank];
                    let inner: f64 = row.iter().zip(b).map(|(g, b)| f64::from(*g) * f64::from(*b)).sum();
                    sum += f64::from(s) * f64::from(s) * f64::from(br) * inner;
                }
                sum.max(0.0).sqrt() as f32
            })
            .collect()
    }
}
