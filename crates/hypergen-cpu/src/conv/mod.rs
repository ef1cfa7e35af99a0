//! Convolution over NHWC pictures as an implicit matrix product: the rows of
//! the left operand are windows of the picture, read where they lie. No
//! unfolded copy of the picture is ever made.

mod doubled;
#[cfg(target_arch = "x86_64")]
mod strips;
mod winograd;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use crate::element::as_bf16;
#[cfg(target_arch = "x86_64")]
use crate::gemm::tiles;
use crate::gemm::{Epilogue, Finish, Output, PackedMatrix, Rows, copy_run, linear, multiply};
use crate::simd::Simd;
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

impl ConvShape {
    /// Whether the window has 3x3 taps at every pixel, the middle one over it:
    /// what the special forms of convolution are made for.
    fn is_centred_three_by_three(&self) -> bool {
        (self.kernel_h, self.kernel_w, self.stride, self.pad_top, self.pad_left) == (3, 3, 1, 1, 1)
    }
}

/// Source row or column of nearest-neighbour upsampling, as PyTorch computes
/// it: in float32, rounded down.
pub(crate) fn nearest(dst: usize, input: usize, output: usize) -> usize {
    if input == output {
        return dst;
    }
    ((dst as f32 * (input as f32 / output as f32)) as usize).min(input - 1)
}

/// The windows of all output pixels.
struct Windows<'a, T> {
    x: &'a [T],
    shape: ConvShape,
}

impl<T: Element> Windows<'_, T> {
    /// Where the input pixel for an output pixel and a kernel offset begins;
    /// `None` in the padding.
    #[inline(always)]
    fn source(&self, picture: usize, y: usize, x: usize, kh: usize, kw: usize) -> Option<usize> {
        let s = &self.shape;
        let iy = (y * s.stride + kh).checked_sub(s.pad_top).filter(|&i| i < s.up_h)?;
        let ix = (x * s.stride + kw).checked_sub(s.pad_left).filter(|&i| i < s.up_w)?;
        let (iy, ix) = (nearest(iy, s.in_h, s.up_h), nearest(ix, s.in_w, s.up_w));
        Some(((picture * s.in_h + iy) * s.in_w + ix) * s.in_c)
    }
}

impl<T: Element> Rows<T> for Windows<'_, T> {
    fn count(&self) -> usize {
        self.shape.batch * self.shape.out_h * self.shape.out_w
    }

    #[inline(always)]
    unsafe fn copy<S: Simd, E: Element>(&self, row: usize, k0: usize, len: usize, to: *mut E) {
        let s = &self.shape;
        if len == 0 {
            return;
        }
        let (picture, pixel) = (row / (s.out_h * s.out_w), row % (s.out_h * s.out_w));
        let (y, x) = (pixel / s.out_w, pixel % s.out_w);
        let (mut tap, mut c, mut done) = (k0 / s.in_c, k0 % s.in_c, 0);
        while done < len {
            let run = (s.in_c - c).min(len - done);
            // SAFETY: `source` is inside the picture, whose length was checked,
            // and `run` stays in the pixel and in what the caller asked for.
            unsafe {
                match self.source(picture, y, x, tap / s.kernel_w, tap % s.kernel_w) {
                    Some(from) => copy_run::<S, T, E>(self.x.as_ptr().add(from + c), run, to.add(done)),
                    None => std::slice::from_raw_parts_mut(to.add(done), run).fill(E::default()),
                }
            }
            done += run;
            tap += 1;
            c = 0;
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn multiply_on_tiles(&self, cpu: &Cpu, w: &PackedMatrix<bf16>, output: &Output<'_, bf16>) {
        let x = as_bf16(self.x).expect("tiles are for bfloat16");
        match strips::Strips::new(x, self.shape) {
            Some(strips) => tiles::multiply(cpu, &strips, w, output),
            None => tiles::multiply_rows(cpu, &Windows { x, shape: self.shape }, w, output),
        }
    }
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
    let s = *shape;
    assert_eq!(x.len(), s.batch * s.in_h * s.in_w * s.in_c, "conv2d: the input does not fit its shape");
    assert_eq!(w.k(), s.kernel_h * s.kernel_w * s.in_c, "conv2d: the weight does not fit the window");
    assert!(!w.is_geglu(), "conv2d: the weight is packed for geglu");
    let pointwise = (s.kernel_h, s.kernel_w, s.stride, s.pad_top, s.pad_left) == (1, 1, 1, 0, 0);
    if pointwise && (s.in_h, s.in_w) == (s.out_h, s.out_w) && (s.in_h, s.in_w) == (s.up_h, s.up_w) {
        return linear(cpu, x, w, epilogue, out);
    }
    assert!(s.stride > 0, "conv2d: a stride of zero");
    let reads = s.up_h > 0 && s.up_w > 0 && x.is_empty() && w.k() > 0;
    assert!(!reads || s.batch == 0, "conv2d: an empty picture cannot be enlarged");
    if doubled::applies(&s, epilogue) {
        return doubled::conv2d(cpu, x, &s, w, epilogue, out);
    }
    if winograd::applies::<T>(&s, w.n()) {
        return winograd::conv2d(cpu, x, &s, w, epilogue, out);
    }
    let windows = Windows { x, shape: s };
    let output = Output::new(out, windows.count(), w.n(), Finish::Plain(epilogue));
    multiply(cpu, &windows, w, &output);
}
