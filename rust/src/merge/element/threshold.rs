//! The k-th largest magnitude among more numbers than memory should hold: exact, in one pass as a rule.
//!
//! A random sample gives a bracket that holds it almost surely; one pass counts what lies above and collects what
//! lies inside. Where the bracket misses, or equal numbers overfill it, two passes count the upper and the lower
//! bits of every number instead, whatever the numbers are.

use crate::error::Result;
use crate::kernels::Kernels;
use crate::rng::Rng;

/// Standard deviations of the sample's quantile on each side.
const MARGIN: f64 = 4.0;
/// Numbers up to this many are collected without a sample.
const FEW: usize = 1 << 15;
/// Sample: one number in so many, but no fewer and no more than these.
const SHARE: usize = 64;
const SAMPLE: [usize; 2] = [1 << 13, 1 << 15];
/// The bracket holds one number in so many at most.
const FULL: usize = 16;
/// Numbers looked at between two checks of the room.
const PIECE: usize = 1 << 12;
/// Low bits of a magnitude; the upper 16 (the sign is clear) are counted first.
const LOW: u32 = 15;

/// Numbers that can be gone through again and again, the same each time.
pub(super) trait Numbers {
    /// How many.
    fn count(&self) -> usize;

    /// Some of them, drawn at random with replacement, up to rounding.
    fn sample(&self, n: usize, rng: &mut Rng) -> Vec<f32>;

    /// All of them, in pieces.
    ///
    /// # Errors
    /// Cancellation.
    fn each(&mut self, f: &mut dyn FnMut(&[f32])) -> Result<()>;

    /// Bytes that `sample` takes beside the sample, and those that `each` takes.
    fn bytes(&self) -> [usize; 2];
}

/// How many of `count` a share is: rounded down, but 0.29 of 100 is 29.
pub(super) fn share_of(share: f64, count: usize) -> usize {
    ((share * count as f64 + 1e-9) as usize).min(count)
}

/// Bytes of a search for so many ranks at its fullest.
pub(super) fn bytes(numbers: &dyn Numbers, ranks: usize) -> usize {
    let (n, [sampling, streaming]) = (numbers.count(), numbers.bytes());
    let brackets = 4 * ranks * (room(n) + PIECE);
    // Counting starts with the other brackets still there.
    (sampling + 4 * sample_size(n)).max(streaming + brackets + (8 << (31 - LOW)))
}

fn sample_size(count: usize) -> usize {
    if count <= FEW { 0 } else { (count / SHARE).clamp(SAMPLE[0], SAMPLE[1]) }
}

/// Numbers that a bracket may hold.
fn room(count: usize) -> usize {
    FEW.max(count / FULL)
}

/// The `ranks[i]`-th largest magnitude (1 is the largest), for each i.
///
/// # Errors
/// Cancellation.
pub(super) fn largest(k: &Kernels, numbers: &mut dyn Numbers, ranks: &[usize]) -> Result<Vec<f32>> {
    let room = room(numbers.count());
    search(k, numbers, ranks, room)
}

/// A bracket on its way to the number of one rank.
struct Bracket {
    rank: usize,
    range: [f32; 2],
    above: usize,
    inside: Vec<f32>,
}

fn search(k: &Kernels, numbers: &mut dyn Numbers, ranks: &[usize], room: usize) -> Result<Vec<f32>> {
    let count = numbers.count();
    let mut sample = match sample_size(count) {
        0 => Vec::new(),
        n => numbers.sample(n, &mut Rng::new(0, 0)),
    };
    sample.iter_mut().for_each(|v| *v = v.abs());
    let mut brackets: Vec<Bracket> =
        ranks.iter().map(|&rank| bracket(rank, count, &mut sample, room)).collect();
    drop(sample);
    numbers.each(&mut |x| {
        for x in x.chunks(PIECE) {
            for b in brackets.iter_mut().filter(|b| b.inside.len() <= room) {
                b.above += k.bracket(x, b.range, &mut b.inside);
            }
        }
    })?;
    let mut out = Vec::with_capacity(ranks.len());
    for mut b in brackets {
        let whole = b.inside.len() <= room;
        let hit = whole && b.above < b.rank && b.rank <= b.above + b.inside.len();
        out.push(if hit {
            *b.inside.select_nth_unstable_by(b.rank - b.above - 1, |a, b| b.total_cmp(a)).1
        } else {
            by_counting(numbers, b.rank)?
        });
    }
    Ok(out)
}

/// Where the number of a rank lies, going by the sample.
fn bracket(rank: usize, count: usize, sample: &mut [f32], room: usize) -> Bracket {
    let n = sample.len() as f64;
    let q = rank as f64 / count as f64;
    let (middle, margin) = (q * n, MARGIN * (n * q * (1.0 - q)).sqrt() + 2.0);
    let mut at = |position: f64, outside: f32| -> f32 {
        if position < 0.0 || position >= n {
            return outside;
        }
        *sample.select_nth_unstable_by(position as usize, |a, b| b.total_cmp(a)).1
    };
    // A sample is up to rounding: widen by a few units in the last place.
    let lo = at(middle + margin, 0.0) * (1.0 - 1e-6);
    let hi = at(middle - margin, f32::INFINITY) * (1.0 + 1e-6);
    Bracket { rank, range: [lo, hi], above: 0, inside: Vec::with_capacity(room + PIECE) }
}

/// The same by counting bits: two passes, and no numbers held.
fn by_counting(numbers: &mut dyn Numbers, rank: usize) -> Result<f32> {
    let mut left = rank;
    let mut find = |counts: &[usize]| -> usize {
        for (bits, &n) in counts.iter().enumerate().rev() {
            if left <= n {
                return bits;
            }
            left -= n;
        }
        0
    };
    let bits = |v: &f32| v.to_bits() & 0x7fff_ffff;
    let mut counts = vec![0usize; 1 << (31 - LOW)];
    numbers.each(&mut |x| x.iter().for_each(|v| counts[(bits(v) >> LOW) as usize] += 1))?;
    let upper = find(&counts) as u32;
    counts.truncate(1 << LOW);
    counts.fill(0);
    numbers.each(&mut |x| {
        for v in x.iter().map(bits).filter(|v| v >> LOW == upper) {
            counts[(v & ((1 << LOW) - 1)) as usize] += 1;
        }
    })?;
    Ok(f32::from_bits(upper << LOW | find(&counts) as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in memory, in pieces, with a count of passes; the sample may lie.
    struct Held {
        numbers: Vec<f32>,
        passes: usize,
        lie: Option<f32>,
    }

    impl Numbers for Held {
        fn count(&self) -> usize {
            self.numbers.len()
        }
        fn sample(&self, n: usize, rng: &mut Rng) -> Vec<f32> {
            if let Some(value) = self.lie {
                return vec![value; n];
            }
            let at = |u: f32| self.numbers[(f64::from(u) * self.numbers.len() as f64) as usize];
            (0..n).map(|_| at(rng.uniform())).collect()
        }
        fn each(&mut self, f: &mut dyn FnMut(&[f32])) -> Result<()> {
            self.passes += 1;
            self.numbers.chunks(997).for_each(f);
            Ok(())
        }
        fn bytes(&self) -> [usize; 2] {
            [0, 0]
        }
    }

    fn judge(numbers: Vec<f32>, lie: Option<f32>) -> usize {
        let mut sorted: Vec<f32> = numbers.iter().map(|v| v.abs()).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let n = sorted.len();
        let ranks: Vec<usize> = [1, 2, n / 100, n / 5, n / 2, n - 1, n].map(|r| r.clamp(1, n)).to_vec();
        let mut most = 0;
        for k in Kernels::available() {
            let mut held = Held { numbers: numbers.clone(), passes: 0, lie };
            let got = largest(k, &mut held, &ranks).unwrap();
            most = most.max(held.passes);
            for (rank, got) in ranks.iter().zip(got) {
                assert_eq!(got, sorted[rank - 1], "rank {rank} of {n} on {}", k.isa());
            }
        }
        most
    }

    fn spread(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed, 1);
        (0..n).map(|_| rng.symmetric(1.0) * (8.0 * rng.symmetric(1.0)).exp()).collect()
    }

    #[test]
    fn the_kth_largest_is_exact_in_one_pass() {
        for n in [1, 2, 17, 1000, FEW, FEW + 1, 200_000] {
            assert_eq!(judge(spread(n, n as u64), None), 1, "{n} numbers");
        }
    }

    #[test]
    fn equal_numbers_and_a_useless_sample_fall_back_and_stay_exact() {
        let n = 600_000;
        for share in [0.0f32, 0.1, 0.5, 0.95, 1.0] {
            for value in [0.0f32, 0.25, 1e-42] {
                let mut numbers = spread(n, 3);
                let mut rng = Rng::new(4, 4);
                for v in &mut numbers {
                    if rng.uniform() < share {
                        *v = if rng.uniform() < 0.5 { value } else { -value };
                    }
                }
                judge(numbers, None);
            }
        }
        for lie in [0.0, 1e-30, 0.3, 1e30] {
            assert!(judge(spread(n, 5), Some(lie)) > 1);
        }
    }

    #[test]
    fn shares_round_down() {
        assert_eq!(share_of(0.2, 100), 20);
        assert_eq!(share_of(0.29, 100), 29);
        assert_eq!(share_of(0.3, 9), 2);
        assert_eq!(share_of(1e-3, 100), 0);
        assert_eq!(share_of(1.0, 7), 7);
    }
}
