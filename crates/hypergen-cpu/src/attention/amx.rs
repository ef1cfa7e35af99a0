//! Attention by AMX tiles in bfloat16, with AVX-512 for the softmax between
//! the two products. Machines without AMX never come here.
//!
//! For 32 queries and 128 keys at a time (an [`Item`]) there are three pieces
//! of work: scores `S = K Q^T` (tiles), weights `P = 2^(c S - m)` (vectors),
//! output `O += V^T P` (tiles). Tiles and vectors are different parts of the
//! processor, and the vectors are the busier one. So the loop runs three items
//! deep: while the weights of an item are computed, the scores of the next one
//! and the output of the one before are fed to the tiles between them, a few
//! instructions at a time, and out-of-order execution does the rest.
//!
//! There is no running maximum. The shift `m` of a query is the maximum of its
//! first 32 scores; float32 and bfloat16 have exponents to spare, so what
//! follows may be 2^60 times larger before anything overflows. Only if the
//! sum of a block says that it was, the shift is raised and the block is done
//! again. This saves a pass over the scores, and what a query gets still
//! depends on that query alone.

use std::arch::x86_64::*;

use half::bf16;

use super::amx_tiles::{self as tiles, Output, Scores, TILE};
use super::pack512::{self as pack, Layout};
use super::{AttentionShape, Heads, output};
use crate::Cpu;
use crate::scratch::Scratch;
use crate::split::Shared;

/// Queries of an item.
const QUERIES: usize = 32;
/// Keys of an item. The order of the sums depends on it, so it is the same for
/// every shape.
const KEYS: usize = 128;
/// A block's sum of weights from which on its shift is raised: far enough from
/// the end of float32 for thousands of blocks and large values.
const SUM_LIMIT: f32 = (1_u64 << 60) as f32;

/// One attention, ready to be computed.
struct Job<'a> {
    shape: &'a AttentionShape,
    layout: Layout,
    q: Heads<'a, bf16>,
    packed: &'a [f32],
    out: &'a Shared<'a, bf16>,
    /// Items of queries that one task takes, so that keys and values that were
    /// brought to the first cache serve all of them.
    units: usize,
}

/// Attention over bfloat16 with AMX, which the machine of `cpu` must have.
pub(super) fn attention(
    cpu: &Cpu,
    s: &AttentionShape,
    q: Heads<'_, bf16>,
    k: Heads<'_, bf16>,
    v: Heads<'_, bf16>,
    out: &mut [bf16],
) {
    let layout = Layout::new(s);
    let mut packed = Scratch::take(s.batch * s.heads * layout.head());
    // SAFETY: AMX comes with AVX-512.
    unsafe { pack::keys_and_values(cpu, s, &layout, k, v, packed.as_mut_slice()) };
    let units = units(cpu, s, &layout);
    let out = Shared::new(out);
    let job = Job { shape: s, layout, q, packed: packed.as_slice(), out: &out, units };
    let blocks = s.q_len.div_ceil(units * QUERIES);
    cpu.parallel(s.batch * s.heads * blocks, |i| {
        let (head, block) = (i / blocks, i % blocks);
        // SAFETY: the caller saw that the machine has AMX, and each block is called once.
        unsafe { queries(&job, head, block * units * QUERIES) };
    });
}

/// Items of queries for a task: four where keys and values of a head stay in
/// the second cache, eight where they come from beyond it, fewer where there
/// would not be work for all threads.
fn units(cpu: &Cpu, s: &AttentionShape, layout: &Layout) -> usize {
    const SECOND_CACHE: usize = 1 << 20;
    let most = if layout.head() * 4 > SECOND_CACHE { 8 } else { 4 };
    let all = s.q_len.div_ceil(QUERIES);
    let per_task = (s.batch * s.heads * all).div_ceil(4 * cpu.threads());
    most.min(per_task).min(all).max(1)
}

/// What a task keeps for each of its items of queries, and between its steps.
struct Work<'a> {
    /// Queries, packed: `[units][2][steps]` tiles.
    q: &'a mut [f32],
    /// Output so far: `[units][columns][2]` tiles of 16 columns by 16 queries.
    o: &'a mut [f32],
    /// Shifts, `[units][32]`, in powers of two.
    shift: &'a mut [f32],
    /// Sums of weights, `[units][32]`.
    sum: &'a mut [f32],
    /// Scores of two items: `[8][2]` tiles of 16 keys by 16 queries.
    scores: [&'a mut [f32]; 2],
    /// Weights of two items: `[4][2]` tiles of 16 pairs of keys by 16 queries.
    weights: [&'a mut [f32]; 2],
}

/// Some 32 queries against some 128 keys.
#[derive(Clone, Copy)]
struct Item {
    /// Which of the task's 32 queries.
    unit: usize,
    /// The first key.
    start: usize,
    /// Keys.
    len: usize,
}

/// Computes the queries of one task.
///
/// # Safety
/// The machine has AMX, and no other thread works on these queries.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn queries(job: &Job<'_>, head: usize, first: usize) {
    let (s, layout) = (job.shape, &job.layout);
    let (b, h) = (head / s.heads, head % s.heads);
    let last = (first + job.units * QUERIES).min(s.q_len) - 1;
    let units = (last + 1 - first).div_ceil(QUERIES);
    let (q_len, o_len) = (2 * layout.steps * TILE, 2 * layout.columns * TILE);

    let mut scratch = Scratch::take(units * (q_len + o_len + 2 * QUERIES) + 3 * KEYS * QUERIES);
    let rest = scratch.as_mut_slice();
    let (q, rest) = rest.split_at_mut(units * q_len);
    let (o, rest) = rest.split_at_mut(units * o_len);
    let (s0, rest) = rest.split_at_mut(KEYS * QUERIES);
    let (s1, rest) = rest.split_at_mut(KEYS * QUERIES);
    let (w0, rest) = rest.split_at_mut(KEYS * QUERIES / 2);
    let (w1, rest) = rest.split_at_mut(KEYS * QUERIES / 2);
    let (shift, sum) = rest.split_at_mut(units * QUERIES);
    sum.fill(0.0);
    let mut work = Work { q, o, shift, sum, scores: [s0, s1], weights: [w0, w1] };

    let scale = s.scale * std::f32::consts::LOG2_E;
    // Scaled queries would be rounded once more, so they take only the sign of
    // the factor (or that it is zero), and the softmax the rest.
    let (sign, scale) = if scale == 0.0 { (0.0, 1.0) } else { (scale.signum(), scale.abs()) };
    // SAFETY: by this function's contract; the buffers have the sizes of the layout.
    unsafe {
        for (u, q) in work.q.chunks_exact_mut(q_len).enumerate() {
            pack::queries(s, layout, &job.q, [b, h, first + u * QUERIES], sign, q);
        }
        let visible = s.visible(last);
        let items = visible.div_ceil(KEYS) * units;
        let item = |i: usize| {
            let start = i / units * KEYS;
            Item { unit: i % units, start, len: KEYS.min(visible - start) }
        };
        let packed = &job.packed[head * layout.head()..][..layout.head()];
        tiles::configure();
        drain(&mut work.score(layout, packed, item(0), 0));
        for i in 0..items {
            let now = item(i);
            let mut scores = (i + 1 < items).then(|| work.score(layout, packed, item(i + 1), i + 1));
            let mut output = (i > 0).then(|| work.output(layout, packed, item(i - 1), i - 1));
            let tasks = Tasks { scores: scores.as_mut(), output: output.as_mut() };
            let hidden = s.causal.then_some(first + now.unit * QUERIES);
            work.weigh(layout, now, i, scale, hidden, tasks);
        }
        let end = items - 1;
        drain(&mut work.output(layout, packed, item(end), end));
        tiles::release();
        for u in 0..units {
            let first = first + u * QUERIES;
            let o = &work.o[u * o_len..][..o_len];
            finish(job, [b, h, first], o, &work.sum[u * QUERIES..][..QUERIES]);
        }
    }
}

/// Work for the tiles that comes in pieces.
trait Pieces {
    /// Tile products that are left.
    fn left(&self) -> usize;
    /// Starts the next piece; nothing if there is none.
    ///
    /// # Safety
    /// The machine has AMX, the tiles are configured, and the operands are there.
    unsafe fn advance(&mut self);
}

impl Pieces for Scores {
    #[inline(always)]
    fn left(&self) -> usize {
        self.products_left()
    }
    #[inline(always)]
    unsafe fn advance(&mut self) {
        // SAFETY: by the contract.
        unsafe { Scores::advance(self) }
    }
}

impl Pieces for Output {
    #[inline(always)]
    fn left(&self) -> usize {
        self.products_left()
    }
    #[inline(always)]
    unsafe fn advance(&mut self) {
        // SAFETY: by the contract.
        unsafe { Output::advance(self) }
    }
}

/// # Safety
/// As for [`Pieces::advance`].
#[inline(always)]
unsafe fn drain(pieces: &mut impl Pieces) {
    while pieces.left() > 0 {
        // SAFETY: by the contract.
        unsafe { pieces.advance() };
    }
}

/// What the tiles do while weights are computed: first the scores, then the
/// output (both use all tiles, so they cannot be mixed).
struct Tasks<'a> {
    scores: Option<&'a mut Scores>,
    output: Option<&'a mut Output>,
}

impl Tasks<'_> {
    #[inline(always)]
    fn left(&self) -> usize {
        self.scores.as_ref().map_or(0, |s| s.left()) + self.output.as_ref().map_or(0, |o| o.left())
    }

    /// Starts pieces until no more than `target` products are left.
    ///
    /// # Safety
    /// As for [`Pieces::advance`].
    #[inline(always)]
    unsafe fn advance_to(&mut self, target: usize) {
        while self.left() > target {
            // SAFETY: by the contract.
            unsafe {
                match (&mut self.scores, &mut self.output) {
                    (Some(scores), _) if scores.left() > 0 => scores.advance(),
                    (_, Some(output)) => output.advance(),
                    _ => return,
                }
            }
        }
    }
}

impl Work<'_> {
    /// The scores of an item, into the buffer of its number.
    fn score(&mut self, layout: &Layout, packed: &[f32], item: Item, i: usize) -> Scores {
        let keys = &packed[item.start / 16 * layout.steps * TILE..layout.keys];
        let q = &self.q[item.unit * 2 * layout.steps * TILE..][..2 * layout.steps * TILE];
        Scores::new(keys, q, self.scores[i % 2], layout.steps, item.len.div_ceil(32))
    }

    /// The output of an item, from the weights in the buffer of its number.
    fn output(&mut self, layout: &Layout, packed: &[f32], item: Item, i: usize) -> Output {
        let values = &packed[layout.keys + item.start / 32 * layout.columns * TILE..];
        let o = &mut self.o[item.unit * 2 * layout.columns * TILE..][..2 * layout.columns * TILE];
        let steps = item.len.div_ceil(32);
        Output::new(values, self.weights[i % 2], o, layout.columns, steps, item.start == 0)
    }

    /// The weights of an item, and meanwhile what the tiles have to do.
    /// `hidden` is the number of the item's first query where later keys are
    /// not to be seen.
    ///
    /// # Safety
    /// The machine has AMX and AVX-512.
    #[inline(always)]
    unsafe fn weigh(
        &mut self,
        layout: &Layout,
        item: Item,
        i: usize,
        scale: f32,
        hidden: Option<usize>,
        mut tasks: Tasks<'_>,
    ) {
        let scores = &*self.scores[i % 2];
        let weights = &mut *self.weights[i % 2];
        let shift = &mut self.shift[item.unit * QUERIES..][..QUERIES];
        let sum = &mut self.sum[item.unit * QUERIES..][..QUERIES];
        // SAFETY: by the contract; the buffers have the sizes of an item.
        unsafe {
            let block =
                Block { scores, len: item.len, start: item.start, hidden, scale: _mm512_set1_ps(scale) };
            if item.start == 0 {
                for half in 0..2 {
                    let top = block.max(half, block.len.min(32));
                    _mm512_storeu_ps(shift[half * 16..].as_mut_ptr(), top);
                }
            }
            let shifts = [0, 1].map(|half| _mm512_loadu_ps(shift[half * 16..].as_ptr()));
            let (chunks, all) = (2 * item.len.div_ceil(32), tasks.left());
            let mut sums = [_mm512_setzero_ps(); 2];
            for chunk in 0..chunks {
                tasks.advance_to(all - all * (2 * chunk + 1) / (2 * chunks));
                sums[0] = _mm512_add_ps(sums[0], block.weigh(chunk, 0, shifts[0], weights));
                tasks.advance_to(all - all * (2 * chunk + 2) / (2 * chunks));
                sums[1] = _mm512_add_ps(sums[1], block.weigh(chunk, 1, shifts[1], weights));
            }
            tasks.advance_to(0);
            let limit = _mm512_set1_ps(SUM_LIMIT);
            let large = [0, 1].map(|half| _mm512_cmp_ps_mask::<_CMP_GT_OQ>(sums[half], limit));
            if large != [0, 0] {
                // The output of earlier blocks exists unless this is the first.
                let o = &mut self.o[item.unit * 2 * layout.columns * TILE..][..2 * layout.columns * TILE];
                let o = if item.start == 0 { None } else { Some(o) };
                sums = block.raise(large, shift, sum, o, weights);
            }
            for half in 0..2 {
                let at = sum[half * 16..].as_mut_ptr();
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), sums[half]));
            }
        }
    }
}

/// The scores of an item, on their way to weights. A half is 16 of its queries.
struct Block<'a> {
    scores: &'a [f32],
    start: usize,
    len: usize,
    hidden: Option<usize>,
    scale: __m512,
}

impl Block<'_> {
    /// The queries of a half that see the `j`th key.
    #[inline(always)]
    fn sees(&self, half: usize, j: usize) -> __mmask16 {
        if j >= self.len {
            return 0;
        }
        let Some(first) = self.hidden else { return !0 };
        let before = (self.start + j).saturating_sub(first + half * 16);
        if before >= 16 { 0 } else { !0 << before }
    }

    /// Whether all queries of a half see all of 16 keys.
    #[inline(always)]
    fn sees_all(&self, half: usize, chunk: usize) -> bool {
        let end = chunk * 16 + 16;
        end <= self.len && self.hidden.is_none_or(|first| self.start + end <= first + half * 16 + 1)
    }

    /// The largest of each query's first `len` scores, scaled.
    ///
    /// # Safety
    /// The machine has AVX-512.
    #[inline(always)]
    unsafe fn max(&self, half: usize, len: usize) -> __m512 {
        // SAFETY: by the contract, and a tile has 16 rows of 16.
        unsafe {
            let mut top = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
            for j in 0..len {
                let row = &self.scores[(j / 16 * 2 + half) * TILE + j % 16 * 16..][..16];
                let score = _mm512_loadu_ps(row.as_ptr());
                top[j % 2] = _mm512_mask_max_ps(top[j % 2], self.sees(half, j), score, top[j % 2]);
            }
            _mm512_mul_ps(_mm512_max_ps(top[0], top[1]), self.scale)
        }
    }

    /// The weights of 16 keys for 16 queries, and their sum for each query.
    ///
    /// # Safety
    /// The machine has AVX-512 with BF16.
    #[inline(always)]
    unsafe fn weigh(&self, chunk: usize, half: usize, shift: __m512, weights: &mut [f32]) -> __m512 {
        let from = &self.scores[(chunk * 2 + half) * TILE..][..TILE];
        let to = &mut weights[(chunk / 2 * 2 + half) * TILE + chunk % 2 * (TILE / 2)..][..TILE / 2];
        let all = self.sees_all(half, chunk);
        // SAFETY: by the contract, and the slices are as long as they say.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); 2];
            for pair in 0..8 {
                let mut two = [_mm512_setzero_ps(); 2];
                for (odd, weight) in two.iter_mut().enumerate() {
                    let score = _mm512_loadu_ps(from.as_ptr().add((2 * pair + odd) * 16));
                    *weight = exp2(_mm512_fmsub_ps(score, self.scale, shift));
                    if !all {
                        let seen = self.sees(half, chunk * 16 + 2 * pair + odd);
                        *weight = _mm512_maskz_mov_ps(seen, *weight);
                    }
                    sums[odd] = _mm512_add_ps(sums[odd], *weight);
                }
                let words = pack::pairs(two[0], two[1]);
                _mm512_storeu_si512(to.as_mut_ptr().add(pair * 16).cast(), words);
            }
            _mm512_add_ps(sums[0], sums[1])
        }
    }

    /// Raises the shifts of the queries in `large` to their largest score and
    /// computes the weights anew; those of the others come out as they were.
    ///
    /// # Safety
    /// The machine has AVX-512 with BF16.
    #[cold]
    #[inline(never)]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    unsafe fn raise(
        &self,
        large: [__mmask16; 2],
        shift: &mut [f32],
        sum: &mut [f32],
        mut o: Option<&mut [f32]>,
        weights: &mut [f32],
    ) -> [__m512; 2] {
        let mut sums = [_mm512_setzero_ps(); 2];
        for half in 0..2 {
            let (shift, sum) = (&mut shift[half * 16..][..16], &mut sum[half * 16..][..16]);
            // SAFETY: by the contract, and the slices are as long as they say.
            unsafe {
                let old = _mm512_loadu_ps(shift.as_ptr());
                let new = _mm512_mask_max_ps(old, large[half], self.max(half, self.len), old);
                let factor = exp2(_mm512_sub_ps(old, new));
                // Queries that keep their shift must keep their bits too.
                let factor = _mm512_mask_mov_ps(_mm512_set1_ps(1.0), large[half], factor);
                _mm512_storeu_ps(shift.as_mut_ptr(), new);
                _mm512_storeu_ps(sum.as_mut_ptr(), _mm512_mul_ps(_mm512_loadu_ps(sum.as_ptr()), factor));
                if let Some(o) = o.as_deref_mut() {
                    for tile in o.chunks_exact_mut(TILE).skip(half).step_by(2) {
                        for row in tile.chunks_exact_mut(16) {
                            let scaled = _mm512_mul_ps(_mm512_loadu_ps(row.as_ptr()), factor);
                            _mm512_storeu_ps(row.as_mut_ptr(), scaled);
                        }
                    }
                }
                for chunk in 0..2 * self.len.div_ceil(32) {
                    sums[half] = _mm512_add_ps(sums[half], self.weigh(chunk, half, new, weights));
                }
            }
        }
        sums
    }
}

/// `2^x`, relative error 7.5e-5, an eighth of bfloat16's half unit in the last
/// place; 0 far below, infinity above.
///
/// # Safety
/// The machine has AVX-512.
#[inline(always)]
unsafe fn exp2(x: __m512) -> __m512 {
    // Minimax on 0 to 1.
    const C: [f32; 4] = [0.999_925_2, 0.695_833_56, 0.226_067_16, 0.078_024_52];
    const FLOOR: i32 = 0x09;
    // SAFETY: by the contract.
    unsafe {
        let fraction = _mm512_reduce_ps::<FLOOR>(x);
        let p = _mm512_fmadd_ps(_mm512_set1_ps(C[3]), fraction, _mm512_set1_ps(C[2]));
        let p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(C[1]));
        let p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(C[0]));
        // Scales by the power of the exponent rounded down.
        _mm512_scalef_ps(p, x)
    }
}

/// Divides by the sums, turns columns by queries into rows, and stores.
///
/// # Safety
/// The machine has AVX-512 with BF16, and no other thread works on these queries.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn finish(job: &Job<'_>, [b, h, first]: [usize; 3], o: &[f32], sum: &[f32]) {
    let s = job.shape;
    for half in 0..2 {
        let first = first + half * 16;
        let queries = 16.min(s.q_len.saturating_sub(first));
        // SAFETY: by the contract, and the slices are as long as they say.
        unsafe {
            let inverse =
                _mm512_div_ps(_mm512_set1_ps(1.0), _mm512_loadu_ps(sum[half * 16..][..16].as_ptr()));
            for (column, tile) in o.chunks_exact(TILE).skip(half).step_by(2).enumerate() {
                let mut rows = [_mm512_setzero_si512(); 16];
                for (row, values) in rows.iter_mut().zip(tile.chunks_exact(16)) {
                    *row = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(values.as_ptr()), inverse));
                }
                pack::transpose(&mut rows);
                let mask = pack::first_lanes(s.head_dim - column * 16) as __mmask16;
                for (i, row) in rows.iter().enumerate().take(queries) {
                    let out = output(job.out, s, b, first + i, h);
                    let values: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(_mm512_castsi512_ps(*row)));
                    _mm256_mask_storeu_epi16(out[column * 16..].as_mut_ptr().cast(), mask, values);
                }
            }
        }
    }
}
