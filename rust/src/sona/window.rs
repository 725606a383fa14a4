//! Events since the last consolidation, in slots that are used again: pushing does not allocate.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::learn::Feedback;
use crate::replay::Sample;

/// One event in its place.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub sample: Sample,
    /// Kept for the gate: no loop trains on it.
    pub held_out: bool,
}

/// An event as it comes in, borrowed.
#[derive(Clone, Copy)]
pub(super) struct Incoming<'a> {
    pub x: &'a [f32],
    pub base: Option<&'a [f32]>,
    pub feedback: &'a Arc<Feedback>,
    pub module: Option<u32>,
    pub quality: Option<f32>,
    pub weight: f32,
}

impl<'a> Incoming<'a> {
    /// A sample that comes again.
    pub fn of(s: &'a Sample) -> Self {
        let Sample { x, base, feedback, module, quality, weight, .. } = s;
        let (module, quality, weight) = (*module, *quality, *weight);
        Incoming { x, base: base.as_deref(), feedback, module, quality, weight }
    }
}

/// Events in the order of their coming.
#[derive(Debug, Default)]
pub(super) struct Window {
    slots: VecDeque<Pending>,
    /// Emptied slots, with their buffers.
    spare: Vec<Pending>,
    trainable: usize,
}

impl Window {
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Events that may be trained on.
    pub fn trainable(&self) -> usize {
        self.trainable
    }

    pub fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.slots.iter()
    }

    pub fn push(&mut self, event: u64, held_out: bool, advantage: f32, e: Incoming<'_>) {
        let Incoming { x, base, feedback, module, quality, weight } = e;
        let slot = match self.spare.pop() {
            Some(mut slot) => {
                let s = &mut slot.sample;
                s.x.clear();
                s.x.extend_from_slice(x);
                match (&mut s.base, base) {
                    (Some(to), Some(from)) => {
                        to.clear();
                        to.extend_from_slice(from);
                    }
                    (to, from) => *to = from.map(<[f32]>::to_vec),
                }
                s.feedback = Arc::clone(feedback);
                (s.event, s.module, s.quality, s.weight, s.advantage) =
                    (event, module, quality, weight, advantage);
                Pending { held_out, ..slot }
            }
            None => Pending {
                sample: Sample {
                    event,
                    module,
                    x: x.to_vec(),
                    base: base.map(<[f32]>::to_vec),
                    feedback: Arc::clone(feedback),
                    quality,
                    weight,
                    advantage,
                },
                held_out,
            },
        };
        self.trainable += usize::from(!held_out);
        self.slots.push_back(slot);
    }

    /// Puts events in front that were taken out before.
    pub fn put_back(&mut self, taken: Vec<Pending>) {
        self.trainable += taken.iter().filter(|p| !p.held_out).count();
        for p in taken.into_iter().rev() {
            self.slots.push_front(p);
        }
    }

    /// The oldest event leaves.
    pub fn drop_oldest(&mut self) {
        if let Some(p) = self.slots.pop_front() {
            self.trainable -= usize::from(!p.held_out);
            self.spare.push(p);
        }
    }

    /// The newest event leaves: it was refused.
    pub fn drop_newest(&mut self) {
        if let Some(p) = self.slots.pop_back() {
            self.trainable -= usize::from(!p.held_out);
            self.spare.push(p);
        }
    }

    pub fn newest(&self) -> Option<&Pending> {
        self.slots.back()
    }

    pub fn take(&mut self) -> Vec<Pending> {
        self.trainable = 0;
        std::mem::take(&mut self.slots).into()
    }

    /// Takes one event out by its number.
    pub fn remove(&mut self, event: u64) -> Option<Pending> {
        let at = self.slots.iter().position(|p| p.sample.event == event)?;
        let p = self.slots.remove(at)?;
        self.trainable -= usize::from(!p.held_out);
        Some(p)
    }

    /// Gives slots that are no longer needed back.
    pub fn recycle(&mut self, done: Vec<Pending>, most: usize) {
        let room = most.saturating_sub(self.slots.len() + self.spare.len());
        self.spare.extend(done.into_iter().take(room));
    }

    pub fn memory_bytes(&self) -> usize {
        let of = |p: &Pending| {
            let base = p.sample.base.as_ref().map_or(0, Vec::capacity);
            4 * (p.sample.x.capacity() + base) + std::mem::size_of::<Pending>()
        };
        let feedback = |p: &Pending| p.sample.feedback.memory_bytes();
        self.slots.iter().chain(&self.spare).map(of).sum::<usize>()
            + self.slots.iter().map(feedback).sum::<usize>()
    }
}
