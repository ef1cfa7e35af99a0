//! Changes against what PyTorch's layout says they are, computed weight by
//! weight.

use super::*;
use crate::ops::{self, Epilogue, Window};
use crate::{Checkpoint, DType, DeviceConfig, Loader, Tensor, Weights};

/// A value for each index, in -0.5 to 0.5.
fn number(seed: usize, i: usize) -> f32 {
    let x = (seed * 7919 + i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x >> 40) as f32 / (1 << 24) as f32 - 0.5
}

fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| number(seed, i)).collect()
}

fn device() -> Device {
    Device::cpu(&DeviceConfig { threads: Some(2) }).expect("a device")
}

/// The change of every weight, `[outputs, inputs, taps]`, by definition.
fn dense(change: &Change, outputs: usize, inputs: usize, taps: usize) -> Vec<f32> {
    let k = inputs * taps;
    let product = |p: &Product, o: usize, at: usize| {
        (0..p.rank).map(|r| p.up[o * p.rank + r] * p.down[r * k + at]).sum::<f32>()
    };
    let at = |o: usize, c: usize, t: usize| match &change.delta {
        Delta::Product(p) => product(p, o, c * taps + t),
        Delta::Hadamard(p, q) => product(p, o, c * taps + t) * product(q, o, c * taps + t),
        Delta::Kronecker { left, shape: [rows, columns], right } => {
            let (height, width) = (outputs / rows, inputs / columns);
            left[o / height * columns + c / width] * right[(o % height * width + c % width) * taps + t]
        }
    };
    let mut all = vec![];
    for o in 0..outputs {
        for c in 0..inputs {
            all.extend((0..taps).map(|t| change.scale * at(o, c, t)));
        }
    }
    all
}

/// Weights after the changes, `[outputs, inputs, taps]`.
fn expected(base: &[f32], changes: &[Change], outputs: usize, inputs: usize, taps: usize) -> Vec<f32> {
    let mut sum = base.to_vec();
    for change in changes {
        let delta = dense(change, outputs, inputs, taps);
        let alone: Vec<f32> = base.iter().zip(&delta).map(|(a, b)| a + b).collect();
        let factor = |i: usize| -> f32 {
            let (of, select): (f32, Box<dyn Fn(usize) -> bool>) = match &change.magnitude {
                None => return 1.0,
                Some(Magnitude::Outputs(m)) => {
                    let o = i / (inputs * taps);
                    (m[o], Box::new(move |j| j / (inputs * taps) == o))
                }
                Some(Magnitude::Inputs(m)) => {
                    let c = i / taps % inputs;
                    (m[c], Box::new(move |j| j / taps % inputs == c))
                }
            };
            let squares = alone.iter().enumerate().filter(|(j, _)| select(*j)).map(|(_, w)| w * w);
            of / squares.sum::<f32>().sqrt()
        };
        for (i, to) in sum.iter_mut().enumerate() {
            *to += factor(i) * alone[i] - base[i];
        }
    }
    sum
}

/// One change of each kind.
fn kinds(outputs: usize, inputs: usize, taps: usize) -> Vec<Change> {
    let product = |seed: usize, rank: usize| Product {
        up: numbers(seed, outputs * rank),
        down: numbers(seed + 1, rank * inputs * taps),
        rank,
    };
    let plain = |delta| Change { delta, scale: 0.75, magnitude: None };
    let kronecker = |o: usize, i: usize| Delta::Kronecker {
        left: numbers(5, o * i),
        shape: [o, i],
        right: numbers(6, outputs / o * (inputs / i) * taps),
    };
    let lengths = |len: usize| numbers(8, len).into_iter().map(|x| x + 1.0).collect();
    vec![
        plain(Delta::Product(product(1, 3))),
        plain(Delta::Hadamard(product(1, 2), product(3, 4))),
        plain(kronecker(2, 3)),
        plain(kronecker(outputs, 1)),
        Change {
            magnitude: Some(Magnitude::Outputs(lengths(outputs))),
            ..plain(Delta::Product(product(9, 3)))
        },
        Change {
            magnitude: Some(Magnitude::Inputs(lengths(inputs))),
            ..plain(Delta::Product(product(9, 3)))
        },
    ]
}

/// What a layer's weights are, read back by giving it unit vectors.
fn weights_of(forward: impl Fn(&Tensor) -> Tensor, device: &Device, inputs: usize, taps: usize) -> Vec<f32> {
    let side = if taps == 1 { 1 } else { 3 };
    let pixels = side * side;
    let mut columns = vec![];
    for c in 0..inputs {
        for t in 0..taps {
            let mut x = vec![0.0; pixels * inputs];
            x[t * inputs + c] = 1.0;
            let x = Tensor::from_f32(device, [1, side, side, inputs], DType::F32, &x);
            let y = forward(&x).to_f32();
            // The picture's middle sees every tap.
            let outputs = y.len() / pixels;
            columns.push(y[pixels / 2 * outputs..][..outputs].to_vec());
        }
    }
    let outputs = columns[0].len();
    (0..outputs).flat_map(|o| columns.iter().map(move |c| c[o])).collect()
}

fn close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-5, "{what}: {worst}");
}

#[test]
fn every_kind_changes_a_matrix_and_a_convolution() {
    let device = device();
    let file = Checkpoint::random("random");
    let loader = Loader::new(&file, &device, DType::F32, &|_| {});
    let linear = loader.root().pp("linear").linear(6, 34, false).expect("a layer");
    let conv = loader.root().pp("conv").conv2d(6, 34, 3).expect("a layer");
    let modules = loader.modules();
    let multiply = |x: &Tensor| ops::linear(x, &linear, Epilogue::default());
    let convolve = |x: &Tensor| ops::conv2d(x, &conv, Window::Same, Epilogue::default());
    for (name, taps) in [("linear", 1), ("conv", 9)] {
        let module = modules.iter().find(|m| m.name() == name).expect("it was loaded");
        assert_eq!(
            (module.outputs(), module.inputs(), module.kernel()),
            (34, 6, if taps == 1 { 1 } else { 3 })
        );
        let read = || match taps {
            1 => weights_of(multiply, &device, 6, 1),
            _ => weights_of(convolve, &device, 6, 9),
        };
        let base = read();
        let kinds = kinds(34, 6, taps);
        let mut memory = None;
        for changes in kinds.chunks(1).chain([&kinds[..]]) {
            let pairs: Vec<_> = changes.iter().map(|c| (module.clone(), c.clone())).collect();
            let changed = apply(&device, &pairs, memory);
            assert_eq!(read(), base, "nothing is installed yet");
            changed.install();
            close(&read(), &expected(&base, changes, 34, 6, taps), name);
            changed.restore();
            assert_eq!(read(), base, "every bit is back");
            // The next is written over this one.
            memory = Some(changed.into_memory());
        }
    }
}

#[test]
fn stacked_modules_change_apart() {
    let device = device();
    let file = Checkpoint::random("random");
    let loader = Loader::new(&file, &device, DType::F32, &|_| {});
    let parts = ["q", "k", "v"].map(|p| loader.root().pp(p));
    // Neither part begins or ends with a panel.
    let stacked = Weights::linear_stacked(&parts, 5, 20, false).expect("a layer");
    let read = || weights_of(|x| ops::linear(x, &stacked, Epilogue::default()), &device, 5, 1);
    let base = read();
    let modules = loader.modules();
    let names: Vec<&str> = modules.iter().map(Module::name).collect();
    assert_eq!(names, ["q", "k", "v"]);
    let change = kinds(20, 5, 1).remove(0);
    let both = [(modules[1].clone(), change.clone()), (modules[2].clone(), change.clone())];
    let changed = apply(&device, &both, None);
    assert_eq!(changed.matrices.len(), 1, "both are in one matrix");
    assert_eq!(bytes_to_change(&modules), changed.bytes());
    changed.install();
    let got = read();
    assert_eq!(got[..100], base[..100], "the first part stays");
    for part in [100..200, 200..300] {
        close(&got[part.clone()], &expected(&base[part], std::slice::from_ref(&change), 20, 5, 1), "a part");
    }
}

#[test]
fn what_a_convolution_derives_from_changed_weights_counts_as_theirs() {
    let device = device();
    let file = Checkpoint::random("random");
    let loader = Loader::new(&file, &device, DType::F32, &|_| {});
    let conv = loader.root().pp("conv").conv2d(32, 32, 3).expect("a layer");
    let module = loader.modules().remove(0);
    let changed = apply(&device, &[(module, kinds(32, 32, 9).remove(0))], None);
    changed.install();
    let fresh = changed.bytes();
    let x = Tensor::from_f32(&device, [1, 4, 4, 32], DType::F32, &numbers(3, 4 * 4 * 32));
    ops::conv2d(&x, &conv, Window::Enlarge(8, 8), Epilogue::default());
    // Sixteen summed taps stand in for nine.
    assert_eq!(changed.bytes(), fresh + fresh * 16 / 9);
}
