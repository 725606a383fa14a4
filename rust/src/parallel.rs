//! Opt-in threads for large batches: off by default, never used by a call of microseconds.
//!
//! The pool is built on first use and belongs to the process that built it: after `fork` a child, which
//! inherits none of the threads, builds its own instead of waiting for them for ever.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

/// Multiply-adds below which a batch stays on the calling thread. Measured on two cores: the best of many runs
/// breaks even near 25 million (about 250 us of one core); below that, waking the pool costs more than it saves.
pub const MIN_WORK: usize = 32_000_000;

/// More threads than this are refused: a batch has no work for them.
pub const MAX_THREADS: usize = 64;

static THREADS: AtomicUsize = AtomicUsize::new(1);
static POOL: Mutex<Option<Owned>> = Mutex::new(None);

/// A pool with the process that built it and its size.
struct Owned {
    process: u32,
    threads: usize,
    pool: Arc<ThreadPool>,
}

/// Sets how many threads a large batch may use; 1 (the default) means none beside the caller.
///
/// # Errors
/// When `n` is 0 or above [`MAX_THREADS`].
pub fn set_num_threads(n: usize) -> Result<()> {
    if !(1..=MAX_THREADS).contains(&n) {
        return Err(Error::config("num_threads", n, format!("1 to {MAX_THREADS}")));
    }
    THREADS.store(n, Ordering::Relaxed);
    Ok(())
}

/// How many threads a large batch may use.
pub fn num_threads() -> usize {
    THREADS.load(Ordering::Relaxed)
}

/// The pool for `work` multiply-adds, or none when the caller should do them alone: threads are off, the
/// work is small, the pool cannot be built, or another thread is building it.
pub(crate) fn pool_for(work: usize) -> Option<Arc<ThreadPool>> {
    let threads = num_threads();
    if threads == 1 || work < MIN_WORK {
        return None;
    }
    // A lock that was held while the process forked stays locked in the child: never wait for it.
    let mut slot = match POOL.try_lock() {
        Ok(slot) => slot,
        Err(std::sync::TryLockError::Poisoned(e)) => PoisonError::into_inner(e),
        Err(std::sync::TryLockError::WouldBlock) => return None,
    };
    let process = std::process::id();
    if let Some(owned) = slot.as_ref().filter(|o| o.process == process && o.threads == threads) {
        return Some(owned.pool.clone());
    }
    let pool = Arc::new(ThreadPoolBuilder::new().num_threads(threads).build().ok()?);
    let old = slot.replace(Owned { process, threads, pool: pool.clone() });
    // Dropping a pool inherited through fork would signal threads that are not there: leave it be.
    if let Some(old) = old.filter(|o| o.process != process) {
        std::mem::forget(old);
    }
    Some(pool)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::factor::Factor;
    use crate::kernels::Kernels;
    use crate::layer::Layer;

    #[test]
    fn threads_are_opt_in_capped_only_for_large_work_and_change_nothing() {
        assert!(pool_for(usize::MAX).is_none(), "off by default");
        for bad in [0, MAX_THREADS + 1] {
            assert!(set_num_threads(bad).is_err());
        }
        set_num_threads(2).unwrap();
        assert!(pool_for(MIN_WORK - 1).is_none());
        let pool = pool_for(MIN_WORK).expect("a pool");
        assert_eq!(pool.current_num_threads(), 2);
        assert!(Arc::ptr_eq(&pool, &pool_for(MIN_WORK).expect("the same pool")));

        let k = Kernels::detect().unwrap();
        let rows: Vec<f32> = (0..64 * 2048).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
        let factor = || Factor::from_rows(&rows, 64, 2048, Dtype::F32);
        let layer = Layer::new(factor(), factor(), 1.0, false).unwrap();
        let x: Vec<f32> = (0..131 * 2048).map(|i| (i % 89) as f32 / 89.0 - 0.5).collect();
        assert!(131 * layer.param_count() >= MIN_WORK);
        let (mut two, mut one) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        layer.forward_rows(k, &x, &mut two, false).unwrap();

        set_num_threads(1).unwrap();
        layer.forward_rows(k, &x, &mut one, false).unwrap();
        let worst = one.iter().zip(&two).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let size = one.iter().map(|v| v.abs()).fold(0.0, f32::max);
        assert!(worst <= 1e-6 * size && size > 0.0, "{worst} of {size}");
        assert!(pool_for(MIN_WORK).is_none());
    }
}
