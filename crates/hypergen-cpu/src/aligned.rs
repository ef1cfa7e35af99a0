//! A vector whose first element lies on a cache line: tile loads that straddle
//! cache lines run at a third of the speed. It is not a growing vector: the
//! length is fixed when it is made.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ptr::NonNull;

use crate::Element;

/// A cache line, and the width of an AVX-512 register.
const LINE: usize = 64;
/// A huge page. Buffers of several of them ask the kernel for such pages:
/// weights that are streamed once a pass otherwise miss the TLB all the time.
const HUGE_PAGE: usize = 2 << 20;

/// A heap buffer of fixed length, aligned to 64 bytes and zeroed when made.
pub struct AlignedVec<T: Element> {
    /// Start of the elements; dangling, but aligned, when there are none.
    start: NonNull<T>,
    len: usize,
    /// What was allocated, and how; `None` when there are no elements.
    block: Option<(NonNull<u8>, Layout)>,
    owns: PhantomData<T>,
}

// SAFETY: the buffer is owned alone and holds plain numbers.
unsafe impl<T: Element> Send for AlignedVec<T> {}
// SAFETY: shared access only reads plain numbers.
unsafe impl<T: Element> Sync for AlignedVec<T> {}

impl<T: Element> AlignedVec<T> {
    /// A buffer of `len` zeros. Large buffers take memory page by page as they
    /// are first written, so that several threads may share that work.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer's size fits the address space");
        if bytes == 0 {
            let start = NonNull::<CacheLine>::dangling().cast();
            return Self { start, len, block: None, owns: PhantomData };
        }
        // Allocators clear memory of unusual alignment by writing to all of it;
        // with the usual alignment fresh pages arrive zeroed. So the block is
        // made a little larger and the start is moved to the boundary.
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        let layout = Layout::from_size_align(bytes + align, align_of::<T>())
            .expect("a buffer's size fits the address space");
        // SAFETY: the layout's size is not zero.
        let Some(block) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        let skip = block.as_ptr().align_offset(align);
        assert!(skip <= align, "a byte pointer can be aligned");
        // SAFETY: `skip` is at most `align`, by which the block is larger than `bytes`.
        let start = unsafe { block.add(skip) };
        if align == HUGE_PAGE {
            advise_huge_pages(start, bytes);
        }
        Self { start: start.cast(), len, block: Some((block, layout)), owns: PhantomData }
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `start` is aligned and points to `len` initialised elements that this owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The elements, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and the access is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Element> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        if let Some((block, layout)) = self.block {
            // SAFETY: allocated by `zeroed` with this very layout, and freed once.
            unsafe { dealloc(block.as_ptr(), layout) };
        }
    }
}

/// Gives `NonNull::dangling` the alignment that the buffer promises.
#[repr(align(64))]
struct CacheLine;

/// Asks for huge pages. It is a hint: without it all works, only slower.
#[cfg(target_os = "linux")]
fn advise_huge_pages(start: NonNull<u8>, bytes: usize) {
    let whole = bytes / HUGE_PAGE * HUGE_PAGE;
    // SAFETY: the range lies inside a block that was just allocated, and the
    // advice changes no contents.
    unsafe { libc::madvise(start.as_ptr().cast(), whole, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_start: NonNull<u8>, _bytes: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zeroed_and_writable() {
        for len in [0, 1, 15, 64, 1000, 3 << 20] {
            let mut v = AlignedVec::<f32>::zeroed(len);
            assert_eq!(v.as_slice().as_ptr() as usize % LINE, 0);
            assert_eq!(v.as_slice().len(), len);
            assert!(v.as_slice().iter().all(|&x| x == 0.0));
            v.as_mut_slice().fill(1.0);
            assert!(v.as_slice().iter().all(|&x| x == 1.0));
        }
        assert_eq!(AlignedVec::<half::bf16>::zeroed(33).as_slice().as_ptr() as usize % LINE, 0);
    }
}
