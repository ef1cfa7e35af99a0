//! Convolution against the oracle: every instruction set of this machine,
//! strides, asymmetric padding, folded-in enlargement, few and odd channels,
//! and the promise that bytes depend neither on the batch nor on the threads.

mod common;

use common::{Extras, Numbers, assert_close, bits, cpu, pack, sets};
use half::bf16;
use hypergen_cpu::{AlignedVec, ConvShape, Element, Epilogue, Isa, conv2d, reference};

/// A convolution that keeps the size.
fn same(batch: usize, h: usize, w: usize, in_c: usize, kernel: usize) -> ConvShape {
    ConvShape {
        batch,
        in_h: h,
        in_w: w,
        in_c,
        up_h: h,
        up_w: w,
        kernel_h: kernel,
        kernel_w: kernel,
        stride: 1,
        pad_top: kernel / 2,
        pad_left: kernel / 2,
        out_h: h,
        out_w: w,
    }
}

/// As the UNet halves its pictures: stride 2, padding of 1 on all sides.
fn down(batch: usize, h: usize, w: usize, in_c: usize) -> ConvShape {
    ConvShape { stride: 2, out_h: h.div_ceil(2), out_w: w.div_ceil(2), ..same(batch, h, w, in_c, 3) }
}

/// As the VAE's encoder halves: padding right and below only.
fn down_asymmetric(batch: usize, h: usize, w: usize, in_c: usize) -> ConvShape {
    ConvShape { pad_top: 0, pad_left: 0, out_h: h / 2, out_w: w / 2, ..down(batch, h, w, in_c) }
}

/// Enlarged to `up_h` x `up_w` first.
fn up(batch: usize, (h, w): (usize, usize), (up_h, up_w): (usize, usize), in_c: usize) -> ConvShape {
    ConvShape { in_h: h, in_w: w, ..same(batch, up_h, up_w, in_c, 3) }
}

fn check<T: Element>(shape: ConvShape, n: usize, all_epilogues: bool) {
    check_rounded::<T>(shape, n, all_epilogues, f32::EPSILON);
}

/// With weights that are whole multiples of `unit`.
fn check_rounded<T: Element>(shape: ConvShape, n: usize, all_epilogues: bool, unit: f32) {
    let s = &shape;
    let k = s.kernel_h * s.kernel_w * s.in_c;
    let m = s.batch * s.out_h * s.out_w;
    let mut numbers = Numbers::new((m * 100 + n * 10 + k) as u64);
    let x = numbers.take::<T>(s.batch * s.in_h * s.in_w * s.in_c);
    let mut w = numbers.take::<T>(n * k);
    w.iter_mut().for_each(|w| *w = T::from_f32((w.to_f32() / unit).round() * unit));
    let extras = Extras::<T>::new(m, n, &mut numbers);
    let epilogues = extras.epilogues();
    let epilogues = if all_epilogues { &epilogues[..] } else { &epilogues[epilogues.len() - 1..] };
    for (i, epilogue) in epilogues.iter().enumerate() {
        let want = reference::conv2d(&x, s, &w, n, epilogue);
        for &isa in sets() {
            let cpu = cpu(isa, 2);
            let packed = pack(&cpu, &w, n, k);
            let mut out = vec![T::from_f32(f32::NAN); m * n];
            conv2d(&cpu, &x, s, &packed, epilogue, &mut out);
            assert_close(&out, &want, k, &format!("{isa}, {s:?} to {n}, epilogue {i}"));
        }
    }
}

fn check_both(shape: ConvShape, n: usize) {
    check::<f32>(shape, n, false);
    check::<bf16>(shape, n, false);
}

#[test]
fn three_by_three_matches_the_oracle() {
    for (h, w) in [(1, 1), (3, 3), (8, 8), (5, 17), (16, 16), (4, 33), (7, 64)] {
        for (in_c, n) in [(32, 32), (64, 40), (3, 5)] {
            check_both(same(2, h, w, in_c, 3), n);
        }
    }
}

#[test]
fn few_and_odd_channels_match_the_oracle() {
    for in_c in [1, 3, 4, 8, 15, 36, 63, 96] {
        for n in [1, 3, 4, 17] {
            check_both(same(1, 6, 7, in_c, 3), n);
        }
    }
}

#[test]
fn other_windows_match_the_oracle() {
    for shape in [
        same(2, 9, 16, 64, 1),
        same(1, 6, 6, 32, 5),
        ConvShape { kernel_w: 1, pad_left: 0, ..same(1, 5, 16, 32, 3) },
        ConvShape { kernel_h: 2, kernel_w: 4, pad_top: 1, pad_left: 2, ..same(1, 5, 16, 32, 3) },
        ConvShape { stride: 2, out_h: 4, out_w: 8, ..same(2, 8, 16, 64, 1) },
        ConvShape { stride: 3, out_h: 3, out_w: 6, ..same(1, 8, 16, 32, 3) },
    ] {
        check_both(shape, 37);
    }
}

#[test]
fn halving_and_enlarging_match_the_oracle() {
    for shape in [
        down(2, 8, 8, 32),
        down(1, 7, 33, 64),
        down(1, 8, 64, 32),
        down_asymmetric(2, 8, 8, 32),
        down_asymmetric(1, 6, 64, 36),
        up(2, (4, 4), (8, 8), 32),
        up(1, (3, 16), (6, 32), 64),
        up(1, (3, 5), (5, 9), 32),
        up(1, (3, 5), (7, 11), 4),
    ] {
        check_both(shape, 33);
    }
}

/// Weights of which four add up exactly in bfloat16: then the parts of a
/// doubling convolution have no rounding that the oracle lacks.
#[test]
fn doubling_matches_the_oracle() {
    for (shape, n) in [
        (up(2, (4, 4), (8, 8), 32), 33),
        (up(1, (3, 16), (6, 32), 64), 64),
        (up(2, (5, 32), (10, 64), 32), 32),
        (up(1, (1, 1), (2, 2), 32), 5),
        (up(1, (2, 24), (4, 48), 32), 40),
        (up(0, (4, 4), (8, 8), 32), 8),
    ] {
        check_rounded::<f32>(shape, n, true, 1.0 / 32.0);
        check_rounded::<bf16>(shape, n, true, 1.0 / 32.0);
    }
    // Channels in several chunks.
    check_rounded::<bf16>(up(1, (2, 16), (4, 32), 960), 64, true, 1.0 / 32.0);
}

/// With any weights the sums are rounded once more: an error of half a unit in
/// the last of bfloat16's 8 bits in each of `4 * in_c` weights, at random.
#[test]
fn doubling_in_bfloat16_loses_no_more_than_a_rounding() {
    let (shape, n) = (up(1, (8, 16), (16, 32), 320), 32);
    let (k, m) = (9 * shape.in_c, shape.out_h * shape.out_w);
    let mut numbers = Numbers::new(7);
    let (x, w) = (numbers.take::<bf16>(m / 4 * shape.in_c), numbers.take::<bf16>(n * k));
    let want = reference::conv2d(&x, &shape, &w, n, &Epilogue::default());
    let energy: f32 = want.iter().map(|v| v * v).sum();
    for &isa in sets() {
        let cpu = cpu(isa, 2);
        let mut out = vec![bf16::NAN; m * n];
        conv2d(&cpu, &x, &shape, &pack(&cpu, &w, n, k), &Epilogue::default(), &mut out);
        let error: f32 = out.iter().zip(&want).map(|(a, b)| (a.to_f32() - b).powi(2)).sum();
        let relative = (error / energy).sqrt();
        // Rounding the results alone gives about 1.7e-3.
        assert!(relative < 3e-3, "{isa}: {relative}");
    }
}

#[test]
fn every_epilogue_matches_the_oracle() {
    check::<f32>(same(3, 4, 16, 32, 3), 45, true);
    check::<bf16>(same(3, 4, 16, 32, 3), 45, true);
    check::<bf16>(same(3, 4, 5, 4, 3), 32, true);
}

#[test]
fn many_channels_match_the_oracle() {
    check_both(same(1, 4, 16, 320, 3), 64);
    check_both(same(2, 3, 8, 640, 3), 33);
}

/// From 32x32 on float32 goes by Winograd's minimal filtering.
#[test]
fn large_pictures_match_the_oracle() {
    for (shape, n) in [
        (same(2, 32, 32, 32, 3), 32),
        (same(1, 33, 35, 41, 3), 50),
        (same(1, 8, 129, 32, 3), 33),
        (same(1, 32, 40, 300, 3), 140),
        (same(1, 1024, 1, 32, 3), 32),
    ] {
        check::<f32>(shape, n, false);
    }
    check::<f32>(same(2, 32, 33, 36, 3), 40, true);
}

#[test]
fn nothing_in_gives_nothing_out() {
    check_both(same(0, 4, 4, 32, 3), 8);
    check_both(same(1, 0, 4, 32, 3), 8);
    check_both(same(1, 4, 4, 32, 3), 0);
}

fn check_invariance<T: Element>(shape: ConvShape, n: usize) {
    let s = &shape;
    let k = s.kernel_h * s.kernel_w * s.in_c;
    let (input, output) = (s.in_h * s.in_w * s.in_c, s.out_h * s.out_w * n);
    let mut numbers = Numbers::new(3);
    let mut x = AlignedVec::<T>::zeroed(s.batch * input);
    x.as_mut_slice().copy_from_slice(&numbers.take::<T>(s.batch * input));
    let w = numbers.take::<T>(n * k);
    let epilogue = Epilogue::default();
    for &isa in sets() {
        let one = cpu(isa, 1);
        let packed = pack(&one, &w, n, k);
        let mut whole = vec![T::default(); s.batch * output];
        conv2d(&one, x.as_slice(), s, &packed, &epilogue, &mut whole);
        for threads in [2, 3] {
            let mut out = vec![T::default(); s.batch * output];
            conv2d(&cpu(isa, threads), x.as_slice(), s, &packed, &epilogue, &mut out);
            assert_eq!(bits(&out), bits(&whole), "{isa}: {threads} threads, {s:?}");
        }
        let single = ConvShape { batch: 1, ..shape };
        for (x, whole) in x.as_slice().chunks(input).zip(whole.chunks(output)) {
            let mut out = vec![T::default(); output];
            conv2d(&one, x, &single, &packed, &epilogue, &mut out);
            assert_eq!(bits(&out), bits(whole), "{isa}: one picture at a time, {s:?}");
        }
    }
}

#[test]
fn bytes_do_not_depend_on_batch_or_threads() {
    for (shape, n) in [
        (same(3, 5, 16, 64, 3), 40),
        (same(2, 8, 8, 96, 3), 64),
        (same(2, 5, 7, 36, 3), 33),
        (same(2, 7, 32, 64, 1), 70),
        (down(3, 9, 16, 32), 32),
        (up(2, (4, 8), (8, 16), 32), 35),
        (up(2, (5, 16), (10, 32), 64), 64),
        (same(2, 8, 16, 352, 3), 32),
        (same(3, 33, 32, 33, 3), 35),
    ] {
        check_invariance::<f32>(shape, n);
        check_invariance::<bf16>(shape, n);
    }
}

#[test]
#[should_panic(expected = "the weight does not fit the window")]
fn a_wrong_weight_is_refused() {
    let cpu = cpu(Isa::Portable, 1);
    let packed = pack(&cpu, &[0.0_f32; 4 * 9], 4, 9);
    conv2d(&cpu, &[0.0; 32], &same(1, 4, 4, 2, 3), &packed, &Epilogue::default(), &mut [0.0; 64]);
}
