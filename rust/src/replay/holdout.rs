//! Which events are held out, and the keys that decide which events stay: pure functions of seed and number.

use crate::rng::Rng;

/// Streams of the reservoir's seed: apart from each other, and from the low streams that learners draw from.
const HOLD_OUT: u64 = 1 << 62;
const KEYS: u64 = 1 << 63;

/// Bits of a draw: two uniform numbers of 24 bits.
pub(super) const BITS: u32 = 48;
/// Draws of one stream: what a generator makes at once.
const TOGETHER: u64 = 32;

fn draw(rng: &mut Rng) -> u64 {
    let mut half = || (rng.uniform() * 16_777_216.0) as u64;
    half() << 24 | half()
}

/// Events per block, exactly one of which is held out; `None`: none is.
fn block_size(holdout: f64) -> Option<u64> {
    (holdout > 0.0).then(|| ((1.0 / holdout).round() as u64).max(1))
}

/// Draws number `32 n` to `32 n + 31` of a kind, made when the first of them is wanted.
#[derive(Clone, Debug)]
struct Draws {
    seed: u64,
    kind: u64,
    at: u64,
    values: [u64; TOGETHER as usize],
}

impl Draws {
    fn new(seed: u64, kind: u64) -> Self {
        Draws { seed, kind, at: u64::MAX, values: [0; TOGETHER as usize] }
    }

    #[inline]
    fn get(&mut self, number: u64) -> u64 {
        if number / TOGETHER != self.at {
            self.make(number / TOGETHER);
        }
        self.values[(number % TOGETHER) as usize]
    }

    #[cold]
    fn make(&mut self, at: u64) {
        let mut rng = Rng::new(self.seed, self.kind | at);
        self.values.fill_with(|| draw(&mut rng));
        self.at = at;
    }
}

/// Whether an event's number is held out: exactly one of every block of `round(1 / holdout)` numbers, counted
/// from 1; which one is draw `block % 32` of stream `2^62 + block / 32` of the seed. `holdout` 0 holds out none.
pub fn held_out(seed: u64, holdout: f64, event: u64) -> bool {
    HoldOut::new(seed, holdout).contains(event)
}

/// [`held_out`] for a stream of events: the draw of a block is made once.
#[derive(Clone, Debug)]
pub struct HoldOut {
    size: Option<u64>,
    draws: Draws,
}

impl HoldOut {
    /// See [`held_out`].
    pub fn new(seed: u64, holdout: f64) -> Self {
        HoldOut { size: block_size(holdout), draws: Draws::new(seed, HOLD_OUT) }
    }

    /// Events per block, exactly one of which is held out; `None`: none is.
    pub fn block(&self) -> Option<u64> {
        self.size
    }

    /// Whether the event is held out.
    #[inline]
    pub fn contains(&mut self, event: u64) -> bool {
        let (Some(size), Some(at)) = (self.size, event.checked_sub(1)) else { return false };
        let block = at / size;
        let position = (u128::from(self.draws.get(block)) * u128::from(size)) >> BITS;
        at - block * size == position as u64
    }
}

/// Uniform keys of events, [`BITS`] bits: a reservoir keeps the lowest.
#[derive(Clone, Debug)]
pub(super) struct Keys(Draws);

impl Keys {
    pub fn new(seed: u64) -> Self {
        Keys(Draws::new(seed, KEYS))
    }

    #[inline]
    pub fn of(&mut self, event: u64) -> u64 {
        self.0.get(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_every_block_is_held_out_wherever_it_stands() {
        for (holdout, size) in [(0.1, 10u64), (0.25, 4), (0.5, 2), (0.3, 3)] {
            let mut cached = HoldOut::new(7, holdout);
            let mut at = vec![0u32; size as usize];
            for block in 0..4000 {
                let held: Vec<u64> = (0..size).filter(|i| cached.contains(1 + block * size + i)).collect();
                assert_eq!(held.len(), 1, "block {block} of {size}");
                at[held[0] as usize] += 1;
            }
            let want = 4000.0 / size as f64;
            let chi2: f64 = at.iter().map(|&n| (f64::from(n) - want).powi(2) / want).sum();
            assert!(chi2 < 30.0, "positions {at:?}");
            for event in [3u64, 17, 2, 39_999, 5] {
                assert_eq!(held_out(7, holdout, event), cached.contains(event), "event {event}");
            }
        }
        assert!((0..1000).all(|e| !held_out(7, 0.0, e)));
        assert!(!held_out(7, 0.5, 0));
    }

    #[test]
    fn seeds_hold_out_different_events() {
        let of = |seed| (1..=200).filter(|&e| held_out(seed, 0.1, e)).collect::<Vec<u64>>();
        assert_eq!(of(3), of(3));
        assert_ne!(of(3), of(4));
    }

    #[test]
    fn keys_depend_on_the_event_alone() {
        let (mut up, mut down) = (Keys::new(5), Keys::new(5));
        let forth: Vec<u64> = (0..200).map(|e| up.of(e)).collect();
        let mut back: Vec<u64> = (0..200).rev().map(|e| down.of(e)).collect();
        back.reverse();
        assert_eq!(forth, back);
        assert!(forth.iter().all(|k| *k < 1 << BITS));
        let distinct: std::collections::BTreeSet<_> = forth.iter().collect();
        assert_eq!(distinct.len(), 200);
        let mut positions = Draws::new(5, HOLD_OUT);
        assert!((0..200).all(|n| !distinct.contains(&positions.get(n))), "hold-out and keys share draws");
    }
}
