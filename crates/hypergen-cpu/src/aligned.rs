//! A vector whose first element lies on a cache line: tile loads that straddle
//! cache lines run at a third of the speed. It is not a growing vector: the
//! length is fixed when it is made. Many of them may lie side by side in one
//! [`Arena`].

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Element;

/// A cache line, and the width of an AVX-512 register.
const LINE: usize = 64;
/// A huge page. Buffers of several of them ask the kernel for such pages:
/// weights that are streamed once a pass otherwise miss the TLB all the time.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// A heap buffer of fixed length, aligned to 64 bytes.
pub struct AlignedVec<T: Element> {
    /// Start of the elements; dangling, but aligned, when there are none.
    start: NonNull<T>,
    len: usize,
    /// What the elements lie in; `None` when there are none.
    _block: Option<Arc<Block>>,
    owns: PhantomData<T>,
}

// SAFETY: the elements belong to this alone and are plain numbers.
unsafe impl<T: Element> Send for AlignedVec<T> {}
// SAFETY: shared access only reads plain numbers.
unsafe impl<T: Element> Sync for AlignedVec<T> {}

impl<T: Element> AlignedVec<T> {
    /// A buffer of `len` zeros. Large buffers take memory page by page as they
    /// are first written, so that several threads may share that work.
    pub fn zeroed(len: usize) -> Self {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer's size fits the address space");
        Arena::new(bytes).take(len)
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

/// Memory that many buffers are cut from. Buffers of their own have no huge
/// page unless they are larger than one, and small pages where they end; in an
/// arena all of them lie in huge pages, and memory fresh from the system
/// arrives in a third of the time. The memory is freed when the arena and all
/// buffers from it are gone.
pub struct Arena {
    /// `None` where there are no bytes.
    block: Option<Arc<Block>>,
    bytes: usize,
    used: usize,
}

impl Arena {
    /// Zeroed memory of this size; buffers of any length take whole cache lines of it.
    pub fn new(bytes: usize) -> Self {
        Self { block: (bytes > 0).then(|| Arc::new(Block::zeroed(bytes))), bytes, used: 0 }
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The next `len` elements: zeros, or, after [`Arena::reuse`], whatever
    /// numbers were left there.
    ///
    /// # Panics
    /// When there is not enough left.
    pub fn take<T: Element>(&mut self, len: usize) -> AlignedVec<T> {
        let bytes = len.checked_mul(size_of::<T>()).expect("a buffer's size fits the address space");
        assert!(bytes <= self.bytes - self.used, "an arena has less than {bytes} bytes left");
        let Some(block) = self.block.as_ref().filter(|_| bytes > 0) else {
            let start = NonNull::<CacheLine>::dangling().cast();
            return AlignedVec { start, len, _block: None, owns: PhantomData };
        };
        // SAFETY: `used + bytes` is at most the size of the block.
        let start = unsafe { block.start.add(self.used) }.cast();
        self.used = self.bytes.min((self.used + bytes).next_multiple_of(LINE));
        AlignedVec { start, len, _block: Some(Arc::clone(block)), owns: PhantomData }
    }

    /// Makes all of it free to be taken again, once all buffers from it are
    /// gone; `false` while there is one.
    pub fn reuse(&mut self) -> bool {
        let free = self.block.as_mut().is_none_or(|block| Arc::get_mut(block).is_some());
        if free {
            self.used = 0;
        }
        free
    }
}

/// One allocation.
struct Block {
    /// On a cache line or, where it is that large, on a huge page.
    start: NonNull<u8>,
    allocated: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns memory and never touches it; who may is for the buffers to say.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// `bytes` zeros, at least one.
    fn zeroed(bytes: usize) -> Self {
        assert!(bytes > 0, "an allocation of nothing");
        // Allocators clear memory of unusual alignment by writing to all of it;
        // with the usual alignment fresh pages arrive zeroed. So the block is
        // made a little larger and the start is moved to the boundary.
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        let layout = bytes
            .checked_add(align)
            .and_then(|size| Layout::from_size_align(size, align_of::<f32>()).ok())
            .expect("a buffer's size fits the address space");
        // SAFETY: the layout's size is not zero.
        let Some(allocated) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        let skip = allocated.as_ptr().align_offset(align);
        assert!(skip <= align, "a byte pointer can be aligned");
        // SAFETY: `skip` is at most `align`, by which the block is larger than `bytes`.
        let start = unsafe { allocated.add(skip) };
        if align == HUGE_PAGE {
            advise_huge_pages(start, bytes);
        }
        Self { start, allocated, layout }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated by `zeroed` with this very layout, and freed once,
        // after the last buffer in it.
        unsafe { dealloc(self.allocated.as_ptr(), self.layout) };
    }
}

/// Gives `NonNull::dangling` the alignment that the buffer promises.
#[repr(align(64))]
struct CacheLine;

/// Asks for huge pages. It is a hint: without it all works, only slower.
#[cfg(all(target_os = "linux", not(miri)))]
fn advise_huge_pages(start: NonNull<u8>, bytes: usize) {
    let whole = bytes / HUGE_PAGE * HUGE_PAGE;
    // SAFETY: the range lies inside a block that was just allocated, and the
    // advice changes no contents.
    unsafe { libc::madvise(start.as_ptr().cast(), whole, libc::MADV_HUGEPAGE) };
}

#[cfg(any(not(target_os = "linux"), miri))]
fn advise_huge_pages(_start: NonNull<u8>, _bytes: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_zeroed_and_writable() {
        for len in [0, 1, 15, 64, 1000, if cfg!(miri) { 1 << 19 } else { 3 << 20 }] {
            let mut v = AlignedVec::<f32>::zeroed(len);
            assert_eq!(v.as_slice().as_ptr() as usize % LINE, 0);
            assert_eq!(v.as_slice().len(), len);
            assert!(v.as_slice().iter().all(|&x| x == 0.0));
            v.as_mut_slice().fill(1.0);
            assert!(v.as_slice().iter().all(|&x| x == 1.0));
        }
        assert_eq!(AlignedVec::<half::bf16>::zeroed(33).as_slice().as_ptr() as usize % LINE, 0);
    }

    #[test]
    fn buffers_of_an_arena_are_apart_and_outlive_it() {
        let mut arena = Arena::new(64 + 128 + 4);
        let mut a = arena.take::<half::bf16>(3);
        let mut b = arena.take::<f32>(20);
        let none = arena.take::<f32>(0);
        let mut c = arena.take::<f32>(1);
        a.as_mut_slice().fill(half::bf16::from_f32(1.0));
        b.as_mut_slice().fill(2.0);
        c.as_mut_slice().fill(3.0);
        assert!(!arena.reuse(), "its buffers are there");
        drop(arena);
        assert_eq!(a.as_slice(), [half::bf16::from_f32(1.0); 3]);
        assert_eq!(b.as_slice(), [2.0; 20]);
        assert_eq!((none.as_slice().len(), c.as_slice()), (0, &[3.0][..]));
        for start in [b.as_slice().as_ptr(), c.as_slice().as_ptr()] {
            assert_eq!(start as usize % LINE, 0);
        }
    }

    #[test]
    fn an_arena_without_buffers_serves_again() {
        let mut arena = Arena::new(256);
        let first = arena.take::<f32>(64);
        let place = first.as_slice().as_ptr();
        assert!(!arena.reuse());
        drop(first);
        assert!(arena.reuse());
        assert_eq!(arena.take::<f32>(10).as_slice().as_ptr(), place);
        assert!(Arena::new(0).reuse());
    }

    #[test]
    #[should_panic(expected = "less than 8 bytes left")]
    fn an_arena_gives_no_more_than_it_has() {
        let mut arena = Arena::new(68);
        let _first = arena.take::<f32>(1);
        let _second = arena.take::<f32>(2);
    }
}
