//! The matrix product's registers in AVX2: twelve accumulators of the sixteen.

use super::blocks::Block;
use super::vector::Registers;
use crate::Element;
use crate::simd::avx2::Avx2;

impl Registers for Avx2 {
    const ROWS: usize = 6;
}

/// Computes a block.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run<T: Element, R: super::Rows<T>>(block: &Block<'_, T, R>, scratch: &mut [f32]) {
    // SAFETY: by this function's contract.
    unsafe { block.run::<Avx2>(scratch) }
}
