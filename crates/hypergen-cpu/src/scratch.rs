//! Working memory of kernels, kept from call to call so that the steps of a
//! picture allocate nothing. Each thread keeps its own; nothing is shared.

use std::cell::RefCell;

use crate::AlignedVec;

/// Buffers above this are given back to the system rather than kept: they
/// belong to work (a decoder's attention) that comes once a picture.
const KEEP: usize = 16 << 20;
/// Buffers that a thread keeps at most.
const BUFFERS: usize = 4;

/// Floats of a huge page, which larger buffers take whole: a laid out picture
/// is walked in strides that would otherwise miss the TLB.
const HUGE_PAGE: usize = crate::aligned::HUGE_PAGE / size_of::<f32>();

thread_local! {
    static KEPT: RefCell<Vec<AlignedVec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of float32 on a cache line, given back when dropped.
pub(crate) struct Scratch {
    buffer: Option<AlignedVec<f32>>,
    len: usize,
}

impl Scratch {
    /// A buffer of `len` values, which may be any at all.
    pub(crate) fn take(len: usize) -> Self {
        let kept = KEPT.with_borrow_mut(|kept| {
            // The smallest that is large enough.
            let fit = kept
                .iter()
                .enumerate()
                .filter(|(_, b)| b.as_slice().len() >= len)
                .min_by_key(|(_, b)| b.as_slice().len());
            fit.map(|(i, _)| i).map(|i| kept.swap_remove(i))
        });
        // Powers of two, so that growing shapes do not leave a trail of buffers.
        let least = if len > HUGE_PAGE / 8 { HUGE_PAGE } else { 0 };
        let fresh =
            || AlignedVec::zeroed(if len * 4 > KEEP { len } else { len.next_power_of_two().max(least) });
        Self { buffer: Some(kept.unwrap_or_else(fresh)), len }
    }

    /// The values.
    pub(crate) fn as_slice(&self) -> &[f32] {
        self.buffer.as_ref().map_or(&[], |b| &b.as_slice()[..self.len])
    }

    /// The values, to be written.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        let len = self.len;
        self.buffer.as_mut().map_or(&mut [], |b| &mut b.as_mut_slice()[..len])
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        if buffer.as_slice().len() * 4 > KEEP {
            return;
        }
        // A thread that is ending has no store any more; then the buffer is freed.
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            kept.push(buffer);
            if kept.len() > BUFFERS {
                // The smallest is the cheapest to make again.
                let smallest = kept.iter().enumerate().min_by_key(|(_, b)| b.as_slice().len());
                if let Some((i, _)) = smallest {
                    kept.swap_remove(i);
                }
            }
        });
    }
}

/// Calls `body` with `len` floats of working memory, aligned to 64 bytes, whose
/// contents are whatever the last kernel left there.
pub(crate) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    body(Scratch::take(len).as_mut_slice())
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

    #[test]
    fn buffers_come_back_and_are_distinct() {
        let first = {
            let mut a = Scratch::take(1000);
            a.as_mut_slice().fill(1.0);
            a.as_slice().as_ptr()
        };
        let a = Scratch::take(900);
        assert_eq!((a.as_slice().as_ptr(), a.as_slice().len()), (first, 900));
        let b = Scratch::take(900);
        assert_ne!(a.as_slice().as_ptr(), b.as_slice().as_ptr());
        assert_eq!(b.as_slice().as_ptr() as usize % 64, 0);
    }

    #[test]
    fn only_a_few_are_kept() {
        let many: Vec<_> = (0..10).map(|i| Scratch::take(100 << i)).collect();
        drop(many);
        let kept = KEPT.with_borrow(Vec::len);
        assert!((1..=BUFFERS).contains(&kept));
    }
}
