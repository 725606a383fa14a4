//! One part of a reservoir: the events with the lowest keys, of all or class by class.
//!
//! Every event has a uniform key, a pure function of its number. Keeping the lowest keys is a uniform sample
//! without replacement as Vitter's algorithm R gives (ACM TOMS 11, 1985), and stays one when bytes, not
//! counts, are what is short, and after events were forgotten. Balanced: class-balancing reservoir sampling
//! (Chrysakis & Moens, ICML 2020) with the same keys.

use std::collections::{BTreeMap, BTreeSet};

use super::entry::{Entry, Slot};
use super::{Sample, holdout};
use crate::dtype::Dtype;

/// Above every key.
pub(super) const UNBOUNDED: u64 = 1 << holdout::BITS;
/// Bytes of a class in its B-tree.
const CLASS: usize = size_of::<(u32, Class)>() * 3 / 2;

/// What a part knows of one class.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Class {
    pub seen: u64,
    pub kept: u32,
    /// It is or was the largest of a full part: from then on its newcomers replace its own.
    pub full: bool,
    /// Keys from here on are not kept.
    pub bound: u64,
}

impl Default for Class {
    fn default() -> Self {
        Class { seen: 0, kept: 0, full: false, bound: UNBOUNDED }
    }
}

/// A bounded uniform sample of the events that were offered to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    pub(super) capacity: usize,
    pub(super) max_bytes: usize,
    pub(super) balance: bool,
    pub(super) seen: u64,
    pub(super) too_large: u64,
    pub(super) classes: BTreeMap<u32, Class>,
    /// (class, key, place in `slots`).
    order: BTreeSet<(u32, u64, u32)>,
    slots: Vec<Slot>,
    bytes: usize,
}

impl Part {
    pub(super) fn new(capacity: usize, max_bytes: usize, balance: bool) -> Self {
        Part {
            capacity,
            max_bytes,
            balance,
            seen: 0,
            too_large: 0,
            classes: BTreeMap::new(),
            order: BTreeSet::new(),
            slots: Vec::new(),
            bytes: 0,
        }
    }

    /// Events that are kept.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True when nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Most events that can be kept.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Events that were offered.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Events that were not kept because one alone is larger than the bytes allowed.
    pub fn too_large(&self) -> u64 {
        self.too_large
    }

    /// The event in place `i`; places are in no particular order.
    ///
    /// # Panics
    /// `i` not under `len`.
    pub fn get(&self, i: usize) -> Entry<'_> {
        Part::entry(&self.slots[i])
    }

    /// Every event that is kept.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Entry<'_>> {
        self.slots.iter().map(Part::entry)
    }

    /// Bytes of the events that are kept, as `max_bytes` counts them.
    pub fn sample_bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes resident beyond the struct itself.
    pub(super) fn memory_bytes(&self) -> usize {
        let spare = (self.slots.capacity() - self.slots.len()) * size_of::<Slot>();
        self.bytes + spare + self.classes.len() * CLASS
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(super) fn slots_mut(&mut self) -> &mut [Slot] {
        &mut self.slots
    }

    pub(super) fn class_of(&self, pattern: u32) -> u32 {
        if self.balance { pattern } else { 0 }
    }

    /// Whether an event of this key can be kept: `false` is final.
    #[inline]
    pub(super) fn wants(&self, key: u64, pattern: u32) -> bool {
        let class = self.classes.get(&self.class_of(pattern));
        self.capacity > 0 && class.is_none_or(|c| key < c.bound)
    }

    /// Counts an event that cannot be kept; `false`, and nothing counted: it may be.
    #[inline]
    pub(super) fn refuse(&mut self, key: u64, pattern: u32) -> bool {
        let id = self.class_of(pattern);
        match self.classes.get_mut(&id).filter(|c| key >= c.bound) {
            Some(class) => class.seen += 1,
            None if self.capacity == 0 => self.classes.entry(id).or_default().seen += 1,
            None => return false,
        }
        self.seen += 1;
        true
    }

    /// Counts an event and keeps it, if it belongs to the lowest keys that fit.
    pub(super) fn offer(
        &mut self,
        key: u64,
        sample: &Sample,
        stored: &[f32],
        pattern: u32,
        dtype: Dtype,
    ) -> bool {
        let class = self.class_of(pattern);
        self.seen += 1;
        self.classes.entry(class).or_default().seen += 1;
        let (_, bytes) = Slot::measure(sample, stored, dtype);
        if bytes > self.max_bytes {
            self.too_large += 1;
            return false;
        }
        if !self.make_room(class, key, bytes) {
            return false;
        }
        self.insert(Slot::new(sample, stored, key, pattern, dtype));
        true
    }

    fn is_full(&self, bytes: usize) -> bool {
        self.slots.len() >= self.capacity || self.bytes.saturating_add(bytes) > self.max_bytes
    }

    /// Evicts until `bytes` more fit; `false`: the newcomer's own key is the one that has to go.
    fn make_room(&mut self, class: u32, key: u64, bytes: usize) -> bool {
        if !self.is_full(bytes) {
            return true;
        }
        let most = self.classes.values().map(|c| c.kept).max().unwrap_or(0);
        self.classes.values_mut().filter(|c| c.kept == most).for_each(|c| c.full = true);
        while self.is_full(bytes) {
            let own = &self.classes[&class];
            let from = if own.full && own.kept > 0 { class } else { self.largest() };
            let last = self.order.range(..=(from, u64::MAX, u32::MAX)).next_back();
            let &(_, highest, place) = last.expect("a part that is full keeps something");
            if from == class && key >= highest {
                self.lower(class, key);
                return false;
            }
            self.remove(place);
            self.lower(from, highest);
            let emptied = self.classes.get_mut(&from).expect("it was counted");
            if from != class && emptied.kept == 0 {
                // A class of which nothing is left would never come back: its newcomers count as its first.
                *emptied = Class { seen: emptied.seen, ..Class::default() };
            }
        }
        true
    }

    /// Most kept; then most seen, which depends on no key.
    fn largest(&self) -> u32 {
        let most = self.classes.iter().max_by_key(|(id, c)| (c.kept, c.seen, **id));
        *most.expect("a part that is full has a class").0
    }

    fn lower(&mut self, class: u32, key: u64) {
        let c = self.classes.get_mut(&class).expect("it was counted");
        c.bound = c.bound.min(key);
    }

    /// Adds an entry whose class has been counted as seen.
    pub(super) fn insert(&mut self, slot: Slot) {
        let class = self.class_of(slot.pattern);
        self.classes.get_mut(&class).expect("it was counted").kept += 1;
        self.order.insert((class, slot.key, self.slots.len() as u32));
        self.bytes += slot.bytes();
        if self.slots.len() == self.slots.capacity() {
            // By an eighth: doubling would leave half of the places empty.
            self.slots.reserve_exact((self.slots.len() / 8).max(4));
        }
        self.slots.push(slot);
    }

    fn remove(&mut self, place: u32) {
        let slot = self.slots.swap_remove(place as usize);
        let class = self.class_of(slot.pattern);
        self.order.remove(&(class, slot.key, place));
        if let Some(moved) = self.slots.get(place as usize) {
            let (of, key) = (self.class_of(moved.pattern), moved.key);
            self.order.remove(&(of, key, self.slots.len() as u32));
            self.order.insert((of, key, place));
        }
        self.bytes -= slot.bytes();
        self.classes.get_mut(&class).expect("it was counted").kept -= 1;
    }

    /// Removes what is kept of an event; the place is filled by events to come, as likely as all others.
    pub(super) fn forget(&mut self, event: u64) -> bool {
        let before = self.slots.len();
        while let Some(place) = self.slots.iter().position(|s| s.event == event) {
            self.remove(place as u32);
        }
        self.slots.len() < before
    }

    /// What was of pattern `from` is of pattern `into` now.
    pub(super) fn merge_patterns(&mut self, from: u32, into: u32) {
        let moved = |s: &&mut Slot| s.pattern == from;
        self.slots.iter_mut().filter(moved).for_each(|s| s.pattern = into);
        if !self.balance || from == into {
            return;
        }
        let Some(a) = self.classes.remove(&from) else { return };
        let mut rows = self.order.split_off(&(from, 0, 0));
        let mut above = rows.split_off(&(from, u64::MAX, u32::MAX));
        self.order.append(&mut above);
        self.order.extend(rows.into_iter().map(|(_, key, place)| (into, key, place)));
        let highest = self.order.range((into, 0, 0)..=(into, u64::MAX, u32::MAX)).next_back();
        let above = highest.map_or(0, |(_, key, _)| key + 1);
        let b = self.classes.entry(into).or_default();
        // All that is kept stays, so the bound is above it: the next evictions bring it down.
        b.bound = a.bound.min(b.bound).max(above);
        b.seen += a.seen;
        b.kept += a.kept;
        b.full |= a.full;
    }
}
