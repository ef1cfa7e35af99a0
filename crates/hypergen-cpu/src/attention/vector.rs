//! Attention by vectors with one lane for each query: the products are
//! written once, over a [`Product`] that says what a multiply-add step is.
//! Here that is float32, of any instruction set; bfloat16 elements are widened
//! while they are packed.
//!
//! Both products are the same loop: `c[row][query] += a(row, k) * b[k][query]`,
//! `a` a scalar that is broadcast and `b` a panel of vectors. For the scores a
//! row is a key and `k` runs over the head's width; for the output a row is
//! one of the head's columns and `k` runs over the keys.

use std::marker::PhantomData;

use super::{AttentionShape, Heads, output};
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, run};
use crate::split::{Shared, parallel_chunks};
use crate::{Cpu, Element, Isa};

/// Keys whose scores are held at a time. The order of the sums depends on it,
/// so it is the same for every shape.
const KEYS: usize = 128;
/// Packed keys and columns of values come in multiples of this, with zeros
/// behind the last, so that no product has a remainder.
const PAD: usize = 8;

/// How two packed operands are multiplied and added.
pub(super) trait Product: 'static {
    /// The vectors that it works on.
    type S: Simd;
    /// Values that one packed 32-bit word holds: 1 float32 or 2 bfloat16.
    const PER_WORD: usize;

    /// Packs up to [`Self::PER_WORD`] values to a word, zeros behind them.
    fn word(values: [f32; 2]) -> f32;

    /// `c + a * b`, summed over the values of a word; `a` is the same word for
    /// all lanes.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn step(a: f32, b: V<Self>, c: V<Self>) -> V<Self>;

    /// `2^x` for `x <= 0`, to the precision that the words keep; anything for
    /// results below 2^-120.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn exp2(x: V<Self>) -> V<Self>;

    /// Packs [`Self::PER_WORD`] vectors to one of words.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn words(values: [V<Self>; 2]) -> V<Self>;
}

type V<P> = <<P as Product>::S as Simd>::V;

/// Float32 products.
pub(super) struct Single<S>(PhantomData<S>);

impl<S: Simd> Product for Single<S> {
    type S = S;
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn word(values: [f32; 2]) -> f32 {
        values[0]
    }
    #[inline(always)]
    unsafe fn step(a: f32, b: S::V, c: S::V) -> S::V {
        // SAFETY: the set is there, by the contract.
        unsafe { S::mul_add(S::splat(a), b, c) }
    }
    #[inline(always)]
    unsafe fn exp2(x: S::V) -> S::V {
        // Minimax on -1/2 to 1/2, relative error 2e-9.
        const C: [f32; 7] = [
            1.0,
            std::f32::consts::LN_2,
            0.240_226_46,
            0.055_503_287,
            0.009_618_489,
            0.001_339_993_1,
            1.534_581_3e-4,
        ];
        // SAFETY: the set is there, by the contract.
        unsafe {
            // The bound comes first so that a NaN passes through.
            let x = S::max(S::splat(-150.0), x);
            let n = S::round(x);
            let r = S::sub(x, n);
            let mut p = S::splat(C[6]);
            for c in C[..6].iter().rev() {
                p = S::mul_add(p, r, S::splat(*c));
            }
            S::scale_by_pow2(p, n)
        }
    }
    #[inline(always)]
    unsafe fn words(values: [S::V; 2]) -> S::V {
        values[0]
    }
}

/// Keys and values of one attention, packed to words.
pub(super) struct Packed {
    /// For each picture and head: keys `[keys, key_words]`, then values
    /// `[keys / per_word, value_words]`.
    words: Scratch,
    sizes: Sizes,
}

/// Sizes of packed keys and values.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Words of a key.
    key_words: usize,
    /// Words of a row of values: columns, padded.
    value_words: usize,
    /// Words of a head's keys.
    keys: usize,
    /// Words of a head's keys and values.
    head: usize,
}

/// One attention, ready to be computed.
pub(super) struct Job<'a, T> {
    pub(super) shape: &'a AttentionShape,
    pub(super) q: Heads<'a, T>,
    pub(super) packed: &'a Packed,
    pub(super) out: &'a Shared<'a, T>,
}

impl Sizes {
    fn new(s: &AttentionShape, per_word: usize) -> Self {
        let len = s.kv_len.next_multiple_of(PAD);
        let key_words = s.head_dim.div_ceil(per_word);
        let value_words = s.head_dim.next_multiple_of(PAD);
        let keys = len * key_words;
        Self { key_words, value_words, keys, head: keys + len / per_word * value_words }
    }

    /// Words of scratch memory of a block of so many queries: packed queries,
    /// output, scores, maxima and sums.
    fn room(&self, lanes: usize) -> usize {
        (self.key_words + self.value_words + KEYS + 2) * lanes
    }
}

impl Packed {
    /// Packs keys and values of all heads, on all threads.
    pub(super) fn new<P: Product, T: Element>(
        cpu: &Cpu,
        s: &AttentionShape,
        k: Heads<'_, T>,
        v: Heads<'_, T>,
    ) -> Self {
        let sizes = Sizes::new(s, P::PER_WORD);
        let Sizes { key_words, value_words, keys, head } = sizes;
        let mut words = Scratch::take(s.batch * s.heads * head);
        parallel_chunks(cpu, words.as_mut_slice(), head, |i, words| {
            let (b, h) = (i / s.heads, i % s.heads);
            let (keys, values) = words.split_at_mut(keys);
            for (j, words) in keys.chunks_exact_mut(key_words).enumerate() {
                if j < s.kv_len {
                    let key = k.token(s, b * s.kv_len + j, h);
                    for (word, values) in words.iter_mut().zip(key.chunks(P::PER_WORD)) {
                        *word = P::word([values[0].to_f32(), values.get(1).map_or(0.0, |x| x.to_f32())]);
                    }
                } else {
                    words.fill(0.0);
                }
            }
            for (j, words) in values.chunks_exact_mut(value_words).enumerate() {
                let row = |j: usize| (j < s.kv_len).then(|| v.token(s, b * s.kv_len + j, h));
                let (first, second) = (row(j * P::PER_WORD), row(j * P::PER_WORD + 1));
                for (d, word) in words.iter_mut().enumerate() {
                    let at = |row: Option<&[T]>| row.and_then(|row| row.get(d)).map_or(0.0, |x| x.to_f32());
                    *word = P::word([at(first), at(second)]);
                }
            }
        });
        Self { words, sizes }
    }
}

/// Float32 attention, of either element type.
pub(super) fn attention<T: Element>(
    cpu: &Cpu,
    s: &AttentionShape,
    q: Heads<'_, T>,
    k: Heads<'_, T>,
    v: Heads<'_, T>,
    out: &mut [T],
) {
    // Which vectors a word is later used with does not matter to the packing.
    let packed = Packed::new::<Single<crate::simd::portable::Portable>, T>(cpu, s, k, v);
    let (out, isa) = (Shared::new(out), cpu.isa());
    let lanes = if isa >= Isa::Avx512 { 16 } else { 8 };
    let job = Job { shape: s, q, packed: &packed, out: &out };
    each_block(cpu, s, lanes, |b, h, first| run(isa, Block { job: &job, isa, at: [b, h, first] }));
}

/// Vectors of queries in a block of the widest kernel.
const WIDE: usize = 3;

/// Calls `body(picture, head, first query)` for every block of queries.
pub(super) fn each_block(
    cpu: &Cpu,
    s: &AttentionShape,
    lanes: usize,
    body: impl Fn(usize, usize, usize) + Sync,
) {
    let blocks = blocks(s, lanes);
    cpu.parallel(s.batch * s.heads * blocks, |i| {
        let [b, h, first] = block_at(s, lanes, i);
        body(b, h, first);
    });
}

/// Blocks of queries of a head.
fn blocks(s: &AttentionShape, lanes: usize) -> usize {
    s.q_len.div_ceil(WIDE * lanes)
}

/// Picture, head and first query of a block.
fn block_at(s: &AttentionShape, lanes: usize, i: usize) -> [usize; 3] {
    let (head, block) = (i / blocks(s, lanes), i % blocks(s, lanes));
    [head / s.heads, head % s.heads, block * WIDE * lanes]
}

/// The queries of one task, from `at[2]` on.
struct Block<'a, T> {
    job: &'a Job<'a, T>,
    isa: Isa,
    at: [usize; 3],
}

impl<T: Element> Kernel for Block<'_, T> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the set is there, by the contract; tasks have queries of their own.
        unsafe {
            // Rows of a product's tile such that it fits the registers: 8 x 3
            // of 32, 4 x 3 of 16, and for plain Rust, whose vector takes two
            // of 16, 2 x 3.
            match self.isa {
                Isa::Portable => block::<Single<S>, T, 2>(self.job, self.at),
                Isa::Avx2 => block::<Single<S>, T, 4>(self.job, self.at),
                _ => block::<Single<S>, T, 8>(self.job, self.at),
            }
        }
    }
}

/// Computes the up to [`WIDE`] vectors of queries from `first` on, with `ROWS`
/// rows in a tile.
///
/// # Safety
/// The machine has the instruction set, and no other thread works on the same
/// queries of the same head.
#[inline(always)]
pub(super) unsafe fn block<P: Product, T: Element, const ROWS: usize>(job: &Job<'_, T>, at: [usize; 3]) {
    // SAFETY: by the contract.
    unsafe {
        match (job.shape.q_len - at[2]).div_ceil(P::S::LANES) {
            1 => queries::<P, T, ROWS, 1>(job, at),
            2 => queries::<P, T, ROWS, 2>(job, at),
            _ => queries::<P, T, ROWS, WIDE>(job, at),
        }
    }
}

/// Computes `N` vectors of queries.
///
/// # Safety
/// As for [`block`].
#[inline(always)]
unsafe fn queries<P: Product, T: Element, const ROWS: usize, const N: usize>(
    job: &Job<'_, T>,
    [b, h, first]: [usize; 3],
) {
    let (s, packed) = (job.shape, job.packed);
    let lanes = N * P::S::LANES;
    let last = (first + lanes).min(s.q_len) - 1;
    let Sizes { key_words, value_words, keys, head } = packed.sizes;
    let words = &packed.words.as_slice()[(b * s.heads + h) * head..][..head];
    let (keys, values) = words.split_at(keys);

    let mut scratch = Scratch::take(packed.sizes.room(lanes));
    let (panel, rest) = scratch.as_mut_slice().split_at_mut(key_words * lanes);
    let (acc, rest) = rest.split_at_mut(value_words * lanes);
    let (scores, rest) = rest.split_at_mut(KEYS * lanes);
    let (max, sum) = rest.split_at_mut(lanes);
    let scale = pack_queries::<P, T>(job, [b, h, first], panel);
    acc.fill(0.0);
    max.fill(f32::NEG_INFINITY);
    sum.fill(0.0);

    let visible = s.visible(last);
    for start in (0..visible).step_by(KEYS) {
        let len = KEYS.min(visible - start);
        let padded = len.next_multiple_of(PAD);
        // SAFETY: `scores` has KEYS rows of `lanes`, `panel` key_words, `acc`
        // value_words; keys and values are padded to PAD, which ROWS divides.
        unsafe {
            for j in (0..padded).step_by(ROWS) {
                let a = keys[(start + j) * key_words..].as_ptr();
                let c = scores[j * lanes..].as_mut_ptr();
                tile::<P, ROWS, N, false>(a, key_words, 1, panel.as_ptr(), key_words, c);
            }
            if s.causal && start + len > first + 1 {
                hide_future(scores, lanes, start, len, first);
            }
            let rescale = softmax::<P, N>(scores, [len, padded], scale, max, sum);
            for (v, factor) in rescale.into_iter().enumerate() {
                if let Some(factor) = factor {
                    for row in acc.chunks_exact_mut(lanes) {
                        let at = row[v * P::S::LANES..].as_mut_ptr();
                        P::S::store_f32(at, P::S::mul(P::S::load_f32(at), factor));
                    }
                }
            }
            for d in (0..value_words).step_by(ROWS) {
                let a = values[start / P::PER_WORD * value_words + d..].as_ptr();
                let c = acc[d * lanes..].as_mut_ptr();
                tile::<P, ROWS, N, true>(a, 1, value_words, scores.as_ptr(), padded / P::PER_WORD, c);
            }
        }
    }
    for (lane, i) in (first..=last).enumerate() {
        let inverse = 1.0 / sum[lane];
        // SAFETY: no other task has this query.
        let out = unsafe { output(job.out, s, b, i, h) };
        for (d, out) in out.iter_mut().enumerate() {
            *out = T::from_f32(acc[d * lanes + lane] * inverse);
        }
    }
}

/// The queries from `first` on, as words `[key_words, lanes]`, and the factor
/// that turns scores into powers of two. Lanes behind the last query are zeros.
#[inline(always)]
fn pack_queries<P: Product, T: Element>(
    job: &Job<'_, T>,
    [b, h, first]: [usize; 3],
    panel: &mut [f32],
) -> f32 {
    let s = job.shape;
    let lanes = panel.len() / job.packed.sizes.key_words;
    let scale = s.scale * std::f32::consts::LOG2_E;
    // In float32 the queries take the whole factor. In bfloat16 that would
    // round them once more, so they take only its sign (or that it is zero).
    let (factor, rest) = if P::PER_WORD == 1 {
        (scale, 1.0)
    } else if scale == 0.0 {
        (0.0, 1.0)
    } else {
        (scale.signum(), scale.abs())
    };
    for lane in 0..lanes {
        if first + lane < s.q_len {
            let query = job.q.token(s, b * s.q_len + first + lane, h);
            for (k, values) in query.chunks(P::PER_WORD).enumerate() {
                let second = values.get(1).map_or(0.0, |x| x.to_f32() * factor);
                panel[k * lanes + lane] = P::word([values[0].to_f32() * factor, second]);
            }
        } else {
            panel[lane..].iter_mut().step_by(lanes).for_each(|word| *word = 0.0);
        }
    }
    rest
}

/// `c[ROWS, N vectors] (+)= sum over k of a(row, k) * b[k, N vectors]`, where
/// `a(row, k)` is the word at `row * row_step + k * step`.
///
/// # Safety
/// The machine has the instruction set, and the operands are as large as the
/// sizes say.
#[inline(always)]
unsafe fn tile<P: Product, const ROWS: usize, const N: usize, const ADD: bool>(
    a: *const f32,
    row_step: usize,
    step: usize,
    b: *const f32,
    len: usize,
    c: *mut f32,
) {
    // SAFETY: by the contract.
    unsafe {
        let mut acc = [[P::S::splat(0.0); N]; ROWS];
        for k in 0..len {
            let mut panel = [P::S::splat(0.0); N];
            for (v, panel) in panel.iter_mut().enumerate() {
                *panel = P::S::load_f32(b.add((k * N + v) * P::S::LANES));
            }
            for (row, acc) in acc.iter_mut().enumerate() {
                let word = *a.add(row * row_step + k * step);
                for (acc, panel) in acc.iter_mut().zip(panel) {
                    *acc = P::step(word, panel, *acc);
                }
            }
        }
        for (row, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate() {
                let at = c.add((row * N + v) * P::S::LANES);
                P::S::store_f32(at, if ADD { P::S::add(P::S::load_f32(at), acc) } else { acc });
            }
        }
    }
}

/// Sets the scores of keys that come after their query to minus infinity.
#[inline(always)]
fn hide_future(scores: &mut [f32], lanes: usize, start: usize, len: usize, first: usize) {
    for (j, row) in scores.chunks_exact_mut(lanes).take(len).enumerate() {
        let hidden = (start + j).saturating_sub(first).min(lanes);
        row[..hidden].fill(f32::NEG_INFINITY);
    }
}

/// Turns a block of scores `[len, lanes]` into packed weights
/// `[padded / PER_WORD, lanes]`, in place, and brings `max` and `sum` up to
/// date. Gives for each vector the factor by which what was summed under the
/// old maximum shrinks, unless it is 1 in all lanes.
///
/// # Safety
/// The machine has the instruction set, and the slices have these sizes.
#[inline(always)]
unsafe fn softmax<P: Product, const N: usize>(
    scores: &mut [f32],
    [len, padded]: [usize; 2],
    scale: f32,
    max: &mut [f32],
    sum: &mut [f32],
) -> [Option<V<P>>; N] {
    let lanes = N * P::S::LANES;
    let mut rescale = [None; N];
    // SAFETY: by the contract.
    unsafe {
        let scale = P::S::splat(scale);
        for (v, rescale) in rescale.iter_mut().enumerate() {
            let at = v * P::S::LANES;
            let scores = scores[at..].as_mut_ptr();
            let score = |j: usize| P::S::load_f32(scores.add(j * lanes));
            let mut top = score(0);
            for j in 1..len {
                top = P::S::max(score(j), top);
            }
            let old = P::S::load_f32(max[at..].as_ptr());
            let new = P::S::max(P::S::mul(top, scale), old);
            let lowered = P::S::sub(P::S::splat(0.0), new);
            let factor = P::exp2(P::S::sub(old, new));
            let mut sums = [P::S::mul(P::S::load_f32(sum[at..].as_ptr()), factor), P::S::splat(0.0)];
            let mut j = 0;
            while j < padded {
                let mut weights = [P::S::splat(0.0); 2];
                for i in 0..P::PER_WORD {
                    if j + i < len {
                        weights[i] = P::exp2(P::S::mul_add(score(j + i), scale, lowered));
                        // By the key's number, not by the iteration's: the same for both packings.
                        sums[(j + i) % 2] = P::S::add(sums[(j + i) % 2], weights[i]);
                    }
                }
                // Words never overtake the scores that are still to be read.
                P::S::store_f32(scores.add(j / P::PER_WORD * lanes), P::words(weights));
                j += P::PER_WORD;
            }
            P::S::store_f32(max[at..].as_mut_ptr(), new);
            P::S::store_f32(sum[at..].as_mut_ptr(), P::S::add(sums[0], sums[1]));
            // 1 - factor is exact where it could be missed: just below 1.
            let shrinks = P::S::reduce_max(P::S::sub(P::S::splat(1.0), factor)) > 0.0;
            *rescale = shrinks.then_some(factor);
        }
    }
    rescale
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Every query of every head is in one block, and no tile of a product
        /// reads or writes outside of what is packed.
        #[test]
        fn blocks_cover_the_queries_and_stay_in_their_memory(
            batch in 1..=3_usize, heads in 1..=20_usize, head_dim in 1..=600_usize,
            q_len in prop_oneof![1..=200_usize, 1..=4096_usize], kv_len in prop_oneof![1..=200_usize, 1..=4096_usize],
            per_word in 1..=2_usize, lanes in prop::sample::select(vec![8_usize, 16]),
            rows in prop::sample::select(vec![2_usize, 4, 8]),
        ) {
            let s = AttentionShape { batch, heads, head_dim, q_len, kv_len, scale: 1.0, causal: false };
            let mut next = vec![0; batch * heads];
            for i in 0..batch * heads * blocks(&s, lanes) {
                let [b, h, first] = block_at(&s, lanes, i);
                prop_assert!(next[b * heads + h] == first && first < q_len);
                next[b * heads + h] = q_len.min(first + WIDE * lanes);
            }
            prop_assert!(next.iter().all(|&queries| queries == q_len));

            let sizes = Sizes::new(&s, per_word);
            for start in (0..kv_len).step_by(KEYS) {
                let padded = KEYS.min(kv_len - start).next_multiple_of(PAD);
                prop_assert!(padded.is_multiple_of(rows) && padded <= KEYS && sizes.value_words.is_multiple_of(rows));
                prop_assert!((start + padded) * sizes.key_words <= sizes.keys);
                let values = (start / per_word + padded / per_word) * sizes.value_words;
                prop_assert!(values <= sizes.head - sizes.keys);
            }
            prop_assert!(sizes.room(WIDE * lanes) >= (sizes.key_words + sizes.value_words + KEYS) * WIDE * lanes);
        }
    }
}
