//! Packed weights made anew with changed values: what a low-rank update of a
//! loaded matrix is made of. The matrix that it starts from stays as it is, so
//! whoever changed a weight can always go back to the very bits.
//!
//! It deliberately does not know where changes come from. A panel is widened to
//! float32 as `[k][32 outputs]`, the caller changes it, and it is rounded once
//! more as packing does, a strip at a time that never leaves the first cache.
//! Of all this only the product takes long; the rest is reading and writing the
//! weights once, and the system's clearing of fresh pages, which is why all
//! matrices go into one [`Arena`].

use std::ops::Range;

use super::packed::{PANEL, PackedMatrix, TILE_K, rounded_pair};
use crate::aligned::HUGE_PAGE;
use crate::scratch::Scratch;
use crate::simd::{Kernel, Simd, run};
use crate::split::Shared;
use crate::{Arena, Cpu, Element, ElementKind, Isa};

/// Outputs of a panel: the width of what [`rewrite`] hands out.
pub const PANEL_OUTPUTS: usize = PANEL;

/// Rows of a strip, a multiple of a tile's height: in float32, with what a
/// product of rank 64 takes beside it, it stays in the first cache.
const STRIP: usize = 64;

/// How much of a panel [`rewrite`] hands out at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Portion {
    /// A few rows that stay in the first cache.
    Strip,
    /// All rows, for changes that depend on all of them.
    Panel,
}

/// Matrices of the same shapes and layouts with other values, in memory of
/// `arena`. `begin` is called once for each panel, from several threads, with
/// the matrix's place in `bases` and the outputs that the panel holds (at most
/// [`PANEL_OUTPUTS`]). What it returns is called with the panel's weights as
/// float32, `[rows][PANEL_OUTPUTS]`, and the range of these rows, portion by
/// portion; columns beyond the outputs are zero and have to stay so.
///
/// # Panics
/// When the arena has less left than all of [`PackedMatrix::bytes`].
pub fn rewrite<T: Element, E: FnMut(Range<usize>, &mut [f32])>(
    cpu: &Cpu,
    bases: &[&PackedMatrix<T>],
    arena: &mut Arena,
    portion: Portion,
    begin: impl Fn(usize, Range<usize>) -> E + Sync,
) -> Vec<PackedMatrix<T>> {
    let mut data: Vec<_> = bases.iter().map(|base| arena.take(base.panels() * base.panel_len())).collect();
    let shared: Vec<_> = data.iter_mut().map(|data| Shared::new(data.as_mut_slice())).collect();
    let runs = runs(bases);
    cpu.parallel(runs.len(), |i| {
        for &(matrix, p) in &runs[i] {
            let base = bases[matrix];
            // SAFETY: each panel is in one run alone, and each run is one task.
            let to = unsafe { shared[matrix].part(p * base.panel_len(), base.panel_len()) };
            let mut edit = begin(matrix, base.outputs_of(p));
            base.portions(cpu.isa(), p, portion, |rows, values| {
                let padded = rows.start * PANEL..rows.start * PANEL + values.len();
                edit(rows.clone(), &mut values[..rows.len() * PANEL]);
                run(cpu.isa(), Narrow { values, panel: &mut to[padded] });
            });
        }
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        // SAFETY: a fence touches nothing. It puts the streamed stores before whatever
        // tells the others that this task is done.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    });
    drop(shared);
    bases.iter().zip(data).map(|(base, data)| base.with_data(data)).collect()
}

/// All panels, as pairs of matrix and panel, one run for each huge page that
/// they lie in: threads that write to the same fresh page would both clear it,
/// and one of them in vain.
fn runs<T: Element>(bases: &[&PackedMatrix<T>]) -> Vec<Vec<(usize, usize)>> {
    let mut runs: Vec<Vec<(usize, usize)>> = vec![];
    let mut offset = 0;
    for (matrix, base) in bases.iter().enumerate() {
        for p in 0..base.panels() {
            let page = offset / HUGE_PAGE;
            runs.resize_with(runs.len().max(page + 1), Vec::new);
            runs[page].push((matrix, p));
            offset += base.panel_len() * size_of::<T>();
        }
    }
    runs
}

impl<T: Element> PackedMatrix<T> {
    /// Calls `visit` with each panel's outputs and weights, `[k][PANEL_OUTPUTS]`
    /// in float32, from several threads.
    pub fn visit(&self, cpu: &Cpu, visit: impl Fn(Range<usize>, &mut [f32]) + Sync) {
        cpu.parallel(self.panels(), |p| {
            self.portions(cpu.isa(), p, Portion::Panel, |rows, values| {
                visit(self.outputs_of(p), &mut values[..rows.len() * PANEL]);
            });
        });
    }

    /// Widens a panel, with the rows that it is padded with, portion by
    /// portion; `body` is told the range of those that count.
    fn portions(&self, isa: Isa, p: usize, portion: Portion, mut body: impl FnMut(Range<usize>, &mut [f32])) {
        let panel = self.panel(p);
        let height = match portion {
            Portion::Strip => STRIP,
            Portion::Panel => (panel.len() / PANEL).max(1),
        };
        let mut scratch = Scratch::take(height * PANEL);
        for (i, part) in panel.chunks(height * PANEL).enumerate() {
            prefetch(part.as_ptr().wrapping_add(part.len()), part.len().min(STRIP * PANEL));
            let values = &mut scratch.as_mut_slice()[..part.len()];
            run(isa, Widen { panel: part, values: &mut *values });
            let start = i * height;
            body(start..self.k().min(start + height), values);
        }
    }
}

/// Asks for what is read next: the processor's own prefetching stops at the
/// end of each small page.
fn prefetch<T>(from: *const T, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    for line in 0..(len * size_of::<T>()).div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch touches nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast::<i8>().wrapping_add(line * 64)) };
    }
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    let _ = (from, len);
}

/// `panel[k][32] += left[k][rank] * right[rank][32]`, for use in
/// [`rewrite`].
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
/// The same for the 32 registers of AVX-512.
const ROWS_512: usize = 8;

impl Kernel for AddProduct<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        let rows = self.panel.len() / PANEL;
        let mut row = 0;
        // SAFETY: `add_product` has checked the lengths; the set is there by the contract.
        unsafe {
            while S::LANES == 16 && row + ROWS_512 <= rows {
                self.rows::<S, ROWS_512>(row);
                row += ROWS_512;
            }
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
                assert!(self.panel.as_ptr().addr().is_multiple_of(64), "a panel starts on a cache line");
                for (i, pairs) in self.panel.chunks_exact_mut(2 * COLUMNS).enumerate() {
                    let (row, column) = place(i);
                    let (even, odd) = self.values[row * PANEL..][..2 * PANEL].split_at(PANEL);
                    let (even, odd) = (&even[column..][..COLUMNS], &odd[column..][..COLUMNS]);
                    // Each word is a pair, on the little-endian machines that there are.
                    let mut words = [0_u32; COLUMNS];
                    for ((word, even), odd) in words.iter_mut().zip(even).zip(odd) {
                        *word = rounded_pair(*even, *odd);
                    }
                    // SAFETY: the panel starts on a line, as was just looked at, and these
                    // 32 values of two bytes are one line of it.
                    unsafe { stream(pairs.as_mut_ptr(), &words) };
                }
            }
        }
    }
}

/// Writes sixteen pairs, a cache line. It goes past the caches: whoever reads
/// it comes long after, and through them the line would be read first.
///
/// # Safety
/// `to` is the start of a line that may be written.
#[inline(always)]
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn stream<T: Element>(to: *mut T, words: &[u32; COLUMNS]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
    for i in 0..4 {
        // SAFETY: four vectors are sixteen words; the line is the caller's
        // promise. `rewrite` puts a fence behind the last store.
        unsafe {
            let part = _mm_loadu_si128(words.as_ptr().add(4 * i).cast());
            _mm_stream_si128(to.cast::<__m128i>().add(i), part);
        }
    }
}

/// Writes sixteen pairs.
///
/// # Safety
/// `to` is the start of a line that may be written.
#[inline(always)]
#[cfg(any(not(target_arch = "x86_64"), miri))]
unsafe fn stream<T: Element>(to: *mut T, words: &[u32; COLUMNS]) {
    // SAFETY: a line is sixteen words, and elements of this kind have two bytes.
    unsafe { to.cast::<[u32; COLUMNS]>().write(*words) };
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::packed::rounded;
    use super::*;
    use crate::testing::{Values, every_cpu};

    /// One matrix with other values, in memory that held others before; the
    /// same by panels and by strips.
    fn rewritten<T: Element>(
        cpu: &Cpu,
        base: &PackedMatrix<T>,
        edit: impl Fn(Range<usize>, Range<usize>, &mut [f32]) + Sync,
    ) -> PackedMatrix<T> {
        let mut arena = Arena::new(4 * base.bytes());
        let elements = 4 * base.bytes() / size_of::<T>();
        arena.take(elements).as_mut_slice().fill(T::from_f32(f32::NAN));
        assert!(arena.reuse());
        let mut all = vec![];
        for portion in [Portion::Panel, Portion::Strip] {
            all.extend(rewrite(cpu, &[base, base], &mut arena, portion, |_, outputs| {
                let edit = &edit;
                move |rows, values: &mut [f32]| edit(outputs.clone(), rows, values)
            }));
        }
        let last = all.remove(3);
        for p in 0..base.panels() {
            assert!(all.iter().all(|one| one.panel(p) == last.panel(p)), "one edit, one matrix");
        }
        last
    }

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
                let again = rewritten(&cpu, &packed, |_, _, _| {});
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
                let got = rewritten(&cpu, &pack(&base), |outputs, rows, values| {
                    let mut right = vec![0.0; rank * PANEL];
                    for (column, i) in outputs.enumerate() {
                        for r in 0..rank {
                            right[r * PANEL + column] = up[i * rank + r];
                        }
                    }
                    add_product(cpu.isa(), values, &left[rows.start * rank..rows.end * rank], &right);
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
