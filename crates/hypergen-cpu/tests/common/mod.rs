//! What the kernels' tests share: processors, repeatable numbers, comparison
//! with the oracle. No tests live here.
#![allow(dead_code, reason = "each test file uses its own part")]

use hypergen_cpu::{
    Activation, AlignedVec, Cpu, CpuConfig, Element, ElementKind, Epilogue, GroupBias, Isa, PackedMatrix,
};

mod sets;

pub(crate) use sets::sets;

/// A processor with this set and number of threads.
pub(crate) fn cpu(isa: Isa, threads: usize) -> Cpu {
    Cpu::new(&CpuConfig { threads: Some(threads), isa: Some(isa) }).expect("a supported set")
}

/// Repeatable numbers between -1 and 1.
pub(crate) struct Numbers(u64);

impl Numbers {
    /// A sequence of its own for each seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    /// `len` of them.
    pub(crate) fn take<T: Element>(&mut self, len: usize) -> Vec<T> {
        (0..len).map(|_| T::from_f32(self.next())).collect()
    }
}

/// Values at the start of a cache line, or just beside it.
pub(crate) struct Placed<T: Element> {
    data: AlignedVec<T>,
    skip: usize,
}

impl<T: Element> Placed<T> {
    pub(crate) fn new(values: &[T], aligned: bool) -> Self {
        let skip = if aligned { 0 } else { 1 };
        let mut data = AlignedVec::zeroed(values.len() + skip);
        data.as_mut_slice()[skip..].copy_from_slice(values);
        Self { data, skip }
    }

    pub(crate) fn get(&self) -> &[T] {
        &self.data.as_slice()[self.skip..]
    }
}

/// Packs `[n, k]`.
pub(crate) fn pack<T: Element>(cpu: &Cpu, w: &[T], n: usize, k: usize) -> PackedMatrix<T> {
    PackedMatrix::pack(cpu, n, k, |i, row| copy(&w[i * k..][..k], row))
}

/// Widens a row.
pub(crate) fn copy<T: Element>(from: &[T], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

/// All that an epilogue may read.
pub(crate) struct Extras<T> {
    bias: Vec<f32>,
    groups: Vec<T>,
    residual: Vec<T>,
    rows_per_group: usize,
}

impl<T: Element> Extras<T> {
    /// For an output `[m, n]`.
    pub(crate) fn new(m: usize, n: usize, numbers: &mut Numbers) -> Self {
        let rows_per_group = (m / 3).max(1);
        Self {
            bias: numbers.take(n),
            groups: numbers.take(m.div_ceil(rows_per_group) * n),
            residual: numbers.take(m * n),
            rows_per_group,
        }
    }

    /// Every option alone, and several together.
    pub(crate) fn epilogues(&self) -> Vec<Epilogue<'_, T>> {
        let plain = Epilogue::default();
        let group_bias = Some(GroupBias { values: &self.groups, rows_per_group: self.rows_per_group });
        let bias = Some(self.bias.as_slice());
        let residual = Some(self.residual.as_slice());
        vec![
            plain,
            Epilogue { bias, ..plain },
            Epilogue { group_bias, ..plain },
            Epilogue { activation: Activation::Silu, ..plain },
            Epilogue { activation: Activation::Gelu, bias, ..plain },
            Epilogue { activation: Activation::QuickGelu, bias, ..plain },
            Epilogue { residual, bias, ..plain },
            Epilogue { bias, group_bias, activation: Activation::Silu, residual, scale: 0.5 },
        ]
    }
}

/// Compares with the oracle: rounding of the result, plus what sums of `k`
/// products of numbers up to 1 lose in float32.
#[track_caller]
pub(crate) fn assert_close<T: Element>(got: &[T], want: &[f32], k: usize, what: &str) {
    assert_close_scaled(got, want, k, 1.0, what);
}

/// The same where errors are multiplied by something of size `scale` afterwards.
#[track_caller]
pub(crate) fn assert_close_scaled<T: Element>(got: &[T], want: &[f32], k: usize, scale: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let (relative, absolute) = match T::KIND {
        ElementKind::F32 => (2e-6, 2e-8 * k as f32 + 2e-6),
        // The last term: activations in bfloat16 precision.
        ElementKind::Bf16 => (1.0 / 256.0, 2e-8 * k as f32 + 1e-4),
    };
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let got = got.to_f32();
        assert!(
            (got - want).abs() <= relative * want.abs() + scale * absolute,
            "{what}: element {i} is {got}, not {want}"
        );
    }
}

/// The stored bits, so that equality means equality.
pub(crate) fn bits<T: Element>(x: &[T]) -> Vec<u32> {
    x.iter().map(|x| x.to_f32().to_bits()).collect()
}
