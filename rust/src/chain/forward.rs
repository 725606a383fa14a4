//! Forward through the layers, with or without what backward needs.

use super::{Chain, Pass, Version};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::learn::batch::{BadRow, NOT_FINITE};

impl Chain {
    /// Outputs of rows `(n, in)`; nothing is kept.
    ///
    /// # Errors
    /// The first row that is not finite.
    pub fn forward(&self, x: &[f32], pass: &mut Pass) -> Result<Vec<f32>, BadRow> {
        let (k, version) = (self.lora.kernels(), self.version());
        let z = self.forward_tape(k, &version, x, false, pass)?;
        let out = z.clone();
        pass.give(z);
        Ok(out)
    }

    /// Outputs of rows; with `keep`, `pass` holds what backward needs (of every layer, or of one input per
    /// segment when checkpointing).
    pub(super) fn forward_tape(
        &self,
        k: &Kernels,
        version: &Version,
        x: &[f32],
        keep: bool,
        pass: &mut Pass,
    ) -> Result<Vec<f32>, BadRow> {
        pass.kept.resize_with(self.frozen.len(), Default::default);
        pass.clear();
        let mut h: Option<Vec<f32>> = None;
        for l in 0..self.frozen.len() {
            // With checkpoints only the inputs of segments stay; the last segment is kept whole.
            let first = l % self.segment == 0;
            let whole =
                keep && (self.segment == 1 || l / self.segment == (self.frozen.len() - 1) / self.segment);
            let z = self.layer(k, version, l, h.as_deref().unwrap_or(x), whole, pass);
            let z = match z {
                Ok(z) => z,
                Err(bad) => {
                    h.into_iter().for_each(|h| pass.give(h));
                    pass.clear();
                    return Err(bad);
                }
            };
            match h.replace(z) {
                Some(input) if whole || (keep && first) => pass.kept[l].h = input,
                Some(input) => pass.give(input),
                None => {}
            }
        }
        Ok(h.expect("a chain has layers"))
    }

    /// One layer: `act((h W^T + u B) * scale + b)`, without the activation after the last.
    pub(super) fn layer(
        &self,
        k: &Kernels,
        version: &Version,
        l: usize,
        h: &[f32],
        keep: bool,
        pass: &mut Pass,
    ) -> Result<Vec<f32>, BadRow> {
        let (frozen, layer) = (&self.frozen[l], &version.layers[l]);
        let (n_in, n_out, rank) = (layer.in_features(), layer.out_features(), layer.rank());
        let n = h.len() / n_in;
        let mut u = pass.take(n * rank);
        layer.a.dots_batch(k, h, &mut u, layer.scaling());
        if !k.all_finite(&u) {
            let row = u.iter().position(|v| !v.is_finite()).unwrap_or(0) / rank;
            pass.give(u);
            let reason = if l == 0 { NOT_FINITE } else { "overflows float32 on its way" };
            return Err(BadRow { row, arg: "x", reason });
        }
        let mut z = pass.take(n * n_out);
        frozen.w.dots_batch(k, h, &mut z, 1.0);
        layer.b.combine_batch(k, &u, &mut z, true);
        if let Some(dora) = &version.dora[l] {
            if keep {
                pass.kept[l].raw = pass.copy(&z);
            }
            for row in z.chunks_exact_mut(n_out) {
                for (z, s) in row.iter_mut().zip(&dora.scale) {
                    *z *= s;
                }
            }
        }
        if let Some(bias) = &frozen.bias {
            for row in z.chunks_exact_mut(n_out) {
                for (z, b) in row.iter_mut().zip(bias) {
                    *z += b;
                }
            }
        }
        if keep {
            pass.kept[l].u = u;
        } else {
            pass.give(u);
        }
        if l + 1 < self.frozen.len() {
            if keep && self.activation.needs_input() {
                pass.kept[l].z = pass.copy(&z);
            }
            self.activation.apply(&mut z);
        }
        Ok(z)
    }
}
