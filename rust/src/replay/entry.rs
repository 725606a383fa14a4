//! One stored event: its numbers in f32 or as halves, decoded when asked for.

use std::borrow::Cow;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::said::Kind;
use super::{Part, Sample};
use crate::dtype::Dtype;
use crate::learn::Feedback;

/// Bytes of an entry in the order of keys, a B-tree at its usual fill.
const ORDER: usize = 40;
/// Counters of a shared allocation.
const COUNTS: usize = 2 * size_of::<usize>();

/// Input, output of the frozen layer, output of the adapter, vectors of the feedback.
pub(super) const SECTIONS: usize = 4;

/// The sections one after another; in f32 the feedback is shared, not copied.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Numbers {
    F32 {
        values: Box<[f32]>,
        feedback: Arc<Feedback>,
    },
    /// Section `i` holds `value * 2^shifts[i]`, so that it neither overflows nor loses small values.
    F16 {
        values: Box<[f16]>,
        shifts: [i16; SECTIONS],
        kind: Kind,
    },
}

/// An event as it is stored.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slot {
    pub event: u64,
    pub key: u64,
    pub pattern: u32,
    pub module: Option<u32>,
    pub quality: Option<f32>,
    pub weight: f32,
    pub advantage: f32,
    pub has_base: bool,
    pub lens: [u32; SECTIONS],
    pub numbers: Numbers,
}

fn power_of_two(e: i16) -> f32 {
    f32::from_bits(((i32::from(e) + 127) as u32) << 23)
}

/// The shift that brings the largest magnitude into [2^14, 2^15), under the largest half.
fn shift_of(v: &[f32]) -> i16 {
    let top = v.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    if top == 0.0 {
        return 0;
    }
    let exponent = (top.to_bits() >> 23) as i16 - 127;
    (14 - exponent).min(126)
}

fn push_halves(v: &[f32], shift: i16, to: &mut Vec<f16>) {
    let (factor, mut scaled, mut halves) = (power_of_two(shift), [0f32; 64], [f16::ZERO; 64]);
    for chunk in v.chunks(64) {
        let n = chunk.len();
        scaled.iter_mut().zip(chunk).for_each(|(s, v)| *s = v * factor);
        halves[..n].convert_from_f32_slice(&scaled[..n]);
        to.extend_from_slice(&halves[..n]);
    }
}

fn push_floats(halves: &[f16], shift: i16, to: &mut Vec<f32>) {
    let from = to.len();
    to.resize(from + halves.len(), 0.0);
    halves.convert_to_f32_slice(&mut to[from..]);
    let factor = power_of_two(-shift);
    to[from..].iter_mut().for_each(|v| *v *= factor);
}

impl Slot {
    /// Numbers of each section, and bytes of the whole entry.
    pub fn measure(sample: &Sample, stored: &[f32], dtype: Dtype) -> ([usize; SECTIONS], usize) {
        let said = Kind::of(&sample.feedback).1;
        let base = sample.base.as_ref().map_or(0, Vec::len);
        let lens = [sample.x.len(), base, stored.len(), said[0].len() + said[1].len()];
        (lens, Self::bytes_of(lens, dtype))
    }

    fn bytes_of(lens: [usize; SECTIONS], dtype: Dtype) -> usize {
        let numbers = lens.iter().sum::<usize>() * dtype.size();
        let shared = if dtype == Dtype::F32 { COUNTS + size_of::<Feedback>() } else { 0 };
        size_of::<Slot>() + ORDER + numbers + shared
    }

    /// Bytes that this entry takes, its share of the order of keys included.
    pub fn bytes(&self) -> usize {
        Self::bytes_of(self.lens.map(|n| n as usize), self.dtype())
    }

    pub fn dtype(&self) -> Dtype {
        match self.numbers {
            Numbers::F32 { .. } => Dtype::F32,
            Numbers::F16 { .. } => Dtype::F16,
        }
    }

    pub fn new(sample: &Sample, stored: &[f32], key: u64, pattern: u32, dtype: Dtype) -> Self {
        let (lens, _) = Self::measure(sample, stored, dtype);
        let base = sample.base.as_deref().unwrap_or_default();
        let numbers = if dtype == Dtype::F32 {
            let values = [sample.x.as_slice(), base, stored].concat().into_boxed_slice();
            Numbers::F32 { values, feedback: Arc::clone(&sample.feedback) }
        } else {
            let (kind, said) = Kind::of(&sample.feedback);
            let sections: [&[&[f32]]; SECTIONS] = [&[&sample.x], &[base], &[stored], &said];
            let mut values = Vec::with_capacity(lens.iter().sum());
            let shifts = sections.map(|parts| {
                let shift = parts.iter().filter(|p| !p.is_empty()).map(|p| shift_of(p)).min().unwrap_or(0);
                parts.iter().for_each(|p| push_halves(p, shift, &mut values));
                shift
            });
            Numbers::F16 { values: values.into_boxed_slice(), shifts, kind }
        };
        Slot {
            event: sample.event,
            key,
            pattern,
            module: sample.module,
            quality: sample.quality,
            weight: sample.weight,
            advantage: sample.advantage,
            has_base: sample.base.is_some(),
            lens: lens.map(|n| n as u32),
            numbers,
        }
    }

    fn range(&self, section: usize) -> std::ops::Range<usize> {
        let from: usize = self.lens[..section].iter().map(|&n| n as usize).sum();
        from..from + self.lens[section] as usize
    }

    fn push(&self, section: usize, to: &mut Vec<f32>) {
        match &self.numbers {
            Numbers::F32 { values, .. } => to.extend_from_slice(&values[self.range(section)]),
            Numbers::F16 { values, shifts, .. } => {
                push_floats(&values[self.range(section)], shifts[section], to)
            }
        }
    }

    fn section(&self, section: usize) -> Cow<'_, [f32]> {
        match &self.numbers {
            Numbers::F32 { values, .. } => Cow::Borrowed(&values[self.range(section)]),
            Numbers::F16 { .. } => {
                let mut out = Vec::with_capacity(self.lens[section] as usize);
                self.push(section, &mut out);
                Cow::Owned(out)
            }
        }
    }

    /// Puts another output of the adapter in the place of the stored one, of the same length.
    pub fn set_stored(&mut self, stored: &[f32]) {
        let range = self.range(2);
        match &mut self.numbers {
            Numbers::F32 { values, .. } => values[range].copy_from_slice(stored),
            Numbers::F16 { values, shifts, .. } => {
                let mut halves = Vec::with_capacity(stored.len());
                shifts[2] = shift_of(stored);
                push_halves(stored, shifts[2], &mut halves);
                values[range].copy_from_slice(&halves);
            }
        }
    }
}

impl Part {
    pub(super) fn entry(slot: &Slot) -> Entry<'_> {
        Entry {
            event: slot.event,
            module: slot.module,
            quality: slot.quality,
            weight: slot.weight,
            advantage: slot.advantage,
            pattern: slot.pattern,
            slot,
        }
    }
}

/// A stored event; its arrays are decoded when they are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// Its number.
    pub event: u64,
    /// The module that it concerns; `None` is every module.
    pub module: Option<u32>,
    /// Quality in [0, 1] that came with it.
    pub quality: Option<f32>,
    /// Weight of its loss.
    pub weight: f32,
    /// `kappa (R - b)` at the time of a reward; 0 for other feedback.
    pub advantage: f32,
    /// The pattern that its input belonged to.
    pub pattern: u32,
    slot: &'a Slot,
}

impl<'a> Entry<'a> {
    /// Input, `(in,)`: borrowed in f32, decoded in f16.
    pub fn x(&self) -> Cow<'a, [f32]> {
        self.slot.section(0)
    }

    /// Output of the frozen layer, `(out,)`.
    pub fn base(&self) -> Option<Cow<'a, [f32]>> {
        self.slot.has_base.then(|| self.slot.section(1))
    }

    /// What the adapter answered when the event was stored, `(out,)`; empty where nothing was given.
    pub fn stored(&self) -> Cow<'a, [f32]> {
        self.slot.section(2)
    }

    /// Appends the input.
    pub fn push_x(&self, to: &mut Vec<f32>) {
        self.slot.push(0, to);
    }

    /// Appends the output of the frozen layer; `false`, and nothing appended, where there is none.
    pub fn push_base(&self, to: &mut Vec<f32>) -> bool {
        self.slot.push(1, to);
        self.slot.has_base
    }

    /// Appends what the adapter answered.
    pub fn push_stored(&self, to: &mut Vec<f32>) {
        self.slot.push(2, to);
    }

    /// What was said of the output: the very same in f32; decoded in f16, directions of unit length again.
    pub fn feedback(&self) -> Arc<Feedback> {
        match &self.slot.numbers {
            Numbers::F32 { feedback, .. } => Arc::clone(feedback),
            Numbers::F16 { kind, .. } => {
                let mut numbers = self.slot.section(3).into_owned();
                kind.normalise(&mut numbers);
                Arc::new(kind.build(numbers))
            }
        }
    }

    /// Width of the output that the feedback speaks of.
    pub fn width(&self) -> usize {
        match &self.slot.numbers {
            Numbers::F32 { feedback, .. } => feedback.width(),
            Numbers::F16 { kind, .. } => kind.width(self.slot.lens[3] as usize).unwrap_or(0),
        }
    }

    /// The event as it came, but for the rounding of f16.
    pub fn to_sample(&self) -> Sample {
        Sample {
            event: self.event,
            module: self.module,
            x: self.x().into_owned(),
            base: self.base().map(Cow::into_owned),
            feedback: self.feedback(),
            quality: self.quality,
            weight: self.weight,
            advantage: self.advantage,
        }
    }
}
