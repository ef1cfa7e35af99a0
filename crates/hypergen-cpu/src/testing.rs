//! What the kernels' tests share: a [`Cpu`] for each instruction set and
//! thread count, repeatable values, and comparison with the reference.

pub(crate) use sets::{sets, summary};

use crate::{Cpu, CpuConfig, Element, ElementKind, Isa};

#[path = "../tests/common/sets.rs"]
mod sets;

/// A processor with the given set and threads.
pub(crate) fn cpu(isa: Isa, threads: usize) -> Cpu {
    Cpu::new(&CpuConfig { threads: Some(threads), isa: Some(isa) }).expect("a supported set")
}

/// One processor, with two threads, for each instruction set of this machine.
pub(crate) fn every_cpu() -> Vec<Cpu> {
    sets().iter().map(|&isa| cpu(isa, 2)).collect()
}

/// Repeatable pseudo-random values: splitmix64.
pub(crate) struct Values(u64);

impl Values {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Uniform in `0..1`.
    pub(crate) fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    }

    /// Roughly normal with mean 0 and deviation 1.
    pub(crate) fn normal<T: Element>(&mut self, len: usize) -> Vec<T> {
        (0..len)
            .map(|_| {
                let four: f32 = (0..4).map(|_| self.uniform()).sum();
                T::from_f32((four - 2.0) * 1.732)
            })
            .collect()
    }
}

/// Asserts that each element is within `tolerance * (1 + |want|)` of the
/// reference, and for bfloat16 half a unit in the last place more.
#[track_caller]
pub(crate) fn assert_close<T: Element>(what: &str, cpu: &Cpu, got: &[T], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let rounding = if T::KIND == ElementKind::Bf16 { 1.0 / 256.0 } else { 0.0 };
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let (got, limit) = (got.to_f32(), tolerance * (1.0 + want.abs()) + rounding * want.abs());
        assert!((got - want).abs() <= limit, "{what} with {}: [{i}] is {got}, not {want}", cpu.isa());
    }
}

#[cfg(test)]
mod tests {
    use super::sets::missing;
    use super::*;

    #[test]
    fn demanded_sets_are_missed() {
        let sets = [Isa::Portable, Isa::Avx2];
        assert_eq!(missing("", &sets), [""; 0]);
        assert_eq!(missing("avx2", &sets), [""; 0]);
        assert_eq!(missing(" avx2, amx-bf16 ,axm", &sets), ["amx-bf16", "axm"]);
        assert!(summary(&sets).ends_with("not on this machine: avx512, avx512-bf16, amx-bf16"));
        assert!(!summary(&Isa::ALL).contains("not on"));
    }
}
