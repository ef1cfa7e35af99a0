//! The matrix product on AMX tiles: cutting the output into blocks for the
//! threads and walking each block so that operands come from near caches.
//!
//! Tiles are loaded from the left operand where it lies, or from a copy that
//! a [`Left`] lays out in the thread's scratch memory: a strip of a picture
//! with its border, or plain rows where neither fits. Long sums are cut into
//! chunks whose accumulators wait in scratch memory; chunks follow from the
//! operand's shape alone, so the order of every sum does too.

use std::ops::Range;

use half::bf16;

use super::Rows;
use super::amx::{Ahead, Operands, Run, TILE_ROWS, Tiles, multiply_pair, multiply_single, store};
use super::epilogue::Output;
use super::finish512::{Finisher, Sums};
use super::packed::{PANEL, PackedMatrix, STEP, TILE_K};
use crate::Cpu;
use crate::cache::second_level_bytes;
use crate::scratch::with_scratch;
use crate::simd::Simd;
use crate::simd::avx512::Avx512;

/// The vectors around the tiles.
pub(super) type Vectors = Avx512<true>;

/// Steps of 32 values in a chunk of plain rows. Shorter chunks would let all
/// rows stay in the first-level cache, but carrying accumulators from chunk to
/// chunk costs more than that gives; longer ones leave no room for enough
/// rows in the second level.
const CHUNK_STEPS: usize = 40;
/// Most stretches that a chunk consists of.
pub(crate) const MAX_RUNS: usize = 32;
/// Most tiles of rows in a block.
const MAX_TILES: usize = 128;
/// Accumulators of a pair of tiles that have no chunk to wait for: two calls of
/// values and gates.
const RING: usize = 4;
/// Accumulators of a pair of tiles in one panel.
const ACC_LEN: usize = 2 * TILE_ROWS * PANEL;

/// A tile of rows: where its first row begins, and which outputs it makes.
#[derive(Clone, Copy)]
pub(crate) struct Spot {
    /// The first value of the first row.
    pub(crate) a: *const bf16,
    /// The output row of the first row.
    pub(crate) row: usize,
    /// Rows that count; the tile may read on into whatever follows.
    pub(crate) rows: usize,
}

/// Lines of memory of a panel's step.
const LINES: usize = STEP * 2 / 64;

/// The order in which a block is walked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// All panels for a pair of tiles of rows, which stays in the first-level cache.
    RowsOuter,
    /// All rows for a panel, which stays in the second-level cache.
    PanelsOuter,
}

/// The left operand as tiles see it.
pub(crate) trait Left: Sync {
    /// Rows in all.
    fn count(&self) -> usize;
    /// Rows of which a block holds a whole number, if it is smaller than a span.
    fn unit(&self) -> usize;
    /// Rows of which a block holds a whole number, if it is larger: a picture.
    fn span(&self) -> usize;
    /// Rows of a block at most.
    fn most_rows(&self) -> usize;
    /// Bytes of scratch memory that a block of `rows` takes.
    fn scratch_bytes(&self, rows: usize) -> usize;
    /// The order that suits.
    fn order(&self) -> Order;
    /// Chunks of `k`, at least one.
    fn chunks(&self) -> usize;
    /// Bytes from one row of a tile to the next.
    fn stride(&self) -> usize;
    /// What a chunk of a block of `rows` multiplies; returns how many of `runs` it wrote.
    fn runs(&self, rows: usize, chunk: usize, runs: &mut [Run; MAX_RUNS]) -> usize;
    /// Lays out the rows of a block for a chunk.
    ///
    /// # Safety
    /// The machine has the set of `S`; `scratch` is as long as asked for.
    unsafe fn lay_out<S: Simd>(&self, rows: Range<usize>, chunk: usize, scratch: *mut bf16);
    /// The tiles of a block, one by one.
    fn spots(&self, rows: Range<usize>, scratch: *const bf16, put: impl FnMut(Spot));
}

/// `output = a * w^T` on tiles.
pub(crate) fn multiply<L: Left>(cpu: &Cpu, a: &L, w: &PackedMatrix<bf16>, output: &Output<'_, bf16>) {
    let panels = w.panels();
    if a.count() == 0 || panels == 0 {
        return;
    }
    let unit = output.unit();
    let plan = Plan::new(a, w, unit, cpu.threads());
    let spans = a.count() / a.span();
    let row_blocks = plan.row_blocks(spans);
    let panel_blocks = panels.div_ceil(plan.panels);
    cpu.parallel(row_blocks * panel_blocks, |i| {
        let rows = plan.rows_of(i % row_blocks, a.count());
        let first = i / row_blocks * plan.panels;
        let panels = first..panels.min(first + plan.panels);
        let left = a.scratch_bytes(rows.len()).next_multiple_of(64) / 4;
        let waiting =
            if a.chunks() > 1 { plan.tiles(a, rows.len()).div_ceil(2) * panels.len() } else { RING };
        with_scratch(left + waiting * ACC_LEN, |scratch| {
            let block = Block { a, w, output, rows, panels };
            // SAFETY: this is only called where AMX is; scratch is long
            // enough; blocks do not overlap.
            unsafe { run(&block, scratch, left) }
        });
    });
}

/// How the output is cut.
struct Plan {
    /// Rows of a block.
    rows: usize,
    /// Rows of a picture.
    span: usize,
    /// Panels of a block.
    panels: usize,
}

impl Plan {
    fn new<L: Left>(a: &L, w: &PackedMatrix<bf16>, unit: usize, threads: usize) -> Self {
        let (count, span, panels) = (a.count(), a.span(), w.panels());
        let spans = count / span;
        // Laid out rows, weights that are used again, and accumulators that
        // wait share the second-level cache; what is left serves the rest.
        let share = second_level_bytes() / 16 * 5;
        // As many rows as the cache holds, whole pictures if it holds several.
        let fits = |rows: usize| {
            let held = a.scratch_bytes(rows) <= share && rows <= a.most_rows();
            held && tiles_in(a, rows) <= MAX_TILES
        };
        let mut rows = if fits(span) {
            (1..=spans).rev().find(|&s| fits(s * span)).unwrap_or(1) * span
        } else {
            let units = span / a.unit().min(span);
            (1..=units).rev().find(|&u| fits(u * a.unit())).unwrap_or(1) * a.unit()
        };
        let waiting = if a.chunks() > 1 { share / (rows * PANEL * 4) } else { panels };
        let mut cols = (waiting.max(1) / unit * unit).clamp(unit, panels);
        // Even shares for the threads. Cutting panels makes every part read all
        // rows, cutting rows makes every part read all weights: what is read
        // twice should be the smaller of the two.
        if threads > 1 {
            let weights_are_larger = panels * PANEL > count;
            let mut parts = panels.div_ceil(cols);
            let even = |parts: usize| panels.div_ceil(parts).next_multiple_of(unit);
            cols = even(parts);
            let blocks =
                |rows, cols| (Self { rows, span, panels: cols }).row_blocks(spans) * panels.div_ceil(cols);
            while blocks(rows, cols) < 2 * threads {
                let can_cut_rows = rows > span || rows > 4 * a.unit().max(2 * TILE_ROWS);
                if cols > unit && (weights_are_larger || !can_cut_rows) {
                    parts += 1;
                    cols = even(parts);
                } else if rows > span {
                    rows = (rows / span).div_ceil(2) * span;
                } else if can_cut_rows {
                    rows = (rows / 2).next_multiple_of(a.unit());
                } else {
                    break;
                }
            }
        }
        Self { rows, span, panels: cols }
    }

    fn row_blocks(&self, spans: usize) -> usize {
        if self.rows >= self.span {
            (spans * self.span).div_ceil(self.rows)
        } else {
            spans * self.span.div_ceil(self.rows)
        }
    }

    fn rows_of(&self, block: usize, count: usize) -> Range<usize> {
        if self.rows >= self.span {
            let start = block * self.rows;
            return start..count.min(start + self.rows);
        }
        let per_span = self.span.div_ceil(self.rows);
        let (span, part) = (block / per_span * self.span, block % per_span * self.rows);
        span + part..span + self.span.min(part + self.rows)
    }

    fn tiles<L: Left>(&self, a: &L, rows: usize) -> usize {
        tiles_in(a, rows)
    }
}

/// Tiles of a block, counted without scratch memory.
fn tiles_in<L: Left>(a: &L, rows: usize) -> usize {
    let mut tiles = 0;
    a.spots(0..rows, std::ptr::null(), |_| tiles += 1);
    tiles
}

/// A part of the output, computed by one thread.
struct Block<'a, L> {
    a: &'a L,
    w: &'a PackedMatrix<bf16>,
    output: &'a Output<'a, bf16>,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// # Safety
/// The machine has AMX with bfloat16; `scratch` holds `left` floats of laid
/// out rows, then the accumulators.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn run<L: Left>(block: &Block<'_, L>, scratch: &mut [f32], left: usize) {
    let (laid_out, accumulators) = scratch.split_at_mut(left);
    let laid_out = laid_out.as_mut_ptr().cast::<bf16>();
    let mut spots = [Spot { a: std::ptr::null(), row: 0, rows: 0 }; MAX_TILES];
    let mut count = 0;
    block.a.spots(block.rows.clone(), laid_out, |spot| {
        spots[count] = spot;
        count += 1;
    });
    let mut list = [Run { a: 0, b: 0, steps: 0 }; MAX_RUNS];
    // SAFETY: the caller's contract, and that of `Left` about what it laid out.
    unsafe {
        let _tiles = Tiles::configure();
        for chunk in 0..block.a.chunks() {
            block.a.lay_out::<Vectors>(block.rows.clone(), chunk, laid_out);
            let runs = block.a.runs(block.rows.len(), chunk, &mut list);
            let accumulators = accumulators.as_mut_ptr();
            let (spots, runs) = (&spots[..count], &list[..runs]);
            let finisher = Finisher::new(block.output);
            let group = group_of_panels(block);
            Walk { block, spots, runs, chunk, accumulators, group, stored: 0, waiting: None, finisher }.run();
        }
    }
}

/// Panels that pairs of tiles pass together, so that they come from the
/// second-level cache from the second pair on.
fn group_of_panels<L: Left>(block: &Block<'_, L>) -> usize {
    let unit = block.output.unit();
    let panel = block.w.panel(0).len() * 2 / block.a.chunks();
    (second_level_bytes() / 32 * 5 / panel.max(1) / unit * unit).max(unit)
}

/// One chunk's way through a block.
struct Walk<'a, L> {
    block: &'a Block<'a, L>,
    spots: &'a [Spot],
    runs: &'a [Run],
    chunk: usize,
    accumulators: *mut f32,
    /// Panels that pairs of tiles pass together.
    group: usize,
    /// Tiles' worth of accumulators handed out so far.
    stored: usize,
    /// Sums that are still in registers, at least in part.
    waiting: Option<Sums>,
    finisher: Finisher<'a>,
}

impl<L: Left> Walk<'_, L> {
    /// Walks all pairs of tiles and all panels.
    ///
    /// # Safety
    /// As for the function `run`.
    #[inline(always)]
    unsafe fn run(mut self) {
        let unit = self.block.output.unit();
        let (pairs, panels) = (self.spots.len().div_ceil(2), self.block.panels.len());
        // SAFETY: the caller's contract.
        unsafe {
            match self.block.a.order() {
                Order::RowsOuter => {
                    for first in (0..panels).step_by(self.group) {
                        for pair in 0..pairs {
                            for p in (first..panels.min(first + self.group)).step_by(unit) {
                                self.one(pair, p);
                            }
                        }
                    }
                }
                Order::PanelsOuter => {
                    for p in (0..panels).step_by(unit) {
                        for pair in 0..pairs {
                            self.one(pair, p);
                        }
                    }
                }
            }
            self.flush();
        }
    }

    fn last_chunk(&self) -> bool {
        self.chunk + 1 == self.block.a.chunks()
    }

    /// Where the sums of a pair of tiles and a panel go.
    #[inline(always)]
    fn accumulators(&mut self, pair: usize, p: usize) -> *mut f32 {
        let waits = self.block.a.chunks() > 1;
        let index = if waits { pair * self.block.panels.len() + p } else { self.stored % RING };
        self.stored += 1;
        self.accumulators.wrapping_add(index * ACC_LEN)
    }

    /// Multiplies a pair of tiles with a panel, or with values and gates.
    /// Meanwhile the sums before these are written and finished.
    ///
    /// # Safety
    /// As for the function `run`.
    #[inline(always)]
    unsafe fn one(&mut self, pair: usize, p: usize) {
        let unit = self.block.output.unit();
        let both = &self.spots[pair * 2..self.spots.len().min(pair * 2 + 2)];
        let second = both.get(1).copied().unwrap_or(Spot { rows: 0, ..both[0] });
        let first = self.accumulators(pair, p);
        let c = [first, if unit == 2 { self.accumulators(pair, p + 1) } else { first }];
        let sums = Sums {
            c: c.map(<*mut f32>::cast_const),
            spots: [both[0], second],
            panel: self.block.panels.start + p,
        };
        let together = both.len() == 2 && !self.runs.is_empty();
        // SAFETY: the caller's contract.
        unsafe {
            if !together {
                self.flush();
            }
            let mut previous = self.waiting.map_or(std::ptr::null_mut(), |w| w.c[1].cast_mut());
            if let Some(waiting) = self.waiting.take()
                && self.last_chunk()
            {
                let pieces = unit * self.runs.iter().map(|r| r.steps).sum::<usize>() - 1;
                self.finisher.begin(waiting, pieces);
            }
            for (i, &c) in c.iter().enumerate().take(unit) {
                let operands = Operands {
                    a: [both[0].a, second.a],
                    stride: self.block.a.stride(),
                    b: self.block.w.panel(self.block.panels.start + p + i).as_ptr(),
                    runs: self.runs,
                    c,
                    first: self.chunk == 0,
                };
                if together {
                    let mut ahead = [Ahead::NOTHING; MAX_RUNS];
                    let count = self.ahead(pair, p + i, &mut ahead);
                    multiply_pair(&operands, previous, &ahead[..count], &mut self.finisher);
                    previous = c;
                } else {
                    multiply_single(&operands);
                }
            }
            self.finisher.finish();
            if together {
                self.waiting = Some(sums);
            } else if self.last_chunk() {
                self.finisher.begin(sums, 1);
                self.finisher.finish();
            }
        }
    }

    /// Writes the sums that are still in registers, and finishes them.
    ///
    /// # Safety
    /// As for the function `run`.
    #[inline(always)]
    unsafe fn flush(&mut self) {
        let Some(waiting) = self.waiting.take() else { return };
        // SAFETY: the caller's contract.
        unsafe {
            store(waiting.c[1].cast_mut());
            if self.last_chunk() {
                self.finisher.begin(waiting, 1);
                self.finisher.finish();
            }
        }
    }

    /// What this call brings nearer for a later one: a share of the next panel.
    /// Writes one entry for each run, and returns how many.
    #[inline(always)]
    fn ahead(&self, pair: usize, p: usize, ahead: &mut [Ahead; MAX_RUNS]) -> usize {
        let (pairs, panels) = (self.spots.len().div_ceil(2), self.block.panels.len());
        let next = match self.block.a.order() {
            Order::RowsOuter => p + self.group,
            Order::PanelsOuter => p + 1,
        };
        if next >= panels {
            return 0;
        }
        let next = self.block.w.panel(self.block.panels.start + next).as_ptr().cast::<u8>();
        for (run, ahead) in self.runs.iter().zip(ahead.iter_mut()) {
            let lines = run.steps * LINES;
            let share = lines * pair / pairs..lines * (pair + 1) / pairs;
            *ahead = Ahead { from: next.wrapping_add(run.b + share.start * 64), lines: share.len() };
        }
        self.runs.len()
    }
}

/// Chunks of plain rows, in steps of 32 values, as even as they can be.
#[derive(Clone, Copy)]
struct Chunks {
    steps: usize,
    chunks: usize,
}

impl Chunks {
    fn of(k: usize) -> Self {
        let steps = k.div_ceil(TILE_K);
        Self { steps, chunks: steps.div_ceil(CHUNK_STEPS).max(1) }
    }

    /// The steps of a chunk.
    fn range(self, chunk: usize) -> Range<usize> {
        chunk * self.steps / self.chunks..(chunk + 1) * self.steps / self.chunks
    }

    /// The most steps of any chunk.
    fn longest(self) -> usize {
        self.steps.div_ceil(self.chunks)
    }
}

/// Rows whose tiles are loaded where they lie.
pub(super) struct Direct<'a> {
    data: &'a [bf16],
    m: usize,
    k: usize,
    chunks: Chunks,
}

impl<'a> Direct<'a> {
    /// `None` where rows straddle cache lines, or would all fall into the same
    /// few lines of the first-level cache.
    pub(super) fn new(data: &'a [bf16], m: usize, k: usize) -> Option<Self> {
        const LINE: usize = 64;
        const PAGE: usize = 4096;
        let bytes = k * 2;
        let straddles =
            !data.as_ptr().cast::<u8>().addr().is_multiple_of(LINE) || !bytes.is_multiple_of(LINE);
        if straddles || bytes == 0 || bytes.is_multiple_of(PAGE) || m == 0 {
            return None;
        }
        Some(Self { data, m, k, chunks: Chunks::of(k) })
    }
}

impl Left for Direct<'_> {
    fn count(&self) -> usize {
        self.m
    }
    fn unit(&self) -> usize {
        2 * TILE_ROWS
    }
    fn span(&self) -> usize {
        self.m
    }
    fn most_rows(&self) -> usize {
        // What all panels pass should stay in the second-level cache, and so
        // should accumulators that wait.
        let fits = second_level_bytes() / 16 * 5 / (self.chunks.longest() * TILE_K * 2);
        let most = if self.chunks.chunks > 1 { 256 } else { 1024 };
        (fits / self.unit() * self.unit()).clamp(self.unit(), most)
    }
    fn scratch_bytes(&self, rows: usize) -> usize {
        // Room for the last tile, which must not read past the matrix.
        if rows.is_multiple_of(TILE_ROWS) { 0 } else { TILE_ROWS * self.k * 2 }
    }
    fn order(&self) -> Order {
        Order::RowsOuter
    }
    fn chunks(&self) -> usize {
        self.chunks.chunks
    }
    fn stride(&self) -> usize {
        self.k * 2
    }
    fn runs(&self, _: usize, chunk: usize, runs: &mut [Run; MAX_RUNS]) -> usize {
        let steps = self.chunks.range(chunk);
        runs[0] = Run { a: steps.start * TILE_K * 2, b: steps.start * STEP * 2, steps: steps.len() };
        1
    }
    #[inline(always)]
    unsafe fn lay_out<S: Simd>(&self, rows: Range<usize>, chunk: usize, scratch: *mut bf16) {
        let tail = rows.len() % TILE_ROWS;
        if tail > 0 && chunk == 0 {
            // SAFETY: the last rows exist, and scratch holds a tile of them.
            unsafe {
                let from = self.data.as_ptr().add((rows.end - tail) * self.k);
                std::ptr::copy_nonoverlapping(from, scratch, tail * self.k);
            }
        }
    }
    fn spots(&self, rows: Range<usize>, scratch: *const bf16, mut put: impl FnMut(Spot)) {
        for row in rows.clone().step_by(TILE_ROWS) {
            let count = TILE_ROWS.min(rows.end - row);
            let a = if count == TILE_ROWS { self.data.as_ptr().wrapping_add(row * self.k) } else { scratch };
            put(Spot { a, row, rows: count });
        }
    }
}

/// Rows that are copied together, padded to whole steps of `k`.
pub(super) struct Gathered<'a, R> {
    rows: &'a R,
    k: usize,
    chunks: Chunks,
}

impl<'a, R: Rows<bf16>> Gathered<'a, R> {
    pub(super) fn new(rows: &'a R, k: usize) -> Self {
        Self { rows, k, chunks: Chunks::of(k) }
    }

    /// Values from one copied row to the next.
    fn pitch(&self) -> usize {
        self.chunks.longest() * TILE_K
    }
}

impl<R: Rows<bf16>> Left for Gathered<'_, R> {
    fn count(&self) -> usize {
        self.rows.count()
    }
    fn unit(&self) -> usize {
        2 * TILE_ROWS
    }
    fn span(&self) -> usize {
        self.rows.count()
    }
    fn most_rows(&self) -> usize {
        256
    }
    fn scratch_bytes(&self, rows: usize) -> usize {
        rows.next_multiple_of(TILE_ROWS) * self.pitch() * 2
    }
    fn order(&self) -> Order {
        Order::RowsOuter
    }
    fn chunks(&self) -> usize {
        self.chunks.chunks
    }
    fn stride(&self) -> usize {
        self.pitch() * 2
    }
    fn runs(&self, _: usize, chunk: usize, runs: &mut [Run; MAX_RUNS]) -> usize {
        let steps = self.chunks.range(chunk);
        runs[0] = Run { a: 0, b: steps.start * STEP * 2, steps: steps.len() };
        usize::from(!steps.is_empty())
    }
    #[inline(always)]
    unsafe fn lay_out<S: Simd>(&self, rows: Range<usize>, chunk: usize, scratch: *mut bf16) {
        let steps = self.chunks.range(chunk);
        let first = steps.start * TILE_K;
        let len = self.k.min(steps.end * TILE_K) - first;
        for (i, row) in rows.enumerate() {
            // SAFETY: scratch holds a pitch for each row, which is no shorter
            // than the chunk with its padding.
            unsafe {
                let to = scratch.add(i * self.pitch());
                self.rows.copy::<S, bf16>(row, first, len, to);
                std::slice::from_raw_parts_mut(to.add(len), steps.len() * TILE_K - len).fill(bf16::ZERO);
            }
        }
    }
    fn spots(&self, rows: Range<usize>, scratch: *const bf16, mut put: impl FnMut(Spot)) {
        for (i, row) in rows.clone().step_by(TILE_ROWS).enumerate() {
            let a = scratch.wrapping_add(i * TILE_ROWS * self.pitch());
            put(Spot { a, row, rows: TILE_ROWS.min(rows.end - row) });
        }
    }
}

/// Plain rows through tiles, copied.
pub(crate) fn multiply_rows<R: Rows<bf16>>(
    cpu: &Cpu,
    rows: &R,
    w: &PackedMatrix<bf16>,
    output: &Output<'_, bf16>,
) {
    multiply(cpu, &Gathered::new(rows, w.k()), w, output);
}
