//! How a product on tiles is cut: blocks of rows and panels for the threads,
//! chunks of `k`, what is brought nearer ahead of its use, and the scratch
//! memory that all of it takes. Nothing here computes or touches an operand,
//! so that plans are tested on machines that have no tiles.

use std::ops::Range;

use half::bf16;

use super::amx::{Run, TILE_ROWS};
use super::packed::{PANEL, STEP, TILE_K};
use crate::simd::Simd;

/// Steps of 32 values in a chunk of plain rows. Shorter chunks would let all
/// rows stay in the first-level cache, but carrying accumulators from chunk to
/// chunk costs more than that gives; longer ones leave no room for enough
/// rows in the second level.
const CHUNK_STEPS: usize = 40;
/// Most stretches that a chunk consists of.
pub(crate) const MAX_RUNS: usize = 32;
/// Tiles of rows that a block has at most, unless one unit of its operand has more.
pub(crate) const BLOCK_TILES: usize = 128;
/// Accumulators of a pair of tiles that have no chunk to wait for: two calls of
/// values and gates.
pub(super) const RING: usize = 4;
/// Accumulators of a pair of tiles in one panel.
pub(super) const ACC_LEN: usize = 2 * TILE_ROWS * PANEL;
/// Lines of memory of a panel's step.
const LINES: usize = STEP * 2 / 64;

/// A tile of rows: where its first row begins, and which outputs it makes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spot {
    /// The first value of the first row.
    pub(crate) a: *const bf16,
    /// The output row of the first row.
    pub(crate) row: usize,
    /// Rows that count; the tile may read on into whatever follows.
    pub(crate) rows: usize,
}

impl Spot {
    /// A tile of no rows.
    pub(super) const NOTHING: Self = Self { a: std::ptr::null(), row: 0, rows: 0 };
}

/// The order in which a block is walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Rows of a block at most, where `share` bytes of cache are for them.
    fn most_rows(&self, share: usize) -> usize;
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
    /// The tiles of a block, one by one, in the order of their rows.
    fn spots(&self, rows: Range<usize>, scratch: *const bf16, put: impl FnMut(Spot));

    /// Tiles of a block, counted without scratch memory.
    fn tiles(&self, rows: Range<usize>) -> usize {
        let mut tiles = 0;
        self.spots(rows, std::ptr::null(), |_| tiles += 1);
        tiles
    }
}

/// Bytes of a second-level cache that laid out rows, weights that are used
/// again and accumulators that wait may take each; what is left serves the rest.
pub(super) fn share_of(cache: usize) -> usize {
    cache / 16 * 5
}

/// How the output is cut.
pub(super) struct Plan {
    /// Rows of a block.
    rows: usize,
    /// Rows of a picture.
    span: usize,
    /// Rows in all.
    count: usize,
    /// Panels of a block.
    panels: usize,
    /// Panels in all.
    all_panels: usize,
}

/// A block's place in the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) rows: Range<usize>,
    pub(super) panels: Range<usize>,
}

/// Floats of scratch memory of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Laid out rows; whole lines of memory, so that accumulators begin on one.
    pub(super) left: usize,
    /// Accumulators behind them.
    pub(super) accumulators: usize,
}

impl Plan {
    /// The plan for `panels` of weights, `unit` of which (one, or two of a
    /// GEGLU) stay together, on cores with `cache` bytes of second-level cache.
    pub(super) fn new<L: Left>(a: &L, panels: usize, unit: usize, threads: usize, cache: usize) -> Self {
        let (count, span) = (a.count(), a.span());
        let spans = count / span;
        let share = share_of(cache);
        // As many rows as the cache holds, whole pictures if it holds several.
        let fits = |rows: usize| {
            let held = a.scratch_bytes(rows) <= share && rows <= a.most_rows(share);
            held && a.tiles(0..rows) <= BLOCK_TILES
        };
        let rows = if fits(span) {
            (1..=spans).rev().find(|&s| fits(s * span)).unwrap_or(1) * span
        } else {
            let units = span / a.unit().min(span);
            (1..=units).rev().find(|&u| fits(u * a.unit())).unwrap_or(1) * a.unit()
        };
        let waiting = if a.chunks() > 1 { share / (rows * PANEL * 4) } else { panels };
        let cols = (waiting.max(1) / unit * unit).clamp(unit, panels);
        let plan = Self { rows, span, count, panels: cols, all_panels: panels };
        if threads > 1 { plan.shared(a.unit(), unit, threads) } else { plan }
    }

    /// Even shares for the threads. Cutting panels makes every part read all
    /// rows, cutting rows makes every part read all weights: what is read twice
    /// should be the smaller of the two.
    fn shared(mut self, row_unit: usize, panel_unit: usize, threads: usize) -> Self {
        let weights_are_larger = self.all_panels * PANEL > self.count;
        let mut parts = self.all_panels.div_ceil(self.panels);
        let even = |parts: usize| self.all_panels.div_ceil(parts).next_multiple_of(panel_unit);
        self.panels = even(parts);
        while self.blocks() < 2 * threads {
            let can_cut_rows = self.rows > self.span || self.rows > 4 * row_unit.max(2 * TILE_ROWS);
            if self.panels > panel_unit && (weights_are_larger || !can_cut_rows) {
                parts += 1;
                self.panels = even(parts);
            } else if self.rows > self.span {
                self.rows = (self.rows / self.span).div_ceil(2) * self.span;
            } else if can_cut_rows {
                self.rows = (self.rows / 2).next_multiple_of(row_unit);
            } else {
                break;
            }
        }
        self
    }

    fn row_blocks(&self) -> usize {
        if self.rows >= self.span {
            self.count.div_ceil(self.rows)
        } else {
            self.count / self.span * self.span.div_ceil(self.rows)
        }
    }

    /// Blocks in all.
    pub(super) fn blocks(&self) -> usize {
        self.row_blocks() * self.all_panels.div_ceil(self.panels)
    }

    /// Where a block lies.
    pub(super) fn place(&self, block: usize) -> Place {
        let (row, column) = (block % self.row_blocks(), block / self.row_blocks());
        let first = column * self.panels;
        Place { rows: self.rows_of(row), panels: first..self.all_panels.min(first + self.panels) }
    }

    fn rows_of(&self, block: usize) -> Range<usize> {
        if self.rows >= self.span {
            let start = block * self.rows;
            return start..self.count.min(start + self.rows);
        }
        let per_span = self.span.div_ceil(self.rows);
        let (span, part) = (block / per_span * self.span, block % per_span * self.rows);
        span + part..span + self.span.min(part + self.rows)
    }

    /// The scratch memory of a block with this many tiles.
    pub(super) fn room<L: Left>(a: &L, place: &Place, tiles: usize) -> Room {
        let left = a.scratch_bytes(place.rows.len()).next_multiple_of(64) / 4;
        let waiting = if a.chunks() > 1 { tiles.div_ceil(2) * place.panels.len() } else { RING };
        Room { left, accumulators: waiting * ACC_LEN }
    }
}

/// Panels that pairs of tiles pass together, so that they come from the
/// second-level cache from the second pair on; `panel_bytes` of each belong to
/// a chunk.
pub(super) fn panels_together(panel_bytes: usize, unit: usize, cache: usize) -> usize {
    (cache / 32 * 5 / panel_bytes.max(1) / unit * unit).max(unit)
}

/// The bytes of a panel's run that the `pair`th of `pairs` brings nearer: all
/// pairs together bring all of it.
#[inline(always)]
pub(super) fn brought_ahead(run: &Run, pair: usize, pairs: usize) -> (usize, usize) {
    let lines = run.steps * LINES;
    let share = lines * pair / pairs..lines * (pair + 1) / pairs;
    (run.b + share.start * 64, share.len())
}

/// Chunks of plain rows, in steps of 32 values, as even as they can be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunks {
    pub(super) steps: usize,
    pub(super) chunks: usize,
}

impl Chunks {
    pub(super) fn of(k: usize) -> Self {
        let steps = k.div_ceil(TILE_K);
        Self { steps, chunks: steps.div_ceil(CHUNK_STEPS).max(1) }
    }

    /// The steps of a chunk.
    pub(super) fn range(self, chunk: usize) -> Range<usize> {
        chunk * self.steps / self.chunks..(chunk + 1) * self.steps / self.chunks
    }

    /// The most steps of any chunk.
    pub(super) fn longest(self) -> usize {
        self.steps.div_ceil(self.chunks)
    }
}

#[cfg(test)]
pub(crate) mod tests;
