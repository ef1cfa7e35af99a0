//! Norms and elementwise kernels over the shapes of SD 1.5, SDXL and their
//! decoder, in bytes read and written, beside a plain copy of as many bytes
//! by the same threads: what memory allows.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use hypergen_cpu::{
    Activation, Cpu, CpuConfig, Element, GroupNormShape, activate, concat_columns, group_norm, layer_norm,
};

/// Name, batch, pixels, channels.
const PICTURES: [(&str, [usize; 3]); 5] = [
    ("sd15-64x64x320", [2, 4096, 320]),
    ("sd15-8x8x1280", [2, 64, 1280]),
    ("sdxl-128x128x320", [2, 16_384, 320]),
    ("sdxl-32x32x1280", [2, 1024, 1280]),
    ("vae-512x512x128", [1, 262_144, 128]),
];

fn bench<T: Element>(c: &mut Criterion, dtype: &str) {
    let cpu = Cpu::new(&CpuConfig::default()).expect("a usable processor");
    let mut group = c.benchmark_group(format!("memory/{dtype}/{}/{}-threads", cpu.isa(), cpu.threads()));
    group.sample_size(20);
    for (name, [batch, pixels, channels]) in PICTURES {
        let len = batch * pixels * channels;
        let x: Vec<T> = (0..len).map(|i| T::from_f32((i * 7919 % 1000) as f32 / 250.0 - 2.0)).collect();
        let mut out = vec![T::default(); len];
        let (gamma, beta) = (vec![1.0; channels], vec![0.5; channels]);
        let bytes = size_of_val(x.as_slice()) as u64;
        let shape = GroupNormShape { batch, pixels, channels, groups: 32, eps: 1e-5 };
        // One read and one write; group norm reads twice.
        group.throughput(Throughput::Bytes(2 * bytes));
        group.bench_function(BenchmarkId::new("copy", name), |b| {
            b.iter(|| concat_columns(&cpu, &x, channels, &[], 0, black_box(&mut out)));
        });
        group.bench_function(BenchmarkId::new("layer_norm", name), |b| {
            b.iter(|| layer_norm(&cpu, &x, channels, 1e-5, &gamma, &beta, black_box(&mut out)));
        });
        group.bench_function(BenchmarkId::new("silu", name), |b| {
            b.iter(|| activate(&cpu, &x, Activation::Silu, black_box(&mut out)));
        });
        group.throughput(Throughput::Bytes(3 * bytes));
        group.bench_function(BenchmarkId::new("group_norm_silu", name), |b| {
            b.iter(|| group_norm(&cpu, &x, &shape, &gamma, &beta, Activation::Silu, black_box(&mut out)));
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
