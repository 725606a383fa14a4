//! The three loops over one adapter: instant, background and deep.
//!
//! A live learner serves and takes every event at once. Events wait in a window; the background loop merges
//! what the live learner became with the last accepted weights, rehearses the reservoir, and lets a gate
//! compare losses on events that nothing was ever trained on. What fails the gate does not serve.
//!
//! Locks, taken in this order: `back` for what only the background and deep loops touch; `place`, the directory;
//! `bandit`; `inner` for what an event touches, held for about a microsecond.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::learn::Learner;
use crate::learn::bandit::LiveBandit;
use crate::learn::consolidate;
use crate::micro_lora::MicroLora;
use crate::replay::{self, HoldOut, PatternBank, Reservoir};
use crate::swap::HotSwap;

mod absorb;
mod background;
mod choose;
mod familiar;
mod finish;
mod forget;
mod gather;
mod held_out;
mod install;
mod instant;
mod members;
mod pause;
mod records;
mod recover;
mod report;
mod result;
mod settings;
mod state;
mod stats;
mod warm_up;
mod window;

pub use forget::{Audit, Forgotten};
pub use instant::Event;
pub use pause::Gate as PauseGate;
pub use report::Report;
pub use result::{Adaptation, Loop, Outcome};
pub use settings::Settings;

pub use recover::{Opened, Places};
pub use state::{STATE_VERSION, config_of};

use background::Task;
use members::Members;
use records::Recorder;
use stats::Stats;
use window::Window;

/// Samples of a reservoir that only holds out.
const UNREHEARSED: usize = 512;

/// What an event touches.
struct Inner {
    /// Number of the next event; the first is 1.
    next: u64,
    window: Window,
    hold: HoldOut,
    stats: Stats,
    /// Event through which a consolidation under way has its window.
    taken_through: Option<u64>,
    /// Events after that were pushed out of the window before they could be replayed.
    overflowed: bool,
    /// Whether live weights are the accepted ones and the window learned on top, nothing else.
    complete: bool,
    /// Number of the last record.
    sequence: u64,
    recorder: Option<Recorder>,
}

/// One member as it was last accepted.
#[derive(Clone)]
struct Accepted {
    learners: Vec<Learner>,
    /// `sum weight u u^T` of every module over all accepted events.
    grams: Vec<Vec<f64>>,
    /// Accepted events of every module.
    events: Vec<u64>,
    /// Sum of their qualities, and how many had one.
    quality: (f64, u64),
}

impl Accepted {
    fn new(learners: Vec<Learner>) -> Self {
        let grams = learners.iter().map(|l| vec![0.0; l.layer().rank().pow(2)]).collect();
        let events = vec![0; learners.len()];
        Accepted { learners, grams, events, quality: (0.0, 0) }
    }
}

/// What only the background and deep loops touch.
struct Back {
    reservoir: Reservoir,
    bank: PatternBank,
    slow: Vec<Accepted>,
    task: Option<Task>,
    /// Events of the windows in a row that contradicted what was accepted.
    contradicted: u64,
    started: Option<std::time::Instant>,
    warm: bool,
    /// Nothing is published while a journal is replayed.
    quiet: bool,
}

/// An adapter that learns while it serves.
pub struct Sona {
    settings: Settings,
    strategy: &'static consolidate::Row,
    kernels: &'static Kernels,
    lora: Arc<MicroLora>,
    members: ArcSwap<Members>,
    hot: Arc<HotSwap>,
    inner: Mutex<Inner>,
    back: Mutex<Back>,
    bandit: Mutex<Option<LiveBandit>>,
    place: Mutex<Option<Places>>,
    /// Set to end `run_background`.
    stop: AtomicBool,
    /// Closed around a fork.
    pub gate: PauseGate,
}

impl Sona {
    /// Three loops over a learner; accepted versions are published to `hot`.
    ///
    /// # Errors
    /// An unknown strategy, a learner whose instant rule moves A, modules that do not share their input width
    /// where there is an ensemble.
    pub fn new(lora: Arc<MicroLora>, hot: Arc<HotSwap>, settings: Settings) -> Result<Self> {
        let strategy = consolidate::strategy(&settings.consolidation)?;
        if lora.settings().instant.train != crate::learn::Train::B {
            return Err(Error::config(
                "lora.instant.train",
                "both",
                "b: a consolidation needs an A that stays",
            ));
        }
        let widths: Vec<_> = (0..lora.names().len()).map(|m| lora.shape(m).0).collect();
        if settings.is_ensemble() && widths.iter().any(|w| *w != widths[0]) {
            return Err(Error::config("consolidation", "ensemble", "modules of one input width, or another"));
        }
        let reservoir = replay::Settings {
            // Held-out samples are kept where none are rehearsed, too.
            capacity: if settings.reservoir_capacity == 0 {
                UNREHEARSED
            } else {
                settings.reservoir_capacity
            },
            max_bytes: settings.reservoir_max_bytes,
            dtype: settings.reservoir_dtype.parse()?,
            holdout: settings.holdout,
            balance: settings.reservoir_balance,
            seed: settings.seed,
        };
        let reservoir = Reservoir::new(reservoir)?;
        let bank = if settings.is_ensemble() { settings.ensemble_size } else { settings.patterns };
        let learners = lora.inspect(|l| l.iter().map(Learner::frozen).collect::<Vec<_>>());
        let untouched = learners.iter().all(|l| l.master().b.is_zero());
        Ok(Sona {
            strategy,
            kernels: lora.kernels(),
            members: ArcSwap::from_pointee(Members::one(Arc::clone(&lora))),
            hot,
            inner: Mutex::new(Inner {
                next: 1,
                window: Window::default(),
                hold: HoldOut::new(settings.seed, settings.holdout),
                stats: Stats::new(),
                taken_through: None,
                overflowed: false,
                complete: true,
                sequence: 0,
                recorder: None,
            }),
            back: Mutex::new(Back {
                reservoir,
                bank: PatternBank::new(bank, settings.pattern_threshold as f32, widths[0])?,
                slow: vec![Accepted::new(learners)],
                task: None,
                contradicted: 0,
                started: None,
                // An A that a learned B was made for stays.
                warm: settings.warmup_inputs == 0 || !untouched,
                quiet: false,
            }),
            bandit: Mutex::new(None),
            place: Mutex::new(None),
            stop: AtomicBool::new(false),
            gate: PauseGate::default(),
            lora,
            settings,
        })
    }

    // A panic leaves counters that are off by one at worst: learners are exchanged whole.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bandit(&self) -> MutexGuard<'_, Option<LiveBandit>> {
        self.bandit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self) -> MutexGuard<'_, Option<Places>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn back(&self) -> MutexGuard<'_, Back> {
        self.back.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Settings it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The first learner; the only one outside an ensemble.
    pub fn lora(&self) -> &Arc<MicroLora> {
        &self.lora
    }

    /// Where accepted versions are published.
    pub fn hot(&self) -> &Arc<HotSwap> {
        &self.hot
    }

    /// Members that serve now.
    pub fn member_count(&self) -> usize {
        self.members.load().loras.len()
    }

    /// The live weights of every member with its centroid (empty for a single member).
    pub fn ensemble(&self) -> Vec<(Adapter, Vec<f32>)> {
        let members = self.members.load_full();
        let width = self.lora.shape(0).0;
        let centroid = |i: usize| members.centroids.get(i * width..(i + 1) * width).unwrap_or(&[]).to_vec();
        members.loras.iter().enumerate().map(|(i, l)| (l.adapter(), centroid(i))).collect()
    }

    /// One row: `y = dY(x)`, or `y += dY(x)`; in an ensemble the members' outputs by their weights for x.
    ///
    /// # Errors
    /// Wrong lengths, non-finite x.
    #[inline]
    pub fn forward(&self, module: usize, x: &[f32], y: &mut [f32], add: bool) -> Result<()> {
        if !self.settings.is_ensemble() {
            return self.lora.forward(module, x, y, add);
        }
        let members = self.members.load();
        if members.loras.len() == 1 {
            return members.loras[0].forward(module, x, y, add);
        }
        if !self.kernels.all_finite(x) {
            return Err(Error::non_finite("x"));
        }
        if x.len() != self.lora.shape(module).0 {
            let want = format!("({},)", self.lora.shape(module).0);
            return Err(Error::shape("x", format!("({},)", x.len()), want));
        }
        if !self.lora.enabled() {
            return self.lora.forward(module, x, y, add);
        }
        let s = &self.settings;
        let mut weights = Vec::new();
        members.weights(self.kernels, x, s.ensemble_hard, s.ensemble_temperature, &mut weights);
        if !add {
            y.fill(0.0);
        }
        let mut part = vec![0.0; y.len()];
        for (lora, &w) in members.loras.iter().zip(&weights).filter(|(_, w)| **w > 0.0) {
            if w == 1.0 {
                return lora.forward(module, x, y, true);
            }
            lora.forward(module, x, &mut part, false)?;
            self.kernels.axpy(w, &part, y);
        }
        Ok(())
    }

    /// The last accepted weights of the first member.
    pub fn consolidated(&self) -> Adapter {
        let _inside = self.gate.enter();
        let back = self.back();
        let layers = back.slow[0].learners.iter().map(|l| Arc::clone(l.layer()));
        Adapter { modules: self.lora.names().iter().cloned().zip(layers).collect(), ..self.lora.adapter() }
    }
}
