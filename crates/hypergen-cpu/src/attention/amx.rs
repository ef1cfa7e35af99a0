//! Attention by AMX tiles in bfloat16, with AVX-512 for the softmax between
//! the two products. Machines without AMX never come here.
//!
//! For 32 queries and 64 keys at a time (an [`Item`]) there are three pieces
//! of work: scores `S = Q K^T` (tiles), weights `P = 2^(c S - m)` (vectors, in
//! [`super::amx_weights`]), output `O += P V` (tiles). Tiles and vectors are
//! different parts of the processor. So the loop runs three items deep: while
//! the weights of an item are computed, the scores of the next one and the
//! output of the one before are fed to the tiles between them, a few
//! instructions at a time, and out-of-order execution does the rest.
//!
//! There is no running maximum. The shift `m` of a query is the maximum of its
//! first 64 scores; float32 and bfloat16 have exponents to spare, so what
//! follows may be 2^60 times larger before anything overflows. Only if some
//! weight says that it was, the shift is raised and the item is done again.
//! This saves a pass over the scores, and what a query gets still depends on
//! that query alone. The sums of the weights need no pass either: the values
//! have a column of ones.

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::amx_plan::{Item, Items, KEYS, Layout, Plan, QUERIES, TILE};
use super::amx_tiles::{Nothing, Output, Scores};
use super::amx_weights::{Avx512, Block, Limits, Vectors, too_large};
use super::pack512 as pack;
use super::{AttentionShape, Heads, output};
use crate::Cpu;
use crate::cache::second_level_bytes;
use crate::gemm::amx::Tiles;
use crate::scratch::Scratch;
use crate::split::Shared;

/// One attention, ready to be computed.
pub(super) struct Job<'a> {
    pub(super) shape: &'a AttentionShape,
    layout: Layout,
    q: Heads<'a, bf16>,
    packed: &'a [f32],
    pub(super) out: &'a Shared<'a, bf16>,
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
    // SAFETY: AMX comes with AVX-512.
    unsafe { attention_by::<Avx512>(cpu, s, q, k, v, out) };
}

/// The same by other vectors and tiles.
///
/// # Safety
/// The machine has what `V` needs.
pub(super) unsafe fn attention_by<V: Vectors>(
    cpu: &Cpu,
    s: &AttentionShape,
    q: Heads<'_, bf16>,
    k: Heads<'_, bf16>,
    v: Heads<'_, bf16>,
    out: &mut [bf16],
) {
    let layout = Layout::new(s);
    let mut packed = Scratch::take(s.batch * s.heads * layout.head());
    // SAFETY: by this function's contract.
    unsafe { pack::keys_and_values::<V>(cpu, s, &layout, k, v, packed.as_mut_slice()) };
    let out = Shared::new(out);
    let job = Job { shape: s, layout, q, packed: packed.as_slice(), out: &out };
    let plan = Plan::new(s, &layout, cpu.threads(), second_level_bytes());
    cpu.parallel(plan.tasks(), |i| {
        let (heads, queries) = plan.task(i);
        for head in heads {
            // SAFETY: by this function's contract, and each task has queries of its own.
            unsafe { V::queries(&job, head, queries.clone()) };
        }
    });
}

/// What a task keeps for each of its items of queries, and between its steps.
struct Work<'a> {
    layout: &'a Layout,
    /// Keys and values of the head.
    packed: &'a [f32],
    /// Queries, packed: `[units][2][steps]` tiles.
    q: &'a mut [f32],
    /// Output so far: `[units][columns][2]` tiles of 16 queries by 16 columns.
    o: &'a mut [f32],
    /// Shifts, `[units][32]`, as [`Block::shift`] gives them.
    shift: &'a mut [f32],
    /// Scores of an item: `[2 groups][2 halves of keys][2 halves of queries]`
    /// tiles. Those of the next item take their place while vectors still read
    /// them, group after group, hence the pointer.
    scores: *mut f32,
    /// Weights of two items: `[2 groups][2 halves of queries]` tiles of 16 queries by 32 keys.
    weights: [*mut f32; 2],
}

/// Computes the queries of one task.
///
/// # Safety
/// The machine has AMX, and no other thread works on these queries.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi")]
pub(super) unsafe fn queries(job: &Job<'_>, head: usize, queries: Range<usize>) {
    // SAFETY: by this function's contract.
    unsafe { queries_with::<Avx512>(job, head, queries, || Tiles::configure()) }
}

/// The same by other vectors and tiles.
///
/// # Safety
/// The machine has the set of `V`, `tiles` may be called, and no other thread
/// works on these queries.
#[inline(always)]
pub(super) unsafe fn queries_with<V: Vectors>(
    job: &Job<'_>,
    head: usize,
    queries: Range<usize>,
    tiles: impl FnOnce() -> Tiles,
) {
    let (s, layout) = (job.shape, &job.layout);
    let (b, h) = (head / s.heads, head % s.heads);
    let items = Items::new(s, &queries);
    let (units, first) = (items.units, queries.start);
    let (q_len, o_len) = (layout.queries(), layout.output());

    let mut scratch = Scratch::take(units * (q_len + o_len + QUERIES) + 2 * KEYS * QUERIES);
    let rest = scratch.as_mut_slice();
    let (scores, rest) = rest.split_at_mut(KEYS * QUERIES);
    let (w0, rest) = rest.split_at_mut(KEYS * QUERIES / 2);
    let (w1, rest) = rest.split_at_mut(KEYS * QUERIES / 2);
    let (q, rest) = rest.split_at_mut(units * q_len);
    let (o, shift) = rest.split_at_mut(units * o_len);
    let packed = &job.packed[head * layout.head()..][..layout.head()];
    let mut work = Work {
        layout,
        packed,
        q,
        o,
        shift,
        scores: scores.as_mut_ptr(),
        weights: [w0.as_mut_ptr(), w1.as_mut_ptr()],
    };

    let scale = s.scale * std::f32::consts::LOG2_E;
    // Scaled queries would be rounded once more, so they take only the sign of
    // the factor (or that it is zero), and the softmax the rest.
    let (sign, scale) = if scale == 0.0 { (0.0, 1.0) } else { (scale.signum(), scale.abs()) };
    // SAFETY: by this function's contract; the buffers have the sizes of the layout.
    unsafe {
        for (u, q) in work.q.chunks_exact_mut(q_len).enumerate() {
            V::pack_queries(s, layout, &job.q, [b, h, first + u * QUERIES], sign, q);
        }
        let (count, item) = (items.count(), |i| items.item(i));
        let tiles = tiles();
        work.score(item(0)).run(&mut Nothing);
        for i in 0..count {
            let before = (i > 0).then(|| work.output(item(i - 1), i - 1));
            let next = (i + 1 < count).then(|| work.score(item(i + 1)));
            let hidden = s.causal.then_some(first + item(i).unit * QUERIES);
            work.weigh::<V>((i, item(i)), scale, hidden, before.as_ref(), next.as_ref());
        }
        work.output(item(count - 1), count - 1).run(&mut Nothing);
        drop(tiles);
        for (u, o) in work.o.chunks_exact(o_len).enumerate() {
            V::finish(job, [b, h, first + u * QUERIES], o);
        }
    }
}

impl Work<'_> {
    /// The scores of an item.
    fn score(&self, item: Item) -> Scores {
        let layout = self.layout;
        let keys = &self.packed[layout.keys_of(item)..layout.keys];
        let q = &self.q[item.unit * layout.queries()..][..layout.queries()];
        Scores::new(keys, q, self.scores, layout.steps, item.len.div_ceil(32))
    }

    /// The output of the `i`th item, from its weights.
    fn output(&mut self, item: Item, i: usize) -> Output {
        let layout = self.layout;
        let values = &self.packed[layout.values_of(item)..];
        let o = &mut self.o[item.unit * layout.output()..][..layout.output()];
        let groups = item.len.div_ceil(32);
        Output::new(values, self.weights[i % 2], o, layout.columns, groups, item.start == 0)
    }

    /// The weights of the `i`th item, and meanwhile the output of the item
    /// before and the scores of the next one. `hidden` is the number of the
    /// item's first query where later keys are not to be seen.
    ///
    /// # Safety
    /// The machine has AMX and the set of `V`; the item's scores and the weights of
    /// the one before are there.
    #[inline(always)]
    unsafe fn weigh<V: Vectors>(
        &mut self,
        (i, item): (usize, Item),
        scale: f32,
        hidden: Option<usize>,
        before: Option<&Output>,
        next: Option<&Scores>,
    ) {
        let limits = Limits { start: item.start, len: item.len, hidden };
        let block = Block {
            scores: self.scores,
            weights: self.weights[i % 2],
            limits,
            scale,
            vectors: PhantomData::<V>,
        };
        let shift = &mut self.shift[item.unit * QUERIES..][..QUERIES];
        // SAFETY: by the contract; the buffers have the sizes of an item.
        unsafe {
            if item.start == 0 {
                for (row, shift) in shift.iter_mut().enumerate() {
                    *shift = block.shift(row);
                }
            }
            let top = if hidden.is_some() {
                before.inspect(|b| b.run(&mut Nothing));
                let top = block.seen(shift);
                next.inspect(|n| n.run(&mut Nothing));
                top
            } else {
                // Rows are spread so that a group's are all read when the next
                // item's scores of that group are stored, two pieces before the end at the latest.
                let pieces = before.map_or(0, Output::pieces) + next.map_or(0, Scores::pieces);
                let rows = QUERIES * item.len.div_ceil(32);
                let mut all = block.all(shift, rows.div_ceil(pieces.saturating_sub(2).max(1)));
                if let Some(before) = before {
                    before.run(&mut all);
                }
                match next {
                    Some(next) => next.run(&mut all),
                    None => all.some(rows),
                }
                all.top()
            };
            if too_large::<V>(top) {
                self.raise(item, &block, next);
            }
        }
    }

    /// Raises the shifts of queries with too large weights. It happens to
    /// hardly any picture, so it may take its time: the scores, which the next
    /// item's have replaced, are computed again, and then those.
    ///
    /// # Safety
    /// As for [`Work::weigh`].
    #[cold]
    #[inline(never)]
    unsafe fn raise<V: Vectors>(&mut self, item: Item, block: &Block<V>, next: Option<&Scores>) {
        let again = self.score(item);
        let o_len = self.layout.output();
        let o = &mut self.o[item.unit * o_len..][..o_len];
        // The output of earlier items exists unless this is the first.
        let o = if item.start == 0 { None } else { Some(o) };
        let shift = &mut self.shift[item.unit * QUERIES..][..QUERIES];
        // SAFETY: by the contract.
        unsafe {
            again.run(&mut Nothing);
            V::raise(block, shift, o);
            next.inspect(|n| n.run(&mut Nothing));
        }
    }
}

/// Divides by the sums and stores.
///
/// # Safety
/// The machine has AVX-512 with BF16, and no other thread works on these queries.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn finish(job: &Job<'_>, [b, h, first]: [usize; 3], o: &[f32]) {
    let s = job.shape;
    for row in 0..QUERIES.min(s.q_len.saturating_sub(first)) {
        let at = |column: usize| &o[(column / 16 * 2 + row / 16) * TILE + row % 16 * 16..][..16];
        let inverse = _mm512_set1_ps(1.0 / at(s.head_dim)[s.head_dim % 16]);
        // SAFETY: by the contract; the mask keeps the store inside the output.
        unsafe {
            let out = output(job.out, s, b, first + row, h);
            for (column, out) in (0..s.head_dim).step_by(16).zip(out.chunks_mut(16)) {
                let values = _mm512_mul_ps(_mm512_loadu_ps(at(column).as_ptr()), inverse);
                let values: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(values));
                let mask = pack::first_lanes(out.len()) as __mmask16;
                _mm256_mask_storeu_epi16(out.as_mut_ptr().cast(), mask, values);
            }
        }
    }
}
