//! Strips of pictures: their plans for any size, and what tiles make of them,
//! with emulated tiles on any machine.

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::gemm::plan::tests::{around, check, side};
use crate::gemm::tiles::tests::emulated;
use crate::gemm::{Epilogue, Finish, Output, PackedMatrix};
use crate::testing::{Values, assert_close, cpu};
use crate::{Cpu, Isa, reference};

/// A window of `kernel` taps, which the step of `stride` takes over a padded picture.
fn shape(
    batch: usize,
    (h, w): (usize, usize),
    in_c: usize,
    kernel: (usize, usize),
    stride: usize,
) -> ConvShape {
    ConvShape {
        batch,
        in_h: h,
        in_w: w,
        in_c,
        up_h: h,
        up_w: w,
        kernel_h: kernel.0,
        kernel_w: kernel.1,
        stride,
        pad_top: kernel.0 / 2,
        pad_left: kernel.1 / 2,
        out_h: h.div_ceil(stride),
        out_w: w.div_ceil(stride),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Plans read no pixels, so pictures of any size are planned without any.
    #[test]
    fn every_size_is_planned(
        batch in 1..=3_usize, h in side(), w in side(), steps in 1..=80_usize,
        kernel in (1..=4_usize, 1..=5_usize), stride in 1..=3_usize, with in around(),
    ) {
        let shape = shape(batch, (h, w), steps * TILE_K, kernel, stride);
        let strips = Strips::new(&[], shape).expect("whole steps and a small window");
        check(&strips, kernel.0 * kernel.1 * shape.in_c, with, |_, _| false);
        // What a block cannot be smaller than fits its tiles, or is a single line.
        assert!(strips.unit() <= BLOCK_TILES * TILE_ROWS || strips.unit() == shape.out_w, "{shape:?}");
    }
}

/// What only the largest pictures have.
#[test]
fn the_widest_pictures_are_planned() {
    for w in [1080, 1081, 2056, 2064, 4088, 4095, 4096] {
        for h in [1, 8, 4096] {
            for channels in [32, 128, 512] {
                let strips = Strips::new(&[], shape(1, (h, w), channels, (3, 3), 1)).expect("a plain window");
                for with in [[1, 1, 1], [4, 2, 16], [8, 1, 70]] {
                    check(&strips, 9 * channels, with.into(), |_, _| false);
                }
            }
        }
    }
}

struct Picture {
    shape: ConvShape,
    n: usize,
    x: Vec<bf16>,
    w: Vec<bf16>,
}

impl Picture {
    fn new(shape: ConvShape, n: usize) -> Self {
        let s = &shape;
        let mut values = Values::new((s.in_h * 100 + s.in_w + n) as u64);
        let x = values.normal(s.batch * s.in_h * s.in_w * s.in_c);
        Self { shape, n, x, w: values.normal(n * s.kernel_h * s.kernel_w * s.in_c) }
    }

    fn pack(&self, cpu: &Cpu) -> PackedMatrix<bf16> {
        let k = self.w.len() / self.n;
        PackedMatrix::pack(cpu, self.n, k, |i, row| {
            row.iter_mut().zip(&self.w[i * k..]).for_each(|(to, from)| *to = from.to_f32());
        })
    }

    /// The pictures `batch` by emulated tiles.
    fn run(&self, threads: usize, batch: Range<usize>) -> Vec<bf16> {
        let cpu = cpu(Isa::Portable, threads);
        let shape = ConvShape { batch: batch.len(), ..self.shape };
        let picture = shape.in_h * shape.in_w * shape.in_c;
        let x = &self.x[batch.start * picture..batch.end * picture];
        let m = shape.batch * shape.out_h * shape.out_w;
        let mut out = vec![bf16::NAN; m * self.n];
        let epilogue = Epilogue::default();
        let output = Output::new(&mut out, m, self.n, Finish::Plain(&epilogue));
        emulated(&cpu, &Strips::new(x, shape).expect("whole steps"), &self.pack(&cpu), &output);
        out
    }

    fn check(&self) {
        let k = self.w.len() / self.n;
        let want = reference::conv2d(&self.x, &self.shape, &self.w, self.n, &Epilogue::default());
        let what = format!("{:?}", self.shape);
        let tolerance = 1e-6 * (k as f32).sqrt() + 1e-4;
        let whole = self.run(2, 0..self.shape.batch);
        assert_close(&what, &cpu(Isa::Portable, 1), &whole, &want, tolerance);
        assert!(self.run(1, 0..self.shape.batch) == whole, "threads change {what}");
        assert!(self.run(5, 0..self.shape.batch) == whole, "threads change {what}");
        let last = self.shape.batch - 1;
        let one = self.run(2, last..last + 1);
        assert!(one[..] == whole[whole.len() - one.len()..], "the batch changes {what}");
    }
}

#[test]
fn pictures_match_the_oracle() {
    for (shape, n) in [
        (shape(2, (3, 3), 32, (3, 3), 1), 32),
        (shape(2, (5, 16), 64, (3, 3), 1), 40),
        (shape(1, (7, 33), 32, (3, 3), 1), 33),
        (shape(2, (9, 16), 64, (3, 3), 2), 20),
        (shape(1, (7, 21), 32, (3, 3), 2), 32),
        (shape(1, (6, 18), 32, (2, 4), 1), 32),
        (shape(1, (8, 16), 32, (5, 5), 1), 32),
        (shape(1, (9, 20), 32, (3, 3), 3), 32),
        (shape(1, (4, 16), 704, (3, 3), 1), 64),
        (shape(1, (3, 7), 1312, (3, 3), 1), 32),
    ] {
        Picture::new(shape, n).check();
    }
}

/// Whose lines do not fit a block's tiles: 68 of them are two lines of 540
/// pixels, 129 and more are one line.
#[test]
fn wide_pictures_match_the_oracle() {
    for w in [540, 1080, 1081, 2049, 2064] {
        Picture::new(shape(1, (3, w), 32, (3, 3), 1), 32).check();
    }
}

#[test]
fn enlarged_pictures_match_the_oracle() {
    for (from, to) in [((3, 5), (7, 11)), ((4, 8), (8, 16)), ((2, 3), (5, 32))] {
        let enlarged = shape(2, to, 32, (3, 3), 1);
        Picture::new(ConvShape { in_h: from.0, in_w: from.1, ..enlarged }, 32).check();
    }
}
