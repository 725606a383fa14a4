//! Seeded randomness, the same numbers on every machine: ChaCha with 8 rounds, one stream per use.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng};

/// A ChaCha8 generator whose state fits in two integers.
#[derive(Clone, Debug)]
pub struct Rng {
    inner: ChaCha8Rng,
    seed: u64,
    stream: u64,
}

impl Rng {
    /// Stream `stream` of `seed`; streams of one seed are independent.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut inner = ChaCha8Rng::seed_from_u64(seed);
        inner.set_stream(stream);
        Rng { inner, seed, stream }
    }

    /// Continues where [`Rng::state`] was taken.
    pub fn resume(state: RngState) -> Self {
        let mut rng = Rng::new(state.seed, state.stream);
        rng.inner.set_word_pos(u128::from(state.words));
        rng
    }

    /// Seed, stream and position.
    pub fn state(&self) -> RngState {
        RngState { seed: self.seed, stream: self.stream, words: self.inner.get_word_pos() as u64 }
    }

    /// Uniform in [0, 1), 24 bits.
    pub fn uniform(&mut self) -> f32 {
        (self.inner.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// Uniform in 0..n, without bias: Lemire's multiplication with rejection (arXiv 1805.10941). n is above 0.
    pub fn below(&mut self, n: u64) -> u64 {
        loop {
            let wide = u128::from(self.inner.next_u64()) * u128::from(n);
            if wide as u64 >= n.wrapping_neg() % n {
                return (wide >> 64) as u64;
            }
        }
    }

    /// Uniform in [-bound, bound).
    pub fn symmetric(&mut self, bound: f32) -> f32 {
        (2.0 * self.uniform() - 1.0) * bound
    }
}

/// Where a generator stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RngState {
    /// Seed it was made from.
    pub seed: u64,
    /// Stream of that seed.
    pub stream: u64,
    /// 32-bit words drawn so far.
    pub words: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_numbers_and_streams_differ() {
        let draw = |seed, stream| {
            let mut r = Rng::new(seed, stream);
            (0..5).map(|_| r.uniform()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7, 0), draw(7, 0));
        assert_ne!(draw(7, 0), draw(7, 1));
        assert_ne!(draw(7, 0), draw(8, 0));
        assert!(draw(7, 3).iter().all(|v| (0.0..1.0).contains(v)));
    }

    #[test]
    fn integers_below_a_bound_are_even() {
        let mut r = Rng::new(3, 1);
        let mut counts = [0u32; 7];
        (0..70_000).for_each(|_| counts[r.below(7) as usize] += 1);
        // 6 degrees of freedom: above 22.5 once in a thousand seeds.
        let chi: f64 = counts.iter().map(|&c| (f64::from(c) - 1e4).powi(2) / 1e4).sum();
        assert!(chi < 22.5, "{counts:?}");
        assert!((0..50).all(|_| r.below(1) == 0 && r.below(u64::MAX) < u64::MAX));
    }

    #[test]
    fn resumes_where_it_stood() {
        let mut a = Rng::new(1, 2);
        for _ in 0..37 {
            a.uniform();
        }
        let mut b = Rng::resume(a.state());
        assert_eq!(
            (0..9).map(|_| a.uniform()).collect::<Vec<_>>(),
            (0..9).map(|_| b.uniform()).collect::<Vec<_>>()
        );
    }
}
