//! Hot swap: generations of an adapter behind one atomic pointer.
//!
//! A reader loads the pointer and has one whole generation for as long as it holds on; it never waits. A
//! writer lays the new adapter out aside, then exchanges the pointer once. What was active is freed by whoever
//! holds it last: a reader, or the writer that pushes it out of the one place kept for a rollback.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, Guard};

use crate::adapter::Adapter;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;

mod activity;
mod generation;

pub use activity::Activity;
pub use generation::Generation;
use generation::{Content, Names, Shape};

/// Called with modules done and modules in all; an error ends the work.
pub type Tick<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// A change that happened.
#[derive(Debug)]
#[must_use = "what it retires is freed when it is dropped"]
pub struct Swapped {
    /// Number of the generation before.
    pub old: u64,
    /// Number of the generation after.
    pub new: u64,
    /// What the manager let go of: freed with this value, unless a reader still holds it.
    _retired: [Option<Arc<Generation>>; 2],
}

/// What writers share; held for the exchange itself, never while weights are read or freed.
struct Writer {
    names: Arc<Names>,
    previous: Option<Arc<Generation>>,
    standby: Option<Arc<Content>>,
    /// Ticket of the preparation that was installed last.
    installed: u64,
}

/// The active generation of an adapter, the one before, and the one that stands by.
pub struct HotSwap {
    active: ArcSwap<Generation>,
    writer: Mutex<Writer>,
    tickets: AtomicU64,
    keep_previous: AtomicBool,
    alive: Arc<AtomicUsize>,
    kernels: &'static Kernels,
    /// Whether a preparation or a change is under way, as its owner tells it.
    pub activity: Activity,
}

impl HotSwap {
    /// A manager without an adapter (generation 0); `keep_previous` holds one generation for a rollback.
    ///
    /// # Errors
    /// `MICROLORA_ISA` names an instruction set that this machine lacks.
    pub fn new(keep_previous: bool) -> Result<Self> {
        let alive = Arc::new(AtomicUsize::new(0));
        let first = Generation::new(0, Arc::new(Content::empty()), &alive);
        Ok(HotSwap {
            active: ArcSwap::from_pointee(first),
            writer: Mutex::new(Writer { names: Arc::default(), previous: None, standby: None, installed: 0 }),
            tickets: AtomicU64::new(0),
            keep_previous: AtomicBool::new(keep_previous),
            alive,
            kernels: Kernels::detect()?,
            activity: Activity::default(),
        })
    }

    // Every critical section writes its results last, so a panic leaves the state before it.
    fn write(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernels that readers use.
    #[inline]
    pub fn kernels(&self) -> &'static Kernels {
        self.kernels
    }

    /// The active generation for a short read: wait-free, a few nanoseconds, not to be stored.
    #[inline]
    pub fn load(&self) -> Guard<Arc<Generation>> {
        self.active.load()
    }

    /// The active generation, to be held as long as one likes.
    pub fn pin(&self) -> Arc<Generation> {
        self.active.load_full()
    }

    /// Number of the active generation; it never falls.
    pub fn generation(&self) -> u64 {
        self.load().number()
    }

    /// Generations that are not freed: the active one, the one before, and older ones that readers hold.
    pub fn live_generations(&self) -> usize {
        self.alive.load(Ordering::Relaxed)
    }

    /// The slot of a module of the active generation; it stays the module's in every later one.
    ///
    /// # Errors
    /// The active generation lacks the module.
    pub fn slot(&self, name: &str) -> Result<usize> {
        let active = self.load();
        active.layer(name)?;
        Ok(self.write().names.find(name).expect("a module of a generation has a slot"))
    }

    /// Looks an adapter over before it may serve: every number is read, which also brings its pages in.
    ///
    /// # Errors
    /// No modules, a number that is not finite, other shapes than the active generation's (unless `reshape`),
    /// or what `tick` returns.
    pub fn check(&self, adapter: &Adapter, reshape: bool, tick: &mut Tick<'_>) -> Result<()> {
        let all = adapter.modules.len();
        if all == 0 {
            return Err(Error::config("adapter", "no modules", "at least one"));
        }
        if !reshape {
            let active = self.load();
            for (name, new) in &adapter.modules {
                let Ok(old) = active.layer(name) else { continue };
                let of = |l: &crate::layer::Layer| (l.in_features(), l.out_features());
                if of(new) != of(old) {
                    return Err(other_shape(name, of(new), of(old), active.number()));
                }
            }
        }
        for (done, (name, layer)) in adapter.modules.iter().enumerate() {
            tick(done, all)?;
            for (what, factor) in [("lora_a", &layer.a), ("lora_b", &layer.b)] {
                if !self.finite(factor) {
                    return Err(Error::non_finite(format!("adapter: {what} of {name}")));
                }
            }
        }
        tick(all, all)
    }

    fn finite(&self, factor: &Factor) -> bool {
        match factor.dtype() {
            Dtype::F32 => self.kernels.all_finite(factor.stream()),
            Dtype::F16 | Dtype::Bf16 => factor.is_finite(),
        }
    }

    /// Makes an adapter the active one.
    ///
    /// # Errors
    /// As [`HotSwap::check`]; nothing changes then.
    pub fn set_active(&self, adapter: Arc<Adapter>, reshape: bool) -> Result<Swapped> {
        self.check(&adapter, reshape, &mut |_, _| Ok(()))?;
        self.publish(adapter, None, reshape)
    }

    /// Makes an adapter the active one if generation `expected` still is: nobody's work is lost.
    ///
    /// # Errors
    /// [`Error::Swap`] with the present number when another writer was faster; as [`HotSwap::check`] otherwise.
    /// Nothing changes then.
    pub fn compare_and_swap(&self, expected: u64, adapter: Arc<Adapter>, reshape: bool) -> Result<Swapped> {
        self.expect(expected)?;
        self.check(&adapter, reshape, &mut |_, _| Ok(()))?;
        self.publish(adapter, Some(expected), reshape)
    }

    /// Whether generation `expected` is the active one.
    ///
    /// # Errors
    /// [`Error::Swap`] with the present number when it is not.
    pub fn expect(&self, expected: u64) -> Result<()> {
        let now = self.generation();
        if now == expected {
            return Ok(());
        }
        let reason = format!("expected: got generation {expected}, but {now} is active");
        Err(Error::Swap { reason, generation: now })
    }

    /// The exchange for an adapter that was checked.
    ///
    /// # Errors
    /// As [`HotSwap::compare_and_swap`]; shapes are compared with those that are active now.
    pub(crate) fn publish(
        &self,
        adapter: Arc<Adapter>,
        expected: Option<u64>,
        reshape: bool,
    ) -> Result<Swapped> {
        let mut writer = self.write();
        if let Some(expected) = expected {
            self.expect(expected)?;
        }
        let content = Arc::new(Content::new(adapter, &mut writer.names, reshape));
        self.agree(&content, &writer.names)?;
        Ok(self.exchange(&mut writer, content))
    }

    fn agree(&self, content: &Content, names: &Names) -> Result<()> {
        if content.reshape {
            return Ok(());
        }
        let active = self.load();
        match content.clash(&active.content) {
            None => Ok(()),
            Some((slot, new, old)) => Err(other_shape(names.get(slot), new, old, active.number())),
        }
    }

    /// One atomic exchange of the pointer. The lock makes numbers follow the order of the exchanges.
    fn exchange(&self, writer: &mut Writer, content: Arc<Content>) -> Swapped {
        let number = self.load().number() + 1;
        let old = self.active.swap(Arc::new(Generation::new(number, content, &self.alive)));
        let before = old.number();
        let keep = self.keep_previous.load(Ordering::Relaxed) && old.adapter().is_some();
        let (kept, dropped) = if keep { (Some(old), None) } else { (None, Some(old)) };
        let pushed = std::mem::replace(&mut writer.previous, kept);
        Swapped { old: before, new: number, _retired: [pushed, dropped] }
    }

    /// A ticket for a preparation that starts now: of two, the one that started later wins.
    pub fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Checks an adapter and lets it stand by.
    ///
    /// # Errors
    /// As [`HotSwap::check`]; the standby of before stays then.
    pub fn prepare_standby(&self, adapter: Arc<Adapter>, reshape: bool, tick: &mut Tick<'_>) -> Result<()> {
        let ticket = self.ticket();
        self.check(&adapter, reshape, tick)?;
        self.install(adapter, ticket, reshape).map(drop)
    }

    /// Lets an adapter that was checked stand by; gives what stood by before, to be freed by the caller.
    ///
    /// # Errors
    /// [`Error::Swap`] when a preparation that started later is done already.
    pub(crate) fn install(
        &self,
        adapter: Arc<Adapter>,
        ticket: u64,
        reshape: bool,
    ) -> Result<Option<Arc<Adapter>>> {
        let mut writer = self.write();
        if ticket < writer.installed {
            let reason = "standby: a preparation that started later is done already".into();
            return Err(Error::Swap { reason, generation: self.generation() });
        }
        let content = Arc::new(Content::new(adapter, &mut writer.names, reshape));
        writer.installed = ticket;
        let before = writer.standby.replace(content);
        Ok(before.map(|c| Arc::clone(c.adapter())))
    }

    /// The adapter that stands by.
    pub fn standby(&self) -> Option<Arc<Adapter>> {
        self.write().standby.as_ref().map(|c| Arc::clone(c.adapter()))
    }

    /// Takes the standby out, to be freed by the caller.
    pub fn discard_standby(&self) -> Option<Arc<Adapter>> {
        let before = self.write().standby.take();
        before.map(|c| Arc::clone(c.adapter()))
    }

    /// Makes the standby the active generation.
    ///
    /// # Errors
    /// [`Error::Swap`] without a standby; a shape error when what became active meanwhile has other shapes (the
    /// standby stays then).
    pub fn swap(&self) -> Result<Swapped> {
        let mut writer = self.write();
        let Some(content) = writer.standby.take() else {
            let reason = "standby: there is none, expected one that prepare_standby has finished".into();
            return Err(Error::Swap { reason, generation: self.generation() });
        };
        if let Err(e) = self.agree(&content, &writer.names) {
            writer.standby = Some(content);
            return Err(e);
        }
        Ok(self.exchange(&mut writer, content))
    }

    /// Makes the adapter of before active again, under a new number, and keeps nothing of what it replaces: a
    /// second call cannot bring back what the first one took out of service.
    ///
    /// # Errors
    /// [`Error::Swap`] with nothing to go back to.
    pub fn rollback(&self) -> Result<Swapped> {
        let mut writer = self.write();
        let Some(previous) = writer.previous.take() else {
            let kept = self.keep_previous.load(Ordering::Relaxed);
            let why = if kept { "" } else { " (keep_previous is off)" };
            let reason = format!("rollback: there is no earlier generation{why}");
            return Err(Error::Swap { reason, generation: self.generation() });
        };
        let mut done = self.exchange(&mut writer, Arc::clone(&previous.content));
        done._retired = [writer.previous.take(), Some(previous)];
        Ok(done)
    }

    /// The adapter that a rollback would go back to.
    pub fn previous(&self) -> Option<Arc<Adapter>> {
        self.write().previous.as_ref().and_then(|g| g.adapter().cloned())
    }

    /// Takes out what is kept for a rollback, to be freed by the caller unless readers hold it.
    pub fn forget_previous(&self) -> Option<Arc<Generation>> {
        self.write().previous.take()
    }

    /// Whether the generation before the active one is kept.
    pub fn keep_previous(&self) -> bool {
        self.keep_previous.load(Ordering::Relaxed)
    }

    /// Keeps the generation before the active one from the next change on, or takes it out now, to be freed by
    /// the caller.
    pub fn set_keep_previous(&self, keep: bool) -> Option<Arc<Generation>> {
        let mut writer = self.write();
        self.keep_previous.store(keep, Ordering::Relaxed);
        if keep { None } else { writer.previous.take() }
    }
}

#[cold]
fn other_shape(name: &str, new: Shape, old: Shape, number: u64) -> Error {
    let want = format!("{old:?} as in generation {number}, or reshape=True");
    Error::shape(format!("adapter: (in, out) of {name}"), format!("{new:?}"), want)
}
