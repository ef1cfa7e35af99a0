//! The thread pool behind [`Cpu::parallel`](crate::Cpu::parallel).
//!
//! A small model launches thousands of kernels of some 20 microseconds each,
//! so what counts is the time from the call to the first task on every
//! thread. A general work-stealing pool is not needed and this is not one:
//! one job at a time, tasks claimed from a counter, no queues, no futures.
//!
//! Workers that have just finished spin for a while and then sleep until
//! they are woken, so an idle pool uses no processor time. The caller never
//! waits for a worker that has not yet woken up: it closes the job when no
//! task is left, and only workers that had entered by then are waited for.
//!
//! Twice a thread writes one word and then looks at another while its partner
//! does the same the other way round (a job against a sleeper, the last worker
//! against a caller that sleeps): a fence between the two steps makes sure that
//! one of them sees the other. `tests/pool_model.rs` runs this very file in
//! every order of events that the memory model allows.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use crate::sync::{
    Arc, AtomicBool, AtomicU64, AtomicUsize, Builder, Condvar, JoinHandle, Mutex, MutexGuard, Ordering,
    PoisonError, UnsafeCell, fence, is_inside, set_inside, spin_until,
};

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
            let worker = Builder::new().name(format!("hypergen-cpu-{i}")).spawn(move || shared.work())?;
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
        if tasks < 2 || self.workers.is_empty() || is_inside() {
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
        self.job.with_mut(|job| unsafe { *job = Some(Job { body: erase(body), tasks }) });
        let epoch = (self.state.load(Ordering::Relaxed) >> EPOCH_SHIFT).wrapping_add(1);
        self.state.store((epoch << EPOCH_SHIFT) | OPEN, Ordering::Release);
        fence(Ordering::SeqCst);
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
        fence(Ordering::SeqCst);
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
                fence(Ordering::SeqCst);
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
                if let Some(job) = self.job.with(|job| unsafe { *job }) {
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
        if before & COUNT == 1 && before & OPEN == 0 {
            fence(Ordering::SeqCst);
            if self.caller_waits.load(Ordering::SeqCst) {
                let _guard = lock(&self.done);
                self.left.notify_all();
            }
        }
    }

    /// Runs tasks until none is left.
    fn claim(&self, job: Job) {
        set_inside(true);
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
        set_inside(false);
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

/// Forgets how long the closure lives; `run` outlives every use.
fn erase<'a>(body: &'a (dyn Fn(usize) + Sync + 'a)) -> *const (dyn Fn(usize) + Sync) {
    // SAFETY: only the lifetime changes, and `run` returns after the last use.
    unsafe { std::mem::transmute::<&'a (dyn Fn(usize) + Sync + 'a), &'static (dyn Fn(usize) + Sync)>(body) }
}

/// A lock that a panic elsewhere does not poison: the guarded data are whole at every point.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
