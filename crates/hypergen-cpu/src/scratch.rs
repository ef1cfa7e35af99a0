//! Working memory of kernels: one buffer a thread, kept from call to call, so
//! that the steps of a request allocate nothing.

use std::cell::Cell;

use crate::AlignedVec;

thread_local! {
    static BUFFER: Cell<Option<AlignedVec<f32>>> = const { Cell::new(None) };
}

/// Calls `body` with at least `len` floats of working memory, aligned to 64
/// bytes, whose contents are whatever the last kernel left there.
pub(crate) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    BUFFER.with(|cell| {
        // Taken out while in use: a nested call makes a buffer of its own.
        let mut buffer = match cell.take() {
            Some(buffer) if buffer.as_slice().len() >= len => buffer,
            _ => AlignedVec::zeroed(len.next_multiple_of(1 << 14)),
        };
        let result = body(buffer.as_mut_slice());
        cell.set(Some(buffer));
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_use_gets_separate_memory() {
        with_scratch(10, |outer| {
            outer[..10].fill(1.0);
            with_scratch(20, |inner| inner[..20].fill(2.0));
            assert_eq!(outer[..10], [1.0; 10]);
        });
        with_scratch(100_000, |large| assert!(large.len() >= 100_000));
    }
}
