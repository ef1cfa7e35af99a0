//! Winograd's minimal filtering for 3x3 windows in float32, F(2x2, 3x3) of
//! Lavin and Gray (2015, arXiv 1509.09308): four outputs from 16 products for
//! each channel instead of 36. Squares of 4x4 inputs are transformed, as are
//! the weights; in between are 16 matrix products, one for each place of a
//! square, by the microkernel that all of float32 uses.
//!
//! It is for vectors, where multiply-adds are the limit, and for float32, whose
//! digits suffice: errors are those of the plain sum. Transformed weights are
//! sixteen ninths as large and lie beside the others, made when a picture first
//! needs them. So it deliberately leaves small pictures and large weights
//! alone: there the memory would be more than the arithmetic is worth.

use std::ops::Range;

use super::ConvShape;
use crate::gemm::vector::{Float, Operands, ROW_BYTES, Registers, tile};
use crate::gemm::{Epilogue, Finish, Output, PANEL, PackedMatrix};
use crate::scratch::with_scratch;
use crate::simd::portable::Portable;
use crate::{Cpu, Element, ElementKind, Isa};

/// Places of a square.
const PLACES: usize = 16;
/// Values from one square's transformed channels to the next one's.
const PITCH: usize = ROW_BYTES / 4;
/// Squares of a block at most: with a chunk of 256 channels 0.9 MB.
const SQUARES: usize = 56;
/// Panels of a block at most, whose sums take 0.5 MB beside that.
const PANELS: usize = 4;
/// Pixels of a picture from which on this is worth the memory. It must not
/// depend on the batch: bytes would, too.
const LEAST_PIXELS: usize = 32 * 32;

/// Weights of an input and an output channel, at most: 80 MiB transformed.
const MOST_WEIGHTS: usize = (80 << 20) / (PLACES * size_of::<f32>());

/// Transforms three taps to four places: `G` of the paper.
const TAPS: [[f32; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];

/// Whether [`conv2d`] computes this.
pub(super) fn applies<T: Element>(s: &ConvShape, n: usize) -> bool {
    let same = (s.in_h, s.in_w) == (s.up_h, s.up_w) && (s.in_h, s.in_w) == (s.out_h, s.out_w);
    let large = s.in_h * s.in_w >= LEAST_PIXELS && s.in_c >= PANEL && n >= PANEL;
    let worth = same && large && s.in_c * n <= MOST_WEIGHTS;
    T::KIND == ElementKind::F32 && s.is_centred_three_by_three() && worth
}

/// As [`super::conv2d`], for what [`applies`]; lengths are checked there.
pub(super) fn conv2d<T: Element>(
    cpu: &Cpu,
    x: &[T],
    s: &ConvShape,
    w: &PackedMatrix<T>,
    epilogue: &Epilogue<'_, T>,
    out: &mut [T],
) {
    let output = Output::new(out, s.batch * s.in_h * s.in_w, w.n(), Finish::Plain(epilogue));
    let w = w.winograd(|| w.with_sums(cpu, s.in_c, &combinations()));
    let plan = Plan::new(s, w.panels(), cpu.threads());
    cpu.parallel(plan.blocks(), |i| {
        let (squares, panels) = plan.place(i);
        let block = Block { x, shape: s, w, output: &output, squares, panels };
        with_scratch(ROOM, |scratch| {
            // SAFETY: `Cpu` only names sets that the machine has; scratch is
            // long enough; blocks do not overlap.
            unsafe {
                match cpu.isa() {
                    Isa::Portable => block.run::<Portable>(scratch),
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => x86::avx2(&block, scratch),
                    #[cfg(target_arch = "x86_64")]
                    _ => x86::avx512(&block, scratch),
                    #[cfg(not(target_arch = "x86_64"))]
                    _ => block.run::<Portable>(scratch),
                }
            }
        });
    });
}

/// Floats of scratch memory of a block: transformed squares, their sums, and
/// two lines of outputs.
const ROOM: usize = PLACES * SQUARES * (PITCH + PANELS * PANEL) + 4 * SQUARES * PANEL;

/// How the squares of all pictures and the panels are cut into blocks.
struct Plan {
    squares: usize,
    panels: usize,
    /// Squares of a block.
    each: usize,
}

impl Plan {
    fn new(s: &ConvShape, panels: usize, threads: usize) -> Self {
        let squares = s.batch * s.in_h.div_ceil(2) * s.in_w.div_ceil(2);
        let each = squares.div_ceil(squares.div_ceil(SQUARES).max(4 * threads)).clamp(1, SQUARES);
        Self { squares, panels, each }
    }

    /// Blocks in all.
    fn blocks(&self) -> usize {
        self.squares.div_ceil(self.each) * self.panels.div_ceil(PANELS)
    }

    /// Squares and panels of a block.
    fn place(&self, block: usize) -> (Range<usize>, Range<usize>) {
        let rows = self.squares.div_ceil(self.each);
        let (square, panel) = (block % rows * self.each, block / rows * PANELS);
        (square..self.squares.min(square + self.each), panel..self.panels.min(panel + PANELS))
    }
}

/// Squares side by side in two lines of a picture.
struct Stretch {
    /// Where in the block they begin.
    first: usize,
    count: usize,
    /// The first output of their upper line, and of the lower if there is one.
    lines: [Option<usize>; 2],
    /// Outputs of each line.
    outputs: usize,
}

/// Picture, line and column of a square.
#[inline(always)]
fn place_of(s: &ConvShape, square: usize) -> (usize, usize, usize) {
    let (lines, columns) = (s.in_h.div_ceil(2), s.in_w.div_ceil(2));
    (square / columns / lines, square / columns % lines, square % columns)
}

/// Cuts the squares of a block where a line of their picture ends.
#[inline(always)]
fn stretches(s: &ConvShape, squares: Range<usize>) -> impl Iterator<Item = Stretch> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = squares.len() - first;
        if left == 0 {
            return None;
        }
        let (picture, line, column) = place_of(s, squares.start + first);
        let count = (s.in_w.div_ceil(2) - column).min(left);
        let at = |y: usize| (picture * s.in_h + y) * s.in_w + 2 * column;
        let lower = (2 * line + 1 < s.in_h).then(|| at(2 * line + 1));
        let outputs = (2 * count).min(s.in_w - 2 * column);
        let stretch = Stretch { first, count, lines: [Some(at(2 * line)), lower], outputs };
        first += count;
        Some(stretch)
    })
}

/// For each place of a square, the taps that it sums and their factors.
fn combinations() -> Vec<Vec<(usize, f32)>> {
    let place = |i: usize, j: usize| {
        let factor = |tap: usize| TAPS[i][tap / 3] * TAPS[j][tap % 3];
        (0..9).map(|tap| (tap, factor(tap))).filter(|(_, f)| *f != 0.0).collect()
    };
    (0..PLACES).map(|p| place(p / 4, p % 4)).collect()
}

/// Some squares and some panels, computed by one thread.
struct Block<'a, T: Element> {
    x: &'a [T],
    shape: &'a ConvShape,
    /// `[16][in_c]` in place of taps.
    w: &'a PackedMatrix<T>,
    output: &'a Output<'a, T>,
    squares: Range<usize>,
    panels: Range<usize>,
}

impl<T: Element> Block<'_, T> {
    /// # Safety
    /// The machine has the set of `S`; `scratch` is as long as asked for;
    /// nobody else writes these outputs.
    #[inline(always)]
    unsafe fn run<S: Registers>(&self, scratch: &mut [f32]) {
        let (inputs, rest) = scratch.split_at_mut(PLACES * SQUARES * PITCH);
        let (sums, lines) = rest.split_at_mut(PLACES * SQUARES * PANELS * PANEL);
        let count = self.squares.len();
        let in_c = self.shape.in_c;
        let chunks = in_c.div_ceil(PITCH);
        // SAFETY: the caller's contract, and the bounds of the loops.
        unsafe {
            for chunk in 0..chunks {
                let channels = chunk * in_c / chunks..(chunk + 1) * in_c / chunks;
                for (i, square) in self.squares.clone().enumerate() {
                    self.transform::<S>(square, channels.clone(), inputs.as_mut_ptr().add(i * PITCH));
                }
                for (p, panel) in self.panels.clone().enumerate() {
                    for place in 0..PLACES {
                        let b = self.w.panel(panel).as_ptr().cast::<f32>();
                        let b = b.add((place * in_c + channels.start) * PANEL);
                        for first in (0..count).step_by(S::ROWS) {
                            let row = place * SQUARES + first;
                            let a = inputs.as_ptr().add(row * PITCH);
                            let c = sums.as_mut_ptr().add((p * PLACES * SQUARES + row) * PANEL);
                            let rows = S::ROWS.min(count - first);
                            let (k, first) = (channels.len(), chunk == 0);
                            tile::<S, Float>(rows, &Operands { a, b, k, c, first });
                        }
                    }
                }
            }
            for (p, panel) in self.panels.clone().enumerate() {
                let sums = sums.as_ptr().add(p * PLACES * SQUARES * PANEL);
                self.finish::<S>(sums, panel, lines);
            }
        }
    }

    /// Writes some channels of a transformed square, places [`SQUARES`] rows apart.
    ///
    /// # Safety
    /// As for `run`; `to` is the square's row of the first place.
    #[inline(always)]
    unsafe fn transform<S: Registers>(&self, square: usize, channels: Range<usize>, to: *mut f32) {
        let s = self.shape;
        let (picture, line, column) = place_of(s, square);
        let mut pixels = [std::ptr::null::<T>(); PLACES];
        for (i, pixel) in pixels.iter_mut().enumerate() {
            let (y, x) = (2 * line + i / 4, 2 * column + i % 4);
            if (1..=s.in_h).contains(&y) && (1..=s.in_w).contains(&x) {
                let at = (picture * s.in_h + y - 1) * s.in_w + x - 1;
                *pixel = self.x[at * s.in_c + channels.start..].as_ptr();
            }
        }
        // SAFETY: pixels have `channels.len()` values, as have rows of `to`.
        unsafe {
            for c in (0..channels.len()).step_by(S::LANES) {
                let lanes = S::LANES.min(channels.len() - c);
                let mut d = [S::splat(0.0); PLACES];
                for (d, pixel) in d.iter_mut().zip(pixels) {
                    if !pixel.is_null() {
                        let from = pixel.add(c);
                        *d = if lanes == S::LANES { S::load(from) } else { S::load_part(from, lanes) };
                    }
                }
                for j in 0..4 {
                    transform_four::<S>(&mut d, [j, 4 + j, 8 + j, 12 + j]);
                }
                for i in 0..4 {
                    transform_four::<S>(&mut d, [4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]);
                }
                for (place, d) in d.into_iter().enumerate() {
                    let to = to.add(place * SQUARES * PITCH + c);
                    if lanes == S::LANES {
                        S::store_f32(to, d);
                    } else {
                        S::store_part(to, d, lanes);
                    }
                }
            }
        }
    }

    /// Makes outputs of a panel's sums, `[16][SQUARES][32]`. `lines` is room
    /// for two lines of outputs.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn finish<S: Registers>(&self, sums: *const f32, panel: usize, lines: &mut [f32]) {
        let lines = lines.as_mut_ptr();
        for stretch in stretches(self.shape, self.squares.clone()) {
            // SAFETY: the caller's contract; two lines of `2 * count` rows fit.
            unsafe {
                for i in 0..stretch.count {
                    let sums = sums.add((stretch.first + i) * PANEL);
                    outputs_of_square::<S>(sums, lines.add(2 * i * PANEL));
                }
                for (half, row) in stretch.lines.into_iter().enumerate() {
                    if let Some(row) = row {
                        let from = lines.add(half * 2 * SQUARES * PANEL);
                        self.output.tile::<S>(from, std::ptr::null(), row, stretch.outputs, panel);
                    }
                }
            }
        }
    }
}

/// The four outputs of a square, for all columns of a panel: two rows at `to`,
/// and two [`SQUARES`] pairs of rows further on.
///
/// # Safety
/// The machine has the set of `S`; the sums are there, and `to` has room.
#[inline(always)]
unsafe fn outputs_of_square<S: Registers>(sums: *const f32, to: *mut f32) {
    // SAFETY: the caller's contract.
    unsafe {
        for column in (0..PANEL).step_by(S::LANES) {
            // Only pointers: vectors that a closure returns would go through memory.
            let at = |place: usize| sums.wrapping_add(place * SQUARES * PANEL + column);
            // Over the lines of the square, then over its columns.
            let mut lines = [[S::splat(0.0); 4]; 2];
            let [upper, lower] = &mut lines;
            for (j, (upper, lower)) in upper.iter_mut().zip(lower).enumerate() {
                let (a, b) = (S::load_f32(at(j)), S::load_f32(at(4 + j)));
                let (c, d) = (S::load_f32(at(8 + j)), S::load_f32(at(12 + j)));
                *upper = S::add(S::add(a, b), c);
                *lower = S::sub(S::sub(b, c), d);
            }
            for (i, [a, b, c, d]) in lines.into_iter().enumerate() {
                let to = to.add(i * 2 * SQUARES * PANEL + column);
                S::store_f32(to, S::add(S::add(a, b), c));
                S::store_f32(to.add(PANEL), S::sub(S::sub(b, c), d));
            }
        }
    }
}

/// Four values of a line or column of a square, transformed in place.
///
/// # Safety
/// The machine has the set of `S`.
#[inline(always)]
unsafe fn transform_four<S: Registers>(d: &mut [S::V; PLACES], at: [usize; 4]) {
    let [a, b, c, e] = at.map(|i| d[i]);
    // SAFETY: the caller's contract.
    unsafe {
        d[at[0]] = S::sub(a, c);
        d[at[1]] = S::add(b, c);
        d[at[2]] = S::sub(c, b);
        d[at[3]] = S::sub(b, e);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Block;
    use crate::Element;
    use crate::simd::avx2::Avx2;
    use crate::simd::avx512::Avx512;

    /// # Safety
    /// As for [`Block::run`], and the machine has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2<T: Element>(block: &Block<'_, T>, scratch: &mut [f32]) {
        // SAFETY: by this function's contract.
        unsafe { block.run::<Avx2>(scratch) }
    }

    /// # Safety
    /// As for [`Block::run`], and the machine has AVX-512 F, BW, VL and DQ.
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")]
    pub(super) unsafe fn avx512<T: Element>(block: &Block<'_, T>, scratch: &mut [f32]) {
        // SAFETY: by this function's contract.
        unsafe { block.run::<Avx512<false>>(scratch) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::gemm::vector::computed_rows;

    fn shape(batch: usize, h: usize, w: usize) -> ConvShape {
        ConvShape {
            batch,
            in_h: h,
            in_w: w,
            in_c: PANEL,
            up_h: h,
            up_w: w,
            kernel_h: 3,
            kernel_w: 3,
            stride: 1,
            pad_top: 1,
            pad_left: 1,
            out_h: h,
            out_w: w,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn squares_cover_every_output_once(
            batch in 1..=3_usize, h in 1..=300_usize, w in prop_oneof![1..=70_usize, 1..=2100_usize],
            panels in 1..=30_usize, threads in 1..=64_usize,
        ) {
            let s = shape(batch, h, w);
            let plan = Plan::new(&s, panels, threads);
            let mut covered = vec![0_u8; batch * h * w];
            let (mut square, mut panel) = (0, 0);
            for i in 0..plan.blocks() {
                let (squares, columns) = plan.place(i);
                prop_assert!(squares.start == square && columns.start == panel);
                prop_assert!((1..=SQUARES).contains(&squares.len()) && (1..=PANELS).contains(&columns.len()));
                square = squares.end % plan.squares;
                if square == 0 {
                    panel = columns.end;
                }
                if columns.start > 0 {
                    continue;
                }
                for stretch in stretches(&s, squares.clone()) {
                    prop_assert!(stretch.first + stretch.count <= squares.len());
                    for row in stretch.lines.into_iter().flatten() {
                        covered[row..row + stretch.outputs].iter_mut().for_each(|times| *times += 1);
                    }
                }
            }
            prop_assert_eq!((square, panel), (0, panels));
            prop_assert!(covered.iter().all(|&times| times == 1));
        }
    }

    /// A microkernel may compute more rows than there are squares left, but
    /// none beyond the room for a place.
    #[test]
    fn no_microkernel_leaves_its_place() {
        for most in [3, 6, 14] {
            for count in 1..=SQUARES {
                for first in (0..count).step_by(most) {
                    let rows = computed_rows(most.min(count - first), most);
                    assert!(first + rows <= SQUARES, "{count} squares, {most} rows at once");
                }
            }
        }
    }
}
