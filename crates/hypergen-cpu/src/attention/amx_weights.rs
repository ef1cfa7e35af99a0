//! The softmax of [`super::amx`] on AVX-512: from scores in float32 to
//! weights in bfloat16, both on their way between tiles.
//!
//! A weight `2^x` needs seven bits of mantissa only. So `x` is rounded to a
//! multiple of 2^-8 and becomes an integer whose upper byte is already the
//! exponent; a table of 128 bytes turns the lower one, the fraction, into the
//! mantissa. Two vectors of scores are one vector of weights after the
//! conversion, which halves what is left to do, and where `x` leaves the range
//! of bfloat16 the conversion saturates. The error has a root mean square of
//! 0.18 %, where rounding to bfloat16 alone has 0.16 %.

use std::arch::x86_64::*;

use super::amx::{KEYS, QUERIES};
use super::amx_tiles::TILE;
use super::pack512::key_of_word;
use crate::gemm::amx::Between;

/// Steps of `x` to a power of two: one more bit than bfloat16's mantissa has.
const STEPS: f32 = 256.0;
/// The exponent of 1, in steps.
const ONE: f32 = 127.0 * STEPS;
/// A weight, in steps, from which on a query's shift is raised: far enough from
/// the end of float32 for thousands of items and large values.
const LIMIT: u16 = (127 + 60) * 256;

/// For each even fraction `i`, in 256ths, the mantissa of `2^(i / 256)`; the
/// highest bit says whether that of `i + 1` is one more.
static MANTISSAS: [u8; 128] = mantissas();

const fn mantissas() -> [u8; 128] {
    // 2^(1/256), by the series of the exponential; the power is its product
    // with itself, exact enough for eight bits by far.
    let x = std::f64::consts::LN_2 / 256.0;
    let root = 1.0 + x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0)));
    let mut table = [0; 128];
    let (mut i, mut power) = (0, 1.0);
    while i < 128 {
        let even = ((power - 1.0) * 128.0 + 0.5) as u8;
        let odd = ((power * root - 1.0) * 128.0 + 0.5) as u8;
        table[i] = even | (odd - even) << 7;
        power *= root * root;
        i += 1;
    }
    table
}

/// Packed places of the keys below a number, as bits.
static PLACES: [u32; 33] = places();

const fn places() -> [u32; 33] {
    let mut masks = [0; 33];
    let mut keys = 0;
    while keys <= 32 {
        let mut word = 0;
        while word < 32 {
            if key_of_word(word) < keys {
                masks[keys] |= 1 << word;
            }
            word += 1;
        }
        keys += 1;
    }
    masks
}

/// Which keys of an item are there and may be seen.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// The first key.
    pub(super) start: usize,
    /// Keys.
    pub(super) len: usize,
    /// The number of the first query, where later keys are not to be seen.
    pub(super) hidden: Option<usize>,
}

impl Limits {
    /// Keys that a query sees.
    #[inline(always)]
    fn seen(&self, row: usize) -> usize {
        match self.hidden {
            None => self.len,
            Some(first) => self.len.min((first + row + 1).saturating_sub(self.start)),
        }
    }
}

/// The scores of an item, on their way to weights.
///
/// Its unsafe functions ask that the machine has AVX-512 with BW and VBMI, and
/// that scores and weights are as large as said.
pub(super) struct Block {
    /// `[groups][2 halves of keys][2 halves of queries]` tiles; tiles replace
    /// them while they are read, hence the pointer.
    pub(super) scores: *const f32,
    /// `[groups][2 halves of queries]` tiles of 16 queries by 32 keys.
    pub(super) weights: *mut f32,
    pub(super) limits: Limits,
    /// From scores to powers of two; positive.
    pub(super) scale: f32,
}

/// Whether a weight is so large that its query's shift has to be raised.
///
/// # Safety
/// The machine has AVX-512 with BW.
#[inline(always)]
pub(super) unsafe fn too_large(top: __m512i) -> bool {
    // SAFETY: by the contract.
    unsafe { _mm512_cmpgt_epu16_mask(top, _mm512_set1_epi16(LIMIT.cast_signed())) != 0 }
}

impl Block {
    /// The summand that brings the largest score that a query sees to a weight
    /// between a half and 1, in steps. It stands for a whole number of powers of
    /// two, so that changing it scales exactly.
    ///
    /// # Safety
    /// The machine has AVX-512.
    #[inline(always)]
    pub(super) unsafe fn shift(&self, row: usize) -> f32 {
        let seen = self.limits.seen(row);
        // SAFETY: by the contract; a row of a tile has 64 bytes.
        unsafe {
            let mut top = _mm512_set1_ps(f32::NEG_INFINITY);
            for (i, first) in (0..KEYS).step_by(16).enumerate() {
                let lanes = seen.saturating_sub(first).min(16);
                let scores = _mm512_loadu_ps(self.scores.add(i * 2 * TILE + row * 16));
                top = _mm512_mask_max_ps(top, ((1_u32 << lanes) - 1) as __mmask16, scores, top);
            }
            ONE - (_mm512_reduce_max_ps(top) * self.scale).ceil() * STEPS
        }
    }

    /// The weights of all queries where nothing is hidden; `each` rows of 32
    /// keys for a piece.
    #[inline(always)]
    pub(super) fn all(&self, shift: &[f32], each: usize) -> All {
        let groups = self.limits.len.div_ceil(32);
        assert!(shift.len() >= QUERIES);
        All {
            scores: self.scores,
            shift: shift.as_ptr(),
            weights: self.weights,
            scale: self.scale * STEPS,
            done: 0,
            all: groups * QUERIES,
            each,
            top: [0; 32],
        }
    }

    /// The weights of all queries where each sees keys of its own number, and
    /// the largest of each place.
    ///
    /// # Safety
    /// The machine has AVX-512 with BW and VBMI.
    #[inline(always)]
    pub(super) unsafe fn seen(&self, shift: &[f32]) -> __m512i {
        // SAFETY: by the contract.
        unsafe {
            let mut top = _mm512_setzero_si512();
            for (row, &shift) in shift.iter().enumerate() {
                top = _mm512_max_epu16(top, self.weigh(row, shift));
            }
            top
        }
    }

    /// The weights of a query, and the largest of each place.
    ///
    /// # Safety
    /// The machine has AVX-512 with BW and VBMI.
    #[inline(always)]
    unsafe fn weigh(&self, row: usize, shift: f32) -> __m512i {
        let seen = self.limits.seen(row);
        // SAFETY: by the contract; rows of tiles have 64 bytes.
        unsafe {
            let table = Table::new(self.scale * STEPS);
            let mut top = _mm512_setzero_si512();
            for group in 0..self.limits.len.div_ceil(32) {
                let from = self.scores.add(group * 4 * TILE + row * 16);
                let (x, weight) = table.weights(from, _mm512_set1_ps(shift));
                let places = PLACES[seen.saturating_sub(group * 32).min(32)];
                top = _mm512_max_epu16(top, _mm512_maskz_mov_epi16(places, x));
                let to = self.weights.add(group * 2 * TILE + row * 16);
                _mm512_storeu_si512(to.cast(), _mm512_maskz_mov_epi16(places, weight));
            }
            top
        }
    }

    /// Raises the shifts of queries whose weights are too large, scales what
    /// there is of their output, and computes their weights anew. The other
    /// queries are left alone.
    ///
    /// # Safety
    /// The machine has AVX-512 with BW and VBMI.
    #[cold]
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi")]
    pub(super) unsafe fn raise(&self, shift: &mut [f32], mut o: Option<&mut [f32]>) {
        for (row, shift) in shift.iter_mut().enumerate() {
            // SAFETY: by the contract, and the slices are those of an item.
            unsafe {
                if !too_large(self.weigh(row, *shift)) {
                    continue;
                }
                let new = self.shift(row).min(*shift);
                let factor = ((new - *shift) / STEPS).exp2();
                *shift = new;
                self.weigh(row, new);
                if let Some(o) = o.as_deref_mut() {
                    for tile in o.chunks_exact_mut(TILE).skip(row / 16).step_by(2) {
                        tile[row % 16 * 16..][..16].iter_mut().for_each(|o| *o *= factor);
                    }
                }
            }
        }
    }
}

/// What turns scores into weights, in registers.
struct Table {
    scale: __m512,
    low: __m512i,
    high: __m512i,
    fraction: __m512i,
    one: __m512i,
}

impl Table {
    /// # Safety
    /// The machine has AVX-512.
    #[inline(always)]
    unsafe fn new(scale: f32) -> Self {
        // SAFETY: by the contract; the table has 128 bytes.
        unsafe {
            Self {
                scale: _mm512_set1_ps(scale),
                low: _mm512_loadu_si512(MANTISSAS.as_ptr().cast()),
                high: _mm512_loadu_si512(MANTISSAS.as_ptr().add(64).cast()),
                fraction: _mm512_set1_epi16(0x7f),
                one: _mm512_set1_epi16(1),
            }
        }
    }

    /// The weights of 32 keys, and the integers that they were made of: from
    /// 16 scores, and 16 scores two tiles further on.
    ///
    /// # Safety
    /// The machine has AVX-512 with BW and VBMI, and the scores are readable.
    #[inline(always)]
    unsafe fn weights(&self, scores: *const f32, shift: __m512) -> (__m512i, __m512i) {
        // SAFETY: by the contract.
        unsafe {
            let a = _mm512_fmadd_ps(_mm512_loadu_ps(scores), self.scale, shift);
            let b = _mm512_fmadd_ps(_mm512_loadu_ps(scores.add(2 * TILE)), self.scale, shift);
            let x = _mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            let even = _mm512_srli_epi16::<1>(x);
            let mantissa = _mm512_permutex2var_epi8(self.low, even, self.high);
            // Mantissa where its seven bits are, exponent elsewhere.
            let weight = _mm512_ternarylogic_epi32::<0xd8>(even, mantissa, self.fraction);
            // One more if the fraction is odd and the table says so.
            let more = _mm512_srli_epi16::<7>(mantissa);
            let more = _mm512_ternarylogic_epi32::<0x80>(x, more, self.one);
            (x, _mm512_add_epi16(weight, more))
        }
    }
}

/// All queries against all keys of an item, group after group.
pub(super) struct All {
    scores: *const f32,
    shift: *const f32,
    weights: *mut f32,
    scale: f32,
    /// Rows done and rows in all, 32 in each group.
    done: usize,
    all: usize,
    each: usize,
    top: [u16; 32],
}

impl All {
    /// The largest weight of each place, once all is done.
    ///
    /// # Safety
    /// The machine has AVX-512.
    #[inline(always)]
    pub(super) unsafe fn top(&self) -> __m512i {
        debug_assert!(self.is_done(), "all weights were computed");
        // SAFETY: by the contract; the array has 64 bytes.
        unsafe { _mm512_loadu_si512(self.top.as_ptr().cast()) }
    }

    /// Computes some more rows.
    ///
    /// # Safety
    /// The machine has AVX-512 with BW and VBMI; scores and weights are there.
    #[inline(always)]
    pub(super) unsafe fn some(&mut self, count: usize) {
        // SAFETY: by the contract; no more rows than there are.
        unsafe {
            let table = Table::new(self.scale);
            let mut top = _mm512_loadu_si512(self.top.as_ptr().cast());
            let end = self.all.min(self.done + count);
            for i in self.done..end {
                let (group, row) = (i / QUERIES, i % QUERIES);
                let shift = _mm512_set1_ps(*self.shift.add(row));
                let (x, weight) = table.weights(self.scores.add(group * 4 * TILE + row * 16), shift);
                top = _mm512_max_epu16(top, x);
                _mm512_storeu_si512(self.weights.add(i * 16).cast(), weight);
            }
            self.done = end;
            _mm512_storeu_si512(self.top.as_mut_ptr().cast(), top);
        }
    }
}

impl Between for All {
    #[inline(always)]
    fn is_done(&self) -> bool {
        self.done == self.all
    }
    #[inline(always)]
    unsafe fn advance(&mut self) {
        // SAFETY: by the contract.
        unsafe { self.some(self.each) }
    }
}
