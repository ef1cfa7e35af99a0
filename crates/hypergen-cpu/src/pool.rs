//! The thread pool behind [`Cpu::parallel`](crate::Cpu::parallel).
//!
//! A small model launches thousands of kernels of some 20 microseconds each,
//! so what counts is the time from the call to the first task on every
//! thread. A general work-stealing pool is not needed and this is not one:
//! one job at a time, tasks claimed from a counter, no queues, no futures.
//!
//! Workers that have just finished spin for [`SPIN`] and then sleep until
//! they are woken, so an idle pool uses no processor time. The caller never
//! waits for a worker that has not yet woken up: it closes the job when no
//! task is left, and only workers that had entered by then are waited for.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread looks for work before it sleeps. Longer than the gaps
/// between the kernels of one step, far shorter than anything a user notices.
const SPIN: Duration = Duration::from_micros(50);

/// `Shared::state` in one word: the job's number above, then whether it may
/// be entered, then how many workers are in it.
const OPEN: u64 = 1 << 31;
const COUNT: u64 = OPEN - 1;
const EPOCH_SHIFT: u32 = 32;

/// A job: a closure and the number of times that it is to be called.
#[derive(Clone, Copy)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

type Panic = Box<dyn Any + Send>;

struct Shared {
    state: AtomicU64,
    /// The current job. Written only while the state is closed with nobody
    /// inside, read only by those inside.
    job: UnsafeCell<Option<Job>>,
    /// The next task to be claimed.
    next: AtomicUsize,
    /// The first panic of the current job.
    panic: Mutex<Option<Panic>>,
    stop: AtomicBool,
    /// Workers asleep or about to be, and what they wait on.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    /// Whether the caller sleeps until the last worker has left.
    caller_waits: AtomicBool,
    done: Mutex<()>,
    left: Condvar,
}

// SAFETY: `job` is guarded by `state` as its comment says; the closure behind
// it is `Sync`; everything else is shareable by itself.
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer in `job` is only used while the caller
// keeps the closure alive.
unsafe impl Send for Shared {}

thread_local! {
    /// Whether this thread is inside a job, where further calls run serially.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A fixed set of threads that run one job at a time.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the thread whose job runs.
    busy: Mutex<()>,
}

impl Pool {
    /// Starts `threads - 1` workers; the caller of [`Pool::run`] is the last.
    pub(crate) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            caller_waits: AtomicBool::new(false),
            done: Mutex::new(()),
            left: Condvar::new(),
        });
        let mut pool = Self { shared, workers: Vec::new(), busy: Mutex::new(()) };
        for i in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker =
                std::thread::Builder::new().name(format!("hypergen-cpu-{i}")).spawn(move || shared.work())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that share a job, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(0)` .. `body(tasks - 1)`; see [`crate::Cpu::parallel`].
    pub(crate) fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        if tasks < 2 || self.workers.is_empty() || INSIDE.get() {
            return serially(tasks, body);
        }
        // Whoever comes while another thread's job runs computes alone rather
        // than wait; the result is the same.
        let Ok(busy) = self.busy.try_lock() else { return serially(tasks, body) };
        let shared = &*self.shared;
        shared.open(tasks, body);
        shared.claim(Job { body: erase(body), tasks });
        shared.close();
        let panic = lock(&shared.panic).take();
        drop(busy);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = lock(&self.shared.sleep);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker's panics are caught and belong to the caller of their job.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Makes a job known and wakes those who sleep.
    fn open(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        self.next.store(0, Ordering::Relaxed);
        // SAFETY: the state is closed and nobody is inside, for `busy` is held
        // and the previous holder waited for that in `close`.
        unsafe { *self.job.get() = Some(Job { body: erase(body), tasks }) };
        let epoch = (self.state.load(Ordering::Relaxed) >> EPOCH_SHIFT).wrapping_add(1);
        self.state.store((epoch << EPOCH_SHIFT) | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&self.sleep);
            self.wake.notify_all();
        }
    }

    /// Lets no further worker in and waits until those inside have left.
    fn close(&self) {
        if self.state.fetch_and(!OPEN, Ordering::SeqCst) & COUNT == 0 {
            return;
        }
        let empty = || self.state.load(Ordering::SeqCst) & COUNT == 0;
        if spin_until(empty) {
            return;
        }
        let mut guard = lock(&self.done);
        self.caller_waits.store(true, Ordering::SeqCst);
        while !empty() {
            guard = self.left.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_waits.store(false, Ordering::SeqCst);
    }

    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        loop {
            let news = || {
                let state = self.state.load(Ordering::SeqCst);
                self.stop.load(Ordering::SeqCst) || (state >> EPOCH_SHIFT != seen && state & OPEN != 0)
            };
            if !spin_until(news) {
                let mut guard = lock(&self.sleep);
                // Counted before the last look: `open` looks at the count after
                // it has made its job known, so one of the two sees the other.
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while !news() {
                    guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if let Some(epoch) = self.enter() {
                seen = epoch;
                // SAFETY: between `enter` and `leave` the caller does not touch the job.
                if let Some(job) = unsafe { *self.job.get() } {
                    self.claim(job);
                }
                self.leave();
            }
        }
    }

    /// Counts this worker in, unless the job is closed already.
    fn enter(&self) -> Option<u64> {
        let mut state = self.state.load(Ordering::SeqCst);
        while state & OPEN != 0 {
            match self.state.compare_exchange_weak(state, state + 1, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Some(state >> EPOCH_SHIFT),
                Err(now) => state = now,
            }
        }
        None
    }

    fn leave(&self) {
        let before = self.state.fetch_sub(1, Ordering::SeqCst);
        if before & COUNT == 1 && before & OPEN == 0 && self.caller_waits.load(Ordering::SeqCst) {
            let _guard = lock(&self.done);
            self.left.notify_all();
        }
    }

    /// Runs tasks until none is left.
    fn claim(&self, job: Job) {
        INSIDE.set(true);
        // SAFETY: the caller keeps the closure alive until `close` has returned,
        // which it does only after this thread has left.
        let body = unsafe { &*job.body };
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                break;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(task))) {
                lock(&self.panic).get_or_insert(panic);
            }
        }
        INSIDE.set(false);
    }
}

/// Runs all tasks here, with the same promise about panics.
fn serially(tasks: usize, body: &(dyn Fn(usize) + Sync)) {
    let mut first = None;
    for task in 0..tasks {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(task))) {
            first.get_or_insert(panic);
        }
    }
    if let Some(panic) = first {
        resume_unwind(panic);
    }
}

/// Looks at a condition for [`SPIN`]; whether it came true.
fn spin_until(condition: impl Fn() -> bool) -> bool {
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

/// Forgets how long the closure lives; `run` outlives every use.
fn erase<'a>(body: &'a (dyn Fn(usize) + Sync + 'a)) -> *const (dyn Fn(usize) + Sync) {
    // SAFETY: only the lifetime changes, and `run` returns after the last use.
    unsafe { std::mem::transmute::<&'a (dyn Fn(usize) + Sync + 'a), &'static (dyn Fn(usize) + Sync)>(body) }
}

/// A lock that a panic elsewhere does not poison: the guarded data are whole at every point.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pool: &Pool, tasks: usize) -> Vec<usize> {
        let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 5] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 3, 17, 1000] {
                assert!(counts(&pool, tasks).iter().all(|&n| n == 1));
            }
            // Many short jobs in a row, and one after the workers have gone to sleep.
            for _ in 0..2000 {
                assert_eq!(counts(&pool, 4), [1; 4]);
            }
            std::thread::sleep(SPIN * 10);
            assert_eq!(counts(&pool, 8), [1; 8]);
        }
    }

    #[test]
    fn panics_reach_the_caller_after_the_other_tasks() {
        for threads in [1, 3] {
            let pool = Pool::new(threads).unwrap();
            let done = AtomicUsize::new(0);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(20, &|i| {
                    assert!(i != 7, "task seven");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }));
            let payload = result.unwrap_err();
            assert_eq!(*payload.downcast_ref::<&str>().unwrap(), "task seven");
            assert_eq!(done.into_inner(), 19);
            assert_eq!(counts(&pool, 5), [1; 5]);
        }
    }

    #[test]
    fn nested_and_concurrent_calls_complete() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    for _ in 0..50 {
                        pool.run(4, &|_| {
                            pool.run(5, &|_| {
                                sum.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 50 * 4 * 5);
    }

    #[test]
    fn slow_tasks_are_waited_for() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..3 {
            let done = AtomicUsize::new(0);
            pool.run(2, &|_| {
                std::thread::sleep(Duration::from_millis(2));
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 2);
        }
    }
}
