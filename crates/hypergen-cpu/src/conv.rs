//! Convolution over NHWC pictures as an implicit matrix product.

use crate::gemm::{Epilogue, PackedMatrix, finish};
use crate::{Cpu, Element};

/// Geometry of a convolution. Padding is zeros; what lies right of and below
/// the picture is padded as far as `out_h` and `out_w` ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvShape {
    /// Pictures.
    pub batch: usize,
    /// Height of the stored input.
    pub in_h: usize,
    /// Width of the stored input.
    pub in_w: usize,
    /// Input channels.
    pub in_c: usize,
    /// Height after nearest-neighbour upsampling, which is folded into the
    /// reads; equal to `in_h` where there is none.
    pub up_h: usize,
    /// Width after upsampling.
    pub up_w: usize,
    /// Kernel height.
    pub kernel_h: usize,
    /// Kernel width.
    pub kernel_w: usize,
    /// Step in both directions.
    pub stride: usize,
    /// Zero rows above.
    pub pad_top: usize,
    /// Zero columns at the left.
    pub pad_left: usize,
    /// Output height.
    pub out_h: usize,
    /// Output width.
    pub out_w: usize,
}

/// Source row or column of nearest-neighbour upsampling, as PyTorch computes
/// it: in float32, rounded down.
pub(crate) fn nearest(dst: usize, input: usize, output: usize) -> usize {
    if input == output {
        return dst;
    }
    ((dst as f32 * (input as f32 / output as f32)) as usize).min(input - 1)
}

/// `out[b, out_h, out_w, n] = epilogue(conv(x[b, in_h, in_w, in_c], w))`, where
/// row `o` of `w` holds output channel `o` in the order
/// `[kernel_h, kernel_w, in_c]`. In the epilogue a row is an output pixel.
///
/// # Panics
/// When a slice's length does not fit the shape.
pub fn conv2d<T: Element>(
    cpu: &Cpu,
    x: &[T],
    shape: &ConvShape,
    w: &PackedMatrix<T>,
    epilogue: &Epilogue<'_, T>,
    out: &mut [T],
) {
    let _ = cpu;
    let s = shape;
    let n = w.n();
    for (pixel, out) in out.chunks_exact_mut(n).enumerate() {
        let (b, y, xo) = (pixel / (s.out_h * s.out_w), pixel / s.out_w % s.out_h, pixel % s.out_w);
        for (o, out) in out.iter_mut().enumerate() {
            let mut acc = 0.0;
            for kh in 0..s.kernel_h {
                for kw in 0..s.kernel_w {
                    let (iy, ix) = (y * s.stride + kh, xo * s.stride + kw);
                    if iy < s.pad_top
                        || ix < s.pad_left
                        || iy - s.pad_top >= s.up_h
                        || ix - s.pad_left >= s.up_w
                    {
                        continue;
                    }
                    let (iy, ix) =
                        (nearest(iy - s.pad_top, s.in_h, s.up_h), nearest(ix - s.pad_left, s.in_w, s.up_w));
                    let x = &x[((b * s.in_h + iy) * s.in_w + ix) * s.in_c..][..s.in_c];
                    let w = &w.row(o)[(kh * s.kernel_w + kw) * s.in_c..][..s.in_c];
                    acc += x.iter().zip(w).map(|(a, b)| a.to_f32() * b.to_f32()).sum::<f32>();
                }
            }
            *out = T::from_f32(finish(acc, pixel, o, n, epilogue));
        }
    }
}
