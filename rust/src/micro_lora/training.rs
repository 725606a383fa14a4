//! What training needs of a learner: its f32 weights, and one locked edit per step.

use super::MicroLora;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::learn::Learner;

/// Learners, version and counters of one moment.
pub(crate) type Before = (Vec<Learner>, u64, super::Counters);

impl MicroLora {
    /// Looks at the learners, of one and the same version.
    pub(crate) fn inspect<R>(&self, f: impl FnOnce(&[Learner]) -> R) -> R {
        f(&self.read().learners)
    }

    /// Puts other learners in the place of these and gives those back; the version moves on. A reader waits for
    /// the exchange of the pointers at most.
    pub(crate) fn exchange(&self, learners: &mut Vec<Learner>) -> u64 {
        let state = &mut *self.write();
        debug_assert_eq!(learners.len(), state.learners.len());
        std::mem::swap(&mut state.learners, learners);
        state.version += 1;
        state.version
    }

    /// Everything that events change, to go back to.
    pub(crate) fn state_before(&self) -> Before {
        let state = self.read();
        (state.learners.clone(), state.version, state.counters)
    }

    /// Goes back as if the events since had not come.
    pub(crate) fn undo(&self, before: Before) {
        let state = &mut *self.write();
        (state.learners, state.version, state.counters) = before;
    }

    /// Runs one edit of the learners under the lock; the version moves on when it says that weights changed.
    pub(crate) fn edit<R>(&self, f: impl FnOnce(&mut [Learner]) -> Result<(bool, R)>) -> Result<R> {
        let state = &mut *self.write();
        let (changed, out) = f(&mut state.learners)?;
        if changed {
            state.version += 1;
            state.counters.apply += 1;
        }
        Ok(out)
    }

    /// Lets readers see the weights rounded to `dtype` while learning goes on in f32 (mixed precision), or
    /// the f32 weights themselves. Rules keep their state.
    pub fn set_storage(&self, dtype: Dtype) {
        let state = &mut *self.write();
        for learner in &mut state.learners {
            learner.set_storage(dtype);
        }
        state.version += 1;
    }
}
