//! What readers pin: one adapter with its number, its layers laid out by slot.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::adapter::{Adapter, unknown_module};
use crate::error::{Error, Result};
use crate::layer::Layer;

/// Up to this many names are found faster by looking at each.
const SCAN: usize = 8;

/// `(in_features, out_features)`.
pub(super) type Shape = (usize, usize);

/// Layers by slot; a slot that the adapter has no module for is empty.
type Slots = Arc<[Option<Arc<Layer>>]>;

/// An adapter laid out for one manager; a rollback shares it with a later generation.
pub(super) struct Content {
    adapter: Arc<Adapter>,
    slots: Slots,
    /// By slot, (0, 0) where empty: compared at a swap without touching layers.
    shapes: Box<[Shape]>,
    names: Arc<Names>,
    /// Whether shapes other than those of the generation before are wanted.
    pub reshape: bool,
}

impl Content {
    /// Lays an adapter out; names that are new take the next slots.
    pub fn new(adapter: Arc<Adapter>, names: &mut Arc<Names>, reshape: bool) -> Self {
        let places: Vec<usize> = adapter.modules.iter().map(|(name, _)| Names::place(names, name)).collect();
        let mut slots: Vec<Option<Arc<Layer>>> = vec![None; names.len()];
        let mut shapes = vec![(0, 0); names.len()].into_boxed_slice();
        for (&at, (_, layer)) in places.iter().zip(&adapter.modules) {
            slots[at] = Some(Arc::clone(layer));
            shapes[at] = (layer.in_features(), layer.out_features());
        }
        Content { adapter, slots: slots.into(), shapes, names: Arc::clone(names), reshape }
    }

    /// No modules at all: what is active before the first adapter.
    pub fn empty() -> Self {
        Content::new(Arc::default(), &mut Arc::default(), true)
    }

    pub fn adapter(&self) -> &Arc<Adapter> {
        &self.adapter
    }

    /// The first slot whose shape differs from that of `other`, with both shapes.
    pub fn clash(&self, other: &Content) -> Option<(usize, Shape, Shape)> {
        let pairs = self.shapes.iter().zip(&other.shapes).enumerate();
        let mut both = pairs.filter(|(_, (a, b))| a.0 != 0 && b.0 != 0);
        both.find_map(|(slot, (a, b))| (a != b).then_some((slot, *a, *b)))
    }

    fn find(&self, name: &str) -> Option<&Arc<Layer>> {
        let modules = &self.adapter.modules;
        if modules.len() <= SCAN {
            return modules.iter().find_map(|(n, layer)| (n == name).then_some(layer));
        }
        self.slots.get(self.names.find(name)?)?.as_ref()
    }
}

/// Every module name a manager has seen; the position is the slot, and stays. Copied when a name is new, so that
/// generations share it and find names without a lock.
#[derive(Clone, Default)]
pub(super) struct Names {
    list: Vec<String>,
    index: HashMap<String, usize>,
}

impl Names {
    fn place(shared: &mut Arc<Self>, name: &str) -> usize {
        if let Some(&at) = shared.index.get(name) {
            return at;
        }
        let names = Arc::make_mut(shared);
        names.list.push(name.into());
        names.index.insert(name.into(), names.list.len() - 1);
        names.list.len() - 1
    }

    pub fn find(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    pub fn get(&self, slot: usize) -> &str {
        &self.list[slot]
    }

    fn len(&self) -> usize {
        self.list.len()
    }
}

/// Counts what is alive, for as long as it lives.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One version of the weights: immutable, freed when the last of its readers lets go.
pub struct Generation {
    number: u64,
    slots: Slots,
    pub(super) content: Arc<Content>,
    _alive: Counted,
}

impl Generation {
    pub(super) fn new(number: u64, content: Arc<Content>, alive: &Arc<AtomicUsize>) -> Self {
        alive.fetch_add(1, Ordering::Relaxed);
        let slots = Arc::clone(&content.slots);
        Generation { number, slots, content, _alive: Counted(Arc::clone(alive)) }
    }

    /// Its number: 0 before the first adapter, then one more with every change.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its adapter; `None` before the first one.
    pub fn adapter(&self) -> Option<&Arc<Adapter>> {
        (self.number > 0).then_some(&self.content.adapter)
    }

    /// The layer of a slot, where this generation has one.
    #[inline]
    pub fn slot(&self, slot: usize) -> Option<&Arc<Layer>> {
        self.slots.get(slot)?.as_ref()
    }

    /// The layer of a module.
    ///
    /// # Errors
    /// This generation lacks it.
    pub fn layer(&self, name: &str) -> Result<&Arc<Layer>> {
        self.content.find(name).ok_or_else(|| self.lacks(name))
    }

    /// Module names, in the adapter's order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.content.adapter.modules.iter().map(|(n, _)| n.as_str())
    }

    /// The error for a module that this generation lacks.
    #[cold]
    pub fn lacks(&self, name: &str) -> Error {
        let have = match unknown_module(name, self.names()) {
            Error::UnknownModule { have, .. } if self.number > 0 => {
                format!("{have} (the modules of generation {})", self.number)
            }
            _ => "the modules of an active adapter, and none is active yet (generation 0)".into(),
        };
        Error::UnknownModule { got: name.into(), have }
    }
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Generation({}, {} modules)", self.number, self.names().len())
    }
}
