//! Which operation of which shape takes how long. Off, it costs one relaxed
//! load an operation; on, `hypergen bench --profile` shows its table, which is
//! where every change to a kernel starts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is recorded of all calls of one operation with one shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileEntry {
    /// The operation's name in `ops`.
    pub operation: &'static str,
    /// Its sizes, outermost first, in the operation's own order.
    pub sizes: Vec<usize>,
    /// Calls.
    pub calls: u64,
    /// Time of all calls together, from start to end.
    pub time: Duration,
    /// Floating-point operations of all calls together; 0 where none are counted.
    pub flop: u64,
}

/// Calls, time and operations by name and sizes.
type Entries = BTreeMap<(&'static str, Vec<usize>), (u64, Duration, u64)>;

/// A device's record.
#[derive(Default)]
pub(crate) struct Profile {
    on: AtomicBool,
    /// Floating-point operations of all products so far, recorded or not.
    flop: AtomicU64,
    entries: Mutex<Entries>,
}

/// One call that is running; recorded when dropped.
pub(crate) struct Span<'a> {
    profile: &'a Profile,
    /// `None` while nothing is recorded.
    started: Option<(Instant, &'static str, Vec<usize>, u64)>,
}

impl Profile {
    /// Starts an operation of `flop` floating-point operations.
    pub(crate) fn span(&self, operation: &'static str, sizes: &[usize], flop: u64) -> Span<'_> {
        self.flop.fetch_add(flop, Ordering::Relaxed);
        let on = self.on.load(Ordering::Relaxed);
        let started = on.then(|| (Instant::now(), operation, sizes.to_vec(), flop));
        Span { profile: self, started }
    }

    pub(crate) fn flop(&self) -> u64 {
        self.flop.load(Ordering::Relaxed)
    }

    /// Starts recording from nothing, or stops it.
    pub(crate) fn record(&self, on: bool) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.on.store(on, Ordering::Relaxed);
    }

    /// What has been recorded, the longest first.
    pub(crate) fn entries(&self) -> Vec<ProfileEntry> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<_> = entries
            .iter()
            .map(|((operation, sizes), &(calls, time, flop))| ProfileEntry {
                operation,
                sizes: sizes.clone(),
                calls,
                time,
                flop,
            })
            .collect();
        list.sort_by_key(|e| std::cmp::Reverse(e.time));
        list
    }
}

impl Drop for Span<'_> {
    fn drop(&mut self) {
        let Some((started, operation, sizes, flop)) = self.started.take() else { return };
        let time = started.elapsed();
        let mut entries = self.profile.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.entry((operation, sizes)).or_default();
        entry.0 += 1;
        entry.1 += time;
        entry.2 += flop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_one_shape_add_up_and_nothing_is_kept_while_off() {
        let profile = Profile::default();
        drop(profile.span("linear", &[1, 2], 10));
        assert_eq!((profile.flop(), profile.entries()), (10, vec![]));
        profile.record(true);
        drop(profile.span("linear", &[1, 2], 10));
        drop(profile.span("linear", &[1, 2], 10));
        drop(profile.span("linear", &[2, 2], 20));
        let mut entries = profile.entries();
        entries.sort_by(|a, b| a.sizes.cmp(&b.sizes));
        let seen: Vec<_> = entries.iter().map(|e| (e.sizes.as_slice(), e.calls, e.flop)).collect();
        assert_eq!(seen, [(&[1, 2][..], 2, 20), (&[2, 2][..], 1, 20)]);
        profile.record(true);
        assert_eq!(profile.entries(), [], "recording starts from nothing");
    }
}
