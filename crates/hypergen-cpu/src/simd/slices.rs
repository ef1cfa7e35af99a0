//! Vectors read from and written to slices, with the length looked at: what
//! kernels use that are bound by memory and can afford it.

use super::Simd;
use crate::Element;

/// The first `LANES` elements of `x`; of a shorter slice all, followed by
/// zeros.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd, T: Element>(x: &[T]) -> S::V {
    // SAFETY: the set is there by the contract, and the slice is as long as is read.
    unsafe { if x.len() >= S::LANES { S::load(x.as_ptr()) } else { S::load_part(x.as_ptr(), x.len()) } }
}

/// Writes the first `LANES` elements of `x`, or all of a shorter slice.
///
/// # Safety
/// The machine has the instruction set of `S`.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd, T: Element>(x: &mut [T], v: S::V) {
    // SAFETY: the set is there by the contract, and the slice is as long as is written.
    unsafe {
        if x.len() >= S::LANES {
            S::store(x.as_mut_ptr(), v);
        } else {
            S::store_part(x.as_mut_ptr(), v, x.len());
        }
    }
}
