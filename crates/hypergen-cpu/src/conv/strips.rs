//! Pictures as tiles load them: a strip of output rows' worth of input, with
//! its border of zeros, laid out in the thread's scratch memory. Each input
//! value is copied once (or once for each kernel column, see below), not once
//! for each of the nine windows that it is part of; a tile of a window is then
//! the same strip loaded from another address.
//!
//! Sixteen pixels of a tile must lie at equal distances. Where the picture's
//! width is a multiple of 16, tiles stay within a line, and lines have their
//! border beside them. Elsewhere tiles run across lines, so lines must follow
//! one another without a border: there is then a copy for each column of the
//! kernel, shifted, with the border's zeros in it.

use std::ops::Range;

use half::bf16;

use super::{ConvShape, nearest};
use crate::gemm::TILE_K;
use crate::gemm::amx::Run;
use crate::gemm::plan::{BLOCK_TILES, Left, MAX_RUNS, Order, Spot};
use crate::simd::Simd;

/// Bytes of a panel's step.
const STEP_BYTES: usize = 2048;
/// Rows of a tile.
const TILE_ROWS: usize = 16;

/// Channels of a chunk at most, in steps, by measurement. Accumulators are
/// carried from chunk to chunk, which is dear where pictures are large; where
/// there are a thousand channels and more, pictures are small, and shorter
/// chunks let weights arrive before they are needed.
fn chunk_steps(steps: usize, taps: usize) -> usize {
    match (steps, taps) {
        (40.., _) => 12,
        (_, ..=4) => 20,
        _ => 16,
    }
}

/// A picture laid out strip by strip.
pub(super) struct Strips<'a> {
    x: &'a [bf16],
    shape: ConvShape,
    /// Whether tiles stay within a line.
    within_lines: bool,
    /// Channels in steps, and the chunks that they are cut into.
    steps: usize,
    chunks: usize,
}

impl<'a> Strips<'a> {
    /// `None` where channels do not fill whole steps or the window is huge.
    pub(super) fn new(x: &'a [bf16], shape: ConvShape) -> Option<Self> {
        let taps = shape.kernel_h * shape.kernel_w;
        let fits = shape.in_c > 0 && shape.in_c.is_multiple_of(TILE_K) && taps > 0 && taps <= MAX_RUNS;
        if !fits || shape.batch * shape.out_h * shape.out_w == 0 {
            return None;
        }
        let steps = shape.in_c / TILE_K;
        let within_lines = shape.out_w.is_multiple_of(TILE_ROWS);
        Some(Self { x, shape, within_lines, steps, chunks: steps.div_ceil(chunk_steps(steps, taps)) })
    }

    /// Values from one pixel of a strip to the next: the longest chunk.
    fn pixel(&self) -> usize {
        self.steps.div_ceil(self.chunks) * TILE_K
    }

    fn chunk(&self, chunk: usize) -> Range<usize> {
        chunk * self.steps / self.chunks..(chunk + 1) * self.steps / self.chunks
    }

    /// Pixels of a strip's line, and lines of a strip for `lines` of output.
    fn strip(&self, lines: usize) -> (usize, usize) {
        let s = &self.shape;
        if self.within_lines {
            ((s.out_w - 1) * s.stride + s.kernel_w, (lines - 1) * s.stride + s.kernel_h)
        } else {
            (s.out_w, lines + (s.kernel_h - 1) / s.stride)
        }
    }

    /// Strips for a picture: one, or one for each kernel column and each kernel
    /// line that falls between the lines of the others.
    fn phases(&self) -> (usize, usize) {
        if self.within_lines {
            (1, 1)
        } else {
            (self.shape.stride.min(self.shape.kernel_h), self.shape.kernel_w)
        }
    }

    /// Values that a picture's strips take, with what the last tile reads beyond.
    fn picture_len(&self, lines: usize) -> usize {
        let (width, height) = self.strip(lines);
        let (rows, columns) = self.phases();
        let beyond = if self.within_lines { 0 } else { TILE_ROWS };
        (rows * columns * width * height + beyond) * self.pixel()
    }

    /// Lines of output in each picture of a block, and its pictures.
    fn extent(&self, rows: usize) -> (usize, usize) {
        let lines = rows.min(self.span()) / self.shape.out_w;
        (lines, rows.div_ceil(self.span()))
    }

    /// Fills one strip of one picture: line `i` from the enlarged input's line
    /// `top + i * step_y`, pixel `j` from `left + j * step_x`.
    ///
    /// # Safety
    /// The machine has the set of `S`; `to` has room for the strip.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "a strip's place is that many numbers")]
    unsafe fn fill<S: Simd>(
        &self,
        picture: usize,
        channels: Range<usize>,
        (top, step_y, height): (isize, usize, usize),
        (left, step_x, width): (isize, usize, usize),
        to: *mut bf16,
    ) {
        let s = &self.shape;
        let pixel = self.pixel();
        let whole = channels.len() == pixel && pixel == s.in_c && step_x == 1 && s.up_w == s.in_w;
        // Pixels of the strip that lie inside the picture.
        let inside = |at: isize, step: usize, count: usize, size: usize| {
            let first = if at < 0 { at.unsigned_abs().div_ceil(step) } else { 0 };
            let past = if size as isize > at { (size as isize - at) as usize } else { 0 };
            let end = past.div_ceil(step).min(count);
            first.min(end)..end
        };
        let lines = inside(top, step_y, height, s.up_h);
        let columns = inside(left, step_x, width, s.up_w);
        // SAFETY: lines and columns are inside the enlarged picture, whose
        // source is inside the stored one; `to` has room.
        unsafe {
            for i in 0..height {
                let line = to.add(i * width * pixel);
                if !lines.contains(&i) || columns.is_empty() {
                    zero(line, width * pixel);
                    continue;
                }
                let iy = nearest((top + (i * step_y) as isize) as usize, s.in_h, s.up_h);
                let from = self.x.as_ptr().add((picture * s.in_h + iy) * s.in_w * s.in_c + channels.start);
                zero(line, columns.start * pixel);
                zero(line.add(columns.end * pixel), (width - columns.end) * pixel);
                if whole {
                    let first = (left + columns.start as isize) as usize;
                    let values = columns.len() * pixel;
                    std::ptr::copy_nonoverlapping(
                        from.add(first * pixel),
                        line.add(columns.start * pixel),
                        values,
                    );
                    continue;
                }
                for j in columns.clone() {
                    let ix = nearest((left + (j * step_x) as isize) as usize, s.in_w, s.up_w);
                    copy_pixel::<S>(from.add(ix * s.in_c), line.add(j * pixel), channels.len());
                }
            }
        }
    }
}

/// # Safety
/// `len` values are writable.
#[inline(always)]
unsafe fn zero(to: *mut bf16, len: usize) {
    // SAFETY: the caller's contract; all bits zero is zero.
    unsafe { std::ptr::write_bytes(to, 0, len) };
}

/// Copies a pixel's channels, a whole number of steps, without the call that a
/// copy of unknown length makes.
///
/// # Safety
/// The machine has the set of `S`, and `len` values are readable and writable.
#[inline(always)]
unsafe fn copy_pixel<S: Simd>(from: *const bf16, to: *mut bf16, len: usize) {
    for i in (0..len).step_by(TILE_K) {
        // SAFETY: the caller's contract.
        unsafe {
            to.add(i).cast::<[u64; 8]>().write_unaligned(from.add(i).cast::<[u64; 8]>().read_unaligned());
        }
    }
}

impl Left for Strips<'_> {
    fn count(&self) -> usize {
        self.shape.batch * self.span()
    }
    fn unit(&self) -> usize {
        let width = self.shape.out_w;
        // Whole tiles, unless a block would then have too many of them: a few
        // rows of its last tile are the smaller waste.
        let whole = if self.within_lines { 1 } else { TILE_ROWS >> width.trailing_zeros().min(4) };
        let lines = whole.min(BLOCK_TILES * TILE_ROWS / width).max(1);
        (width * lines).min(self.span())
    }
    fn span(&self) -> usize {
        self.shape.out_h * self.shape.out_w
    }
    fn most_rows(&self, _: usize) -> usize {
        usize::MAX
    }
    fn scratch_bytes(&self, rows: usize) -> usize {
        let (lines, pictures) = self.extent(rows);
        pictures * self.picture_len(lines) * 2
    }
    fn order(&self) -> Order {
        Order::PanelsOuter
    }
    fn chunks(&self) -> usize {
        self.chunks
    }
    fn stride(&self) -> usize {
        let step = if self.within_lines { self.shape.stride } else { 1 };
        step * self.pixel() * 2
    }
    fn runs(&self, rows: usize, chunk: usize, runs: &mut [Run; MAX_RUNS]) -> usize {
        let s = &self.shape;
        let steps = self.chunk(chunk);
        let (width, height) = self.strip(self.extent(rows).0);
        let taps = s.kernel_h * s.kernel_w;
        for (tap, run) in runs.iter_mut().enumerate().take(taps) {
            let (i, j) = (tap / s.kernel_w, tap % s.kernel_w);
            let pixels = if self.within_lines {
                i * width + j
            } else {
                ((i % s.stride) * s.kernel_w + j) * width * height + i / s.stride * width
            };
            let b = (tap * self.steps + steps.start) * STEP_BYTES;
            *run = Run { a: pixels * self.pixel() * 2, b, steps: steps.len() };
        }
        taps
    }
    #[inline(always)]
    unsafe fn lay_out<S: Simd>(&self, rows: Range<usize>, chunk: usize, scratch: *mut bf16) {
        let s = &self.shape;
        let (lines, pictures) = self.extent(rows.len());
        let (width, height) = self.strip(lines);
        let channels = self.chunk(chunk);
        let channels = channels.start * TILE_K..channels.end * TILE_K;
        let first_line = rows.start % self.span() / s.out_w;
        let top = (first_line * s.stride) as isize - s.pad_top as isize;
        let left = -(s.pad_left as isize);
        for p in 0..pictures {
            let picture = rows.start / self.span() + p;
            // SAFETY: scratch has room for each picture's strips.
            unsafe {
                let to = scratch.add(p * self.picture_len(lines));
                if self.within_lines {
                    self.fill::<S>(picture, channels.clone(), (top, 1, height), (left, 1, width), to);
                    continue;
                }
                let (phases, columns) = self.phases();
                for i in 0..phases {
                    for j in 0..columns {
                        let to = to.add((i * columns + j) * width * height * self.pixel());
                        let vertical = (top + i as isize, s.stride, height);
                        let horizontal = (left + j as isize, s.stride, width);
                        self.fill::<S>(picture, channels.clone(), vertical, horizontal, to);
                    }
                }
            }
        }
    }
    fn spots(&self, rows: Range<usize>, scratch: *const bf16, mut put: impl FnMut(Spot)) {
        let s = &self.shape;
        let (lines, pictures) = self.extent(rows.len());
        let (width, _) = self.strip(lines);
        for p in 0..pictures {
            let base = scratch.wrapping_add(p * self.picture_len(lines));
            let first = rows.start + p * self.span();
            // Stretches of output within which pixels lie at equal distances.
            let (stretches, len) = if self.within_lines { (lines, s.out_w) } else { (1, lines * s.out_w) };
            for y in 0..stretches {
                for x in (0..len).step_by(TILE_ROWS) {
                    let pixels = if self.within_lines { (y * width + x) * s.stride } else { x };
                    put(Spot {
                        a: base.wrapping_add(pixels * self.pixel()),
                        row: first + y * len + x,
                        rows: TILE_ROWS.min(len - x),
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
