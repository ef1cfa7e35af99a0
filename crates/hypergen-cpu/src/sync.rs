//! What the thread pool is made of, under names of its own: the model test has
//! loom's parts under the same names. Nothing here knows of jobs.

use std::cell::Cell;
use std::time::{Duration, Instant};

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
pub(crate) use std::thread::{Builder, JoinHandle};

/// How long a thread looks for work before it sleeps. Longer than the gaps
/// between the kernels of one step, far shorter than anything a user notices.
pub(crate) const SPIN: Duration = Duration::from_micros(50);

/// A cell that hands out pointers for as long as a closure runs, which is how
/// the model test sees who reads and who writes.
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    pub(crate) fn with<R>(&self, body: impl FnOnce(*const T) -> R) -> R {
        body(self.0.get())
    }

    pub(crate) fn with_mut<R>(&self, body: impl FnOnce(*mut T) -> R) -> R {
        body(self.0.get())
    }
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is inside a job, where further calls run serially.
pub(crate) fn is_inside() -> bool {
    INSIDE.get()
}

/// Says whether it is.
pub(crate) fn set_inside(inside: bool) {
    INSIDE.set(inside);
}

/// Looks at a condition for [`SPIN`]; whether it came true.
pub(crate) fn spin_until(condition: impl Fn() -> bool) -> bool {
    const LOOKS_PER_CLOCK_READING: usize = 32;
    if condition() {
        return true;
    }
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS_PER_CLOCK_READING {
            if condition() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return false;
        }
    }
}
