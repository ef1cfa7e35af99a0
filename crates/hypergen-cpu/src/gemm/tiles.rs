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
use super::amx::{Operands, Run, TILE_ROWS, Tiles, multiply_pair, multiply_single};
use super::epilogue::Output;
use super::packed::{PANEL, PackedMatrix, STEP, TILE_K};
use crate::Cpu;
use crate::scratch::with_scratch;
use crate::simd::Simd;
use crate::simd::avx512::Avx512;

/// The vectors around the tiles.
type Vectors = Avx512<true>;

/// Steps of 32 values in a chunk of plain rows: 32 rows of 640 values take 40
/// of the first-level cache's 48 KiB.
const CHUNK_STEPS: usize = 20;
/// Most stretches that a chunk consists of.
pub(crate) const MAX_RUNS: usize = 32;
/// Most tiles of rows in a block.
const MAX_TILES: usize = 128;
/// What the second-level cache is taken to hold of each: laid out rows,
/// weights that are used again and again, waiting accumulators.
const LEFT_BYTES: usize = 448 << 10;
const WEIGHT_BYTES: usize = 640 << 10;
const ACCUMULATOR_BYTES: usize = 640 << 10;
/// Bytes of a tile of rows' accumulators in one panel.
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
    let unit = if output.in_pairs() { 2 } else { 1 };
    let plan = Plan::new(a, w, unit, cpu.threads());
    let spans = a.count() / a.span();
    let row_blocks = plan.row_blocks(spans);
    let panel_blocks = panels.div_ceil(plan.panels);
    cpu.parallel(row_blocks * panel_blocks, |i| {
        let rows = plan.rows_of(i % row_blocks, a.count());
        let first = i / row_blocks * plan.panels;
        let panels = first..panels.min(first + plan.panels);
        let left = a.scratch_bytes(rows.len()).next_multiple_of(64) / 4;
        let waiting = if a.chunks() > 1 { plan.tiles(a, rows.len()).div_ceil(2) * panels.len() } else { 2 };
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
        // As many rows as the cache holds, whole pictures if it holds several.
        let fits = |rows: usize| {
            let held = a.scratch_bytes(rows) <= LEFT_BYTES && rows <= a.most_rows();
            held && tiles_in(a, rows) <= MAX_TILES
        };
        let mut rows = if fits(span) {
            (1..=spans).rev().find(|&s| fits(s * span)).unwrap_or(1) * span
        } else {
            let units = span / a.unit().min(span);
            (1..=units).rev().find(|&u| fits(u * a.unit())).unwrap_or(1) * a.unit()
        };
        let limit = match a.order() {
            Order::RowsOuter => WEIGHT_BYTES / (w.panel(0).len() * 2 / a.chunks()).max(1),
            Order::PanelsOuter => panels,
        };
        let waiting = if a.chunks() > 1 { ACCUMULATOR_BYTES / (rows * PANEL * 4) } else { panels };
        let mut cols = (limit.min(waiting).max(1) / unit * unit).clamp(unit, panels);
        // Even shares for the threads: cut panels evenly, then rows.
        if threads > 1 {
            let mut parts = panels.div_ceil(cols);
            let even = |parts: usize| panels.div_ceil(parts).next_multiple_of(unit);
            cols = even(parts);
            let blocks =
                |rows, cols| (Self { rows, span, panels: cols }).row_blocks(spans) * panels.div_ceil(cols);
            while blocks(rows, cols) < 2 * threads {
                if rows > span {
                    rows = (rows / span).div_ceil(2) * span;
                } else if rows > 4 * a.unit().max(2 * TILE_ROWS) {
                    rows = (rows / 2).next_multiple_of(a.unit());
                } else if cols > unit {
                    parts += 1;
                    cols = even(parts);
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
    let Block { a, w, output, ref rows, ref panels } = *block;
    let (laid_out, accumulators) = scratch.split_at_mut(left);
    let laid_out = laid_out.as_mut_ptr().cast::<bf16>();
    let accumulators = accumulators.as_mut_ptr();
    let mut spots = [Spot { a: std::ptr::null(), row: 0, rows: 0 }; MAX_TILES];
    let mut count = 0;
    a.spots(rows.clone(), laid_out, |spot| {
        spots[count] = spot;
        count += 1;
    });
    let pairs = count.div_ceil(2);
    let unit = if output.in_pairs() { 2 } else { 1 };
    let chunks = a.chunks();
    let mut run_list = [Run { a: 0, b: 0, steps: 0 }; MAX_RUNS];
    // SAFETY: the caller's contract, and that of `Left` about what it laid out.
    unsafe {
        let _tiles = Tiles::configure();
        for chunk in 0..chunks {
            a.lay_out::<Vectors>(rows.clone(), chunk, laid_out);
            let runs = a.runs(rows.len(), chunk, &mut run_list);
            let runs = &run_list[..runs];
            let last = chunk + 1 == chunks;
            let one = |pair: usize, p: usize| {
                let both = &spots[pair * 2..count.min(pair * 2 + 2)];
                let mut tiles = [std::ptr::null_mut(); 2];
                for (i, c) in tiles.iter_mut().enumerate().take(unit) {
                    let index = if chunks > 1 { pair * panels.len() + p + i } else { i };
                    *c = accumulators.add(index * ACC_LEN);
                    let operands = Operands {
                        a: [both[0].a, both[both.len() - 1].a],
                        stride: a.stride(),
                        b: w.panel(panels.start + p + i).as_ptr(),
                        runs,
                        c: *c,
                        first: chunk == 0,
                    };
                    if both.len() == 2 { multiply_pair(&operands) } else { multiply_single(&operands) }
                }
                if last {
                    let gates = tiles[unit - 1];
                    let panel = panels.start + p;
                    if both.len() == 2 && both[0].rows == TILE_ROWS && both[1].row == both[0].row + TILE_ROWS
                    {
                        let rows = TILE_ROWS + both[1].rows;
                        output.tile::<Vectors>(tiles[0], gates, both[0].row, rows, panel);
                    } else {
                        for (i, spot) in both.iter().enumerate() {
                            let offset = i * TILE_ROWS * PANEL;
                            let (values, gates) = (tiles[0].add(offset), gates.add(offset));
                            output.tile::<Vectors>(values, gates, spot.row, spot.rows, panel);
                        }
                    }
                }
            };
            match a.order() {
                Order::RowsOuter => {
                    for pair in 0..pairs {
                        for p in (0..panels.len()).step_by(unit) {
                            one(pair, p);
                        }
                    }
                }
                Order::PanelsOuter => {
                    for p in (0..panels.len()).step_by(unit) {
                        for pair in 0..pairs {
                            one(pair, p);
                        }
                    }
                }
            }
        }
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
        // Accumulators that wait should do so in the second-level cache.
        if self.chunks.chunks > 1 { 256 } else { 1024 }
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
