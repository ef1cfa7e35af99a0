//! The thread pool under loom: its very file, with loom's locks, atomics and
//! threads in place of the system's, in every order of events that the memory
//! model allows. A lost wake-up is a deadlock there, and a job that is read
//! while it is written a failure.

#[path = "../src/pool.rs"]
mod pool;

mod sync {
    //! Loom's parts, under the names of `src/sync.rs`.

    use std::cell::Cell;

    pub(crate) use loom::cell::UnsafeCell;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub(crate) use loom::thread::{Builder, JoinHandle};
    pub(crate) use std::sync::PoisonError;

    loom::thread_local! {
        static INSIDE: Cell<bool> = Cell::new(false);
    }

    pub(crate) fn is_inside() -> bool {
        INSIDE.with(Cell::get)
    }

    pub(crate) fn set_inside(inside: bool) {
        INSIDE.with(|cell| cell.set(inside));
    }

    /// Time does not pass in a model, so whoever does not see it at once sleeps.
    pub(crate) fn spin_until(condition: impl Fn() -> bool) -> bool {
        condition()
    }
}

use std::panic::{AssertUnwindSafe, catch_unwind};
// Counts that nothing waits for: each would multiply the orders to be tried.
use std::sync::atomic::{AtomicUsize, Ordering};

use pool::Pool;

/// Runs a test in every order in which a thread is interrupted, at any point,
/// up to `interruptions` times.
fn model(interruptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(interruptions);
    model.check(test);
}

/// Asserts that each task is run once.
fn run(pool: &Pool, tasks: usize) {
    assert!(pool.threads() > 1, "a model of several threads");
    let counts: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
    pool.run(tasks, &|i| {
        counts[i].fetch_add(1, Ordering::Relaxed);
    });
    assert!(counts.into_iter().all(|count| count.into_inner() == 1), "each task runs once");
}

#[test]
fn a_pool_without_jobs_ends() {
    model(4, || drop(Pool::new(3).expect("threads")));
}

#[test]
fn every_task_runs_once() {
    model(4, || run(&Pool::new(2).expect("threads"), 2));
    model(3, || run(&Pool::new(2).expect("threads"), 5));
    model(2, || run(&Pool::new(3).expect("threads"), 2));
}

/// A worker may still be on its way into a job, or asleep, when the next one opens.
#[test]
fn one_job_follows_another() {
    model(3, || {
        let pool = Pool::new(2).expect("threads");
        run(&pool, 2);
        run(&pool, 2);
    });
}

#[test]
fn panics_reach_the_caller_and_leave_the_pool_whole() {
    model(2, || {
        let pool = Pool::new(2).expect("threads");
        let done = AtomicUsize::new(0);
        // Not `panic!`: the hook would write a message for each order.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            pool.run(3, &|i| {
                if i == 1 {
                    std::panic::resume_unwind(Box::new("one"));
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let payload = outcome.expect_err("a panic");
        assert_eq!(payload.downcast_ref::<&str>(), Some(&"one"));
        assert_eq!(done.into_inner(), 2, "the others end first");
        run(&pool, 2);
    });
}

#[test]
fn calls_from_inside_a_task_complete() {
    model(2, || {
        let pool = Pool::new(2).expect("threads");
        let count = AtomicUsize::new(0);
        pool.run(2, &|_| {
            pool.run(2, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(count.into_inner(), 4);
    });
}

#[test]
fn callers_do_not_disturb_one_another() {
    model(2, || {
        let pool = loom::sync::Arc::new(Pool::new(2).expect("threads"));
        let other = {
            let pool = loom::sync::Arc::clone(&pool);
            loom::thread::spawn(move || run(&pool, 2))
        };
        run(&pool, 2);
        other.join().expect("the other caller");
    });
}
