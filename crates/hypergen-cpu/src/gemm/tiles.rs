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
use super::finish512::{Around, Finisher, Sums};
use super::packed::{PackedMatrix, STEP, TILE_K};
use super::plan::{
    ACC_LEN, BLOCK_TILES, Chunks, Left, MAX_RUNS, Order, Place, Plan, RING, Spot, brought_ahead,
    panels_together,
};
use crate::Cpu;
use crate::cache::second_level_bytes;
use crate::scratch::with_scratch;
use crate::simd::Simd;
use crate::simd::avx512::Avx512;

/// `output = a * w^T` on tiles.
pub(crate) fn multiply<L: Left>(cpu: &Cpu, a: &L, w: &PackedMatrix<bf16>, output: &Output<'_, bf16>) {
    // SAFETY: this is only called where AMX is.
    unsafe { multiply_by(cpu, a, w, output, run::<L>) }
}

/// Computes a block, in scratch memory of which so many floats are for laid out rows.
type RunBlock<'a, L> = unsafe fn(&Block<'a, L>, &mut [f32], usize);

/// # Safety
/// The machine has what `run` needs.
unsafe fn multiply_by<'a, L: Left>(
    cpu: &Cpu,
    a: &'a L,
    w: &'a PackedMatrix<bf16>,
    output: &'a Output<'a, bf16>,
    run: RunBlock<'a, L>,
) {
    let panels = w.panels();
    if a.count() == 0 || panels == 0 {
        return;
    }
    let plan = Plan::new(a, panels, output.unit(), cpu.threads(), second_level_bytes());
    cpu.parallel(plan.blocks(), |i| {
        let place = plan.place(i);
        let tiles = a.tiles(place.rows.clone());
        let room = Plan::room(a, &place, tiles);
        with_scratch(room.left + room.accumulators, |scratch| {
            let block = Block { a, w, output, place, tiles };
            // SAFETY: by the contract; scratch is long enough; blocks do not overlap.
            unsafe { run(&block, scratch, room.left) }
        });
    });
}

/// A part of the output, computed by one thread.
struct Block<'a, L> {
    a: &'a L,
    w: &'a PackedMatrix<bf16>,
    output: &'a Output<'a, bf16>,
    place: Place,
    /// Tiles of rows.
    tiles: usize,
}

/// # Safety
/// The machine has AMX with bfloat16; `scratch` holds `left` floats of laid
/// out rows, then the accumulators.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn run<L: Left>(block: &Block<'_, L>, scratch: &mut [f32], left: usize) {
    // SAFETY: by this function's contract.
    unsafe { run_with::<Avx512<true>, L>(block, scratch, left, || Tiles::configure()) }
}

/// The same with other vectors and tiles.
///
/// # Safety
/// The machine has the set of `V`, `tiles` may be called, and scratch is as for [`run`].
#[inline(always)]
unsafe fn run_with<V: Around, L: Left>(
    block: &Block<'_, L>,
    scratch: &mut [f32],
    left: usize,
    tiles: impl FnOnce() -> Tiles,
) {
    let (laid_out, accumulators) = scratch.split_at_mut(left);
    let laid_out = laid_out.as_mut_ptr().cast::<bf16>();
    let rows = &block.place.rows;
    let mut near = [Spot::NOTHING; BLOCK_TILES];
    let mut far = vec![];
    // A single line of a wide picture may have more tiles than blocks are meant to.
    let spots = match near.get_mut(..block.tiles) {
        Some(spots) => spots,
        None => {
            far.resize(block.tiles, Spot::NOTHING);
            &mut far[..]
        }
    };
    let mut places = spots.iter_mut();
    block.a.spots(rows.clone(), laid_out, |spot| {
        if let Some(place) = places.next() {
            *place = spot;
        }
    });
    let spots = &*spots;
    let mut list = [Run { a: 0, b: 0, steps: 0 }; MAX_RUNS];
    // SAFETY: the caller's contract, and that of `Left` about what it laid out.
    unsafe {
        let _tiles = tiles();
        for chunk in 0..block.a.chunks() {
            block.a.lay_out::<V>(rows.clone(), chunk, laid_out);
            let runs = block.a.runs(rows.len(), chunk, &mut list);
            let accumulators = accumulators.as_mut_ptr();
            let runs = &list[..runs];
            let finisher = Finisher::<V>::new(block.output);
            let group = group_of_panels(block);
            Walk { block, spots, runs, chunk, accumulators, group, stored: 0, waiting: None, finisher }.run();
        }
    }
}

/// Panels that pairs of tiles pass together.
fn group_of_panels<L: Left>(block: &Block<'_, L>) -> usize {
    let panel = block.w.panel(0).len() * 2 / block.a.chunks();
    panels_together(panel, block.output.unit(), second_level_bytes())
}

/// One chunk's way through a block.
struct Walk<'a, L, V> {
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
    finisher: Finisher<'a, V>,
}

impl<L: Left, V: Around> Walk<'_, L, V> {
    /// Walks all pairs of tiles and all panels.
    ///
    /// # Safety
    /// As for the function `run`.
    #[inline(always)]
    unsafe fn run(mut self) {
        let unit = self.block.output.unit();
        let (pairs, panels) = (self.spots.len().div_ceil(2), self.block.place.panels.len());
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
        let index = if waits { pair * self.block.place.panels.len() + p } else { self.stored % RING };
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
            panel: self.block.place.panels.start + p,
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
                    b: self.block.w.panel(self.block.place.panels.start + p + i).as_ptr(),
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
        let (pairs, panels) = (self.spots.len().div_ceil(2), self.block.place.panels.len());
        let next = match self.block.a.order() {
            Order::RowsOuter => p + self.group,
            Order::PanelsOuter => p + 1,
        };
        if next >= panels {
            return 0;
        }
        let next = self.block.w.panel(self.block.place.panels.start + next).as_ptr().cast::<u8>();
        for (run, ahead) in self.runs.iter().zip(ahead.iter_mut()) {
            let (start, lines) = brought_ahead(run, pair, pairs);
            *ahead = Ahead { from: next.wrapping_add(start), lines };
        }
        self.runs.len()
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
    fn most_rows(&self, share: usize) -> usize {
        // What all panels pass should stay in the second-level cache, and so
        // should accumulators that wait.
        let fits = share / (self.chunks.longest() * TILE_K * 2);
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
    fn most_rows(&self, _: usize) -> usize {
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

#[cfg(test)]
pub(crate) mod tests;
