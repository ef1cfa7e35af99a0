//! The matrix product on vectors: cutting the output into blocks for the
//! threads, and each block into packed pieces that fit the caches.
//!
//! A block is a range of rows times a range of panels. For each stretch of
//! `k`, its rows of A are copied once into a buffer that the second-level
//! cache holds; then every panel's stretch stays in the first level while all
//! tiles of rows pass it. Stretches have a fixed length, so the order of every
//! sum is a matter of `k` alone.

use std::ops::Range;

use super::Rows;
use super::epilogue::Output;
use super::packed::{PANEL, PackedMatrix, STEP, TILE_K};
use super::vector::{Dot, Float, Microkernel, Operands, ROW_BYTES, Registers, Widening, tile};
use crate::scratch::with_scratch;
use crate::simd::{Simd, portable::Portable};
use crate::{Cpu, Element, ElementKind, Isa};

/// Rows of a block at most: their packed stretch takes 192 KiB.
const BLOCK_ROWS: usize = 192;
/// Panels of a block at most: 192 KiB of accumulators.
const BLOCK_PANELS: usize = 8;
/// Blocks for each thread that the output is cut into where it can be, so that
/// a thread that is held up does not hold up the others.
const BLOCKS_PER_THREAD: usize = 4;

/// A part of the output, computed by one thread.
pub(super) struct Block<'a, T: Element, R> {
    a: &'a R,
    w: &'a PackedMatrix<T>,
    output: &'a Output<'a, T>,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// `output = a * w^T` on vectors.
pub(super) fn multiply<T: Element, R: Rows<T>>(
    cpu: &Cpu,
    a: &R,
    w: &PackedMatrix<T>,
    output: &Output<'_, T>,
) {
    let m = a.count();
    let panels = w.panels();
    if m == 0 || panels == 0 {
        return;
    }
    let tile_rows = match cpu.isa() {
        Isa::Portable => Portable::ROWS,
        Isa::Avx2 => 6,
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16 => 14,
    };
    let plan = Plan::new(m, panels, tile_rows, output.unit(), cpu.threads());
    cpu.parallel(plan.blocks(), |i| {
        let (rows, panels) = plan.place(i);
        let room = plan.room(&rows, &panels);
        let block = Block { a, w, output, rows, panels };
        with_scratch(room, |scratch| {
            // SAFETY: `Cpu` only names sets that the machine has; scratch is
            // long enough; blocks do not overlap.
            unsafe {
                match cpu.isa() {
                    Isa::Portable => block.run::<Portable>(scratch),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => super::avx2::run(&block, scratch),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 => super::avx512::run(&block, scratch),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512Bf16 | Isa::AmxBf16 => super::avx512::run_bf16(&block, scratch),
                    #[cfg(not(target_arch = "x86_64"))]
                    _ => block.run::<Portable>(scratch),
                }
            }
        });
    });
}

/// How the output is cut: blocks, the largest that the caches hold, made
/// smaller until there are enough for all threads.
struct Plan {
    m: usize,
    all_panels: usize,
    /// Rows that a microkernel computes at once.
    tile_rows: usize,
    /// Rows of a block.
    rows: usize,
    /// Panels of a block.
    panels: usize,
}

impl Plan {
    /// Values and gates of a GEGLU, `unit` panels, stay together.
    fn new(m: usize, panels: usize, tile_rows: usize, unit: usize, threads: usize) -> Self {
        let rows = (BLOCK_ROWS / tile_rows * tile_rows).min(m.next_multiple_of(tile_rows));
        let mut plan = Self { m, all_panels: panels, tile_rows, rows, panels: BLOCK_PANELS.min(panels) };
        while threads > 1 && plan.blocks() < BLOCKS_PER_THREAD * threads {
            if plan.rows > 4 * tile_rows || (plan.panels == unit && plan.rows > tile_rows) {
                plan.rows = (plan.rows / 2).next_multiple_of(tile_rows);
            } else if plan.panels > unit {
                plan.panels = (plan.panels / 2).next_multiple_of(unit);
            } else {
                break;
            }
        }
        plan
    }

    /// Blocks in all.
    fn blocks(&self) -> usize {
        self.m.div_ceil(self.rows) * self.all_panels.div_ceil(self.panels)
    }

    /// Rows and panels of a block.
    fn place(&self, block: usize) -> (Range<usize>, Range<usize>) {
        let row_blocks = self.m.div_ceil(self.rows);
        let (row, panel) = (block % row_blocks * self.rows, block / row_blocks * self.panels);
        (row..self.m.min(row + self.rows), panel..self.all_panels.min(panel + self.panels))
    }

    /// Floats of scratch memory of a block: accumulators and packed rows, of
    /// whole tiles.
    fn room(&self, rows: &Range<usize>, panels: &Range<usize>) -> usize {
        rows.len().next_multiple_of(self.tile_rows) * (panels.len() * PANEL + ROW_BYTES / 4)
    }
}

impl<T: Element, R: Rows<T>> Block<'_, T, R> {
    /// Computes the block.
    ///
    /// # Safety
    /// The machine has the set of `S`; `scratch` holds the accumulators and
    /// the packed rows; nobody else writes these outputs.
    #[inline(always)]
    pub(super) unsafe fn run<S: Registers>(&self, scratch: &mut [f32]) {
        // SAFETY: the caller's contract.
        unsafe {
            match T::KIND {
                ElementKind::F32 => self.run_with::<S, Float>(scratch),
                ElementKind::Bf16 if S::HAS_DOT => self.run_with::<S, Dot>(scratch),
                ElementKind::Bf16 => self.run_with::<S, Widening>(scratch),
            }
        }
    }

    #[inline(always)]
    unsafe fn run_with<S: Registers, M: Microkernel<S>>(&self, scratch: &mut [f32]) {
        let k = self.w.k();
        let tiles = self.rows.len().div_ceil(S::ROWS);
        let stride = ROW_BYTES / size_of::<M::A>();
        // A multiple of 32 whatever the element, as panels of bfloat16 need.
        let stretch = stride;
        let (acc, packed) = scratch.split_at_mut(tiles * S::ROWS * PANEL * self.panels.len());
        let packed = packed.as_mut_ptr().cast::<M::A>();
        let acc = acc.as_mut_ptr();
        let tile_at = |p: usize, t: usize| (p * tiles + t) * S::ROWS * PANEL;
        let rows_of = |t: usize| S::ROWS.min(self.rows.len() - t * S::ROWS);
        // SAFETY: the caller's contract, and the bounds of the loops.
        unsafe {
            let mut k0 = 0;
            loop {
                let len = stretch.min(k - k0);
                for r in 0..self.rows.len() {
                    let to = packed.add(r * stride);
                    self.a.copy::<S, M::A>(self.rows.start + r, k0, len, to);
                    if len % 2 == 1 {
                        // The other half of the last pair.
                        *to.add(len) = M::A::default();
                    }
                }
                for (p, panel) in self.panels.clone().enumerate() {
                    let offset = if T::KIND == ElementKind::F32 { k0 * PANEL } else { k0 / TILE_K * STEP };
                    let b = self.w.panel(panel).as_ptr().add(offset).cast::<M::B>();
                    for t in 0..tiles {
                        let a = packed.add(t * S::ROWS * stride);
                        let c = acc.add(tile_at(p, t));
                        tile::<S, M>(rows_of(t), &Operands { a, b, k: len, c, first: k0 == 0 });
                    }
                }
                k0 += len;
                if k0 >= k {
                    break;
                }
            }
            let unit = self.output.unit();
            for p in (0..self.panels.len()).step_by(unit) {
                for t in 0..tiles {
                    let values = acc.add(tile_at(p, t));
                    let gates = acc.add(tile_at(p + unit - 1, t));
                    let row = self.rows.start + t * S::ROWS;
                    self.output.tile::<S>(values, gates, row, rows_of(t), self.panels.start + p);
                }
            }
        }
    }
}

/// Copies a run of values, converting where the types differ.
///
/// # Safety
/// The machine has the set of `S`, and `len` elements are readable and writable.
#[inline(always)]
pub(crate) unsafe fn copy_run<S: Simd, T: Element, E: Element>(from: *const T, len: usize, to: *mut E) {
    // SAFETY: the caller's contract; where the kinds agree so do the types.
    unsafe {
        if T::KIND == E::KIND {
            std::ptr::copy_nonoverlapping(from.cast::<E>(), to, len);
            return;
        }
        let whole = len / S::LANES * S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            S::store(to.add(i), S::load(from.add(i)));
        }
        if whole < len {
            S::store_part(to.add(whole), S::load_part(from.add(whole), len - whole), len - whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Whatever the sizes: every output is in one block, every thread has
        /// one if there are enough outputs, and a block's scratch memory is small.
        #[test]
        fn blocks_cover_the_output_once(
            m in prop_oneof![1..=300_usize, 1..=4096 * 4096_usize],
            panels in 1..=200_usize, unit in 1..=2_usize, threads in 1..=96_usize,
            tile_rows in prop::sample::select(vec![3_usize, 6, 14]),
        ) {
            let panels = panels * unit;
            let plan = Plan::new(m, panels, tile_rows, unit, threads);
            prop_assert!(plan.rows.is_multiple_of(tile_rows) && plan.panels.is_multiple_of(unit));
            let smallest = plan.rows == tile_rows && plan.panels == unit;
            prop_assert!(threads == 1 || smallest || plan.blocks() >= threads);
            let (mut row, mut panel) = (0, 0);
            for i in 0..plan.blocks() {
                let (rows, columns) = plan.place(i);
                prop_assert!(rows.start == row && columns.start == panel && !rows.is_empty() && !columns.is_empty());
                let tiles = rows.len().div_ceil(tile_rows);
                let accumulators = tiles * tile_rows * PANEL * columns.len();
                let room = plan.room(&rows, &columns);
                prop_assert!(room >= accumulators + tiles * tile_rows * ROW_BYTES / 4 && room * 4 < 1 << 20);
                row = rows.end % m;
                if row == 0 {
                    panel = columns.end;
                }
            }
            prop_assert_eq!((row, panel), (0, panels));
        }
    }
}
