//! Weights in the order in which every microkernel reads them. One layout for
//! each element type, whatever the instruction set, so that packing happens
//! once and tests can run all sets over the same matrix.
//!
//! Outputs come in panels of [`PANEL`] columns, padded with zeros:
//!
//! * float32: `[k][32 columns]`;
//! * bfloat16: `[k / 32][2 tiles][16 pairs of k][16 columns][2]`, `k` padded
//!   with zeros to a multiple of 32. Each tile is one kibibyte: an AMX tile as
//!   `tileloadd` wants it, and sixteen operands of `vdpbf16ps`.

use std::sync::OnceLock;

use half::bf16;

use crate::simd::slices::{load, store};
use crate::simd::{Kernel, Simd, run};
use crate::split::Shared;
use crate::{AlignedVec, Cpu, Element, ElementKind};

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;
/// Elements of a bfloat16 panel that hold 32 consecutive `k`: two tiles.
pub(crate) const STEP: usize = 2 * TILE;
/// Elements of a bfloat16 tile.
pub(crate) const TILE: usize = 512;
/// Consecutive `k` of a tile.
pub(crate) const TILE_K: usize = 32;

/// A weight matrix `[n, k]` (`n` outputs, as PyTorch stores a `Linear`),
/// arranged once at load in the order in which the kernels read it.
pub struct PackedMatrix<T: Element> {
    n: usize,
    k: usize,
    /// Whether values and gates of a GEGLU alternate panel by panel.
    geglu: bool,
    panel_len: usize,
    data: AlignedVec<T>,
    /// What is made of it for convolutions when it is first needed.
    derived: Derived<T>,
}

/// See [`PackedMatrix::parts`] and [`PackedMatrix::winograd`].
struct Derived<T: Element> {
    parts: OnceLock<Box<[PackedMatrix<T>; 4]>>,
    winograd: OnceLock<Box<PackedMatrix<T>>>,
}

impl<T: Element> Derived<T> {
    fn nothing() -> Self {
        Self { parts: OnceLock::new(), winograd: OnceLock::new() }
    }
}

impl<T: Element> PackedMatrix<T> {
    /// Packs a matrix whose row `i` of `k` values is written by `row(i, out)`.
    /// `row` is called once for each row, from several threads, so that
    /// nothing but the packed form is ever held whole.
    pub fn pack(cpu: &Cpu, n: usize, k: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        Self::pack_panels(cpu, n, k, n.div_ceil(PANEL), false, |p| plain_outputs(n, p), row)
    }

    /// Packs a GEGLU projection `[2 h, k]`, rows `0..h` the values and
    /// `h..2h` the gates, so that both are at hand together. Only
    /// [`crate::geglu`] takes the result.
    ///
    /// # Panics
    /// When `n` is odd.
    pub fn pack_geglu(cpu: &Cpu, n: usize, k: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        assert_eq!(n % 2, 0, "a GEGLU projection has as many gates as values");
        Self::pack_panels(cpu, n, k, 2 * (n / 2).div_ceil(PANEL), true, |p| geglu_outputs(n, p), row)
    }

    fn pack_panels(
        cpu: &Cpu,
        n: usize,
        k: usize,
        panels: usize,
        geglu: bool,
        rows_of: impl Fn(usize) -> std::ops::Range<usize> + Sync,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Self {
        let panel_len = match T::KIND {
            ElementKind::F32 => k * PANEL,
            ElementKind::Bf16 => k.div_ceil(TILE_K) * STEP,
        };
        let mut data = AlignedVec::<T>::zeroed(panels * panel_len);
        let shared = Shared::new(data.as_mut_slice());
        cpu.parallel(panels, |p| {
            // SAFETY: each task takes its own panel.
            let panel = unsafe { shared.part(p * panel_len, panel_len) };
            let mut values = vec![0.0; GROUP * k];
            let rows = rows_of(p);
            for first in (0..rows.len()).step_by(GROUP) {
                let count = GROUP.min(rows.len() - first);
                for (i, to) in (0..count).zip(values.chunks_exact_mut(k.max(1))) {
                    row(rows.start + first + i, to);
                }
                if k > 0 {
                    run(cpu.isa(), Interleave { rows: &values[..count * k], k, first, panel: &mut *panel });
                }
            }
        });
        Self { n, k, geglu, panel_len, data, derived: Derived::nothing() }
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Memory that the packed form takes, in bytes, without what is derived
    /// from it later.
    pub fn bytes(&self) -> usize {
        std::mem::size_of_val(self.data.as_slice())
    }

    /// Memory of what convolutions have derived from it so far, in bytes.
    pub fn derived_bytes(&self) -> usize {
        let parts = self.derived.parts.get().into_iter().flat_map(|parts| parts.iter());
        let winograd = self.derived.winograd.get().into_iter().map(|matrix| &**matrix);
        parts.chain(winograd).map(Self::bytes).sum()
    }

    /// Whether [`PackedMatrix::pack_geglu`] made it.
    pub(crate) fn is_geglu(&self) -> bool {
        self.geglu
    }

    /// Panels of [`PANEL`] columns.
    pub(crate) fn panels(&self) -> usize {
        if self.geglu { 2 * (self.n / 2).div_ceil(PANEL) } else { self.n.div_ceil(PANEL) }
    }

    /// The outputs that lie in a panel, in the checkpoint's order.
    pub(super) fn outputs_of(&self, p: usize) -> std::ops::Range<usize> {
        if self.geglu { geglu_outputs(self.n, p) } else { plain_outputs(self.n, p) }
    }

    /// Values of a panel.
    pub(super) fn panel_len(&self) -> usize {
        self.panel_len
    }

    /// The same shape and layout around other values.
    pub(super) fn with_data(&self, data: AlignedVec<T>) -> Self {
        Self { data, derived: Derived::nothing(), ..*self }
    }

    /// Four matrices that are made of this one when they are first asked for,
    /// and live as long as it does.
    pub(crate) fn parts(&self, make: impl FnOnce() -> [Self; 4]) -> &[Self; 4] {
        self.derived.parts.get_or_init(|| Box::new(make()))
    }

    /// The same for the matrix of Winograd's transformed weights.
    pub(crate) fn winograd(&self, make: impl FnOnce() -> Self) -> &Self {
        self.derived.winograd.get_or_init(|| Box::new(make()))
    }

    /// A matrix whose `k` is made of runs of `len`, in bfloat16 a multiple of
    /// 32: each the sum of some runs of this one, times their factors, in
    /// float32, rounded once.
    ///
    /// # Panics
    /// When a run does not exist.
    pub(crate) fn with_sums(&self, cpu: &Cpu, len: usize, runs: &[Vec<(usize, f32)>]) -> Self {
        let whole = T::KIND == ElementKind::F32 || len.is_multiple_of(TILE_K);
        assert!(whole, "a run of {len} is not whole in a panel");
        let (k, run_len) = (runs.len() * len, len * PANEL);
        let panel_len = runs.len() * run_len;
        let mut data = AlignedVec::<T>::zeroed(self.panels() * panel_len);
        let shared = Shared::new(data.as_mut_slice());
        cpu.parallel(self.panels(), |p| {
            let from = self.panel(p);
            // SAFETY: each task takes its own panel.
            let panel = unsafe { shared.part(p * panel_len, panel_len) };
            for (taps, to) in runs.iter().zip(panel.chunks_exact_mut(run_len.max(1))) {
                run(cpu.isa(), SumRuns { from, taps, to });
            }
        });
        Self { k, panel_len, data, derived: Derived::nothing(), ..*self }
    }

    /// The values of one panel.
    pub(crate) fn panel(&self, p: usize) -> &[T] {
        &self.data.as_slice()[p * self.panel_len..][..self.panel_len]
    }
}

/// `to = sum(factor * from[i * to.len()..] for (i, factor) in taps)`.
struct SumRuns<'a, T> {
    from: &'a [T],
    taps: &'a [(usize, f32)],
    to: &'a mut [T],
}

impl<T: Element> Kernel for SumRuns<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.to.len();
        for (i, to) in self.to.chunks_mut(S::LANES).enumerate() {
            // SAFETY: the set is there by the contract.
            unsafe {
                let mut sum = S::splat(0.0);
                for &(tap, factor) in self.taps {
                    let values = load::<S, T>(&self.from[tap * len..][..len][i * S::LANES..]);
                    sum = S::mul_add(S::splat(factor), values, sum);
                }
                store::<S, T>(to, sum);
            }
        }
    }
}

fn plain_outputs(n: usize, p: usize) -> std::ops::Range<usize> {
    p * PANEL..n.min((p + 1) * PANEL)
}

/// Values in even panels, their gates in the odd ones.
fn geglu_outputs(n: usize, p: usize) -> std::ops::Range<usize> {
    let h = n / 2;
    let first = p / 2 * PANEL;
    let shift = p % 2 * h;
    first + shift..h.min(first + PANEL) + shift
}

/// Rows that are rounded and spread over a panel together: the width of a
/// tile, so that a tile is written from end to end.
const GROUP: usize = 16;

/// Rounds up to [`GROUP`] rows of `k` values and spreads them over columns
/// `first..` of a panel.
struct Interleave<'a, T> {
    rows: &'a [f32],
    k: usize,
    first: usize,
    panel: &'a mut [T],
}

impl<T: Element> Kernel for Interleave<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { rows, k, first, panel } = self;
        match T::KIND {
            ElementKind::F32 => {
                for (i, to) in panel.chunks_exact_mut(PANEL).enumerate() {
                    for (to, row) in to[first..].iter_mut().zip(rows.chunks_exact(k)) {
                        *to = T::from_f32(row[i]);
                    }
                }
            }
            ElementKind::Bf16 => {
                for (step, to) in panel.chunks_exact_mut(STEP).enumerate() {
                    let k0 = step * TILE_K;
                    let tile = &mut to[first / GROUP * TILE..][..TILE];
                    for (column, row) in rows.chunks_exact(k).enumerate() {
                        let mut values = [0.0; TILE_K];
                        let len = TILE_K.min(k - k0);
                        values[..len].copy_from_slice(&row[k0..k0 + len]);
                        // Words of two values each: the compiler makes vectors of that,
                        // which it does not where it sees single halves.
                        let mut words = [0_u32; TILE_K / 2];
                        for (word, pair) in words.iter_mut().zip(values.chunks_exact(2)) {
                            *word = rounded_pair(pair[0], pair[1]);
                        }
                        for (pair, word) in tile.chunks_exact_mut(2 * GROUP).zip(words) {
                            pair[2 * column] = of_bits(word as u16);
                            pair[2 * column + 1] = of_bits((word >> 16) as u16);
                        }
                    }
                }
            }
        }
    }
}

/// A float's bits with the bfloat16 that it rounds to in the upper half:
/// nearest, ties to even, as [`Element::from_f32`] does it.
#[inline(always)]
pub(super) fn rounded(value: f32) -> u32 {
    let bits = value.to_bits();
    let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x40_0000 } else { up }
}

/// Two floats as a word of two bfloat16, the first in the lower half.
#[inline(always)]
pub(super) fn rounded_pair(low: f32, high: f32) -> u32 {
    rounded(low) >> 16 | rounded(high) & 0xffff_0000
}

/// The element of these bits; only asked for bfloat16.
#[inline(always)]
pub(super) fn of_bits<T: Element>(bits: u16) -> T {
    // Exact: every bfloat16 is a float32 of its own bits.
    T::from_bf16(bf16::from_bits(bits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CpuConfig;

    fn cpu() -> Cpu {
        Cpu::new(&CpuConfig { threads: Some(2), isa: None }).unwrap()
    }

    /// Row `i` holds `100 i + 1 ..`, so that each value tells its place.
    fn fill(i: usize, row: &mut [f32]) {
        for (k, v) in row.iter_mut().enumerate() {
            *v = (100 * i + k + 1) as f32;
        }
    }

    #[test]
    fn float32_panels_hold_columns_side_by_side() {
        let w = PackedMatrix::<f32>::pack(&cpu(), 35, 5, fill);
        assert_eq!((w.panels(), w.bytes()), (2, 2 * 5 * 32 * 4));
        assert_eq!(w.panel(0)[4 * 32 + 31], 3105.0);
        assert_eq!(w.panel(1)[4 * 32 + 2], 3405.0);
        assert_eq!(w.panel(1)[4 * 32 + 3], 0.0);
    }

    #[test]
    fn bfloat16_panels_hold_tiles_of_pairs() {
        let small = |i: usize, row: &mut [f32]| {
            for (k, v) in row.iter_mut().enumerate() {
                *v = (i * 4 + k % 4) as f32 + if k > 31 { 0.5 } else { 0.0 };
            }
        };
        let w = PackedMatrix::<bf16>::pack(&cpu(), 18, 33, small);
        assert_eq!((w.panels(), w.bytes()), (1, 2 * 2 * 1024));
        // Column 17, k = 7: second tile, pair 3, column 1, second of the pair.
        assert_eq!(w.panel(0)[TILE + 3 * 32 + 2 + 1].to_f32(), 71.0);
        // Column 2, k = 32, the last: its pair is padded.
        assert_eq!(w.panel(0)[STEP + 4].to_f32(), 8.5);
        assert_eq!(w.panel(0)[STEP + 5].to_f32(), 0.0);
    }

    #[test]
    fn geglu_panels_alternate_values_and_gates() {
        let w = PackedMatrix::<f32>::pack_geglu(&cpu(), 2 * 33, 1, fill);
        assert_eq!(w.panels(), 4);
        assert_eq!(w.panel(0)[31], 3101.0);
        assert_eq!(w.panel(1)[31], 6401.0);
        assert_eq!(w.panel(2)[..2], [3201.0, 0.0]);
        assert_eq!(w.panel(3)[..2], [6501.0, 0.0]);
    }

    #[test]
    fn empty_matrices_are_fine() {
        for (n, k) in [(0, 0), (0, 5), (5, 0)] {
            let w = PackedMatrix::<bf16>::pack(&cpu(), n, k, fill);
            assert_eq!((w.n(), w.k(), w.bytes()), (n, k, 0));
        }
    }
}
