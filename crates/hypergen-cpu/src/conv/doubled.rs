//! The 3x3 convolution of a picture that is doubled by nearest neighbours
//! first, in four parts: one for each place of an output pixel in its square of
//! two by two. The three kernel lines of such a pixel fall on only two stored
//! lines, and so do its columns, so each part is a convolution of the stored
//! picture with a window of two by two and weights that are sums of the nine:
//! 16 products for four outputs instead of 36.
//!
//! The sums are rounded to the weights' type once, so in bfloat16 results
//! differ from those of the nine weights by as much as one more rounding does.
//! It deliberately leaves everything else to the general convolution: other
//! sizes, other windows, and epilogues that read something for each pixel.

use super::{ConvShape, Windows};
use crate::gemm::{Epilogue, Finish, Output, PackedMatrix, Square, TILE_K, multiply};
use crate::{Cpu, Element};

/// Kernel lines (or columns) that fall on each of the two stored ones: of
/// output pixels that are first in their square, and of those that are second.
const TAPS: [[&[usize]; 2]; 2] = [[&[0], &[1, 2]], [&[0, 1], &[2]]];

/// Whether [`conv2d`] computes this.
pub(super) fn applies<T>(s: &ConvShape, epilogue: &Epilogue<'_, T>) -> bool {
    let doubled = (s.up_h, s.up_w) == (2 * s.in_h, 2 * s.in_w) && (s.out_h, s.out_w) == (s.up_h, s.up_w);
    let plain = epilogue.group_bias.is_none() && epilogue.residual.is_none();
    s.is_centred_three_by_three() && doubled && plain && s.in_c.is_multiple_of(TILE_K)
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
    let parts = w.parts(|| [(0, 0), (0, 1), (1, 0), (1, 1)].map(|place| part_of(cpu, w, s.in_c, place)));
    for (i, w) in parts.iter().enumerate() {
        let (line, column) = (i / 2, i % 2);
        let shape = ConvShape {
            up_h: s.in_h,
            up_w: s.in_w,
            kernel_h: 2,
            kernel_w: 2,
            pad_top: 1 - line,
            pad_left: 1 - column,
            out_h: s.in_h,
            out_w: s.in_w,
            ..*s
        };
        let square = Square { width: s.in_w, line, column };
        let output =
            Output::in_squares(out, s.batch * s.in_h * s.in_w, w.n(), Finish::Plain(epilogue), square);
        multiply(cpu, &Windows { x, shape }, w, &output);
    }
}

/// The weights `[outputs, 2 * 2 * in_c]` of the output pixels of one place.
fn part_of<T: Element>(
    cpu: &Cpu,
    w: &PackedMatrix<T>,
    in_c: usize,
    (line, column): (usize, usize),
) -> PackedMatrix<T> {
    let mut sums = Vec::with_capacity(4);
    for lines in TAPS[line] {
        for columns in TAPS[column] {
            let taps = lines.iter().flat_map(|i| columns.iter().map(move |j| (i * 3 + j, 1.0)));
            sums.push(taps.collect::<Vec<_>>());
        }
    }
    w.with_sums(cpu, in_c, &sums)
}
