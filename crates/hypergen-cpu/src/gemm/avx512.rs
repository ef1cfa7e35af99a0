//! The matrix product's registers in AVX-512: 28 accumulators of the 32, and
//! `vdpbf16ps` where there is bfloat16.

use std::arch::x86_64::*;

use half::bf16;

use super::blocks::Block;
use super::vector::Registers;
use crate::Element;
use crate::simd::avx512::Avx512;

impl<const BF16: bool> Registers for Avx512<BF16> {
    const ROWS: usize = 14;
    const HAS_DOT: bool = BF16;

    #[inline(always)]
    unsafe fn dot(acc: __m512, a: *const bf16, b: *const bf16) -> __m512 {
        // SAFETY: the caller's contract; pairs are read whole, at any alignment.
        unsafe {
            let a = _mm512_set1_epi32(a.cast::<i32>().read_unaligned());
            let b = _mm512_loadu_si512(b.cast());
            // The same bits under the name that this intrinsic gives them.
            let pairs = |x| std::mem::transmute::<__m512i, __m512bh>(x);
            _mm512_dpbf16_ps(acc, pairs(a), pairs(b))
        }
    }
}

/// Computes a block in float32 arithmetic.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL and DQ.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn run<T: Element, R: super::Rows<T>>(block: &Block<'_, T, R>, scratch: &mut [f32]) {
    // SAFETY: by this function's contract.
    unsafe { block.run::<Avx512<false>>(scratch) }
}

/// Computes a block with dot products of bfloat16.
///
/// # Safety
/// The machine has AVX-512 F, BW, VL, DQ and BF16.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn run_bf16<T: Element, R: super::Rows<T>>(block: &Block<'_, T, R>, scratch: &mut [f32]) {
    // SAFETY: by this function's contract.
    unsafe { block.run::<Avx512<true>>(scratch) }
}
