//! A gate around work that runs without the interpreter's lock, so that a fork finds none of it half done.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Counts who is inside; closed, it lets nobody in.
#[derive(Debug, Default)]
pub struct Gate {
    inside: AtomicUsize,
    closed: AtomicBool,
}

/// Inside until dropped.
#[derive(Debug)]
pub struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

/// How long to sleep between looks: a fork waits for one chunk of work at most.
const NAP: Duration = Duration::from_micros(50);

impl Gate {
    /// Goes in, once the gate is open. No lock is held while waiting: a forked child inherits none.
    pub fn enter(&self) -> Inside<'_> {
        loop {
            self.inside.fetch_add(1, Ordering::SeqCst);
            if !self.closed.load(Ordering::SeqCst) {
                return Inside(self);
            }
            self.inside.fetch_sub(1, Ordering::SeqCst);
            std::thread::sleep(NAP);
        }
    }

    /// Closes the gate and waits until nobody is inside.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        while self.inside.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(NAP);
        }
    }

    /// Opens the gate in a forked child, which has none of the threads that were at the gate.
    pub fn open_in_child(&self) {
        self.inside.store(0, Ordering::SeqCst);
        self.open();
    }

    /// Opens the gate again. A fork between `close` and `open` leaves nobody inside in the child either.
    pub fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_closed_gate_waits_for_those_inside_and_lets_nobody_in() {
        let gate = Arc::new(Gate::default());
        let done = Arc::new(AtomicBool::new(false));
        let first = gate.enter();
        let closer = {
            let (gate, done) = (Arc::clone(&gate), Arc::clone(&done));
            std::thread::spawn(move || {
                gate.close();
                assert!(done.load(Ordering::SeqCst), "closed while somebody was inside");
            })
        };
        std::thread::sleep(Duration::from_millis(5));
        done.store(true, Ordering::SeqCst);
        drop(first);
        closer.join().unwrap();
        let entered = Arc::new(AtomicBool::new(false));
        let waiter = {
            let (gate, entered) = (Arc::clone(&gate), Arc::clone(&entered));
            std::thread::spawn(move || {
                let _inside = gate.enter();
                entered.store(true, Ordering::SeqCst);
            })
        };
        std::thread::sleep(Duration::from_millis(5));
        assert!(!entered.load(Ordering::SeqCst));
        gate.open();
        waiter.join().unwrap();
        assert!(entered.load(Ordering::SeqCst));
    }
}
