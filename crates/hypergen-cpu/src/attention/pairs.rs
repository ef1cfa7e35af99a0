//! Attention by AVX-512's bfloat16 dot products: the loops of [`super::vector`]
//! with two values in a word. Weights are rounded to bfloat16 for the second
//! product; sums are float32.

use std::arch::x86_64::*;

use half::bf16;

use super::vector::{Job, Packed, Product, block, each_block};
use super::{AttentionShape, Heads};
use crate::Cpu;
use crate::simd::Simd;
use crate::simd::avx512::Avx512;
use crate::split::Shared;

/// Two bfloat16 in a word.
struct Pairs;

impl Product for Pairs {
    type S = Avx512<true>;
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn word(values: [f32; 2]) -> f32 {
        let [low, high] = values.map(|x| u32::from(bf16::from_f32(x).to_bits()));
        f32::from_bits(low | (high << 16))
    }
    #[inline(always)]
    unsafe fn step(a: f32, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the set is there by the contract; every bit pattern is 32 bfloat16.
        unsafe {
            let a = std::mem::transmute::<__m512, __m512bh>(_mm512_set1_ps(a));
            _mm512_dpbf16_ps(c, a, std::mem::transmute::<__m512, __m512bh>(b))
        }
    }
    #[inline(always)]
    unsafe fn exp2(x: __m512) -> __m512 {
        // SAFETY: the set is there, by the contract.
        unsafe { crate::simd::math::exp2_bf16::<Self::S>(Self::S::max(Self::S::splat(-126.0), x)) }
    }
    #[inline(always)]
    unsafe fn words(values: [__m512; 2]) -> __m512 {
        // SAFETY: the set is there, by the contract.
        unsafe {
            let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(values[1], values[0]));
            // The first vector's sixteen are the lower half: bring pairs together.
            let order = _mm512_mask_blend_epi16(
                0xaaaa_aaaa,
                _mm512_cvtepu16_epi32(_mm256_setr_epi16(
                    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                )),
                _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_setr_epi16(
                    16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                ))),
            );
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))
        }
    }
}

/// Attention over bfloat16 with AVX-512's dot products, which the machine of
/// `cpu` must have.
pub(super) fn attention(
    cpu: &Cpu,
    s: &AttentionShape,
    q: Heads<'_, bf16>,
    k: Heads<'_, bf16>,
    v: Heads<'_, bf16>,
    out: &mut [bf16],
) {
    let packed = Packed::new::<Pairs, bf16>(cpu, s, k, v);
    let out = Shared::new(out);
    let job = Job { shape: s, q, packed: &packed, out: &out };
    each_block(cpu, s, 16, |b, h, first| {
        // SAFETY: the caller saw that the machine has the set, and each block is called once.
        unsafe { one(&job, [b, h, first]) };
    });
}

/// # Safety
/// As for [`block`].
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn one(job: &Job<'_, bf16>, at: [usize; 3]) {
    // SAFETY: by the contract.
    unsafe { block::<Pairs, bf16, 8>(job, at) }
}
