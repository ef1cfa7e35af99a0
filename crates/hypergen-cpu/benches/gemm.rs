//! Matrix products and convolutions over the shapes of SD 1.5 and SDXL with
//! guidance (a batch of two) at 512 pixels, and of their decoder. Throughput
//! is in FLOP (2 per multiply-add), so criterion's "elem/s" read as FLOP/s;
//! the machine's limit is printed first.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use hypergen_cpu::{
    AlignedVec, ConvShape, Cpu, CpuConfig, Element, Epilogue, PackedMatrix, conv2d, geglu, linear,
};

/// Rows, inputs, outputs.
const LINEAR: [[usize; 3]; 11] = [
    [8192, 320, 320],
    [8192, 320, 960],
    [8192, 1280, 320],
    [2048, 640, 640],
    [2048, 640, 1920],
    [2048, 2560, 640],
    [512, 1280, 1280],
    [512, 5120, 1280],
    [2048, 1280, 1280],
    [154, 768, 320],
    [2, 1280, 1280],
];

/// Rows, inputs, hidden values (the weight has twice as many outputs).
const GEGLU: [[usize; 3]; 3] = [[8192, 320, 1280], [2048, 640, 2560], [512, 1280, 5120]];

/// Batch, size of the stored picture, input channels, output channels, stride, enlargement.
const CONV: [[usize; 6]; 17] = [
    [2, 64, 4, 320, 1, 1],
    [2, 64, 320, 320, 1, 1],
    [2, 64, 640, 320, 1, 1],
    [2, 64, 960, 320, 1, 1],
    [2, 64, 320, 320, 2, 1],
    [2, 32, 640, 640, 1, 1],
    [2, 32, 1280, 640, 1, 1],
    [2, 32, 640, 640, 1, 2],
    [2, 16, 1280, 1280, 1, 1],
    [2, 16, 2560, 1280, 1, 1],
    [2, 8, 1280, 1280, 1, 1],
    [2, 8, 2560, 1280, 1, 1],
    [2, 64, 320, 4, 1, 1],
    [1, 512, 128, 128, 1, 1],
    [1, 256, 256, 256, 1, 1],
    [1, 128, 512, 512, 1, 1],
    [1, 512, 128, 3, 1, 1],
];

/// Random values: multipliers run faster on zeros, which take less power.
fn values<T: Element>(len: usize) -> AlignedVec<T> {
    let mut state = 1_u32;
    let mut values = AlignedVec::zeroed(len);
    for value in values.as_mut_slice() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *value = T::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0);
    }
    values
}

fn row(i: usize, row: &mut [f32]) {
    let mut state = i as u32;
    for value in row {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *value = ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.05;
    }
}

fn bench<T: Element>(c: &mut Criterion, dtype: &str) {
    let cpu = Cpu::new(&CpuConfig::default()).expect("a usable processor");
    println!("limit, {dtype}: {:.2} TFLOP/s", cpu.measure_peak(T::KIND) / 1e12);
    linears::<T>(c, &cpu, dtype);
    geglus::<T>(c, &cpu, dtype);
    convolutions::<T>(c, &cpu, dtype);
}

fn name(op: &str, dtype: &str, cpu: &Cpu) -> String {
    format!("{op}/{dtype}/{}/{}-threads", cpu.isa(), cpu.threads())
}

fn linears<T: Element>(c: &mut Criterion, cpu: &Cpu, dtype: &str) {
    let mut group = c.benchmark_group(name("linear", dtype, cpu));
    group.sample_size(10);
    for [m, k, n] in LINEAR {
        let (a, bias) = (values::<T>(m * k), values::<f32>(n));
        let w = PackedMatrix::<T>::pack(cpu, n, k, row);
        let mut out = AlignedVec::<T>::zeroed(m * n);
        let epilogue = Epilogue { bias: Some(bias.as_slice()), ..Epilogue::default() };
        group.throughput(Throughput::Elements((2 * m * k * n) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{m}x{k}x{n}")), |b| {
            b.iter(|| linear(cpu, a.as_slice(), &w, &epilogue, black_box(out.as_mut_slice())));
        });
    }
    group.finish();
}

fn geglus<T: Element>(c: &mut Criterion, cpu: &Cpu, dtype: &str) {
    let mut group = c.benchmark_group(name("geglu", dtype, cpu));
    group.sample_size(10);
    for [m, k, h] in GEGLU {
        let (a, bias) = (values::<T>(m * k), values::<f32>(2 * h));
        let w = PackedMatrix::<T>::pack_geglu(cpu, 2 * h, k, row);
        let mut out = AlignedVec::<T>::zeroed(m * h);
        group.throughput(Throughput::Elements((4 * m * k * h) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{m}x{k}x{}", 2 * h)), |b| {
            b.iter(|| geglu(cpu, a.as_slice(), &w, Some(bias.as_slice()), black_box(out.as_mut_slice())));
        });
    }
    group.finish();
}

fn convolutions<T: Element>(c: &mut Criterion, cpu: &Cpu, dtype: &str) {
    let mut group = c.benchmark_group(name("conv3x3", dtype, cpu));
    group.sample_size(10);
    for [batch, size, in_c, n, stride, up] in CONV {
        let out_size = (size * up).div_ceil(stride);
        let shape = ConvShape {
            batch,
            in_h: size,
            in_w: size,
            in_c,
            up_h: size * up,
            up_w: size * up,
            kernel_h: 3,
            kernel_w: 3,
            stride,
            pad_top: 1,
            pad_left: 1,
            out_h: out_size,
            out_w: out_size,
        };
        let (x, bias) = (values::<T>(batch * size * size * in_c), values::<f32>(n));
        let w = PackedMatrix::<T>::pack(cpu, n, 9 * in_c, row);
        let mut out = AlignedVec::<T>::zeroed(batch * out_size * out_size * n);
        let epilogue = Epilogue { bias: Some(bias.as_slice()), ..Epilogue::default() };
        group.throughput(Throughput::Elements((2 * batch * out_size * out_size * 9 * in_c * n) as u64));
        let id = format!("{batch}x{size}x{size}x{in_c}-{n}-stride{stride}-up{up}");
        group.bench_function(BenchmarkId::from_parameter(id), |b| {
            b.iter(|| conv2d(cpu, x.as_slice(), &shape, &w, &epilogue, black_box(out.as_mut_slice())));
        });
    }
    group.finish();
}

fn all(c: &mut Criterion) {
    bench::<bf16>(c, "bf16");
    bench::<f32>(c, "f32");
}

criterion_group!(benches, all);
criterion_main!(benches);
