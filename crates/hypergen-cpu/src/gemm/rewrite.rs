//! Packed weights made anew with changed values: what a low-rank update of a
//! loaded matrix is made of. The matrix that it starts from stays as it is, so
//! whoever changed a weight can always go back to the very bits.
//!
//! It deliberately does not know where changes come from. A panel is widened to
//! float32 as `[k][32 outputs]`, the caller changes it, and it is rounded once
//! more as packing does.

use std::ops::Range;

use super::packed::{PANEL, PackedMatrix, TILE_K, of_bits, rounded};
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, run};
use crate::split::Shared;
use crate::{AlignedVec, Cpu, Element, ElementKind, Isa};

/// Outputs of a panel: the width of what [`PackedMatrix::rewritten`] hands out.
pub const PANEL_OUTPUTS: usize = PANEL;

impl<T: Element> PackedMatrix<T> {
    /// A matrix of the same shape and layout with other values. `edit` is
    /// called once for each panel, from several threads, with the outputs that
    /// it holds (at most [`PANEL_OUTPUTS`]) and their weights as float32,
    /// `[k][PANEL_OUTPUTS]`; columns beyond the outputs are zero and have to
    /// stay so.
    pub fn rewritten(&self, cpu: &Cpu, edit: impl Fn(Range<usize>, &mut [f32]) + Sync) -> Self {
        let mut data = AlignedVec::<T>::zeroed(self.panels() * self.panel_len());
        let shared = Shared::new(data.as_mut_slice());
        let padded = match T::KIND {
            ElementKind::F32 => self.k(),
            ElementKind::Bf16 => self.k().next_multiple_of(TILE_K),
        };
        cpu.parallel(self.panels(), |p| {
            let mut scratch = Scratch::take(padded * PANEL);
            let values = scratch.as_mut_slice();
            run(cpu.isa(), Widen { panel: self.panel(p), values: &mut *values });
            edit(self.outputs_of(p), &mut values[..self.k() * PANEL]);
            // SAFETY: each task takes its own panel.
            let to = unsafe { shared.part(p * self.panel_len(), self.panel_len()) };
            run(cpu.isa(), Narrow { values, panel: to });
        });
        self.with_data(data)
    }
}

/// `panel[k][32] += left[k][rank] * right[rank][32]`, for use in
/// [`PackedMatrix::rewritten`].
///
/// # Panics
/// When a slice's length does not fit.
pub fn add_product(isa: Isa, panel: &mut [f32], left: &[f32], right: &[f32]) {
    let rank = right.len() / PANEL;
    assert_eq!(right.len(), rank * PANEL, "add_product: the right side is no panel");
    assert_eq!(panel.len() * rank, left.len() * PANEL, "add_product: the left side does not fit");
    if rank > 0 {
        run(isa, AddProduct { panel, left, right, rank });
    }
}

struct AddProduct<'a> {
    panel: &'a mut [f32],
    left: &'a [f32],
    right: &'a [f32],
    rank: usize,
}

/// Rows of the panel that are summed at once: with two vectors a row, eight
/// sums hide the latency of a multiply-add and fit into 16 registers.
const ROWS: usize = 4;

impl Kernel for AddProduct<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let rows = self.panel.len() / PANEL;
        let mut row = 0;
        // SAFETY: `add_product` has checked the lengths; the set is there by the contract.
        unsafe {
            while row + ROWS <= rows {
                self.rows::<S, ROWS>(row);
                row += ROWS;
            }
            while row < rows {
                self.rows::<S, 1>(row);
                row += 1;
            }
        }
    }
}

impl AddProduct<'_> {
    /// Rows `row .. row + R`.
    ///
    /// # Safety
    /// They lie in the panel, and the machine has the set.
    #[inline(always)]
    unsafe fn rows<S: Simd, const R: usize>(&mut self, row: usize) {
        // SAFETY: `right` is `[rank][32]`, `left` has `rank` values for each
        // row of the panel, and a panel's width is a multiple of two vectors.
        unsafe {
            let panel = self.panel.as_mut_ptr().add(row * PANEL);
            let left = self.left.as_ptr().add(row * self.rank);
            let mut column = 0;
            while column < PANEL {
                let at = |r: usize, v: usize| panel.add(r * PANEL + column + v * S::LANES);
                let mut sums = [[S::splat(0.0); 2]; R];
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = [S::load_f32(at(r, 0)), S::load_f32(at(r, 1))];
                }
                for i in 0..self.rank {
                    let right = self.right.as_ptr().add(i * PANEL + column);
                    let (b0, b1) = (S::load_f32(right), S::load_f32(right.add(S::LANES)));
                    for (r, sum) in sums.iter_mut().enumerate() {
                        let a = S::splat(*left.add(r * self.rank + i));
                        sum[0] = S::mul_add(a, b0, sum[0]);
                        sum[1] = S::mul_add(a, b1, sum[1]);
                    }
                }
                for (r, sum) in sums.iter().enumerate() {
                    S::store_f32(at(r, 0), sum[0]);
                    S::store_f32(at(r, 1), sum[1]);
                }
                column += 2 * S::LANES;
            }
        }
    }
}

/// Columns of a tile.
const COLUMNS: usize = 16;

/// A packed panel to `[k][32]`.
struct Widen<'a, T> {
    panel: &'a [T],
    values: &'a mut [f32],
}

impl<T: Element> Kernel for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match T::KIND {
            ElementKind::F32 => {
                for (to, from) in self.values.iter_mut().zip(self.panel) {
                    *to = from.to_f32();
                }
            }
            ElementKind::Bf16 => {
                for (i, pairs) in self.panel.chunks_exact(2 * COLUMNS).enumerate() {
                    let (row, column) = place(i);
                    let (even, odd) = self.values[row * PANEL..][..2 * PANEL].split_at_mut(PANEL);
                    let (even, odd) = (&mut even[column..][..COLUMNS], &mut odd[column..][..COLUMNS]);
                    for ((pair, even), odd) in pairs.chunks_exact(2).zip(even).zip(odd) {
                        *even = pair[0].to_f32();
                        *odd = pair[1].to_f32();
                    }
                }
            }
        }
    }
}

/// Row and column of the first value of the `i`-th run of sixteen pairs in a
/// bfloat16 panel: `[k / 32][2 tiles][16 pairs][16 columns][2]`.
#[inline(always)]
fn place(i: usize) -> (usize, usize) {
    let (tile, pair) = (i / COLUMNS, i % COLUMNS);
    (tile / 2 * TILE_K + 2 * pair, tile % 2 * COLUMNS)
}

/// `[k][32]` to a packed panel.
struct Narrow<'a, T> {
    values: &'a [f32],
    panel: &'a mut [T],
}

impl<T: Element> Kernel for Narrow<'_, T> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match T::KIND {
            ElementKind::F32 => {
                for (to, from) in self.panel.iter_mut().zip(self.values) {
                    *to = T::from_f32(*from);
                }
            }
            ElementKind::Bf16 => {
                for (i, pairs) in self.panel.chunks_exact_mut(2 * COLUMNS).enumerate() {
                    let (row, column) = place(i);
                    let (even, odd) = self.values[row * PANEL..][..2 * PANEL].split_at(PANEL);
                    let (even, odd) = (&even[column..][..COLUMNS], &odd[column..][..COLUMNS]);
                    // Sixteen words of two values each: the compiler makes vectors of that,
                    // which it does not where it sees single halves.
                    let mut words = [0_u32; COLUMNS];
                    for ((word, even), odd) in words.iter_mut().zip(even).zip(odd) {
                        *word = rounded(*even) >> 16 | rounded(*odd) & 0xffff_0000;
                    }
                    for (to, word) in pairs.chunks_exact_mut(2).zip(words) {
                        to[0] = of_bits(word as u16);
                        to[1] = of_bits((word >> 16) as u16);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Values, every_cpu};
    use half::bf16;

    /// Packs, rewrites without a change, and looks whether all bits are there.
    fn unchanged<T: Element>(geglu: bool) {
        for cpu in every_cpu() {
            for (n, k) in [(0, 3), (2, 1), (6, 33), (64, 64), (66, 31), (130, 95)] {
                let w: Vec<T> = Values::new((n * k) as u64).normal(n * k);
                let row = |i: usize, out: &mut [f32]| {
                    out.iter_mut().zip(&w[i * k..]).for_each(|(out, w)| *out = w.to_f32());
                };
                let packed = match geglu {
                    true => PackedMatrix::<T>::pack_geglu(&cpu, n, k, row),
                    false => PackedMatrix::<T>::pack(&cpu, n, k, row),
                };
                let again = packed.rewritten(&cpu, |_, _| {});
                assert_eq!((again.n(), again.k(), again.is_geglu()), (n, k, geglu));
                for p in 0..packed.panels() {
                    assert_eq!(again.panel(p), packed.panel(p), "{n}x{k}, panel {p}");
                }
            }
        }
    }

    #[test]
    fn without_a_change_every_bit_stays() {
        for geglu in [false, true] {
            unchanged::<f32>(geglu);
            unchanged::<bf16>(geglu);
        }
    }

    /// Adding a product panel by panel is what packing the sum gives.
    fn sum<T: Element>(geglu: bool) {
        for cpu in every_cpu() {
            for (n, k, rank) in [(2, 1, 1), (34, 33, 3), (64, 70, 32), (130, 95, 5)] {
                let mut numbers = Values::new((n * k + rank) as u64);
                let (w, up): (Vec<T>, Vec<f32>) = (numbers.normal(n * k), numbers.normal(n * rank));
                let left: Vec<f32> = numbers.normal(k * rank);
                let base = |i: usize, out: &mut [f32]| {
                    out.iter_mut().zip(&w[i * k..]).for_each(|(out, w)| *out = w.to_f32());
                };
                let added = |i: usize, out: &mut [f32]| {
                    base(i, out);
                    for (j, out) in out.iter_mut().enumerate() {
                        // In the kernel's order, for equal bits.
                        for r in 0..rank {
                            let (a, b) = (left[j * rank + r], up[i * rank + r]);
                            *out = if cpu.isa() == Isa::Portable { *out + a * b } else { a.mul_add(b, *out) };
                        }
                    }
                };
                let pack = |row: &(dyn Fn(usize, &mut [f32]) + Sync)| match geglu {
                    true => PackedMatrix::<T>::pack_geglu(&cpu, n, k, row),
                    false => PackedMatrix::<T>::pack(&cpu, n, k, row),
                };
                let got = pack(&base).rewritten(&cpu, |outputs, panel| {
                    let mut right = vec![0.0; rank * PANEL];
                    for (column, i) in outputs.enumerate() {
                        for r in 0..rank {
                            right[r * PANEL + column] = up[i * rank + r];
                        }
                    }
                    add_product(cpu.isa(), panel, &left, &right);
                });
                let want = pack(&added);
                for p in 0..want.panels() {
                    let close = got.panel(p).iter().zip(want.panel(p)).all(|(got, want)| {
                        (got.to_f32() - want.to_f32()).abs() <= 1e-5 + want.to_f32().abs() / 128.0
                    });
                    assert!(close, "{}, {n}x{k}, rank {rank}, panel {p}", cpu.isa());
                    if T::KIND == ElementKind::F32 && cpu.isa() != Isa::Portable {
                        assert_eq!(got.panel(p), want.panel(p), "{}, {n}x{k}, rank {rank}", cpu.isa());
                    }
                }
            }
        }
    }

    #[test]
    fn a_product_is_added_as_if_it_had_been_packed() {
        for geglu in [false, true] {
            sum::<f32>(geglu);
            sum::<bf16>(geglu);
        }
    }

    #[test]
    fn rounding_is_that_of_the_element() {
        let hard =
            [0.0, -0.0, 1.0, 1.003_906_2, 1.011_718_8, f32::MAX, f32::INFINITY, f32::NEG_INFINITY, 1e-40];
        for value in hard {
            assert_eq!((rounded(value) >> 16) as u16, bf16::from_f32(value).to_bits(), "{value}");
        }
        assert!(bf16::from_bits((rounded(f32::NAN) >> 16) as u16).is_nan());
        assert!(bf16::from_bits((rounded(f32::from_bits(0x7fff_ffff)) >> 16) as u16).is_nan());
    }
}
