//! Whether work is under way, counted so that a forked child does not inherit the count.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Pieces of work that have begun and not ended, in this process.
#[derive(Default)]
pub struct Activity {
    process: AtomicU32,
    count: AtomicUsize,
}

impl Activity {
    /// One more piece of work.
    pub fn begin(&self) {
        let here = std::process::id();
        if self.process.swap(here, Ordering::AcqRel) != here {
            self.count.store(0, Ordering::Release);
        }
        self.count.fetch_add(1, Ordering::AcqRel);
    }

    /// One less; work that another process began is not counted here.
    pub fn end(&self) {
        if self.process.load(Ordering::Acquire) == std::process::id() {
            let less = |n: usize| n.checked_sub(1);
            let _ = self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
        }
    }

    /// Whether any is under way.
    pub fn is_busy(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.process.load(Ordering::Acquire) == std::process::id()
    }
}
