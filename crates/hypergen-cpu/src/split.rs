//! Sharing a mutable slice among the tasks of one parallel call. Every kernel
//! that writes from several threads goes through here, so that the reasoning
//! about overlap is in one place.

use std::marker::PhantomData;

use crate::Cpu;

/// A mutable slice of which several threads hold disjoint parts.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out parts only under the promise that they do not overlap,
// and a part of `T: Send` may be used from any thread.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Takes the slice over for as long as the tasks run.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The `len` elements from `start` on.
    ///
    /// # Safety
    /// No two parts that are alive at the same time may overlap.
    ///
    /// # Panics
    /// When the part does not lie inside the slice.
    #[allow(clippy::mut_from_ref, reason = "the contract is what the lint asks about")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part outside its slice");
        // SAFETY: inside the slice as just checked; alone by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// Calls `body(i, part)` for consecutive parts of `chunk` elements (the last
/// may be shorter), spread over the threads.
pub(crate) fn parallel_chunks<T: Send>(
    cpu: &Cpu,
    slice: &mut [T],
    chunk: usize,
    body: impl Fn(usize, &mut [T]) + Sync,
) {
    let len = slice.len();
    let shared = Shared::new(slice);
    cpu.parallel(len.div_ceil(chunk), |i| {
        // SAFETY: each task is called once, and takes its own part.
        body(i, unsafe { shared.part(i * chunk, chunk.min(len - i * chunk)) });
    });
}

/// Elements that one task takes of an operation that treats all alike: enough
/// to be worth a thread, and some four tasks a thread so that a slow one does
/// not hold up the rest. Must not decide about the order of any sum.
pub(crate) fn elements_per_task(cpu: &Cpu, elements: usize) -> usize {
    const LEAST: usize = 1 << 14;
    elements.div_ceil(4 * cpu.threads()).next_multiple_of(64).max(LEAST)
}
