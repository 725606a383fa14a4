//! The buffers of one forward and backward, and how many bytes of them were alive at once.

/// What forward leaves behind for the backward of one layer.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The layer's input, `(n, in)`; empty for the first layer, whose input the caller holds.
    pub h: Vec<f32>,
    /// `s h A`, `(n, rank)`.
    pub u: Vec<f32>,
    /// Numbers before the activation, where its backward needs them.
    pub z: Vec<f32>,
    /// DoRA: the layer's output before its magnitudes, without bias.
    pub raw: Vec<f32>,
}

/// Buffers that are taken and given back; peak bytes are counted over what was taken at once.
#[derive(Debug, Default)]
pub struct Pass {
    spare: Vec<Vec<f32>>,
    /// One per layer; those of a checkpointed segment are empty until it is run again.
    pub(super) kept: Vec<Kept>,
    /// Backward leaves what forward kept, for another backward.
    pub(super) hold: bool,
    live: usize,
    peak: usize,
}

impl Pass {
    /// A buffer of `n` numbers with any content.
    pub(super) fn take(&mut self, n: usize) -> Vec<f32> {
        let fits = |v: &Vec<f32>| v.capacity() >= n;
        let at = self.spare.iter().position(fits).or(self.spare.len().checked_sub(1));
        let mut v = at.map_or_else(Vec::new, |at| self.spare.swap_remove(at));
        v.resize(n, 0.0);
        self.live += 4 * n;
        self.peak = self.peak.max(self.live);
        v
    }

    /// Gives a buffer back.
    pub(super) fn give(&mut self, v: Vec<f32>) {
        self.live -= 4 * v.len();
        if v.capacity() > 0 {
            self.spare.push(v);
        }
    }

    pub(super) fn copy(&mut self, from: &[f32]) -> Vec<f32> {
        let mut v = self.take(from.len());
        v.copy_from_slice(from);
        v
    }

    pub(super) fn drop_kept(&mut self, layer: usize) {
        let kept = std::mem::take(&mut self.kept[layer]);
        for v in [kept.h, kept.u, kept.z, kept.raw] {
            self.give(v);
        }
    }

    /// Gives everything back.
    pub(super) fn clear(&mut self) {
        for layer in 0..self.kept.len() {
            self.drop_kept(layer);
        }
    }

    /// Most bytes that were alive at once since the last reset.
    pub fn peak_bytes(&self) -> usize {
        self.peak
    }

    /// Starts the peak anew.
    pub fn reset_peak(&mut self) {
        self.peak = self.live;
    }
}
