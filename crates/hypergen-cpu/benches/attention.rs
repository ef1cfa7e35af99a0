//! Attention over the shapes of SD 1.5, SDXL and their decoder, at 512 and
//! 1024 pixels. Throughput is in FLOP (4 per query, key and column), so
//! criterion's "elem/s" read as FLOP/s.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use hypergen_cpu::{AttentionShape, Cpu, CpuConfig, Element, Heads, attention};

/// Name, batch, heads, head_dim, queries, keys.
const SHAPES: [(&str, [usize; 5]); 9] = [
    ("sd15-64x64-self", [2, 8, 40, 4096, 4096]),
    ("sd15-64x64-cross", [2, 8, 40, 4096, 77]),
    ("sd15-32x32-self", [2, 8, 80, 1024, 1024]),
    ("sd15-16x16-self", [2, 8, 160, 256, 256]),
    ("sdxl-64x64-self", [2, 10, 64, 4096, 4096]),
    ("sdxl-32x32-self", [2, 20, 64, 1024, 1024]),
    ("sdxl-32x32-cross", [2, 20, 64, 1024, 77]),
    ("clip-l", [2, 12, 64, 77, 77]),
    ("vae-64x64", [1, 1, 512, 4096, 4096]),
];

fn values<T: Element>(len: usize) -> Vec<T> {
    let mut state = 1_u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| T::from_f32(uniform() * 1.7)).collect()
}

fn bench<T: Element>(c: &mut Criterion, dtype: &str) {
    let cpu = Cpu::new(&CpuConfig::default()).expect("a usable processor");
    let mut group = c.benchmark_group(format!("attention/{dtype}/{}/{}-threads", cpu.isa(), cpu.threads()));
    group.sample_size(10);
    for (name, [batch, heads, head_dim, q_len, kv_len]) in SHAPES {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { batch, heads, head_dim, q_len, kv_len, scale, causal: name == "clip-l" };
        let columns = heads * head_dim;
        let (q, k) = (values::<T>(batch * q_len * columns), values::<T>(batch * kv_len * columns));
        let heads = |data| Heads { data, row_stride: columns, offset: 0 };
        let mut out = vec![T::default(); q.len()];
        group.throughput(Throughput::Elements((4 * batch * q_len * kv_len * columns) as u64));
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| attention(&cpu, &shape, heads(&q), heads(&k), heads(&k), black_box(&mut out)));
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
