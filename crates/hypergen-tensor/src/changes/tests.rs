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
fn dense(change: &Change, base: &[f32], outputs: usize, inputs: usize, taps: usize) -> Vec<f32> {
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
        Delta::Full(values) => values[o * k + c * taps + t],
        Delta::Glora { through, plus } => {
            let through = |from: usize| {
                (0..through.rank)
                    .map(|r| through.up[from * through.rank + r] * through.down[r * inputs + c])
                    .sum::<f32>()
            };
            let sum: f32 = (0..inputs).map(|i| base[o * k + i * taps + t] * through(i)).sum();
            sum + product(plus, o, c * taps + t)
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
        let delta = dense(change, base, outputs, inputs, taps);
        let alone: Vec<f32> = base.iter().zip(&delta).map(|(a, b)| a + b).collect();
        let factor = |i: usize| -> f32 {
            let lengths = change.magnitude.as_ref().map(|m| &m.lengths);
            let (of, select): (f32, Box<dyn Fn(usize) -> bool>) = match lengths {
                None => return 1.0,
                Some(Lengths::Outputs(m)) => {
                    let o = i / (inputs * taps);
                    (m[o], Box::new(move |j| j / (inputs * taps) == o))
                }
                Some(Lengths::Inputs(m)) => {
                    let c = i / taps % inputs;
                    (m[c], Box::new(move |j| j / taps % inputs == c))
                }
            };
            let squares = alone.iter().enumerate().filter(|(j, _)| select(*j)).map(|(_, w)| w * w);
            of / squares.sum::<f32>().sqrt()
        };
        let strength = change.magnitude.as_ref().map_or(1.0, |m| m.strength);
        for (i, to) in sum.iter_mut().enumerate() {
            *to += strength * (factor(i) * alone[i] - base[i]);
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
    let decomposed = |delta, lengths, strength| Change {
        magnitude: Some(Magnitude { lengths, strength }),
        ..plain(delta)
    };
    let through = Product { up: numbers(11, inputs * 2), down: numbers(12, 2 * inputs), rank: 2 };
    let glora = Delta::Glora { through, plus: product(13, 2) };
    vec![
        plain(Delta::Product(product(1, 3))),
        plain(Delta::Hadamard(product(1, 2), product(3, 4))),
        plain(kronecker(2, 3)),
        plain(kronecker(outputs, 1)),
        plain(Delta::Full(numbers(15, outputs * inputs * taps))),
        plain(glora.clone()),
        decomposed(Delta::Product(product(9, 3)), Lengths::Outputs(lengths(outputs)), 1.0),
        decomposed(Delta::Product(product(9, 3)), Lengths::Inputs(lengths(inputs)), 1.0),
        decomposed(Delta::Product(product(9, 3)), Lengths::Outputs(lengths(outputs)), 0.25),
        decomposed(Delta::Product(product(9, 3)), Lengths::Inputs(lengths(inputs)), -0.5),
        decomposed(glora, Lengths::Inputs(lengths(inputs)), 0.5),
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
            let changed = apply(&device, &pairs, &[], memory);
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
    // A product, and what multiplies the loaded weights of its own module alone.
    let product = || Product { up: numbers(1, 20 * 3), down: numbers(2, 3 * 5), rank: 3 };
    let through = Product { up: numbers(3, 5 * 2), down: numbers(4, 2 * 5), rank: 2 };
    for delta in [Delta::Product(product()), Delta::Glora { through, plus: product() }] {
        let change = Change { delta, scale: 0.75, magnitude: None };
        let both = [(modules[1].clone(), change.clone()), (modules[2].clone(), change.clone())];
        let changed = apply(&device, &both, &[], None);
        assert_eq!(changed.matrices.len(), 1, "both are in one matrix");
        assert_eq!(bytes_to_change(&modules), changed.bytes());
        changed.install();
        let got = read();
        assert_eq!(got[..100], base[..100], "the first part stays");
        for part in [100..200, 200..300] {
            let want = expected(&base[part.clone()], std::slice::from_ref(&change), 20, 5, 1);
            close(&got[part], &want, "a part");
        }
        changed.restore();
    }
}

/// A checkpoint file in memory: name, shape and values of each tensor.
fn stored(tensors: &[(&str, &[usize], Vec<f32>)]) -> Checkpoint {
    let views = tensors.iter().map(|(name, shape, values)| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (*name, shape.to_vec(), bytes)
    });
    let views: Vec<_> = views.collect();
    let views = views.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (*name, view.expect("a shape that fits"))
    });
    let bytes = safetensors::serialize(views, None).expect("a file").leak();
    Checkpoint::from_static("stored", bytes).expect("a checkpoint")
}

/// What is zero stays zero whatever length it is brought to, along outputs and
/// along inputs: zero over zero is no number.
#[test]
fn weights_of_length_zero_stay_zero() {
    let device = device();
    let (outputs, inputs) = (3, 4);
    for zero_output in [true, false] {
        let zero = |i: usize| if zero_output { i / inputs == 1 } else { i % inputs == 1 };
        let weights = (0..outputs * inputs).map(|i| if zero(i) { 0.0 } else { number(7, i) }).collect();
        let file = stored(&[("w.weight", &[outputs, inputs], weights)]);
        let loader = Loader::new(&file, &device, DType::F32, &|_| {});
        let layer = loader.root().pp("w").linear(inputs, outputs, false).expect("a layer");
        let module = loader.modules().remove(0);
        for (wanted, strength) in [(0.0, 1.0), (1.5, 1.0), (0.0, 0.5), (1.5, 0.5)] {
            let lengths = |n: usize| (0..n).map(|i| if i == 1 { wanted } else { 1.0 }).collect();
            let lengths = match zero_output {
                true => Lengths::Outputs(lengths(outputs)),
                false => Lengths::Inputs(lengths(inputs)),
            };
            let magnitude = Some(Magnitude { lengths, strength });
            let zeros = Product { up: vec![0.0; outputs], down: vec![0.0; inputs], rank: 1 };
            let change = Change { delta: Delta::Product(zeros), scale: 1.0, magnitude };
            let changed = apply(&device, &[(module.clone(), change)], &[], None);
            changed.install();
            let got = weights_of(|x| ops::linear(x, &layer, Epilogue::default()), &device, inputs, 1);
            for (i, value) in got.iter().enumerate() {
                assert!(value.is_finite() && (*value == 0.0) == zero(i), "{i}: {value}");
            }
            changed.restore();
        }
    }
}

#[test]
fn biases_and_normalisations_change_by_addition_and_back() {
    let device = device();
    let file = Checkpoint::random("random");
    let loader = Loader::new(&file, &device, DType::F32, &|_| {});
    let parts = ["q", "k"].map(|p| loader.root().pp(p));
    let stacked = Weights::linear_stacked(&parts, 5, 20, true).expect("a layer");
    let norm = loader.root().pp("norm").norm(6, 1e-5).expect("a norm");
    let vectors = loader.vectors();
    let names: Vec<&str> = vectors.iter().map(Vector::name).collect();
    assert_eq!(names, ["q.bias", "k.bias", "norm.weight", "norm.bias"]);
    let zeros = Tensor::from_f32(&device, [1, 5], DType::F32, &[0.0; 5]);
    let values = numbers(4, 6);
    let x = Tensor::from_f32(&device, [1, 6], DType::F32, &values);
    let read = || {
        let biases = ops::linear(&zeros, &stacked, Epilogue::default()).to_f32();
        (biases, ops::layer_norm(&x, &norm).to_f32())
    };
    let (biases, normed) = read();
    let (k, gamma, beta) = (numbers(1, 20), numbers(2, 6), numbers(3, 6));
    let changes: Vec<(Vector, Vec<f32>)> = [(1, &k), (2, &gamma), (3, &beta), (1, &k)]
        .map(|(i, values): (usize, &Vec<f32>)| (vectors[i].clone(), values.clone()))
        .into();
    let changed = apply(&device, &[], &changes, None);
    assert_eq!(read(), (biases.clone(), normed.clone()), "nothing is installed yet");
    assert_eq!(changed.bytes(), (40 + 6 + 6) * size_of::<f32>());
    changed.install();
    let (new_biases, new_normed) = read();
    assert_eq!(new_biases[..20], biases[..20], "the first part stays");
    let twice: Vec<f32> = biases[20..].iter().zip(&k).map(|(b, k)| b + 2.0 * k).collect();
    close(&new_biases[20..], &twice, "changes of one bias add up");
    // Random checkpoints have scale 1 and shift 0.
    let want: Vec<f32> = (0..6).map(|i| normed[i] * (1.0 + gamma[i]) + beta[i]).collect();
    close(&new_normed, &want, "the norm");
    changed.restore();
    assert_eq!(read(), (biases, normed), "every bit is back");
}

#[test]
fn finite_changes_that_overflow_are_found_by_module() {
    let device = device();
    let file = Checkpoint::random("random");
    for dtype in [DType::F32, DType::Bf16] {
        let loader = Loader::new(&file, &device, dtype, &|_| {});
        loader.root().pp("a").linear(4, 8, true).expect("a layer");
        loader.root().pp("b").linear(4, 8, false).expect("a layer");
        let (modules, vectors) = (loader.modules(), loader.vectors());
        let product = |up: f32, down: f32| Product { up: vec![up; 8], down: vec![down; 4], rank: 1 };
        let plain = |delta| Change { delta, scale: 1.0, magnitude: None };
        let long = |lengths| Some(Magnitude { lengths, strength: 4.0 });
        let through = Product { up: vec![1e30; 4], down: vec![1e30; 4], rank: 1 };
        let glora = Delta::Glora { through, plus: product(0.0, 0.0) };
        for (change, over) in [
            (plain(Delta::Product(product(1.0, 1.0))), false),
            (plain(Delta::Product(product(1e20, 1e15))), false),
            (plain(Delta::Product(product(1e20, 1e20))), true),
            (Change { scale: 1e30, ..plain(Delta::Product(product(1e10, 1.0))) }, true),
            (Change { scale: 1e-30, ..plain(Delta::Product(product(1e20, 1e15))) }, false),
            (plain(Delta::Hadamard(product(1e15, 1e15), product(1e15, 1e15))), true),
            (plain(Delta::Full(vec![f32::MAX; 32])), dtype == DType::Bf16),
            (plain(Delta::Full(vec![1e38; 32])), false),
            (plain(glora), true),
            (
                Change {
                    magnitude: long(Lengths::Outputs(vec![3e38; 8])),
                    ..plain(Delta::Product(product(1.0, 1.0)))
                },
                true,
            ),
            (
                Change {
                    magnitude: long(Lengths::Inputs(vec![2.0; 4])),
                    ..plain(Delta::Product(product(1.0, 1.0)))
                },
                false,
            ),
        ] {
            let fine = (modules[0].clone(), plain(Delta::Product(product(1.0, 1.0))));
            let found =
                overflowing(&device, &[fine, (modules[1].clone(), change.clone())], &[]).map(str::to_owned);
            assert_eq!(found.as_deref(), over.then_some("b"), "{dtype:?} {change:?}");
        }
        let bias = [(vectors[0].clone(), vec![f32::INFINITY; 8])];
        assert_eq!(overflowing(&device, &[], &bias), Some("a.bias"));
        let bias = [(vectors[0].clone(), vec![1e38; 8])];
        assert_eq!(overflowing(&device, &[], &bias), None);
    }
}

#[test]
fn what_a_convolution_derives_from_changed_weights_counts_as_theirs() {
    let device = device();
    let file = Checkpoint::random("random");
    let loader = Loader::new(&file, &device, DType::F32, &|_| {});
    let conv = loader.root().pp("conv").conv2d(32, 32, 3).expect("a layer");
    let module = loader.modules().remove(0);
    let changed = apply(&device, &[(module, kinds(32, 32, 9).remove(0))], &[], None);
    changed.install();
    let fresh = changed.bytes();
    let x = Tensor::from_f32(&device, [1, 4, 4, 32], DType::F32, &numbers(3, 4 * 4 * 32));
    ops::conv2d(&x, &conv, Window::Enlarge(8, 8), Epilogue::default());
    // Sixteen summed taps stand in for nine.
    assert_eq!(changed.bytes(), fresh + fresh * 16 / 9);
}
