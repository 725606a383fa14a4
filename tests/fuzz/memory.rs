//! What a parser may take: memory counted by the allocator, time on its own processor.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// The system's allocator, with a count of the bytes that are out and the largest that were asked for at once.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

fn taken(more: usize, whole: usize) {
    PEAK.fetch_max(NOW.fetch_add(more, Relaxed) + more, Relaxed);
    LARGEST.fetch_max(whole, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size(), layout.size());
        // SAFETY: forwarded.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size(), layout.size());
        // SAFETY: forwarded.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: forwarded.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size.saturating_sub(layout.size()), size);
        NOW.fetch_sub(layout.size().saturating_sub(size), Relaxed);
        // SAFETY: forwarded.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Bytes beside twice the file.
const BESIDE: usize = 16_000_000;

/// What reading a file took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    pub peak: usize,
    pub largest: usize,
    pub time: Duration,
}

impl Took {
    /// Refuses what a file of `len` bytes may not take.
    pub fn check(&self, len: usize) -> Result<(), String> {
        let bytes = 2 * len + BESIDE;
        let time = Duration::from_secs(1) + Duration::from_nanos(10 * len as u64);
        if self.peak > bytes || self.largest > bytes {
            let Took { peak, largest, .. } = self;
            return Err(format!(
                "{peak} bytes at once, one request of {largest}: {bytes} are allowed for {len}"
            ));
        }
        if self.time > time {
            return Err(format!("{:?} of processor time, {time:?} are allowed for {len} bytes", self.time));
        }
        Ok(())
    }
}

/// Time that this thread ran: other processes do not lengthen it.
fn processor_time() -> Duration {
    let nanos = std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

/// Runs `read` and says what it took. One at a time in a process.
pub fn measure(read: &mut dyn FnMut()) -> Took {
    let start = processor_time();
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    LARGEST.store(0, Relaxed);
    read();
    let (peak, largest) = (PEAK.load(Relaxed) - before, LARGEST.load(Relaxed));
    Took { peak, largest, time: processor_time().saturating_sub(start) }
}
