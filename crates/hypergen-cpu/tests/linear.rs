//! `linear` and `geglu` against the oracle: every instruction set of this
//! machine, awkward sizes, every epilogue, and the promise that bytes depend
//! neither on the batch nor on the threads. No timing.

mod common;

use common::{Extras, Numbers, Placed, assert_close, assert_close_scaled, bits, copy, cpu, pack, sets};
use half::bf16;
use hypergen_cpu::{AlignedVec, Element, Epilogue, Isa, PackedMatrix, geglu, linear, reference};

fn check_linear<T: Element>(m: usize, n: usize, k: usize, all_epilogues: bool) {
    let mut numbers = Numbers::new((m * 1000 + n * 100 + k) as u64);
    let (a, w) = (numbers.take::<T>(m * k), numbers.take::<T>(n * k));
    let extras = Extras::<T>::new(m, n, &mut numbers);
    let epilogues = extras.epilogues();
    let epilogues = if all_epilogues { &epilogues[..] } else { &epilogues[epilogues.len() - 1..] };
    for (i, epilogue) in epilogues.iter().enumerate() {
        let mut want = reference::linear(&a, &w, n, k, epilogue);
        // Without values the oracle cannot tell the number of rows.
        want.resize(if k == 0 { 0 } else { m * n }, 0.0);
        for &isa in sets() {
            let cpu = cpu(isa, 2);
            let packed = pack(&cpu, &w, n, k);
            // Aligned rows take another way through the kernels than unaligned ones.
            for aligned in [true, false] {
                let a = Placed::new(&a, aligned);
                let mut out = vec![T::from_f32(f32::NAN); m * n];
                linear(&cpu, a.get(), &packed, epilogue, &mut out);
                if k > 0 {
                    assert_close(&out, &want, k, &format!("{isa}, {m}x{k}x{n}, epilogue {i}"));
                }
            }
        }
    }
}

#[test]
fn awkward_shapes_match_the_oracle() {
    for m in [0, 1, 3, 15, 17, 63] {
        for n in [0, 1, 3, 15, 17, 63] {
            for k in [1, 3, 15, 17, 63] {
                check_linear::<f32>(m, n, k, false);
                check_linear::<bf16>(m, n, k, false);
            }
        }
    }
}

#[test]
fn larger_and_prime_shapes_match_the_oracle() {
    for (m, n, k) in [
        (1, 320, 1280),
        (2, 97, 769),
        (77, 64, 257),
        (131, 101, 67),
        (64, 320, 320),
        (33, 32, 1031),
        (257, 40, 64),
    ] {
        check_linear::<f32>(m, n, k, false);
        check_linear::<bf16>(m, n, k, false);
    }
}

#[test]
fn every_epilogue_matches_the_oracle() {
    for (m, n, k) in [(37, 45, 20), (32, 64, 64), (5, 33, 96)] {
        check_linear::<f32>(m, n, k, true);
        check_linear::<bf16>(m, n, k, true);
    }
}

#[test]
fn without_inputs_the_epilogue_alone_remains() {
    for &isa in sets() {
        let cpu = cpu(isa, 1);
        let packed = PackedMatrix::<f32>::pack(&cpu, 5, 0, |_, _| {});
        let mut out = vec![f32::NAN; 15];
        let bias = [1.0, 2.0, 3.0, 4.0, 5.0];
        linear(&cpu, &[], &packed, &Epilogue { bias: Some(&bias), ..Epilogue::default() }, &mut out);
        assert_eq!(out, [bias, bias, bias].concat(), "{isa}");
    }
}

fn check_geglu<T: Element>(m: usize, h: usize, k: usize) {
    let mut numbers = Numbers::new((m + h + k) as u64);
    let (a, w) = (numbers.take::<T>(m * k), numbers.take::<T>(2 * h * k));
    let bias = numbers.take::<f32>(2 * h);
    for bias in [None, Some(bias.as_slice())] {
        let want = reference::geglu(&a, &w, h, k, bias);
        for &isa in sets() {
            let cpu = cpu(isa, 2);
            let packed = PackedMatrix::<T>::pack_geglu(&cpu, 2 * h, k, |i, row| copy(&w[i * k..][..k], row));
            let mut out = vec![T::from_f32(f32::NAN); m * h];
            geglu(&cpu, &a, &packed, bias, &mut out);
            // Errors of gate and value are each multiplied by the other, which
            // may be as large as sqrt(k).
            assert_close_scaled(&out, &want, k, (k as f32).sqrt(), &format!("{isa}, geglu {m}x{k}x{h}"));
        }
    }
}

#[test]
fn geglu_matches_the_oracle() {
    for (m, h, k) in
        [(0, 3, 5), (1, 1, 1), (3, 17, 15), (17, 32, 63), (40, 70, 64), (65, 96, 320), (9, 160, 129)]
    {
        check_geglu::<f32>(m, h, k);
        check_geglu::<bf16>(m, h, k);
    }
}

fn check_invariance<T: Element>(m: usize, n: usize, k: usize) {
    let mut numbers = Numbers::new(7);
    let mut a = AlignedVec::<T>::zeroed(m * k);
    a.as_mut_slice().copy_from_slice(&numbers.take::<T>(m * k));
    let a = a.as_slice();
    let w = numbers.take::<T>(n * k);
    let bias = numbers.take::<f32>(n);
    let epilogue = Epilogue { bias: Some(&bias), ..Epilogue::default() };
    for &isa in sets() {
        let one = cpu(isa, 1);
        let packed = pack(&one, &w, n, k);
        let mut whole = vec![T::default(); m * n];
        linear(&one, a, &packed, &epilogue, &mut whole);
        for threads in [2, 3] {
            let mut out = vec![T::default(); m * n];
            linear(&cpu(isa, threads), a, &packed, &epilogue, &mut out);
            assert_eq!(bits(&out), bits(&whole), "{isa}: {threads} threads");
        }
        for rows in [1, 2, 7, 16, 31, 32, m / 2] {
            let mut out = vec![T::default(); m * n];
            for (a, out) in a.chunks(rows * k).zip(out.chunks_mut(rows * n)) {
                linear(&one, a, &packed, &epilogue, out);
            }
            assert_eq!(bits(&out), bits(&whole), "{isa}: {rows} rows at a time, {m}x{k}x{n}");
        }
    }
}

#[test]
fn bytes_do_not_depend_on_batch_or_threads() {
    for (m, n, k) in [(66, 40, 36), (130, 96, 320), (64, 70, 600), (50, 33, 1300)] {
        check_invariance::<f32>(m, n, k);
        check_invariance::<bf16>(m, n, k);
    }
}

#[test]
#[should_panic(expected = "the input is not [2, 8]")]
fn a_wrong_input_length_is_refused() {
    let cpu = cpu(Isa::Portable, 1);
    let packed = PackedMatrix::<f32>::pack(&cpu, 4, 8, |_, row| row.fill(1.0));
    linear(&cpu, &[0.0; 15], &packed, &Epilogue::default(), &mut [0.0; 8]);
}

#[test]
#[should_panic(expected = "residual")]
fn a_wrong_residual_length_is_refused() {
    let cpu = cpu(Isa::Portable, 1);
    let packed = PackedMatrix::<f32>::pack(&cpu, 4, 8, |_, row| row.fill(1.0));
    let epilogue = Epilogue { residual: Some(&[0.0; 7]), ..Epilogue::default() };
    linear(&cpu, &[0.0; 16], &packed, &epilogue, &mut [0.0; 8]);
}
