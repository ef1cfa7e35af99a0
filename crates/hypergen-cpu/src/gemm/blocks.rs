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
    // Values and gates of a GEGLU stay together.
    let unit = output.unit();
    let (block_rows, block_panels) = cut(m, panels, tile_rows, unit, cpu.threads());
    let row_blocks = m.div_ceil(block_rows);
    let panel_blocks = panels.div_ceil(block_panels);
    cpu.parallel(row_blocks * panel_blocks, |i| {
        let (r, p) = (i % row_blocks * block_rows, i / row_blocks * block_panels);
        let rows = r..m.min(r + block_rows);
        let panels = p..panels.min(p + block_panels);
        let accumulators = rows.len().next_multiple_of(tile_rows) * panels.len() * PANEL;
        let packed = rows.len().next_multiple_of(tile_rows) * ROW_BYTES / 4;
        let block = Block { a, w, output, rows, panels };
        with_scratch(accumulators + packed, |scratch| {
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

/// Rows and panels of a block: the largest that the caches hold, made smaller
/// until there are enough for all threads.
fn cut(m: usize, panels: usize, tile_rows: usize, unit: usize, threads: usize) -> (usize, usize) {
    let mut rows = (BLOCK_ROWS / tile_rows * tile_rows).min(m.next_multiple_of(tile_rows));
    let mut cols = BLOCK_PANELS.min(panels);
    if threads == 1 {
        return (rows, cols);
    }
    let blocks = |rows: usize, cols: usize| m.div_ceil(rows) * panels.div_ceil(cols);
    while blocks(rows, cols) < BLOCKS_PER_THREAD * threads {
        if rows > 4 * tile_rows || (cols == unit && rows > tile_rows) {
            rows = (rows / 2).next_multiple_of(tile_rows);
        } else if cols > unit {
            cols = (cols / 2).next_multiple_of(unit);
        } else {
            break;
        }
    }
    (rows, cols)
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
    use super::*;

    #[test]
    fn blocks_cover_small_outputs_with_enough_pieces() {
        for (m, panels, unit) in [(1, 40, 1), (2, 1, 1), (77, 24, 1), (8192, 10, 1), (8192, 80, 2)] {
            for tile_rows in [3, 6, 14] {
                for threads in [1, 2, 8] {
                    let (rows, cols) = cut(m, panels, tile_rows, unit, threads);
                    assert!(rows % tile_rows == 0 && cols % unit == 0 && cols > 0);
                    let enough = m.div_ceil(rows) * panels.div_ceil(cols) >= threads;
                    assert!(enough || (rows == tile_rows && cols == unit) || threads == 1);
                }
            }
        }
    }
}
