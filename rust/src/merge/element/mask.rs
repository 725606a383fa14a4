//! Random masks: one ChaCha8 stream per module and parent, one word per entry, cached as one bit per entry.

use crate::rng::Rng;

/// A bit per entry; rows start on a word of their own.
pub(super) struct Bits {
    words: Vec<u64>,
    per_row: usize,
}

impl Bits {
    /// No entry is kept.
    pub fn none(rows: usize, cols: usize) -> Self {
        let per_row = cols.div_ceil(64);
        Bits { words: vec![0; rows * per_row], per_row }
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        8 * self.words.len()
    }

    /// One row.
    pub fn row(&self, j: usize) -> &[u64] {
        &self.words[j * self.per_row..(j + 1) * self.per_row]
    }

    /// Keeps the entries of row `j` that `keep` says, asked in order.
    pub fn fill(&mut self, j: usize, cols: usize, mut keep: impl FnMut(usize) -> bool) {
        for (word, first) in
            self.words[j * self.per_row..(j + 1) * self.per_row].iter_mut().zip((0..cols).step_by(64))
        {
            *word = (first..cols.min(first + 64)).fold(0, |w, i| w | u64::from(keep(i)) << (i - first));
        }
    }
}

/// The generator of a parent's masks: entry (j, i) of `cols` columns uses word `j cols + i`.
///
/// The stream is FNV-1a (64 bit) of the module's name, a byte 255 (in no UTF-8 text), and the parent's name.
pub(super) fn generator(seed: u64, module: &str, parent: &str) -> Rng {
    let bytes = module.bytes().chain([255]).chain(parent.bytes());
    let stream =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    Rng::new(seed, stream)
}

/// Each entry kept with probability `density`.
pub(super) fn bernoulli(
    seed: u64,
    module: &str,
    parent: &str,
    [rows, cols]: [usize; 2],
    density: f64,
) -> Bits {
    let mut rng = generator(seed, module, parent);
    let mut bits = Bits::none(rows, cols);
    for j in 0..rows {
        bits.fill(j, cols, |_| f64::from(rng.uniform()) < density);
    }
    bits
}

/// The mask that `dare_linear` and `dare_ties` lay on a parent's change: `(rows, cols)` row-major, rows =
/// out_features. The same on every machine, whatever the order of parents or the number of threads.
pub fn mask(seed: u64, module: &str, parent: &str, rows: usize, cols: usize, density: f64) -> Vec<bool> {
    let bits = bernoulli(seed, module, parent, [rows, cols], density);
    (0..rows)
        .flat_map(|j| (0..cols).map(move |i| (j, i)))
        .map(|(j, i)| bits.row(j)[i / 64] >> (i % 64) & 1 == 1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_hang_on_seed_module_and_parent_and_keep_their_share() {
        let one = mask(7, "q_proj", "a", 100, 130, 0.3);
        assert_eq!(one, mask(7, "q_proj", "a", 100, 130, 0.3));
        for other in [
            mask(8, "q_proj", "a", 100, 130, 0.3),
            mask(7, "k_proj", "a", 100, 130, 0.3),
            mask(7, "q_proj", "b", 100, 130, 0.3),
            mask(7, "q_proja", "", 100, 130, 0.3),
        ] {
            let same = one.iter().zip(&other).filter(|(a, b)| a == b).count() as f64 / 13_000.0;
            assert!((same - 0.58).abs() < 0.03, "{same}: expected 0.3^2 + 0.7^2");
        }
        let kept = one.iter().filter(|k| **k).count() as f64 / 13_000.0;
        assert!((kept - 0.3).abs() < 0.02, "{kept}");
        assert!(mask(7, "m", "a", 9, 9, 1.0).iter().all(|k| *k));
    }

    #[test]
    fn an_entry_hangs_on_its_word_alone() {
        let wide = mask(1, "m", "p", 4, 70, 0.5);
        let flat = mask(1, "m", "p", 1, 280, 0.5);
        assert_eq!(wide, flat);
        let mut rng = generator(1, "m", "p");
        assert!(wide.iter().all(|k| *k == (rng.uniform() < 0.5)));
        // Golden: the first words of this stream, so that no machine or version may differ.
        let first: String = wide[..16].iter().map(|k| if *k { '1' } else { '0' }).collect();
        assert_eq!(first, "GOLDEN");
    }
}
