//! How [`super::amx`] packs queries, keys and values into tiles, by AVX-512.
//! The tile product takes its left operand as rows of 32 values and its right
//! one as rows of 16 pairs, a pair being two values that are summed over:
//!
//! * queries are left operands of the scores: 16 queries by 32 columns, as they are;
//! * keys are right operands of the scores: 16 pairs of columns by 16 keys, so
//!   rows of pairs, transposed;
//! * values are right operands of the output: 16 pairs of keys by 16 columns.
//!
//! A column of ones stands behind the values' columns: the output's column at
//! that place is then the sum of the weights, as they were rounded.

use std::arch::x86_64::*;

use half::bf16;

use super::amx_plan::{Layout, TILE};
use super::amx_weights::Vectors;
use super::{AttentionShape, Heads};
use crate::Cpu;
use crate::split::Shared;

/// The lowest `n` bits; all from 32 on.
#[inline(always)]
pub(super) fn first_lanes(n: usize) -> __mmask32 {
    if n >= 32 { !0 } else { (1 << n) - 1 }
}

/// Packs keys and values of all heads, on all threads.
///
/// # Safety
/// The machine has the set of `V`.
pub(super) unsafe fn keys_and_values<V: Vectors>(
    cpu: &Cpu,
    s: &AttentionShape,
    layout: &Layout,
    k: Heads<'_, bf16>,
    v: Heads<'_, bf16>,
    packed: &mut [f32],
) {
    /// Groups of 32 keys that a task takes.
    const GROUPS: usize = 16;
    let groups = s.kv_len.div_ceil(32);
    let tasks = groups.div_ceil(GROUPS);
    let shared = Shared::new(packed);
    cpu.parallel(s.batch * s.heads * tasks, |i| {
        let (head, task) = (i / tasks, i % tasks);
        let (b, h) = (head / s.heads, head % s.heads);
        for group in task * GROUPS..groups.min((task + 1) * GROUPS) {
            let (keys, values) = (2 * layout.steps * TILE, layout.columns * TILE);
            let start = head * layout.head();
            // SAFETY: by the contract; every group of keys has tiles of its own.
            unsafe {
                V::pack_keys(s, &k, [b, h, group * 32], shared.part(start + group * keys, keys));
                let start = start + layout.keys + group * values;
                V::pack_values(s, &v, [b, h, group * 32], shared.part(start, values));
            }
        }
    });
}

/// Packs 32 keys. Keys beyond the last are its copies: they weigh as much as
/// it does, which is a finite number, and their values are zeros.
///
/// # Safety
/// The machine has AVX-512 F, BW and VL.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn pack_keys(
    s: &AttentionShape,
    k: &Heads<'_, bf16>,
    [b, h, first]: [usize; 3],
    to: &mut [f32],
) {
    for (i, tile) in to.chunks_exact_mut(TILE).enumerate() {
        let (step, half) = (i / 2, i % 2);
        let mut rows = [_mm512_setzero_si512(); 16];
        for (j, row) in rows.iter_mut().enumerate() {
            let key = (first + half * 16 + j).min(s.kv_len - 1);
            let values = &k.token(s, b * s.kv_len + key, h)[step * 32..];
            // SAFETY: the mask keeps the load inside the token.
            *row = unsafe { _mm512_maskz_loadu_epi16(first_lanes(values.len()), values.as_ptr().cast()) };
        }
        // SAFETY: a tile is 16 rows of 64 bytes.
        unsafe {
            transpose(&mut rows);
            store(&rows, tile);
        }
    }
}

/// Packs 32 values, in the order in which weights of their keys are packed.
///
/// # Safety
/// The machine has AVX-512 F, BW and VL.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn pack_values(
    s: &AttentionShape,
    v: &Heads<'_, bf16>,
    [b, h, first]: [usize; 3],
    to: &mut [f32],
) {
    for (column, tile) in to.chunks_exact_mut(TILE).enumerate() {
        // SAFETY: the mask keeps the load inside the token; a tile is 16 rows of 64 bytes.
        unsafe {
            let row = |word: usize| {
                let key = first + key_of_word(word);
                if key >= s.kv_len {
                    return _mm512_setzero_si512();
                }
                let start = s.head_dim.min(column * 16);
                let values = &v.token(s, b * s.kv_len + key, h)[start..];
                let mask = first_lanes(values.len()) as __mmask16;
                let words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values.as_ptr().cast()));
                // Where the values end, the one begins.
                let one = if s.head_dim / 16 == column { 1 << (s.head_dim % 16) } else { 0 };
                _mm512_mask_mov_epi32(words, one, _mm512_set1_epi32(i32::from(bf16::ONE.to_bits())))
            };
            let mut rows = [_mm512_setzero_si512(); 16];
            for (pair, words) in rows.iter_mut().enumerate() {
                let (low, high) = (row(2 * pair), row(2 * pair + 1));
                *words = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
            }
            store(&rows, tile);
        }
    }
}

/// The key, of 32, whose weight is at a place of a packed row: two vectors of
/// 16 scores become one of 32 weights by `vpackusdw`, which takes four of each
/// in turn.
pub(super) const fn key_of_word(word: usize) -> usize {
    let (quarter, place) = (word / 8, word % 8);
    place / 4 * 16 + quarter * 4 + place % 4
}

/// Packs 32 queries, `[2][steps]` tiles, times `sign`, which is 1, -1 or 0.
///
/// # Safety
/// The machine has AVX-512 F, BW and VL.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn queries(
    s: &AttentionShape,
    layout: &Layout,
    q: &Heads<'_, bf16>,
    [b, h, first]: [usize; 3],
    sign: f32,
    to: &mut [f32],
) {
    let flip = _mm512_set1_epi16(if sign < 0.0 { i16::MIN } else { 0 });
    for (i, tile) in to.chunks_exact_mut(TILE).enumerate() {
        let (half, step) = (i / layout.steps, i % layout.steps);
        let mut rows = [_mm512_setzero_si512(); 16];
        for (j, row) in rows.iter_mut().enumerate() {
            let query = first + half * 16 + j;
            if query < s.q_len && sign != 0.0 {
                let values = &q.token(s, b * s.q_len + query, h)[step * 32..];
                // SAFETY: the mask keeps the load inside the token.
                unsafe {
                    let values = _mm512_maskz_loadu_epi16(first_lanes(values.len()), values.as_ptr().cast());
                    *row = _mm512_xor_si512(values, flip);
                }
            }
        }
        // SAFETY: a tile is 16 rows of 64 bytes.
        unsafe { store(&rows, tile) };
    }
}

/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
unsafe fn store(rows: &[__m512i; 16], tile: &mut [f32]) {
    for (to, row) in tile.chunks_exact_mut(16).zip(rows) {
        // SAFETY: a chunk has 64 bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), *row) };
    }
}

/// Turns 16 rows of 16 words into columns.
///
/// # Safety
/// The machine has AVX-512 F.
#[inline(always)]
pub(super) unsafe fn transpose(rows: &mut [__m512i; 16]) {
    // SAFETY: by the contract.
    unsafe {
        let mut t = [_mm512_setzero_si512(); 16];
        // Pairs of rows, then groups of four, within each quarter of a vector.
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        for i in 0..4 {
            rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        // Quarter q of row 4 g + c now holds column 4 q + c of the group g of
        // four rows: exchange quarters between the groups.
        for c in 0..4 {
            let lo = _mm512_shuffle_i32x4::<0x44>(rows[c], rows[4 + c]);
            let hi = _mm512_shuffle_i32x4::<0xee>(rows[c], rows[4 + c]);
            let lo2 = _mm512_shuffle_i32x4::<0x44>(rows[8 + c], rows[12 + c]);
            let hi2 = _mm512_shuffle_i32x4::<0xee>(rows[8 + c], rows[12 + c]);
            t[c] = _mm512_shuffle_i32x4::<0x88>(lo, lo2);
            t[4 + c] = _mm512_shuffle_i32x4::<0xdd>(lo, lo2);
            t[8 + c] = _mm512_shuffle_i32x4::<0x88>(hi, hi2);
            t[12 + c] = _mm512_shuffle_i32x4::<0xdd>(hi, hi2);
        }
        *rows = t;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transpose_swaps_rows_and_columns() {
        if !crate::testing::sets().contains(&crate::Isa::Avx512) {
            return;
        }
        let mut rows = [[0_i32; 16]; 16];
        for (i, row) in rows.iter_mut().enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value = (100 * i + j) as i32;
            }
        }
        // SAFETY: the machine has AVX-512; the two types have the same size, and all bits are values.
        let columns: [[i32; 16]; 16] = unsafe {
            let mut rows = std::mem::transmute::<[[i32; 16]; 16], [__m512i; 16]>(rows);
            call(&mut rows);
            std::mem::transmute::<[__m512i; 16], [[i32; 16]; 16]>(rows)
        };
        for i in 0..16 {
            for j in 0..16 {
                assert_eq!(columns[j][i], rows[i][j]);
            }
        }
    }

    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn call(rows: &mut [__m512i; 16]) {
        // SAFETY: by the feature.
        unsafe { transpose(rows) }
    }
}
