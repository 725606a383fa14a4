//! The learner's state as a value: adapters, snapshots, and going back to them.

use std::sync::Arc;

use super::{Counters, MicroLora, State};
use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::layer::Layer;
use crate::learn::Learner;
use crate::rng::Rng;
use crate::snapshot::Snapshot;

impl MicroLora {
    /// The present weights as a value, with what else the adapter held that this learner was made from.
    pub fn adapter(&self) -> Adapter {
        self.adapter_of(&self.read())
    }

    fn adapter_of(&self, state: &State) -> Adapter {
        let layers = state.learners.iter().map(|l| Arc::clone(l.layer()));
        Adapter { modules: self.names.iter().cloned().zip(layers).collect(), ..self.origin.clone() }
    }

    /// Weights and everything the rules remember; later steps copy what they change.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.read();
        Snapshot {
            adapter: self.adapter_of(&state),
            learners: state.learners.iter().map(Learner::frozen).collect(),
            version: state.version,
            rng: state.rng.state(),
            counters: state.counters,
        }
    }

    /// Goes back to a snapshot: outputs and later learning are bit-identical. The version moves on.
    ///
    /// # Errors
    /// A snapshot of other modules or shapes. Nothing changes then.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        self.check_same(&snapshot.adapter)?;
        let state = &mut *self.write();
        for (name, learner) in self.names.iter().zip(&mut state.learners) {
            // By name: a file may list the same modules in another order.
            let at = snapshot.adapter.modules.iter().position(|(n, _)| n == name);
            *learner = snapshot.learners[at.expect("names were compared")].clone();
        }
        state.rng = Rng::resume(snapshot.rng);
        state.counters = snapshot.counters;
        state.version += 1;
        Ok(())
    }

    /// Takes an adapter's weights and forgets what the rules remember.
    ///
    /// # Errors
    /// An adapter of other modules or shapes. Nothing changes then.
    pub fn restore_adapter(&self, adapter: &Adapter) -> Result<()> {
        self.check_same(adapter)?;
        let state = &mut *self.write();
        for (name, learner) in self.names.iter().zip(&mut state.learners) {
            let layer = adapter.layer(name)?;
            learner.replace(Arc::clone(layer));
        }
        state.rng = Rng::new(state.rng.state().seed, 0);
        state.counters = Counters::default();
        state.version += 1;
        Ok(())
    }

    pub(crate) fn check_same(&self, adapter: &Adapter) -> Result<()> {
        if adapter.modules.len() != self.names.len() {
            let got: Vec<_> = adapter.modules.iter().map(|(n, _)| n.as_str()).collect();
            return Err(Error::config("modules", got.join(", "), self.names.join(", ")));
        }
        for (i, name) in self.names.iter().enumerate() {
            let (theirs, (ours, _)) = (adapter.layer(name)?, self.layer(i));
            let describe = |l: &Layer| {
                let (n_in, n_out) = (l.in_features(), l.out_features());
                let kind = if l.rslora { "rslora " } else { "" };
                format!(
                    "{n_in} -> {n_out}, rank {}, {kind}alpha {}, {}/{}",
                    l.rank(),
                    l.alpha,
                    l.a.dtype(),
                    l.b.dtype()
                )
            };
            let (got, want) = (describe(theirs), describe(&ours));
            if got != want {
                return Err(Error::shape(name, got, want));
            }
        }
        Ok(())
    }
}
