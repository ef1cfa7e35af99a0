//! The pool with the threads of this machine. They stand apart from the pool
//! because the model test takes its file in.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::pool::Pool;
use crate::sync::SPIN;

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
        for _ in 0..if cfg!(miri) { 20 } else { 2000 } {
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
