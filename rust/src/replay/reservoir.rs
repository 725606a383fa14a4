//! Training and held-out samples of a stream, in bounded memory.

use super::holdout::{HoldOut, Keys};
use super::{Entry, Part, Sample};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::learn::Feedback;

/// How much is kept, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Most events of both parts together.
    pub capacity: usize,
    /// Most bytes of the events of both parts together, their bookkeeping included.
    pub max_bytes: Option<usize>,
    /// How arrays are stored: f32, or f16 with one power of two per array.
    pub dtype: Dtype,
    /// Share of the events that is held out, in [0, 0.5]: one of every `round(1 / holdout)`.
    pub holdout: f64,
    /// Patterns share each part as evenly as they can, instead of by how often they came.
    pub balance: bool,
    /// Seed of all draws.
    pub seed: u64,
}

impl Settings {
    /// The settings, if they can be used.
    ///
    /// # Errors
    /// A share outside [0, 0.5], bf16, no bytes at all, more events than 2^32 - 1.
    pub fn validate(self) -> Result<Self> {
        if !(0.0..=0.5).contains(&self.holdout) {
            return Err(Error::config("holdout", self.holdout, "a share in [0, 0.5]"));
        }
        if self.dtype == Dtype::Bf16 {
            return Err(Error::config("reservoir_dtype", self.dtype, "f32 or f16"));
        }
        if self.max_bytes == Some(0) {
            return Err(Error::config("reservoir_max_bytes", 0, "at least 1, or none"));
        }
        if u32::try_from(self.capacity).is_err() {
            return Err(Error::config("reservoir_capacity", self.capacity, "at most 4294967295"));
        }
        Ok(self)
    }
}

/// A uniform sample of a stream in two parts: one to train on, one held out that nothing trains on.
///
/// All draws are keyed by event numbers, so the same offers give the same reservoir, bit for bit.
#[derive(Clone, Debug)]
pub struct Reservoir {
    settings: Settings,
    hold_out: HoldOut,
    keys: Keys,
    /// Training, held out.
    parts: [Part; 2],
}

impl Reservoir {
    /// An empty reservoir. Where events are held out, their part has `capacity / block` places of the
    /// `capacity`, at least one if there are two, and the same share of the bytes.
    ///
    /// # Errors
    /// Those of [`Settings::validate`].
    pub fn new(settings: Settings) -> Result<Self> {
        let s = settings.validate()?;
        let hold_out = HoldOut::new(s.seed, s.holdout);
        let held = match hold_out.block() {
            Some(block) if s.capacity > 1 => {
                ((s.capacity as f64 / block as f64).round() as usize).clamp(1, s.capacity - 1)
            }
            _ => 0,
        };
        let bytes = s.max_bytes.unwrap_or(usize::MAX);
        let held_bytes = match s.max_bytes {
            Some(n) => (n as u128 * held as u128 / s.capacity.max(1) as u128) as usize,
            None => usize::MAX,
        };
        let train_bytes = if s.max_bytes.is_some() { bytes - held_bytes } else { bytes };
        let parts =
            [Part::new(s.capacity - held, train_bytes, s.balance), Part::new(held, held_bytes, s.balance)];
        Ok(Reservoir { hold_out, keys: Keys::new(s.seed), settings: s, parts })
    }

    /// What it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether an event belongs to the held-out part: its number is held out, and its feedback has a loss. A
    /// bare gradient has none, so holding it out would only lose it.
    pub fn is_held_out(&mut self, event: u64, feedback: &Feedback) -> bool {
        !matches!(feedback, Feedback::Gradient { .. }) && self.hold_out.contains(event)
    }

    /// Whether an offer of this event may be kept. `false` is sure: its output need not be computed.
    pub fn wants(&mut self, sample: &Sample, pattern: u32) -> bool {
        let held = self.is_held_out(sample.event, &sample.feedback);
        self.parts[usize::from(held)].wants(self.keys.of(sample.event), pattern)
    }

    /// Offers an event to its part. `stored` is what the adapter answers now: outputs of the feedback's width,
    /// one per module concerned, or nothing. Returns whether it is kept; nothing is copied before that is known.
    ///
    /// # Errors
    /// `base` or `stored` of another width than the feedback; a kept output that is not finite. Nothing changes.
    pub fn offer(&mut self, sample: &Sample, stored: &[f32], pattern: u32) -> Result<bool> {
        let width = sample.feedback.width();
        if let Some(base) = sample.base.as_ref().filter(|b| b.len() != width) {
            return Err(Error::shape("base", format!("({},)", base.len()), format!("({width},)")));
        }
        if !stored.len().is_multiple_of(width) {
            let want = format!("rows of {width} as {}", sample.feedback.argument());
            return Err(Error::shape("stored", format!("({},)", stored.len()), want));
        }
        let held = self.is_held_out(sample.event, &sample.feedback);
        let (key, part) = (self.keys.of(sample.event), &mut self.parts[usize::from(held)]);
        if part.refuse(key, pattern) {
            return Ok(false);
        }
        if !Kernels::detect()?.all_finite(stored) {
            return Err(Error::non_finite("stored"));
        }
        Ok(part.offer(key, sample, stored, pattern, self.settings.dtype))
    }

    /// The part that is trained on, or the one that is held out.
    pub fn part(&self, held_out: bool) -> &Part {
        &self.parts[usize::from(held_out)]
    }

    pub(super) fn part_mut(&mut self, held_out: bool) -> &mut Part {
        &mut self.parts[usize::from(held_out)]
    }

    /// Removes what is kept of an event.
    pub fn forget(&mut self, event: u64) -> bool {
        let [train, held] = &mut self.parts;
        train.forget(event) | held.forget(event)
    }

    /// Removes everything, counters included.
    pub fn clear(&mut self) {
        for p in &mut self.parts {
            *p = Part::new(p.capacity, p.max_bytes, p.balance);
        }
    }

    /// Gives every kept event of pattern `from` to pattern `into`; see [`super::PatternBank::merged`].
    pub fn merge_patterns(&mut self, from: u32, into: u32) {
        self.parts.iter_mut().for_each(|p| p.merge_patterns(from, into));
    }

    /// Computes every stored output anew (an adapter whose A moved answers differently): `output` gets the entry
    /// and the buffer to fill, as long as what is stored. Entries without a stored output stay without.
    ///
    /// # Errors
    /// The first error of `output`, or an output that is not finite. Nothing changes then.
    pub fn restore_output(
        &mut self,
        mut output: impl FnMut(&Entry<'_>, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let k = Kernels::detect()?;
        let lens = self.parts.each_ref().map(|p| p.slots().iter().map(|s| s.lens[2] as usize).sum::<usize>());
        let mut all = vec![0f32; lens[0] + lens[1]];
        let mut rest = all.as_mut_slice();
        for slot in self.parts.iter().flat_map(Part::slots) {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(slot.lens[2] as usize);
            rest = later;
            if !now.is_empty() {
                output(&Part::entry(slot), now)?;
            }
        }
        if !k.all_finite(&all) {
            return Err(Error::non_finite("stored"));
        }
        let mut rest = all.as_slice();
        for slot in self.parts.iter_mut().flat_map(Part::slots_mut) {
            let (now, later) = rest.split_at(slot.lens[2] as usize);
            rest = later;
            slot.set_stored(now);
        }
        Ok(())
    }

    /// Bytes resident, all of it.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.parts.iter().map(Part::memory_bytes).sum::<usize>()
    }
}
